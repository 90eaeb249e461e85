"""What the values of ``--model_args`` mean."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator

from pitome_mllm.methods import UserError

PLAIN = "none"  # the method that changes nothing


def batch_size(given: int | str | None) -> int:
    """Questions per batch; lmms-eval gives a string. ValueError if it is no number."""
    if not str(given or 1).isdigit() or int(given or 1) < 1:
        raise UserError(f"batch_size={given!r} is not possible; give a number of questions, such as 8")
    return int(given or 1)


def merging(given: dict[str, Any]) -> dict[str, Any]:
    """The settings of `attach`; empty for the plain model. ValueError for settings that nothing takes."""
    if given.get("method") != PLAIN:
        return given
    if len(given) > 1:
        raise UserError(f"method={PLAIN} takes no settings, got {', '.join(sorted({*given} - {'method'}))}")
    return {}


def place(device: str | None, device_map: str | None, bits: int | None, accelerator: Accelerator) -> Any:
    """What `load` takes as its device; ValueError for a model spread over the GPUs of several processes."""
    if accelerator.num_processes > 1:
        if device_map == "auto":
            raise UserError("device_map=auto spreads one model over all GPUs; start a single process for it")
        return accelerator.device
    if device_map is not None:
        return device_map
    if device is None and bits is None and torch.cuda.is_available():
        return "cuda"
    return device
