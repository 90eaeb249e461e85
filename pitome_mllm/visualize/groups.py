"""Draw on an image which of its patches share one visual token."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.colors import LogNorm
from PIL import Image, ImageDraw

from ..methods import UserError
from .canvas import DROPPED, array, canvas, diamonds, dots, font_of, hairline, hatch, on_grid, per_pixel, to_picture
from .heat import colours, with_bar

STYLES = ("outline", "mean", "size")
NUMBERED = 18  # pixels per patch from which numbers on patches can be read
# The colours of Okabe and Ito without black: distinct for every common kind of colour blindness.
PALETTE = np.array(
    [(230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167)],
    dtype=np.float32,
)


def draw_groups(
    picture: Image.Image,
    groups: Any,
    *,
    protected: Any = None,
    grid: tuple[int, int] | None = None,
    style: str = "outline",
    side: int | None = None,
) -> Image.Image:
    """Show which patches were merged into one token.

    Patches of one token share an outline (style "outline": the image stays visible and neighbouring tokens get
    different colours), are filled with their mean colour (style "mean": an impression of what is left), or with a
    colour that says how many patches the token holds (style "size": with a colour bar below, and numbers where they
    can be read). A patch that stayed alone keeps its pixels; except in style "mean" a small dot marks it, or, where the
    method protects it, a diamond. Dropped patches are greyed and hatched.

    Parameters
    ----------
    picture : PIL.Image.Image
        What the tower saw (see `seen_by`); it is stretched to the grid's proportions.
    groups : array_like of shape (N,) or (1, N)
        Integers in reading order: the token of each patch, -1 = dropped.
    protected : array_like of shape (N,), bool, optional
        Patches that the method keeps out of merging, as `protected_patches` finds them.
    grid : tuple of int, optional
        Rows and columns of the patches; needed unless N is a square number.
    style : str, default 'outline'
        "outline", "mean" or "size".
    side : int, optional
        Length of the drawing's longer side in pixels; default: that of the image, at least 28 per patch. A colour bar
        comes on top.

    Raises
    ------
    ValueError
        No groups (a method without them), a wrong number of labels, an unknown style, a side too small to show the
        patches.
    """
    if style not in STYLES:
        raise UserError(f"unknown style {style!r}; choose from {', '.join(STYLES)}")
    labels = _labels(groups, grid)
    sizes = np.append(np.bincount(labels[labels != DROPPED]), 0)  # (K + 1,) patches; the last serves label -1
    pixels, cell = canvas(picture, labels.shape, side)
    label_map = per_pixel(labels, pixels)
    draw = {"outline": _outline, "mean": _mean, "size": _size}[style]
    drawn = draw(pixels, labels, label_map, sizes, cell)
    drawing = to_picture(hatch(drawn, label_map == DROPPED, cell))
    if style != "mean":
        _mark(drawing, (labels != DROPPED) & (sizes[labels] <= 1), protected, cell)
    return _with_sizes(drawing, labels, sizes, cell) if style == "size" else drawing


def _labels(groups: Any, grid: tuple[int, int] | None) -> np.ndarray:
    """Checked group labels (rows, columns), from 0; dropped patches -1."""
    if groups is None:
        raise UserError(
            "this method forms no groups, so there is nothing to draw; choose one that merges or drops tokens"
        )
    labels = array(groups)
    if labels.dtype.kind not in "iu" or labels.min() < DROPPED:
        raise UserError("groups must be integers from 0, with -1 for dropped patches")
    return on_grid(labels, grid)


def _framed(label_map: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """(H, W) bool: pixels of tokens with more than one patch."""
    return (label_map != DROPPED) & (sizes[label_map] > 1)


def _outline(pixels: np.ndarray, labels: np.ndarray, label_map: np.ndarray, sizes: np.ndarray, cell: int) -> np.ndarray:
    """The image with a coloured line inside the border of every group and a dark hairline between groups."""
    line = max(2, round(cell / 8))
    framed = _framed(label_map, sizes)
    tones = np.vstack([PALETTE[_colours(labels, _means(pixels, label_map))], np.zeros(3, np.float32)])
    drawn = np.where((_border(label_map, line) & framed)[..., None], tones[label_map], pixels)
    return np.where(hairline(label_map, max(1, line // 3))[..., None], 0.2 * drawn, drawn)


def _mean(pixels: np.ndarray, labels: np.ndarray, label_map: np.ndarray, sizes: np.ndarray, cell: int) -> np.ndarray:
    """Every group in its mean colour; the line around it is lighter than dark fillings and darker than light ones."""
    means = np.vstack([_means(pixels, label_map), np.zeros(3, np.float32)])
    keep = ~_framed(label_map, sizes)[..., None]
    drawn = np.where(keep, pixels, means[label_map])
    step = np.where(drawn.mean(-1, keepdims=True) < 128, 70.0, -70.0)
    return np.where(hairline(label_map, max(1, cell // 20))[..., None], drawn + step, drawn)


def _size(pixels: np.ndarray, labels: np.ndarray, label_map: np.ndarray, sizes: np.ndarray, cell: int) -> np.ndarray:
    """Every token of several patches in the colour of its size, on a logarithmic scale."""
    tones = colours(_scale(sizes)(np.maximum(sizes, 1)))
    drawn = np.where(_framed(label_map, sizes)[..., None], tones[label_map], pixels)
    return np.where(hairline(label_map, max(1, cell // 14))[..., None], 0.2 * drawn, drawn)


def _mark(drawing: Image.Image, alone: np.ndarray, protected: Any, cell: int) -> None:
    """A dot on every patch of ``alone`` (rows, columns), or where it is protected a diamond."""
    diamond = alone & (False if protected is None else on_grid(array(protected).astype(bool), alone.shape))
    dots(drawing, alone & ~diamond, max(min(2, cell // 4), cell // 10))
    diamonds(drawing, diamond, cell)


def _with_sizes(drawing: Image.Image, labels: np.ndarray, sizes: np.ndarray, cell: int) -> Image.Image:
    """The drawing with the sizes of its tokens as numbers, above what their colours mean."""
    _numbers(drawing, labels, sizes, cell)
    ticks = [2**n for n in range(int(sizes.max(initial=2)).bit_length())]
    return with_bar(drawing, "patches per token", _scale(sizes), ticks)


def _scale(sizes: np.ndarray) -> LogNorm:
    """The scale of colours, from one patch to the most of a token."""
    return LogNorm(1, sizes.max(initial=2))


def _numbers(drawing: Image.Image, labels: np.ndarray, sizes: np.ndarray, cell: int) -> None:
    """The size of every token of several patches, on its patch nearest to their middle."""
    if cell < NUMBERED:
        return
    brush, font = ImageDraw.Draw(drawing), font_of(round(0.5 * cell))
    for label in np.flatnonzero(sizes[:-1] > 1):
        places = np.argwhere(labels == label)
        row, column = places[np.abs(places - places.mean(0)).sum(1).argmin()]
        middle = (column + 0.5) * drawing.width / labels.shape[1], (row + 0.5) * drawing.height / labels.shape[0]
        style: dict[str, Any] = {"fill": "white", "stroke_width": max(1, cell // 16), "stroke_fill": "black"}
        brush.text(middle, str(sizes[label]), font=font, anchor="mm", **style)


def _means(pixels: np.ndarray, label_map: np.ndarray) -> np.ndarray:
    """Mean colour (K, 3) of each group."""
    flat = (label_map + 1).ravel()  # dropped patches come first and are cut off
    count = np.bincount(flat)
    total = np.stack([np.bincount(flat, pixels[..., c].ravel()) for c in range(3)], -1)
    return (total / np.maximum(count, 1)[:, None])[1:].astype(np.float32)


def _border(label_map: np.ndarray, width: int) -> np.ndarray:
    """(H, W) bool: pixels at most `width` away from another group or from the edge of the image."""
    height, length = label_map.shape
    padded = np.pad(label_map, width, constant_values=DROPPED - 1)
    border = np.zeros(label_map.shape, dtype=bool)
    for down in (-width, 0, width):  # lines are thinner than patches, so the far end of each direction decides
        for right in (-width, 0, width):
            shifted = padded[width + down : width + down + height, width + right : width + right + length]
            border |= shifted != label_map
    return border


def _colours(labels: np.ndarray, means: np.ndarray) -> np.ndarray:
    """Palette index (K,) of each group: unlike its neighbours' where possible, then far from the group's own colour."""
    pairs = [(labels[:, :-1], labels[:, 1:]), (labels[:-1], labels[1:])]
    pairs += [(labels[:-1, :-1], labels[1:, 1:]), (labels[:-1, 1:], labels[1:, :-1])]
    neighbours: list[set[int]] = [set() for _ in means]
    for a, b in pairs:
        touching = (a != b) & (a != DROPPED) & (b != DROPPED)
        for i, j in np.unique(np.stack([a[touching], b[touching]], -1), axis=0).tolist():
            neighbours[i].add(j)
            neighbours[j].add(i)
    chosen = np.full(len(means), -1)
    distance = np.linalg.norm(means[:, None] - PALETTE[None], axis=-1)  # (K, colours)
    order = np.argsort(-np.bincount(labels[labels != DROPPED], minlength=len(means)), kind="stable")
    for i in order:  # large groups first: they have the most neighbours
        taken = np.bincount([chosen[j] for j in neighbours[i] if chosen[j] >= 0], minlength=len(PALETTE))
        chosen[i] = np.lexsort((-distance[i], taken))[0]
    return chosen
