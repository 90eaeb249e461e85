"""Seeded pictures of shapes and handwritten digits on textures and photographs, with clutter that is not free to merge.

Everything is composed in float64 and rounded once, and Pillow only scales uint8 pictures, so that one seed gives the
same bytes on every machine. A *window* confines a picture to a part of the canvas (cheap early training); objects keep
their coordinates on the whole canvas.
"""

import functools
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image

from .glyphs import DIGITS, SHAPES, archive, digit_mask, digit_scans, mark_mask, pick, shape_mask

CANVAS = 192
PATCH = 8
GRID = CANVAS // PATCH
COLOURS = {
    "red": (245, 55, 55),
    "green": (60, 215, 75),
    "blue": (70, 110, 255),
    "yellow": (245, 225, 50),
    "purple": (205, 75, 245),
    "cyan": (65, 225, 235),
    "white": (245, 245, 245),
}
KINDS = SHAPES + DIGITS


@dataclass(frozen=True)
class Tier:
    """How hard a picture is. Ranges are inclusive; sizes are in pixels of the canvas."""

    objects: tuple[int, int]
    small: tuple[int, int]  # size of most objects
    large: tuple[int, int]  # size of the others
    large_share: float
    marks: tuple[int, int]
    photo_share: float
    contrast: tuple[float, float]  # standard deviation of the background, in grey levels
    brightness: tuple[float, float]  # mean of the background


TIERS = {
    "easy": Tier((3, 6), (16, 32), (36, 64), 0.30, (0, 3), 0.3, (3, 10), (15, 50)),
    "medium": Tier((5, 9), (12, 24), (26, 64), 0.20, (4, 9), 0.5, (5, 15), (15, 60)),
    "hard": Tier((7, 12), (8, 18), (20, 48), 0.12, (8, 16), 0.6, (8, 20), (20, 70)),
}
SMALLEST_DIGIT = 13
LARGEST_IN_WINDOW = 40


@dataclass(frozen=True)
class Object:
    """A shape or digit: its box starts at (x, y) on the canvas and is `size` pixels wide and high."""

    kind: str
    colour: str
    x: int
    y: int
    size: int

    @property
    def is_digit(self) -> bool:
        """Whether this is a handwritten digit."""
        return self.kind in DIGITS

    @property
    def centre(self) -> tuple[float, float]:
        """Centre (x, y) on the canvas, in pixels."""
        return self.x + self.size / 2, self.y + self.size / 2


@dataclass(frozen=True)
class Scene:
    """Pixels (H, W, 3) uint8 of the window, its objects, and the window (x, y, side) on the canvas."""

    pixels: np.ndarray
    objects: tuple[Object, ...]
    window: tuple[int, int, int]
    tier: str


@functools.cache
def _photos(split: str) -> tuple[np.ndarray, ...]:
    part = "train_" if split == "train" else "eval_"
    return tuple(pixels for name, pixels in sorted(archive("photos.npz").items()) if name.startswith(part))


def _between(rng: np.random.Generator, bounds: tuple[float, float]) -> float:
    return bounds[0] + (bounds[1] - bounds[0]) * rng.random()


def _integer(rng: np.random.Generator, bounds: tuple[int, int]) -> int:
    return int(rng.integers(bounds[0], bounds[1] + 1))


def _texture(rng: np.random.Generator, side: int) -> np.ndarray:
    """Smooth blotches (side, side, 3), often with stripes; zero mean, unit deviation or so."""
    cells = pick(rng, (2, 3, 4, 6, 9))
    blotches = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
    field = np.asarray(blotches.resize((side, side), Image.Resampling.BICUBIC), np.float64) / 64 - 2
    if rng.random() < 0.6:
        angle, period, shift = rng.random() * math.pi, 6 + 34 * rng.random(), 2 * math.pi * rng.random()
        axis = np.arange(side)
        wave = np.sin((axis * math.cos(angle) + axis[:, None] * math.sin(angle)) * (2 * math.pi / period) + shift)
        field += (np.sign(wave) if rng.random() < 0.4 else wave)[..., None] * (0.3 + rng.random())
    return field


def _photo(rng: np.random.Generator, side: int, split: str) -> np.ndarray:
    """A crop of a photograph (side, side, 3), half-way to grey; zero mean, unit deviation."""
    source = pick(rng, _photos(split))
    crop = _integer(rng, (side // 3, min(side, *source.shape[:2])))
    y, x = _integer(rng, (0, source.shape[0] - crop)), _integer(rng, (0, source.shape[1] - crop))
    piece = Image.fromarray(source[y : y + crop, x : x + crop]).resize((side, side), Image.Resampling.BICUBIC)
    field = np.asarray(piece, np.float64)
    field = 0.5 * field + 0.5 * field.mean(-1, keepdims=True)
    if rng.random() < 0.5:
        field = field[:, ::-1]
    return (field - field.mean()) / (field.std() + 4)


def _free(boxes: list[tuple[int, int, int]], x: int, y: int, size: int, gap: int) -> bool:
    return all(
        x + size + gap <= bx or bx + bs + gap <= x or y + size + gap <= by or by + bs + gap <= y for bx, by, bs in boxes
    )


def _place(rng, boxes, window, size, gap=2, tries=25) -> tuple[int, int] | None:
    """A free position for a box, or None; remembers it in `boxes`."""
    x0, y0, side = window
    for _ in range(tries):
        x, y = x0 + int(rng.integers(side - size + 1)), y0 + int(rng.integers(side - size + 1))
        if _free(boxes, x, y, size, gap):
            boxes.append((x, y, size))
            return x, y
    return None


def lay_out(rng: np.random.Generator, tier: Tier, window: tuple[int, int, int] = (0, 0, CANVAS)) -> tuple[Object, ...]:
    """Place the objects of a scene, some kinds and colours repeated so that there is something to count."""
    small_window = window[2] < CANVAS
    wanted = _integer(rng, tier.objects)
    if small_window:
        wanted = max(2, round(wanted * 0.5))
    kind_again, colour_again = pick(rng, SHAPES), pick(rng, tuple(COLOURS))
    repeat, digit_share = 0.5 * rng.random(), 0.25 + 0.35 * rng.random()
    boxes, out = [], []
    for _ in range(wanted):
        kind = pick(rng, DIGITS) if rng.random() < digit_share else pick(rng, SHAPES)
        if kind in SHAPES and rng.random() < repeat:
            kind = kind_again
        colour = colour_again if rng.random() < repeat else pick(rng, tuple(COLOURS))
        size = _integer(rng, tier.large if rng.random() < tier.large_share else tier.small)
        if kind in DIGITS:
            size = max(size, SMALLEST_DIGIT) + (size < 20) * 2
        if small_window:
            size = min(size, LARGEST_IN_WINDOW)
        if (where := _place(rng, boxes, window, size)) is not None:
            out.append(Object(kind, colour, *where, size))
    return tuple(out)


def _draw(canvas: np.ndarray, mask: np.ndarray, x: int, y: int, colour: np.ndarray) -> None:
    region = canvas[y : y + mask.shape[0], x : x + mask.shape[1]]
    region += mask[..., None] * (colour - region)


def make_scene(
    rng: np.random.Generator, tier: str, split: str = "train", window: tuple[int, int, int] = (0, 0, CANVAS)
) -> Scene:
    """Draw one scene with the digit scans and photograph regions of a split.

    ``window`` (x, y, side) is the part of the canvas that is drawn and holds all objects.
    """
    spec, (x0, y0, side) = TIERS[tier], window
    objects = lay_out(rng, spec, window)
    field = _photo(rng, side, split) if rng.random() < spec.photo_share else _texture(rng, side)
    canvas = field * _between(rng, spec.contrast) + _between(rng, spec.brightness) + (rng.random(3) - 0.5) * 20
    np.clip(canvas, 0, 120, out=canvas)  # objects stay brighter than what they lie on
    boxes = [(o.x, o.y, o.size) for o in objects]
    for _ in range(round(_integer(rng, spec.marks) * side * side / CANVAS**2)):
        size = _integer(rng, (8, 22))
        if (where := _place(rng, boxes, window, size, gap=1, tries=8)) is not None:
            grey = 75 + 75 * rng.random() + (rng.random(3) - 0.5) * 24
            _draw(canvas, mark_mask(int(rng.integers(512)), size), where[0] - x0, where[1] - y0, grey)
    for o in objects:
        if o.is_digit:
            mask = digit_mask(pick(rng, digit_scans(split)[o.kind]), o.size)
        else:
            mask = shape_mask(o.kind, o.size, pick(rng, (-8, 0, 8)))
        colour = (np.array(COLOURS[o.colour]) + (rng.random(3) - 0.5) * 28) * (0.88 + 0.16 * rng.random())
        _draw(canvas, mask, o.x - x0, o.y - y0, colour)
    canvas += (rng.random(canvas.shape) - 0.5) * (4 + 12 * rng.random())
    return Scene(np.clip(np.rint(canvas), 0, 255).astype(np.uint8), objects, window, tier)
