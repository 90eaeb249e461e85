"""Merging inside a vision tower: a class for its encoder layers, and the state of one tower call.

The layers get a subclass of their own class, whose forward merges between attention and MLP: the second residual is a
local variable there, out of reach for hooks. All state of a call is one `Run`, handed down as a keyword, so that
threads, checkpoint recomputation and several towers never meet.

Only projections have no such way to their layer: their hooks leave what they see in the layer's `Inbox`, which is open
while the layer runs its attention. It is no context variable, since torch.compile reads none.
"""

from __future__ import annotations

import threading
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..families import TowerSpec
from ..families.features import read, write
from ..families.geometry import PLAIN_BACKENDS
from ..methods import Merge, UserError
from ..methods.pooling import cells
from ..plan import Plan
from ..stats import Stats
from .classes import Merging
from .merging import MatchInputs, merge_once, merge_rounds

RUN = "pitome_run"  # the keyword that hands a Run from the tower down to its layers


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


class Run:
    """One call of a vision tower: what was merged so far, by block, so that recomputing one changes nothing."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.is_finished = False  # by a graph, which made its stats too
        self.stats: Stats | None = None
        self.sizes: dict[int, Tensor] = {}  # patches per token (B, N, 1), as they enter a block
        self.log_sizes: tuple[Tensor, Tensor] | None = None  # sizes of the last block, and what attention adds
        self.merges: dict[int, Merge] = {}
        self.inputs: dict[int, MatchInputs] = {}  # of the tokens that leave a block

    def wants_match_inputs(self, block: int) -> bool:
        """Whether keys or attention of this block decide anything: in it, or in front of the projector."""
        return bool(self.plan.match_inputs) and (self.plan.removed(block) > 0 or self.needed_downstream(block))

    def needed_downstream(self, block: int) -> bool:
        """Whether what a block tells is asked for after it, in front of the projector."""
        return block == self.plan.geometry.merging_blocks - 1 and len(self.plan.projector_counts) > 0

    def read(self, block: int, query: Tensor | None, keys: Tensor) -> MatchInputs:
        """The inputs that the plan asks for, of the keys (B, N, H, C), and of the class token's query (B, H, C) for
        attention.
        """
        made = {
            "keys": lambda: keys.mean(2),
            "attention": lambda: class_attention(query, keys, self.weights(block)),
        }
        return {name: made[name]() for name in self.plan.match_inputs}

    def weights(self, block: int) -> Tensor | None:
        """How many tokens each one counts for in the attention of a block (B, N, 1); None = one each."""
        return self.sizes.get(block) if self.plan.proportional_attention else None

    def bias(self, block: int, mask: Tensor | None, x: Tensor) -> Tensor | None:
        """The attention mask of a block, with log(size) of every key token added (proportional attention)."""
        size = self.weights(block)
        if size is None:
            return mask
        if self.log_sizes is None or self.log_sizes[0] is not size:  # the blocks up to the next merge share it
            self.log_sizes = size, log_sizes(size, x.dtype).expand(-1, -1, x.shape[1], -1)
        bias = self.log_sizes[1]
        return bias if mask is None else mask + bias

    def merge_block(self, block: int, x: Tensor, inputs: MatchInputs) -> Tensor:
        """Merge what the block removes; ``x`` (B, N, C) -> (B, N - r, C)."""
        r = self.plan.removed(block)
        size = self.sizes.get(block)
        if r:
            depth = block / self.plan.geometry.merging_blocks
            metric = inputs.get("keys", x)
            needed_downstream = self.needed_downstream(block)
            self.merges[block], x, size, inputs = merge_once(
                self.plan, x, metric, r, depth, size, inputs, needed_downstream=needed_downstream
            )
        if size is not None:
            self.sizes[block + 1] = size
        self.inputs[block] = inputs
        return x

    def propagate_merges(self, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The hidden states (B, N, C) with every feature layer sent through the merges of the blocks behind it."""
        made = list(states)
        for layer in self.plan.geometry.layers:
            for block in (b for b in self.plan.merging if b >= layer):
                size = self.sizes.get(block) if self.plan.weighted else None
                made[layer] = self.merges[block].reduce(made[layer], size)[0]
        return tuple(made)

    def before_projector(self, x: Tensor, projector: nn.Module) -> tuple[Tensor, list[Merge], Tensor | None]:
        """The rounds in front of the projector: features, merges, and patches per token."""
        feature = self.plan.geometry.merging_blocks
        size, inputs = self.sizes.get(feature), self.inputs.get(feature - 1, {})
        measure = projector if self.plan.metric == "projected" else None
        return merge_rounds(self.plan, x, self.plan.projector_counts, size, inputs, measure)


def log_sizes(size: Tensor, dtype: torch.dtype) -> Tensor:
    """log(size) of tokens with ``size`` (B, N, 1), as (B, 1, 1, N), in rows that start where a GPU reads whole vectors.

    Attention on a GPU would else copy them to where they do, in every block, for every query.
    """
    batch, tokens = size.shape[:2]
    row = size.new_zeros(batch, 1, 1, tokens + -tokens % 8, dtype=dtype)[..., :tokens]
    return row.copy_(size.log().reshape(batch, 1, 1, tokens))


class MergingLayer:
    """Mixin in front of an encoder layer's own class."""

    _pitome: Block

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        run: Run | None = kwargs.pop(RUN, None)
        if run is None:
            return super().forward(hidden_states, attention_mask, *args, **kwargs)
        block, spec, inbox = self._pitome
        attention_mask = run.bias(block, attention_mask, hidden_states)
        early = run.plan.place == "mid" and run.plan.removed(block) > 0
        try:
            inbox.shut(wanted=run.plan.match_inputs if run.wants_match_inputs(block) else ())
            if early:
                normed = getattr(self, spec.norm1)(hidden_states)
                x = hidden_states + getattr(self, spec.attention)(normed, attention_mask, *args, **kwargs)[0]
            else:
                x = super().forward(hidden_states, attention_mask, *args, **kwargs)
            inputs = self._match_inputs(run, inbox.keys, inbox.query)
        finally:
            inbox.shut()
        x = run.merge_block(block, x, inputs)
        return x + getattr(self, spec.mlp)(getattr(self, spec.norm2)(x)) if early else x

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
        keys = keys.view(*keys.shape[:2], attention.num_heads, -1)  # (B, N, heads, C / heads)
        return run.read(block, None if query is None else query.view_as(keys[:, 0]), keys)


def class_attention(query: Tensor, keys: Tensor, size: Tensor | None) -> Tensor:
    """What every token receives from the class token: its one row of the attention matrix, mean over heads.

    Parameters
    ----------
    query : (B, H, C) of the class token.
    keys : (B, N, H, C).
    size : (B, N, 1) patches per token, which count as many times (proportional attention); None = one each.

    Returns
    -------
    (B, N, 1) float32.
    """
    with torch.autocast(query.device.type, enabled=False):
        logits = torch.einsum("bhc,bnhc->bnh", query.float(), keys.float()) * query.shape[-1] ** -0.5
    if size is not None:
        logits = logits + size.log()
    return logits.softmax(1).mean(-1, keepdim=True)


@lru_cache
def merging_class(base: type[nn.Module]) -> type[nn.Module]:
    """The subclass of an encoder layer class that merges."""
    return Merging(f"Merging{base.__name__}", (MergingLayer, base), {"__module__": __name__, "_plain": base})


def start_run(tower: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    """Forward pre-hook of the tower: hand a new `Run` down to the layers."""
    tower._pitome.check_calls(tower)
    plan = tower._pitome.plan
    if plan is None:
        return None
    backend = tower.config._attn_implementation
    if plan.proportional_attention and plan.merging and backend not in PLAIN_BACKENDS:
        raise UserError(
            f"the vision tower's attention {backend!r} takes no log-size bias, {' and '.join(PLAIN_BACKENDS)} do: use "
            "model.set_attn_implementation({'vision_config': 'sdpa'}) (the LLM keeps its own), "
            "or attach with proportional_attention=False"
        )
    if plan.input_patches < plan.geometry.patches:
        args, kwargs = smaller_picture(plan, args, kwargs)
    return args, {**kwargs, RUN: Run(plan)}


def smaller_picture(plan: Plan, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """The tower's arguments with images scaled to ``plan.input_patches``, antialiased as a processor scales."""
    pixels, args = (args[0], args[1:]) if args else (kwargs["pixel_values"], args)
    rows, columns = cells(*plan.geometry.grid, plan.input_patches)
    patch = pixels.shape[-2] // plan.geometry.grid[0]
    size = (rows * patch, columns * patch)
    scaled = F.interpolate(pixels.float(), size, mode="bicubic", antialias=True).to(pixels.dtype)
    return args, {**kwargs, "pixel_values": scaled, "interpolate_pos_encoding": True}


def finish_run(tower: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
    """Forward hook of the tower: merge in front of the projector, and keep the stats."""
    handle, run = tower._pitome, kwargs.get(RUN)
    stats = None
    try:
        if run is not None and not run.is_finished:
            merge_output(run, output, handle.projector)
            check_merged(run)
        stats = None if run is None else run.stats
    finally:
        handle.note(stats=stats)


def check_merged(run: Run) -> None:
    """RuntimeError if a block did not merge as planned."""
    missing = [block for block in run.plan.merging if block not in run.merges]
    if missing:
        raise RuntimeError(
            f"blocks {missing} of the vision tower did not merge as planned: something replaced their forward after "
            "attach; call handle.remove() and attach again"
        )


def merge_output(run: Run, output: Any, projector: nn.Module) -> None:
    """Merge the tower's output in front of the projector, in place, and say what the run did."""
    plan = run.plan
    if isinstance(output, tuple):
        raise UserError(
            "the vision tower was called with return_dict=False; leave it at True while merging is attached"
        )
    x = output.last_hidden_state
    merges = [run.merges[block] for block in plan.merging if block in run.merges]
    size = run.sizes.get(plan.geometry.merging_blocks)
    if len(plan.geometry.layers) > 1 and output.hidden_states is not None:
        output.hidden_states = run.propagate_merges(output.hidden_states)
    if plan.projector_counts:
        features = read(output, plan.geometry)
        if features is None:  # none for a projector were asked for
            return
        features, late, size = run.before_projector(features, projector)
        write(output, plan.geometry, features)
        merges += late
    if plan.input_patches < plan.geometry.patches:  # say which patches lie under each one of the smaller picture
        blank = x.new_zeros(x.shape[0], plan.geometry.class_tokens + plan.geometry.patches, 1)
        merges = [plan.reducer.match(blank, plan.geometry.patches - plan.input_patches, **plan.context)]
        size = merges[0].reduce(blank)[1]
    run.stats = Stats(plan, x.shape[0], tuple(merges), size, x.device)
