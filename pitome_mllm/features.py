"""What a model's vision tower makes of pictures: the tokens that merging is about, class token included."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, nn

from .specs import FAMILIES, FAMILY_OF_CONFIG, feature_index, geometry


@torch.no_grad()
def tower_features(model: nn.Module, pixel_values: Tensor) -> Tensor:
    """The hidden states that the projector reads; merged ones, and fresh ``handle.stats``, where the model is attached.

    Only the tower runs, which is all that merging a picture needs.

    Parameters
    ----------
    model : of a supported family.
    pixel_values : (I, 3, H, W) as the processor makes them, on any device.

    Returns
    -------
    (I, class tokens + patches, C) in the model's dtype and on its device.

    Raises
    ------
    ValueError : an unsupported family or vision tower.
    """
    geometry(model.config)  # raises for what is not supported
    tower = operator.attrgetter(FAMILIES[FAMILY_OF_CONFIG[model.config.model_type]].tower)(model)
    given = pixel_values.to(model.device, model.dtype)
    return tower(given, output_hidden_states=True).hidden_states[feature_index(model.config)]


def pixel_values(processor: Any, pictures: Any) -> Tensor:
    """(I, 3, H, W) of one picture or a list of them, as the tower takes them; the tiles of a picture one by one."""
    values = processor.image_processor(images=pictures, return_tensors="pt")["pixel_values"]
    return values.reshape(-1, *values.shape[-3:])  # of tiles (pictures, tiles, 3, H, W)
