"""Models whose speed is compared: of random weights, copies that share them, merging and slicing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import Any, ClassVar

import torch
from torch import Tensor

from pitome_mllm import Attachment, attach
from pitome_mllm.costs.published import Shape
from pitome_mllm.families import FAMILY_OF_CONFIG
from pitome_mllm.families.geometry import geometry
from pitome_mllm.hooks.run import Run
from pitome_mllm.methods import Merge, Reducer, UserError
from pitome_mllm.plan import Plan

TEXT = 40  # tokens of text in every prompt


class _Sliced(Merge):
    """The first ``count`` tokens; no sizes, no groups."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.energy = self.group = self._source = None

    def reduce(self, x: Tensor, size: Tensor | None = None) -> tuple[Tensor, None]:
        return x[:, : self.count], None


@dataclass(frozen=True)
class Slice(Reducer):
    """What merging could cost at best: as many tokens leave, without a decision and without work."""

    forms_groups: ClassVar[bool] = False
    bipartite: ClassVar[bool] = False

    def match(
        self, metric: Tensor, r: int, *, size: Tensor | None = None, protected: int = 0, depth: float = 0.0
    ) -> Merge:
        return _Sliced(metric.shape[1] - r)


def slice_like(model: Any, handle: Attachment) -> None:
    """Attach to ``model`` an oracle that keeps as many tokens, at the same places of the tower, as another's plan."""
    attach(
        model, Slice(), counts=handle.plan.counts, place=handle.plan.place, metric="hidden",
        proportional_attention=False, graph=False,
    )  # fmt: skip


def configuration(shape: Shape, layers: int | None = None) -> Any:
    """A LLaVA configuration of this shape, with so many blocks of the LLM (None: all, 0: hardly an LLM)."""
    from transformers import LlamaConfig, LlavaConfig

    config = shape.config()
    if shape.text is None:
        layers, config = 0, LlavaConfig(vision_config=config, vision_feature_layer=-1)
    most = config.text_config.num_hidden_layers
    if layers is not None and not 0 <= layers <= most:
        raise UserError(f"--layers {layers} is not possible; choose 0 (the tower alone) to {most}")
    if layers == 0:
        config.text_config = LlamaConfig(hidden_size=64, num_attention_heads=2, num_hidden_layers=0, vocab_size=64)
    elif layers is not None:
        config.text_config.num_hidden_layers = layers
    config.image_seq_length = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
    return config


def random_model(config: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """A model with random weights, as fast as any."""
    import transformers

    kind = getattr(transformers, FAMILY_OF_CONFIG[config.model_type])
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return kind(config).eval()
    finally:
        torch.set_default_dtype(before)


def share_weights(model: Any) -> Any:
    """A model with modules of its own that shares every weight."""
    tensors = chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def prompt(model: Any, batch: int, images: int = 1) -> dict[str, Tensor]:
    """Rows of random pictures and of random text, as a processor makes them."""
    config, random = model.config, torch.Generator().manual_seed(0)
    image, side = config.image_token_id, config.vision_config.image_size
    text = torch.randint(0, config.text_config.vocab_size - 1, (TEXT,), generator=random)
    ids = torch.cat([torch.full((images * geometry(config).available,), image), text + (text >= image)])
    ids = ids.repeat(batch, 1).to(model.device)
    pixels = torch.randn(batch * images, 3, side, side, generator=random).to(model.device, model.dtype)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def merging(model: Any, plan: Plan, images: int) -> Callable[[], None]:
    """What merging does beside the model's own work: what it looks at, matching, combining; on random tensors."""
    vision, random = model.config.vision_config, torch.Generator().manual_seed(0)
    tokens = [count + plan.geometry.class_tokens for count in (plan.input_patches, *plan.counts)]
    shapes = [(images, count, vision.hidden_size) for count in tokens]
    hidden = [torch.randn(shape, generator=random).to(model.device, model.dtype) for shape in shapes]
    projector = model.get_submodule(plan.geometry.family.projector)

    def once() -> None:
        run = Run(plan)
        for block in range(plan.geometry.merging_blocks):
            inputs = {}
            if run.wants_match_inputs(block):
                keys = hidden[block].unflatten(-1, (vision.num_attention_heads, -1))
                inputs = run.read(block, keys[:, 0], keys)
            run.merge_block(block, hidden[block], inputs)
        run.before_projector(hidden[-1], projector)

    return once
