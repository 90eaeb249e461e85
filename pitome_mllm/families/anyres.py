"""Images cut into tiles: where every patch stands among an image's visual tokens, before and after merging.

An anyres family encodes an overview of the image and tiles of it, puts the tiles together, cuts off what only pads
them, and ends every row with a newline token. `Places` is that order; everything here is a pure function of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..methods.merge import first_of_groups, median_of_groups


@dataclass(frozen=True, eq=False)
class Places:
    """The visual tokens of one image as the plain model packs them, the overview first.

    Attributes
    ----------
    source : Tensor of shape (L,), int64
        The patch at each place, counted through all tiles; -1 = a newline. Where the model scales the tiles' patches
        down, it only tells newlines from the others.
    overview : int
        Tokens of the overview.
    """

    source: Tensor
    overview: int

    def __len__(self) -> int:
        return len(self.source)

    @property
    def newline(self) -> Tensor:
        """(L,) bool, True where a newline stands."""
        return self.source < 0

    @property
    def tiles(self) -> int:
        """How many tiles these are of, the overview included, where the patches of all count."""
        return int(self.source.max()) // self.overview + 1


@dataclass(frozen=True, eq=False)
class Packed:
    """The visual tokens of one image that reach the LLM.

    Attributes
    ----------
    token : Tensor of shape (K,), int64
        Which merged token each one is, counted through all tiles or parts; -1 = a newline.
    median : Tensor of shape (K,), int64
        Its place among the tokens of the plain model: that of its median patch.
    size : Tensor of shape (K,), float32
        How many tokens of the plain model it stands for.
    group : Tensor of shape (L,), int64
        The place among the K that each token of the plain model went to, -1 = dropped.
    """

    token: Tensor
    median: Tensor
    size: Tensor
    group: Tensor


def survivors(places: Places, groups: Tensor, count: int) -> Packed:
    """The tokens of merged tiles that show something of the image, in reading order, with all newlines.

    Parameters
    ----------
    places : Places
        Of the image.
    groups : Tensor of shape (tiles, patches), int64
        The token 0 .. count-1 that each patch became, -1 = dropped.
    count : int
        Tokens of each tile.

    Notes
    -----
    Patches that are padding do not count, and a token that holds nothing but padding is left out.
    """
    tiles = torch.arange(len(groups), device=groups.device)[:, None]
    token = (groups + tiles * count).where(groups >= 0, -1).flatten()
    source = places.source.to(groups.device)
    return _collect(token[source.clamp(min=0)].where(source >= 0, -1), source < 0, len(groups) * count)


def _collect(token: Tensor, newline: Tensor, tokens: int) -> Packed:
    """What is left of the places (L,), of which ``token`` (L,) says what they became, and of the newlines (L,)."""
    length = len(token)
    slot = token.where(token >= 0, tokens)  # one more takes what is dropped
    first = first_of_groups(token[None], tokens)[0]
    size = slot.bincount(minlength=tokens + 1)[:tokens].float()
    seen = (first < length).nonzero()[:, 0]
    ends = newline.nonzero()[:, 0]
    order = torch.cat([first[seen], ends]).argsort()
    median = torch.cat([median_of_groups(token[None], tokens)[0][seen], ends])[order]
    kept = torch.cat([seen, torch.full_like(ends, -1)])[order]
    at = torch.full((tokens + 1,), -1, device=token.device)
    at[kept[kept >= 0]] = (kept >= 0).nonzero()[:, 0]
    group = at[slot]
    group[ends] = (kept < 0).nonzero()[:, 0]
    return Packed(kept, median, torch.cat([size[seen], torch.ones_like(ends).float()])[order], group)
