"""Models of the original llava package with random weights: the published configurations, made small."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from llava.mm_utils import process_images
from llava.model import LlavaConfig, LlavaLlamaForCausalLM, LlavaMistralConfig, LlavaMistralForCausalLM
from PIL import Image

IMAGE = -200
SIDE, PATCH, WIDTH, BLOCKS = 48, 4, 64, 6
PATCHES = (SIDE // PATCH) ** 2
SIZES = ((48, 48), (150, 60), (40, 90), (100, 100))  # width and height of the pictures
PINPOINTS = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE], [3 * SIDE, SIDE], [SIDE, 3 * SIDE]]
SQUARE = {"mm_patch_merge_type": "flat", "image_aspect_ratio": "pad"}  # as liuhaotian/llava-v1.5-7b
ANYRES = {  # as liuhaotian/llava-v1.6-vicuna-7b
    "mm_patch_merge_type": "spatial_unpad",
    "image_aspect_ratio": "anyres",
    "image_grid_pinpoints": PINPOINTS,
}
SPATIAL = {**ANYRES, "mm_patch_merge_type": "spatial"}
LAYOUTS = {"square": SQUARE, "anyres": ANYRES, "spatial": SPATIAL}
CORPUS = "USER ASSISTANT what is in this picture and how many big red stars are there in that one ? : . , a b c d e f"


def tower_files(folder: Path) -> Path:
    """A CLIP vision tower and its image processor, as openai/clip-vit-large-patch14-336 has them."""
    torch.manual_seed(0)
    config = transformers.CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=BLOCKS,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=PATCH,
        projection_dim=WIDTH,
    )
    tower = transformers.CLIPVisionModel(config)
    for weight in tower.parameters():
        weight.data.mul_(4)  # so that tokens differ
    tower.save_pretrained(folder)
    processor = transformers.CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    processor.save_pretrained(folder)
    return folder


def tokenizer_files(folder: Path) -> Path:
    """A sentencepiece tokenizer, as LLaMA has it."""
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([CORPUS] * 20), model_prefix=str(folder / "tokenizer"), vocab_size=40, minloglevel=2
    )
    transformers.LlamaTokenizer(str(folder / "tokenizer.model"), legacy=False).save_pretrained(folder)
    return folder


def build(tower: Path, layout: str = "square", llm: str = "llama", **changes: Any) -> Any:
    """A model with its tower loaded; equal arguments give identical twins."""
    config, cls = {
        "llama": (LlavaConfig, LlavaLlamaForCausalLM),
        "mistral": (LlavaMistralConfig, LlavaMistralForCausalLM),
    }[llm]
    settings = dict(
        vocab_size=64,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        pad_token_id=0,
        mm_vision_tower=str(tower),
        mm_projector_type="mlp2x_gelu",
        mm_hidden_size=WIDTH,
        mm_vision_select_layer=-2,
        mm_vision_select_feature="patch",
        mm_use_im_start_end=False,
        mm_use_im_patch_token=False,
        tokenizer_padding_side="right",
        tokenizer_model_max_length=2048,
    )
    torch.manual_seed(1)
    model = cls(config(**{**settings, **LAYOUTS[layout], **changes}))
    for weight in model.get_model().mm_projector.parameters():
        weight.data.mul_(4)
    if hasattr(model.model, "image_newline"):  # the package leaves it uninitialised
        model.model.image_newline.data.normal_()
    model.get_vision_tower().load_model()
    model.generation_config.pad_token_id = 0
    return model.eval()


def picture(number: int) -> Image.Image:
    """A picture of coloured rectangles and noise."""
    rng = np.random.default_rng(number)
    width, height = SIZES[number % len(SIZES)]
    pixels = rng.integers(0, 60, (height, width, 3))
    for _ in range(6):
        x, y = rng.integers(0, width - 8), rng.integers(0, height - 8)
        pixels[y : y + rng.integers(4, 30), x : x + rng.integers(4, 30)] = rng.integers(80, 255, 3)
    return Image.fromarray(pixels.astype(np.uint8))


def inputs(model: Any, numbers: list[int], rows: list[list[int]]) -> dict[str, Any]:
    """What forward() takes: pictures by number, and rows of ids padded on the right."""
    pictures = [picture(number) for number in numbers]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    images = process_images(pictures, model.get_vision_tower().image_processor, model.config)
    return {"input_ids": ids, "attention_mask": mask, "images": images, "image_sizes": [p.size for p in pictures]}


def lengths(model: Any, given: dict[str, Any]) -> list[int]:
    """Tokens of every row of the prompt that the LLM gets."""
    _, _, mask, _, _, _ = model.prepare_inputs_labels_for_multimodal(
        given["input_ids"], None, given["attention_mask"], None, None, given["images"], given["image_sizes"]
    )
    return mask.sum(1).tolist()
