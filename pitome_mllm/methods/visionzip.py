"""VisionZip: "Longer is Better but Not Necessary in Vision Language Models" (CVPR 2025, arXiv 2412.04467)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .matching import nearest, ranked, split_evenly, unit_metric
from .merge import Merge
from .reducer import Known, Reducer, check_number


@dataclass(frozen=True)
class VisionZip(Reducer):
    r"""Keep the dominant tokens, and merge the rest into a few contextual ones (sections 2.2 and 2.3).

    Dominant are the tokens that the class token looks at most. Of the rest, tokens at equal distances in reading order
    are targets T (at least one); every other one joins its most similar target, by the keys of the block that the
    features come from, and a target j becomes

    .. math:: x_j + \frac{1}{|S_j|} \sum_{i \in S_j} x_i, \quad S_j = \{ i : \arg\max_{t \in T} c_{it} = j \} .

    The paper's words allow the mean of all of them as well. The published code hands on the class token too; here a
    model's own selection of features decides that.

    Parameters
    ----------
    dominant : float, default 54 / 64
        Share of the kept tokens that are dominant; 54 of 64 in the paper.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"attention"})
    bipartite: ClassVar[bool] = False
    once: ClassVar[bool] = True

    dominant: float = 54 / 64

    def __post_init__(self) -> None:
        check_number("dominant", self.dominant, 0, 1)

    def decide(self, metric: Tensor, r: int, known: Known) -> Merge:
        order = ranked(self.needed("attention", known.attention)[:, known.protected :]) + known.protected
        keep = order.shape[1] - r
        contextual = max(1, keep - round(self.dominant * keep))
        rest = order[:, keep - contextual :].sort(1).values
        targets, sources = split_evenly(rest, contextual)
        if r == 0:
            return Merge.join(metric.shape[1], sources, sources)
        target = nearest(unit_metric(metric), sources, targets)[1]
        ones = torch.ones(metric.shape[:2], dtype=torch.float32, device=metric.device)
        joined = torch.zeros_like(ones, dtype=torch.int64).scatter_add(1, target, torch.ones_like(target))
        weight = ones.scatter(1, sources, 1 / joined.gather(1, target).float())
        return Merge.join(metric.shape[1], sources, target, weight=weight)
