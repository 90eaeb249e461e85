"""Refuse a caller's inputs that do not fit the model, before anything runs: it stays attached and usable."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..families.features import PIXELS, selected_features
from ..methods import UserError
from ..methods.kernels import is_capturing
from .caches import cache_in, is_paged, length_of
from .state import Attached

SIZES = ("image_grid_thw", "image_sizes")  # what models take beside pictures that keep their size
ADVICE = "use the model's own processor, and pass its whole output"
PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")  # what collators make
TENSORS = ("input_ids", "inputs_embeds", "attention_mask", "labels", *PIXELS)


def check_call(handle: Attached, kwargs: Mapping[str, Any]) -> None:
    """ValueError unless a call brings tensors, its images by this family's name, and all where the model is."""
    given = {name: kwargs[name] for name in TENSORS if kwargs.get(name) is not None}
    for name, x in given.items():
        if not isinstance(x, Tensor):
            raise UserError(f"got {name} as {type(x).__name__}; call the processor with return_tensors='pt'")
        if name in PIXELS and name != handle.family.pixels:
            raise UserError(f"got {name}, {type(handle.model).__name__} takes {handle.family.pixels}; {ADVICE}")
    _check_devices(handle.model, {name: str(x.device) for name, x in given.items()})
    if any(name in PIXELS for name in given):
        check_selection(handle, kwargs)
        _check_rows(handle, kwargs)


def check_selection(handle: Attached, kwargs: Mapping[str, Any]) -> None:
    """ValueError if a call, or a configuration that was changed, selects other features of the tower than at attach."""
    if handle.plan is None:
        return
    asked = {**selected_features(vars(handle.model.config)), **selected_features(kwargs)}
    for name, value in handle.features.items():
        if asked.get(name) != value:
            raise UserError(
                f"got {name}={asked.get(name)!r}, merging is planned for {value!r}; call handle.remove(), set it in "
                "model.config and attach again, or use the plain model within handle.using(None)"
            )


def _check_rows(handle: Attached, kwargs: Mapping[str, Any]) -> None:
    """ValueError for images in continuous batching, whose KV cache has no rows that merged prompts could fill."""
    past = cache_in(kwargs)
    if handle.plan is not None and is_paged(past):
        raise UserError(
            f"got pictures with a {type(past).__name__}, as generate_batch() has it, which merging does not know; "
            "use generate() with a batch of prompts, or the plain model within handle.using(None)"
        )


def _check_devices(model: nn.Module, given: Mapping[str, str]) -> None:
    """ValueError if inputs, on the devices ``given``, are not together, or on none of the model's."""
    own, places = str(next(model.parameters()).device), {*given.values()}
    spread = len({*(getattr(model, "hf_device_map", None) or {}).values()}) > 1
    if places == {own} or spread or hasattr(model, "_hf_hook"):  # accelerate moves what does not fit
        return
    if len(places) == 1 and places <= {str(x.device) for x in (*model.parameters(), *model.buffers())}:
        return  # weights that wait elsewhere until they are needed
    said = ", ".join(f"{name} on {device}" for name, device in given.items())
    raise UserError(f"got {said}, the model on {own}; move the processor's whole output with inputs.to(model.device)")


def check_no_images(handle: Attached, kwargs: Mapping[str, Any]) -> None:
    """ValueError if a prompt that starts here has image placeholders; for calls without images."""
    ids = kwargs.get("input_ids")
    elsewhere = any(kwargs.get(name) is not None for name in ("inputs_embeds", "image_hidden_states"))
    if handle.plan is None or ids is None or elsewhere or length_of(cache_in(kwargs)):
        return
    if is_paged(cache_in(kwargs)) and ids.is_cuda and is_capturing():
        return
    count = int((ids == handle.model.config.image_token_id).sum())
    if count:
        _check_rows(handle, kwargs)
        raise UserError(f"got {count} image placeholders and no picture; {ADVICE}, {handle.family.pixels} included")


def check_images(handle: Attached, pixels: Tensor, kwargs: Mapping[str, Any]) -> None:
    """ValueError unless ``pixels`` are images as this family's processor makes them, with their sizes in ``kwargs``."""
    tiles, shape = handle.family.tiles, tuple(pixels.shape)
    dims = (5,) if handle.family.by_row else {"": (4,), "anyres": (4, 5), "features": range(2, 6)}[tiles]
    if pixels.dim() not in dims:
        expected = "(pictures, tiles, 3, H, W)" if tiles else "(pictures, 3, H, W)"
        raise UserError(f"got pictures of shape {shape}, {type(handle.model).__name__} takes {expected}; {ADVICE}")
    if not len(pixels):
        raise UserError(f"got pixel_values of shape {shape}, no picture; leave them out where there is none")
    needed = inspect.signature(type(handle.core).get_image_features).parameters if tiles else {}
    for name in (name for name in SIZES if name in needed):
        if name != SIZES[0] and needed[name].default is None:  # of some pictures only
            continue
        if kwargs.get(name) is None:
            raise UserError(f"got pixel_values without {name}; {ADVICE}")
        if pixels.dim() == 5 and len(kwargs[name]) != len(pixels):
            raise UserError(f"got {len(pixels)} pictures and {len(kwargs[name])} {name}; {ADVICE}")
    if tiles == "features":
        return
    side = handle.model.config.vision_config.image_size
    if shape[-2:] != (side, side):
        raise UserError(
            f"got pictures of {shape[-2]} x {shape[-1]} pixels, this vision tower takes {side} x {side}; {ADVICE}"
        )


def check_count(handle: Attached, count: int, full: Sequence[int], kept: Sequence[int]) -> None:
    """ValueError unless ``count`` placeholders are those of images with ``full`` or ``kept`` tokens each."""
    if count in (sum(full), sum(kept)):
        return
    mixed = handle.family.tiles == "features" and not handle.family.side  # a picture may be one of several tiles
    kinds = ("tile",) if handle.family.by_row else ("picture", "tile") if mixed else ("picture",)
    pictures = f"{len(full)} {' or '.join(kind + 's' * (len(full) > 1) for kind in kinds)}"
    if not count:
        raise UserError(f"got {pictures} but no image placeholder in the prompt; write one <image> per picture")
    raise UserError(
        f"got {pictures} and {count} image placeholders, expected {sum(full)}, or {sum(kept)} where the prompt is "
        f"short already; write one <image> per picture, and {ADVICE}"
    )


def check_features_alone(calibration: str, count: int, full: Sequence[int], kept: Sequence[int]) -> None:
    """ValueError where features of ``kept`` tokens come in place of images, which alone tell what the LLM is to be told
    and, where ``full`` is -1, which of ``count`` placeholders are to go.
    """
    if calibration != "none":
        raise UserError(
            f"calibration={calibration!r} does not go with mm_encoder_outputs, whose patches are not known; pass the "
            "pictures themselves as pixel_values, or attach with calibration='none'"
        )
    if -1 in full and count != sum(kept):
        raise UserError(
            f"got mm_encoder_outputs of {sum(kept)} tokens and {count} image placeholders, of which only the pictures "
            "tell which merged; pass the pictures themselves as pixel_values"
        )


def check_mask(mask: Any, width: int) -> None:
    """ValueError unless an attention mask is (B, T) with at least ``width`` columns, or None."""
    if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape[1] < width):
        got = f"of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else f"as {type(mask).__name__}"
        raise UserError(f"got attention_mask {got}, which does not fit; pass the processor's (B, T) mask")


def check_positions(given: Any, real: Tensor, after: bool) -> None:
    """ValueError unless position ids are (B or 1, T); ``after`` a KV cache other widths are the caller's count."""
    fits = isinstance(given, Tensor) and given.dim() == 2 and len(given) in (1, len(real))
    if not fits or (given.shape[1] != real.shape[1] and not after):
        got = f"of shape {tuple(given.shape)}" if isinstance(given, Tensor) else f"as {type(given).__name__}"
        raise UserError(f"got position_ids {got}, expected {tuple(real.shape)}, one per column of the prompt; or none")


def check_axes(given: Tensor, real: Tensor) -> None:
    """ValueError unless position ids (A, B, T) are of one sample a row, ``real`` (B, T)."""
    fits = given.shape[0] in (3, 4) and given.shape[1] == len(real) and given.shape[2] >= real.shape[1]
    first = given[0, :, -real.shape[1] :].to(real.device) if fits else None  # times, or places in the text
    if first is None or bool(((first.diff(dim=1) < 0) & real[:, 1:] & real[:, :-1]).any()):
        raise UserError(
            f"got position_ids of shape {tuple(given.shape)}, expected (3, {len(real)}, {real.shape[1]}) that start "
            "once in every row; give each sample a row of its own, or leave them out"
        )


def check_countable(kwargs: Mapping[str, Any], short: bool) -> None:
    """ValueError where a model cannot count positions in several axes over a whole prompt."""
    if kwargs.get("mm_token_type_ids") is None:
        raise UserError(f"got pictures without mm_token_type_ids, by which positions are counted; {ADVICE}")
    if short:
        raise UserError(
            "got a prompt that is short already, and positions in several axes count a picture's whole grid; pass the "
            "processor's prompt as it is"
        )


def check_restart(after: bool) -> None:
    """ValueError for samples packed into a row ``after`` a KV cache."""
    if after:
        raise UserError(
            "got position_ids that restart, with a KV cache in front of them; give packed samples in one call, or "
            "position_ids that count on"
        )


def check_unpacked(kwargs: Mapping[str, Any]) -> None:
    """ValueError for arguments that count the columns of packed samples; no merged prompt has those."""
    given = [name for name in PACKED if kwargs.get(name) is not None]
    if given:
        raise UserError(
            f"got {', '.join(given)}, which count the tokens of the prompt before its images merge; leave them out and "
            "pass position_ids that restart with every sample"
        )


def check_whole(restart: Tensor | None, real: Tensor) -> None:
    """ValueError for samples packed into a row whose prompt is short already; ``real`` is False at padding."""
    if restart is None:
        return
    before = F.pad(restart.where(real, -1)[:, :-1], (1, 0), value=-1).cummax(1).values
    if bool((real & (restart <= before)).any()):
        raise UserError(
            "a calibration does not go with a short prompt whose position_ids restart; pass the processor's "
            "whole prompt, or attach with calibration='none'"
        )


def check_chunks(model: nn.Module, size: int | None, width: int) -> None:
    """ValueError for a prompt of ``width`` tokens in chunks of ``size`` where its tokens see what follows them."""
    if size is not None and size < width and hasattr(type(model), "create_masks_for_generate"):
        raise UserError(
            f"prefill_chunk_size={size} does not go with {type(model).__name__}, whose prompt tokens also see those "
            "behind them, which later chunks bring; leave it out"
        )
