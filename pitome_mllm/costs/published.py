"""Models by their published sizes, for `accounting`: no weights, no network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..methods import UserError, unknown


def _tower(width: int, blocks: int, heads: int, side: int, patch: int) -> dict[str, Any]:
    """Keywords of CLIPVisionConfig, for pictures of ``side`` pixels; other towers of this size cost as much."""
    return {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
        "image_size": side,
        "patch_size": patch,
        "projection_dim": 768,
    }


_CLIP_L_336 = _tower(1024, 24, 16, 336, 14)
_VICUNA_7B = dict(
    hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, vocab_size=32064,
)  # fmt: skip
_VICUNA_13B = dict(
    hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40, vocab_size=32064,
)  # fmt: skip


@dataclass(frozen=True)
class PaperCost:
    """What the PiToMe paper's table of ImageNet says that a model costs, plain and merged, in 10^9 multiply-adds.

    No one ratio gives these figures. ``removed`` patches from every block, as in ToMe's paper, do within 2 %.
    """

    plain: float
    merged: float
    removed: int

    def counts(self, patches: int, blocks: int) -> list[int]:
        """Patches left after each block, of which none removes over half."""
        left = [patches]
        for _ in range(blocks):
            left.append(max(left[-1] - self.removed, (left[-1] + 1) // 2))
        return left[1:]


@dataclass(frozen=True)
class Shape:
    """A model's sizes.

    Attributes
    ----------
    vision, text : mapping
        Keywords of CLIPVisionConfig and LlamaConfig; without text it is an encoder alone.
    images : int
        Times that the tower runs for one image.
    paper_ratio : float or None
        The share kept per block in the PiToMe paper's table of this model, where it names one.
    paper_cost : PaperCost or None
        What that paper says that the model costs, where it says it.
    about : str
        What its figures take for granted.
    """

    title: str
    vision: Mapping[str, Any]
    text: Mapping[str, Any] | None = None
    images: int = 1
    paper_ratio: float | None = None
    paper_cost: PaperCost | None = None
    about: str = ""

    def config(self) -> Any:
        """A LLaVA configuration, or that of the vision tower alone."""
        from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

        vision = CLIPVisionConfig(**self.vision)
        if self.text is None:
            return vision
        return LlavaConfig(vision_config=vision, text_config=LlamaConfig(**self.text), dtype="float16")


_TILES = (
    "A picture of 672 x 672 pixels: an overview and 2 x 2 tiles, 5 times 576 tokens, every tile merged by itself; the "
    "newline tokens at the ends of rows are left out."
)

_ALONE = "The tower alone: all blocks merge, and what follows it is left out."

SHAPES = {
    "llava-1.5-7b": Shape("LLaVA-1.5-7B", _CLIP_L_336, _VICUNA_7B, paper_ratio=0.9),
    "llava-1.5-13b": Shape("LLaVA-1.5-13B", _CLIP_L_336, _VICUNA_13B, paper_ratio=0.925),
    "llava-next-7b": Shape("LLaVA-NeXT-7B (Vicuna)", _CLIP_L_336, _VICUNA_7B, images=5, about=_TILES),
    "clip-l-336": Shape("CLIP ViT-L/14 at 336 pixels", _CLIP_L_336, about=_ALONE),
    "clip-b-16": Shape("CLIP ViT-B/16", _tower(768, 12, 12, 224, 16), about=_ALONE),
    "blip-b-384": Shape("BLIP ViT-B/16 at 384 pixels", _tower(768, 12, 12, 384, 16), about=_ALONE),
    "deit-s": Shape("DeiT-S/16", _tower(384, 12, 6, 224, 16), paper_cost=PaperCost(4.6, 2.9, 12), about=_ALONE),
    "vit-mae-l": Shape(
        "ViT-MAE-L/16", _tower(1024, 24, 16, 224, 16), paper_cost=PaperCost(61.6, 31.0, 8), about=_ALONE
    ),
    "vit-mae-h": Shape(
        "ViT-MAE-H/14", _tower(1280, 32, 16, 224, 14), paper_cost=PaperCost(167.4, 92.8, 7), about=_ALONE
    ),
}


def get_shape(name: str) -> Shape:
    """The shape called ``name``; ValueError names what there is."""
    if name not in SHAPES:
        raise UserError(unknown("shape", name, SHAPES))
    return SHAPES[name]
