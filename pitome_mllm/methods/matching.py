"""What methods are made of: unit metrics, cosines, nearest tokens, and orders in which equals keep their places."""

from __future__ import annotations

import torch
from torch import Tensor

from .merge import rows

# Kinds of device whose autocast can be asked for; asked here, once, since not every torch compiles that question.
# None = a torch that cannot tell: that of the original llava package.
AUTOCASTING: frozenset[str] | None = None
if hasattr(torch.amp, "is_autocast_available"):
    AUTOCASTING = frozenset(filter(torch.amp.is_autocast_available, ("cpu", "cuda", "hpu", "mps", "mtia", "xpu")))


def unit_metric(metric: Tensor) -> Tensor:
    """``metric`` (B, N, C) in float32 with rows of length one, in one piece of memory whose layout decides nothing.

    A row with NaN or infinity becomes zero, and a zero row stays zero: such a token is similar to nothing.
    """
    metric = metric.detach().float().contiguous()
    norm = torch.linalg.vector_norm(metric, dim=-1, keepdim=True)
    return (metric / norm.clamp_min_(1e-12)).nan_to_num_(0.0)  # dividing by NaN or infinity leaves NaN or zero


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Products (B, S, T) of rows (B, S, C) and (B, T, C), cosines if they are unit, in float32 also under autocast."""
    kind = a.device.type
    if AUTOCASTING is not None and not (kind in AUTOCASTING and torch.is_autocast_enabled(kind)):
        return a @ b.mT
    with torch.autocast(kind, enabled=False):
        return a @ b.mT


def nearest(unit: Tensor, sources: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The cosine similarity (B, S) of every source to its most similar target, and that target, the first of equals.

    ``sources`` (B, S) and ``targets`` (B, T) are tokens of ``unit`` (B, N, C), which `unit_metric` makes.
    """
    similarity, place = cosine(rows(unit, sources), rows(unit, targets)).max(-1)
    return similarity, targets.gather(1, place)


def ranked(score: Tensor) -> Tensor:
    """Token indices (B, n) by ``score`` (B, n), highest first; the first of equals first."""
    return score.argsort(dim=1, descending=True, stable=True)


def split_evenly(tokens: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """``count`` of the ``tokens`` (B, M) at equal distances, and the others, both in their order."""
    total = tokens.shape[1]
    place = torch.arange(count, device=tokens.device) * total // max(count, 1)
    taken = torch.zeros(total, dtype=torch.int8, device=tokens.device).index_fill(0, place, 1)
    order = taken.argsort(descending=True, stable=True)
    return tokens[:, order[:count]], tokens[:, order[count:]]


def most_similar_first(unit: Tensor, sources: Tensor, targets: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """The ``r`` sources that are most similar to their nearest target, and those targets, each (B, r)."""
    if r == 0:  # there may be no target
        return sources[:, :0], targets[:, :0]
    similarity, target = nearest(unit, sources, targets)
    if r == sources.shape[1]:
        return sources, target
    chosen = ranked(similarity)[:, :r]
    return sources.gather(1, chosen), target.gather(1, chosen)
