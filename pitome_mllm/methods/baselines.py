"""Controls that look at nothing: every claim about a method is a claim against these."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .base import Merge, Reducer

_MIX = (0x9E3779B97F4A7C15 - 2**64, 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)  # of SplitMix64


def _shuffled(n: int, seed: int, device: torch.device) -> Tensor:
    """A permutation of 0 .. n-1 that depends on n and seed alone, computed on the device from hashed indices."""
    x = (torch.arange(n, device=device) + (seed % 2**32 + 1) * 2**20) * _MIX[0]
    x = (x ^ (x >> 30)) * _MIX[1]
    x = (x ^ (x >> 27)) * _MIX[2]
    return (x ^ (x >> 31)).argsort(stable=True)


@dataclass(frozen=True)
class RandomDrop(Reducer):
    """Drop a seeded random subset, the same for every picture; nothing merges."""

    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise ValueError(f"seed={self.seed!r} is not possible; choose a whole number")

    @torch.no_grad()
    def match(
        self, metric: Tensor, r: int, *, size: Tensor | None = None, protected: int = 0, depth: float = 0.0
    ) -> Merge:
        n = self.check(metric, r, protected)
        dropped = _shuffled(n, self.seed, metric.device)[:r] + protected
        root = torch.arange(n + protected, device=metric.device).index_fill(0, dropped, -1)
        return Merge(root.repeat(metric.shape[0], 1), n + protected - r)

    def max_removable(self, n: int) -> int:
        return max(n - 1, 0)


def _cells(height: int, width: int, count: int) -> tuple[int, int] | None:
    """Rows and columns of ``count`` cells over a grid, with cells as square as possible; None if there are none."""
    best, least = None, math.inf
    for a in range(1, height + 1):
        b = count // a
        if a * b == count and b <= width:
            skew = max(height * b, width * a) / min(height * b, width * a)
            if skew < least:
                best, least = (a, b), skew
    return best


@dataclass(frozen=True)
class GridPool(Reducer):
    """Mean of neighbouring patches: the grid is cut into a x b cells of (nearly) equal size.

    Only counts a * b with a <= rows and b <= columns exist.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"grid"})
    once: ClassVar[bool] = True

    @torch.no_grad()
    def match(
        self,
        metric: Tensor,
        r: int,
        *,
        size: Tensor | None = None,
        protected: int = 0,
        depth: float = 0.0,
        grid: tuple[int, int] | None = None,
    ) -> Merge:
        n = self.check(metric, r, protected)
        height, width = grid or square(n)
        if height * width != n:
            raise ValueError(f"grid {height} x {width} does not hold {n} tokens; pool whole, unmerged grids only")
        cells = _cells(height, width, n - r)
        if cells is None:
            raise ValueError(
                f"cannot pool {height} x {width} patches to {n - r} tokens; possible are products a * b with "
                f"a <= {height}, b <= {width}, such as {_closest(self.allowed(n), n - r)}"
            )
        top = _corners(height, cells[0], metric.device)[:, None] * width
        left = _corners(width, cells[1], metric.device)
        front = torch.arange(protected, device=metric.device)
        root = torch.cat([front, (top + left).flatten() + protected])
        return Merge(root.repeat(metric.shape[0], 1), n + protected - r)

    def max_removable(self, n: int) -> int:
        return max(n - 1, 0)

    def allowed(self, n: int) -> Collection[int]:
        height, width = square(n)
        return sorted({a * b for a in range(1, height + 1) for b in range(1, width + 1)})


def _corners(size: int, count: int, device: torch.device) -> Tensor:
    """For each of ``size`` indices, the first index of its cell when they are cut into ``count`` cells."""
    cell = torch.arange(size, device=device) * count // size
    return (cell * size + count - 1) // count


def _closest(allowed: Collection[int], count: int) -> str:
    return " or ".join(str(c) for c in sorted(sorted(allowed, key=lambda c: abs(c - count))[:2]))


def square(n: int) -> tuple[int, int]:
    """The side lengths of a square of ``n`` patches; ValueError if it is none."""
    side = math.isqrt(n)
    if side * side != n:
        raise ValueError(f"{n} tokens are not a square grid; pass grid=(rows, columns)")
    return side, side
