"""Tokens whose merges no rounding decides, and the decisions of the reference."""

from __future__ import annotations

import torch
from torch import Tensor

from pitome_mllm.methods import Merge, PiToMe, Reducer

GAP = 2e-6  # of energies and cosines; float32 is some ten times as exact


def exact(batch: int, tokens: int, width: int, kinds: int, seed: int) -> Tensor:
    """Rows (B, N, C) of ``kinds`` different ones with 4 ** k entries of 1 or -1, the others 0.

    Their length, cosines and, with alpha=0, energies are exact in any floating type, and full of ties.
    """
    random = torch.Generator().manual_seed(seed)
    filled = 4 ** max(k for k in range(2, 6) if 4**k <= width)
    some = torch.randint(2, (batch, kinds, width), generator=random) * 2.0 - 1
    some[..., torch.randperm(width, generator=random)[filled:]] = 0
    kind = torch.randint(kinds, (batch, tokens, 1), generator=random)
    return some.gather(1, kind.expand(-1, -1, width))


def clear(reducer: Reducer, batch: int, tokens: int, width: int, r: int, dtype: torch.dtype, **options) -> Tensor:
    """Clustered rows (B, N, C) of a type, of the first seed by which no decision of the reducer is nearly a tie."""
    for seed in range(200):
        random = torch.Generator().manual_seed(seed)
        centre = torch.randn(batch, 6, width, generator=random)
        kind = torch.randint(6, (batch, tokens, 1), generator=random)
        spread = 0.7 * torch.randn(batch, tokens, width, generator=random)
        metric = (centre.gather(1, kind.expand(-1, -1, width)) + spread).to(dtype)
        if all(gap(reducer, row.double(), r, **options) > GAP for row in metric):
            return metric
    raise AssertionError("no seed leaves a gap")


def gap(reducer: Reducer, metric: Tensor, r: int, protected: int = 0, depth: float = 0.0) -> float:
    """The least distance between two numbers that decide a merge of one row (N, C), in float64."""
    unit = metric / metric.norm(dim=-1, keepdim=True)
    cosines = unit @ unit.T
    if isinstance(reducer, PiToMe):
        margin = 0.9 - 0.9 * depth if reducer.margin is None else reducer.margin
        inner = cosines[protected:, protected:]
        above = (inner - margin).clamp(min=0) if reducer.energy == "elu" else inner.where(inner >= margin, 0)
        energy, order = (
            (above + reducer.alpha * ((inner.clamp(max=margin) - margin).exp() - 1)).mean(1).sort(descending=True)
        )
        n = len(order)
        order = order[: 2 * r + int((1 - reducer.protect) * (n - 2 * r))] + protected
        sources, targets = order[0::2], order[1::2]
        least = (energy[:-1] - energy[1:]).min().item()
        if reducer.energy == "paper":  # f jumps at the margin
            least = min(least, (inner - margin).abs().min().item())
    else:
        least, index = 1.0, torch.arange(len(metric))
        sources, targets = (index[(index >= protected) & (index % 2 == half)] for half in (0, 1))
    pairs = cosines[sources][:, targets].sort(-1, descending=True).values
    if pairs.shape[1] > 1:
        least = min(least, (pairs[:, 0] - pairs[:, 1]).min().item())
    best = pairs[:, 0].sort(descending=True).values
    return min(least, (best[r - 1] - best[r]).item()) if r < len(best) else least


def reference(switch, reducer: Reducer, metric: Tensor, r: int, **options) -> Merge:
    """The merge that torch's operations make of the same numbers on a processor."""
    switch("torch")
    merge = reducer.match(metric.cpu(), r, **options)
    switch("fused")
    return merge
