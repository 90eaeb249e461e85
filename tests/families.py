"""One row per family of models: a shrunken real configuration, its ordinary processor, and what merging saves in it.

The table of docs/families.md is generated from these rows. Weights are random but fixed, as in `models`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import transformers
from models import IMAGE, PAD, PATCH, picture, scale_weights, text_config, tokenizer
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.deepseek_vl.image_processing_pil_deepseek_vl import DeepseekVLImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

SIDE = 48  # pixels: 12 x 12 patches
FEATURE_LAYERS = next(  # the name before transformers 5.18, and after it
    name for name in ("vision_feature_layers", "vision_feature_layer") if hasattr(transformers.VipLlavaConfig(), name)
)
PATCHES = (SIDE // PATCH) ** 2
WIDTH = 64
LAYERS = 6
QUESTIONS = (
    "USER: <image> what colour is the star ASSISTANT:",
    "USER: tell me how many big red digit are in the <image> picture here? ASSISTANT:",
)
TWO_PICTURES = "USER: <image> <image> what is there in this picture and that one? ASSISTANT:"
NO_PICTURE = "USER: how many are there ASSISTANT:"
VIDEO = 3  # the id of video placeholders, which no text holds
ADD_ONE = ("GemmaRMSNorm", "Gemma2RMSNorm", "Gemma3RMSNorm", "Qwen3_5RMSNorm")  # norms that add one to their weight
PINPOINTS = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE], [3 * SIDE, SIDE], [SIDE, 3 * SIDE]]
SIZES = ((48, 48), (150, 60), (40, 90), (100, 100))  # width and height of the pictures


@dataclass(frozen=True)
class Family:
    """A row.

    Attributes
    ----------
    title : what the page calls it.
    model : name of the model's class.
    config : the name of its configuration's class, and a function that gives the keywords.
    processor : makes the processor from a tokenizer.
    wheres : places where it merges, the first one by default.
    tokens : visual tokens of a picture, or of a tile.
    sized : inputs that say how many tokens a picture has where pictures differ in that.
    pixels : what the processor calls pictures.
    answers : the token type of what is generated.
    unit : what ``keep`` counts the tokens of.
    bits : whether it runs with 4 and 8 bits.
    placeholder : the id of a visual token in the prompt.
    """

    title: str
    model: str
    config: Callable[[], Any]
    processor: Callable[[Any], Any]
    wheres: tuple[str, ...] = ("tower", "projector", "both")
    tokens: int = PATCHES
    sized: tuple[str, ...] = ()
    pixels: str = "pixel_values"
    answers: int = 0
    unit: str = "picture"
    bits: str = "yes"
    placeholder: int = IMAGE

    @property
    def constant(self) -> bool:
        """Whether all pictures have as many visual tokens."""
        return not self.sized

    @property
    def cls(self) -> Any:
        return getattr(transformers, self.model)

    def full(self, plain: Any, inputs: Any) -> list[int]:
        """Visual tokens of every picture in the plain model."""
        ids = inputs["input_ids"]
        if self.constant:
            return [self.tokens] * (int((ids == IMAGE).sum()) // self.tokens)
        features = plain.model.get_image_features(**{k: inputs[k] for k in self.sized}, return_dict=True).pooler_output
        return [len(f) for f in features]

    def kept(self, full: list[int], keep: int) -> list[int] | None:
        """How many of them are left of every picture; None where that depends on what the pictures show."""
        return [keep] * len(full) if self.constant else None

    def breaks(self, inputs: Any) -> int:
        """Tokens of the text between those of a picture, which go with them."""
        return 0

    def build(self, seed: int = 1, **changes: Any) -> Any:
        """A model with fixed random weights; equal arguments give identical twins."""
        settings = self.config()
        for name, value in changes.items():
            setattr(settings, name, value)
        model = self.cls(settings)
        scale_weights(model, seed)
        for module in model.modules():
            if type(module).__name__ in ADD_ONE:
                module.weight.data -= 1
        model.generation_config.pad_token_id = PAD
        return model.double().eval()

    def raw(self, side: str = "left") -> Any:
        """The tokenizer of the processor."""
        return tokenizer(side)

    def process(self, rows: list[tuple[str, list[Image.Image]]], side: str = "left") -> Any:
        """Model inputs of a batch: per row its text and its pictures."""
        made = self.processor(self.raw(side))
        images = [row for _, row in rows]
        if not any(images):
            images = None
        elif not getattr(made, "nested", False):
            images = [image for row in images for image in row]
        return made(images=images, text=[text for text, _ in rows], padding=True, return_tensors="pt")


def pictures(*numbers: int) -> list[Image.Image]:
    """Textured pictures of different sizes."""
    return [picture(n).resize(SIZES[n % len(SIZES)], Image.Resampling.BICUBIC) for n in numbers]


def vision(kind: str, **options: Any) -> Any:
    """The configuration of a small tower."""
    settings = dict(
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=PATCH,
    )
    return getattr(transformers, kind)(**{**settings, **options})


def clip() -> Any:
    return vision("CLIPVisionConfig", projection_dim=WIDTH)


def siglip(**options: Any) -> Any:
    return vision("SiglipVisionConfig", vision_use_head=False, **options)


def config(kind: str, tower: Callable[[], Any], llm: Any, **options: Any) -> Callable[[], Any]:
    """A function that makes the configuration of a whole model."""

    def make() -> Any:
        return getattr(transformers, kind)(
            vision_config=tower(), text_config=llm(), image_token_id=IMAGE, attn_implementation="sdpa", **options
        )

    return make


def llm(kind: str, **options: Any) -> Callable[[], Any]:
    return lambda: text_config(kind, **options)


def clip_pictures() -> Any:
    return CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})


def llava_processor(raw: Any) -> Any:
    return transformers.LlavaProcessor(
        clip_pictures(), raw, patch_size=PATCH, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )


def next_processor(raw: Any) -> Any:
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, image_grid_pinpoints=PINPOINTS
    )
    return transformers.LlavaNextProcessor(
        images, raw, patch_size=PATCH, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )


def pictures_only(processor: str) -> type:
    """A processor's class that takes no video processor, which does not exist without torchvision."""
    return without(getattr(transformers, processor))


def without(base: type) -> type:
    """A processor's class that takes None for a part of it."""

    def check(self: Any, name: str, argument: Any) -> Any:
        return None if argument is None else base.check_argument_for_proper_class(self, name, argument)

    return type(base.__name__, (base,), {"check_argument_for_proper_class": check})


def next_video_processor(raw: Any) -> Any:
    made = next_processor(raw)
    return pictures_only("LlavaNextVideoProcessor")(
        video_processor=None,
        image_processor=made.image_processor,
        tokenizer=raw,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def onevision_processor(raw: Any) -> Any:
    images = LlavaOnevisionImageProcessorPil(size={"height": SIDE, "width": SIDE}, image_grid_pinpoints=PINPOINTS)
    made = pictures_only("LlavaOnevisionProcessor")(
        images,
        raw,
        None,
        num_image_tokens=PATCHES,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_2",  # so that large pictures are scaled down
    )
    return Nested(made)


def video_llava_processor(raw: Any) -> Any:
    from transformers.models.video_llava.image_processing_video_llava import VideoLlavaImageProcessor

    images = VideoLlavaImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    return pictures_only("VideoLlavaProcessor")(
        images, None, raw, patch_size=PATCH, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )


def idefics3_processor(raw: Any) -> Any:
    sizes = {"size": {"longest_edge": 2 * SIDE}, "max_image_size": {"longest_edge": SIDE}}
    return Nested(transformers.Idefics3Processor(Idefics3ImageProcessorPil(**sizes), raw, image_seq_len=PATCHES // 4))


def smolvlm_processor(raw: Any) -> Any:
    sizes = {"size": {"longest_edge": 2 * SIDE}, "max_image_size": {"longest_edge": SIDE}}
    made = pictures_only("SmolVLMProcessor")(SmolVLMImageProcessorPil(**sizes), raw, None, image_seq_len=PATCHES // 4)
    return Nested(made)


def deepseek_processor(raw: Any) -> Any:
    raw.image_token, raw.image_token_id = "<image>", IMAGE
    images = DeepseekVLImageProcessorPil(size={"height": SIDE, "width": SIDE}, min_size=SIDE)
    return transformers.DeepseekVLProcessor(images, raw, num_image_tokens=PATCHES)


def paligemma_processor(raw: Any) -> Any:
    images = SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE})
    images.image_seq_length = PATCHES
    made = transformers.PaliGemmaProcessor(images, raw)
    return Nested(made)


class Nested:
    """A processor that wants its pictures row by row."""

    nested = True

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, images: Any, text: list[str], **options: Any) -> Any:
        return self.processor(images=images, text=text, **options)


def llava(title: str, kind: str, **options: Any) -> Family:
    """LLaVA-1.5 with an LLM of ``kind`` behind it."""
    made = config("LlavaConfig", clip, llm(kind, **options), vision_feature_layer=-2)
    return Family(title, "LlavaForConditionalGeneration", made, llava_processor)


FAMILIES = (
    llava("LLaVA-1.5", "LlamaConfig"),
    llava("BakLLaVA (LLaVA-1.5 with Mistral)", "MistralConfig"),
    llava("LLaVA-1.5 with Qwen2", "Qwen2Config"),
    llava("LLaVA-1.5 with Gemma", "GemmaConfig", head_dim=WIDTH // 2),
    Family(
        "VipLLaVA",
        "VipLlavaForConditionalGeneration",
        config("VipLlavaConfig", clip, llm("LlamaConfig"), **{FEATURE_LAYERS: [-2, -3, -5, 1]}),
        llava_processor,
    ),
    Family(
        "PaliGemma",
        "PaliGemmaForConditionalGeneration",
        config(
            "PaliGemmaConfig",
            lambda: siglip(projection_dim=WIDTH),
            llm("GemmaConfig", head_dim=WIDTH // 2),
            projection_dim=WIDTH,
            hidden_size=WIDTH,
        ),
        paligemma_processor,
        answers=1,
    ),
    Family(
        "LLaVA-NeXT (1.6)",
        "LlavaNextForConditionalGeneration",
        config("LlavaNextConfig", clip, llm("LlamaConfig"), vision_feature_layer=-2, image_grid_pinpoints=PINPOINTS),
        next_processor,
        ("tower", "projector", "both", "packed"),
        unit="tile; packed: picture",
        sized=("pixel_values", "image_sizes"),
    ),
    Family(
        "LLaVA-NeXT-Video",
        "LlavaNextVideoForConditionalGeneration",
        config(
            "LlavaNextVideoConfig",
            clip,
            llm("LlamaConfig"),
            vision_feature_layer=-2,
            image_grid_pinpoints=PINPOINTS,
            video_token_id=VIDEO,
        ),
        next_video_processor,
        ("tower", "projector", "both", "packed"),
        unit="tile; packed: picture",
        sized=("pixel_values", "image_sizes"),
    ),
    Family(
        "LLaVA-OneVision",
        "LlavaOnevisionForConditionalGeneration",
        config(
            "LlavaOnevisionConfig",
            siglip,
            llm("Qwen2Config"),
            image_grid_pinpoints=PINPOINTS,
            vision_aspect_ratio="anyres_max_2",
            video_token_id=VIDEO,
        ),
        onevision_processor,
        ("packed",),
        sized=("pixel_values", "image_sizes", "batch_num_images"),
    ),
    Family(
        "Video-LLaVA",
        "VideoLlavaForConditionalGeneration",
        config("VideoLlavaConfig", clip, llm("LlamaConfig"), vision_feature_layer=-2, video_token_id=VIDEO),
        video_llava_processor,
        pixels="pixel_values_images",
    ),
    Family(
        "Idefics3",
        "Idefics3ForConditionalGeneration",
        config(
            "Idefics3Config", lambda: vision("Idefics3VisionConfig"), llm("LlamaConfig", vocab_size=80), scale_factor=2
        ),
        idefics3_processor,
        ("packed",),
        unit="tile",
        tokens=PATCHES // 4,
    ),
    Family(
        "SmolVLM",
        "SmolVLMForConditionalGeneration",
        config("SmolVLMConfig", lambda: vision("SmolVLMVisionConfig"), llm("LlamaConfig"), scale_factor=2),
        smolvlm_processor,
        ("packed",),
        unit="tile",
        tokens=PATCHES // 4,
    ),
    Family(
        "DeepSeek-VL",
        "DeepseekVLForConditionalGeneration",
        config("DeepseekVLConfig", siglip, llm("LlamaConfig")),
        deepseek_processor,
    ),
)
BY_TITLE = {family.title: family for family in FAMILIES}
