"""One row per vision encoder: a shrunken random model of its class, in double precision, and inputs for it."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from models import BEFORE_518, picture, scale_weights
from torch import Tensor

SIDE, PATCH, WIDTH, BLOCKS = 48, 4, 64, 6
GRID = SIDE // PATCH
PATCHES = GRID**2
SIZES = dict(hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=BLOCKS, num_attention_heads=2)
VISION = dict(SIZES, image_size=SIDE, patch_size=PATCH)
TEXT = dict(SIZES, num_hidden_layers=2, vocab_size=99, max_position_embeddings=32, bos_token_id=1, eos_token_id=2)
TEXT |= dict(pad_token_id=0, sep_token_id=2)
QFORMER = dict(SIZES, num_hidden_layers=2, vocab_size=99, encoder_hidden_size=WIDTH, use_qformer_text_input=True)
OPT = dict(model_type="opt", hidden_size=WIDTH, ffn_dim=WIDTH, num_hidden_layers=1, num_attention_heads=2)
OPT |= dict(vocab_size=99, word_embed_proj_dim=WIDTH)
HEADS = dict(num_query_tokens=8, image_text_hidden_size=32)
CONFIGS = {  # key: the beginning of a model's name
    "CLIPVision": lambda: transformers.CLIPVisionConfig(**VISION, projection_dim=32),
    "CLIP": lambda: transformers.CLIPConfig(vision_config=VISION, text_config=TEXT, projection_dim=32),
    "SiglipVision": lambda: transformers.SiglipVisionConfig(**VISION),
    "Siglip": lambda: transformers.SiglipConfig(vision_config=VISION, text_config={**TEXT, "projection_size": WIDTH}),
    "ViTMAE": lambda: transformers.ViTMAEConfig(**VISION, mask_ratio=0.0),
    "ViT": lambda: transformers.ViTConfig(**VISION),
    "DeiT": lambda: transformers.DeiTConfig(**VISION),
    "Dinov2With": lambda: transformers.Dinov2WithRegistersConfig(**VISION, mlp_ratio=2),
    "Dinov2": lambda: transformers.Dinov2Config(**VISION, mlp_ratio=2, use_swiglu_ffn=True),
    "DINOv3": lambda: transformers.DINOv3ViTConfig(**VISION, num_register_tokens=4, use_gated_mlp=True),
    "BlipVision": lambda: transformers.BlipVisionConfig(**VISION),
    "Blip2VisionModelWith": lambda: blip_2(),
    "Blip2Vision": lambda: transformers.Blip2VisionConfig(**VISION),
    "Blip2": lambda: blip_2(),
    "Blip": lambda: transformers.BlipConfig(
        vision_config=VISION, text_config={**TEXT, "encoder_hidden_size": WIDTH}, image_text_hidden_size=32
    ),
}


def blip_2() -> Any:
    return transformers.Blip2Config(vision_config=VISION, qformer_config=QFORMER, text_config=OPT, **HEADS)


@dataclass(frozen=True)
class Encoder:
    """A row.

    Attributes
    ----------
    title : what the docs call the family.
    model : name of the model's class.
    protected : tokens before the patches.
    pooled : what follows the tower, in the words of the docs.
    options : of a call, where it is not plain.
    """

    title: str
    model: str
    protected: int = 1
    pooled: str = "class token"
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return "-".join((self.model, *self.options))

    def build(self, seed: int = 1, **changes: Any) -> Any:
        """A model with fixed random weights; equal arguments give identical twins."""
        if BEFORE_518 and self.model.startswith("Dinov2"):
            pytest.skip("before 5.18 transformers keeps the keys of DINOv2 elsewhere, which attach says")
        config = next(make() for name, make in CONFIGS.items() if self.model.startswith(name))
        for name, value in changes.items():
            setattr(config, name, value)
        model = getattr(transformers, self.model)(config)
        scale_weights(model, seed)
        return model.double().eval()

    def inputs(self, model: Any, pixels: Tensor) -> dict[str, Any]:
        """All that a call takes with pictures (B, 3, H, W)."""
        names, given = inspect.signature(model.forward).parameters, {"pixel_values": pixels, **self.options}
        if "input_ids" in names:
            ids = torch.arange(7 * len(pixels)).view(len(pixels), 7) % 50 + 5
            given |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if "noise" in names:  # the order of patches, which is random without it
            patches = pixels.shape[-2] // PATCH * (pixels.shape[-1] // PATCH)
            given["noise"] = torch.arange(patches).repeat(len(pixels), 1)
        return given

    def call(self, model: Any, pixels: Tensor, **more: Any) -> dict[str, Tensor]:
        """The tensors of a model's output, and its hidden states."""
        with torch.no_grad():
            output = model(**self.inputs(model, pixels), **more)
        found = {name: value for name, value in output.items() if isinstance(value, Tensor)}
        return found | {f"hidden {i}": state for i, state in enumerate(output.get("hidden_states") or ())}


def pixels(*numbers: int, side: tuple[int, int] = (SIDE, SIDE)) -> Tensor:
    """Textured pictures (B, 3, H, W), double."""
    made = [torch.tensor(np.array(picture(n).resize(side[::-1])), dtype=torch.float64) for n in numbers]
    return torch.stack([one.permute(2, 0, 1) for one in made]) / 64 - 2


ENCODERS = (
    Encoder("CLIP", "CLIPModel"),
    Encoder("CLIP", "CLIPVisionModel"),
    Encoder("CLIP", "CLIPVisionModelWithProjection"),
    Encoder("CLIP", "CLIPForImageClassification", 1, "mean"),
    Encoder("SigLIP, SigLIP 2 of fixed resolution", "SiglipModel", 0, "attention"),
    Encoder("SigLIP, SigLIP 2 of fixed resolution", "SiglipVisionModel", 0, "attention"),
    Encoder("SigLIP, SigLIP 2 of fixed resolution", "SiglipForImageClassification", 0, "mean"),
    Encoder("ViT", "ViTModel"),
    Encoder("ViT", "ViTForImageClassification"),
    Encoder("DeiT", "DeiTModel", 2),
    Encoder("DeiT", "DeiTForImageClassification", 2),
    Encoder("DeiT", "DeiTForImageClassificationWithTeacher", 2, "class and distillation token"),
    Encoder("ViT-MAE (`mask_ratio=0.0`)", "ViTMAEModel", 1, "nothing"),
    Encoder("DINOv2", "Dinov2Model"),
    Encoder("DINOv2", "Dinov2ForImageClassification", 1, "class token and mean"),
    Encoder("DINOv2 with registers", "Dinov2WithRegistersModel", 5),
    Encoder("DINOv2 with registers", "Dinov2WithRegistersForImageClassification", 5, "class token and mean"),
    Encoder("DINOv3 ViT", "DINOv3ViTModel", 5),
    Encoder("BLIP", "BlipVisionModel"),
    Encoder("BLIP", "BlipForImageTextRetrieval", 1, "cross-attention"),
    Encoder("BLIP", "BlipForImageTextRetrieval", 1, "class token", {"use_itm_head": False}),
    Encoder("BLIP-2", "Blip2VisionModel"),
    Encoder("BLIP-2", "Blip2VisionModelWithProjection", 1, "cross-attention (Q-Former)"),
    Encoder("BLIP-2", "Blip2ForImageTextRetrieval", 1, "cross-attention (Q-Former)"),
    Encoder(
        "BLIP-2",
        "Blip2ForImageTextRetrieval",
        1,
        "cross-attention (Q-Former)",
        {"use_image_text_matching_head": True},
    ),
)
BY_MODEL = {row.model: row for row in reversed(ENCODERS)}
