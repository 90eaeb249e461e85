"""Families that put pictures of any size among the text themselves: shrunken models with their own processors.

Weights are random but fixed, as in `families`. All releases of transformers that are tested have all of these classes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from inspect import signature
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
import transformers
from families import Family, Nested, pictures_only, without
from models import IMAGE, PATCH, VOCABULARY, text_config, tokenizer
from PIL import Image
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.gemma4 import image_processing_pil_gemma4 as gemma4
from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil
from transformers.models.glm46v.image_processing_pil_glm46v import Glm46VImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.ovis2.image_processing_pil_ovis2 import Ovis2ImageProcessorPil
from transformers.models.paddleocr_vl.image_processing_pil_paddleocr_vl import PaddleOCRVLImageProcessorPil
from transformers.models.pixtral import image_processing_pil_pixtral as pixtral
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

TILE = 32  # pixels on the side of a tile, or of pictures that all have one size: 8 x 8 patches
TOKENS = (TILE // PATCH // 2) ** 2  # where squares of 2 x 2 patches are one token
WIDTH = 64
MARKS = (
    *("<start>", "<end>", "<break>", "<video>", "<audio>", "<patch>", "TILE", "TILE_GLOBAL"),
    *("<IMG_START>", "<IMG_END>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_ATOM>"),
    *("<|begin_of_video|>", "<|end_of_video|>"),
)
WORDS = (*VOCABULARY, *MARKS)
ID = {word: number for number, word in enumerate(WORDS)}
NAMED = {  # what processors ask a tokenizer for
    "image_token": "<image>",
    "video_token": "<video>",
    **dict.fromkeys(("audio_token", "boa_token", "eoa_token"), "<audio>"),
    "context_image_token": "<image>",
    **dict.fromkeys(("boi_token", "start_image_token", "vision_start_token"), "<start>"),
    **dict.fromkeys(("eoi_token", "end_image_token", "vision_end_token"), "<end>"),
}
FRAMED = "<start><image><end>"
JOINED, ONE_BY_ONE = ("<start>", "<image>", "<end>"), ("", FRAMED, "")  # the frames of a video
MARKED = ("<|begin_of_video|>", FRAMED, "<|end_of_video|>")

TEMPLATE = (
    "{% for turn in messages %}{{ 'USER: ' if turn.role == 'user' else ' ' }}{% for part in turn.content %}"
    "{{ 'MARK ' if part.type == 'image' else part.text }}{% endfor %}{% endfor %} ASSISTANT:"
)


@dataclass(frozen=True)
class Packed(Family):
    """A row of families that merge behind the projector.

    ``mark`` stands for a picture in the text; what stands before, for every frame of, and behind a video is ``clip``.
    """

    wheres: tuple[str, ...] = ("packed",)
    mark: str = "<image>"
    clip: tuple[str, str, str] | None = None

    def build(self, seed: int = 1, **changes: Any) -> Any:
        model = super().build(seed, **changes)
        model.set_experts_implementation("eager")  # the others take no double precision
        model.lm_head.weight.data[len(VOCABULARY) :] = 0  # a model that says <image> breaks its own prompt
        return model

    @property
    def constant(self) -> bool:
        return False

    def seen(self, model: Any) -> set[str]:
        """The inputs that its core encodes pictures from."""
        return {*signature(model.model.get_image_features).parameters, "image_sizes"}  # which 5.17 does not name

    def full(self, plain: Any, inputs: Any) -> list[int]:
        given = {name: value for name, value in inputs.items() if name in self.seen(plain)}
        return [len(f) for f in plain.model.get_image_features(**given, return_dict=True).pooler_output]

    def kept(self, full: list[int], keep: int) -> list[int]:
        return [max(1, round(n / 4)) for n in full]

    def breaks(self, inputs: Any) -> int:
        return int((inputs["input_ids"] == ID["<break>"]).sum())

    def process(self, rows: Any, side: str = "left") -> Any:
        return super().process([(text.replace("<image>", self.mark), pictures) for text, pictures in rows], side)

    @property
    def mixes(self) -> bool:
        """Whether a prompt may have a video and pictures: not where both have the same placeholders."""
        return self.clip is not None and self.clip != MARKED

    def film(self, frames: list[Image.Image], *after: Image.Image) -> dict[str, Any]:
        """A prompt with a video and the pictures ``after`` it, as processors make them that need torchvision."""
        before, frame, behind = self.clip
        pictures = "".join(f" and {self.mark}" for _ in after)
        text = f"USER: {before}{len(frames) * frame}{behind}{pictures} what is this? ASSISTANT:"
        made = dict(super().process([(text, [*frames, *after])]))
        grids, types = made.pop("image_grid_thw", None), made["mm_token_type_ids"]
        names = {"pixel_values": "pixel_values_videos"}
        if grids is None:
            cut, names["image_position_ids"] = len(frames), "video_position_ids"
            made["num_frames_per_video"] = torch.tensor([len(frames)])
        else:
            cut = int(grids[: len(frames)].prod(1).sum())
            made["video_grid_thw"] = grids[:1] * torch.tensor([len(frames), 1, 1])
        for image, video in names.items():
            both = made.pop(image)
            made |= {video: both[:cut]} | ({image: both[cut:]} if after else {})
        if grids is not None and after:
            made["image_grid_thw"] = grids[len(frames) :]
        if grids is None and "num_frames_per_video" not in signature(self.cls.forward).parameters:  # 5.17
            made.pop("num_frames_per_video")
            made |= {name: made[name][None] for name in names.values()}
        tokens = cut // 4 if grids is not None else int((types != 0).sum()) * cut // (cut + len(after))
        film = (types != 0) & ((types != 0).cumsum(1) <= tokens)
        if self.mixes:
            made["input_ids"] = made["input_ids"].masked_fill(film, ID["<video>"])
        return {**made, "mm_token_type_ids": types.masked_fill(film, 2)}

    def raw(self, side: str = "left") -> Any:
        """The tokenizer, with the names of its marks."""
        made = tokenizer(side, MARKS)
        for name, token in NAMED.items():
            setattr(made, name, token)
            setattr(made, f"{name}_id", ID[token])
        return made

    def chat(self) -> Any:
        """The processor of a chat, whose template frames pictures as the model was trained on them."""
        made = self.processor(self.raw())
        made = getattr(made, "processor", made)
        made.chat_template = TEMPLATE.replace("MARK", self.mark)
        return made


def text(kind: str, **options: Any) -> Any:
    return text_config(kind, **{"vocab_size": len(WORDS), "tie_word_embeddings": False, **options})


def tower(kind: str, **options: Any) -> Any:
    """The configuration of a small vision tower, of which each kind of model names its parts otherwise."""
    settings = dict(
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=TILE,
        patch_size=PATCH,
    )
    return getattr(transformers, kind)(**{**settings, **options})


def whole(kind: str, vision: Callable[[], Any], llm: Callable[[], Any], **options: Any) -> Callable[[], Any]:
    """A function that makes the configuration of a model."""

    def make() -> Any:
        settings = dict(image_token_id=IMAGE, attn_implementation="sdpa", tie_word_embeddings=False)
        return getattr(transformers, kind)(vision_config=vision(), text_config=llm(), **{**settings, **options})

    return make


def grids(
    title: str,
    kind: str,
    sections: list[int],
    llm: dict[str, Any] | None = None,
    *,
    parts: str = "",
    processor: str = "Qwen3VLProcessor",
    images: type = Qwen2VLImageProcessorPil,
    clip: tuple[str, str, str] | None = ONE_BY_ONE,
    **vision: Any,
) -> Packed:
    """A model with M-RoPE of these ``sections`` whose tower takes grids of any size and joins 2 x 2 patches.

    Its configuration is of this ``kind``, that of its ``parts`` maybe of another; a picture has 16 to 64 tokens.
    """
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": sections, **(llm or {}).get("rope", {})}
    options = {name: value for name, value in (llm or {}).items() if name != "rope"}
    marks = {f"{name}_{end}_token_id": ID[f"<{end}>"] for name in ("vision", "image") for end in ("start", "end")}
    config = whole(
        f"{kind}Config",
        lambda: tower(f"{parts or kind}VisionConfig", out_hidden_size=WIDTH, spatial_merge_size=2, **vision),
        lambda: text(f"{parts or kind}TextConfig", rope_parameters=dict(rope), **options),
        video_token_id=ID["<video>"],
        **marks,
    )

    def processes(raw: Any) -> Any:
        sizes = {"shortest_edge": 16 * (2 * PATCH) ** 2, "longest_edge": 64 * (2 * PATCH) ** 2}
        return pictures_only(processor)(images(patch_size=PATCH, merge_size=2, size=sizes), raw, None)

    return Packed(title, f"{kind}ForConditionalGeneration", config, processes, mark=FRAMED, clip=clip)


def internvl_processor(raw: Any) -> Any:
    images = GotOcr2ImageProcessorPil(size={"height": TILE, "width": TILE}, max_patches=4)
    return pictures_only("InternVLProcessor")(images, raw, None, image_seq_length=TOKENS)


def aya_processor(raw: Any) -> Any:
    images = GotOcr2ImageProcessorPil(size={"height": TILE, "width": TILE}, max_patches=4)
    sizes = dict(patch_size=PATCH, img_size=TILE, downsample_factor=2)
    return transformers.AyaVisionProcessor(images, raw, img_patch_token="<patch>", **sizes)


def ovis_processor(raw: Any) -> Any:
    images = Ovis2ImageProcessorPil(size={"height": TILE, "width": TILE}, crop_to_patches=True, max_patches=4)
    return transformers.Ovis2Processor(images, raw, image_seq_length=TOKENS)


def gemma3_processor(raw: Any) -> Any:
    raw.image_token, raw.image_token_id = "<patch>", ID["<patch>"]
    raw.boi_token, raw.boi_token_id = "<image>", IMAGE
    images = Gemma3ImageProcessorPil(size={"height": TILE, "width": TILE})
    return Nested(transformers.Gemma3Processor(images, raw, image_seq_length=TOKENS))


def gemma4_processor(raw: Any) -> Any:
    images = gemma4.Gemma4ImageProcessorPil(patch_size=2 * PATCH, pooling_kernel_size=2, max_soft_tokens=70)
    return Nested(without(beside("Gemma4Processor", gemma4))(None, images, raw, None))


def pixtral_processor(merge: int) -> Callable[[Any], Any]:
    """A processor of models that join ``merge`` x ``merge`` patches."""

    def make(raw: Any) -> Any:
        images = pixtral.PixtralImageProcessorPil(size={"longest_edge": 24 * merge}, patch_size=PATCH)
        marks = dict(image_token="<image>", image_break_token="<break>", image_end_token="<end>")
        own = without(beside("PixtralProcessor", pixtral))
        return own(images, raw, patch_size=PATCH, spatial_merge_size=merge, **marks)

    return make


def beside(processor: str, images: ModuleType) -> type:
    """A processor's class whose module takes functions from a module that needs torchvision: here from ``images``."""
    folder, _, name = images.__name__.rpartition(".")
    with patch.dict(sys.modules, {f"{folder}.{name.replace('_pil', '')}": images}):
        return getattr(import_module(f"{folder}.{name.replace('image_processing_pil', 'processing')}"), processor)


def pixtral_tower() -> Any:
    return tower("PixtralVisionConfig", image_size=64)


GENERATION = "ForConditionalGeneration"
QWEN35 = dict(rope=dict(partial_rotary_factor=0.5), head_dim=32, layer_types=["linear_attention", "full_attention"])
QWEN35 |= dict(linear_key_head_dim=16, linear_value_head_dim=4, linear_num_key_heads=2, linear_num_value_heads=32)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=WIDTH, shared_expert_intermediate_size=WIDTH)
GLM = {"rope": {"partial_rotary_factor": 0.5}}
ROUTED = {"num_experts_per_tok": 2, "n_routed_experts": 4, "moe_intermediate_size": WIDTH}
PLACES = {"num_position_embeddings": 64}  # of the tower, which it interpolates
DEEP = {"deepstack_visual_indexes": [0, 1], **PLACES}
PADDLE = {"processor": "PaddleOCRVLProcessor", "images": PaddleOCRVLImageProcessorPil}
GLM4V = {"processor": "Glm4vProcessor", "images": Glm4vImageProcessorPil, "clip": MARKED}
GLM46V = {"processor": "Glm46VProcessor", "images": Glm46VImageProcessorPil, "clip": MARKED}
PACKED = (
    grids("Qwen2-VL", "Qwen2VL", [4, 6, 6], processor="Qwen2VLProcessor", clip=JOINED, embed_dim=WIDTH),
    grids(
        "Qwen2.5-VL",
        "Qwen2_5_VL",
        [4, 6, 6],
        processor="Qwen2_5_VLProcessor",
        clip=JOINED,
        window_size=16,
        fullatt_block_indexes=[1],
    ),
    grids("Qwen3-VL", "Qwen3VL", [6, 5, 5], {"head_dim": 32}, **DEEP),
    grids("Qwen3-VL, mixture of experts", "Qwen3VLMoe", [6, 5, 5], {"head_dim": 32, **EXPERTS}, **DEEP),
    grids("Qwen3.5", "Qwen3_5", [3, 3, 2], QWEN35, **PLACES),
    grids("Qwen3.5, mixture of experts", "Qwen3_5Moe", [3, 3, 2], {**QWEN35, **EXPERTS}, **PLACES),
    grids("GLM-4.1V", "Glm4v", [2, 3, 3], GLM, **GLM4V),
    grids("GLM-4.5V", "Glm4vMoe", [2, 3, 3], {**GLM, **ROUTED}, **GLM4V),
    grids("GLM-4.6V", "Glm46V", [2, 3, 3], GLM, parts="Glm4v", **GLM46V),
    grids("PaddleOCR-VL", "PaddleOCRVL", [4, 6, 6], {"head_dim": 32}, parts="PaddleOCR", clip=None, **PADDLE),
    Packed(
        "InternVL",
        f"InternVL{GENERATION}",
        whole("InternVLConfig", lambda: tower("InternVLVisionConfig"), lambda: text("Qwen2Config")),
        internvl_processor,
        unit="tile",
    ),
    Packed(
        "Gemma 3",
        f"Gemma3{GENERATION}",
        whole(
            "Gemma3Config",
            lambda: tower("SiglipVisionConfig", vision_use_head=False),
            lambda: text(
                "Gemma3TextConfig",
                head_dim=32,
                query_pre_attn_scalar=32,
                sliding_window=24,
                layer_types=["sliding_attention", "full_attention"],
            ),
            image_token_id=ID["<patch>"],
            boi_token_id=IMAGE,
            eoi_token_id=ID["<end>"],
            mm_tokens_per_image=TOKENS,
        ),
        gemma3_processor,
        placeholder=ID["<patch>"],
    ),
    Packed(
        "Gemma 4",
        f"Gemma4{GENERATION}",
        whole(
            "Gemma4Config",
            lambda: tower(
                "Gemma4VisionConfig", patch_size=2 * PATCH, head_dim=32, num_key_value_heads=2, pooling_kernel_size=2
            ),
            lambda: text(
                "Gemma4TextConfig",
                head_dim=32,
                sliding_window=24,
                layer_types=["sliding_attention", "full_attention"],
                use_bidirectional_attention="vision",
                vocab_size_per_layer_input=len(WORDS),
                hidden_size_per_layer_input=WIDTH,
            ),
            audio_config=None,
            boi_token_id=ID["<start>"],
            eoi_token_id=ID["<end>"],
            video_token_id=ID["<video>"],
        ),
        gemma4_processor,
        clip=("", "<image>", ""),
    ),
    Packed(
        "Mistral Small (Mistral 3)",
        f"Mistral3{GENERATION}",
        whole("Mistral3Config", pixtral_tower, lambda: text("MistralConfig"), spatial_merge_size=2),
        pixtral_processor(2),
    ),
    Packed(
        "Pixtral",
        f"Llava{GENERATION}",
        whole(
            "LlavaConfig",
            pixtral_tower,
            lambda: text("MistralConfig"),
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
        ),
        pixtral_processor(1),
    ),
    Packed(
        "Aya Vision",
        f"AyaVision{GENERATION}",
        whole(
            "AyaVisionConfig",
            lambda: tower("SiglipVisionConfig", vision_use_head=False),
            lambda: text("Cohere2Config"),
            image_token_id=ID["<patch>"],
            alignment_intermediate_size=2 * WIDTH,
        ),
        aya_processor,
        unit="tile",
        bits="4 bit; with 8 the plain model fails on a processor",
        placeholder=ID["<patch>"],
    ),
    Packed(
        "Ovis2",
        f"Ovis2{GENERATION}",
        whole(
            "Ovis2Config",
            lambda: tower(
                "Ovis2VisionConfig", hidden_stride=2, vocab_size=32 + 5, qkv_bias=True, num_visual_indicator_tokens=5
            ),
            lambda: text("Qwen2Config"),
            image_token_id=ID["<IMG_ATOM>"],
            visual_indicator_token_ids=[ID[f"<IMG_{name}>"] for name in ("START", "END", "GRID", "COL", "ROW")],
            vocab_size=len(WORDS),
            hidden_size=WIDTH,
        ),
        ovis_processor,
        unit="tile",
        placeholder=ID["<IMG_ATOM>"],
    ),
)
