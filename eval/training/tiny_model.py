"""The embedded model: a LLaVA with 24 x 24 visual tokens and a closed vocabulary, small enough to ship in a package."""

import math
from pathlib import Path

import torch
from torch import nn

from ..benchmark.questions import vocabulary
from ..benchmark.scenes import CANVAS, GRID, PATCH

SPECIAL = ("<pad>", "<unk>", "<s>", "</s>", "<image>")
PAD, UNK, BOS, EOS, IMAGE = range(len(SPECIAL))
PREFIX = ("<s>", "user:")  # what comes before the picture in every prompt
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}USER: "
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for item in message['content'] if item['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for item in message['content'] if item['type'] == 'text' %}{{ item['text'] }}{% endfor %}"
    "{% endif %} {% else %}ASSISTANT: "
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for item in message['content'] if item['type'] == 'text' %}{{ item['text'] }}{% endfor %}"
    "{% endif %} </s>{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def word_ids() -> dict[str, int]:
    """Token ids of the special tokens and of every word."""
    return {word: i for i, word in enumerate((*SPECIAL, *vocabulary()))}


def build_config(width: int = 128, depth: int = 7, mlp: int = 384, llm_layers: int = 4):
    """Configuration of the model; its image features leave the tower before the last block, as in LLaVA-1.5."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    vision = CLIPVisionConfig(
        hidden_size=width, intermediate_size=mlp, num_hidden_layers=depth, num_attention_heads=width // 64,
        image_size=CANVAS, patch_size=PATCH, hidden_act="quick_gelu", projection_dim=width,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=len(word_ids()), hidden_size=width, intermediate_size=mlp, num_hidden_layers=llm_layers,
        num_attention_heads=width // 32, num_key_value_heads=width // 32, max_position_embeddings=2048,
        bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD, tie_word_embeddings=False,
    )  # fmt: skip
    return LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=IMAGE, vision_feature_layer=-2,
        vision_feature_select_strategy="default", image_seq_length=GRID * GRID, projector_hidden_act="gelu",
        bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD, tie_word_embeddings=False,
    )  # fmt: skip


def build_model(seed: int = 0):
    """A freshly initialised model in float32."""
    from transformers import GenerationConfig, LlavaForConditionalGeneration

    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(build_config())
    _initialise_tower(vision_tower(model))
    model.generation_config = GenerationConfig(
        bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD, do_sample=False, max_new_tokens=4
    )
    return model


def vision_tower(model) -> nn.Module:
    """The module with embeddings and blocks; older releases of transformers keep it one level deeper."""
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
    embeddings = tower.embeddings
    embeddings.position_embedding.weight.zero_()
    embeddings.position_embedding.weight[1:] = _sincos(embeddings.position_embedding.weight.shape[1])
    for layer in tower.encoder.layers:
        attention = layer.self_attn
        width = attention.q_proj.weight.shape[0]
        shared = 0.7 * nn.init.orthogonal_(torch.empty(width, width))
        for projection in (attention.q_proj, attention.k_proj):
            projection.weight.copy_(shared + 0.02 * torch.randn(width, width))


def _sincos(width: int) -> torch.Tensor:
    """Positions (GRID * GRID, width): sines and cosines of column and row at rising frequencies."""
    frequencies = torch.logspace(math.log10(0.06), math.log10(2.0), width // 4)
    row, column = torch.meshgrid(torch.arange(GRID).float(), torch.arange(GRID).float(), indexing="ij")
    waves = [f(axis.reshape(-1, 1) * frequencies) for axis in (column, row) for f in (torch.sin, torch.cos)]
    return 0.5 * torch.cat(waves, 1)


def build_tokenizer():
    """Word-level tokenizer: case and punctuation do not matter, unknown words become ``<unk>``."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel(word_ids(), unk_token="<unk>"))
    core.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Replace(Regex("[?.,!]"), " "), normalizers.Replace("color", "colour")]
    )
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        extra_special_tokens={"image_token": "<image>"}, padding_side="left", model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def build_processor():
    """LLaVA's ordinary processor around the tokenizer, with an image processor that needs numpy and Pillow only."""
    from transformers import LlavaProcessor

    return LlavaProcessor(
        image_processor=_image_processor_class()(
            do_resize=True, size={"height": CANVAS, "width": CANVAS}, do_center_crop=False, do_rescale=True,
            do_normalize=True, image_mean=[0.5] * 3, image_std=[0.5] * 3, do_convert_rgb=True,
        ),
        tokenizer=build_tokenizer(), patch_size=PATCH, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, image_token="<image>", chat_template=CHAT_TEMPLATE,
    )  # fmt: skip


def _image_processor_class():
    """CLIP's image processor without torchvision; the name changed between releases of transformers."""
    import transformers

    return getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor


def save_release(model, folder: Path) -> None:
    """Write configuration, half-precision weights, tokenizer and processor into `folder`."""
    model.to(torch.float16).save_pretrained(folder)
    build_processor().save_pretrained(folder)
