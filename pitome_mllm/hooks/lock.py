"""What may run while a CUDA graph is captured."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import nn

PATIENCE = 0.05  # seconds that a capture waits for calls of a tower to end


class CaptureLock:
    """What may run beside a capture: nothing that merges, or draws random numbers, in this process.

    A capture waits for others for a moment only, so that nothing waits for itself; others wait for a capture.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside: dict[int, int] = {}  # how often each thread is inside
        self._holder: int | None = None

    @contextmanager
    def shared(self) -> Iterator[None]:
        me = threading.get_ident()
        with self._changed:
            self._changed.wait_for(lambda: self._holder in (None, me) or me in self._inside)
            self._inside[me] = self._inside.get(me, 0) + 1
        try:
            yield
        finally:
            with self._changed:
                self._inside[me] -= 1
                if not self._inside[me]:
                    del self._inside[me]
                    self._changed.notify_all()

    @contextmanager
    def exclusive(self) -> Iterator[bool]:
        """Whether nobody else is inside; if so, nobody comes in within the block."""
        me = threading.get_ident()
        with self._changed:
            free = self._holder is None
            if free:
                self._holder = me  # nobody comes in any more
                free = self._changed.wait_for(lambda: set(self._inside) <= {me}, 0 if me in self._inside else PATIENCE)
                if not free:
                    self._open()
        try:
            yield free
        finally:
            if free:
                with self._changed:
                    self._open()

    def _open(self) -> None:
        self._holder = None
        self._changed.notify_all()


captures = CaptureLock()  # torch captures one graph at a time, and draws no random numbers on the device meanwhile


def drawing(model: nn.Module, kwargs: dict[str, Any]) -> AbstractContextManager[None]:
    """Within generate() with ``kwargs``: no capture where it draws random numbers."""
    config = kwargs.get("generation_config") or model.generation_config
    return captures.shared() if kwargs.get("do_sample", config.do_sample) else nullcontext()
