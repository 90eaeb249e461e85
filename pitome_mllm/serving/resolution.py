"""How many visual tokens a processor makes of a picture: its options, and smaller pictures, the rival of merging."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from math import ceil, floor, log, sqrt
from typing import Any

from PIL import Image

from ..errors import UserError

CONTROL = "max_pixels"  # what comparisons call the plain model on smaller pictures


def amount(plan: Any) -> str:
    """How many visual tokens are left, in words: of a picture, or of a tile; a share where pictures differ."""
    tile, keep = " per tile" if plan.geometry.family.tiles else "", plan.asked.keep
    if plan.geometry.family.side:
        return f"{keep:.0%} of a picture's visual tokens" if isinstance(keep, float) else f"{keep} visual tokens"
    return f"{plan.keep} of {plan.available} visual tokens{tile} ({plan.keep / plan.available:.0%})"


def options_of(processor: Any) -> list[str]:
    """What a processor can be told of its pictures, the entries of its ``size`` too."""
    images = processor.image_processor
    kinds = getattr(type(images), "valid_kwargs", None)
    return [*getattr(kinds, "__annotations__", {}), *_size(images)]


def with_options(processor: Any, options: Mapping[str, Any]) -> Any:
    """A processor that treats pictures as ``options`` say, such as ``max_pixels`` or ``longest_edge``.

    Raises
    ------
    ValueError
        It knows no such option.
    """
    if not options:
        return processor
    images, known = processor.image_processor, options_of(processor)
    for name in options.keys() - set(known):
        raise UserError(f"unknown option {name!r} of {type(images).__name__}; choose from {', '.join(known)}")
    size = {**_size(images), **{name: options[name] for name in options.keys() & _size(images).keys()}}
    others = {name: value for name, value in options.items() if name not in size}
    changed = copy.copy(processor)
    changed.image_processor = type(images).from_dict({**images.to_dict(), "size": size}, **others)
    return changed


def _size(images: Any) -> dict[str, int]:
    """The size that an image processor scales pictures to."""
    size = getattr(images, "size", None)
    return {name: value for name, value in dict(size).items() if value is not None} if size else {}


def cell(processor: Any) -> int:
    """Pixels on a side that become one visual token where pictures keep their size; 0 = they are all scaled to one."""
    images = processor.image_processor
    joined = getattr(images, "merge_size", None) or getattr(processor, "spatial_merge_size", None)
    patch = getattr(processor, "patch_size", None) or getattr(images, "patch_size", None)
    return patch * joined if joined and isinstance(patch, int) else 0


def scales(config: Any) -> bool:
    """Whether processors of such models have a `cell`."""
    vision = getattr(config, "vision_config", None)
    return getattr(vision, "model_type", "") == "pixtral" or getattr(vision, "spatial_merge_size", 0) > 0


def without_floor(processor: Any) -> Any:
    """A processor that enlarges no picture of one cell or more."""
    floored = "shortest_edge" in _size(processor.image_processor)
    return with_options(processor, {"shortest_edge": cell(processor) ** 2} if floored else {})


def smaller(processor: Any, picture: Image.Image, tokens: int) -> Image.Image:
    """A picture scaled to whole cells, so that `without_floor` makes some ``tokens`` visual tokens of it.

    Of the numbers of rows and columns around the picture's proportions, those that change these and ``tokens`` least.

    Raises
    ------
    ValueError
        The processor scales all pictures to one size.
    """
    side = cell(processor)
    if not side:
        raise UserError(
            f"{type(processor).__name__} scales all pictures to one size, so a smaller one has as many tokens"
        )
    rows, columns = near_grid(tokens, picture.height / picture.width)
    return picture.resize((columns * side, rows * side), Image.Resampling.BICUBIC)


def near_grid(tokens: int, slope: float) -> tuple[int, int]:
    """Rows and columns of about so many ``tokens``, of about the proportion ``slope`` = rows / columns."""
    rows, columns = sqrt(tokens * slope), sqrt(tokens / slope)
    near = [(a, b) for a in {floor(rows), ceil(rows)} for b in {floor(columns), ceil(columns)}]
    possible = sorted((max(1, a), max(1, b)) for a, b in near)
    return min(
        possible, key=lambda grid: abs(log(grid[0] / grid[1] / slope)) + 2 * abs(log(grid[0] * grid[1] / tokens))
    )
