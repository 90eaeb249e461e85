"""The embedded model before training: architecture, tokenizer and processor are those of `pitome_mllm/tiny`."""

import math
from pathlib import Path

import torch
from torch import Tensor, nn

from pitome_mllm.loading import TINY

from ..benchmark.questions import vocabulary
from ..benchmark.scenes import GRID, PATCH

SPECIAL = ("<pad>", "<unk>", "<s>", "</s>", "<image>")
PAD, EOS = 0, 3
PREFIX = ("<s>", "user:")  # what comes before the picture in every prompt


def word_ids() -> dict[str, int]:
    """Token ids of the special tokens and of every word."""
    return {word: i for i, word in enumerate((*SPECIAL, *vocabulary()))}


def build_model(seed: int = 0) -> nn.Module:
    """A freshly initialised model in float32."""
    from transformers import AutoConfig, GenerationConfig, LlavaForConditionalGeneration

    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(AutoConfig.from_pretrained(TINY, dtype="float32"))
    model.generation_config = GenerationConfig.from_pretrained(TINY)
    _initialise_tower(vision_tower(model))
    return model


def vision_tower(model: nn.Module) -> nn.Module:
    """The module with embeddings and blocks; some releases of transformers keep it one level deeper."""
    tower = model.model.vision_tower
    return getattr(tower, "vision_model", tower)


@torch.no_grad()
def _initialise_tower(tower: nn.Module) -> None:
    """CLIP's own initialisation shrinks with the width and barely learns at this size, so start from one that does.

    Two-dimensional sine-cosine positions with equal query and key projections make every head look around its own
    patch from the first step; a tower that must find out about neighbourhoods first takes several times as long.
    """
    for name, parameter in tower.named_parameters():
        if "class_embedding" in name:
            nn.init.normal_(parameter, std=0.02)
        elif "patch_embedding" in name:
            nn.init.normal_(parameter, std=(3 * PATCH * PATCH) ** -0.5)
        elif parameter.dim() == 2 and "position" not in name:
            nn.init.xavier_uniform_(parameter)
    places = tower.embeddings.position_embedding.weight
    places.zero_()[1:] = _sincos(places.shape[1])
    for layer in tower.encoder.layers:
        shared = 0.7 * nn.init.orthogonal_(torch.empty_like(layer.self_attn.q_proj.weight))
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            projection.weight.copy_(shared + 0.02 * torch.randn_like(shared))


def _sincos(width: int) -> Tensor:
    """Positions (GRID * GRID, width): sines and cosines of column and row at rising frequencies."""
    frequencies = torch.logspace(math.log10(0.06), math.log10(2.0), width // 4)
    row, column = torch.meshgrid(torch.arange(GRID).float(), torch.arange(GRID).float(), indexing="ij")
    waves = [f(axis.reshape(-1, 1) * frequencies) for axis in (column, row) for f in (torch.sin, torch.cos)]
    return 0.5 * torch.cat(waves, 1)


def save_release(model: nn.Module, folder: Path) -> None:
    """Write configuration, half-precision weights, tokenizer and processor into `folder`."""
    from transformers import AutoProcessor

    model.to(torch.float16).save_pretrained(folder)
    AutoProcessor.from_pretrained(TINY).save_pretrained(folder)
