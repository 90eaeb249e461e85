"""Draw on a picture which of its patches share one visual token.

Patches are labelled in reading order over the tower's grid, so the picture must be the one the tower saw:
``seen_by`` undoes an image processor's resizing, cropping and normalisation, whatever the size of the original.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isqrt
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

STYLES = ("outline", "mean")
DROPPED = -1  # the label of patches that belong to no token
CELL = 28  # default pixels per patch: a single patch stays readable, and 24 x 24 of them fill 672 pixels
# The colours of Okabe and Ito without black: distinct for every common kind of colour blindness.
PALETTE = np.array(
    [(230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167)],
    dtype=np.float32,
)


def draw_groups(
    picture: Image.Image,
    groups: Any,
    sizes: Any = None,
    *,
    grid: tuple[int, int] | None = None,
    style: str = "outline",
    side: int | None = None,
) -> Image.Image:
    """Show which patches were merged into one token.

    Patches of one token share an outline (style "outline": the picture stays visible and neighbouring tokens get
    different colours) or are filled with their mean colour (style "mean": an impression of what is left). A patch that
    stayed alone keeps its pixels; in style "outline" a small dot marks it. Dropped patches are greyed and hatched.

    Parameters
    ----------
    picture : what the tower saw (see `seen_by`); it is stretched to the grid's proportions.
    groups : (N,) or (1, N) integers in reading order: the token of each patch, -1 = dropped.
    sizes : (K,) patches per token, as `Stats.sizes` (size 1 = stayed alone); counted from `groups` when left out.
    grid : rows and columns of the patches; needed unless N is a square number.
    style : "outline" or "mean".
    side : length of the drawing's longer side in pixels; default: that of the picture, at least 28 per patch.

    Raises
    ------
    ValueError : no groups (a method without them), a wrong number of labels or sizes, an unknown style, a side too
        small to show the patches.
    """
    if style not in STYLES:
        raise ValueError(f"unknown style {style!r}; choose from {', '.join(STYLES)}")
    if not isinstance(picture, Image.Image):
        raise ValueError(f"expected a PIL picture, got {type(picture).__name__}; convert it with PIL.Image.fromarray")
    labels = _labels(groups, grid)
    alone = _alone(labels, sizes)
    height, width = _canvas(labels.shape, picture.size, side)
    pixels = np.asarray(picture.convert("RGB").resize((width, height), Image.Resampling.LANCZOS), dtype=np.float32)
    rows = np.arange(height) * labels.shape[0] // height
    columns = np.arange(width) * labels.shape[1] // width
    label_map = labels[np.ix_(rows, columns)]
    cell = min(height // labels.shape[0], width // labels.shape[1])
    draw = _outline if style == "outline" else _mean
    drawn = draw(pixels, labels, label_map, alone[label_map] & (label_map != DROPPED), cell)
    drawn = _hatch(drawn, label_map == DROPPED, cell)
    drawing = Image.fromarray(np.clip(drawn, 0, 255).astype(np.uint8))
    if style == "outline":
        _dots(drawing, alone[labels] & (labels != DROPPED), cell)
    return drawing


def seen_by(processor: Any, picture: Image.Image) -> Image.Image:
    """The picture as the vision tower gets it: resized, cropped, and with the normalisation undone.

    Parameters
    ----------
    processor : a multimodal processor, or an image processor.
    picture : any size. Of several tiles (anyres) the first, the overview, is returned.

    Raises
    ------
    ValueError : the processor has no image processor.
    """
    image_processor = getattr(processor, "image_processor", processor)
    if not hasattr(image_processor, "image_mean"):
        raise ValueError(
            f"{type(processor).__name__} has no image processor; pass the processor that AutoProcessor loads"
        )
    values = image_processor(images=picture.convert("RGB"), return_tensors="pt")["pixel_values"]
    values = values.reshape(-1, *values.shape[-3:])[0].float()  # (3, H, W)
    if image_processor.do_normalize:
        mean, std = torch.tensor(image_processor.image_mean), torch.tensor(image_processor.image_std)
        values = values * std[:, None, None] + mean[:, None, None]
    if image_processor.do_rescale:
        values = values / image_processor.rescale_factor
    return Image.fromarray(values.round().clamp(0, 255).byte().permute(1, 2, 0).numpy())


def side_by_side(pictures: Sequence[Image.Image], titles: Sequence[str] | None = None, *, gap: int = 16) -> Image.Image:
    """Pictures in one row at the height of the tallest, each under its title, on white.

    Raises
    ------
    ValueError : no picture, or another number of titles than of pictures.
    """
    titles = [""] * len(pictures) if titles is None else list(titles)
    if not pictures or len(titles) != len(pictures):
        raise ValueError(f"got {len(pictures)} pictures and {len(titles)} titles; give one title for each picture")
    height = max(picture.height for picture in pictures)
    scaled = [p.convert("RGB").resize((max(1, round(p.width * height / p.height)), height)) for p in pictures]
    font = ImageFont.load_default(size=max(12, height // 24))
    texts = [_wrap(title, font, picture.width) for title, picture in zip(titles, scaled, strict=True)]
    brush = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    head = max(brush.multiline_textbbox((0, 0), text, font=font)[3] for text in texts)
    head = int(head) + gap if any(titles) else 0
    sheet = Image.new("RGB", (sum(p.width for p in scaled) + gap * (len(scaled) + 1), height + head + 2 * gap), "white")
    brush = ImageDraw.Draw(sheet)
    left = gap
    for picture, text in zip(scaled, texts, strict=True):
        brush.multiline_text((left, gap), text, fill="black", font=font)
        sheet.paste(picture, (left, gap + head))
        left += picture.width + gap
    return sheet


def _labels(groups: Any, grid: tuple[int, int] | None) -> np.ndarray:
    """Checked group labels (rows, columns), renumbered 0 .. K-1 in order of value; dropped patches stay -1."""
    if groups is None:
        raise ValueError(
            "this method forms no groups, so there is nothing to draw; choose one that merges or drops tokens"
        )
    labels = groups.detach().cpu().numpy() if isinstance(groups, torch.Tensor) else np.asarray(groups)
    if labels.ndim == 2 and len(labels) == 1:
        labels = labels[0]
    if labels.ndim != 1 or not labels.size:
        raise ValueError(f"groups have shape {tuple(labels.shape)}; pass those of one picture, (N,) or (1, N)")
    if labels.dtype.kind not in "iu" or labels.min() < DROPPED:
        raise ValueError("groups must be integers from 0, with -1 for dropped patches")
    if grid is None:
        grid = (isqrt(labels.size), isqrt(labels.size))
        if grid[0] * grid[1] != labels.size:
            extra = grid[0] * grid[1] + 1 == labels.size
            hint = "leave out the class token (groups[1:])" if extra else "pass grid=(rows, columns)"
            raise ValueError(f"{labels.size} patches do not fill a square; {hint}")
    if grid[0] * grid[1] != labels.size:
        raise ValueError(f"a grid of {grid[0]} x {grid[1]} has {grid[0] * grid[1]} patches, got {labels.size} labels")
    return labels.reshape(grid)


def _alone(labels: np.ndarray, sizes: Any) -> np.ndarray:
    """(K + 1,) bool: whether a token is a single patch; the last entry serves label -1."""
    count = int(labels.max()) + 1
    if sizes is None:
        sizes = np.bincount(labels[labels != DROPPED], minlength=count)
    else:
        sizes = np.asarray(sizes.detach().float().cpu() if isinstance(sizes, torch.Tensor) else sizes).reshape(-1)
        if len(sizes) != count:
            raise ValueError(f"got {len(sizes)} sizes for {count} tokens; pass one for each token of `groups`")
    return np.append(sizes <= 1, False)


def _canvas(grid: tuple[int, ...], size: tuple[int, int], side: int | None) -> tuple[int, int]:
    """Height and width of the drawing in pixels."""
    longer = max(grid)
    if side is None:
        side = max(max(size), CELL * longer)
    if side < 4 * longer:
        raise ValueError(f"side={side} leaves less than 4 pixels for a patch; pass at least {4 * longer}")
    return max(1, round(side * grid[0] / longer)), max(1, round(side * grid[1] / longer))


def _outline(pixels: np.ndarray, labels: np.ndarray, label_map: np.ndarray, alone: np.ndarray, cell: int) -> np.ndarray:
    """The picture with a coloured line inside the border of every group and a dark hairline between groups."""
    line = max(2, round(cell / 8))
    framed = (label_map != DROPPED) & ~alone
    colours = np.vstack([PALETTE[_colours(labels, _means(pixels, label_map))], np.zeros(3, np.float32)])
    drawn = np.where((_border(label_map, line) & framed)[..., None], colours[label_map], pixels)
    return np.where(_hairline(label_map, max(1, line // 3))[..., None], 0.2 * drawn, drawn)


def _mean(pixels: np.ndarray, labels: np.ndarray, label_map: np.ndarray, alone: np.ndarray, cell: int) -> np.ndarray:
    """Every group in its mean colour; the line around it is lighter than dark fillings and darker than light ones."""
    means = np.vstack([_means(pixels, label_map), np.zeros(3, np.float32)])
    keep = (alone | (label_map == DROPPED))[..., None]
    drawn = np.where(keep, pixels, means[label_map])
    step = np.where(drawn.mean(-1, keepdims=True) < 128, 70.0, -70.0)
    return np.where(_hairline(label_map, max(1, cell // 20))[..., None], drawn + step, drawn)


def _means(pixels: np.ndarray, label_map: np.ndarray) -> np.ndarray:
    """Mean colour (K, 3) of each group."""
    flat = (label_map + 1).ravel()  # dropped patches come first and are cut off
    count = np.bincount(flat)
    total = np.stack([np.bincount(flat, pixels[..., c].ravel()) for c in range(3)], -1)
    return (total / np.maximum(count, 1)[:, None])[1:].astype(np.float32)


def _border(label_map: np.ndarray, width: int) -> np.ndarray:
    """(H, W) bool: pixels at most `width` away from another group or from the edge of the picture."""
    height, length = label_map.shape
    padded = np.pad(label_map, width, constant_values=DROPPED - 1)
    border = np.zeros(label_map.shape, dtype=bool)
    for down in (-width, 0, width):  # lines are thinner than patches, so the far end of each direction decides
        for right in (-width, 0, width):
            shifted = padded[width + down : width + down + height, width + right : width + right + length]
            border |= shifted != label_map
    return border


def _hairline(label_map: np.ndarray, width: int) -> np.ndarray:
    """(H, W) bool: pixels less than `width` right of or below another group: one side of each border only."""
    line = np.zeros(label_map.shape, dtype=bool)
    line[width:] |= label_map[width:] != label_map[:-width]
    line[:, width:] |= label_map[:, width:] != label_map[:, :-width]
    return line


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


def _hatch(pixels: np.ndarray, dropped: np.ndarray, cell: int) -> np.ndarray:
    """Dropped patches as a dim grey picture under diagonal lines."""
    grey = 0.45 * pixels.mean(-1, keepdims=True) + 60
    rows, columns = np.indices(dropped.shape)
    lines = (rows + columns) % max(4, cell // 2) < max(1, cell // 14)
    return np.where(dropped[..., None], np.where(lines[..., None], 205.0, grey), pixels)


def _dots(drawing: Image.Image, alone: np.ndarray, cell: int) -> None:
    """A small white dot with a dark rim in the middle of every patch that stayed alone."""
    brush = ImageDraw.Draw(drawing)
    radius = max(1, cell // 10)
    for row, column in np.argwhere(alone):
        x = (column + 0.5) * drawing.width / alone.shape[1] - 0.5
        y = (row + 0.5) * drawing.height / alone.shape[0] - 0.5
        brush.ellipse((x - radius, y - radius, x + radius, y + radius), fill="white", outline="black")


def _wrap(text: str, font: Any, width: int) -> str:
    """The text with line breaks between words so that it fits `width` pixels where its words allow."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return "\n".join(lines)
