"""Where a vision tower keeps its parts and how a family hands features to its LLM: data, no behaviour.

Read from transformers 5.6 .. 5.23. A new tower or family is one row here; `geometry` makes token counts of it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

IN_TOWER = ("tower", "projector", "both")  # where tokens merge if nothing after the projector needs a whole grid


@dataclass(frozen=True)
class TowerSpec:
    """The attribute names of one kind of encoder layer, and the class tokens of its tower, registers not counted."""

    norm1: str = "layer_norm1"
    attention: str = "self_attn"
    norm2: str = "layer_norm2"
    mlp: str = "mlp"
    after_attention: tuple[str, ...] = ()  # what its output goes through before it is added, as layer scale
    after_mlp: tuple[str, ...] = ()
    query: str = "q_proj"  # on the attention module; the same as the key where one projection makes both, and values
    key: str = "k_proj"
    takes_mask: bool = True  # the layer and its attention
    class_tokens: int = 1


@dataclass(frozen=True)
class FamilySpec:
    """Where a multimodal model keeps its parts (dotted paths from the model), and what its projector reads.

    Attributes
    ----------
    config : str
        ``model_type`` of its configuration.
    select : str or None
        "full", or "default" (without the first token), where the configuration does not say which.
    last : bool
        The projector reads the tower's normed output, not the hidden states of a feature layer.
    linear : int
        Linear layers of the projector; 0 where FLOPs of it and of the tower are not counted.
    first_position : int
        Position id of the first token in the LLM.
    prefix : bool
        The tokens of a prompt see each other, whatever window the LLM has.
    core : str
        The part that encodes images.
    tiles : str
        How images of several tiles are packed: "" = they have one; "anyres" = by the core's ``pack_image_features``;
        "features" = as the core's ``get_image_features`` has it, which gives the visual tokens of every picture.
    places : tuple of str
        Where tokens can merge; the first one unless a method says something else.
    unsupported_reason : str
        Why not elsewhere.
    plain : tuple of str
        Methods of the core that never merge.
    videos : str
        Why videos do not merge; empty if the family takes none.
    pixels : str
        What the model calls images.
    original : bool
        A model of the original llava package, which writes images into the prompt itself.
    encoder : bool
        A vision tower by itself, or with a head or a text tower beside it, and no LLM behind it.
    means : bool
        The model takes the mean over the patches of the tower's output.
    reader : str
        A part whose cross-attention reads the tower's output.
    rotary : bool
        The blocks of the tower turn queries and keys by the place of every patch.
    joins : str
        Path in the configuration of how many patches on a side become one visual token; a fraction is its inverse.
    count : str
        In place of it, path in the configuration of the visual tokens of one picture.
    side : int
        Visual tokens on a side of the picture that counts are given for, where pictures keep their size; 0 = as many as
        one of the tower's ``image_size`` has.
    by_row : bool
        The core gives one tensor for all tiles of a row; each tile is merged by itself.
    newline : str
        The core's parameter that ends the rows of a picture among its visual tokens.
    known : bool
        It is a row, and not read out of a model that has none.
    """

    config: str
    tower: str = "model.vision_tower"
    projector: str = "model.multi_modal_projector"
    language: str = "model.language_model"
    select: str | None = None
    last: bool = False
    linear: int = 2
    first_position: int = 0
    prefix: bool = False
    core: str = "model"
    tiles: str = ""
    places: tuple[str, ...] = IN_TOWER
    unsupported_reason: str = "pictures are not cut into tiles"
    plain: tuple[str, ...] = ()
    videos: str = ""
    pixels: str = "pixel_values"
    original: bool = False
    encoder: bool = False
    means: bool = False
    reader: str = ""
    rotary: bool = False
    joins: str = ""
    count: str = ""
    side: int = 0
    by_row: bool = False
    newline: str = ""
    known: bool = True

    @property
    def merges_in_tower(self) -> bool:
        """Whether tokens can merge inside the tower's blocks."""
        return "tower" in self.places


ANYWHERE = (*IN_TOWER, "packed")
POOLED = "every frame's whole grid of patches is pooled behind the projector"


def behind(config: str, **settings: Any) -> FamilySpec:
    """A family that puts the visual tokens of every picture among the text itself, as many as the picture has."""
    reason = "what is between the tower and the LLM needs every patch"
    always = {"tiles": "features", "places": ("packed",), "projector": "model", "linear": 0}
    return FamilySpec(config, **{**always, "unsupported_reason": reason, **settings})


def _shuffled(config: str) -> FamilySpec:
    """A family whose projector joins squares of patches into one token (pixel shuffle), tile by tile."""
    return behind(
        config,
        tower="model.vision_model",
        projector="model.connector",
        language="model.text_model",
        select="full",
        last=True,
        linear=1,
        unsupported_reason="the projector joins neighbouring patches of the whole grid",
        joins="scale_factor",
        by_row=True,
    )


def _qwen(config: str) -> FamilySpec:
    """A family whose pictures keep their size, and whose tower ends in a merger of 2 x 2 patches."""
    return behind(config, tower="model.visual", joins="vision_config.spatial_merge_size", side=32)


_VIT = TowerSpec("layernorm_before", "attention", "layernorm_after", "mlp", ("dropout",), ("dropout",))
_DINO = TowerSpec("norm1", "attention", "norm2", "mlp", ("layer_scale1", "drop_path"), ("layer_scale2", "drop_path"))
_BLIP = TowerSpec(query="qkv", key="qkv", takes_mask=False)
TOWERS: dict[str, TowerSpec] = {  # key: class name of the encoder layer
    "CLIPEncoderLayer": TowerSpec(),
    "SiglipEncoderLayer": TowerSpec(class_tokens=0),
    "ViTLayer": _VIT,
    "DeiTLayer": replace(_VIT, class_tokens=2),
    "ViTMAELayer": _VIT,
    "Dinov2Layer": _DINO,
    "Dinov2WithRegistersLayer": _DINO,
    "DINOv3ViTLayer": _DINO,
    "BlipEncoderLayer": _BLIP,
    "Blip2EncoderLayer": _BLIP,
}
TOWER_OF_CONFIG = {"clip_vision_model": "CLIPEncoderLayer", "siglip_vision_model": "SiglipEncoderLayer"}

FAMILIES: dict[str, FamilySpec] = {  # key: class name of the model
    "LlavaForConditionalGeneration": FamilySpec("llava"),
    "VipLlavaForConditionalGeneration": FamilySpec("vipllava", select="default"),
    "PaliGemmaForConditionalGeneration": FamilySpec(
        "paligemma", select="full", last=True, linear=1, first_position=1, prefix=True
    ),
    "LlavaNextForConditionalGeneration": FamilySpec(
        "llava_next", tiles="anyres", places=ANYWHERE, newline="image_newline"
    ),
    "LlavaNextVideoForConditionalGeneration": FamilySpec(
        "llava_next_video",
        tiles="anyres",
        places=ANYWHERE,
        newline="image_newline",
        plain=("get_video_features",),
        videos=POOLED,
    ),
    "LlavaOnevisionForConditionalGeneration": behind(
        "llava_onevision",
        unsupported_reason="large pictures are scaled down on the whole grid",
        linear=2,
        videos=POOLED,
        newline="image_newline",
    ),
    "VideoLlavaForConditionalGeneration": FamilySpec(
        "video_llava",
        tower="model.image_tower",
        videos="they have a tower of their own, and one tower merges",
        pixels="pixel_values_images",
    ),
    "DeepseekVLForConditionalGeneration": FamilySpec(
        "deepseek_vl", tower="model.vision_model", projector="model.aligner", select="full", last=True
    ),
    "Idefics3ForConditionalGeneration": _shuffled("idefics3"),
    "SmolVLMForConditionalGeneration": _shuffled("smolvlm"),
    "Qwen2VLForConditionalGeneration": _qwen("qwen2_vl"),
    "Qwen2_5_VLForConditionalGeneration": _qwen("qwen2_5_vl"),
    "Qwen3VLForConditionalGeneration": _qwen("qwen3_vl"),
    "Qwen3VLMoeForConditionalGeneration": _qwen("qwen3_vl_moe"),
    "Qwen3_5ForConditionalGeneration": _qwen("qwen3_5"),
    "Qwen3_5MoeForConditionalGeneration": _qwen("qwen3_5_moe"),
    "Glm4vForConditionalGeneration": _qwen("glm4v"),
    "Glm4vMoeForConditionalGeneration": _qwen("glm4v_moe"),
    "Glm46VForConditionalGeneration": _qwen("glm46v"),
    "PaddleOCRVLForConditionalGeneration": _qwen("paddleocr_vl"),
    "InternVLForConditionalGeneration": behind("internvl", joins="downsample_ratio"),
    "Gemma3ForConditionalGeneration": behind("gemma3", count="mm_tokens_per_image"),
    "Gemma4ForConditionalGeneration": behind("gemma4", joins="vision_config.pooling_kernel_size", side=16),
    "Mistral3ForConditionalGeneration": behind("mistral3", joins="spatial_merge_size", side=32),
    "AyaVisionForConditionalGeneration": behind("aya_vision", joins="downsample_factor"),
    "Ovis2ForConditionalGeneration": behind("ovis2", joins="vision_config.hidden_stride"),
}
FAMILY_OF_CONFIG = {spec.config: name for name, spec in FAMILIES.items()}
LLAVA_PACKAGE = ("LlavaLlamaForCausalLM", "LlavaMistralForCausalLM")  # models of the original llava package
