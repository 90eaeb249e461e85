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
from .reducer import Known, Reducer


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

    def decide(self, metric: Tensor, r: int, known: Known) -> Merge:
        if r and kernels.fuses(metric):
            merge: Merge = kernels.merge(metric, r, known.protected)
        else:
            a, b = alternate(metric, known.protected)
            merge = Merge.join(metric.shape[1], *most_similar_first(unit_metric(metric), a, b, r))
        if r:
            merge.source = partial(authors_order, r, known.protected)
        return merge


def authors_order(r: int, protected: int, merge: Merge) -> Tensor:
    """What the authors' code leaves, (B, K): the class token, the rest of A, then B; r tokens of A have joined one."""
    group = merge._group
    batch, tokens = group.shape
    a = alternate(group, protected)[0]
    alone = merge.expand(merge.reduce(torch.ones_like(group, dtype=torch.float32)[..., None])[1])[..., 0] == 1
    gone = a.gather(1, alone.gather(1, a).byte().argsort(dim=1, stable=True)[:, :r])
    index = torch.arange(tokens, device=group.device).expand(batch, tokens)
    place = index.where(index < protected, index + tokens * (1 + index % 2))
    return place.scatter(1, gone, 3 * tokens).argsort(dim=1)[:, : tokens - r]
