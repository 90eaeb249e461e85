"""A model that has no row is tried on a small picture when merging is attached: does it do as the rows' models do?"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..families.geometry import Geometry
from ..methods import UserError
from ..plan import Plan, make_plan
from ..settings import Settings
from . import axes
from .install import uninstall
from .state import Attached

TEXT = 3  # tokens before the picture, and after it
CELLS = 8  # patches on a side of the picture, where the tower takes pictures of any size
FLAT = {"image_grid_thw"}  # what a core takes with patches in a row, in place of a picture


def planned(handle: Attached, settings: Settings) -> Plan:
    """What ``settings`` mean for a model, by what a small picture shows.

    Raises
    ------
    ValueError
        It does not merge as models with a row do; says what did not fit, and nothing stays on the model.
    """
    plans = {share: make_plan(settings.changed(keep=share), handle.geometry) for share in (1.0, 0.5)}
    try:
        handle.geometry = _tried(handle, plans)
        return make_plan(settings, handle.geometry)
    except BaseException:
        uninstall(handle)
        raise


@torch.no_grad()
def _tried(handle: Attached, plans: Mapping[float, Plan]) -> Geometry:
    """The geometry with as many patches to a token as were seen; ``plans`` by the share that they keep."""
    model, shape = handle.model, handle.geometry
    with _evaluating(model):
        try:
            patches, picture = _picture(handle)
            with handle.choosing(None):
                tokens = _tokens(handle, picture)
                inputs = {**picture, **_prompt(model, tokens)}
                plain = model(**inputs).logits
            _check_axes(handle, inputs)
            for share, plan in plans.items():
                with handle.choosing(plan):
                    _compare(handle, share, plain, model(**inputs).logits)
        except Exception as error:  # whatever it is, it is what did not fit
            raise UserError(
                f"unsupported model {type(model).__name__}: it has no row, and a small picture did not go through as "
                f"in models that do: {error}; a new one is a row in pitome_mllm.families (see CONTRIBUTING.md)"
            ) from error
    factor = max(1, round(math.sqrt(patches / tokens)))
    rows, columns = (max(side // factor, 1) * factor for side in shape.grid)
    return replace(shape, shuffle_factor=factor, grid=(rows, columns))


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout within a ``with`` block, and without stats of it after it."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        model._pitome.note(stats=None)


def _picture(handle: Attached) -> tuple[int, dict[str, Tensor]]:
    """How many patches a small picture has, and the picture as the model takes it."""
    vision, model = handle.model.config.vision_config, handle.model
    names = inspect.signature(type(handle.core).get_image_features).parameters
    patch = vision.patch_size if isinstance(vision.patch_size, int) else vision.patch_size[0]
    side = getattr(vision, "image_size", None) or CELLS * patch
    side = side if isinstance(side, int) else side[0]
    channels = getattr(vision, "num_channels", getattr(vision, "in_channels", 3))
    extra: dict[str, Tensor] = {}
    shape: tuple[int, ...] = (1, channels, side, side)
    if {*names} & FLAT:
        side = CELLS * patch
        shape = (CELLS**2, channels * getattr(vision, "temporal_patch_size", 1) * patch**2)
        extra = {name: torch.tensor([[1, CELLS, CELLS]], device=model.device) for name in FLAT}
    elif "image_sizes" in names:
        extra = {"image_sizes": torch.tensor([[side, side]], device=model.device)}
    wave = torch.arange(math.prod(shape), device=model.device).mul(0.37).sin()
    return (side // patch) ** 2, {"pixel_values": wave.view(shape).to(model.dtype), **extra}


def _tokens(handle: Attached, picture: dict[str, Tensor]) -> int:
    """The visual tokens of the picture in the plain model."""
    made = handle.core.get_image_features(**picture, return_dict=True).pooler_output
    width = handle.model.config.text_config.hidden_size
    shapes = [tuple(x.shape) for x in made]
    if len(shapes) != 1 or len(shapes[0]) != 2 or shapes[0][1] != width:
        raise UserError(f"get_image_features gave {shapes} for it, and not its tokens (L, {width})")
    return shapes[0][0]


def _prompt(model: nn.Module, tokens: int) -> dict[str, Tensor]:
    """A prompt with the placeholders of one picture of as many ``tokens``."""
    image = model.config.image_token_id
    ids = torch.full((1, tokens + 2 * TEXT), 1 if image != 1 else 2, device=model.device)
    ids[:, TEXT:-TEXT] = image
    takes = inspect.signature(type(model).forward).parameters
    types = {name: (ids == image).long() for name in ("token_type_ids", "mm_token_type_ids") if name in takes}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **types}


def _check_axes(handle: Attached, inputs: dict[str, Tensor]) -> None:
    """UserError unless positions in several axes are time, row and column of the tokens, in reading order."""
    image = inputs["input_ids"] == handle.model.config.image_token_id
    if not axes.counts_axes(handle.core):
        return
    ids = axes.counted(handle.core, inputs, image, torch.ones_like(image))[:, image]
    places = ids[1] * (ids.max() + 1) + ids[2] if len(ids) == 3 else ids[:0]
    if not len(places) or bool((ids[0] != ids[0, 0]).any()) or bool((places.diff() <= 0).any()):
        raise UserError(
            f"its positions in {len(ids)} axes are not time, row and column of the tokens, in reading order"
        )


def _compare(handle: Attached, share: float, plain: Tensor, seen: Tensor) -> None:
    """UserError unless logits of a prompt are as long as they should be, and the plain model's where nothing merges."""
    stats = handle.state.stats
    gone = sum(map(len, stats.groups)) - sum(stats.lengths)
    if seen.shape[1] != plain.shape[1] - gone or not bool(seen.isfinite().all()) or (share == 1 and gone):
        raise UserError(f"a prompt of {plain.shape[1]} tokens came to {seen.shape[1]} at keep={share}, {gone} merged")
    if share == 1 and not torch.equal(plain, seen):
        raise UserError("its logits at keep=1.0 are not those of the plain model")
