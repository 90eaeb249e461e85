"""DCT: a low-pass filter along the token axis, after "Fourier Transformer" (ACL Findings 2023, arXiv 2305.15099)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .matching import cosine
from .merge import Merge
from .reducer import Known, Reducer


def cosines(n: int, device: torch.device) -> Tensor:
    """The orthonormal DCT-II (n, n) in float64: row k holds the k-th frequency."""
    k = torch.arange(n, device=device, dtype=torch.float64)
    waves = torch.cos(math.pi / n * (k + 0.5) * k[:, None]) * math.sqrt(2 / n)
    return torch.cat([waves[:1] / math.sqrt(2), waves[1:]])


class LowPass(Merge):
    """The first ``count`` frequencies of a sequence, as a shorter sequence; there are no groups."""

    def __init__(self, tokens: int, count: int, protected: int, device: torch.device) -> None:
        n, k = tokens - protected, count - protected
        self.count = count
        self.energy = self.group = None
        self._protected = protected
        # Scaled so that a constant stays what it is. (k, n)
        self._matrix = cosines(k, device).mT @ cosines(n, device)[:k] * math.sqrt(k / n)

    def reduce(self, x: Tensor, size: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The shorter sequence (B, K, C); every token of it stands for the same share of the patches."""
        size = torch.ones_like(x[..., :1]) if size is None else size
        front, rest = size.float()[:, : self._protected], size.float()[:, self._protected :]
        k, n = self._matrix.shape
        sizes = torch.cat([front, rest.sum(1, keepdim=True).expand(-1, k, -1) / k], 1)
        return (x, size.float()) if k == n else (self._apply(self._matrix, x), sizes)

    def expand(self, y: Tensor) -> Tensor:
        """The sequence of the full length whose low frequencies are those of ``y``: (B, K, C) -> (B, N, C)."""
        k, n = self._matrix.shape
        return y if k == n else self._apply(self._matrix.mT * (n / k), y)

    def _apply(self, matrix: Tensor, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        front, rest = x[:, : self._protected], x[:, self._protected :]
        return torch.cat([front, cosine(matrix.to(wide), rest.to(wide).mT).to(x.dtype)], 1)


@dataclass(frozen=True)
class DCT(Reducer):
    r"""Drop the high frequencies of the token sequence.

    The orthonormal DCT-II :math:`D_N` of every channel over N tokens in reading order is cut after K coefficients and
    brought back by the inverse of length K, scaled so that a constant stays what it is:

    .. math:: y = \sqrt{K/N} \; D_K^\top \, (D_N x)_{1 \dots K} .

    It looks at no metric, and forms no groups.
    """

    bipartite: ClassVar[bool] = False
    forms_groups: ClassVar[bool] = False

    def decide(self, metric: Tensor, r: int, known: Known) -> Merge:
        tokens = metric.shape[1]
        return LowPass(tokens, tokens - r, known.protected, metric.device)
