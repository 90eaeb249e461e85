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
    draw_energies,
    draw_groups,
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
    """One picture (or tile) of one run; N patches in reading order.

    Attributes
    ----------
    picture, name : which picture, and what it or its tile is called.
    title : with which settings.
    seen : the picture as the vision tower got it.
    grid : rows and columns of patches.
    groups : (N,) int, the token of each patch, -1 = dropped; None for methods without groups.
    protected : (N,) bool, patches that the method keeps out of merging.
    counts : patch tokens before the first merge and after each one.
    steps : what the merges are called.
    energies : per merge (N,) float, the energy of each patch's token before it, NaN = dropped; None = has no energies.
    """

    picture: Picture
    name: str
    title: str
    seen: Image.Image
    grid: tuple[int, int]
    groups: np.ndarray | None
    protected: np.ndarray
    counts: tuple[int, ...]
    steps: tuple[str, ...]
    energies: tuple[np.ndarray | None, ...]

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
        step = self.first_energies
        if step is None:
            return f"{text}. {self.title.split(' ')[0]} has no energies."
        values = self.energies[step]
        mean, low, high = values[patches].mean(), np.nanmin(values), np.nanmax(values)
        return (
            f"{text}. Mean energy before the merge in {self.steps[step]}: {mean:.2f} "
            f"(all patches: {low:.2f} to {high:.2f}; high ones merge first)."
        )

    @property
    def first_energies(self) -> int | None:
        """The first merge that has energies."""
        return next((step for step, values in enumerate(self.energies) if values is not None), None)

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

    There is nothing to see where merging comes behind the projector, when patches are patches no more.
    """
    if stats.plan.where == "packed":
        return []
    tiles = [(p, number, seen) for p in pictures for number, seen in enumerate(tiles_seen_by(processor, p.image))]
    return [_look(stats, image, title, *tiles[image]) for image in range(stats.images)]


def _look(stats: Any, image: int, title: str, picture: Picture, tile: int, seen: Image.Image) -> Look:
    grouped = all(merge.group is not None for merge in stats.merges)
    energies = patch_energies(stats, image) if grouped else [None] * len(stats.merges)
    plan = stats.plan
    protected = protected_patches(stats, image) if grouped else torch.zeros(plan.geometry.patches, dtype=torch.bool)
    return Look(
        picture=picture,
        name=picture.name + (f", tile {tile}" if tile else ""),
        title=title,
        seen=seen,
        grid=plan.geometry.grid,
        groups=patch_groups(stats, image).numpy() if grouped else None,
        protected=protected.numpy(),
        counts=tuple(token_counts(stats)),
        steps=tuple(step_names(stats)),
        energies=tuple(None if energy is None else energy.float().numpy() for energy in energies),
    )
