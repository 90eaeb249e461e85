"""What merged tokens are to the LLM: where they were, how many patches each stands for, and how far away they are.

With a calibration other than "none" a visual token has the median position of its patches, and every query that sees
an image adds to its logit for a key, with s patches behind it (1 for text) and at a distance d of position ids,

    log(s)               "size": a token that stands for ten patches then draws as much attention as the ten did
    log(s * (2 - D(d)))  "distance": D is the part of RoPE that only knows the distance, the mean of cos(d * theta)

What it takes stays on the KV cache, for decoding and later turns.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..families.geometry import llm_unsupported_reason
from ..methods import UserError
from ..plan import Plan, make_plan
from ..settings import Settings
from ..stats import Stats
from . import axes, caches
from .call import CALL, Call
from .layout import Layout
from .positions import at_placeholders, shift_to_median
from .state import Attached
from .transfers import on

logger = logging.getLogger(__name__)

NEAR = 2.0  # what D is subtracted from, which is 1 at distance 0
TABLE = 4096  # distances that are worked out at once


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
        kwargs["attention_mask"] = _calibrated(language, layout, tokens, kwargs, sample)
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
            call.told = call.told.told(image, shift, at_placeholders(image, [*stats.sizes]), call.calibration)
    return call.told


def _shift(call: Call, image: Tensor, stats: Stats) -> Tensor:
    """(B, S) or (B, S, A) what positions at the placeholders ``image`` (B, S) grow by."""
    if call.places is None:
        return shift_to_median(image, stats.median)
    places = on(stats.device, call.places).split([len(group) for group in stats.groups])
    if call.places.dim() == 1:
        told = [at[median] for at, median in zip(places, stats.median)]
    else:
        told = axes.medians(places, stats.groups, stats.lengths)
    position = on(stats.device, call.told.position[:, -image.shape[1] :])
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


def distances(language: nn.Module, ids: Tensor, reach: int) -> Tensor:
    """(L,) float32, log(2 - D(d)) for every distance d up to ``reach`` or more, of the model's own frequencies; where
    it has several axes (A, L), what each adds to D.

    Kept until those change; where they do so with the length of a prompt, position ``ids`` say which it is.
    """
    handle, rotary = language._pitome, language.rotary_emb
    scaled = any(kind in getattr(rotary, "rope_type", "") for kind in ("dynamic", "longrope"))
    if scaled:
        rotary(ids, ids)
    kept = handle.distances
    if scaled or kept is None or kept[0] is not rotary.inv_freq or kept[1].shape[-1] <= reach:
        distance = torch.arange(TABLE * (reach // TABLE + 1), device=rotary.inv_freq.device)
        if ids.dim() == 2:
            near = (distance[:, None] * rotary.inv_freq.float()).cos().mean(-1)
            handle.distances = kept = rotary.inv_freq, (NEAR - near).log()
        else:
            handle.distances = kept = rotary.inv_freq, axes.nearness(rotary, distance)
    return kept[1]


def _calibrated(
    language: nn.Module, layout: Layout, tokens: Tensor, kwargs: dict[str, Any], sample: Tensor | None
) -> Tensor | dict[str, Tensor]:
    """The attention mask of a call with what the LLM is told; a dict where there is one for every kind of layer."""
    past, mask = caches.cache_in(kwargs), kwargs.get("attention_mask")
    dtype = tokens.dtype if tokens.is_floating_point() else language.dtype
    layout, ids = layout.on(tokens.device), kwargs["position_ids"]
    asking = axes.from_ids(ids, layout.position) - language._pitome.family.first_position

    def calibrated(one: Tensor | None) -> Tensor:
        if one is None or one.dim() == 2:
            one = _seen(tokens, past, one, sample)
        position, size = layout.of_places(one.shape[-1])
        table = None
        if layout.calibration == "distance":
            reach = layout.reach + max(one.shape[-1] - layout.places, 0)
            table = on(tokens.device, distances(language, ids, reach))
        return calibrated_mask(one, asking, position, size, table, dtype)

    return {kind: calibrated(one) for kind, one in mask.items()} if isinstance(mask, dict) else calibrated(mask)


def calibrated_mask(
    mask: Tensor, asking: Tensor, position: Tensor, size: Tensor, table: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The additive attention mask (B, 1, T, N) that tells of sizes, and of distances with a ``table``.

    Parameters
    ----------
    mask : Tensor
        (B, 1, T, N), True or 0 where a query sees a key.
    asking : Tensor
        (B or 1, T) position ids of the queries, or (B or 1, T, A) where they have several axes.
    position, size : Tensor
        (B, N) or (B, N, A), and (B, N) of the keys; the size of text is 0.
    table : Tensor or None
        (L,) what a distance adds; or (A, L), see `distances`.
    """
    lowest = torch.finfo(dtype).min
    bias = size.clamp(min=1).log()[:, None]
    if table is not None:
        seen = mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] > lowest / 2
        told = (seen & (size > 0)[:, None]).any(-1, keepdim=True)  # text before an image is what it is without one
        bias = _of_distances(asking, position, table).mul_(told).add_(bias)
    bias = bias[:, None].to(dtype)
    return torch.where(mask, bias, lowest) if mask.dtype == torch.bool else (bias + mask).clamp_min(lowest)


def _of_distances(asking: Tensor, position: Tensor, table: Tensor) -> Tensor:
    """(B, T, N) what a table of distances adds to the logits of queries and keys; see `calibrated_mask`."""

    def looked_up(asking: Tensor, position: Tensor, table: Tensor) -> Tensor:
        distance = (asking[:, :, None] - position[:, None]).abs_().clamp_(max=len(table) - 1)  # the largest tensor here
        return table[distance]

    if table.dim() == 1:
        return looked_up(asking, position, table)
    near = sum(looked_up(asking[..., a], position[..., a], one) for a, one in enumerate(table))
    return (NEAR - near).log_()


def _seen(tokens: Tensor, past: Any, real: Tensor | None, sample: Tensor | None) -> Tensor:
    """(B, 1, T, N) bool, True where ``tokens`` (B, T) see a key; one in the padding sees itself.

    Parameters
    ----------
    past : object
        The KV cache in front of them or None; a static one has room for more keys than there are.
    real : Tensor or None
        (B, N or more), 0 at padding; None = there is none.
    sample : Tensor, optional
        (B, T), the same number for tokens that see each other; None = all do.
    """
    queries = tokens.shape[1]
    keys = caches.length_of(past) + queries
    columns = torch.arange(keys, device=tokens.device)
    asking = columns[keys - queries :, None]
    seen = (columns <= asking).expand(len(tokens), -1, -1)
    if real is not None:
        seen = (seen & (real[:, None, :keys] != 0)) | (columns == asking)
    if sample is not None:
        seen = seen & (sample[:, None, :] == sample[:, keys - queries :, None])
    room = getattr(next(iter(getattr(past, "layers", ())), None), "max_cache_len", keys)
    return (seen if room == keys else F.pad(seen, (0, room - keys)))[:, None]
