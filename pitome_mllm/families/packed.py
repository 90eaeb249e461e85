"""Families that put the visual tokens of a picture among the text themselves: how many a usual picture has."""

from __future__ import annotations

import math
from operator import attrgetter
from typing import Any

from torch import nn

from . import TOWER_OF_CONFIG, TOWERS, FamilySpec, behind

PARTS = ("vision_config", "text_config", "image_token_id")  # of a configuration that may be of such a family
USUAL = 32  # visual tokens on a side of a picture, where neither a row nor a configuration says more


def usual_picture(config: Any, family: FamilySpec) -> dict[str, Any]:
    """Of a picture of the usual size: its patches, how many of them on a side are one token; and the tower's blocks."""
    vision = config.vision_config
    sizes = [getattr(vision, name, None) for name in ("image_size", "patch_size")]
    grid = None
    if all(sizes) and not family.side:
        grid = [side // patch for side, patch in zip(*map(_pair, sizes))]
    joins = attrgetter(family.joins)(config) if family.joins else 1
    if grid and family.count:
        joins = max(1, math.isqrt(math.prod(grid) // attrgetter(family.count)(config)))
    factor = round(joins if joins >= 1 else 1 / joins)
    rows, columns = (side // factor for side in grid) if grid else [family.side or USUAL] * 2
    layer = TOWERS.get(TOWER_OF_CONFIG.get(vision.model_type, ""))
    return {
        "grid": (rows * factor, columns * factor),
        "shuffle_factor": factor,
        "class_tokens": layer.class_tokens if layer else 0,
        "blocks": getattr(vision, "num_hidden_layers", None) or getattr(vision, "depth", 0),
    }


def read_out_of(model: nn.Module) -> FamilySpec | None:
    """The family of a model that has no row, if it has the parts of those that merge behind the projector."""
    core: Any = getattr(model, "base_model", model)
    config: Any = getattr(model, "config", None)
    if core is model or not hasattr(core, "get_image_features") or any(not hasattr(config, part) for part in PARTS):
        return None
    paths = {part: path for path, part in model.named_modules()}
    at, language = paths[core], paths.get(core.get_decoder(), "")
    return behind(config.model_type, core=at, tower=at, projector=at, language=language, known=False)


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)
