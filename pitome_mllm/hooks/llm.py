"""What merged tokens are to the LLM: where they were, how many patches each stands for, and how far away they are.

With a calibration other than "none" a visual token has the median position of its patches, and every query that sees
an image adds to its logit for a key, with s patches behind it (1 for text) and at a distance d of position ids,

    log(s)               "size": a token that stands for ten patches then draws as much attention as the ten did
    log(s * (2 - D(d)))  "distance": D is the part of RoPE that only knows the distance, the mean of cos(d * theta)

An image that lost nothing counts as text, whatever is beside it in a batch. What it takes stays on the KV cache, for
decoding and later turns.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..families.geometry import llm_unsupported_reason
from ..methods import UserError
from ..plan import Plan, make_plan
from ..settings import Settings
from ..stats import Stats
from . import axes, caches, masks
from .call import CALL, Call
from .layout import Layout
from .positions import at_placeholders, shift_to_median
from .state import Attached
from .transfers import on

logger = logging.getLogger(__name__)


def before_language(language: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    """Forward pre-hook of the LLM: the tower has run, so visual tokens can take their positions and their sizes."""
    handle, call, past = language._pitome, kwargs.get(CALL), caches.cache_in(kwargs)
    kwargs = {name: value for name, value in kwargs.items() if name != CALL}
    embeds = kwargs.get("inputs_embeds")
    tokens = kwargs.get("input_ids") if embeds is None else embeds
    layout = caches.layout_of(past)
    if call is not None:
        layout = layout if call.layout is None else _told(call, handle.state.stats, len(tokens))
    if layout is None:
        return args, kwargs
    if layout.position is not None and (
        kwargs.get("position_ids") is None or (call is not None and call.calibration != "none")
    ):
        kwargs["position_ids"] = axes.as_ids(_positions(layout, tokens, past) + handle.family.first_position)
    if layout.calibration != "none":
        check(language.config, layout.calibration)
        sample = None
        if call is not None and call.sample is not None and not _fills_cache(language, kwargs):
            sample = on(tokens.device, call.sample)
        kwargs["attention_mask"] = masks.calibrated(language, layout, tokens, kwargs, sample)
    elif call is not None and past is not None and not caches.length_of(past) and bool(call.layout.real.all()):
        mask = kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.shape == tokens.shape[:2]:
            kwargs["attention_mask"] = None  # all ones, which transformers would wait for the device to see
    return args, kwargs


def _told(call: Call, stats: Stats | None, rows: int) -> Layout:
    """The layout of a call, for ``rows`` rows, with what the LLM is told of its images."""
    if call.told is None:
        call.told = call.layout.repeated(rows)
        if call.calibration != "none":
            image = call.image.repeat_interleave(rows // len(call.image), 0)
            shift = _shift(call, image, stats)
            call.told = call.told.told(image, shift, at_placeholders(image, _sizes(stats)), call.calibration)
    return call.told


def _sizes(stats: Stats) -> Sequence[Tensor]:
    """(K,) for each image the patches of its tokens; 0, as at text, where it lost none."""
    if not stats.packed:
        return stats.sizes
    return [one.size * (len(one.token) < len(one.group)) for one in stats.packed]


def _shift(call: Call, image: Tensor, stats: Stats) -> Tensor:
    """(B, S) or (B, S, A) what positions at the placeholders ``image`` (B, S) grow by."""
    position = on(stats.device, call.told.position[:, -image.shape[1] :])
    if not call.places:  # of a prompt that was short already, where the caller says what several axes count
        return shift_to_median(image, stats.median) if position.dim() == 2 else torch.zeros_like(position)
    lengths = [len(group) for group in stats.groups]
    times = sum(lengths) // sum(map(len, call.places))  # models that repeat pictures for beams do so row by row
    flat = torch.cat([row for row in call.places for _ in range(times)])
    places = on(stats.device, flat).split(lengths)
    if flat.dim() == 1:
        told = [at[median] for at, median in zip(places, stats.median)]
    else:
        told = axes.medians(places, stats.groups, stats.lengths)
    there = on(stats.device, image if position.dim() == 2 else image[..., None])
    return (at_placeholders(image, told) - position).masked_fill(~there, 0)


def _positions(layout: Layout, tokens: Tensor, past: Any) -> Tensor:
    """Position ids (B, S) of the ``tokens`` (B, S) or (B, S, C) after what a KV cache holds."""
    width = tokens.shape[1]
    return on(tokens.device, layout.of_places(caches.length_of(past) + width)[0][:, -width:])


def _fills_cache(language: nn.Module, kwargs: dict[str, Any]) -> bool:
    """Whether the LLM has a KV cache in this call, as it then takes no position ids for borders of packed samples."""
    if caches.cache_in(kwargs) is not None:
        return True
    asked = kwargs.get("use_cache")
    checkpointing = language.training and getattr(language, "gradient_checkpointing", False)
    return bool(getattr(language.config, "use_cache", False) if asked is None else asked) and not checkpointing


def check(config: Any, calibration: str) -> None:
    """UserError if the LLM of ``config`` takes no calibration: its attention may have been changed since `attach`."""
    reason = llm_unsupported_reason(config)
    if reason:
        raise UserError(f"calibration={calibration!r} is not possible: {reason}; or choose calibration='none'")


def planned(handle: Attached, settings: Settings) -> Plan:
    """What ``settings`` mean now: the LLM's attention may be another one than at `attach`."""
    if not (handle.family.original or handle.family.encoder):
        reason = llm_unsupported_reason(handle.model.config.text_config)
        handle.geometry = replace(handle.geometry, llm_unsupported_reason=reason)
    plan = make_plan(settings, handle.geometry)
    tell_left_out(handle, settings, plan)
    return plan


def tell_left_out(handle: Attached, settings: Settings, plan: Plan) -> None:
    """Warn, once, that the LLM takes no calibration where the library would choose one."""
    left = settings.calibration is None and not settings.as_published and plan.reducer.forms_groups
    reason = handle.geometry.llm_unsupported_reason
    if reason and left and not (handle.told_of_calibration or handle.family.encoder):
        handle.told_of_calibration = True
        logger.warning("calibration='none', which costs accuracy: %s", reason)
