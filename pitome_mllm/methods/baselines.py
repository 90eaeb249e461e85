"""Controls that look at nothing: every claim about a method is a claim against these."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UserError
from .reducer import Selector

_MIX = (0x9E3779B97F4A7C15 - 2**64, 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)  # of SplitMix64


def _shuffled(n: int, seed: int, device: torch.device) -> Tensor:
    """A permutation of 0 .. n-1 that depends on n and seed alone, computed on the device from hashed indices."""
    # by "or", not "+": inductor would reckon sums of indices and their products out, beyond 64 bits
    x = (torch.arange(n, device=device) | (seed % 2**32 + 1) << 20) * _MIX[0]
    x = (x ^ (x >> 30)) * _MIX[1]
    x = (x ^ (x >> 27)) * _MIX[2]
    return (x ^ (x >> 31)).argsort(stable=True)


@dataclass(frozen=True)
class RandomDrop(Selector):
    """Drop a seeded random subset, the same for every image; nothing merges."""

    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise UserError(f"seed={self.seed!r} is not possible; choose a whole number")

    def kept(self, metric: Tensor, count: int) -> Tensor:
        rows, n = metric.shape[:2]
        return _shuffled(n, self.seed, metric.device)[n - count :].repeat(rows, 1)


@dataclass(frozen=True)
class Uniform(Selector):
    """Keep tokens at equal distances in reading order; nothing merges."""

    def kept(self, metric: Tensor, count: int) -> Tensor:
        rows, n = metric.shape[:2]
        return (torch.arange(count, device=metric.device) * n // count).repeat(rows, 1)
