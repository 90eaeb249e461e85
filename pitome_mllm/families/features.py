"""What a model's vision tower makes of images: the tokens that merging is about, class token included."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..methods import UserError
from .geometry import Geometry, geometry

PIXELS = ("pixel_values", "pixel_values_images")  # what processors call images; the latter Video-LLaVA's
SIZE = "image_sizes"  # which older releases of transformers take for Pixtral without naming it

SELECTION = ("vision_feature_layer", "vision_feature_layers", "vision_feature_select_strategy")


def selected_features(values: Mapping[str, Any]) -> dict[str, Any]:
    """Which of a tower's features the projector gets, as a model's configuration or the arguments of a call say it."""
    said = {name: values[name] for name in SELECTION if values.get(name) is not None}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in said.items()}


def read(output: Any, geometry: Geometry) -> Tensor | None:
    """What the projector reads of a tower's output (I, N, C), the feature layers side by side; None if it has none."""
    if not geometry.layers:
        return output.last_hidden_state
    if output.hidden_states is None:
        return None
    return torch.cat([output.hidden_states[layer] for layer in geometry.layers], -1)


def write(output: Any, geometry: Geometry, x: Tensor) -> None:
    """Put ``x``, of the form that `read` gives, in the place of what the projector reads."""
    if not geometry.layers:
        output.last_hidden_state = x
        return
    states = list(output.hidden_states)
    for layer, part in zip(geometry.layers, x.chunk(len(geometry.layers), -1)):
        states[layer] = part
    output.hidden_states = tuple(states)


@torch.no_grad()
def tower_features(model: nn.Module, pixel_values: Tensor) -> Tensor:
    """What the projector reads, class token included; merged, and with fresh ``handle.stats``, where it is attached.

    Only the tower runs, which is all that merging an image needs.

    Parameters
    ----------
    model : nn.Module
        Of a supported family.
    pixel_values : Tensor of shape (I, 3, H, W)
        As the processor makes them, on any device.

    Returns
    -------
    Tensor of shape (I, class tokens + patches, C)
        In the model's dtype and on its device.

    Raises
    ------
    ValueError
        An unsupported family or vision tower; images cut into tiles.
    """
    shape = geometry(model)  # raises for what is not supported
    if pixel_values.dim() != 4:
        raise UserError(
            f"got pixel_values of shape {tuple(pixel_values.shape)}, pictures cut into tiles; give tiles (I, 3, H, W)"
        )
    tower = model.get_submodule(shape.family.tower)
    weight = next(tower.parameters())
    given = pixel_values.to(weight.device, cast(Any, model).dtype)
    return cast(Tensor, read(tower(given, output_hidden_states=True), shape))


@torch.no_grad()
def picture_features(core: nn.Module, inputs: Mapping[str, Any]) -> Any:
    """What a multimodal model makes of the pictures among its ``inputs``, as it puts them among the text."""
    given = taken(cast(Any, type(core)).get_image_features, inputs)
    return cast(Any, core).get_image_features(**given, return_dict=True)


def taken(function: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What a model's own method of features takes of its ``inputs``."""
    names = dict.fromkeys((*inspect.signature(function).parameters, SIZE))
    return {name: inputs[name] for name in names if inputs.get(name) is not None}


def picture_inputs(processor: Any, pictures: Any) -> Any:
    """Model inputs of one image or a list of them; with the prompt that is nothing else, if it is a whole processor."""
    mark = getattr(processor, "image_token", None)
    if mark is None:
        return getattr(processor, "image_processor", processor)(images=pictures, return_tensors="pt")
    images = list(pictures) if isinstance(pictures, (list, tuple)) else [pictures]
    return processor(images=[images], text=[mark * len(images)], return_tensors="pt")


def tokens_of_picture(processor: Any, picture: Any, mark: int) -> int:
    """Visual tokens, ``mark`` in a prompt, that the plain model has of one image."""
    return int((picture_inputs(processor, picture)["input_ids"] == mark).sum())


def pixel_values(processor: Any, pictures: Any) -> Tensor:
    """(I, 3, H, W) of one image or a list of them, as the tower takes them; the tiles of an image one by one.

    As they are, (N, C) or (I, N, C), where the tower takes patches.
    """
    values = pixels_of(picture_inputs(processor, pictures))
    return values if values.dim() < 4 else values.reshape(-1, *values.shape[-3:])  # of tiles (images, tiles, 3, H, W)


def pixels_in(inputs: Mapping[str, Any]) -> Tensor | None:
    """The images among a model's inputs, None if there are none."""
    return next((inputs[name] for name in PIXELS if inputs.get(name) is not None), None)


def pixels_of(inputs: Mapping[str, Any]) -> Tensor:
    """The images among a model's inputs; ValueError if there are none."""
    pixels = pixels_in(inputs)
    if pixels is None:
        raise UserError("inputs hold no pixel_values; pass what the processor returns for a picture with a prompt")
    return pixels
