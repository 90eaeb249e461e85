"""CDPruner: "Beyond Attention or Similarity: Maximizing Conditional Diversity" (NeurIPS 2025, arXiv 2506.10967)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .matching import cosine, unit_metric
from .merge import Merge
from .reducer import Selector


@dataclass(frozen=True)
class CDPruner(Selector):
    r"""Keep the subset that a determinantal point process finds most diverse (section 3).

    .. math:: L = \mathrm{diag}(q)\, C\, \mathrm{diag}(q), \qquad \max_{|S| = K} \det L_S

    with cosine similarities C, greedily: each step adds the token with the largest gain, which a Cholesky factor that
    grows by one column a step keeps up to date (Chen et al., arXiv 1709.05135). The rest is dropped. Of equals the
    first is taken; so once the gains are used up (more tokens than the metric has dimensions), the first tokens in
    reading order follow.

    The paper's q is each token's relevance to the question by the text encoder of the same CLIP. LLaVA carries none, so
    q = 1 unless `match` gets a ``query`` (B, C): then it is the cosine similarity to that, scaled to 0 .. 1.
    """

    once: ClassVar[bool] = True

    @torch.no_grad()
    def match(self, metric: Tensor, r: int, *, protected: int = 0, query: Tensor | None = None, **known: Any) -> Merge:
        self.check(metric, r, protected)
        tokens = metric.shape[1]
        kept = self.kept(metric[:, protected:], tokens - protected - r, query) + protected
        return Merge.select(tokens, kept, protected)

    def kept(self, metric: Tensor, count: int, query: Tensor | None = None) -> Tensor:
        unit, n = unit_metric(metric), metric.shape[1]
        q = unit.any(-1, keepdim=True).float()
        if query is not None:
            q = q * _relevance(unit, query)
        kernel = cosine(unit * q, unit * q)
        gain = q.square()[..., 0]  # the kernel's diagonal without its rounding, which would break ties at random
        taken = torch.zeros_like(gain)
        factor = gain.new_zeros(len(gain), count, n)
        chosen = []
        for step in range(count):
            best = gain.argmax(1, keepdim=True)
            chosen.append(best)
            column = factor.gather(2, best[:, None].expand(-1, count, -1)).mT  # (B, 1, K)
            row = kernel.gather(1, best[..., None].expand(-1, -1, n)) - cosine(column, factor.mT)
            row = row[:, 0] / gain.gather(1, best).clamp_min(1e-6).sqrt()
            factor[:, step] = row
            taken = taken.scatter(1, best, -math.inf)
            gain = (gain - row.square()).clamp_min(0.0)
            gain = gain.where(gain > 1e-6, 0.0) + taken
        return torch.cat(chosen, 1)


def _relevance(unit: Tensor, query: Tensor) -> Tensor:
    """(B, n, 1): similarity of unit tokens (B, n, C) to a query (B, C), scaled to 0 .. 1 over the tokens."""
    similarity = cosine(unit, unit_metric(query[:, None]))
    low, high = similarity.amin(1, keepdim=True), similarity.amax(1, keepdim=True)
    return (similarity - low) / (high - low).clamp_min(1e-6)
