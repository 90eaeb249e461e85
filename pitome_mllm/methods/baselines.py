"""Controls that look at nothing: every claim about a method is a claim against these."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import UserError
from .merge import Merge
from .reducer import Reducer

_MIX = (0x9E3779B97F4A7C15 - 2**64, 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)  # of SplitMix64


def _shuffled(n: int, seed: int, device: torch.device) -> Tensor:
    """A permutation of 0 .. n-1 that depends on n and seed alone, computed on the device from hashed indices."""
    # by "or", not "+": inductor would reckon sums of indices and their products out, beyond 64 bits
    x = (torch.arange(n, device=device) | (seed % 2**32 + 1) << 20) * _MIX[0]
    x = (x ^ (x >> 30)) * _MIX[1]
    x = (x ^ (x >> 27)) * _MIX[2]
    return (x ^ (x >> 31)).argsort(stable=True)


@dataclass(frozen=True)
class RandomDrop(Reducer):
    """Drop a seeded random subset, the same for every image; nothing merges."""

    bipartite: ClassVar[bool] = False

    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise UserError(f"seed={self.seed!r} is not possible; choose a whole number")

    @torch.no_grad()
    def match(
        self, metric: Tensor, r: int, *, size: Tensor | None = None, protected: int = 0, depth: float = 0.0
    ) -> Merge:
        n = self.check(metric, r, protected)
        kept = _shuffled(n, self.seed, metric.device)[r:] + protected
        return Merge.select(n + protected, kept.repeat(metric.shape[0], 1), protected)


@dataclass(frozen=True)
class Uniform(Reducer):
    """Keep tokens at equal distances in reading order; nothing merges."""

    bipartite: ClassVar[bool] = False

    @torch.no_grad()
    def match(
        self, metric: Tensor, r: int, *, size: Tensor | None = None, protected: int = 0, depth: float = 0.0
    ) -> Merge:
        n = self.check(metric, r, protected)
        kept = torch.arange(n - r, device=metric.device) * n // (n - r) + protected
        return Merge.select(n + protected, kept.repeat(metric.shape[0], 1), protected)
