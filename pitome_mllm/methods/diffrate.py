"""DiffRate: "Differentiable Compression Rate for Efficient Vision Transformers" (ICCV 2023, arXiv 2305.17997)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .matching import most_similar_first, ranked, unit_metric
from .merge import Merge
from .reducer import Known, Reducer


@dataclass(frozen=True)
class DiffRate(Reducer):
    r"""Keep the tokens that the class token looks at; every other one joins its most similar kept token (section 3).

    With class attention :math:`a` and cosine similarity :math:`c_{ij}`:

    .. math:: K = \operatorname{top}_{N-r} a_i, \quad t(i) = \arg\max_{j \in K} c_{ij} .

    The paper learns how many tokens every block prunes and merges; here the schedule says how many, and all merge.
    Groups take the size-weighted mean.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"attention"})
    bipartite: ClassVar[bool] = False

    def decide(self, metric: Tensor, r: int, known: Known) -> Merge:
        order = ranked(self.needed("attention", known.attention)[:, known.protected :]) + known.protected
        keep = order.shape[1] - r
        kept, others = order[:, :keep].sort(1).values, order[:, keep:]
        return Merge.join(metric.shape[1], *most_similar_first(unit_metric(metric), others, kept, r))
