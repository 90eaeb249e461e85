"""Positions in several axes (M-RoPE): a picture's token has a time, a row and a column, text the same in each.

The model itself counts them, over the whole prompt and the sizes of its pictures; here they come to fewer tokens.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..methods.merge import median_of_groups
from .arguments import Prompt
from .transfers import on
from .validate import check_axes, check_countable

GRIDS = ("image_grid_thw", "video_grid_thw")  # without any of them a model counts one axis


def counts_axes(core: nn.Module) -> bool:
    """Whether a model counts positions in several axes."""
    return hasattr(type(core), "get_rope_index")


def as_ids(positions: Tensor) -> Tensor:
    """Positions (B, S) or (B, S, A) as a model takes them: (B, S) or (A, B, S)."""
    return positions if positions.dim() == 2 else positions.permute(2, 0, 1).contiguous()


def from_ids(ids: Tensor, like: Tensor) -> Tensor:
    """Position ids of a model as positions with the axes of ``like``; what is before the axes' own, as text's, goes."""
    if like.dim() == 2:
        return ids
    axes = like.shape[-1]
    return ids[..., None].expand(*ids.shape, axes) if ids.dim() == 2 else ids[-axes:].permute(1, 2, 0)


def positions_of(core: nn.Module, prompt: Prompt) -> Tensor | None:
    """(B, T + 1, A) positions of a whole prompt's columns and of the one after it; None where there is one axis only.

    They are the caller's position ids (A, B, T), or (B, T) for all axes, or what the model itself counts. After a KV
    cache they start at 0.
    """
    kwargs, fresh = prompt.kwargs, prompt.fresh
    given, pictures = kwargs.get("position_ids"), any(kwargs.get(name) is not None for name in GRIDS)
    if isinstance(given, Tensor) and given.dim() == 2 and pictures and counts_axes(core):
        given = given.expand(3, len(fresh), -1)
    if isinstance(given, Tensor) and given.dim() == 3:
        check_axes(given, prompt.real)
        ids = given[-3:, :, -fresh.shape[1] :].to(fresh.device)
        if prompt.seen is not None:
            ids = ids - ids.masked_fill(~prompt.real, ids.max()).amin((0, 2))[:, None]
    elif not counts_axes(core) or kwargs.get("input_ids") is None or not pictures:
        return None
    else:
        check_countable(kwargs, prompt.is_short)
        ids = counted(core, kwargs, fresh, prompt.real)
    real = prompt.real[..., None].expand(*prompt.real.shape, 3)
    positions = ids.permute(1, 2, 0)
    after = positions.where(real, -1).amax((1, 2), keepdim=True) + 1
    return torch.cat([positions, after.expand(-1, -1, 3)], 1)


def counted(core: nn.Module, kwargs: dict[str, Any], fresh: Tensor, real: Tensor) -> Tensor:
    """(A, B, T) the model's own count of the columns that are new."""
    width, names = fresh.shape[1], inspect.signature(type(core).get_rope_index).parameters
    given = {name: kwargs[name] for name in names if kwargs.get(name) is not None}
    for name in ("input_ids", "mm_token_type_ids"):
        given[name] = given[name][:, -width:].to(fresh.device)
    given = {name: x.to(fresh.device) if isinstance(x, Tensor) else x for name, x in given.items()}
    ids, _ = core.get_rope_index(**{**given, "attention_mask": real.long()})
    return ids


def compact(positions: Tensor, image: Tensor, full: Sequence[int], kept: Sequence[int]) -> Tensor:
    """``positions`` (B, T + 1, A) with no gaps where pictures lost tokens.

    The tokens that a picture (or a frame) keeps fill the rows of a smaller grid of its shape, in reading order: rows
    and columns are numbered anew from where the picture starts, its time stays. What follows comes after the largest.
    """
    positions, units = positions.clone(), iter(zip(full, kept))
    for row, places in zip(positions, image):
        columns = places.nonzero()[:, 0].tolist()
        while columns:
            run = next((n for n, (a, b) in enumerate(zip(columns, columns[1:]), 1) if b != a + 1), len(columns))
            begin, end = columns[0], columns[0] + run
            before, start, at = int(row[begin:end].max()), int(row[begin:end, 1:].min()), begin
            new = []
            while at < end:
                tokens, left = next(units)
                _refill(row[at : at + tokens], start, left)
                new.append(int(row[at : at + left].max()))
                at += tokens
            row[end:] -= before - max(new)
            columns = columns[run:]
    return positions


def _refill(picture: Tensor, start: int, left: int) -> None:
    """Number rows and columns of the first ``left`` tokens of a ``picture`` (L, A) anew, from ``start``; in place."""
    rows, columns = (picture[:, 1:].amax(0) - start + 1).tolist()
    if left == len(picture):
        return
    across = min(max(1, round(math.sqrt(left * columns / rows))), left)
    rank = torch.arange(left)
    picture[:left, 1], picture[:left, 2] = start + rank // across, start + rank % across


def medians(positions: Sequence[Tensor], groups: Sequence[Tensor], counts: Sequence[int]) -> list[Tensor]:
    """(K, A) for each picture the median position, axis by axis, of every token's group.

    ``positions`` (L, A) and ``groups`` (L,) of the plain model's tokens; ``counts`` are K.
    """
    found = []
    for places, group, count in zip(positions, groups, counts):
        places = on(group.device, places)
        values, order = places.sort(dim=0, stable=True)
        at = median_of_groups(group[order].T, count)  # (A, K)
        found.append(values.gather(0, at.T))
    return found


@torch.no_grad()
def nearness(rotary: nn.Module, distance: Tensor) -> Tensor:
    """(A, L) float32: of every ``distance`` (L,) along each axis, its share of D, the mean of cosines over frequencies.

    Which axis turns which frequency the rotary embedding is asked: one step along each.
    """
    step = torch.eye(3, dtype=torch.long, device=distance.device)[:, :, None]  # (A, B, 1): row a steps along axis a
    cos, sin = rotary(torch.zeros(3, 1, device=distance.device), step)
    angle = torch.atan2(sin, cos)[:, 0].float()  # (A, D), 0 where another axis turns
    turned = (distance[:, None, None] * angle).cos().where(angle != 0, 0.0)  # (L, A, D)
    return turned.sum(-1).T / angle.shape[-1]
