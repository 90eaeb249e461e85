"""Shorten the caller's prompt on its way into generate() and forward()."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..families.features import pixels_in
from ..methods import UserError
from ..plan import Plan
from ..stats import Stats
from . import caches, columns, tiles
from .layout import Layout, shorten, take_all, unchanged
from .positions import borders, caller_positions, compact_positions, missing_before
from .state import CALL, Attached, Call
from .transfers import on, on_host
from .validate import (
    check_call,
    check_count,
    check_features_alone,
    check_mask,
    check_no_pictures,
    check_pictures,
    check_positions,
    check_restart,
    check_whole,
)

logger = logging.getLogger(__name__)

# Whose generate() runs, innermost last: a draft model gets the pictures as the model that asks it has encoded them.
GENERATING: ContextVar[tuple[Attached, ...]] = ContextVar("pitomeGENERATING", default=())


def rewrite(model: nn.Module, handle: Attached, kwargs: dict[str, Any], whole: bool) -> Call | None:
    """The call that ``kwargs`` become; None if there is nothing of ours in it.

    ``whole`` says that ids that come with a KV cache start at the beginning (generate), not behind it (forward).
    """
    _tell_videos(handle, kwargs)
    length, marked = _cached(kwargs)
    if marked is not None or pixels_in(kwargs) is not None:
        check_call(handle, kwargs)
    full, kept = _pictures(handle, kwargs)
    if not kept and marked is None:
        check_no_pictures(handle, kwargs)
        return None
    image, mask = _placeholders(model, kwargs), kwargs.get("attention_mask")
    check_mask(mask, image.shape[1])
    image, real = on_host(image, (_inferred_mask(model, kwargs, image) if mask is None else mask) != 0)
    mask = None if mask is None else real
    original = _original(handle.plan) if marked is None else marked.position is not None
    seen = _seen(length, marked, image, mask, original)
    with_past = seen is not None and whole and (mask is None or mask.shape[1] == image.shape[1])
    fresh = image[:, seen.width if with_past else 0 :]
    real = real[:, real.shape[1] - fresh.shape[1] :]
    count, merged = int(fresh.sum()), full != kept
    short = count > 0 and count == sum(kept)
    weighs = handle.plan is not None and handle.plan.llm_size_bias
    move, weigh = (told and count > 0 and merged for told in (original, weighs))
    if merged and pixels_in(kwargs) is not None:
        if count or seen is None:  # assistants get the pictures of a prompt that is in the cache already
            check_count(handle, count, full, kept)
    elif count:
        known = _features_known(handle, kwargs, kept, merged, move, short)
        move, weigh = move and known, weigh and known

    first = 0 if whole else handle.family.first_position  # generate() itself adds it to position ids
    restart, positions = _restarting(kwargs, real, seen), caller_positions(real)
    given = kwargs.get("position_ids")
    if merged and count == sum(full):
        new = shorten(fresh, real, full, kept)
    elif marked is None and not (short and merged and (move or weigh or (original and given is not None))):
        return Call(kwargs, image)  # nothing is told; or features alone, of which the model refuses a wrong number
    else:
        new = unchanged(*fresh.shape, fresh.device)
        if original and short and merged:
            check_whole(restart)
            if move and (pixels_in(kwargs) is not None or given is None):
                positions = positions + missing_before(F.pad(fresh, (0, 1)), full, kept)
            elif given is not None:  # features alone: of their places only the caller knows
                given = given[:, -fresh.shape[1] :].expand(len(fresh), -1).to(fresh.device)
                positions, restart = _and_next(given - first - (0 if seen is None else seen.follows)), None
    new, sample, ids = _placed(new, real, positions, None if restart is None else restart - first, original)
    layout = new if seen is None else seen.then(new)
    call = Call(kwargs, image, layout, move, weigh, sample if mask is None else None)
    return _shortened(model, call, new, ids, first)


def _features_known(
    handle: Attached, kwargs: dict[str, Any], kept: list[int], merged: bool, move: bool, short: bool
) -> bool:
    """Whether features that come without their pictures are those that a generate() around this one has encoded.

    ValueError if they are not, and the plan asks for what only pictures tell.
    """
    lent = _lent(sum(kept))
    handle.note(stats=lent)
    drafting = getattr(kwargs.get("generation_config"), "is_assistant", False)  # of whom it is not asked how
    if merged and lent is None and not drafting:
        check_features_alone(handle.plan, kwargs, move, short)
    return lent is not None


def _lent(tokens: int) -> Stats | None:
    """What became of pictures of ``tokens`` in all, if a model whose generate() runs has encoded them."""
    for handle in reversed(GENERATING.get()):
        stats = handle.state.stats
        if stats is not None and sum(stats.lengths) == tokens:
            return stats
    return None


def _original(plan: Plan | None) -> bool:
    """Whether visual tokens take the positions of their patches."""
    return plan is not None and plan.positions == "original"


def _cached(kwargs: dict[str, Any]) -> tuple[int, Layout | None]:
    """The places that a call's KV cache holds, and the layout of what it was filled with."""
    past = caches.cache_in(kwargs)
    length = caches.length_of(past)
    if past is not None and not length:
        caches.forget(past)  # it was emptied layer by layer
    return length, caches.mark_of(past)


def _restarting(kwargs: dict[str, Any], real: Tensor, seen: Layout | None) -> Tensor | None:
    """The caller's position ids (B, T) where they restart within a row, which packs several samples; else None."""
    given = kwargs.get("position_ids")
    if given is None:
        return None
    check_positions(given, real, behind=seen is not None)
    given = given[:, -real.shape[1] :].expand(len(real), -1).to(real.device)
    if given.shape != real.shape or not bool(borders(given, real != 0).any()):
        return None
    check_restart(behind=seen is not None)
    return given


def _placed(
    new: Layout, real: Tensor, positions: Tensor, restart: Tensor | None, original: bool
) -> tuple[Layout, Tensor | None, Tensor | None]:
    """The layout with positions, if it is to have any; of packed samples also which one (B, S) every place belongs to,
    and position ids where the layout has none.
    """
    if restart is None:
        return (new.positioned(positions) if original else new), None, None
    begin = restart.gather(1, (real != 0).to(torch.int8).argmax(1, keepdim=True))
    positions = restart.where(real != 0, begin)  # of padding such that no neighbour follows on it
    new = new.positioned(_and_next(positions))
    new = replace(new, position=new.position.where(new.real, begin))
    sample = new.take(borders(restart, real != 0), -1)
    if original:
        return new, sample, None
    return replace(new, position=None, follows=None), sample, compact_positions(new.position, sample)


def _and_next(positions: Tensor) -> Tensor:
    """``positions`` (B, T) with the one behind them, (B, T + 1)."""
    return torch.cat([positions, positions.amax(1, keepdim=True) + 1], 1)


def _tell_videos(handle: Attached, kwargs: dict[str, Any]) -> None:
    """Warn, once, that videos pass through as in the plain model."""
    if handle.family.videos and kwargs.get("pixel_values_videos") is not None and not handle.told_of_videos:
        handle.told_of_videos = True
        logger.warning("videos are not merged in %s: %s", type(handle.model).__name__, handle.family.videos)


def _shortened(model: nn.Module, call: Call, new: Layout, ids: Tensor | None, first: int) -> Call:
    """The call with its per-token tensors in its layout, or in ``new`` where they hold the tokens of this call only.

    ``ids`` : position ids (B, S) where the layout has none and they are not the usual ones.
    """
    layout, mask = call.layout, call.kwargs.get("attention_mask")
    device = next(
        call.kwargs[name].device for name in ("input_ids", "inputs_embeds") if call.kwargs.get(name) is not None
    )
    short = take_all(call.kwargs, _pad_id(model), layout, new)
    for name in ("position_ids", "cache_position"):  # they count the caller's columns
        short.pop(name, None)
    if mask is None and call.sample is None and not bool(layout.real.all()):
        short["attention_mask"] = on(device, layout.real.long())
    image = (layout if call.image.shape[1] == layout.width else new).take(call.image, False)
    ids = layout.position if layout.position is not None else ids
    if ids is not None:
        short["position_ids"] = on(device, ids[:, ids.shape[1] - image.shape[1] :] + first)
    made = Call(short, image[:, image.shape[1] - new.places :], layout, call.move, call.weigh, call.sample)
    made.fresh = new
    return made


def _pictures(handle: Attached, kwargs: dict[str, Any]) -> tuple[list[int], list[int]]:
    """Visual tokens of every picture that a call brings: of the plain model, and as many as it will have."""
    pixels, encoded = pixels_in(kwargs), (kwargs.get("mm_encoder_outputs") or {}).get("image")
    if pixels is None and encoded is None:  # every step of decoding passes here
        return [], []
    plan, available = handle.plan, handle.geometry.available
    if pixels is not None:
        check_pictures(handle, pixels, kwargs.get("image_sizes"))
        if handle.family.tiles == "anyres":
            return tiles.lengths(handle, kwargs)
        pictures = _number(pixels)
        return [available] * pictures, [available if plan is None else plan.keep] * pictures
    kept = [len(features) for features in encoded.pooler_output]
    if handle.family.tiles:  # how many they were is not known without the pictures
        return kept if plan is None or plan.keep == available else [-1] * len(kept), kept
    return [available] * len(kept), kept


def _number(pixels: Tensor) -> int:
    """Pictures in ``pixels`` (I, 3, H, W), or tiles in (B, I, 3, H, W), where those that are all zero are padding."""
    return len(pixels) if pixels.dim() == 4 else int((pixels.flatten(2) != 0).any(-1).sum())


def _placeholders(model: nn.Module, kwargs: dict[str, Any]) -> Tensor:
    """(B, T) bool, True at image placeholders of the ids, or of the embeddings where there are no ids."""
    token = model.config.image_token_id
    if kwargs.get("input_ids") is not None:
        return kwargs["input_ids"] == token
    embeds = kwargs.get("inputs_embeds")
    if embeds is None:
        raise UserError("got pictures but neither input_ids nor inputs_embeds; pass the processor's whole output")
    placeholder = model.get_input_embeddings()(torch.full((), token, dtype=torch.long, device=embeds.device))
    return (embeds == placeholder).all(-1)


def _inferred_mask(model: nn.Module, kwargs: dict[str, Any], image: Tensor) -> Tensor:
    """(B, T), 0 at pad tokens, where there is no attention mask: generate() infers it in the same way."""
    config = kwargs.get("generation_config") or model.generation_config
    ids = kwargs.get("input_ids")
    pad, eos = (kwargs.get(name, getattr(config, name)) for name in ("pad_token_id", "eos_token_id"))
    if ids is None or pad is None or pad in (eos if isinstance(eos, list) else [eos]):
        return torch.ones_like(image)
    return ids != pad


def _seen(length: int, marked: Layout | None, image: Tensor, mask: Tensor | None, original: bool) -> Layout | None:
    """The layout of a KV cache of ``length`` places with the mark ``marked``; None if it holds nothing."""
    if not length:
        return None
    if marked is None:
        start = unchanged(len(image), 0, image.device)
        marked = start.positioned(caller_positions(start.real)) if original else start
    return marked.on(image.device).repeated(len(image)).fitted_to(length, mask)


def _pad_id(model: nn.Module) -> int:
    pad = model.generation_config.pad_token_id
    pad = model.config.get_text_config().pad_token_id if pad is None else pad
    return 0 if pad is None else pad


def tell(handle: Attached, layout: Layout | None) -> None:
    """Say in the stats of a run what layout its prompt had."""
    stats = handle.state.stats
    if layout is not None and stats is not None:
        handle.note(stats=replace(stats, layout=on(stats.device, layout.columns)))


@lru_cache
def names_of(function: Callable) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters)


def before_forward(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    """Forward pre-hook of the model and of its core: shorten the prompt. The decoding loop passes through at once."""
    if CALL in kwargs:  # the model calls its core
        return None
    handle = module._pitome
    handle.check_calls(module)
    if args:
        kwargs = {**dict(zip(names_of(type(module).forward)[1:], args)), **kwargs}
    generating = handle.generating
    if generating is not None:
        if pixels_in(kwargs) is None and kwargs.get("mm_encoder_outputs") is None:
            return None
        if _is_part(handle.model, generating, kwargs):
            part = generating if pixels_in(kwargs) is None else generating.again()
            part.owner = module
            return (), {**kwargs, CALL: part}
    forget_encoded(handle)
    call = rewrite(handle.model, handle, kwargs, whole=False)
    if call is None:
        return None
    call.owner = module
    needed: dict[str, Any] = {}
    if call.fresh is not None:
        at_caller = handle.plan is not None and handle.plan.logits == "caller"
        asked = kwargs if module is handle.model else {**kwargs, "logits_to_keep": 0}  # the core makes no logits
        call.answer, needed = columns.columns_of(call.fresh, asked, at_caller)
        needed |= columns.labels_left(kwargs, call.kwargs)
    return (), {**call.kwargs, **needed, CALL: call}


def _is_part(model: nn.Module, generating: Call, kwargs: dict[str, Any]) -> bool:
    """Whether the placeholders of a call are those that the prompt of a running generate() has at these places."""
    (image,), length = on_host(_placeholders(model, kwargs)), caches.length_of(caches.cache_in(kwargs))
    return generating.layout is None or torch.equal(image, generating.part(*image.shape, length))


def after_forward(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
    """Forward hook of the model and of its core, also called after an error: the KV cache that is full, perhaps one
    that the LLM made itself, gets its layout, and what was returned comes to the caller's columns if it is to.
    """
    handle, call = module._pitome, kwargs.get(CALL)
    if handle.generating is None:
        forget_encoded(handle)
    if call is None or output is None or call.owner is not module:
        return None
    if not call.reached and (call.move or call.weigh):
        raise RuntimeError(
            f"the LLM of {type(handle.model).__name__} did not get what merging hands down to it: something replaced "
            "it, or a forward on the way to it, after attach; call handle.remove() and attach again"
        )
    past = caches.cache_in(kwargs)
    past = caches.cache_of(output) if past is None else past
    if past is not None and call.told is not None:
        caches.remember(past, call.told)
    tell(handle, call.layout)
    return None if call.answer is None else call.answer.restore(output)


def forget_encoded(handle: Attached) -> None:
    if handle.state.encoded is not None:
        handle.note(encoded=None)
