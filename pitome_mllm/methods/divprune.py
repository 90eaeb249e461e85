"""DivPrune: "Diversity-based Visual Token Pruning for Large Multimodal Models" (CVPR 2025, arXiv 2503.02175)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .matching import cosine, unit_metric
from .reducer import Selector


@dataclass(frozen=True)
class DivPrune(Selector):
    r"""Keep the most diverse subset: maximise the smallest distance between any two (max-min diversity, section 3).

    .. math:: d_{ij} = 1 - c_{ij}, \qquad S \leftarrow S \cup \arg\max_{i \notin S} \min_{j \in S} d_{ij}

    Greedily, starting with the token whose nearest neighbour is farthest; of equals the first. The rest is dropped. In
    the paper the metric is what the projector gives to the LLM.
    """

    once: ClassVar[bool] = True

    def kept(self, metric: Tensor, count: int) -> Tensor:
        unit, n = unit_metric(metric), metric.shape[1]
        distance = 1 - cosine(unit, unit)
        nearest = distance.clone()
        nearest.diagonal(dim1=1, dim2=2).fill_(math.inf)
        nearest = nearest.amin(-1) if n > 1 else nearest[..., 0]
        chosen, open_to = [], torch.full_like(nearest, math.inf)
        for _ in range(count):
            best = nearest.argmax(1, keepdim=True)
            chosen.append(best)
            open_to = open_to.minimum(distance.gather(1, best[..., None].expand(-1, -1, n))[:, 0])
            open_to = open_to.scatter(1, best, -math.inf)
            nearest = open_to
        return torch.cat(chosen, 1)
