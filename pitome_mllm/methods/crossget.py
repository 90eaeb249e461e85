"""CrossGET: "Cross-Guided Ensemble of Tokens" (ICML 2024, arXiv 2305.17455), complete-graph soft matching."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .matching import cosine, most_similar_first, ranked, unit_metric
from .merge import Merge
from .reducer import Known, Reducer


@dataclass(frozen=True)
class CrossGET(Reducer):
    r"""Match on the complete graph instead of between two halves.

    Tokens are ranked by their best similarity to any other, :math:`\max_{j \ne i} c_{ij}`. Each one looks at those
    ranked after it only; the r with the best similarity there are the sources S, and join their most similar token
    among the rest:

    .. math:: S = \operatorname{top}_r \max_{\operatorname{rank} j > \operatorname{rank} i} c_{ij}, \quad
        t(i) = \arg\max_{j \notin S} c_{ij} .

    The paper's learned cross tokens, which guide the matching by the other modality, need training: left out.
    """

    bipartite: ClassVar[bool] = False

    def decide(self, metric: Tensor, r: int, known: Known) -> Merge:
        unit, protected = unit_metric(metric), known.protected
        similarity = cosine(unit[:, protected:], unit[:, protected:])
        similarity.diagonal(dim1=1, dim2=2).fill_(-math.inf)
        rank = ranked(similarity.amax(-1)).argsort(1)  # (B, n): place of every token
        behind = similarity.masked_fill(rank[:, None] <= rank[:, :, None], -math.inf)
        order = ranked(behind.amax(-1)) + protected
        sources, targets = order[:, :r], order[:, r:].sort(1).values
        return Merge.join(metric.shape[1], *most_similar_first(unit, sources, targets, r))
