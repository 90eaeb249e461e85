"""Values on patches as colours, with a colour bar: energies, sizes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from ..methods import UserError
from .canvas import array, canvas, check_picture, dots, font_of, hatch, on_grid, per_pixel, stretched, to_picture

# Nine colours of viridis, which grows evenly in lightness and reads the same for every common kind of colour blindness.
VIRIDIS = np.array(
    [
        (68, 1, 84), (71, 45, 123), (59, 82, 139), (44, 114, 142), (33, 145, 140), (40, 174, 128), (94, 201, 98),
        (173, 220, 48), (253, 231, 37),
    ],
    dtype=np.float32,
)  # fmt: skip
PICTURE = 0.25  # share of the image's own lightness that shows through


def draw_energies(
    picture: Image.Image,
    energies: Any,
    *,
    protected: Any = None,
    grid: tuple[int, int] | None = None,
    side: int | None = None,
    span: tuple[float, float] | None = None,
) -> Image.Image:
    """The energy of every patch in one block as a colour over the dimmed image, with a colour bar below.

    High energy (yellow) means one of many alike, which merges first; low energy (violet) a rare one.

    Parameters
    ----------
    picture : PIL.Image.Image
        What the tower saw (see `seen_by`); it is stretched to the grid's proportions.
    energies : array_like of shape (N,) or (1, N)
        In reading order, as `patch_energies` gives them; NaN = dropped before, hatched.
    protected : array_like of shape (N,), bool, optional
        Patches that get a dot.
    grid : tuple of int, optional
        Rows and columns of the patches; needed unless N is a square number.
    side : int, optional
        Length of the longer side of the drawing, without the bar, in pixels; default: as in `draw_groups`.
    span : tuple of float, optional
        The energies at the two ends of the colours, for drawings to compare; default: the least and greatest here.

    Raises
    ------
    ValueError
        No energies (a method without them), a wrong number of them, a side too small to show the patches.
    """
    check_picture(picture)
    if energies is None:
        raise UserError("this method has no energies, so there is nothing to draw; choose one such as pitome")
    values = on_grid(array(energies).astype(np.float64), grid)
    height, width = canvas(values.shape, picture.size, side)
    cell = min(height // values.shape[0], width // values.shape[1])
    low, high = limits([values]) if span is None else span
    scaled = np.nan_to_num((values - low) / (high - low or 1.0))
    pixels = stretched(picture, height, width)
    light = pixels.mean(-1, keepdims=True) - 128
    drawn = per_pixel(colours(scaled), height, width) + PICTURE * light
    drawing = to_picture(hatch(drawn, per_pixel(~np.isfinite(values), height, width), cell))
    if protected is not None:
        dots(drawing, on_grid(array(protected).astype(bool), values.shape), max(1, cell // 14))
    ticks = [(share, f"{low + share * (high - low):.2f}") for share in (0.0, 0.5, 1.0)]
    return with_bar(drawing, "energy", ticks)


def limits(values: Iterable[np.ndarray]) -> tuple[float, float]:
    """The least and greatest finite value of some arrays; zeros if there is none."""
    known = np.concatenate([np.zeros(0), *(part[np.isfinite(part)] for part in values)])
    return (float(known.min()), float(known.max())) if known.size else (0.0, 0.0)


def colours(shares: Any) -> np.ndarray:
    """Colours (..., 3) of viridis for values from 0 to 1."""
    shares = np.clip(np.asarray(shares, dtype=np.float64), 0, 1)
    stops = np.linspace(0, 1, len(VIRIDIS))
    return np.stack([np.interp(shares, stops, VIRIDIS[:, channel]) for channel in range(3)], -1)


def with_bar(drawing: Image.Image, title: str, ticks: Sequence[tuple[float, str]]) -> Image.Image:
    """The drawing above a colour bar from 0 to 1 with ``ticks`` (place, text)."""
    font = font_of(max(11, drawing.width // 32))
    line = int(font.size) + 4
    margin = int(max(font.getlength(text) for _, text in ticks)) // 2 + 4
    left = int(font.getlength(title)) + 2 * line
    if left > drawing.width // 2:  # no room for words
        title, left = "", margin
    length = drawing.width - left - margin
    whole = Image.new("RGB", (drawing.width, drawing.height + 3 * line), "white")
    whole.paste(drawing, (0, 0))
    top = drawing.height + line // 2
    bar = np.broadcast_to(colours(np.linspace(0, 1, length)), (line, length, 3))
    whole.paste(to_picture(bar), (left, top))
    brush = ImageDraw.Draw(whole)
    brush.text((4, top + line / 2), title, fill="black", font=font, anchor="lm")
    for place, text in ticks:
        x = left + place * (length - 1)
        brush.line((x, top + line, x, top + line + 3), fill="black")
        brush.text((x, top + line + 5), text, fill="black", font=font, anchor="mt")
    return whole
