"""Controls that average what lies side by side: of the tokens (`pool`), or of the pixels (`downsample`)."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import UserError
from .merge import Merge
from .reducer import Known, Reducer


def cells(height: int, width: int, count: int) -> tuple[int, int] | None:
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
    bipartite: ClassVar[bool] = False
    once: ClassVar[bool] = True

    def decide(self, metric: Tensor, r: int, known: Known) -> Merge:
        protected = known.protected
        n = metric.shape[1] - protected
        height, width = known.grid or square(n)
        if height * width != n:
            raise UserError(f"grid {height} x {width} does not hold {n} tokens; pool whole, unmerged grids only")
        chosen = cells(height, width, n - r)
        if chosen is None:
            raise UserError(
                f"cannot pool {height} x {width} patches to {n - r} tokens; possible are products a * b with "
                f"a <= {height}, b <= {width}, such as {_closest(self.allowed(n), n - r)}"
            )
        top = _corners(height, chosen[0], metric.device)[:, None] * width
        left = _corners(width, chosen[1], metric.device)
        front = torch.arange(protected, device=metric.device)
        root = torch.cat([front, (top + left).flatten() + protected])
        return Merge(root.repeat(metric.shape[0], 1), n + protected - r, root_is_first=True, may_drop=False)

    def allowed(self, n: int) -> Collection[int]:
        height, width = square(n)
        return sorted({a * b for a in range(1, height + 1) for b in range(1, width + 1)})


@dataclass(frozen=True)
class Downsample(GridPool):
    """A smaller image instead of fewer tokens: as many patches as ``keep``, positions interpolated.

    The image is scaled before the tower to a x b patches, as square as the count allows. `match` says which of the
    original patches lie under each of the new ones; nothing is merged by it.
    """

    shrinks_picture: ClassVar[bool] = True


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
        raise UserError(f"{n} tokens are not a square grid; pass grid=(rows, columns)")
    return side, side
