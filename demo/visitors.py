"""Who is there: the conversations of all visitors."""

from __future__ import annotations

import threading
import time
from collections.abc import Hashable

from pitome_mllm.methods import UserError

from .engine import Engine
from .session import Conversation

MAX_VISITORS = 128  # with room for those who just closed the page: Gradio notices a quarter of a minute later
IDLE_SECONDS = 1800  # after which a visitor who did not say goodbye counts as gone


class Visitors:
    """Who is there: one `Conversation` per key, freed when its visitor leaves or was away for ``idle`` seconds."""

    def __init__(self, engine: Engine, most: int = MAX_VISITORS, idle: float = IDLE_SECONDS) -> None:
        self.engine, self.most, self.idle = engine, most, idle
        self._lock = threading.Lock()
        self.conversations: dict[Hashable, Conversation] = {}

    def of(self, key: Hashable) -> Conversation:
        """The conversation of a visitor, a new one for a new visitor."""
        if key not in self.conversations:
            self.expire()
        with self._lock:
            if key not in self.conversations and len(self.conversations) >= self.most:
                raise UserError(f"{self.most} visitors are here, and there is no room for more; come back later")
            found = self.conversations.setdefault(key, Conversation(self.engine))
        found.seen = time.monotonic()
        return found

    def leave(self, key: Hashable) -> None:
        """Free what a visitor holds."""
        with self._lock:
            gone = self.conversations.pop(key, None)
        if gone is not None:
            gone.leave()

    def watch(self, every: float = 60.0) -> None:
        """`expire` for ever, on a thread that ends with the program."""

        def run() -> None:
            while True:
                time.sleep(every)
                self.expire()

        threading.Thread(target=run, name="expiry", daemon=True).start()

    def expire(self) -> None:
        """Let those go who were away for long."""
        now = time.monotonic()
        with self._lock:
            late = [key for key, found in self.conversations.items() if now - found.seen > self.idle and not found.busy]
        for key in late:
            self.leave(key)
