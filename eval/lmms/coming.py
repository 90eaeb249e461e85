"""A sequence that is made while it is read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any


class Coming(Sequence):
    """Answers that are made when they are asked for, in order."""

    def __init__(self, coming: Iterator[Any], total: int) -> None:
        self._coming, self._total, self._known = coming, total, []

    def __len__(self) -> int:
        return self._total

    def __getitem__(self, index: Any) -> Any:
        return list(self)[index]

    def __iter__(self) -> Iterator[Any]:
        for number in range(self._total):
            if number == len(self._known):
                self._known.append(next(self._coming))
            yield self._known[number]
