"""What merging did to one picture, kept without the run: its groups, their sizes and energies, and drawings of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from pitome_mllm.methods import UserError
from pitome_mllm.visualize import (
    check_drawable,
    draw_energies,
    draw_groups,
    grid_of,
    patch_energies,
    patch_groups,
    protected_patches,
    step_names,
    tiles_seen_by,
    token_counts,
)

from .pictures import Picture

SIDE = 672  # pixels of the longer side of a drawing
DIM = 0.45  # share of its light that a patch keeps outside the group that was picked


@dataclass(frozen=True, eq=False)
class Look:
    """One picture (or tile) of one run; N patches in reading order."""

    picture: Picture
    name: str  # of the picture or its tile
    title: str  # with which settings
    seen: Image.Image  # the picture as the vision tower got it
    grid: tuple[int, int]  # rows and columns of patches
    groups: np.ndarray | None  # (N,) the token of each patch, -1 = dropped; None for methods without groups
    protected: np.ndarray  # (N,) patches that the method keeps out of merging
    counts: tuple[int, ...]  # patch tokens before the first merge and after each one
    steps: tuple[str, ...]  # what the merges are called
    energies: tuple[np.ndarray | None, ...]  # per merge (N,) of each patch's token before it, NaN = dropped

    def pick(self, x: float, y: float) -> int | None:
        """The group under a point, given as shares of width and height; None where a patch was dropped."""
        row = min(int(y * self.grid[0]), self.grid[0] - 1)
        column = min(int(x * self.grid[1]), self.grid[1] - 1)
        label = int(self._labels()[row * self.grid[1] + column])
        return None if label < 0 else label

    def draw(self, group: int | None = None) -> Image.Image:
        """All groups; with ``group`` only its patches keep their light."""
        labels = self._labels()
        drawing = draw_groups(self.seen, labels, protected=self.protected, grid=self.grid, side=SIDE)
        if group is None:
            return drawing
        self._check(group)
        inside = Image.fromarray((255 * (labels == group).reshape(self.grid)).astype(np.uint8))
        mask = inside.resize(drawing.size, Image.Resampling.NEAREST)
        return Image.composite(drawing, drawing.point(lambda value: DIM * value), mask)

    def describe(self, group: int) -> str:
        """Size and energy of a group in words."""
        self._check(group)
        patches = np.flatnonzero(self._labels() == group)
        size = f"{len(patches)} patch{'es' if len(patches) > 1 else ''} of {self._labels().size}"
        text = f"Token {group}: {size}"
        if len(patches) == 1 and self.protected[patches[0]]:
            text += ", protected from merging"
        if not self.energy_steps:
            return f"{text}. This run has no energies."
        step = self.energy_steps[0]
        values = self.energies[step]
        mean, low, high = values[patches].mean(), np.nanmin(values), np.nanmax(values)
        return (
            f"{text}. Mean energy before the merge in {self.steps[step]}: {mean:.2f} "
            f"(all patches: {low:.2f} to {high:.2f}; high ones merge first)."
        )

    @property
    def energy_steps(self) -> list[int]:
        """All merges that have energies."""
        return [step for step, values in enumerate(self.energies) if values is not None]

    def draw_energy(self, step: int) -> tuple[Image.Image, str]:
        """The energies before a merge, and what that merge did, in words."""
        if step not in self.energy_steps:
            raise UserError("this run has no energies to show; choose a method that has some, such as pitome")
        drawing = draw_energies(self.seen, self.energies[step], grid=self.grid, side=SIDE)
        return drawing, f"{self.steps[step]}: {self.counts[step]} → {self.counts[step + 1]} tokens"

    def _labels(self) -> np.ndarray:
        if self.groups is None:
            raise UserError("this method forms no groups; choose one that merges or drops tokens, such as pitome")
        return self.groups

    def _check(self, group: int) -> None:
        most = int(self._labels().max())
        if not 0 <= group <= most:
            raise UserError(f"there is no token {group}; choose 0 to {most}")


def looks(processor: Any, pictures: Sequence[Picture], stats: Any, title: str) -> list[Look]:
    """What a run did to each of its pictures, in their order; those of several tiles once for every tile.

    There is nothing to see where what merges forms no grid.
    """
    if not shows(stats.plan) or None in stats.grids:
        return []
    tiles = [(p, number, seen) for p in pictures for number, seen in enumerate(tiles_seen_by(processor, p.image))]
    return [_look(stats, image, title, *tiles[image]) for image in range(stats.images)]


def shows(plan: Any) -> bool:
    """Whether groups of what merges can be drawn on pictures."""
    try:
        check_drawable(plan)
    except UserError:
        return False
    return True


def _look(stats: Any, image: int, title: str, picture: Picture, tile: int, seen: Image.Image) -> Look:
    grouped = all(merge.group is not None for merge in stats.merges)
    energies = patch_energies(stats, image) if grouped else [None] * len(stats.merges)
    grid = grid_of(stats, image)
    protected = protected_patches(stats, image) if grouped else torch.zeros(grid[0] * grid[1], dtype=torch.bool)
    return Look(
        picture=picture,
        name=picture.name + (f", tile {tile}" if tile else ""),
        title=title,
        seen=seen,
        grid=grid,
        groups=patch_groups(stats, image).numpy() if grouped else None,
        protected=protected.numpy(),
        counts=tuple(token_counts(stats, image)),
        steps=tuple(step_names(stats)),
        energies=tuple(None if energy is None else energy.float().numpy() for energy in energies),
    )
