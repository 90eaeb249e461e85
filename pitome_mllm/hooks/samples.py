"""Several samples packed into one row: where they begin is read out of position ids that restart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .layout import Layout
from .validate import check_positions


def restarting(kwargs: Mapping[str, Any], real: Tensor, seen: Layout | None) -> Tensor | None:
    """The caller's position ids (B, T) where they restart within a row, which packs several samples; else None."""
    given = kwargs.get("position_ids")
    if given is None or (isinstance(given, Tensor) and given.dim() == 3):  # which count in several axes
        return None
    check_positions(given, real, after=seen is not None)
    given = given[:, -real.shape[1] :].expand(len(real), -1).to(real.device)
    if given.shape != real.shape or not bool(_sample(given, real != 0).any()):
        return None
    return given


def packed(new: Layout, real: Tensor, restart: Tensor, counted: bool) -> tuple[Layout, Tensor, Tensor | None]:
    """The layout of packed samples, which of them (B, S) every place belongs to, and position ids (B, S).

    ``real`` (B, T) is 0 at padding, ``restart`` (B, T) the caller's position ids; with ``counted`` the layout has
    positions, and there are no others.
    """
    begin = restart.gather(1, (real != 0).to(torch.int8).argmax(1, keepdim=True))
    positions = restart.where(real != 0, begin)  # of padding such that no neighbour follows on it
    new = new.positioned(and_next(positions))
    new = replace(new, position=new.position.where(new.real, begin))
    sample = new.take(_sample(restart, real != 0), -1)
    if counted:
        return new, sample, None
    return replace(new, position=None, follows=None), sample, _compact(new.position, sample)


def and_next(positions: Tensor) -> Tensor:
    """``positions`` (B, T) with the one after them, (B, T + 1)."""
    return torch.cat([positions, positions.amax(1, keepdim=True) + 1], 1)


def _sample(positions: Tensor, real: Tensor) -> Tensor:
    """(B, T) the number of the sample that each column of ``positions`` (B, T) is of.

    Within a sample each is one more than the last; any other step begins the next one. Padding (False in ``real``) is
    not looked at.
    """
    column = torch.arange(positions.shape[1], device=positions.device).expand_as(positions)
    last = torch.where(real, column, -1).cummax(1).values  # the last real column up to here
    before = F.pad(last[:, :-1], (1, 0), value=-1)
    jump = positions - positions.gather(1, before.clamp(min=0)) != 1
    return (jump & real & (before >= 0)).long().cumsum(1)


def _compact(positions: Tensor, sample: Tensor) -> Tensor:
    """Positions (B, S) that count up in every ``sample`` (B, S) from what its first place has in ``positions``."""
    place = torch.arange(sample.shape[1], device=sample.device).expand_as(sample)
    begins = sample != F.pad(sample[:, :-1], (1, 0), value=-1)
    start = torch.where(begins, place, 0).cummax(1).values
    return positions.gather(1, start) + place - start
