"""Merging tokens as a plan says: one step, or several in a row. Blocks, projector and tiles all merge by this."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from ..methods import Merge
from ..plan import Plan

# What a block tells about its tokens: "keys" (B, N, C / heads), mean over heads; "attention" (B, N, 1) that they get
# from the class token, mean over heads. Merged tokens carry their means.
MatchInputs = dict[str, Tensor]
# The merge, and features, patches per token and inputs of what is left.
Step = tuple[Merge, Tensor, Tensor, MatchInputs]


def merge_once(
    plan: Plan,
    x: Tensor,
    metric: Tensor,
    r: int,
    depth: float,
    size: Tensor | None = None,
    inputs: Mapping[str, Tensor] | None = None,
    context: Mapping[str, Any] | None = None,
    needed_downstream: bool = True,
) -> Step:
    """Merge ``r`` of the tokens ``x`` (B, N, C) by ``metric`` (B, N, C'); ``context`` in place of the plan's own.

    ``needed_downstream`` says whether the inputs of what is left are asked for again.
    """
    inputs = inputs or {}
    context = plan.context if context is None else context
    attention = {"attention": inputs["attention"][..., 0]} if "attention" in inputs else {}
    merge = plan.reducer.match(metric, r, size=size, depth=depth, **context, **attention)
    if plan.order == "source":
        merge = merge.in_source_order()
    merged, total = merge.reduce(x, size) if plan.weighted or size is None else merge.reduce_evenly(x, size)
    kept = {name: merge.reduce(value, size)[0] for name, value in inputs.items()} if needed_downstream else {}
    return merge, merged, total, kept


def merge_rounds(
    plan: Plan,
    x: Tensor,
    counts: Sequence[int],
    size: Tensor | None = None,
    inputs: Mapping[str, Tensor] | None = None,
    measure: Callable[[Tensor], Tensor] | None = None,
    context: Mapping[str, Any] | None = None,
) -> tuple[Tensor, list[Merge], Tensor | None]:
    """Merge ``x`` (B, N, C) in rounds of depth 1 to ``counts`` tokens, those that never merge not counted.

    ``measure`` makes the metric of the features; by default it is the keys among the inputs, else the features.
    """
    context, merges = plan.context if context is None else context, []
    for count in counts:
        r = x.shape[1] - context.get("protected", 0) - count
        metric = (inputs or {}).get("keys", x) if measure is None else measure(x)
        needed_downstream = count != counts[-1]
        merge, x, size, inputs = merge_once(plan, x, metric, r, 1.0, size, inputs, context, needed_downstream)
        merges.append(merge)
    return x, merges, size
