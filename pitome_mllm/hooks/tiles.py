"""Images cut into tiles (anyres): how many visual tokens each one has, and how merged ones are packed.

Where whole tiles merge, how many of an image's tokens hold nothing but padding, and are left out, is known only once
the tower has run. So the images are encoded first, the prompt is shortened by the real lengths, and the model finds
its images encoded already.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import replace
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from ..families.anyres import Packed, Places, survivors
from . import packed
from .state import Attached

SIZES = 64  # of images whose packing is remembered


def at_most(handle: Attached, kwargs: dict[str, Any]) -> list[int]:
    """Visual tokens that each image of a call can have, found without running the tower, which alone knows how many
    of them hold nothing but padding. Where they merge behind the projector, it is as many as they will have.
    """
    plan, newline = handle.plan, handle.family.newline
    places = _places_of(handle, kwargs) if newline else []
    full = [len(place) for place in places] if newline else packed.lengths_before(handle, kwargs)
    if plan is None or plan.is_plain:
        return full
    if plan.where == "packed":
        ends = [int(place.newline.sum()) for place in places] if newline else [0] * len(full)
        return [plan.kept(n - own, own) for n, own in zip(full, ends)]
    return [place.tiles * plan.keep + int(place.newline.sum()) for place in places]


def _places_of(handle: Attached, kwargs: dict[str, Any]) -> list[Places]:
    sizes, per_row = (_numbers(kwargs.get(name)) for name in ("image_sizes", "batch_num_images"))
    cut = [True] * len(sizes) if per_row is None else [int(n) == 1 for n in per_row for _ in range(int(n))]
    return [_places(handle, size, alone) for size, alone in zip(sizes, cut)]


def _numbers(given: Any) -> Any:
    """``given`` as numbers of Python, which a device is asked for once."""
    return given.tolist() if isinstance(given, Tensor) else given


def _places(handle: Attached, size: Any, cut: bool) -> Places:
    """The model's own packing of an image of ``size`` (height, width), cut into tiles or not; found once for
    the last sizes.
    """
    key = (*(int(side) for side in size), cut)
    place = handle.places.get(key)
    if place is None:
        place = _learned(handle.core, key[:2], cut)
        handle.places = {**dict(list(handle.places.items())[1 - SIZES :]), key: place}  # threads may read the old one
    return place


def _learned(core: nn.Module, size: tuple[int, int], cut: bool) -> Places:
    """What the model's own packing does to the indices of patches."""
    from transformers.image_processing_utils import select_best_resolution

    vision, own = core.config.vision_config, type(core).pack_image_features
    patches = (vision.image_size // vision.patch_size) ** 2
    best = select_best_resolution(size, core.config.image_grid_pinpoints) if cut else (0, 0)
    tiles = 1 + (best[0] // vision.image_size) * (best[1] // vision.image_size)
    index = torch.arange(tiles * patches, dtype=torch.float32).view(tiles, patches, 1)
    options = {
        "vision_feature_select_strategy": core.config.vision_feature_select_strategy,
        "vision_aspect_ratio": getattr(core.config, "vision_aspect_ratio", None),
        "image_newline": torch.tensor([-1.0], dtype=torch.float32),
    }
    names = inspect.signature(own).parameters
    packed, _ = own(core, [index], [size], **{k: v for k, v in options.items() if k in names})
    return Places(packed[0][:, 0].long(), patches)


def make_pack_image_features(core: nn.Module) -> Callable[..., Any]:
    """A pack_image_features() in place of the model's own, for merged tiles or for merging what is packed."""

    @functools.wraps(type(core).pack_image_features)
    def pack_image_features(self: nn.Module, image_features: Any, image_sizes: Any, *args: Any, **kwargs: Any) -> Any:
        handle, own = self._pitome, MethodType(type(self).pack_image_features, self)
        plan, stats = handle.plan, handle.state.stats
        if plan is None or plan.is_plain or plan.where == "packed":
            return own(image_features, image_sizes, *args, **kwargs)
        places = [_places(handle, size, len(tiles) > 1) for size, tiles in zip(image_sizes, image_features)]
        groups = stats.groups.split([len(tiles) for tiles in image_features])
        newline = kwargs["image_newline"]
        made = [merged_tiles(*picture, newline) for picture in zip(image_features, groups, places)]
        features, became = zip(*made)
        handle.note(stats=replace(stats, packed=became))
        return list(features), torch.tensor([len(f) for f in features], device=features[0].device)

    return pack_image_features


def merged_tiles(tiles: Tensor, groups: Tensor, place: Places, newline: Tensor) -> tuple[Tensor, Packed]:
    """Tiles (n, K, C) that the tower merged into ``groups``, packed with newlines (C,): features (K', C)."""
    became = survivors(place, groups, tiles.shape[1])
    features = torch.cat([tiles.flatten(0, 1), newline[None].to(tiles)])  # -1 is the newline
    return features[became.token], became
