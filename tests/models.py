"""Small LLaVA models with real visual geometry (24 x 24 patches), pictures, and a processor.

The weights are random but fixed and scaled so that answers depend on the picture. They are in double precision: two
ways of computing the same then give the same float32 metric, on every machine, and hence the same merges.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from inspect import signature
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version
from PIL import Image
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers.models import WordLevel
from torch import nn
from transformers import (
    CLIPVisionConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
)

GRID = 24
PATCHES = GRID * GRID
SIDE, PATCH = 96, 4  # pixels
SEEDS = (48, 28, 83, 53, 24, 22)  # of 100 pictures those that PiToMe decides by the widest gaps (`checks.gaps`)
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
PAD, BOS, EOS, UNK, IMAGE = range(5)
WORDS = (
    "USER: ASSISTANT: what is the colour of star circle square digit in picture how many are there red green blue "
    "yellow white one two three four five left right above below top bottom yes no and or a an big small which this "
    "that one? here? now? again? shape thing look at tell me"
).split()
VOCABULARY = SPECIAL + sorted(set(WORDS))
LONG = 120  # words of every answer of a model that never ends by itself
# What a call names its cache: before transformers 5.24, and from it on.
_TAKES = signature(LlavaForConditionalGeneration.forward).parameters
CACHE = "cache" if "cache" in _TAKES else "past_key_values"
BEFORE_518 = Version(transformers.__version__) < Version("5.18")
BEFORE_524 = CACHE == "past_key_values"
since_518 = pytest.mark.skipif(
    BEFORE_518,
    reason="before 5.18 transformers itself goes wrong with images in chunks of a prompt and in drafts",
)
QUESTION = "USER: <image> what colour is the star ASSISTANT:"


def tokenizer(padding_side: str = "left", marks: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """A word-level tokenizer that writes <s> in front, built without any file; ``marks`` are further special tokens."""
    words = (*VOCABULARY, *marks)
    raw = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=["<image>", *marks],
        padding_side=padding_side,
    )


def processor(strategy: str = "default", padding_side: str = "left", class_token: bool = True) -> LlavaProcessor:
    """The ordinary LLaVA processor: writes one placeholder per visual token that the plain model would show."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    size = {"height": SIDE, "width": SIDE}
    return LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=size),
        tokenizer(padding_side),
        patch_size=PATCH,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=1 if class_token else 0,
    )


def picture(number: int) -> Image.Image:
    """Blocks of colour at four scales plus fine noise: structure to merge along, and no two patches alike."""
    rng = np.random.default_rng(SEEDS[number])
    canvas = np.zeros((SIDE, SIDE, 3))
    for cells, weight in ((3, 1.0), (6, 0.8), (24, 0.5), (96, 0.35)):
        coarse = rng.normal(size=(cells, cells, 3))
        canvas += weight * coarse.repeat(SIDE // cells, 0).repeat(SIDE // cells, 1)
    return Image.fromarray(np.clip(128 + 60 * canvas, 0, 255).astype(np.uint8))


def text_config(kind: str, width: int = 64, **options: Any) -> Any:
    """The configuration of a small LLM."""
    settings = dict(
        vocab_size=len(VOCABULARY),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        bos_token_id=BOS,
        eos_token_id=None,
        pad_token_id=PAD,
    )
    return getattr(transformers, kind)(**{**settings, **options})


llama_config = partial(text_config, "LlamaConfig")


def config(
    layers: int = 7,
    feature_layer: int = -2,
    strategy: str = "default",
    tower: str = "clip",
    width: int = 64,
    attention: str = "sdpa",
    text: dict[str, Any] | None = None,
) -> LlavaConfig:
    """A LLaVA-1.5 configuration with 24 x 24 patches and ``layers`` encoder blocks."""
    kind = {"clip": CLIPVisionConfig, "siglip": SiglipVisionConfig}[tower]
    vision = kind(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=PATCH,
        **({"projection_dim": width} if tower == "clip" else {"vision_use_head": False}),
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text or llama_config(width),
        image_token_id=IMAGE,
        vision_feature_layer=feature_layer,
        vision_feature_select_strategy=strategy,
        image_seq_length=PATCHES,
        attn_implementation=attention,
    )


def scale_weights(model: nn.Module, seed: int) -> None:
    """Draw every weight anew so that signals neither die out nor drown: unit variance in, about unit variance out."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if weight.dim() <= 1:
            if "class_embedding" in name:
                weight.data.normal_(0, 1, generator=generator)
            elif name.endswith("bias"):
                weight.data.normal_(0, 0.1, generator=generator)
            else:  # norms
                weight.data.normal_(1, 0.1, generator=generator)
            continue
        fan_in = weight[0].numel()
        gain = 1.0
        if "embed" in name and "patch" not in name:
            gain, fan_in = (0.7 if "position" in name else 1.0), 1
        elif "q_proj" in name or "k_proj" in name:
            gain = 1.6  # attention that really picks tokens
        elif "lm_head" in name:
            gain = 2.0
        weight.data.normal_(0, gain / fan_in**0.5, generator=generator)
        if "lm_head" in name:
            weight.data[: len(SPECIAL)] = 0  # a model that says <image> breaks its own prompt


def build(seed: int = 1, dtype: torch.dtype = torch.float64, **options: Any) -> LlavaForConditionalGeneration:
    """A model with fixed random weights; the same arguments give an identical twin. ``options`` go to `config`."""
    settings = config(**options)
    model = LlavaForConditionalGeneration(settings)
    scale_weights(model, seed)
    model.generation_config.pad_token_id = PAD
    return model.to(dtype).eval()


def build_text_model(seed: int = 5) -> LlamaForCausalLM:
    """A text-only model of the same vocabulary (a draft model for assisted generation)."""
    model = LlamaForCausalLM(llama_config())
    scale_weights(model, seed)
    model.generation_config.pad_token_id = PAD
    return model.double().eval()
