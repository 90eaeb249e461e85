"""Values on patches as colours, with a colour bar: energies, sizes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from PIL import Image

from ..methods import UserError
from .canvas import DPI, array, below, canvas, dots, hatch, on_grid, painted, per_pixel, to_picture

VIRIDIS = "viridis"  # grows evenly in lightness and reads the same for every common kind of colour blindness
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
    if energies is None:
        raise UserError("this method has no energies, so there is nothing to draw; choose one such as pitome")
    values = on_grid(array(energies).astype(np.float64), grid)
    pixels, cell = canvas(picture, values.shape, side)
    low, high = limits([values]) if span is None else span
    scale = Normalize(low, high if high > low else low + 1)
    light = pixels.mean(-1, keepdims=True) - 128
    drawn = per_pixel(colours(scale(np.nan_to_num(values, nan=low))), pixels) + PICTURE * light
    drawing = to_picture(hatch(drawn, per_pixel(~np.isfinite(values), pixels), cell))
    if protected is not None:
        dots(drawing, on_grid(array(protected).astype(bool), values.shape), max(1, cell // 14))
    return with_bar(drawing, "energy", scale)


def limits(values: Iterable[np.ndarray]) -> tuple[float, float]:
    """The least and greatest finite value of some arrays; zeros if there is none."""
    known = np.concatenate([np.zeros(0), *(part[np.isfinite(part)] for part in values)])
    return (float(known.min()), float(known.max())) if known.size else (0.0, 0.0)


def colours(shares: Any) -> np.ndarray:
    """Colours (..., 3) of viridis for values from 0 to 1."""
    return 255 * np.asarray(colormaps[VIRIDIS](np.asarray(shares, dtype=np.float64)))[..., :3]


def with_bar(drawing: Image.Image, title: str, scale: Normalize, ticks: Any = None) -> Image.Image:
    """The drawing above a colour bar of ``scale``."""
    size = max(11, drawing.width // 32)
    figure = Figure((drawing.width / DPI, 5 * size / DPI), dpi=DPI)
    axis = figure.add_axes((0.08, 0.66, 0.84, 0.26))
    bar = figure.colorbar(ScalarMappable(scale, VIRIDIS), axis, orientation="horizontal", ticks=ticks)
    bar.ax.tick_params(labelsize=size * 72 / DPI)
    bar.ax.minorticks_off()
    bar.ax.set_xlabel(title, fontsize=size * 72 / DPI, labelpad=1)
    if ticks is not None:
        bar.ax.set_xticks(ticks, [f"{tick}" for tick in ticks])
    return below([drawing, painted(figure)])
