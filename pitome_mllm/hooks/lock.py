"""What may run while a CUDA graph is captured."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import nn


class CaptureLock:
    """What may run beside a capture: nothing that merges, or draws random numbers, in this process.

    A capture never waits for others, so that nothing can wait for itself; others wait for a capture.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside: dict[int, int] = {}  # how often each thread is inside
        self._alone: int | None = None

    @contextmanager
    def shared(self) -> Iterator[None]:
        me = threading.get_ident()
        with self._changed:
            self._changed.wait_for(lambda: self._alone in (None, me))
            self._inside[me] = self._inside.get(me, 0) + 1
        try:
            yield
        finally:
            with self._changed:
                self._inside[me] -= 1
                if not self._inside[me]:
                    del self._inside[me]

    @contextmanager
    def exclusive(self) -> Iterator[bool]:
        """Whether nobody else is inside; if so, nobody comes in within the block."""
        me = threading.get_ident()
        with self._changed:
            free = self._alone is None and set(self._inside) <= {me}
            self._alone = me if free else self._alone
        try:
            yield free
        finally:
            if free:
                with self._changed:
                    self._alone = None
                    self._changed.notify_all()


captures = CaptureLock()  # torch captures one graph at a time, and draws no random numbers on the device meanwhile


def drawing(model: nn.Module, kwargs: dict[str, Any]) -> AbstractContextManager[None]:
    """Within generate() with ``kwargs``: no capture where it draws random numbers."""
    config = kwargs.get("generation_config") or model.generation_config
    return captures.shared() if kwargs.get("do_sample", config.do_sample) else nullcontext()
