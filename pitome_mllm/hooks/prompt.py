"""Shorten the caller's prompt on its way into generate() and forward(), and put it back on the way out."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import replace
from functools import lru_cache, wraps
from typing import Any

import torch
from torch import Tensor, nn

from ..families.features import pixels_in
from ..plan import Plan
from ..stats import Stats
from . import columns, llm, tiles
from .layout import Layout, caller_positions, missing_before, restore_prompt, shorten, take_all, unchanged
from .state import CALL, Attached, Call
from .validate import check_call, check_count, check_features_alone, check_no_pictures, check_pictures

logger = logging.getLogger(__name__)

# Whose generate() runs, innermost last: a draft model gets the pictures as the model that asks it has encoded them.
_generating: ContextVar[tuple[Attached, ...]] = ContextVar("pitome_generating", default=())
CACHE_MARK = "_pitome_layout"  # on a KV cache: the `Layout` of the prompt that filled it


def rewrite(model: nn.Module, handle: Attached, kwargs: dict[str, Any], whole: bool) -> Call | None:
    """The call that ``kwargs`` become; None if there is nothing of ours in it.

    ``whole`` says that ids that come with a KV cache start at the beginning (generate), not behind it (forward).
    """
    _tell_videos(handle, kwargs)
    marked = getattr(kwargs.get("past_key_values"), CACHE_MARK, None)
    if marked is not None or pixels_in(kwargs) is not None:
        check_call(handle, kwargs)
    full, kept = _pictures(handle, kwargs)
    if not kept and marked is None:
        check_no_pictures(handle, kwargs)
        return None
    image, mask = _placeholders(model, kwargs), kwargs.get("attention_mask")
    seen = _seen(kwargs.get("past_key_values"), marked, image)
    if mask is not None and (mask.dim() != 2 or mask.shape[1] < image.shape[1]):
        raise ValueError(f"attention_mask of shape {tuple(mask.shape)} does not fit; pass the processor's (B, T) mask")
    with_past = seen is not None and whole and (mask is None or mask.shape[1] == image.shape[1])
    fresh = image[:, seen.width if with_past else 0 :]
    real = _inferred_mask(model, kwargs, image) if mask is None else mask
    real = real[:, real.shape[1] - fresh.shape[1] :]
    count, merged = int(fresh.sum()), full != kept
    short = count > 0 and count == sum(kept)
    first = 0 if whole else handle.family.first_position  # generate() itself adds it to position ids
    original = _original(handle.plan) if marked is None else marked.original
    move = original and count > 0 and merged
    if merged and pixels_in(kwargs) is not None:
        if count or seen is None:  # assistants get the pictures of a prompt that is in the cache already
            check_count(handle, count, full, kept)
    elif count:
        lent = _lent(sum(kept))
        handle.note(stats=lent)
        drafting = getattr(kwargs.get("generation_config"), "is_assistant", False)  # of whom it is not asked how
        if merged and lent is None and not drafting:
            check_features_alone(handle.plan, kwargs, move, short)
        move = move and lent is not None

    if merged and count == sum(full):
        new = shorten(fresh, real, full, kept)
    elif marked is not None:
        new = unchanged(*fresh.shape, fresh.device)
    else:  # already short; or features alone, of which the model refuses a wrong number
        if move and short and (pixels_in(kwargs) is not None or kwargs.get("position_ids") is None):
            positions = caller_positions(real) + missing_before(fresh, full, kept)
            kwargs = {**kwargs, "position_ids": positions + first}
        return Call(kwargs, image, move=move)
    layout = replace(new if seen is None else seen.then(new), original=original)
    return _shortened(model, Call(kwargs, image, layout, move), new, first)


def _lent(tokens: int) -> Stats | None:
    """What became of pictures of ``tokens`` in all, if a model whose generate() runs has encoded them."""
    for handle in reversed(_generating.get()):
        stats = handle.state.stats
        if stats is not None and sum(stats.lengths) == tokens:
            return stats
    return None


def _original(plan: Plan | None) -> bool:
    """Whether visual tokens take the positions of their patches."""
    return plan is not None and plan.positions == "original"


def _tell_videos(handle: Attached, kwargs: dict[str, Any]) -> None:
    """Warn, once, that videos pass through as in the plain model."""
    if handle.family.videos and kwargs.get("pixel_values_videos") is not None and not handle.told_of_videos:
        handle.told_of_videos = True
        logger.warning("videos are not merged in %s: %s", type(handle.model).__name__, handle.family.videos)


def _shortened(model: nn.Module, call: Call, new: Layout, first: int) -> Call:
    """The call with its per-token tensors in its layout, or in ``new`` where they hold the tokens of this call only."""
    layout, mask = call.layout, call.kwargs.get("attention_mask")
    short = take_all(call.kwargs, _pad_id(model), layout, new)
    for name in ("position_ids", "cache_position"):  # they count the caller's columns
        short.pop(name, None)
    if mask is None and not bool(layout.real.all()):
        short["attention_mask"] = layout.real.long()
    image = (layout if call.image.shape[1] == layout.width else new).take(call.image, False)
    if layout.original:
        real = torch.ones_like(layout.index[:, :1]).expand(-1, layout.width) if mask is None else mask
        positions = layout.take(caller_positions(real), 0) + first
        short["position_ids"] = positions[:, positions.shape[1] - image.shape[1] :]
    made = Call(short, image, layout, call.move)
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
        raise ValueError("got pictures but neither input_ids nor inputs_embeds; pass the processor's whole output")
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


def _seen(past: Any, marked: Layout | None, image: Tensor) -> Layout | None:
    """The layout of what a KV cache with the mark ``marked`` holds; None if it holds nothing."""
    length = 0 if past is None else int(past.get_seq_length())
    if not length:
        return None
    if marked is None:
        return unchanged(len(image), length, image.device)
    return marked.fitted_to(length).repeated(len(image))


def _pad_id(model: nn.Module) -> int:
    pad = model.generation_config.pad_token_id
    pad = model.config.get_text_config().pad_token_id if pad is None else pad
    return 0 if pad is None else pad


def _mark(past: Any, layout: Layout | None) -> None:
    """Remember on a KV cache how the caller's columns map to its places."""
    if past is not None and layout is not None:
        setattr(past, CACHE_MARK, layout)


def _tell(handle: Attached, layout: Layout | None) -> None:
    """Say in the stats of a run what layout its prompt had."""
    stats = handle.state.stats
    if layout is not None and stats is not None:
        handle.note(stats=replace(stats, layout=layout.columns))


@lru_cache
def _names(function: Callable) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters)


# generate()


def generate(model: nn.Module, plain: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
    """``plain`` generate on the shortened prompt; the answer starts with the caller's own prompt."""
    handle = model._pitome
    kwargs = {**dict(zip(_names(type(model).generate)[1:], args)), **kwargs}
    inputs = kwargs.pop("inputs", None)
    if inputs is not None:
        kwargs["input_ids"] = inputs
    outer = _generating.get()
    try:
        _forget_encoded(handle)
        with torch.no_grad():
            call = rewrite(model, handle, kwargs, whole=True)
        if call is None:
            return plain(**kwargs)
        short = call.kwargs
        if call.layout is not None:
            short = {**short, **_lengths(model, kwargs, _width(short)), **_callbacks(kwargs, _width(short))}
        _generating.set((*outer, handle))
        with handle.choosing(handle.plan, call):  # prompts are short already, and the plan stays what it is
            out = plain(**short)
    finally:
        _generating.set(outer)
        _forget_encoded(handle)
    if call.layout is None:
        return out
    _tell(handle, call.layout)
    sequences = out if isinstance(out, Tensor) else out.sequences
    layout = call.layout.repeated(len(sequences))
    _mark(kwargs.get("past_key_values"), layout)
    _mark(getattr(out, "past_key_values", None), layout)
    if kwargs.get("input_ids") is None:  # from embeddings: sequences hold the new ids only
        return out
    sequences = restore_prompt(sequences, kwargs["input_ids"], _width(short))
    if isinstance(out, Tensor):
        return sequences
    out.sequences = sequences
    return out


def _width(kwargs: dict[str, Any]) -> int:
    ids = kwargs.get("input_ids")
    return (kwargs["inputs_embeds"] if ids is None else ids).shape[1]


def _lengths(model: nn.Module, kwargs: dict[str, Any], short: int) -> dict[str, int]:
    """max_length and min_length, which count the caller's prompt, for a prompt of ``short`` columns."""
    configs = [c for c in (kwargs.get("generation_config"), model.generation_config) if c is not None]
    width, fitted = _width(kwargs), {}
    for name, new_tokens in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
        if any(v is not None for v in (kwargs.get(new_tokens), *(getattr(c, new_tokens, None) for c in configs))):
            continue  # counts new tokens only, and takes precedence
        asked = [kwargs.get(name), *(getattr(c, name, None) for c in configs)]
        length = next((v for v in asked if v is not None), None)
        if name == "max_length" and length is not None and length <= width:
            raise ValueError(
                f"max_length={length} leaves no room behind a prompt of {width} tokens; give max_new_tokens"
            )
        if length:
            fitted[name] = max(length - width + short, 0)
    return fitted


def _callbacks(kwargs: dict[str, Any], short: int) -> dict[str, Any]:
    """The caller's stopping criteria and logits processors, made to see the caller's prompt and not the short one."""
    prompt, wrapped = kwargs.get("input_ids"), {}
    if prompt is None:  # from embeddings: they see the new ids only, as always
        return wrapped

    def seeing(callback: Callable) -> Callable:
        @wraps(callback, assigned=())  # attributes such as eos_token_id, which transformers looks for
        def call(ids: Tensor, scores: Any, **more: Any) -> Any:
            return callback(restore_prompt(ids, prompt, short), scores, **more)

        return call

    for name in ("stopping_criteria", "logits_processor"):
        if kwargs.get(name) is not None:
            wrapped[name] = type(kwargs[name])(map(seeing, kwargs[name]))
    allowed = kwargs.get("prefix_allowed_tokens_fn")
    if allowed is not None:
        wrapped["prefix_allowed_tokens_fn"] = lambda row, ids: allowed(
            row, restore_prompt(ids[None], prompt[row : row + 1], short)[0]
        )
    return wrapped


# forward(): hooks


def before_forward(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    """Forward pre-hook of the model: shorten the prompt. The decoding loop passes through at once."""
    handle = model._pitome
    handle.check_calls(model)
    if args:
        kwargs = {**dict(zip(_names(type(model).forward)[1:], args)), **kwargs}
    generating = handle.generating
    if generating is not None:
        full, kept = _pictures(handle, kwargs)
        if not kept:
            return None
        image = _placeholders(model, kwargs)
        if kept == full or int(image.sum()) != sum(full):  # the prompt that generate() shortened
            return (), {**kwargs, CALL: Call(kwargs, image, move=generating.move)}
    _forget_encoded(handle)
    call = rewrite(model, handle, kwargs, whole=False)
    if call is None:
        return None
    needed: dict[str, Any] = {}
    if call.fresh is not None:
        at_caller = handle.plan is not None and handle.plan.logits == "caller"
        call.answer, needed = columns.columns_of(call.fresh, kwargs, at_caller)
        needed |= columns.labels_left(kwargs, call.kwargs)
    return (), {**call.kwargs, **needed, CALL: call}


def after_forward(model: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
    """Forward hook of the model, also called after an error: remember layout and sizes on the KV cache that is full.

    What the model returned comes to the caller's columns where they are asked for.
    """
    handle, call = model._pitome, kwargs.get(CALL)
    if handle.generating is None:
        _forget_encoded(handle)
    if call is None or output is None:
        return None
    if not call.reached and (call.move or (handle.plan is not None and handle.plan.llm_size_bias)):
        raise RuntimeError(
            f"the LLM of {type(model).__name__} did not get what merging hands down to it: something replaced it, or a "
            "forward on the way to it, after attach; call handle.remove() and attach again"
        )
    past = getattr(output, "past_key_values", None)
    _mark(past, call.layout)
    _tell(handle, call.layout)
    if call.log_size is not None and llm.marked(past) is None:
        llm.mark(past, call.log_size)
    return None if call.answer is None else call.answer.restore(output)


def _forget_encoded(handle: Attached) -> None:
    if handle.state.encoded is not None:
        handle.note(encoded=None)
