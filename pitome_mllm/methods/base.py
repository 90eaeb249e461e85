"""What a method is (`Reducer`) and what it answers (`Merge`).

A reducer looks at one metric per token and decides which tokens join. A merge is that decision, and applies it to
anything that has one row per token: features, sizes, provenance. Shapes are static and nothing synchronises with
the host, so both run under ``torch.compile`` and CUDA graphs.
"""

from __future__ import annotations

import math
import numbers
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .errors import UserError

# Kinds of device whose autocast can be asked for; asked here, once, since not every torch compiles that question.
# None = a torch that cannot tell: that of the original llava package.
AUTOCASTING: frozenset[str] | None = None
if hasattr(torch.amp, "is_autocast_available"):
    AUTOCASTING = frozenset(filter(torch.amp.is_autocast_available, ("cpu", "cuda", "hpu", "mps", "mtia", "xpu")))


def rows(x: Tensor, index: Tensor) -> Tensor:
    """Tokens ``index`` (B, K) of ``x`` (B, N, C), as (B, K, C)."""
    return x.flatten(0, 1).index_select(0, flat(index, x.shape[1])).unflatten(0, index.shape)


def flat(index: Tensor, tokens: int) -> Tensor:
    """``index`` (B, K) into rows of ``tokens`` tokens, as (B * K,) into all rows one after the other.

    Selecting and adding whole rows by such an index is several times as fast as gather and scatter.
    """
    batch = index.shape[0]
    if batch > 1:
        index = index + tokens * torch.arange(batch, device=index.device)[:, None]
    return index.flatten()


def add_rows(total: Tensor, index: Tensor, values: Tensor) -> Tensor:
    """``total`` (K, ...) with ``values`` (M, ...) added at rows ``index`` (M,), one after the other: in place.

    The order of addition is that of ``values``, so that equal inputs give equal bits. On GPUs ``index_add`` and
    ``scatter_add`` add in any order, and ``index_put`` sorts first; on processors all keep the order.
    """
    if total.device.type == "cpu":
        return total.index_add_(0, index, values)
    return total.index_put_((index,), values, accumulate=True)


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


def check_number(name: str, value: object, low: float = -math.inf, high: float = math.inf) -> None:
    """ValueError unless the option ``name`` is a finite number from ``low`` to ``high``."""
    fits = isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
    if not fits or not low <= value <= high:
        bounds = "".join(f" {word} {bound:g}" for word, bound in (("from", low), ("to", high)) if math.isfinite(bound))
        raise UserError(f"{name}={value!r} is not possible; choose a number{bounds}")


def check_count(name: str, value: object) -> None:
    """ValueError unless the option ``name`` is a whole number from 1."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < 1:
        raise UserError(f"{name}={value!r} is not possible; choose a whole number from 1")


def nearest(unit: Tensor, sources: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The most similar target of every source.

    Parameters
    ----------
    unit : (B, N, C) from `unit_metric`.
    sources, targets : (B, S) and (B, T) token indices.

    Returns
    -------
    similarity : (B, S) cosine similarity to that target.
    target : (B, S) its token index; the first of equals.
    """
    similarity, place = cosine(rows(unit, sources), rows(unit, targets)).max(-1)
    return similarity, targets.gather(1, place)


def ranked(score: Tensor) -> Tensor:
    """Token indices (B, n) by ``score`` (B, n), highest first; the first of equals first."""
    return score.argsort(dim=1, descending=True, stable=True)


def spread(tokens: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """``count`` of the ``tokens`` (B, M) at equal distances, and the others, both in their order."""
    total = tokens.shape[1]
    place = torch.arange(count, device=tokens.device) * total // max(count, 1)
    taken = torch.zeros(total, dtype=torch.int8, device=tokens.device).index_fill(0, place, 1)
    order = taken.argsort(descending=True, stable=True)
    return tokens[:, order[:count]], tokens[:, order[count:]]


def most_similar_first(unit: Tensor, sources: Tensor, targets: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """The ``r`` sources that are most similar to their nearest target, and those targets, each (B, r)."""
    similarity, target = nearest(unit, sources, targets)
    if r == sources.shape[1]:
        return sources, target
    chosen = ranked(similarity)[:, :r]
    return sources.gather(1, chosen), target.gather(1, chosen)


class Merge:
    """Which tokens join, and how their values combine.

    Attributes
    ----------
    group : (B, N) int64, group 0 .. count-1 of every token, -1 = dropped; None for methods without groups.
    count : number of groups K.
    energy : (B, n) float32 energy of the unprotected tokens, for methods that have one; else None.

    Groups are numbered in reading order: by the smallest index among their tokens.
    """

    def __init__(
        self,
        root: Tensor,
        count: int,
        *,
        weight: Tensor | None = None,
        source: Callable[[], Tensor] | None = None,
        energy: Tensor | None = None,
        led: bool = False,
        drops: bool = True,
    ) -> None:
        """Group tokens by a common root.

        Parameters
        ----------
        root : (B, N) int64, the index of one token of the group, the same for all its tokens; -1 = dropped.
        count : how many different roots every row has.
        weight : (B, N) float32 factor of each token in its group's value; None = its share of the group's size.
        source : makes (B, K) int64, one token of each group, in the order in which the reference code leaves them.
        led : every root is the first token of its group; saves looking for it.
        drops : whether a root may be -1; False saves looking.
        """
        batch, tokens = root.shape
        index = torch.arange(tokens, device=root.device).expand(batch, tokens)
        if not led:
            slot = root.where(root >= 0, tokens)  # one extra place takes what is dropped
            least = index.new_full((batch, tokens + 1), tokens).scatter_reduce(1, slot, index, "amin").gather(1, slot)
            root = least.where(root >= 0, -1)
        follows = root != index
        order = follows.argsort(dim=1, stable=True)  # first tokens in front, each part in reading order
        group = (index - follows.cumsum(1)).gather(1, root.clamp(min=0) if drops else root)

        self.count = count
        self.energy = energy
        self.group: Tensor | None = group.where(root >= 0, -1) if drops else group
        self._source = source
        self._weight = weight
        self._drops = drops
        self._first = order[:, :count]  # the first token of each group ...
        self._rest = order[:, count:]  # ... and all the others

    @classmethod
    def join(cls, tokens: int, sources: Tensor, targets: Tensor, **extra: Any) -> Merge:
        """Each of ``sources`` (B, r) joins the token of ``targets`` (B, r) beside it; the other tokens stay alone.

        No token is both.
        """
        batch, r = sources.shape
        index = torch.arange(tokens, device=sources.device).expand(batch, tokens)
        least = index.scatter_reduce(1, targets, sources, "amin")
        return cls(least.scatter(1, sources, least.gather(1, targets)), tokens - r, led=True, drops=False, **extra)

    @classmethod
    def select(cls, tokens: int, kept: Tensor, protected: int = 0) -> Merge:
        """Only the tokens ``kept`` (B, K) and the first ``protected`` ones stay; all others are dropped."""
        index = torch.arange(tokens, device=kept.device).repeat(len(kept), 1)
        root = torch.full_like(index, -1).scatter(1, kept, kept)
        return cls(index.where(index < protected, root), kept.shape[1] + protected, led=True)

    def weighted_by(self, value: Tensor) -> Merge:
        """This merge with means weighted by ``value`` (B, N), above zero, in place of sizes. In place; no dropping."""
        total = self.reduce(value[..., None], value[..., None])[1]
        self._weight = value / self.expand(total)[..., 0]
        return self

    def reduce(self, x: Tensor, size: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Combine the tokens of each group, by default their size-weighted mean, and sum up their sizes.

        Parameters
        ----------
        x : (B, N, C) features of any floating dtype.
        size : (B, N, 1) patches that each token stands for; None = one each.

        Returns
        -------
        x : (B, K, C) in the dtype of ``x``, accumulated in at least float32; a token that stayed alone keeps its bits.
        size : (B, K, 1) float32.
        """
        batch, tokens, channels = x.shape
        size = x.new_ones(batch * tokens, dtype=torch.float32) if size is None else size.flatten().float()
        first, rest = flat(self._first, tokens), flat(self._rest, tokens)
        first_size, rest_size = size.index_select(0, first), size.index_select(0, rest)
        slot = self.group.gather(1, self._rest)  # the group that each of the rest joins
        if self._drops:
            dropped = slot.flatten() < 0
            slot, rest_size = slot.clamp(min=0), rest_size.masked_fill(dropped, 0.0)
        slot = flat(slot, self.count)
        total = add_rows(first_size, slot, rest_size)

        x, wide = x.flatten(0, 1), torch.promote_types(x.dtype, torch.float32)
        merged, joining = x.index_select(0, first).to(wide), x.index_select(0, rest).to(wide)
        if self._weight is None:  # the mean is the first token and a share of each other's distance to it
            share = rest_size / total.index_select(0, slot)
            joining = joining.sub_(merged.index_select(0, slot))
        else:
            first_share, share = (self._weight.flatten().index_select(0, index) for index in (first, rest))
            merged.mul_(first_share[:, None])
        joining = joining.mul_(share[:, None])
        if self._drops:
            joining = joining.masked_fill(dropped[:, None], 0.0)  # a NaN that is dropped must not return as 0 * NaN
        merged = add_rows(merged, slot, joining)
        return merged.view(batch, self.count, channels).to(x.dtype), total.view(batch, self.count, 1)

    def expand(self, y: Tensor) -> Tensor:
        """Give every token its group's value: (B, K, C) -> (B, N, C). A dropped token gets zeros."""
        dropped = self.group[..., None] < 0
        return rows(y, self.group.clamp(min=0)).masked_fill(dropped, 0.0)

    def then(self, later: Merge) -> Merge:
        """The composition: ``later`` merges what this one leaves."""
        return _Chain(self, later)

    @property
    def steps(self) -> tuple[Merge, ...]:
        """The merges that this one is composed of, in their order; itself where it is no composition."""
        return (self,)

    def in_source_order(self) -> Merge:
        """The same groups, numbered in the order that the reference code leaves (reading order where it has none)."""
        if self._source is None:
            return self
        order = self.group.gather(1, self._source())  # (B, K): reading-order number of the group now at each place
        place = order.argsort(dim=1)
        renumbered = object.__new__(type(self))
        renumbered.__dict__.update(self.__dict__)
        renumbered.group = place.gather(1, self.group.clamp(min=0)).where(self.group >= 0, -1)
        renumbered._first = self._first.gather(1, order)
        return renumbered


class _Chain(Merge):
    """Two merges, one after the other, each combining in its own way."""

    def __init__(self, earlier: Merge, later: Merge) -> None:
        self._steps = (earlier, later)
        self.count = later.count
        self.energy = earlier.energy
        self._source = None
        self.group = None
        if earlier.group is not None and later.group is not None:
            group = later.group.gather(1, earlier.group.clamp(min=0))
            self.group = group.where(earlier.group >= 0, -1)

    @property
    def steps(self) -> tuple[Merge, ...]:
        return tuple(step for merge in self._steps for step in merge.steps)

    def reduce(self, x: Tensor, size: Tensor | None = None) -> tuple[Tensor, Tensor]:
        earlier, later = self._steps
        wide = x.to(torch.promote_types(x.dtype, torch.float32))  # rounded once, at the end
        reduced, total = later.reduce(*earlier.reduce(wide, size))
        return reduced.to(x.dtype), total

    def expand(self, y: Tensor) -> Tensor:
        earlier, later = self._steps
        return earlier.expand(later.expand(y))


@dataclass(frozen=True)
class Reducer(ABC):
    """A method: decides which tokens join. Its options are its dataclass fields.

    Class attributes
    ----------------
    needs : what `match` requires beyond the metric: "attention" (B, N), what each token receives from the class token
        (mean over heads); "query" (B, C), the question; "grid" (rows, columns) of the patches.
    bipartite : one step removes at most half of the tokens; else all but one.
    once : the method reduces in one step, at one place; it does not make sense a little in every block.
    source_order : the reference code leaves tokens in an order of its own, which `Merge.in_source_order` gives.
    forms_groups : every token left stands for certain patches; else `Merge.group` is None.
    shrinks_picture : the method is a smaller picture; its groups only say which patches share a token.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    bipartite: ClassVar[bool] = True
    once: ClassVar[bool] = False
    source_order: ClassVar[bool] = False
    shrinks_picture: ClassVar[bool] = False
    forms_groups: ClassVar[bool] = True

    @abstractmethod
    def match(
        self, metric: Tensor, r: int, *, size: Tensor | None = None, protected: int = 0, depth: float = 0.0
    ) -> Merge:
        """Decide which tokens join.

        Parameters
        ----------
        metric : (B, N, C) whose cosine similarity says how alike tokens are.
        r : how many tokens every row loses.
        size : (B, N, 1) patches that each token stands for; None = one each.
        protected : the first tokens (a class token) stay alone, as groups 0 .. protected-1.
        depth : l / L, the 0-based index of the merging block over their number.

        Returns
        -------
        A `Merge` with exactly N - r groups. A token whose metric holds NaN or infinity is similar to nothing.

        Raises
        ------
        ValueError : r is negative or beyond ``max_removable``; something of ``needs`` is missing.
        """

    def max_removable(self, n: int) -> int:
        """The most tokens that one `match` can remove of ``n`` unprotected ones."""
        return n // 2 if self.bipartite else max(n - 1, 0)

    def allowed(self, n: int) -> Collection[int]:
        """The token counts that repeated matching can reach from ``n`` unprotected tokens."""
        return range(1, n + 1)

    def check(self, metric: Tensor, r: int, protected: int, **needed: Tensor | None) -> int:
        """The number of unprotected tokens of ``metric``.

        ValueError if ``r`` of them cannot be removed, or if one of ``needed`` is None.
        """
        for name, value in needed.items():
            if value is None:
                raise UserError(f"{type(self).__name__}.match needs {name}=..., got none; see `Reducer.needs`")
        tokens = metric.shape[1] - protected
        if not 0 <= r <= self.max_removable(tokens):
            raise UserError(
                f"cannot remove r={r} of {tokens} tokens in one step with {type(self).__name__}: "
                f"0 to {self.max_removable(tokens)} are possible; remove the rest in further steps"
            )
        return tokens
