"""Which placeholder is which, and the positions of columns and places: pure functions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .transfers import on


def ranks(image: Tensor, lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Which image every placeholder belongs to, and its rank within that image: (B, T) int64 each.

    ``image`` (B, T) is True at placeholders, row by row the ``lengths`` of the images in order, which may adjoin.
    """
    ends = torch.tensor(lengths, device=image.device).cumsum(0)
    flat = (image.flatten().cumsum(0) - 1).view_as(image)
    number = torch.bucketize(flat, ends, right=True).clamp(max=len(lengths) - 1)
    return number, flat - (ends - torch.tensor(lengths, device=image.device))[number]


def caller_positions(mask: Tensor) -> Tensor:
    """Position ids (B, T + 1) of the columns of a prompt, and of the one after it; padding (0 in ``mask``) does not
    count.
    """
    return (F.pad(mask.long(), (0, 1), value=1).cumsum(1) - 1).clamp(min=0)


def missing_before(image: Tensor, full: Sequence[int], kept: Sequence[int]) -> Tensor:
    """(B, T) how many placeholders are missing before each column of a short prompt, of images in its row."""
    number, rank = ranks(image, kept)
    kept, full = (torch.tensor(lengths, device=image.device) for lengths in (kept, full))
    gap = (full - kept)[number].masked_fill(~image | (rank != kept[number] - 1), 0)
    return gap.cumsum(1) - gap


def shift_to_median(image: Tensor, median: Sequence[Tensor]) -> Tensor:
    """(B, S) what positions grow by, so that each visual token has that of the median patch of its group.

    ``image`` (B, S) is True at placeholders, row by row those of the images in order; it may have every row several
    times in place (beams). ``median`` are per image (K,) the median patches of its tokens, counted within it.
    """
    if isinstance(median, Tensor):
        return at_placeholders(image, median - torch.arange(median.shape[1], device=median.device))
    return at_placeholders(image, [place - torch.arange(len(place), device=place.device) for place in median])


def at_placeholders(image: Tensor, values: Sequence[Tensor]) -> Tensor:
    """(B, S) or (B, S, A) with ``values`` (K,) or (K, A) of each image at its placeholders, 0 elsewhere; see
    `shift_to_median`.
    """
    flat = values.flatten(0, 1) if isinstance(values, Tensor) else torch.cat(tuple(values))
    repeats = max(1, int(image.sum()) // len(flat))
    once = image[::repeats]
    at = (once.flatten().cumsum(0) - 1).clamp(0, len(flat) - 1).view_as(once)
    at = at if repeats == 1 else at.repeat_interleave(repeats, 0)
    elsewhere = on(flat.device, ~image)
    return flat[on(flat.device, at)].masked_fill(elsewhere if flat.dim() == 1 else elsewhere[..., None], 0)
