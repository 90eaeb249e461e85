"""What the arguments of a call say: its images, its placeholders, its padding, and what its KV cache holds."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property, reduce
from typing import Any

import torch
from torch import Tensor, nn

from ..families.features import pixels_in
from ..methods import UserError
from ..stats import Stats
from . import caches, encoding
from .call import Encoded
from .layout import Layout
from .state import Attached
from .transfers import on_host
from .validate import check_call, check_images, check_mask, check_no_images

logger = logging.getLogger(__name__)

# Whose generate() runs, innermost last: a draft model gets the images as the model that asks it has encoded them.
GENERATING: ContextVar[tuple[Attached, ...]] = ContextVar("pitome_generating", default=())


@dataclass(frozen=True, eq=False)
class Images:
    """The images of a call."""

    full: list[int]  # visual tokens of every image in the plain model; -1 where that is not known
    kept: list[int]  # as many as it will have
    encoded: Encoded | None = None  # the images, where only the tower could tell
    lent: Stats | None = None  # of features without images: what became of those in the model whose generate() runs


@dataclass(frozen=True, eq=False)
class Prompt:
    """A prompt as the caller gives it; masks are on the host."""

    kwargs: dict[str, Any]  # the arguments of the call
    images: Images
    image: Tensor  # (B, T') bool, the placeholders of all columns that the call brings
    fresh: Tensor  # (B, T) bool, those of the columns that the KV cache does not hold
    real: Tensor  # (B, T) bool, False at padding
    seen: Layout | None  # what the KV cache holds; None if it holds nothing
    continues: bool  # that has a layout of ours
    calibration: str  # what the LLM is to be told of visual tokens
    first: int  # the position id of the first token

    @property
    def calibrated(self) -> bool:
        return self.calibration != "none"

    @property
    def merges(self) -> bool:
        """Whether its images have fewer tokens than in the plain model."""
        return self.images.full != self.images.kept

    @property
    def is_long(self) -> bool:
        """Whether it has the placeholders of the plain model, and is to have fewer."""
        return self.merges and self.placeholders == sum(self.images.full)

    @property
    def is_short(self) -> bool:
        """Whether it has the placeholders of merged images only."""
        return self.merges and 0 < self.placeholders == sum(self.images.kept)

    @property
    def is_parted(self) -> bool:
        """Whether it is short and padding stands between its tokens, where prompt tuning put virtual ones in front."""
        after = self.real.cummax(1).values
        return self.is_short and bool((~self.real & after & self.real.flip(1).cummax(1).values.flip(1)).any())

    @cached_property
    def placeholders(self) -> int:
        return int(self.fresh.sum())


def read_prompt(handle: Attached, kwargs: dict[str, Any], whole: bool) -> Prompt | None:
    """The prompt of a call; None if it has neither images nor merged tokens in its KV cache.

    ``whole`` says that ids that come with a KV cache start at the beginning (generate), not after it (forward).
    """
    length, cached = caches.content_of(kwargs)
    if cached is not None or brings_pictures(handle, kwargs):
        check_call(handle, kwargs)
    images = _images(handle, kwargs)
    if not images.kept and cached is None:
        check_no_images(handle, kwargs)
        return None
    plan = handle.plan
    calibration = ("none" if plan is None else plan.calibration) if cached is None else cached.calibration
    image, mask = placeholders(handle, kwargs), kwargs.get("attention_mask")
    check_mask(mask, image.shape[1])
    if mask is None:  # forward() takes every token for one, generate() infers which are padding
        real = _inferred_mask(handle.model, kwargs, image) if whole else torch.ones_like(image)
    else:
        real = mask != 0
    image, real = on_host(image, real)
    mask = None if mask is None else real
    positioned = calibration != "none" or hasattr(handle.core, "get_rope_index")
    seen = caches.seen(length, cached, image, mask, positioned)
    with_past = seen is not None and whole and (mask is None or mask.shape[1] == image.shape[1])
    fresh = image[:, seen.width if with_past else 0 :]
    real = real[:, real.shape[1] - fresh.shape[1] :]
    first = 0 if whole else handle.family.first_position  # generate() itself adds it to position ids
    return Prompt(kwargs, images, image, fresh, real, seen, cached is not None, calibration, first)


def _images(handle: Attached, kwargs: dict[str, Any]) -> Images:
    pixels, given = pixels_in(kwargs), (kwargs.get("mm_encoder_outputs") or {}).get("image")
    _tell_videos(handle, kwargs)
    if pixels is not None:
        check_images(handle, pixels, kwargs)
    if handle.family.tiles and brings_pictures(handle, kwargs):
        return Images(*encoding.lengths(handle, kwargs))
    if pixels is not None:
        return Images([handle.geometry.available] * len(pixels), [_kept(handle)] * len(pixels))
    return Images([], []) if given is None else _features(handle, given)


def _features(handle: Attached, given: Any) -> Images:
    """Images that come as features."""
    kept, plan = [len(features) for features in given.pooler_output], handle.plan
    lent = _lent(sum(kept))
    full = [handle.geometry.available] * len(kept)
    if handle.family.tiles and (plan is None or plan.is_plain):
        full = kept
    elif handle.family.tiles:  # how many they were is not known without the images
        packed = () if lent is None else lent.packed
        full = [len(image.group) for image in packed] if packed else [-1] * len(kept)
        kept = [len(image.token) for image in packed] if packed else kept
    return Images(full, kept, lent=lent)


def _kept(handle: Attached) -> int:
    return handle.geometry.available if handle.plan is None else handle.plan.keep


def _lent(tokens: int) -> Stats | None:
    """What became of images of ``tokens`` in all, if a model whose generate() runs has encoded them."""
    for handle in reversed(GENERATING.get()):
        stats = handle.state.stats
        if stats is not None and sum(stats.lengths) == tokens:
            return stats
    return None


def _tell_videos(handle: Attached, kwargs: dict[str, Any]) -> None:
    """Warn, once, that videos pass through as in the plain model."""
    if handle.family.videos and kwargs.get("pixel_values_videos") is not None and not handle.told_of_videos:
        handle.told_of_videos = True
        logger.warning("videos are not merged in %s: %s", type(handle.model).__name__, handle.family.videos)


def brings_pictures(handle: Attached, kwargs: Mapping[str, Any]) -> bool:
    """Whether a call brings images, or videos that merge."""
    return pixels_in(kwargs) is not None or any(kwargs.get(name) is not None for name in handle.kinds.values())


def placeholders(handle: Attached, kwargs: Mapping[str, Any]) -> Tensor:
    """(B, T) bool, True at placeholders of the ids, or of the embeddings where there are no ids."""
    tokens = [getattr(handle.model.config, f"{kind}_token_id") for kind in handle.kinds]
    return reduce(torch.logical_or, (_placeholders(handle.model, kwargs, token) for token in tokens))


def _placeholders(model: nn.Module, kwargs: Mapping[str, Any], token: int) -> Tensor:
    if kwargs.get("input_ids") is not None:
        return kwargs["input_ids"] == token
    embeds = kwargs.get("inputs_embeds")
    if embeds is None:
        raise UserError("got images but neither input_ids nor inputs_embeds; pass the processor's whole output")
    placeholder = model.get_input_embeddings()(torch.full((), token, dtype=torch.long, device=embeds.device))
    return (embeds == placeholder).all(-1)


def _inferred_mask(model: nn.Module, kwargs: Mapping[str, Any], image: Tensor) -> Tensor:
    """(B, T) bool, False at pad tokens, where there is no attention mask: generate() infers it in the same way."""
    config = kwargs.get("generation_config") or model.generation_config
    ids = kwargs.get("input_ids")
    pad, eos = (kwargs.get(name, getattr(config, name)) for name in ("pad_token_id", "eos_token_id"))
    if ids is None or pad is None or pad in (eos if isinstance(eos, list) else [eos]):
        return torch.ones_like(image)
    return ids != pad


def pad_id(model: nn.Module) -> int:
    """The id of padding, 0 where a model has none."""
    pad = model.generation_config.pad_token_id
    pad = model.config.get_text_config().pad_token_id if pad is None else pad
    return 0 if pad is None else pad
