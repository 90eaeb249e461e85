"""DART: "Stop Looking for Important Tokens: Duplication Matters More" (EMNLP 2025, arXiv 2502.11494)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .matching import cosine, ranked, unit_metric
from .merge import rows
from .reducer import Selector, check_count


@dataclass(frozen=True)
class DART(Selector):
    r"""Keep a few pivots, and what duplicates them least (section 3.3).

    Pivots :math:`P` are the tokens with the largest L1 norm. Each in turn keeps its share of the others, those least
    similar to it that are not kept yet, and the rest is dropped:

    .. math:: K \leftarrow K \cup \operatorname{arg\,least}_{j \notin K} \, c_{pj}, \quad p \in P, \; K = P
        \text{ at first.}

    The paper works after the LLM's second layer: pivots, text tokens among them, are those of the largest keys there,
    and hidden states are compared. Before the projector there are visual tokens only, and one metric; the preset
    takes the features themselves, for the norm too.

    Parameters
    ----------
    pivots : int, default 8
        How many; 8 in the paper.
    """

    once: ClassVar[bool] = True

    pivots: int = 8

    def __post_init__(self) -> None:
        check_count("pivots", self.pivots)

    def kept(self, metric: Tensor, count: int) -> Tensor:
        unit, many = unit_metric(metric), min(self.pivots, count)
        norm = metric.detach().float().abs().sum(-1)
        pivots = ranked(norm.where(norm.isfinite(), 0.0))[:, :many]
        similarity = cosine(rows(unit, pivots), unit).scatter(2, pivots[:, None].expand(-1, many, -1), math.inf)
        kept, others = [pivots], count - many
        for number in range(many):
            share = others // many + (number < others % many)
            least = ranked(-similarity[:, number])[:, :share]
            kept.append(least)
            similarity = similarity.scatter(2, least[:, None].expand(-1, many, -1), math.inf)
        return torch.cat(kept, 1)
