"""ToMe: "Token Merging: Your ViT But Faster" (ICLR 2023, arXiv 2210.09461), section 3."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from . import kernels
from .matching import most_similar_first, unit_metric
from .merge import Merge
from .reducer import Reducer


def alternate(metric: Tensor, protected: int) -> tuple[Tensor, Tensor]:
    """The unprotected tokens of ``metric`` (B, N, C) at even and at odd places, as indices (B, ...) each."""
    index = torch.arange(metric.shape[1], device=metric.device).expand(len(metric), -1)
    return index[:, protected + protected % 2 :: 2], index[:, protected + 1 - protected % 2 :: 2]


@dataclass(frozen=True)
class ToMe(Reducer):
    r"""Bipartite soft matching: tokens alternate between A and B by position; of A, the r most similar to B merge.

    With cosine similarity :math:`c_{ij}` a token i of A, if its best similarity is among the r largest, joins

    .. math:: t(i) = \arg\max_{j \in B} c_{ij} .

    The alternation counts from the class token on, so that it is the first of A; it never merges.
    """

    source_order: ClassVar[bool] = True

    @torch.no_grad()
    def match(
        self, metric: Tensor, r: int, *, size: Tensor | None = None, protected: int = 0, depth: float = 0.0
    ) -> Merge:
        self.check(metric, r, protected)
        tokens = metric.shape[1]
        if r and kernels.fuses(metric):
            merge = kernels.merge(metric, r, protected)
            same = merge.without_source()
            merge._source = lambda: authors_order(tokens, gone(same, r, protected), protected)
            return merge
        a, b = alternate(metric, protected)
        if r == 0:
            return Merge.join(tokens, a[:, :0], a[:, :0])
        merged, target = most_similar_first(unit_metric(metric), a, b, r)
        return Merge.join(tokens, merged, target, source=partial(authors_order, tokens, merged, protected))


def gone(merge: Merge, r: int, protected: int) -> Tensor:
    """The r tokens of A that joined another, (B, r)."""
    a = alternate(merge._group, protected)[0]
    tokens = torch.ones_like(merge._group, dtype=torch.float32)[..., None]
    alone = merge.expand(merge.reduce(tokens)[1])[..., 0] == 1
    return a.gather(1, alone.gather(1, a).byte().argsort(dim=1, stable=True)[:, :r])


def authors_order(tokens: int, merged: Tensor, protected: int) -> Tensor:
    """What the authors' code leaves of ``tokens`` when ``merged`` (B, r) have gone: class token, rest of A, then B."""
    index = torch.arange(tokens, device=merged.device).expand(len(merged), tokens)
    place = index.where(index < protected, index + tokens * (1 + index % 2))
    return place.scatter(1, merged, 3 * tokens).argsort(dim=1)[:, : tokens - merged.shape[1]]
