"""What a method answers: a `Merge`, which says which tokens join, and applies that.

It applies to anything that has one row per token: features, sizes, provenance. Shapes are static and nothing
synchronises with the host, so that it runs under ``torch.compile`` and CUDA graphs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..errors import UserError


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

    Equal inputs give equal bits: the order of addition is that of ``values``, on GPUs another but fixed one where rows
    are single numbers. There ``index_add`` and ``scatter_add`` add in any order, and ``index_put`` sorts first; on
    processors all keep the order.
    """
    if total.device.type == "cpu":
        return total.index_add_(0, index, values)
    return total.index_put_((index,), values, accumulate=True)


def first_of_groups(group: Tensor, count: int) -> Tensor:
    """The smallest index of each of ``count`` groups (B, N), as (B, count); N for an empty one. -1 = no group."""
    batch, tokens = group.shape
    index = torch.arange(tokens, device=group.device).expand(batch, tokens)
    slot = group.where(group >= 0, count)  # one extra place takes what is dropped
    return index.new_full((batch, count + 1), tokens).scatter_reduce(1, slot, index, "amin")[:, :count]


def median_of_groups(group: Tensor, count: int) -> Tensor:
    """The median index, the lower one of two, of each of ``count`` groups (B, N), as (B, count). -1 = no group."""
    slot = group.where(group >= 0, count)
    size = torch.zeros_like(slot[:, :1]).repeat(1, count + 1).scatter_add(1, slot, torch.ones_like(slot))
    middle = size.cumsum(1) - size + (size - 1).clamp(min=0) // 2
    return slot.argsort(dim=1, stable=True).gather(1, middle[:, :count].clamp(max=slot.shape[1] - 1))


def whole_vectors(tokens: int) -> int:
    """The length of a row of so many numbers after which the next one starts where a GPU reads whole vectors."""
    return tokens + -tokens % 8


def log_sizes(size: Tensor, dtype: torch.dtype) -> Tensor:
    """log(size) of tokens with ``size`` (B, N, 1), as (B, 1, 1, N), in rows of `whole_vectors`.

    Attention on a GPU would else copy them to such, in every block, for every query.
    """
    batch, tokens = size.shape[:2]
    row = size.new_zeros(batch, 1, 1, whole_vectors(tokens), dtype=dtype)[..., :tokens]
    return row.copy_(size.log().reshape(batch, 1, 1, tokens))


M = TypeVar("M", bound="Merge")


class Merge:
    """Which tokens join, and how their values combine.

    Attributes
    ----------
    group : Tensor of shape (B, N), int64, or None
        Group 0 .. count-1 of every token, -1 = dropped; None for methods without groups.
    count : int
        Number of groups K.
    energy : Tensor of shape (B, n), float32, or None
        Energy of the unprotected tokens, for methods that have one; else None.
    candidates : int or None
        How many tokens of the highest energy could merge.
    source : callable or None
        Makes of the merge (B, K) int64, one token of each group, in the order in which the reference code leaves them.

    Notes
    -----
    Groups are numbered in reading order: by the smallest index among their tokens.
    """

    candidates: int | None = None
    source: Callable[[Merge], Tensor] | None = None
    _may_drop: bool = False  # whether groups may be -1

    def __init__(
        self,
        root: Tensor,
        count: int,
        *,
        weight: Tensor | None = None,
        energy: Tensor | None = None,
        root_is_first: bool = False,
        may_drop: bool = True,
    ) -> None:
        """Group tokens by a common root.

        Parameters
        ----------
        root : Tensor of shape (B, N), int64
            The index of one token of the group, the same for all its tokens; -1 = dropped.
        count : int
            How many different roots every row has.
        weight : Tensor of shape (B, N), float32, optional
            Factor of each token in its group's value; None = its share of the group's size.
        root_is_first : bool, default False
            Every root is the first token of its group; saves looking for it.
        may_drop : bool, default True
            Whether a root may be -1; False saves looking.
        """
        batch, tokens = root.shape
        index = torch.arange(tokens, device=root.device).expand(batch, tokens)
        if not root_is_first:
            least = first_of_groups(root, tokens).gather(1, root.clamp(min=0))
            root = least.where(root >= 0, -1)
        follows = root != index
        order = follows.argsort(dim=1, stable=True)  # first tokens in front, each part in reading order
        group = (index - follows.cumsum(1)).gather(1, root.clamp(min=0) if may_drop else root)

        self.count = count
        self.energy = energy
        self.group: Tensor | None = group.where(root >= 0, -1) if may_drop else group
        self._weight = weight
        self._may_drop = may_drop
        self._first = order[:, :count]  # the first token of each group ...
        self._rest = order[:, count:]  # ... and all the others

    def __getstate__(self) -> dict[str, Any]:
        """What a copy is made of."""
        return dict(vars(self))

    @classmethod
    def join(cls: type[M], tokens: int, sources: Tensor, targets: Tensor, **extra: Any) -> M:
        """Each of ``sources`` (B, r) joins the token of ``targets`` (B, r) beside it; the other tokens stay alone.

        No token is both.
        """
        batch, r = sources.shape
        index = torch.arange(tokens, device=sources.device).expand(batch, tokens)
        least = index.scatter_reduce(1, targets, sources, "amin")
        return cls(
            least.scatter(1, sources, least.gather(1, targets)), tokens - r, root_is_first=True, may_drop=False, **extra
        )

    @classmethod
    def select(cls, tokens: int, kept: Tensor, protected: int = 0) -> Merge:
        """Only the tokens ``kept`` (B, K) and the first ``protected`` ones stay; all others are dropped."""
        index = torch.arange(tokens, device=kept.device).repeat(len(kept), 1)
        root = torch.full_like(index, -1).scatter(1, kept, kept)
        return cls(index.where(index < protected, root), kept.shape[1] + protected, root_is_first=True)

    @property
    def _group(self) -> Tensor:
        """The groups, where the method forms some."""
        if self.group is None:
            raise UserError("this method forms no groups; choose one that merges or drops tokens")
        return self.group

    def weighted_by(self: M, value: Tensor) -> M:
        """This merge with means weighted by ``value`` (B, N), above zero, in place of sizes. In place; no dropping."""
        total = self.reduce(value[..., None], value[..., None])[1]
        self._weight = value / self.expand(total)[..., 0]
        return self

    def reduce(self, x: Tensor, size: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Combine the tokens of each group, by default their size-weighted mean, and sum up their sizes.

        Parameters
        ----------
        x : Tensor of shape (B, N, C)
            Features of any floating dtype.
        size : Tensor of shape (B, N, 1), optional
            Patches that each token stands for; None = one each.

        Returns
        -------
        x : Tensor of shape (B, K, C)
            In the dtype of ``x``, accumulated in at least float32; a token that stayed alone keeps its bits.
        size : Tensor of shape (B, K, 1), float32
        """
        batch, tokens, channels = x.shape
        size = x.new_ones(batch * tokens, dtype=torch.float32) if size is None else size.flatten().float()
        first, rest = flat(self._first, tokens), flat(self._rest, tokens)
        first_size, rest_size = size.index_select(0, first), size.index_select(0, rest)
        slot = self._group.gather(1, self._rest)  # the group that each of the rest joins
        if self._may_drop:
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
        if self._may_drop:
            joining = joining.masked_fill(dropped[:, None], 0.0)  # a NaN that is dropped must not return as 0 * NaN
        merged = add_rows(merged, slot, joining)
        return merged.view(batch, self.count, channels).to(x.dtype), total.view(batch, self.count, 1)

    def reduce_evenly(self, x: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
        """As `reduce`, with means in which every token counts once, whatever its size."""
        return self.reduce(x)[0], self.reduce(size, size)[1]

    def log_sizes(self, size: Tensor, dtype: torch.dtype) -> Tensor:
        """What attention adds, `log_sizes`, for a ``size`` (B, K, 1) that `reduce` gave."""
        return log_sizes(size, dtype)

    def expand(self, y: Tensor) -> Tensor:
        """Give every token its group's value: (B, K, C) -> (B, N, C). A dropped token gets zeros."""
        dropped = self._group[..., None] < 0
        return rows(y, self._group.clamp(min=0)).masked_fill(dropped, 0.0)

    def then(self, later: Merge) -> Merge:
        """The composition: ``later`` merges what this one leaves."""
        return _Chain(self, later)

    def in_source_order(self: M) -> M:
        """The same groups, numbered in the order that the reference code leaves (reading order where it has none)."""
        if self.source is None:
            return self
        order = self._group.gather(1, self.source(self))  # (B, K): reading-order number of the group now at each place
        place = order.argsort(dim=1)
        renumbered = object.__new__(type(self))
        renumbered.__dict__.update(self.__dict__)
        renumbered.group = place.gather(1, self._group.clamp(min=0)).where(self._group >= 0, -1)
        renumbered._first = self._first.gather(1, order)
        return renumbered


class _Chain(Merge):
    """Two merges, one after the other, each combining in its own way."""

    def __init__(self, earlier: Merge, later: Merge) -> None:
        self._steps = (earlier, later)
        self.count = later.count
        self.energy = earlier.energy
        self._may_drop = earlier._may_drop or later._may_drop
        self.group = None
        if earlier.group is not None and later.group is not None:
            group = later.group.gather(1, earlier.group.clamp(min=0) if earlier._may_drop else earlier.group)
            self.group = group.where(earlier.group >= 0, -1) if earlier._may_drop else group

    def reduce(self, x: Tensor, size: Tensor | None = None) -> tuple[Tensor, Tensor]:
        earlier, later = self._steps
        wide = x.to(torch.promote_types(x.dtype, torch.float32))  # rounded once, at the end
        reduced, total = later.reduce(*earlier.reduce(wide, size))
        return reduced.to(x.dtype), total

    def expand(self, y: Tensor) -> Tensor:
        earlier, later = self._steps
        return earlier.expand(later.expand(y))
