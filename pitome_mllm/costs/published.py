"""Models by their published sizes, for `accounting`: no weights, no network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..methods import UserError, unknown

_CLIP_L_336 = dict(
    hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336,
    patch_size=14, projection_dim=768,
)  # fmt: skip
_VICUNA_7B = dict(
    hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, vocab_size=32064,
)  # fmt: skip
_VICUNA_13B = dict(
    hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40, vocab_size=32064,
)  # fmt: skip


def _vit(width: int, blocks: int, heads: int, patch: int, projection: int = 512) -> dict[str, int]:
    """A vision transformer with a class token, on pictures of 224 pixels."""
    return dict(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=blocks, num_attention_heads=heads,
        image_size=224, patch_size=patch, projection_dim=projection,
    )  # fmt: skip


@dataclass(frozen=True)
class PaperCost:
    """What the PiToMe paper's table of ImageNet says that a model costs, plain and merged, in 10^9 multiply-adds.

    No one ratio gives its figures, and neither does its text or the authors' README say what does; ``removed`` patches
    from every block, the schedule of ToMe's paper, do, within 2 %.
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
        Keywords of CLIPVisionConfig and LlamaConfig; without text it is a tower alone.
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

_ALL = "All blocks merge, beside a class token; what stands behind the tower is left out."

SHAPES = {
    "llava-1.5-7b": Shape("LLaVA-1.5-7B", _CLIP_L_336, _VICUNA_7B, paper_ratio=0.9),
    "llava-1.5-13b": Shape("LLaVA-1.5-13B", _CLIP_L_336, _VICUNA_13B, paper_ratio=0.925),
    "llava-next-7b": Shape("LLaVA-NeXT-7B (Vicuna)", _CLIP_L_336, _VICUNA_7B, images=5, about=_TILES),
    "clip-l-336": Shape("CLIP ViT-L/14 at 336 pixels, the vision tower alone", _CLIP_L_336, about=_ALL),
    "clip-vit-b-16": Shape("CLIP ViT-B/16 at 224 pixels, the vision tower alone", _vit(768, 12, 12, 16), about=_ALL),
    "blip-b-384": Shape(
        "BLIP ViT-B/16 at 384 pixels, the vision tower alone", _vit(768, 12, 12, 16) | {"image_size": 384}, about=_ALL
    ),
    "vit-mae-h": Shape(
        "ViT-MAE-H/14 at 224 pixels", _vit(1280, 32, 16, 14), paper_cost=PaperCost(167.4, 92.8, 7), about=_ALL
    ),
    "vit-mae-l": Shape(
        "ViT-MAE-L/16 at 224 pixels", _vit(1024, 24, 16, 16), paper_cost=PaperCost(61.6, 31.0, 8), about=_ALL
    ),
    "deit-s": Shape("DeiT-S/16 at 224 pixels", _vit(384, 12, 6, 16), paper_cost=PaperCost(4.6, 2.9, 12), about=_ALL),
}


def get_shape(name: str) -> Shape:
    """The shape called ``name``; ValueError names what there is."""
    if name not in SHAPES:
        raise UserError(unknown("shape", name, SHAPES))
    return SHAPES[name]
