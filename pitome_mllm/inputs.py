"""Refuse a caller's inputs that do not fit the model, before anything runs: it stays attached and usable."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from .features import pixels_in

if TYPE_CHECKING:
    from .attach import Attachment
    from .plan import Plan

ADVICE = "use the model's own processor, and pass its whole output"


def check_pictures(handle: Attachment, pixels: Tensor, sizes: Any) -> None:
    """ValueError unless ``pixels`` are pictures as this family's processor makes them.

    ``sizes`` : the image_sizes that came with them, or None.
    """
    tiles, shape = handle.family.tiles, tuple(pixels.shape)
    dims = {"": (4,), "anyres": (4, 5), "connector": (5,)}[tiles]
    if pixels.dim() not in dims:
        expected = "(pictures, tiles, 3, H, W)" if tiles else "(pictures, 3, H, W)"
        raise ValueError(f"got pictures of shape {shape}, {type(handle.model).__name__} takes {expected}; {ADVICE}")
    if not len(pixels):
        raise ValueError(f"got pixel_values of shape {shape}, no picture; leave them out where there is none")
    if tiles == "anyres" and sizes is None:
        raise ValueError(f"got pixel_values without image_sizes; {ADVICE}")
    if tiles == "anyres" and pixels.dim() == 5 and len(sizes) != len(pixels):
        raise ValueError(f"got {len(pixels)} pictures and {len(sizes)} image_sizes; {ADVICE}")
    side = handle.model.config.vision_config.image_size
    if tiles != "connector" and shape[-2:] != (side, side):
        raise ValueError(
            f"got pictures of {shape[-2]} x {shape[-1]} pixels, this vision tower takes {side} x {side}; {ADVICE}"
        )


def check_devices(model: nn.Module, kwargs: Mapping[str, Any]) -> None:
    """ValueError if inputs lie on several devices, and the model on one."""
    if len({*(getattr(model, "hf_device_map", None) or {}).values()}) > 1:  # accelerate moves what does not fit
        return
    given = {name: kwargs.get(name) for name in ("input_ids", "inputs_embeds", "attention_mask", "labels")}
    given["pixel_values"] = pixels_in(kwargs)
    devices = {name: str(x.device) for name, x in given.items() if isinstance(x, Tensor)}
    if len({*devices.values()}) > 1:
        said = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"got {said}; move the processor's whole output with inputs.to(model.device)")


def check_count(count: int, full: Sequence[int], kept: Sequence[int]) -> None:
    """ValueError unless ``count`` placeholders are those of pictures with ``full`` or ``kept`` tokens each."""
    if count in (sum(full), sum(kept)):
        return
    pictures = f"{len(full)} picture{'s' if len(full) > 1 else ''}"
    if not count:
        raise ValueError(f"got {pictures} but no image placeholder in the prompt; write one <image> per picture")
    raise ValueError(
        f"got {pictures} and {count} image placeholders, expected {sum(full)}, or {sum(kept)} where the prompt is "
        f"short already; write one <image> per picture, and {ADVICE}"
    )


def check_features_alone(plan: Plan, kwargs: Mapping[str, Any], move: bool, short: bool) -> None:
    """ValueError where features come in place of pictures and the plan asks for what only pictures tell."""
    if move and (kwargs.get("position_ids") is None or not short):  # which patch a token started at is not known
        raise ValueError(
            "positions='original' with mm_encoder_outputs needs a short prompt and its position_ids; "
            "or pass the pictures themselves as pixel_values"
        )
    if plan.llm_size_bias:
        raise ValueError(
            "llm_size_bias=True does not go with mm_encoder_outputs, whose sizes are not known; pass the pictures "
            "themselves as pixel_values, or attach with llm_size_bias=False"
        )
