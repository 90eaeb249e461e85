"""An image as the vision tower gets it."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image

from ..families.features import pixel_values
from ..methods import UserError


def tiles_seen_by(processor: Any, picture: Image.Image) -> list[Image.Image]:
    """Everything that the vision tower gets of an image: one view of it, or for anyres an overview and its tiles.

    Resized, cropped, and with the normalisation undone; in the order of the rows of ``handle.stats``. A tower that
    gets patches of a picture instead sees all of it.

    Parameters
    ----------
    processor : object
        A multimodal processor, or an image processor.
    picture : PIL.Image.Image
        Any size.

    Raises
    ------
    ValueError
        The processor has no image processor.
    """
    image_processor = getattr(processor, "image_processor", processor)
    if not hasattr(image_processor, "image_mean"):
        raise UserError(
            f"{type(processor).__name__} has no image processor; pass the processor that AutoProcessor loads"
        )
    values = pixel_values(processor, picture.convert("RGB")).float()
    if values.dim() < 4:
        return [picture.convert("RGB")]
    if image_processor.do_normalize:
        mean, std = torch.tensor(image_processor.image_mean), torch.tensor(image_processor.image_std)
        values = values * std[:, None, None] + mean[:, None, None]
    if image_processor.do_rescale:
        values = values / image_processor.rescale_factor
    pixels = values.round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(tile) for tile in pixels]


def seen_by(processor: Any, picture: Image.Image) -> Image.Image:
    """The first, often the only, of `tiles_seen_by`: for anyres the overview."""
    return tiles_seen_by(processor, picture)[0]
