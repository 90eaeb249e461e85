"""What a run did to patches: groups, energies and protection, from ``handle.stats``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..methods import Merge, UserError
from .groups import draw_groups
from .heat import draw_energies, limits


def check_drawable(plan: Any, steps: bool = False) -> None:
    """ValueError where there is no grid to draw groups on, or there are no ``steps`` on the way to them.

    Behind the projector a picture's visual tokens form its grid, unless tokens that end its rows stand among them.
    """
    if plan.where == "packed" and plan.geometry.family.newline:
        raise UserError(
            "where='packed' merges what the projector made of all tiles, so there are no patches to draw groups on; "
            "choose where='tower' if this family has it"
        )
    if plan.where == "packed" and steps:
        raise UserError("where='packed' keeps what every token became in the end, not its merges; draw the groups")


def grid_of(stats: Any, image: int = 0) -> tuple[int, int]:
    """Rows and columns of what `patch_groups` labels: patches or, behind the projector, visual tokens.

    Raises
    ------
    ValueError
        They form no grid.
    """
    if stats.where != "packed":
        return stats.plan.geometry.grid
    if (grid := stats.grids[image]) is None:
        raise UserError(f"the {len(stats.groups[image])} visual tokens of this picture form no grid to draw groups on")
    return grid


def step_names(stats: Any) -> list[str]:
    """What the merges of a run are called, in their order."""
    plan = stats.plan
    if plan.where == "packed":
        return ["behind the projector"]
    if len(stats.merges) != len(plan.merging) + len(plan.projector_counts):
        return ["a smaller picture"]
    blocks = [f"block {block}" for block in plan.merging]
    return [*blocks, *(f"before the projector, step {step + 1}" for step in range(len(plan.projector_counts)))]


def patch_groups(stats: Any, image: int = 0, steps: int | None = None) -> Tensor:
    """(N,) the token of each patch after the first ``steps`` merges (None = all), from 0; -1 = dropped.

    Class tokens are left out. Behind the projector N counts the plain model's visual tokens, and nothing is known of
    merges in between.

    Raises
    ------
    ValueError
        A method without groups.
    """
    if stats.where == "packed":
        return stats.groups[image].cpu()
    group = torch.arange(stats.plan.geometry.patches)
    for merge in stats.merges[:steps]:
        group = _onward(stats, image, group, merge)
    return group


def _onward(stats: Any, image: int, group: Tensor, merge: Merge) -> Tensor:
    """Where a merge takes the tokens ``group`` (N,) of the patches."""
    if merge.group is None:
        raise UserError(f"{stats.method} forms no groups, so there is nothing to draw; choose another method")
    ahead = stats.plan.geometry.class_tokens
    after = merge.group[image, ahead:].cpu()
    after = (after - ahead).where(after >= 0, -1)
    return after[group.clamp(min=0)].where(group >= 0, -1)


def token_counts(stats: Any, image: int = 0) -> list[int]:
    """Patch tokens before the first merge and after each of them."""
    if stats.where == "packed":
        return [len(stats.groups[image]), stats.lengths[image]]
    ahead = stats.plan.geometry.class_tokens
    return [stats.plan.geometry.patches, *(merge.count - ahead for merge in stats.merges)]


def patch_energies(stats: Any, image: int = 0) -> list[Tensor | None]:
    """Per merge, the energy (N,) of the token that each patch belongs to before it; NaN = dropped before.

    None for a merge by a method without energies.

    Raises
    ------
    ValueError
        The run kept no energies; a method without groups.
    """
    if stats.energies is None:
        raise UserError("this run kept no energies; attach with energies=True")
    found: list[Tensor | None] = []
    for step, energy in enumerate(stats.energies):
        if energy is None:
            found.append(None)
            continue
        group = patch_groups(stats, image, step)
        found.append(energy[image].cpu()[group.clamp(min=0)].where(group >= 0, torch.nan))
    return found


def energy_range(runs: Sequence[Any]) -> tuple[float, float]:
    """The least and greatest energy in all merges of some runs: one range of colours for all of their drawings."""
    return limits(energy.cpu().numpy() for stats in runs for energy in stats.energies or () if energy is not None)


def protected_patches(stats: Any, image: int = 0, step: int | None = None) -> Tensor:
    """(N,) bool: patches whose token the energy keeps out of a merge, by default of every merge that goes by energy.

    Those are all but the first 2r tokens by energy, as far as ``protect`` says. There are none where nothing goes by
    energy.
    """
    wanted = stats.merges if step is None else stats.merges[step : step + 1]
    if all(merge.candidates is None for merge in wanted):
        return torch.zeros_like(patch_groups(stats, image, 0), dtype=torch.bool)
    group = patch_groups(stats, image, step or 0)
    found = torch.ones_like(group, dtype=torch.bool)
    for merge in wanted:
        if merge.candidates is not None:
            order = merge.energy[image].cpu().argsort(descending=True, stable=True)
            outside = torch.zeros(len(order) + 1, dtype=torch.bool).index_fill(0, order[merge.candidates :], True)
            found &= outside[group]  # the last entry serves label -1
        group = _onward(stats, image, group, merge)
    return found


def draw_run(pictures: Sequence[Image.Image], stats: Any, **options: Any) -> list[Image.Image]:
    """The groups of a run on each of its images or tiles.

    Parameters
    ----------
    pictures : sequence of PIL.Image.Image
        What the tower saw, as `tiles_seen_by` gives it; one for each image of the run.
    **options
        As for `draw_groups`.

    Raises
    ------
    ValueError
        Another number of images than the run has, a method without groups, visual tokens that form no grid, or as
        `draw_groups`.
    """
    check_drawable(stats.plan)
    if len(pictures) != stats.images:
        raise UserError(
            f"got {len(pictures)} pictures for a run of {stats.images}; pass one for each picture or tile of the run"
        )
    return [
        draw_groups(
            picture,
            patch_groups(stats, image),
            protected=protected_patches(stats, image),
            grid=grid_of(stats, image),
            **options,
        )
        for image, picture in enumerate(pictures)
    ]


def draw_steps(picture: Image.Image, stats: Any, image: int = 0, **options: Any) -> tuple[list[Image.Image], list[str]]:
    """The groups after every merge of a run on one of its images, and a title for each; options as `draw_groups`."""
    counts, grid = token_counts(stats), stats.plan.geometry.grid
    drawings = [
        draw_groups(picture, patch_groups(stats, image, step + 1), grid=grid, **options)
        for step in range(len(stats.merges))
    ]
    return drawings, [
        f"after {name}: {count} tokens" for name, count in zip(step_names(stats), counts[1:], strict=True)
    ]


def draw_step_energies(
    picture: Image.Image,
    stats: Any,
    image: int = 0,
    side: int | None = None,
    span: tuple[float, float] | None = None,
) -> tuple[list[Image.Image], list[str]]:
    """The energies before every merge that has any on one image of a run, and a title for each.

    Dots mark what the merge leaves out. The colours mean the same in all drawings: from the least to the greatest
    energy of the run, or as ``span`` says (`energy_range`: of several runs).

    Raises
    ------
    ValueError
        The run kept no energies, or its method has none.
    """
    energies, grid = patch_energies(stats, image), stats.plan.geometry.grid
    steps = [step for step, energy in enumerate(energies) if energy is not None]
    if not steps:
        raise UserError(f"{stats.method} has no energies, so there is nothing to draw; choose one such as pitome")
    names, counts = step_names(stats), token_counts(stats)
    options = {"grid": grid, "side": side, "span": span or energy_range([stats])}
    drawings = [
        draw_energies(picture, energies[s], protected=protected_patches(stats, image, s), **options) for s in steps
    ]
    return drawings, [f"{names[s]}: {counts[s]} to {counts[s + 1]} tokens" for s in steps]
