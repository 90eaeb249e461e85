"""What a run did to the images."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, reduce

import torch
from torch import Tensor

from .families.anyres import Packed
from .methods import Merge, UserError
from .methods.merge import median_of_groups
from .plan import Plan


@dataclass(frozen=True, eq=False)
class Stats:
    """The last run of one thread; tensors are on the model's device.

    Attributes
    ----------
    plan : Plan
        What was asked for.
    images : int
        Images (or tiles) in the run.
    merges : tuple of Merge
        The merges in their order, blocks first, then the steps before the projector.
    token_sizes : Tensor of shape (images, class_tokens + patch tokens, 1), or None
        Patches per token at the end; None if nothing merged.
    packed : tuple of Packed
        What became of each image, where they are several tiles or merge behind the projector.
    grids : tuple of (int, int) or None
        Rows and columns of each of those images' visual tokens in the plain model; None where they form no grid.
    layout : Tensor of shape (B, S), int64, or None
        The column of the caller's prompt at every place of the prompt that the LLM got, -1 at padding; of a turn that
        continues a KV cache, at every place since the beginning. None if they are the same.
    """

    plan: Plan
    images: int
    merges: tuple[Merge, ...]
    token_sizes: Tensor | None
    device: torch.device
    packed: tuple[Packed, ...] = ()
    layout: Tensor | None = None
    grids: tuple[tuple[int, int] | None, ...] = ()

    def __repr__(self) -> str:
        """One line: counts of tokens, and the sizes of their groups."""
        before = sum(len(one.group) for one in self.packed) or self.images * self.tokens_before
        after = sum(self.lengths)
        said = f"{self.method}, images: {len(self.packed) or self.images}, visual tokens: {after} of {before}"
        if after and all(merge.group is not None for merge in self.merges):
            sizes = self.sizes.flatten() if isinstance(self.sizes, Tensor) else torch.cat(self.sizes)
            said += f", largest group: {sizes.max():.0f} patches, alone: {(sizes == 1).sum()}"
        return f"Stats({said})"

    @property
    def method(self) -> str:
        """The name of the method."""
        return self.plan.method

    @property
    def where(self) -> str:
        """The place where tokens merged."""
        return self.plan.where

    @property
    def tokens_before(self) -> int:
        """Visual tokens per image that reach the LLM of the plain model."""
        return self.plan.available

    @property
    def tokens_after(self) -> int:
        """Visual tokens per image that reached the LLM."""
        return self.plan.keep

    @property
    def lengths(self) -> tuple[int, ...]:
        """Visual tokens of every image that reached the LLM."""
        if self.packed:
            return tuple(len(picture.token) for picture in self.packed)
        return (self.tokens_after,) * self.images

    def left(self, marked: Tensor) -> list[int]:
        """How many of the ``marked`` (B, S) columns of each row of the caller's prompt reached the LLM."""
        if self.layout is None:
            return marked.sum(1).tolist()
        column = self.layout[:: len(self.layout) // len(marked)].to(marked.device)  # beams have each row several times
        inside = (column >= 0) & (column < marked.shape[1])
        return (marked.gather(1, column.clamp(0, marked.shape[1] - 1)) & inside).sum(1).tolist()

    @property
    def counts(self) -> tuple[int, ...]:
        """Patch tokens after each merging block."""
        return self.plan.counts

    @property
    def _hidden(self) -> int:
        """Class tokens of the tower that the LLM does not see."""
        return self.plan.geometry.class_tokens - self.plan.geometry.visible_class_tokens

    @cached_property
    def groups(self) -> Tensor | tuple[Tensor, ...] | None:
        """(images, tokens_before) int64: the visual token that each patch became, -1 = dropped.

        None for methods without groups. With ``where="packed"`` and images of several tiles it is one tensor for
        each image, over all the visual tokens of the plain model.
        """
        if self.packed and self.where == "packed":
            return tuple(picture.group for picture in self.packed)
        if not self.merges:
            return torch.arange(self.tokens_before, device=self.device).repeat(self.images, 1)
        group = reduce(Merge.then, self.merges).group
        if group is None:
            return None
        group = group[:, self._hidden :]
        return (group - self._hidden).where(group >= 0, -1)

    @cached_property
    def median(self) -> Tensor | tuple[Tensor, ...]:
        """(images, tokens_after) int64: the median patch, in reading order, of every visual token.

        For images of several tiles (tokens,) for each one, counted among the visual tokens of the plain model.
        """
        if self.packed:
            return tuple(picture.median for picture in self.packed)
        groups = self.groups
        if not isinstance(groups, Tensor):
            raise UserError(f"{self.method} has no groups, so its tokens have no original position")
        return median_of_groups(groups, self.tokens_after)

    @cached_property
    def sizes(self) -> Tensor | tuple[Tensor, ...]:
        """(images, tokens_after) float32: patches that every visual token stands for.

        For images of several tiles (tokens,) for each one, patches that only pad the image not counted.
        """
        if self.packed:
            return tuple(picture.size for picture in self.packed)
        if self.token_sizes is None:
            return torch.ones(self.images, self.tokens_after, dtype=torch.float32, device=self.device)
        return self.token_sizes[:, self._hidden :, 0]

    def unmerge(self, hidden: Tensor) -> Tensor:
        """Give every patch the value of the token that it became; zeros where it was dropped.

        Parameters
        ----------
        hidden : Tensor of shape (images, class tokens + tokens, C)
            A value for every token that left the vision tower, such as its ``last_hidden_state``.

        Returns
        -------
        Tensor of shape (images, class tokens + patches, C)
            In the order of the plain model's.

        Raises
        ------
        ValueError
            ``hidden`` is not of this run; the method forms no groups; images are several tiles.
        """
        left = (self.images, self._hidden + self.tokens_after)
        if self.packed or self.where == "packed":
            raise UserError("tokens of tiles are packed for the LLM, so no values of the tower's tokens are left")
        if hidden.shape[:-1] != left:
            raise UserError(f"got values for tokens {tuple(hidden.shape[:-1])}, the run left {left}")
        if self.groups is None:
            raise UserError(f"{self.method} has no groups, so nobody knows which patches a token was")
        return reduce(Merge.then, self.merges).expand(hidden) if self.merges else hidden

    @property
    def energies(self) -> list[Tensor | None] | None:
        """Per merge the energy (images, patch tokens before it), None for methods without one; of its first step.

        None as a whole unless ``energies=True`` was asked for.
        """
        return [merge.energy for merge in self.merges] if self.plan.energies else None
