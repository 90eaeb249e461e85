"""PiToMe: merge inside large clusters of similar tokens, protect the rare ones.

"Accelerating Transformers with Spectrum-Preserving Token Merging" (NeurIPS 2024, arXiv 2405.16148), section 3.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UserError
from . import kernels
from .matching import cosine, most_similar_first, ranked, unit_metric
from .merge import Merge
from .reducer import Known, Reducer, check_number

ENERGIES = ("paper", "elu")
# Pairs of tokens whose similarity is held at once: on processors what their caches hold, else 256 MB in float32; their
# values take as much again.
BLOCK = {"cpu": 2**17, "gpu": 2**26}
ROUNDING = 2.0**-24  # of a cosine in float32


@dataclass(frozen=True)
class PiToMe(Reducer):
    r"""Energy-protected token merging.

    With cosine similarity :math:`c_{ij}` of the metric and margin :math:`m`, the energy of token i is

    .. math:: E_i = \frac1N \sum_j f(c_{ij}), \qquad f(c) = c \;(c \ge m), \quad \alpha\,(e^{c-m} - 1) \;(c < m).

    Tokens are sorted by energy, descending; the first 2r are candidates and split alternately into A and B; every
    token of A joins its most similar token of B. High energy means: one of many alike, hence redundant.

    Parameters
    ----------
    margin : float, optional
        The margin m; None = 0.9 - 0.9 * depth, the paper's, which falls from block to block.
    alpha : float, default 1.0
        Weight of dissimilar tokens.
    energy : str, default 'paper'
        "paper" as above, or "elu", where f(c) = c - m above the margin (the authors' code).
    protect : float, default 1.0
        Share of the tokens outside the first 2r that may not merge. 1 = the paper. Below it there are more candidates
        than needed and the r most similar pairs merge; 0 = no protected set at all (`pitome-bsm`).
    """

    margin: float | None = None
    alpha: float = 1.0
    energy: str = "paper"
    protect: float = 1.0

    def __post_init__(self) -> None:
        if self.energy not in ENERGIES:
            raise UserError(f"unknown energy {self.energy!r}; choose one of {', '.join(ENERGIES)}")
        if self.margin is not None:
            check_number("margin", self.margin)
        check_number("alpha", self.alpha)
        check_number("protect", self.protect, 0, 1)

    @property
    def source_order(self) -> bool:
        """Known for the paper's procedure only, which protects all others."""
        return self.protect == 1

    def decide(self, metric: Tensor, r: int, known: Known) -> Merge:
        protected, depth = known.protected, known.depth
        n = metric.shape[1] - protected
        candidates = 2 * r + int((1.0 - self.protect) * (n - 2 * r))
        if r and type(self) is PiToMe and kernels.fuses(metric):
            energy = kernels.Energy(candidates, float(self._margin(depth)), float(self.alpha), self.energy == "elu")
            merge: Merge = kernels.merge(metric, r, protected, energy)
        else:
            merge = self._plain(metric, r, protected, candidates, depth)
        merge.candidates = candidates
        if r and self.source_order:
            merge.source = partial(authors_order, protected, candidates)
        return merge

    def _plain(self, metric: Tensor, r: int, protected: int, candidates: int, depth: float) -> Merge:
        """The same in torch's operations."""
        unit = unit_metric(metric)
        energy = self.energy_of(unit[:, protected:], depth)
        order = ranked(energy) + protected
        a, b = order[:, 0:candidates:2], order[:, 1:candidates:2]
        return Merge.join(metric.shape[1], *most_similar_first(unit, a, b, r), energy=energy)

    def _margin(self, depth: float) -> float:
        return 0.9 - 0.9 * depth if self.margin is None else self.margin

    def energy_of(self, unit: Tensor, depth: float) -> Tensor:
        """Energy (B, n) of tokens with unit metric (B, n, C), each counting itself."""
        return pair_means(unit, partial(self._value, margin=self._margin(depth)), products=similarities)

    def _value(self, similarity: Tensor, margin: float) -> Tensor:
        """f of similarities of any shape, which are overwritten; without boolean masks, slow on processors."""
        if self.energy == "elu":
            value = (similarity - margin).clamp_min_(0.0)
        else:
            value = F.threshold(similarity, margin - ROUNDING, 0.0)  # keeps what is above, so the margin itself too
        if not self.alpha:
            return value
        return value.add_(similarity.clamp_max_(margin).sub_(margin).exp_().sub_(1.0), alpha=self.alpha)


def authors_order(protected: int, candidates: int, merge: Merge) -> Tensor:
    """What the authors' code leaves, (B, K): class tokens, all but the ``candidates`` by energy, then B."""
    order = merge.by_energy if isinstance(merge, kernels.FusedMerge) else ranked(cast(Tensor, merge.energy))
    front = torch.arange(protected, device=order.device).expand(len(order), protected)
    return torch.cat([front, order[:, candidates:] + protected, order[:, 1:candidates:2] + protected], dim=1)


def similarities(some: Tensor, unit: Tensor) -> Tensor:
    """Cosines (B, S, n) of the first tokens ``some`` (B, S, C) of ``unit`` (B, n, C) to all of it.

    A token's cosine to itself is exactly 1 (0 for a zero row): rounding must not rank tokens without a neighbour.
    """
    cosines = cosine(some, unit)
    cosines.diagonal(dim1=1, dim2=2).round_()
    return cosines


def pair_means(
    unit: Tensor, value: Callable[[Tensor], Tensor], products: Callable[[Tensor, Tensor], Tensor] = cosine
) -> Tensor:
    """Mean of ``value`` of the ``products`` with all tokens, for every token of ``unit`` (B, n, C): (B, n).

    Products are symmetric, so each pair is worked out once, for both of its tokens, but those within a block of rows.
    """
    batch, tokens = unit.shape[:2]
    if batch > 1 and unit.device.type == "cpu":  # one after the other stays in the caches
        return torch.cat([pair_means(row, value, products) for row in unit.split(1)])
    rows = block_rows(unit)
    if rows >= tokens:
        return value(products(unit, unit)).mean(-1)
    total = unit.new_zeros(batch, tokens)
    for start in range(0, tokens, rows):
        pairs = value(products(unit[:, start : start + rows], unit[:, start:]))
        total[:, start : start + rows].add_(pairs.sum(2))
        total[:, start + rows :].add_(pairs[..., rows:].sum(1))
    return total / tokens


def block_rows(unit: Tensor) -> int:
    """How many tokens of ``unit`` (B, n, C) to compare with all others at once, so that memory stays bounded."""
    batch, tokens = unit.shape[:2]
    return max(1, BLOCK["cpu" if unit.device.type == "cpu" else "gpu"] // max(1, batch * tokens))
