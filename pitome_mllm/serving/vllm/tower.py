"""Merging inside vLLM's CLIP and SigLIP towers: their own layers, run one by one, and a `Run` as everywhere.

Tensor parallel ranks hold different heads, and decide alike all the same: they merge by the residual stream, which is
one and the same on all of them.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ...hooks.run import Run
from ...methods import UserError
from ...plan import Plan


def check_ranks(plan: Plan, ranks: int) -> None:
    """UserError where each of several ranks would decide by heads of its own."""
    if plan.metric == "keys" and ranks > 1:
        raise UserError(
            f"metric='keys' differs between the {ranks} ranks of tensor parallelism, each of which has heads of its "
            "own; choose metric='hidden'"
        )


def features(tower: Any, pixels: Tensor, plan: Plan, projector: nn.Module) -> Tensor:
    """What the projector reads of images (B, 3, H, W): their visual tokens (B, ``plan.keep``, C)."""
    vision, run = tower.vision_model, Run(plan)
    x = vision.embeddings(pixels)
    if hasattr(vision, "pre_layrnorm"):
        x = vision.pre_layrnorm(x)
    for block, layer in enumerate(vision.encoder.layers):
        x = _through(run, block, layer, x)
    x, _, _ = run.before_projector(x, projector)
    return x[:, plan.geometry.class_tokens - plan.geometry.visible_class_tokens :]


def _through(run: Run, block: int, layer: Any, x: Tensor) -> Tensor:
    """What a layer, and merging in it, make of ``x`` (B, N, C)."""
    bias = run.bias(block, None, x)
    if bias is None and not run.acts(block):
        output = layer(x)
        return output[0] if isinstance(output, tuple) else output
    output, keys = _attend(layer.self_attn, layer.layer_norm1(x), bias)
    x = x + output
    inputs = run.read(block, None, keys) if run.wants_match_inputs(block) else {}
    if run.plan.place == "mid":
        x = run.merge_block(block, x, inputs)
    x = x + layer.mlp(layer.layer_norm2(x))
    return x if run.plan.place == "mid" else run.merge_block(block, x, inputs)


def _attend(attention: Any, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """The attention of normed ``x`` (B, N, C), with ``bias`` (B, 1, N, N) on its logits; and keys (B, N, H, C / H)."""
    parts = attention.qkv_proj(x)[0].chunk(3, dim=-1)
    heads = [part.unflatten(-1, (attention.num_heads_per_partition, -1)) for part in parts]
    if bias is None:
        output = attention.attn(*parts)
    else:
        query, key, value = (part.transpose(1, 2) for part in heads)
        output = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=attention.scale)
        output = output.transpose(1, 2).flatten(2)
    return attention.out_proj(output)[0], heads[1]
