"""MCTF: "Multi-criteria Token Fusion with One-step-ahead Attention" (CVPR 2024, arXiv 2403.10030)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import UserError
from .matching import cosine, ranked, unit_metric
from .merge import Merge, rows
from .reducer import Known, Reducer, check_number
from .tome import alternate


@dataclass(frozen=True)
class MCTF(Reducer):
    r"""Merge what is alike, matters little and is still small, from both sides (sections 3.2 and 3.3).

    .. math:: W_{ij} = \left(\frac{c_{ij} + 1}{2}\right)^{1/\tau_{sim}}
              \left(\frac1{a_i a_j}\right)^{1/\tau_{info}} \left(\frac1{s_i s_j}\right)^{1/\tau_{size}}

    with cosine similarity c, attention a that a token receives, and size s. Of r tokens, half go from A to their best
    partner in B, then the rest from B to what is left of A.

    Attention is what the class token gives (the paper: the mean over all tokens in the next layer, which would need
    whole attention matrices). Groups take the size-weighted mean; pooling that weighs by attention as well, which
    published code knows, is left out. Without ``attention`` its factor is left out.

    Parameters
    ----------
    tau_sim, tau_info, tau_size : float
        Temperatures of the three criteria; the larger, the less a criterion counts.
    bidirectional : bool, default True
        False = all r tokens go from A to B.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"attention"})

    tau_sim: float = 1.0
    tau_info: float = 20.0
    tau_size: float = 40.0
    bidirectional: bool = True

    def __post_init__(self) -> None:
        for name in ("tau_sim", "tau_info", "tau_size"):
            check_number(name, getattr(self, name), 1e-3)
        if not isinstance(self.bidirectional, bool):
            raise UserError(f"bidirectional={self.bidirectional!r} is not possible; choose True or False")

    def decide(self, metric: Tensor, r: int, known: Known) -> Merge:
        a, b = alternate(metric, known.protected)
        if r == 0:
            return Merge.join(metric.shape[1], a[:, :0], a[:, :0])
        unit, cost = unit_metric(metric), self._cost(metric, known.size, known.attention)
        there = r // 2 if self.bidirectional else r
        root = torch.arange(metric.shape[1], device=metric.device).repeat(len(metric), 1)
        order, target = self._best(unit, cost, a, b)
        root = root.scatter(1, order[:, :there], target[:, :there])
        if r > there:
            back, target = self._best(unit, cost, b, order[:, there:].sort(1).values)
            root = root.scatter(1, back[:, : r - there], target[:, : r - there])
            root = root.gather(1, root)  # a token of A whose partner in B moved on moves with it
        return Merge(root, metric.shape[1] - r, may_drop=False)

    def _cost(self, metric: Tensor, size: Tensor | None, attention: Tensor | None) -> Tensor:
        """(B, N): the logarithm of how much attention and size speak against merging a token."""
        cost = metric.new_zeros(metric.shape[:2], dtype=torch.float32)
        if size is not None:
            cost = cost + size[..., 0].float().log() / self.tau_size
        if attention is not None:
            cost = cost + attention.float().clamp_min(1e-12).log() / self.tau_info
        return cost

    def _best(self, unit: Tensor, cost: Tensor, sources: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The ``sources`` (B, S), those with the best partner first, and their partners among ``targets`` (B, T)."""
        similarity = cosine(rows(unit, sources), rows(unit, targets))
        weight = ((similarity + 1) / 2).clamp_min(1e-12).log() / self.tau_sim - cost.gather(1, targets)[:, None]
        order = ranked(weight.amax(-1) - cost.gather(1, sources))
        target = targets.gather(1, weight.argmax(-1))
        return sources.gather(1, order), target.gather(1, order)
