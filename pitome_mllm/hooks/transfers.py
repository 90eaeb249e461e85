"""Between the host and a device, which is waited for as little as can be: it then never runs out of work."""

from __future__ import annotations

import torch
from torch import Tensor


def on_host(*masks: Tensor) -> list[Tensor]:
    """Boolean ``masks`` (B, T), each of its own width, on the host: the one time that a device is waited for."""
    if all(mask.device.type == "cpu" for mask in masks):
        return list(masks)
    widths = [mask.shape[1] for mask in masks]
    return list(torch.cat([mask.to(masks[0].device) for mask in masks], 1).cpu().split(widths, 1))


def on(device: torch.device, x: Tensor) -> Tensor:
    """``x`` on a device, which takes it when it is ready; waited for on the way from a device only."""
    return x.to(device, non_blocking=x.device.type == "cpu")
