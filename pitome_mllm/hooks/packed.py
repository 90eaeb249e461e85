"""Pictures that the model itself puts among the text: each merges once the model has made its visual tokens.

The seam is the core's ``get_image_features``, whose ``pooler_output`` has the tokens of every picture. The prompt is
shortened by the lengths of what comes out of it, so pictures are encoded first (`tiles`); the model finds them encoded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..families.anyres import Packed
from ..methods import Merge
from ..methods.merge import median_of_groups
from ..plan import Plan
from ..stats import Stats
from .merging import merge_rounds
from .state import Attached
from .validate import SIZES

FRAMES = ("video_grid_thw", "num_frames_per_video")  # what says how many frames a video has
DEEP = "deepstack_features"  # of an output: for some blocks of the LLM, what they add to the tokens of every picture


def merge_output(handle: Attached, plan: Plan, output: Any, given: Mapping[str, Any]) -> Any:
    """What the model made of its pictures, merged picture by picture, in place; ``given`` are the call's arguments."""
    made, deep = output.pooler_output, getattr(output, DEEP, None) or ()
    lengths, width = [len(x) for x in made], made[0].shape[-1]
    layers = [layer.split(lengths) if isinstance(layer, Tensor) else layer for layer in deep]
    wide = [torch.cat(parts, -1) if layers else parts[0] for parts in zip(made, *layers)]
    sizes = _sizes(given, len(lengths))
    parts = [_parts(n, size, plan.available if handle.family.by_row else 0) for n, size in zip(lengths, sizes)]
    pictures = [part for x, each in zip(wide, parts) for part in x.split(each)]
    grids = tuple(_grid(n, *size[-2:]) for each, size in zip(parts, sizes) for n in each)
    merged, packed = merge_pictures(plan, pictures, row_ends(handle, pictures), width)
    handle.note(stats=Stats(plan, len(packed), (), None, pictures[0].device, packed, grids=grids))
    left = iter(map(len, merged))
    joined = torch.cat(merged).split([sum(next(left) for _ in each) for each in parts])
    features, *layers = zip(*(x.split(width, -1) for x in joined))
    output.pooler_output = torch.stack(features) if isinstance(made, Tensor) else type(made)(features)
    if layers:
        pairs = zip(deep, layers)
        setattr(output, DEEP, [torch.cat(new) if isinstance(old, Tensor) else list(new) for old, new in pairs])
    return output


def merge_pictures(
    plan: Plan, pictures: Sequence[Tensor], ends: Sequence[Tensor | None], width: int | None = None
) -> tuple[list[Tensor], tuple[Packed, ...]]:
    """The visual tokens (L, C) of every picture, merged by their first ``width`` features; those of equal length at
    once.

    ``ends`` (L,) bool : tokens that only end a row of a picture, and go with the rows; None = none do.
    """
    left = [x if end is None else x[~end] for x, end in zip(pictures, ends)]
    found: dict[int, tuple[Tensor, Packed]] = {}
    for length in dict.fromkeys(map(len, left)):
        same = [index for index, x in enumerate(left) if len(x) == length]
        steps = plan.rounds(length)
        if not steps:
            found |= {index: (pictures[index], _untouched(pictures[index])) for index in same}
            continue
        x = torch.stack([left[index] for index in same])
        x, merges, size = merge_rounds(plan, x, steps, measure=lambda x: x[..., :width], context={})
        groups = reduce(Merge.then, merges).group
        medians = median_of_groups(groups, steps[-1])
        for row, index in enumerate(same):
            found[index] = x[row], _packed(ends[index], groups[row], medians[row], size[row, :, 0])
    features, packed = zip(*(found[index] for index in range(len(pictures))))
    return list(features), packed


def _packed(end: Tensor | None, group: Tensor, median: Tensor, size: Tensor) -> Packed:
    """What became of a picture's tokens, of which those at ``end`` (L,) are gone."""
    if end is not None:
        there = (~end).nonzero()[:, 0]
        median = there[median]
        group = torch.full_like(end, -1, dtype=group.dtype).index_copy(0, there, group)
    return Packed(torch.arange(len(median), device=median.device), median, size, group)


def _untouched(x: Tensor) -> Packed:
    places = torch.arange(len(x), device=x.device)
    return Packed(places, places, torch.ones_like(places, dtype=torch.float32), places)


def lengths_before(handle: Attached, kwargs: Mapping[str, Any]) -> list[int]:
    """Visual tokens of every image of a call in the plain model, found without running the tower."""
    shape, vision = handle.geometry, handle.model.config.vision_config
    sizes, image = kwargs.get("image_sizes"), kwargs["input_ids"] == handle.model.config.image_token_id
    if sizes is not None:
        side = vision.patch_size * shape.shuffle_factor
        return [height // side * (width // side) for height, width in torch.as_tensor(sizes).tolist()]
    if not handle.family.side:
        return [shape.available] * (int(image.sum()) // shape.available)
    ends = F.pad(image.long(), (1, 1)).diff().flatten().nonzero()[:, 0]  # where a run of placeholders begins, and ends
    return ends.view(-1, 2).diff().flatten().tolist()


def row_ends(handle: Attached, pictures: Sequence[Tensor]) -> list[Tensor | None]:
    """(L,) True at the tokens of each picture that only end its rows; None where the family has none."""
    if not handle.family.newline:
        return [None] * len(pictures)
    newline = getattr(handle.core, handle.family.newline).detach()
    return [(x == newline.to(x)).all(-1) for x in pictures]


def _sizes(given: Mapping[str, Any], count: int) -> list[Sequence[int]]:
    """Rows and columns of as many pictures by what a call says, with their frames before them where it does."""
    sizes = next((given[name] for name in (*SIZES, *FRAMES) if given.get(name) is not None), ())
    if (places := given.get("image_position_ids")) is not None:  # (I, N, 2): column and row of every patch
        sizes = (places.amax(1) + 1).flip(-1)
    sizes = sizes.tolist() if isinstance(sizes, Tensor) else sizes
    places = given.get("video_position_ids")  # with an axis of frames in older releases of transformers
    if not sizes and isinstance(places, Tensor) and places.dim() == 4:
        sizes = [places.shape[1]] * count
    sizes = [(size, 1, 1) if isinstance(size, int) else size for size in sizes]
    return sizes if len(sizes) == count else [(1, 1)] * count


def _parts(tokens: int, size: Sequence[int], tile: int) -> list[int]:
    """Tokens of what merges by itself among the ``tokens`` of one picture of this ``size``: its tiles, or frames."""
    parts = tokens // tile if tile else size[0] if len(size) == 3 else 1
    return [tokens // parts] * parts if parts else []


def _grid(tokens: int, rows: int, columns: int) -> tuple[int, int] | None:
    """Rows and columns of as many ``tokens``, which are in the ratio of ``rows`` to ``columns``."""
    scale = math.sqrt(tokens / (rows * columns))
    grid = round(rows * scale), round(columns * scale)
    return grid if grid[0] * grid[1] == tokens else None
