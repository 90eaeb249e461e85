"""Shorten the caller's prompt on its way into generate() and forward()."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import axes, caches, columns
from .arguments import Prompt, brings_pictures, pad_id, placeholders, read_prompt
from .call import CALL, Call, named
from .layout import Layout, alike, shorten, take_all, unchanged
from .positions import caller_positions, missing_before
from .samples import and_next, packed, restarting
from .state import Attached
from .transfers import on, on_host
from .validate import check_count, check_features_alone, check_restart, check_unpacked, check_whole


def rewrite(handle: Attached, kwargs: dict[str, Any], whole: bool) -> Call | None:
    """The call that ``kwargs`` become; None if there is nothing of ours in it. ``whole`` : as in `read_prompt`."""
    prompt = read_prompt(handle, kwargs, whole)
    if prompt is None:
        return None
    tell = _tells(handle, prompt)
    restart = restarting(kwargs, prompt.real, prompt.seen)
    counted = prompt.is_parted if kwargs.get("position_ids") is None else prompt.calibrated
    if prompt.is_long or prompt.continues or (prompt.is_short and (tell or counted or axes.counts_axes(handle.core))):
        check_unpacked(kwargs)
        positions = axes.positions_of(handle.core, prompt)
        new, sample, ids = _layout(prompt, tell, restart) if positions is None else _on_axes(prompt, positions)
        call = _shortened(handle, prompt, new, sample, ids)
        call.calibration = prompt.calibration if tell else "none"
        if call.calibration != "none" and prompt.is_long and handle.plan.where == "packed":
            call.places = _places(prompt, positions, restart)
    else:  # nothing is told; or features alone, of which the model refuses a wrong number
        call = Call(kwargs, prompt.image)
    call.encoded = prompt.images.encoded
    return call


def _tells(handle: Attached, prompt: Prompt) -> bool:
    """Whether the LLM is told where visual tokens were, and how many patches each stands for."""
    kwargs, images, count = prompt.kwargs, prompt.images, prompt.placeholders
    tell = count > 0 and prompt.merges and prompt.calibrated
    if prompt.merges and brings_pictures(handle, kwargs):
        if count or prompt.seen is None:  # assistants get the images of a prompt that is in the cache already
            check_count(handle, count, images.full, images.kept)
    elif count and images.encoded is None:
        handle.note(stats=images.lent)
        drafting = getattr(kwargs.get("generation_config"), "is_assistant", False)  # of whom it is not asked how
        if prompt.merges and images.lent is None and not drafting:
            check_features_alone(prompt.calibration, count, images.full, images.kept)
        tell = tell and images.lent is not None
    return tell


def _layout(prompt: Prompt, tell: bool, restart: Tensor | None) -> tuple[Layout, Tensor | None, Tensor | None]:
    """The layout of the columns that the KV cache does not hold, with positions if it is to have any; of packed samples
    also which one (B, S) every place belongs to, and position ids where the layout has none.
    """
    fresh, real, first = prompt.fresh, prompt.real, prompt.first
    if prompt.is_long:
        new = shorten(fresh, real, prompt.images.full, prompt.images.kept)
    else:
        new = replace(unchanged(*fresh.shape, fresh.device), real=real)
    positions = caller_positions(real)
    if prompt.is_short and prompt.calibrated:
        check_whole(restart, real)
        restart = None  # they leave gaps behind images, and begin no sample
        given = prompt.kwargs.get("position_ids")
        if tell and (prompt.images.lent is None or given is None):
            positions = positions + missing_before(F.pad(fresh, (0, 1)), prompt.images.full, prompt.images.kept)
        elif given is not None:  # features alone: of their places only the caller knows
            given = given[:, -fresh.shape[1] :].expand(len(fresh), -1).to(fresh.device)
            follows = 0 if prompt.seen is None else prompt.seen.follows
            positions = and_next(given - first - follows)
    if restart is not None:
        check_restart(after=prompt.seen is not None)
        return packed(new, real, restart - first, prompt.calibrated)
    counted = prompt.calibrated or prompt.is_parted  # as in a whole prompt, which closes up
    return (new.positioned(positions) if counted else new), None, None


def _on_axes(prompt: Prompt, positions: Tensor) -> tuple[Layout, None, None]:
    """The layout of columns that have ``positions`` (B, T + 1, A) in several axes."""
    images, fresh = prompt.images, prompt.fresh
    if prompt.is_long:
        new = shorten(fresh, prompt.real, images.full, images.kept)
    else:
        new = replace(unchanged(*fresh.shape, fresh.device), real=prompt.real)
    if prompt.is_long and not prompt.calibrated:
        positions = axes.compact(positions, fresh, images.full, images.kept)
    return new.positioned(positions), None, None


def _places(prompt: Prompt, positions: Tensor | None, restart: Tensor | None) -> list[Tensor]:
    """The positions of every row's placeholders, by ``positions`` in several axes or those of packed samples."""
    if positions is None:
        positions = caller_positions(prompt.real) if restart is None else and_next(restart - prompt.first)
    if prompt.seen is not None:
        positions, follows = alike(positions, prompt.seen.follows)
        positions = positions + follows
    return [row[at] for row, at in zip(positions[:, :-1], prompt.fresh)]


def _shortened(handle: Attached, prompt: Prompt, new: Layout, sample: Tensor | None, ids: Tensor | None) -> Call:
    """The call with its per-token tensors in the layout of the KV cache, or in ``new`` where they hold fresh columns.

    ``ids`` : position ids (B, S) where the layout has none and they are not the usual ones.
    """
    layout = new if prompt.seen is None else prompt.seen.then(new)
    tokens = prompt.kwargs.get("input_ids")
    device = (prompt.kwargs["inputs_embeds"] if tokens is None else tokens).device
    short = take_all(prompt.kwargs, pad_id(handle.model), layout, new)
    for name in ("position_ids", "cache_position"):  # they count the caller's columns
        short.pop(name, None)
    if short.get("attention_mask") is not None:
        sample = None  # it says all
    elif sample is None and not bool(layout.real.all()):
        short["attention_mask"] = on(device, layout.real.long())
    image = (layout if prompt.image.shape[1] == layout.width else new).take(prompt.image, 0)
    ids = ids if layout.position is None else layout.position
    if ids is not None:
        short["position_ids"] = on(device, axes.as_ids(ids[:, ids.shape[1] - image.shape[1] :] + prompt.first))
        if ids.dim() == 3:  # as the model itself leaves it for later steps
            handle.core.rope_deltas = on(device, layout.follows[..., 0] - layout.real.sum(1, keepdim=True))
    return Call(short, image[:, image.shape[1] - new.places :], layout, sample=sample, fresh=new)


def tell(handle: Attached, layout: Layout | None) -> None:
    """Say in the stats of a run what layout its prompt had."""
    stats = handle.state.stats
    if layout is not None and stats is not None:
        handle.note(stats=replace(stats, layout=on(stats.device, layout.columns)))


def before_forward(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    """Forward pre-hook of the model and of its core: shorten the prompt. The decoding loop passes through at once."""
    if CALL in kwargs:  # the model calls its core
        return None
    handle = module._pitome
    handle.check_calls(module)
    if args:
        kwargs = named(type(module).forward, args, kwargs)
    generating = handle.generating
    if generating is not None:
        if not brings_pictures(handle, kwargs) and kwargs.get("mm_encoder_outputs") is None:
            return None
        if _is_part(handle, generating, kwargs):
            part = generating.again() if brings_pictures(handle, kwargs) else generating
            part.owner = module
            return (), _handed_down(part, kwargs)
    handle.forget_encoded()
    call = rewrite(handle, kwargs, whole=False)
    if call is None:
        return None
    call.owner = module
    needed: dict[str, Any] = {}
    if call.fresh is not None:
        at_caller = handle.plan is not None and handle.plan.logits == "caller"
        asked = kwargs if module is handle.model else {**kwargs, "logits_to_keep": 0}  # the core makes no logits
        call.answer, needed = columns.columns_of(call.fresh, asked, at_caller)
        needed |= columns.labels_left(kwargs, call.kwargs)
    return (), _handed_down(call, {**call.kwargs, **needed})


def _handed_down(call: Call, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call for the model. Gaps in its positions, which a model takes for borders of packed samples
    when it makes masks, only the LLM gets, from the call.
    """
    ids = kwargs.get("position_ids")
    if call.calibration != "none" and ids is not None and ids.dim() == 2:
        kwargs = {name: value for name, value in kwargs.items() if name != "position_ids"}
    return {**kwargs, CALL: call}


def _is_part(handle: Attached, generating: Call, kwargs: dict[str, Any]) -> bool:
    """Whether the placeholders of a call are those that the prompt of a running generate() has at these places."""
    (image,), length = on_host(placeholders(handle, kwargs)), caches.length_of(caches.cache_in(kwargs))
    return generating.layout is None or torch.equal(image, generating.part(*image.shape, length))


def after_forward(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
    """Forward hook of the model and of its core: the KV cache that is full, perhaps one that the LLM made itself, gets
    its layout, and what was returned comes to the caller's columns if it is to.
    """
    handle, call = module._pitome, kwargs.get(CALL)
    if call is None or call.owner is not module:
        return None
    if call.told is None and call.calibration != "none":
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
