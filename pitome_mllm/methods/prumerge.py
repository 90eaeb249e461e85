"""LLaVA-PruMerge: "Adaptive Token Reduction for Efficient Large Multimodal Models" (ICCV 2025, arXiv 2403.15388)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .matching import nearest, ranked, split_evenly, unit_metric
from .merge import Merge
from .reducer import Known, Reducer, check_number


@dataclass(frozen=True)
class PruMerge(Reducer):
    r"""Keep the tokens that the class token looks at most, and let each absorb the dropped ones like it (section 3).

    With class attention :math:`a` each token joins the most similar kept one, by keys, and a group :math:`G` becomes

    .. math:: \sum_{j \in G} a_j x_j \Big/ \sum_{j \in G} a_j .

    The paper takes as many as are outliers of the attention; here ``keep`` says how many. It combines each kept token
    with its k nearest others; these may overlap, and what is nobody's neighbour is lost. Here groups are disjoint and
    no token is lost. The published code adds the neighbours' :math:`a_j x_j` to the kept token without dividing,
    appends one token that sums up all dropped ones, and reads attention and keys after the features, in the tower's
    last block; here they come from the block that the features come from, and from no later one.

    Parameters
    ----------
    uniform : float, default 0.0
        Share of the kept tokens that are taken at equal distances in reading order from those that attention left (the
        "+" variant, which spreads its samples as the image needs; half of them here).
    """

    needs: ClassVar[frozenset[str]] = frozenset({"attention"})
    bipartite: ClassVar[bool] = False
    once: ClassVar[bool] = True

    uniform: float = 0.0

    def __post_init__(self) -> None:
        check_number("uniform", self.uniform, 0, 1)

    def decide(self, metric: Tensor, r: int, known: Known) -> Merge:
        attention, protected = self.needed("attention", known.attention), known.protected
        order = ranked(attention[:, protected:]) + protected
        keep = order.shape[1] - r
        uniform = round(self.uniform * keep)
        samples, sources = split_evenly(order[:, keep - uniform :].sort(1).values, uniform)
        if r == 0:
            return Merge.join(metric.shape[1], sources, sources)
        kept = torch.cat([order[:, : keep - uniform], samples], 1).sort(1).values
        target = nearest(unit_metric(metric), sources, kept)[1]
        merge = Merge.join(metric.shape[1], sources, target)
        return merge.weighted_by(attention.float().clamp_min(1e-12))
