"""What is drawn into scenes: coverage masks of shapes, handwritten digits and glyph-like marks."""

import functools
import itertools
import math
from pathlib import Path

import numpy as np
from PIL import Image

SHAPES = ("circle", "square", "triangle", "star", "cross")
DIGITS = tuple(str(d) for d in range(10))
SPLITS = ("train", "validation", "test")
_DATA = Path(__file__).parents[1] / "data"


@functools.cache
def archive(name: str) -> dict[str, np.ndarray]:
    """A stored file of `eval/data`."""
    with np.load(_DATA / name, allow_pickle=False) as data:
        return dict(data)


@functools.cache
def digit_scans(split: str) -> dict[str, tuple[int, ...]]:
    """Indices of the scans of each digit that belong to `split`; no scan belongs to two splits."""
    data = archive("digits.npz")
    mine = data["split"] == SPLITS.index(split)
    return {d: tuple(np.flatnonzero(mine & (data["targets"] == int(d))).tolist()) for d in DIGITS}


@functools.lru_cache(maxsize=4096)
def shape_mask(shape: str, size: int, tilt: int = 0, oversample: int = 4) -> np.ndarray:
    """Coverage (size, size) in 0..1 of a shape turned by `tilt` degrees."""
    axis = (np.arange(size * oversample) + 0.5) / (size * oversample) * 2 - 1
    angle = math.radians(tilt)
    u = axis[None, :] * math.cos(angle) + axis[:, None] * math.sin(angle)
    v = axis[:, None] * math.cos(angle) - axis[None, :] * math.sin(angle)
    if shape == "circle":
        inside = u * u + v * v <= 1
    elif shape == "square":
        inside = np.maximum(abs(u), abs(v)) <= 0.88
    elif shape == "triangle":
        inside = (v <= 0.95) & (abs(u) <= (v + 1) / 2)
    elif shape == "cross":
        inside = (np.minimum(abs(u), abs(v)) <= 0.32) & (np.maximum(abs(u), abs(v)) <= 1)
    else:  # a five-pointed star: fold the plane into one half of one point
        sector = 2 * math.pi / 5
        fold = abs((np.arctan2(u, -v) + sector / 2) % sector - sector / 2)
        radius, inner = np.hypot(u, v), 0.42
        edge = inner * math.sin(sector / 2) / (inner * math.cos(sector / 2) - 1)  # slope of the side, tip at (1, 0)
        inside = radius * (np.sin(fold) - edge * np.cos(fold)) <= -edge
    return inside.reshape(size, oversample, size, oversample).mean((1, 3))


@functools.lru_cache(maxsize=16384)
def digit_mask(scan: int, size: int) -> np.ndarray:
    """Coverage (size, size) in 0..1 of a handwritten digit."""
    ink = (archive("digits.npz")["images"][scan].astype(np.float64) * 255 / 16).astype(np.uint8)
    scaled = Image.fromarray(ink).resize((size, size), Image.Resampling.BICUBIC)
    return np.clip(np.asarray(scaled, np.float64) / 255 * 1.25, 0, 1)


@functools.lru_cache(maxsize=8192)
def mark_mask(number: int, size: int) -> np.ndarray:
    """Coverage (size, size) of a glyph-like mark: a few strokes with random corners, fixed by `number`."""
    rng = np.random.default_rng((77, number))
    points = rng.random((int(rng.integers(3, 6)), 2)) * 0.8 + 0.1
    axis = (np.arange(size) + 0.5) / size
    grid = np.stack(np.broadcast_arrays(axis[None, :], axis[:, None]), -1)
    width = max(1.0 / size, 0.05 + 0.05 * rng.random())
    mask = np.zeros((size, size))
    for start, end in itertools.pairwise(points):
        along = end - start
        t = np.clip(((grid - start) @ along) / (along @ along), 0, 1)
        distance = np.sqrt(((grid - start - t[..., None] * along) ** 2).sum(-1))
        mask = np.maximum(mask, np.clip((width - distance) * size + 0.5, 0, 1))
    return mask


def pick(rng: np.random.Generator, items):
    """One item of a sequence, uniformly."""
    return items[int(rng.integers(len(items)))]
