"""Prompts with as many placeholders as visual tokens will be left, which vLLM wants to know before it encodes."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import torch
from prometheus_client import Counter
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape
from vllm.model_executor.models.llava import LlavaMultiModalProcessor, LlavaProcessingInfo
from vllm.model_executor.models.llava_next import (
    LlavaNextForConditionalGeneration,
    LlavaNextMultiModalProcessor,
    LlavaNextProcessingInfo,
)
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import ImageProcessorItems, ImageSize
from vllm.multimodal.processing import PromptReplacement

from ...errors import UserError
from ...families.anyres import Places
from ...plan import Plan
from . import KEY
from .spec import fingerprint, plan_of, requested

KEEP = "visual_tokens_kept"  # the field that tells the model how many tokens an image keeps
BEFORE = Counter("pitome_visual_tokens_before", "Visual tokens of the images in prompts, as the plain model has them")
AFTER = Counter("pitome_visual_tokens_after", "Visual tokens of the images in prompts, after merging")
SIZES = 256  # of images whose packing is remembered


def places_of(config: Any, size: tuple[int, int]) -> Places:
    """How vLLM's LLaVA-NeXT packs the tiles of an image of ``size`` (height, width)."""
    vision, pinpoints = config.vision_config, tuple(map(tuple, config.image_grid_pinpoints))
    return _places(vision.image_size, vision.patch_size, pinpoints, size)


def tiles_of(config: Any, size: tuple[int, int]) -> int:
    """Tiles of an image of ``size`` (height, width), the overview included, those that only pad it too."""
    rows, columns = get_anyres_image_grid_shape(size, config.image_grid_pinpoints, config.vision_config.image_size)
    return rows * columns + 1


@lru_cache(maxsize=SIZES)
def _places(side: int, patch: int, pinpoints: tuple[tuple[int, ...], ...], size: tuple[int, int]) -> Places:
    """What its own packing does to the indices of patches."""
    patches, tiles = (side // patch) ** 2, max(h // side * (w // side) for h, w in pinpoints) + 1
    vision = SimpleNamespace(image_size=side, patch_size=patch)
    model = SimpleNamespace(
        config=SimpleNamespace(vision_config=vision, image_grid_pinpoints=[list(one) for one in pinpoints]),
        image_newline=torch.tensor([-1.0]),
    )
    index = torch.arange(tiles * patches, dtype=torch.float32).view(tiles, patches, 1)
    pack = LlavaNextForConditionalGeneration._merge_image_patch_embeddings
    packed = pack(model, torch.tensor(size), index, strategy="spatial_unpad")
    return Places(packed[:, 0].long(), patches)


class _Info:
    """Counts of an image's visual tokens; before vLLM's own."""

    def counts(self, plan: Plan, width: int, height: int) -> tuple[int, int]:
        """Visual tokens of an image, in the plain model and after merging."""
        return plan.available, plan.keep

    def get_num_image_tokens(self, *, image_width: int, image_height: int) -> int:
        return self.counts(plan_of(self.get_hf_config()), image_width, image_height)[1]


class MergedLlavaInfo(_Info, LlavaProcessingInfo):
    """Of LLaVA-1.5."""


class MergedLlavaNextInfo(_Info, LlavaNextProcessingInfo):
    """Of LLaVA-NeXT, whose images have several tiles."""

    def counts(self, plan: Plan, width: int, height: int) -> tuple[int, int]:
        places = places_of(self.get_hf_config(), (height, width))
        ends = int(places.newline.sum())
        return len(places), plan.kept(len(places) - ends, ends)

    def get_image_size_with_most_features(self) -> ImageSize:
        """By the work of the tower: after merging, pictures of all sizes may have as many tokens."""
        config, plan = self.get_hf_config(), plan_of(self.get_hf_config())
        height, width = max(config.image_grid_pinpoints, key=lambda size: self.counts(plan, size[1], size[0])[0])
        return ImageSize(width=width, height=height)


class _Processor:
    """The prompt of a request and the identity of its images, by what the request keeps; before vLLM's own."""

    counting = True  # its images count in the metrics

    def plan(self, mm_kwargs: Mapping[str, object]) -> Plan:
        """What a request asks for."""
        return plan_of(self.info.get_hf_config(), requested(mm_kwargs))

    def counts(self, mm_kwargs: Mapping[str, object], images: ImageProcessorItems) -> list[tuple[int, int]]:
        """Visual tokens of every image, in the plain model and after merging; UserError where those are too many."""
        served, asked, found = self.plan({}), self.plan(mm_kwargs), []
        for size in map(images.get_image_size, range(len(images))):
            (before, after), (_, most) = (self.info.counts(plan, size.width, size.height) for plan in (asked, served))
            if after > most:
                keep = requested(mm_kwargs)
                raise UserError(f"keep={keep} comes to {after} visual tokens of a picture; at most {most} are served")
            found.append((before, after))
        return found

    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Mapping[str, object]) -> Any:
        own = {name: value for name, value in hf_kwargs.items() if name != KEY}
        data = super()._apply_hf_processor_main(mm_items, own)
        if "pixel_values" in data:
            data[KEEP] = torch.tensor([after for _, after in self.counts(hf_kwargs, mm_items["image"])])
        return data

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, object]) -> Any:
        own = super()._get_mm_fields_config(hf_inputs, hf_processor_mm_kwargs)
        return {**own, KEEP: MultiModalFieldConfig.batched("image", keep_on_cpu=True)}

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, object], out_mm_kwargs: Any
    ) -> Sequence[Any]:
        token = self.info.get_hf_config().image_token_index
        images = mm_items.get("image", ())  # none where a cache knows all of them
        if isinstance(images, ImageProcessorItems):
            left = [after for _, after in self.counts(hf_processor_mm_kwargs, images)]
        else:  # encoded already, by whoever sent them
            left = [images.get_feature_size(item) for item in range(len(images))]
        return [PromptReplacement(modality="image", target=[token], replacement=lambda item: [token] * left[item])]

    def _get_mm_hashes(self, inputs: Any) -> Any:
        tag = fingerprint(self.plan(inputs.hf_processor_mm_kwargs))
        hashes = super()._get_mm_hashes(inputs)
        return {modality: [f"{one}-{tag}" for one in known] for modality, known in hashes.items()}

    def get_dummy_mm_inputs(self, mm_counts: Any, *, cache: Any = None, scheduler_config: Any = None) -> Any:
        silent = copy.copy(self)
        silent.counting = False
        return super(_Processor, silent).get_dummy_mm_inputs(mm_counts, cache=cache, scheduler_config=scheduler_config)

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        made, images = super().apply(inputs, timing_ctx), inputs.mm_data_items.get("image")
        if self.counting and isinstance(images, ImageProcessorItems):
            sent = ImageProcessorItems([image for image in images.get_all() if image is not None])  # not only named
            for before, after in self.counts(inputs.hf_processor_mm_kwargs, sent):
                BEFORE.inc(before)
                AFTER.inc(after)
        return made


class MergedLlavaProcessor(_Processor, LlavaMultiModalProcessor):
    """Of LLaVA-1.5."""


class MergedLlavaNextProcessor(_Processor, LlavaNextMultiModalProcessor):
    """Of LLaVA-NeXT."""
