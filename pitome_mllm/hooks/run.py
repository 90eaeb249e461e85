"""One call of a vision tower: what its blocks tell and merge, and what merges before the projector."""

from __future__ import annotations

from contextvars import ContextVar
from functools import reduce
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from ..families.features import read, write
from ..methods import Merge, UserError
from ..methods.merge import median_of_groups
from ..plan import Plan
from ..stats import Stats
from .merging import MatchInputs, merge_once, merge_rounds

RUN = "pitome_run"  # the keyword that hands a Run from the tower down to its layers


class Run:
    """One call of a vision tower: what was merged so far, by block, so that recomputing one changes nothing."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.means = False  # the model takes means over what leaves the tower
        self.is_finished = False  # by a graph, which made its stats too
        self.stats: Stats | None = None
        self.sizes: dict[int, Tensor] = {}  # patches per token (B, N, 1), after a block that merged
        self.log_sizes: tuple[Tensor, Tensor] | None = None  # sizes of the last block, and what attention adds
        self.merges: dict[int, Merge] = {}
        self.medians: dict[int, Tensor] = {}  # (B, N) patches whose places tokens have, after a block that merged
        self.inputs: dict[int, MatchInputs] = {}  # of the tokens that leave a block

    def acts(self, block: int) -> bool:
        """Whether a block does anything beside its layer's own work."""
        return self.plan.removed(block) > 0 or self.wants_match_inputs(block)

    def size(self, block: int) -> Tensor | None:
        """Patches per token (B, N, 1), as they enter a block; None = one each."""
        return self.sizes.get(self.plan.merged_before(block))

    def wants_match_inputs(self, block: int) -> bool:
        """Whether keys or attention of this block decide anything: in it, or before the projector."""
        return bool(self.plan.match_inputs) and (self.plan.removed(block) > 0 or self.needed_downstream(block))

    def needed_downstream(self, block: int) -> bool:
        """Whether what a block tells is asked for after it, before the projector."""
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
        return self.size(block) if self.plan.proportional_attention else None

    def bias(self, block: int, mask: Tensor | None, x: Tensor) -> Tensor | None:
        """The attention mask of a block, with log(size) of every key token added (proportional attention)."""
        size = self.weights(block)
        if size is None:
            return mask
        if self.log_sizes is None or self.log_sizes[0] is not size:  # the blocks up to the next merge share it
            logs = self.merges[self.plan.merged_before(block)].log_sizes(size, x.dtype)
            self.log_sizes = size, logs.expand(-1, -1, x.shape[1], -1)
        bias = self.log_sizes[1]
        return bias if mask is None else mask + bias

    def rotary(self, block: int, tables: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Rotary tables (patches, D) for the tokens that enter a block (B, 1, N, D): of their median patches."""
        last, protected = self.plan.merged_before(block), self.plan.geometry.class_tokens
        if last < 0:
            return tables
        if last not in self.medians:
            done = reduce(Merge.then, (self.merges[b] for b in self.plan.merging if b <= last))
            group = done.group[:, protected:] - protected
            self.medians[last] = median_of_groups(group.clamp(min=-1), done.count - protected)
        return tuple(table[self.medians[last]][:, None] for table in tables)

    def merge_block(self, block: int, x: Tensor, inputs: MatchInputs) -> Tensor:
        """Merge what the block removes; ``x`` (B, N, C) -> (B, N - r, C)."""
        r = self.plan.removed(block)
        if r:
            depth, metric, needed = block / len(self.plan.counts), inputs.get("keys", x), self.needed_downstream(block)
            self.merges[block], x, self.sizes[block], inputs = merge_once(
                self.plan, x, metric, r, depth, self.size(block), inputs, needed_downstream=needed
            )
        self.inputs[block] = inputs
        return x

    def propagate_merges(self, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The hidden states (B, N, C) with every feature layer sent through the merges of the blocks after it."""
        made = list(states)
        for layer in self.plan.geometry.layers:
            for block in (b for b in self.plan.merging if b >= layer):
                size = self.size(block) if self.plan.weighted else None
                made[layer] = self.merges[block].reduce(made[layer], size)[0]
        return tuple(made)

    def before_projector(self, x: Tensor, projector: nn.Module) -> tuple[Tensor, list[Merge], Tensor | None]:
        """The rounds before the projector: features, merges, and patches per token."""
        feature = self.plan.geometry.merging_blocks
        size, inputs = self.size(feature), self.inputs.get(feature - 1, {})
        measure = projector if self.plan.metric == "projected" else None
        return merge_rounds(self.plan, x, self.plan.projector_counts, size, inputs, measure)

    def finish(self, output: Any, projector: nn.Module) -> None:
        """Merge the tower's output before the projector, in place; RuntimeError if a block did not merge as planned."""
        self._merge_output(output, projector)
        missing = [block for block in self.plan.merging if block not in self.merges]
        if missing:
            raise RuntimeError(
                f"blocks {missing} of the vision tower did not merge as planned: something replaced their forward "
                "after attach; call handle.remove() and attach again"
            )

    def _merge_output(self, output: Any, projector: nn.Module) -> None:
        plan = self.plan
        if isinstance(output, tuple):
            raise UserError(
                "the vision tower was called with return_dict=False; leave it at True while merging is attached"
            )
        x = output.last_hidden_state
        merges = [self.merges[block] for block in plan.merging if block in self.merges]
        size = self.size(plan.geometry.merging_blocks)
        if len(plan.geometry.layers) > 1 and output.hidden_states is not None:
            output.hidden_states = self.propagate_merges(output.hidden_states)
        if plan.projector_counts:
            features = read(output, plan.geometry)
            if features is None:  # none for a projector were asked for
                return
            features, late, size = self.before_projector(features, projector)
            write(output, plan.geometry, features)
            merges += late
        if plan.input_patches < plan.geometry.patches:  # say which patches lie under each one of the smaller image
            blank = x.new_zeros(x.shape[0], plan.geometry.class_tokens + plan.geometry.patches, 1)
            merges = [plan.reducer.match(blank, plan.geometry.patches - plan.input_patches, **plan.context)]
            size = merges[0].reduce(blank)[1]
        self.stats = Stats(plan, x.shape[0], tuple(merges), size, x.device)


_running: ContextVar[ref[Run] | None] = ContextVar("pitome_running", default=None)


def begin(plan: Plan) -> Run:
    """A new `Run`, which `running` gives to what gets no keyword."""
    run = Run(plan)
    _running.set(ref(run))
    return run


def running() -> Run | None:
    """The run that this thread or task began last, while its call lasts."""
    found = _running.get()
    return None if found is None else found()


def class_attention(query: Tensor, keys: Tensor, size: Tensor | None) -> Tensor:
    """What every token receives from the class token, (B, N, 1): its row of the attention matrix, mean over heads.

    ``query`` (B, H, C) is the class token's, ``keys`` are (B, N, H, C); a token counts ``size`` (B, N, 1) times.
    """
    with torch.autocast(query.device.type, enabled=False):
        logits = torch.einsum("bhc,bnhc->bnh", query.float(), keys.float()) * query.shape[-1] ** -0.5
    if size is not None:
        logits = logits + size.log()
    return logits.softmax(1).mean(-1, keepdim=True)
