"""Merging inside a vision tower: a class for its encoder layers, and the state of one tower call.

The layers get a subclass of their own class, whose forward merges between attention and MLP: the second residual is a
local variable there, out of reach for hooks. All state of a call is one `Run`, handed down as a keyword, so that
threads, checkpoint recomputation and several towers never meet.
"""

from __future__ import annotations

import threading
from functools import lru_cache
from typing import Any

from torch import Tensor, nn

from .methods import Merge
from .plan import Plan
from .specs import PLAIN_BACKENDS, TowerSpec
from .stats import Stats

RUN = "pitome_run"  # the keyword that hands a Run from the tower down to its layers


class _Inbox(threading.local):
    """Where the key projection leaves its output for the layer that called it, within one thread."""

    wanted: bool = False
    keys: Tensor | None = None


_inbox = _Inbox()


def catch_keys(module: nn.Module, args: tuple, output: Tensor) -> None:
    """Forward hook of the key projection."""
    if _inbox.wanted:
        _inbox.keys = output.detach()


class Run:
    """One call of a vision tower: what was merged so far, by block, so that recomputing one changes nothing."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.sizes: dict[int, Tensor] = {}  # patches per token (B, N, 1), as they enter a block
        self.merges: dict[int, Merge] = {}
        self.keys: Tensor | None = None  # keys (B, N, C) of the features, for the projector

    def wants_keys(self, block: int) -> bool:
        """Whether the keys of this block decide anything: in it, or in front of the projector."""
        if self.plan.metric != "keys":
            return False
        last = block == self.plan.geometry.merging_blocks - 1
        return self.plan.removed(block) > 0 or (last and len(self.plan.rounds) > 0)

    def bias(self, block: int, mask: Tensor | None, x: Tensor) -> Tensor | None:
        """The attention mask of a block, with log(size) of every key token added (proportional attention)."""
        size = self.sizes.get(block)
        if size is None or not self.plan.proportional_attention:
            return mask
        bias = size.log().to(x.dtype).mT[:, None].expand(-1, -1, x.shape[1], -1)
        return bias if mask is None else mask + bias

    def leave(self, block: int, x: Tensor, keys: Tensor | None) -> Tensor:
        """Merge what the block removes; ``x`` (B, N, C) -> (B, N - r, C)."""
        r = self.plan.removed(block)
        size = self.sizes.get(block)
        if r:
            depth = block / self.plan.geometry.merging_blocks
            merge, x, size, keys = self._merge(x, keys, size, r, depth)
            self.merges[block] = merge
        if size is not None:
            self.sizes[block + 1] = size
        if block == self.plan.geometry.merging_blocks - 1:
            self.keys = keys
        return x

    def before_projector(self, x: Tensor) -> tuple[Tensor, list[Merge], Tensor | None]:
        """The rounds in front of the projector: features, merges, and patches per token."""
        size, keys, merges = self.sizes.get(self.plan.geometry.merging_blocks), self.keys, []
        for count in self.plan.rounds:
            r = x.shape[1] - self.plan.geometry.class_tokens - count
            merge, x, size, keys = self._merge(x, keys, size, r, depth=1.0)
            merges.append(merge)
        return x, merges, size

    def _merge(
        self, x: Tensor, keys: Tensor | None, size: Tensor | None, r: int, depth: float
    ) -> tuple[Merge, Tensor, Tensor, Tensor | None]:
        plan = self.plan
        metric = keys if plan.metric == "keys" else x
        merge = plan.reducer.match(metric, r, size=size, depth=depth, **plan.context)
        if plan.order == "source":
            merge = merge.in_source_order()
        merged, total = merge.reduce(x, size if plan.weighted else None)
        if not plan.weighted and size is not None:
            total = merge.reduce(size, size)[1]
        if keys is not None:
            keys = merge.reduce(keys, size)[0]
        return merge, merged, total, keys


class MergingLayer:
    """Mixin in front of an encoder layer's own class."""

    _pitome: tuple[int, TowerSpec]  # index of the block in its tower, and the names of its parts

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        run: Run | None = kwargs.pop(RUN, None)
        if run is None:
            return super().forward(hidden_states, attention_mask, *args, **kwargs)
        block, spec = self._pitome
        attention_mask = run.bias(block, attention_mask, hidden_states)
        _inbox.wanted = run.wants_keys(block)
        if run.plan.place == "mid" and run.plan.removed(block):
            attention, mlp = getattr(self, spec.attention), getattr(self, spec.mlp)
            normed = getattr(self, spec.norm1)(hidden_states)
            x = hidden_states + attention(normed, attention_mask, *args, **kwargs)[0]
            x = run.leave(block, x, self._taken_keys(run, block))
            return x + mlp(getattr(self, spec.norm2)(x))
        x = super().forward(hidden_states, attention_mask, *args, **kwargs)
        return run.leave(block, x, self._taken_keys(run, block))

    def _taken_keys(self, run: Run, block: int) -> Tensor | None:
        """The keys (B, N, C / heads) that this layer's attention just computed, mean over heads."""
        keys, _inbox.keys, _inbox.wanted = _inbox.keys, None, False
        if not run.wants_keys(block):
            return None
        if keys is None:
            raise RuntimeError(
                f"block {block} computed no keys through its key projection: something replaced the attention after "
                "attach; call handle.remove() and attach again"
            )
        heads = getattr(self, self._pitome[1].attention).num_heads
        return keys.unflatten(-1, (heads, -1)).mean(2)


@lru_cache
def merging_class(base: type[nn.Module]) -> type[nn.Module]:
    """The subclass of an encoder layer class that merges."""
    return type(f"Merging{base.__name__}", (MergingLayer, base), {"__module__": __name__})


def start_run(tower: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    """Forward pre-hook of the tower: hand a new `Run` down to the layers."""
    plan = tower._pitome.active
    if plan is None:
        return None
    backend = tower.config._attn_implementation
    if plan.proportional_attention and plan.merging and backend not in PLAIN_BACKENDS:
        raise ValueError(
            f"the vision tower's attention {backend!r} takes no log-size bias, {' and '.join(PLAIN_BACKENDS)} do: use "
            "model.set_attn_implementation({'vision_config': 'sdpa'}) (the LLM keeps its own), "
            "or attach with proportional_attention=False"
        )
    return args, {**kwargs, RUN: Run(plan)}


def finish_run(tower: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
    """Forward hook of the tower: merge in front of the projector, check that all merges happened, keep the stats."""
    handle, run = tower._pitome, kwargs.get(RUN)
    if run is None:
        handle.state.stats = None
        return
    missing = [block for block in run.plan.merging if block not in run.merges]
    if missing:
        raise RuntimeError(
            f"blocks {missing} of the vision tower did not merge as planned: something replaced their forward after "
            "attach; call handle.remove() and attach again"
        )
    merges = [run.merges[block] for block in run.plan.merging]
    size = run.sizes.get(run.plan.geometry.merging_blocks)
    if isinstance(output, tuple):
        raise ValueError(
            "the vision tower was called with return_dict=False; leave it at True while merging is attached"
        )
    if run.plan.rounds and output.hidden_states is None:  # no features for a projector were asked for
        handle.state.stats = None
        return
    if run.plan.rounds:
        states, feature = list(output.hidden_states), run.plan.geometry.merging_blocks
        states[feature], late, size = run.before_projector(states[feature])
        output.hidden_states = tuple(states)
        merges += late
    x = output.last_hidden_state
    handle.state.stats = Stats(run.plan, x.shape[0], tuple(merges), size, x.device)
