"""What all drawings on patches share: checked labels, the size of the drawing, and marks on patches."""

from __future__ import annotations

from collections.abc import Sequence
from math import isqrt
from typing import Any, cast

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from ..methods import UserError

DROPPED = -1  # the label of patches that belong to no token
DPI = 100  # of what matplotlib draws
MOST = 4096  # pixels a side; drawing takes some 75 bytes for each pixel, so 1.3 GB
CELL = 28  # default pixels per patch: a single patch stays readable, and 24 x 24 of them fill 672 pixels


def array(values: Any) -> np.ndarray:
    """One value per patch (N,) of a list, array or tensor (N,) or (1, N)."""
    found = values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
    if found.ndim == 2 and len(found) == 1:
        found = found[0]
    if found.ndim != 1 or not found.size:
        raise UserError(f"got the shape {tuple(found.shape)}; pass those of one picture, (N,) or (1, N)")
    return found


def on_grid(values: np.ndarray, grid: tuple[int, int] | None) -> np.ndarray:
    """``values`` (N,) as (rows, columns); without a grid as a square."""
    if grid is None:
        grid = (isqrt(values.size), isqrt(values.size))
        if grid[0] * grid[1] != values.size:
            extra = grid[0] * grid[1] + 1 == values.size
            hint = "leave out the class token (groups[1:])" if extra else "pass grid=(rows, columns)"
            raise UserError(f"{values.size} patches do not fill a square; {hint}")
    if grid[0] * grid[1] != values.size:
        raise UserError(f"a grid of {grid[0]} x {grid[1]} has {grid[0] * grid[1]} patches, got {values.size} values")
    return values.reshape(grid)


def canvas(picture: Any, grid: tuple[int, ...], side: int | None) -> tuple[np.ndarray, int]:
    """The image's pixels (H, W, 3) float32 at the size of the drawing, and how many of them a patch has a side."""
    if not isinstance(picture, Image.Image):
        raise UserError(f"expected a PIL picture, got {type(picture).__name__}; convert it with PIL.Image.fromarray")
    longer = max(grid)
    if side is None:
        side = max(min(max(picture.size), MOST), CELL * longer)
    if side < 4 * longer:
        raise UserError(f"side={side} leaves less than 4 pixels for a patch; pass at least {4 * longer}")
    if side > max(MOST, CELL * longer):
        raise UserError(f"side={side} is more than {MOST} pixels, and drawing takes 75 bytes for each; pass fewer")
    height, width = (max(1, round(side * patches / longer)) for patches in grid)
    pixels = np.asarray(picture.convert("RGB").resize((width, height), Image.Resampling.LANCZOS), dtype=np.float32)
    return pixels, min(height // grid[0], width // grid[1])


def per_pixel(values: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """Values (rows, columns, ...) of patches as (H, W, ...), of as many ``pixels`` (H, W, 3)."""
    rows, columns = (np.arange(n) * patches // n for n, patches in zip(pixels.shape, values.shape[:2]))
    return values[np.ix_(rows, columns)]


def to_picture(pixels: np.ndarray) -> Image.Image:
    """The picture of (H, W, 3) pixels, values cut off at 0 and 255."""
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def below(sheets: Sequence[Image.Image]) -> Image.Image:
    """Images one below the other on white, from the left edge on."""
    whole = Image.new("RGB", (max(s.width for s in sheets), sum(s.height for s in sheets)), "white")
    top = 0
    for sheet in sheets:
        whole.paste(sheet, (0, top))
        top += sheet.height
    return whole


def painted(figure: Figure) -> Image.Image:
    """A figure of matplotlib as a picture."""
    paper = FigureCanvasAgg(figure)
    paper.draw()
    return Image.fromarray(np.asarray(paper.buffer_rgba())).convert("RGB")


def font_of(size: int) -> ImageFont.FreeTypeFont:
    """Pillow's own font at a size in pixels."""
    return cast(ImageFont.FreeTypeFont, ImageFont.load_default(size=size))


def hairline(label_map: np.ndarray, width: int) -> np.ndarray:
    """(H, W) bool: pixels less than `width` right of or below another group: one side of each border only."""
    line = np.zeros(label_map.shape, dtype=bool)
    line[width:] |= label_map[width:] != label_map[:-width]
    line[:, width:] |= label_map[:, width:] != label_map[:, :-width]
    return line


def hatch(pixels: np.ndarray, dropped: np.ndarray, cell: int) -> np.ndarray:
    """Dropped patches as a dim grey image under diagonal lines."""
    grey = 0.45 * pixels.mean(-1, keepdims=True) + 60
    lines: np.ndarray = np.indices(dropped.shape).sum(0) % max(4, cell // 2) < max(1, cell // 14)
    return np.where(dropped[..., None], np.where(lines[..., None], 205.0, grey), pixels)


def dots(drawing: Image.Image, where: np.ndarray, radius: int) -> None:
    """A small white dot with a dark rim in the middle of every patch of ``where`` (rows, columns)."""
    brush = ImageDraw.Draw(drawing)
    for x, y in _middles(drawing, where):
        brush.ellipse((x - radius, y - radius, x + radius, y + radius), fill="white", outline="black")


def diamonds(drawing: Image.Image, where: np.ndarray, cell: int) -> None:
    """A black diamond with a white rim in the middle of every patch of ``where`` (rows, columns)."""
    brush, radius = ImageDraw.Draw(drawing), max(2.0, cell / 6)
    for x, y in _middles(drawing, where):
        for reach, colour in ((radius + max(1, cell // 16), "white"), (radius, "black")):
            brush.polygon(((x - reach, y), (x, y - reach), (x + reach, y), (x, y + reach)), fill=colour)


def _middles(drawing: Image.Image, where: np.ndarray) -> list[tuple[float, float]]:
    """The middle of every patch of ``where`` in pixels."""
    height, width = drawing.height / where.shape[0], drawing.width / where.shape[1]
    return [((column + 0.5) * width - 0.5, (row + 0.5) * height - 0.5) for row, column in np.argwhere(where)]
