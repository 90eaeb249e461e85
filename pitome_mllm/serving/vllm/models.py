"""LLaVA-1.5 and LLaVA-NeXT for vLLM's registry, whose images come with fewer tokens."""

# ruff: noqa: E402
from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import regex
import torch
from torch import Tensor

from . import versions

versions.check()

from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.models import clip, siglip
from vllm.model_executor.models.interfaces import SupportsEncoderCudaGraph
from vllm.model_executor.models.llava import (
    LlavaDummyInputsBuilder,
    LlavaForConditionalGeneration,
    LlavaMultiModalProcessor,
    LlavaProcessingInfo,
)
from vllm.model_executor.models.llava_next import (
    LlavaNextForConditionalGeneration,
    LlavaNextMultiModalProcessor,
    LlavaNextProcessingInfo,
)
from vllm.model_executor.models.utils import WeightsMapper, scatter_output_slices
from vllm.model_executor.models.vision import is_vit_use_data_parallel
from vllm.multimodal import MULTIMODAL_REGISTRY

from ...hooks.packed import merge_pictures
from ...plan import Plan
from . import processing, tower
from .graphs import EncoderGraphs
from .processing import KEEP, places_of, tiles_of
from .spec import check_defaults, plan_of

# Checkpoints that transformers 5 saved have no ``vision_model`` in the names of a tower's weights.
SAVED_BY_5 = WeightsMapper(
    orig_to_new_regex={
        regex.compile(r"^(model\.)?vision_tower\.(?=embeddings|encoder|pre_layrnorm|post_layernorm|head)"): (
            "vision_tower.vision_model."
        )
    }
)


class _Merged:
    """A model that merges; before vLLM's own class."""

    supports_tower_connector_lora = False  # vLLM wants to know which token is whose in every layer of the tower

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        plan = plan_of(vllm_config.model_config.hf_config)
        check_defaults(vllm_config.model_config.multimodal_config.mm_processor_kwargs or {})
        tower.check_ranks(plan, 1 if is_vit_use_data_parallel() else get_tensor_model_parallel_world_size())
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.plan = plan
        # The scheduler charges an image its tokens after merging, so that too many of them may come at once.
        self.at_once = max(1, vllm_config.scheduler_config.max_num_encoder_input_tokens // plan.available)

    def embed_multimodal(self, **kwargs: object) -> Any:
        keeps = kwargs.pop(KEEP, ())
        inputs = self._parse_and_validate_image_input(**kwargs)
        if inputs is None:
            return []
        if inputs["type"] != "pixel_values":  # encoded already
            return self._process_image_input(inputs)
        return self.encode(inputs, [int(keep) for keep in keeps])


@MULTIMODAL_REGISTRY.register_processor(
    processing.MergedLlavaProcessor, info=processing.MergedLlavaInfo, dummy_inputs=LlavaDummyInputsBuilder
)
class PitomeLlavaForConditionalGeneration(_Merged, EncoderGraphs, LlavaForConditionalGeneration):
    """LLaVA-1.5, merging inside the tower and before the projector."""

    hf_to_vllm_mapper = LlavaForConditionalGeneration.hf_to_vllm_mapper | SAVED_BY_5

    def encode(self, inputs: Any, keeps: Sequence[int]) -> list[Tensor]:
        """The visual tokens (keep, C) of every image."""
        pixels, made = inputs["pixel_values"], {}
        for keep, items in batches(keeps, self.at_once):
            alike = torch.stack([pixels[item] for item in items])
            made |= zip(items, self.encode_alike(alike, plan_of(self.config, keep)))
        return [made[item] for item in range(len(keeps))]

    def encode_alike(self, pixels: Tensor, plan: Plan) -> Tensor:
        """The visual tokens (B, keep, C) of images (B, 3, H, W)."""
        return self.multi_modal_projector(tower.features(self.vision_tower, pixels, plan, self.multi_modal_projector))


@MULTIMODAL_REGISTRY.register_processor(
    processing.MergedLlavaNextProcessor, info=processing.MergedLlavaNextInfo, dummy_inputs=LlavaDummyInputsBuilder
)
class PitomeLlavaNextForConditionalGeneration(_Merged, LlavaNextForConditionalGeneration):
    """LLaVA-NeXT, merging an image's packed tokens behind the projector."""

    hf_to_vllm_mapper = LlavaNextForConditionalGeneration.hf_to_vllm_mapper | SAVED_BY_5

    def encode(self, inputs: Any, keeps: Sequence[int]) -> list[Tensor]:
        """The visual tokens (K, C) of every image."""
        sizes, made = inputs["image_sizes"], []
        places = [places_of(self.config, (int(height), int(width))) for height, width in sizes]
        counts = [tiles_of(self.config, (int(height), int(width))) for height, width in sizes]
        for images in groups(counts, self.at_once):
            tiles = [inputs["pixel_values"][i][: counts[i]] for i in images]  # what follows only fills a batch
            parts = torch.cat(tiles).split(self.at_once)
            encoded = torch.cat(
                [self.multi_modal_projector(self._image_pixels_to_features(self.vision_tower, part)) for part in parts]
            )
            for i, features in zip(images, encoded.split([len(one) for one in tiles])):
                packed = self._merge_image_patch_embeddings(sizes[i], features, strategy="spatial_unpad")
                if keeps[i] < len(packed):
                    left = (~places[i].newline).nonzero()[:, 0].to(packed.device)
                    (packed,), _ = merge_pictures(plan_of(self.config, keeps[i]), [packed[left]], [None])
                made.append(packed)
        return made


def batches(keeps: Sequence[int], most: int) -> Iterator[tuple[int, list[int]]]:
    """The indices of images that keep as many tokens, at most ``most`` at once, and that number of tokens."""
    for keep in dict.fromkeys(keeps):
        items = [item for item, one in enumerate(keeps) if one == keep]
        for first in range(0, len(items), most):
            yield keep, items[first : first + most]


def groups(tiles: Sequence[int], most: int) -> Iterator[list[int]]:
    """The indices of images, one after the other, that have at most ``most`` tiles together, or are alone."""
    group: list[int] = []
    for item, count in enumerate(tiles):
        if group and sum(tiles[one] for one in group) + count > most:
            yield group
            group = []
        group.append(item)
    if group:
        yield group


versions.check_overrides(
    (processing._Info, LlavaProcessingInfo),
    (processing._Info, LlavaNextProcessingInfo),
    (processing._Processor, LlavaMultiModalProcessor),
    (processing._Processor, LlavaNextMultiModalProcessor),
    (_Merged, LlavaForConditionalGeneration),
    (_Merged, LlavaNextForConditionalGeneration),
    (EncoderGraphs, SupportsEncoderCudaGraph),
    new=("counts", "plan"),
)
versions.check_calls(
    {
        clip.CLIPAttention.forward: "self hidden_states",
        clip.CLIPEncoderLayer.forward: "self hidden_states",
        clip.CLIPVisionEmbeddings.forward: "self pixel_values",
        siglip.SiglipAttention.forward: "self hidden_states",
        siglip.SiglipEncoderLayer.forward: "self hidden_states",
        siglip.SiglipVisionEmbeddings.forward: "self pixel_values interpolate_pos_encoding",
        scatter_output_slices: "output indices per_item_out_tokens dest clone",
        LlavaForConditionalGeneration._parse_and_validate_image_input: "self kwargs",
        LlavaForConditionalGeneration._process_image_input: "self image_input",
        LlavaNextForConditionalGeneration._parse_and_validate_image_input: "self kwargs",
        LlavaNextForConditionalGeneration._process_image_input: "self image_input",
        LlavaNextForConditionalGeneration._image_pixels_to_features: "self vision_tower pixel_values",
        LlavaNextForConditionalGeneration._merge_image_patch_embeddings: "self image_size patch_embeddings strategy",
    }
)
