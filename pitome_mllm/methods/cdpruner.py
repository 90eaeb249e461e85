"""CDPruner: "Beyond Attention or Similarity: Maximizing Conditional Diversity" (NeurIPS 2025, arXiv 2506.10967)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .matching import cosine, unit_metric
from .reducer import Selector


@dataclass(frozen=True)
class CDPruner(Selector):
    r"""Keep the subset that a determinantal point process finds most diverse (section 3).

    .. math:: \max_{|S| = K} \det C_S

    with cosine similarities C, greedily: each step adds the token with the largest gain, which a Cholesky factor that
    grows by one column a step keeps up to date (Chen et al., arXiv 1709.05135). The rest is dropped. Of equals the
    first is taken; so once the gains are used up (more tokens than the metric has dimensions), the first tokens in
    reading order follow.

    The paper weighs tokens by their relevance to the question, which the text encoder of the same CLIP tells. LLaVA
    carries none, so that is left out.
    """

    once: ClassVar[bool] = True

    def kept(self, metric: Tensor, count: int) -> Tensor:
        unit, n = unit_metric(metric), metric.shape[1]
        kernel = cosine(unit, unit)
        gain = unit.any(-1).float()  # the kernel's diagonal without its rounding, which would break ties at random
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
