"""One method in the early blocks and another in the late ones."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..errors import UserError
from .merge import Merge
from .pitome import PiToMe
from .reducer import Reducer, check_number
from .tome import ToMe


@dataclass(frozen=True)
class Staged(Reducer):
    """Use ``early`` where depth < ``switch``, and ``late`` from there on.

    The defaults are what the authors' LLaVA code does on a 24-block tower: plain ToMe in blocks 0 to 12, and merging
    by energy, with f(c) = c - m above the margin, from block 13 on.
    """

    early: Reducer = ToMe()
    late: Reducer = PiToMe(energy="elu")
    switch: float = 13 / 24

    def __post_init__(self) -> None:
        check_number("switch", self.switch, 0, 1)
        for name in ("early", "late"):
            if not isinstance(getattr(self, name), Reducer):
                raise UserError(f"{name}={getattr(self, name)!r} is no Reducer; pass one, such as get_method('tome')")

    @property
    def source_order(self) -> bool:
        """Where both stages have one."""
        return self.early.source_order and self.late.source_order

    def match(
        self, metric: Tensor, r: int, *, size: Tensor | None = None, protected: int = 0, depth: float = 0.0
    ) -> Merge:
        stage = self.early if depth < self.switch else self.late
        return stage.match(metric, r, size=size, protected=protected, depth=depth)

    def max_removable(self, n: int) -> int:
        return min(self.early.max_removable(n), self.late.max_removable(n))
