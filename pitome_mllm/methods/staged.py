"""One method in the early blocks and another in the late ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .merge import Merge
from .pitome import PiToMe
from .reducer import Known, Reducer, check_number
from .tome import ToMe


@dataclass(frozen=True)
class Staged(Reducer):
    """ToMe where depth < ``switch``, and PiToMe with f(c) = c - m above the margin from there on.

    The default is what the authors' LLaVA code does on a 24-block tower: energy from block 13 on.
    """

    source_order: ClassVar[bool] = True

    switch: float = 13 / 24

    def __post_init__(self) -> None:
        check_number("switch", self.switch, 0, 1)

    def decide(self, metric: Tensor, r: int, known: Known) -> Merge:
        stage = ToMe() if known.depth < self.switch else PiToMe(energy="elu")
        return stage.decide(metric, r, known)
