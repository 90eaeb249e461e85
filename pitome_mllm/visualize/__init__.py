"""Draw what merging did to an image: groups, sizes, energies, and tokens per step.

Patches are labelled in reading order over the tower's grid, so the image must be the one the tower saw:
``seen_by`` undoes an image processor's resizing, cropping and normalisation, whatever the size of the original.
Read `groups` first.
"""

from .canvas import below
from .groups import PALETTE, STYLES, draw_groups
from .heat import draw_energies
from .run import (
    check_drawable,
    draw_run,
    draw_step_energies,
    draw_steps,
    energy_range,
    grid_of,
    patch_energies,
    patch_groups,
    protected_patches,
    step_names,
    token_counts,
)
from .seen import seen_by, tiles_seen_by
from .sheet import captioned, draw_counts, like, side_by_side

__all__ = [
    "PALETTE",
    "STYLES",
    "below",
    "captioned",
    "check_drawable",
    "draw_counts",
    "draw_energies",
    "draw_groups",
    "draw_run",
    "draw_step_energies",
    "draw_steps",
    "energy_range",
    "grid_of",
    "like",
    "patch_energies",
    "patch_groups",
    "protected_patches",
    "seen_by",
    "side_by_side",
    "step_names",
    "tiles_seen_by",
    "token_counts",
]
