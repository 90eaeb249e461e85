"""Merging inside a vision tower: a class for its encoder layers, and the state of one tower call.

The layers get a subclass of their own class, whose forward merges between attention and MLP: the second residual is a
local variable there, out of reach for hooks. All state of a call is one `Run`, handed down as a keyword, so that
threads, checkpoint recomputation and several towers never meet.

Only projections have no such way to their layer: their hooks leave what they see in the layer's `Inbox`, which is open
while the layer runs its attention. It is no context variable, since torch.compile reads none.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from ..families import TowerSpec
from ..families.geometry import PLAIN_BACKENDS
from ..methods import UserError
from ..methods.pooling import cells
from ..plan import Plan
from .call import CALL
from .classes import Merging
from .encoders import MEANS, SIZES, adding_to_logits, for_call, for_means
from .merging import MatchInputs
from .run import RUN, Run, begin


class Inbox(threading.local):
    """Where the projections of an attention leave their outputs for the layer that called it, within one thread."""

    def __init__(self) -> None:  # for each thread, so that a graph finds the same in all of them
        self.shut()

    def shut(self, wanted: tuple[str, ...] = ()) -> None:
        """Empty it, and take from now on what the match inputs that are ``wanted`` need."""
        self.wanted = wanted
        self.keys: Tensor | None = None
        self.query: Tensor | None = None  # of the class token

    def __deepcopy__(self, memo: dict[int, Any]) -> Inbox:
        return Inbox()


class Block(NamedTuple):
    """What an encoder layer knows of itself: its index in the tower, the names of its parts, and its inbox."""

    index: int
    spec: TowerSpec
    inbox: Inbox


def catch_keys(module: nn.Module, args: tuple, output: Tensor) -> None:
    """Forward hook of the key projection."""
    if module._pitome.wanted:
        module._pitome.keys = output.detach()


def catch_query(module: nn.Module, args: tuple, output: Tensor) -> None:
    """Forward hook of the query projection."""
    if "attention" in module._pitome.wanted:
        module._pitome.query = output[:, 0].detach()


CATCHING = (catch_keys, catch_query)


class MergingLayer:
    """Mixin before an encoder layer's own class."""

    _pitome: Block

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        run: Run | None = kwargs.pop(RUN, None)
        if run is not None:
            block = self._pitome.index
            attention_mask = run.bias(block, attention_mask, hidden_states)
            if run.plan.geometry.family.rotary:
                kwargs["position_embeddings"] = run.rotary(block, kwargs["position_embeddings"])
            if run.acts(block):
                return self._merging_forward(run, hidden_states, attention_mask, *args, **kwargs)
        return self._masked(super().forward, hidden_states, attention_mask, *args, **kwargs)

    def _masked(self, own: Callable[..., Any], x: Tensor, mask: Tensor | None, *args: Any, **kwargs: Any) -> Any:
        """What the layer's forward or its attention makes with a mask, whether it takes one or not."""
        if self._pitome.spec.takes_mask:
            return own(x, mask, *args, **kwargs)
        with adding_to_logits(mask):
            return own(x, *args, **kwargs)

    def _merging_forward(
        self, run: Run, hidden_states: Tensor, attention_mask: Tensor | None, *args: Any, **kwargs: Any
    ) -> Tensor:
        block, spec, inbox = self._pitome
        early = run.plan.place == "mid" and run.plan.removed(block) > 0
        try:
            inbox.shut(wanted=run.plan.match_inputs)
            if early:
                attention, normed = getattr(self, spec.attention), getattr(self, spec.norm1)(hidden_states)
                x = self._masked(attention, normed, attention_mask, *args, **kwargs)[0]
                x = hidden_states + self._through(spec.after_attention, x)
            else:
                x = self._masked(super().forward, hidden_states, attention_mask, *args, **kwargs)
            inputs = self._match_inputs(run, inbox.keys, inbox.query)
        finally:
            inbox.shut()
        x = run.merge_block(block, x, inputs)
        return x + self._through((spec.norm2, spec.mlp, *spec.after_mlp), x) if early else x

    def _through(self, names: tuple[str, ...], x: Tensor) -> Tensor:
        """What parts of the layer make of ``x``, one after the other."""
        for name in names:
            x = getattr(self, name)(x)
        return x

    def _match_inputs(self, run: Run, keys: Tensor | None, query: Tensor | None) -> MatchInputs:
        """What the attention that just ran tells about its tokens, as far as the plan asks for it."""
        block, spec, _ = self._pitome
        if not run.wants_match_inputs(block):
            return {}
        attention = getattr(self, spec.attention)
        watched = [(spec.key, catch_keys)] + [(spec.query, catch_query)] * ("attention" in run.plan.match_inputs)
        if not all(hook in getattr(attention, name)._forward_hooks.values() for name, hook in watched):
            raise RuntimeError(
                f"block {block} has another key or query projection than at attach: adapters were put on it, or its "
                "attention was replaced; call handle.remove() and attach again"
            )
        fused = 3 if spec.key == spec.query else 1
        heads = getattr(attention, "num_heads", None) or attention.num_attention_heads
        keys = keys.unflatten(-1, (fused, heads, -1))[:, :, fused // 2]  # (B, N, heads, C / heads)
        return run.read(block, None if query is None else query.unflatten(-1, (fused, heads, -1))[:, 0], keys)


@lru_cache
def merging_class(base: type[nn.Module]) -> type[nn.Module]:
    """The subclass of an encoder layer class that merges."""
    return Merging(f"Merging{base.__name__}", (MergingLayer, base), {"__module__": __name__, "_plain": base})


def start_run(tower: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    """Forward pre-hook of the tower: hand a new `Run` down to the layers."""
    handle, plan = tower._pitome, tower._pitome.plan
    handle.check_calls(tower)
    if plan is None:
        return None
    if handle.family.encoder:
        plan, kwargs = for_call(tower, plan, args, kwargs)
    backend = tower.config._attn_implementation
    if plan.proportional_attention and plan.merging and backend not in PLAIN_BACKENDS:
        raise UserError(
            f"the vision tower's attention {backend!r} takes no log-size bias, {' and '.join(PLAIN_BACKENDS)} do: use "
            "model.set_attn_implementation({'vision_config': 'sdpa'}) (the LLM keeps its own; 'sdpa' where there is "
            "none), or attach with proportional_attention=False"
        )
    if plan.input_patches < plan.geometry.patches:
        args, kwargs = smaller_picture(tower, plan, args, kwargs)
    run = begin(plan)
    run.means = MEANS in kwargs
    given = {name: value for name, value in kwargs.items() if name not in (CALL, MEANS)}  # CALL: transformers 5.24
    return args, {**given, RUN: run}


def smaller_picture(tower: nn.Module, plan: Plan, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """The tower's arguments with images scaled to ``plan.input_patches``, antialiased as a processor scales."""
    pixels, args = (args[0], args[1:]) if args else (kwargs["pixel_values"], args)
    rows, columns = cells(*plan.geometry.grid, plan.input_patches)
    patch = pixels.shape[-2] // plan.geometry.grid[0]
    size = (rows * patch, columns * patch)
    scaled = F.interpolate(pixels.float(), size, mode="bicubic", antialias=True).to(pixels.dtype)
    takes = "interpolate_pos_encoding" in inspect.signature(type(tower).forward).parameters  # others always do
    return args, {**kwargs, "pixel_values": scaled, **({"interpolate_pos_encoding": True} if takes else {})}


def finish_run(tower: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
    """Forward hook of the tower: merge before the projector, have what reads the output know sizes, keep the stats."""
    handle, run = tower._pitome, kwargs.get(RUN)
    stats = None
    try:
        if run is not None and not run.is_finished:
            run.finish(output, handle.projector)
        stats = None if run is None else run.stats
        size = None if stats is None else stats.token_sizes
        if size is not None and run.means:
            output.last_hidden_state = for_means(output.last_hidden_state, size, run.plan.geometry.class_tokens)
        if stats is not None and handle.family.reader and run.plan.proportional_attention:
            setattr(output.last_hidden_state, SIZES, size)
    finally:
        handle.note(stats=stats)
