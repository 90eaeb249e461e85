"""What encoders alone need beside merging blocks: pictures of any size, and pooling that knows the sizes of tokens.

Layers get their `Run` by a keyword; what pools inside the tower takes none, and asks `running` for it.
"""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..methods import UserError
from ..methods.merge import log_sizes
from ..plan import Plan
from .run import running
from .state import Attached

logger = logging.getLogger(__name__)

MEANS = "pitome_means"  # the keyword by which a model tells its tower that it takes means over patches
SIZES = "_pitome_sizes"  # on a tower's output: patches per token or None, for what reads it by cross-attention


class _AddingToLogits(TorchFunctionMode):
    """Adds ``bias`` to the logits of an attention that takes no mask, where it asks torch for its softmax."""

    def __init__(self, bias: Tensor) -> None:
        super().__init__()
        self.bias = bias

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func is F.softmax:
            args = (args[0] + self.bias, *args[1:])
        elif func is F.scaled_dot_product_attention:
            kwargs = {**kwargs, "attn_mask": self.bias}
        return func(*args, **kwargs)


def adding_to_logits(bias: Tensor | None) -> AbstractContextManager:
    """Have the attention that runs within add ``bias`` (B, 1, 1, N) to its logits; None = nothing."""
    return nullcontext() if bias is None else _AddingToLogits(bias)


def parts(handle: Attached) -> dict[nn.Module, Any]:
    """The parts beside the tower that pool or read its tokens, and the pre-hook of each."""
    found: dict[nn.Module, Any] = {}
    found |= {part: weigh_keys for part in handle.tower.modules() if isinstance(part, nn.MultiheadAttention)}
    if handle.family.means:
        found[handle.model] = ask_for_means
    if handle.family.reader:
        reader = handle.model.get_submodule(handle.family.reader)
        found[reader] = keep_sizes
        found |= {part: weigh_read for part in reader.modules() if hasattr(part, "key") and hasattr(part, "query")}
    return found


def for_call(tower: nn.Module, plan: Plan, args: tuple, kwargs: dict[str, Any]) -> tuple[Plan, dict[str, Any]]:
    """The plan for the pictures of a call, whatever their size, and its keywords."""
    if kwargs.get("attention_mask") is not None:
        raise UserError(
            "attention_mask hides tokens, which merging knows nothing of; leave it out while merging is attached"
        )
    pixels, patch = args[0] if args else kwargs.get("pixel_values"), tower.config.patch_size
    if not isinstance(pixels, Tensor) or pixels.dim() != 4:
        return plan, kwargs  # the model says what it takes
    rows, columns = (patch, patch) if isinstance(patch, int) else patch
    grid = (pixels.shape[-2] // rows, pixels.shape[-1] // columns)
    if not all(grid):
        return plan, kwargs  # here too
    plan, mask_ratio = plan.for_grid(grid), hasattr(tower.config, "mask_ratio")
    scaled = plan.input_patches < plan.geometry.patches
    if mask_ratio and len(args) < 2 and (scaled or kwargs.get("noise") is None):
        places = torch.arange(plan.input_patches, device=pixels.device).repeat(len(pixels), 1)
        kwargs = {**kwargs, "noise": places}  # ViT-MAE puts patches in the order of its noise
    return plan, kwargs


def weigh_keys(attention: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    """Pre-hook of the attention in a pooling head (SigLIP): log(size) on the logits of merged tokens."""
    run = None if attention._pitome.plan is None else running()  # one that training keeps is of another call
    size = None if run is None else run.weights(run.plan.geometry.blocks)
    if size is None:
        return None
    return args, {**kwargs, "key_padding_mask": log_sizes(size, args[0].dtype)[:, 0, 0]}


def ask_for_means(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    """Pre-hook of a model that takes the mean over its tower's patches."""
    return None if model._pitome.plan is None else (args, {**kwargs, MEANS: True})


def for_means(x: Tensor, size: Tensor, protected: int) -> Tensor:
    """Tokens (B, N, C) with patches scaled so that their mean is the one weighted by ``size`` (B, N, 1)."""
    size = size[:, protected:]
    patches = x[:, protected:] * (size / size.mean(1, keepdim=True))
    return torch.cat([x[:, :protected], patches.to(x.dtype)], 1)


def keep_sizes(reader: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    """Pre-hook of a part that reads the tower: what its attention will read, marked with sizes as the tower left it."""
    states, plan = kwargs.get("encoder_hidden_states"), reader._pitome.plan
    if hasattr(states, SIZES):
        size = getattr(states, SIZES)
        states = states.to(reader.dtype)  # as the Q-Former does, which would lose the mark
        setattr(states, SIZES, size)
        return args, {**kwargs, "encoder_hidden_states": states}
    told = plan is not None and plan.proportional_attention
    if states is not None and told and states.shape[1] < plan.geometry.class_tokens + plan.geometry.patches:
        logger.warning(
            "%s reads other tokens than those that the tower gave, and counts each as one patch; hand on the tower's "
            "last_hidden_state itself",
            type(reader).__name__,
        )
    return None


def weigh_read(attention: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    """Pre-hook of an attention that may read the tower: log(size) on the logits of merged tokens."""
    states, mask = kwargs.get("encoder_hidden_states"), kwargs.get("encoder_attention_mask")
    size = getattr(states, SIZES, None)
    if size is None:
        return None
    bias = log_sizes(size, states.dtype).to(states.device)
    if mask is not None:
        bias = bias.masked_fill(~mask, torch.finfo(bias.dtype).min) if mask.dtype == torch.bool else bias + mask
    return args, {**kwargs, "encoder_attention_mask": bias}
