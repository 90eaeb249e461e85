"""Whose turn it is: threads that run together, or one of them alone."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Turns:
    """What runs beside its like, and what runs alone. Within itself and the other, a thread never waits for itself."""

    def __init__(self) -> None:
        self._turn = threading.Condition()
        self._running: list[int] = []  # the thread of everything that runs together

    @contextmanager
    def together(self) -> Iterator[None]:
        with self._turn:
            self._running.append(threading.get_ident())
        try:
            yield
        finally:
            with self._turn:
                self._running.remove(threading.get_ident())
                self._turn.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        with self._turn:
            self._turn.wait_for(lambda: set(self._running) <= {threading.get_ident()})
            yield
