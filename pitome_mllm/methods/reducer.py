"""What a method is: a `Reducer`, which decides which tokens join by one metric per token."""

from __future__ import annotations

import math
import numbers
from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, TypeGuard

import torch
from torch import Tensor

from ..errors import UserError
from .merge import Merge


class Known(NamedTuple):
    """What `Reducer.match` is told beside the metric and the number of tokens to remove."""

    size: Tensor | None
    protected: int
    depth: float
    attention: Tensor | None
    grid: tuple[int, int] | None


@dataclass(frozen=True)
class Reducer:
    """A method: overrides `decide`, or `match` itself. Its options are its dataclass fields.

    Attributes
    ----------
    needs : frozenset of str
        What `match` requires beyond the metric: "attention" (B, N), what each token receives from the class token (mean
        over heads); "grid" (rows, columns) of the patches.
    bipartite : bool
        One step removes at most half of the tokens; else all but one.
    once : bool
        The method reduces in one step, at one place; it does not make sense a little in every block.
    forms_groups : bool
        Every token left stands for certain patches; else `Merge.group` is None.
    shrinks_picture : bool
        The method is a smaller image; its groups only say which patches share a token.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    bipartite: ClassVar[bool] = True
    once: ClassVar[bool] = False
    shrinks_picture: ClassVar[bool] = False
    forms_groups: ClassVar[bool] = True

    @property
    def source_order(self) -> bool:
        """Whether the reference code leaves tokens in an order of its own, which `Merge.in_source_order` gives."""
        return False

    @torch.no_grad()
    def match(
        self,
        metric: Tensor,
        r: int,
        *,
        size: Tensor | None = None,
        protected: int = 0,
        depth: float = 0.0,
        attention: Tensor | None = None,
        grid: tuple[int, int] | None = None,
    ) -> Merge:
        """Decide which tokens join.

        Parameters
        ----------
        metric : Tensor of shape (B, N, C)
            Features whose cosine similarity says how alike tokens are.
        r : int
            How many tokens every row loses.
        size : Tensor of shape (B, N, 1), optional
            Patches that each token stands for; None = one each.
        protected : int, default 0
            The first tokens (a class token) stay alone, as groups 0 .. protected-1.
        depth : float, default 0.0
            The 0-based index of the merging block over their number.
        attention, grid
            As `needs` says.

        Returns
        -------
        Merge
            With exactly N - r groups. A token whose metric holds NaN or infinity is similar to nothing.

        Raises
        ------
        ValueError
            ``r`` is negative or beyond ``max_removable``; something of ``needs`` is missing.
        """
        self.check(metric, r, protected)
        return self.decide(metric, r, Known(size, protected, depth, attention, grid))

    def decide(self, metric: Tensor, r: int, known: Known) -> Merge:
        """`match` of what is checked already, without gradients."""
        raise NotImplementedError(f"{type(self).__name__} overrides neither decide nor match")

    def max_removable(self, n: int) -> int:
        """The most tokens that one `match` can remove of ``n`` unprotected ones."""
        return n // 2 if self.bipartite else max(n - 1, 0)

    def allowed(self, n: int) -> Collection[int]:
        """The token counts that repeated matching can reach from ``n`` unprotected tokens."""
        return range(1, n + 1)

    def check(self, metric: Tensor, r: int, protected: int) -> None:
        """ValueError if ``r`` of the unprotected tokens of ``metric`` (B, N, C) cannot be removed."""
        tokens = metric.shape[1] - protected
        if not 0 <= r <= self.max_removable(tokens):
            raise UserError(
                f"cannot remove r={r} of {tokens} tokens in one step with {type(self).__name__}: "
                f"0 to {self.max_removable(tokens)} are possible; remove the rest in further steps"
            )

    def needed(self, name: str, value: Tensor | None) -> Tensor:
        """What `match` got as ``name``, one of ``needs``; ValueError if it got none."""
        if value is None:
            raise UserError(f"{type(self).__name__}.match needs {name}=..., got none; see `Reducer.needs`")
        return value


@dataclass(frozen=True)
class Selector(Reducer):
    """A method that keeps some tokens and drops the others; it says only which."""

    bipartite: ClassVar[bool] = False

    def kept(self, metric: Tensor, count: int) -> Tensor:
        """The tokens (B, count) int64 to keep, in any order, of ``metric`` (B, n, C) without the protected ones."""
        raise NotImplementedError(f"{type(self).__name__} does not override kept")

    def decide(self, metric: Tensor, r: int, known: Known) -> Merge:
        tokens, protected = metric.shape[1], known.protected
        kept = self.kept(metric[:, protected:], tokens - protected - r) + protected
        return Merge.select(tokens, kept, protected)


def is_number(value: object) -> TypeGuard[float]:
    """Whether an option is a number, which True and False are not."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def is_count(value: object) -> TypeGuard[int]:
    """Whether an option is a whole number from 1."""
    return isinstance(value, numbers.Integral) and is_number(value) and value >= 1


def check_number(name: str, value: object, low: float = -math.inf, high: float = math.inf) -> None:
    """ValueError unless the option ``name`` is a finite number from ``low`` to ``high``."""
    if not is_number(value) or not math.isfinite(value) or not low <= value <= high:
        bounds = "".join(f" {word} {bound:g}" for word, bound in (("from", low), ("to", high)) if math.isfinite(bound))
        raise UserError(f"{name}={value!r} is not possible; choose a number{bounds}")


def check_count(name: str, value: object) -> None:
    """ValueError unless the option ``name`` is a whole number from 1."""
    if not is_count(value):
        raise UserError(f"{name}={value!r} is not possible; choose a whole number from 1")
