"""What merged tokens are to the LLM: where they were in the image, and how many patches each stands for.

With ``positions="original"`` a visual token has the position id of its group's first patch. With ``llm_size_bias``
every query adds log(size) to its logit for a visual token (proportional attention): one that stands for ten patches
then draws as much attention as the ten did. The sizes stay on the KV cache, for decoding and later turns.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..families.geometry import PLAIN_BACKENDS, llm_unsupported_reason
from ..methods import UserError
from ..stats import Stats
from . import caches
from .call import CALL, Call
from .layout import Layout
from .positions import at_placeholders, shift_to_first
from .transfers import on


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
    changed: dict[str, Any] = {}
    if layout.position is not None and (kwargs.get("position_ids") is None or (call is not None and call.move)):
        if tokens.shape[1] > 1:
            _check_gaps(language.config)
        changed["position_ids"] = _positions(layout, tokens, past) + handle.family.first_position
    sample = None
    if call is not None and call.sample is not None and not _fills_cache(language, kwargs):
        sample = on(tokens.device, call.sample)
    if layout.log_size is not None:
        check(language.config)
        changed["attention_mask"] = _biased(language, layout, tokens, kwargs, sample)
    elif layout.position is not None and past is None and kwargs.get("attention_mask") is None:
        changed["attention_mask"] = _explicit(language, tokens, sample)
    return args, {**kwargs, **changed}


def _told(call: Call, stats: Stats | None, rows: int) -> Layout:
    """The layout of a call, for ``rows`` rows, with what the LLM is told of its images."""
    if call.told is None:
        layout, image = call.layout.repeated(rows), call.image
        if call.move or call.weigh:
            image = image.repeat_interleave(rows // len(image), 0)
            shift = shift_to_first(image, stats.first) if call.move else None
            sizes = at_placeholders(image, [size.log() for size in stats.sizes]) if call.weigh else None
            layout = layout.on((sizes if shift is None else shift).device).told(image, shift, sizes)
        call.told = layout
    return call.told


def _positions(layout: Layout, tokens: Tensor, past: Any) -> Tensor:
    """Position ids (B, S) of the ``tokens`` (B, S) or (B, S, C) after what a KV cache holds."""
    width = tokens.shape[1]
    return on(tokens.device, layout.fitted_to(caches.length_of(past) + width).position[:, -width:])


def _fills_cache(language: nn.Module, kwargs: dict[str, Any]) -> bool:
    """Whether the LLM has a KV cache in this call, as it then takes no position ids for borders of packed samples."""
    if caches.cache_in(kwargs) is not None:
        return True
    asked = kwargs.get("use_cache")
    checkpointing = language.training and getattr(language, "gradient_checkpointing", False)
    return bool(getattr(language.config, "use_cache", False) if asked is None else asked) and not checkpointing


def _explicit(language: nn.Module, tokens: Tensor, sample: Tensor | None) -> Tensor:
    """A mask that says what sdpa would read out of gaps between position ids where there is none."""
    nothing = torch.zeros(tokens.shape[:2], device=tokens.device)
    if sample is None:
        return torch.ones_like(nothing, dtype=torch.long)
    return biased_mask(nothing, tokens.shape[1], None, None, _dtype(language, tokens), sample)


def _biased(
    language: nn.Module, layout: Layout, tokens: Tensor, kwargs: dict[str, Any], sample: Tensor | None
) -> Tensor | dict[str, Tensor]:
    """The attention mask of a call with log(size) of the keys; a dict where there is one for every kind of layer."""
    past, mask, queries = caches.cache_in(kwargs), kwargs.get("attention_mask"), tokens.shape[1]
    log_size, dtype = on(tokens.device, layout.log_size), _dtype(language, tokens)

    def biased(one: Tensor | None) -> Tensor:
        if one is not None and one.dim() == 4:  # how long the cache is does not matter
            return biased_mask(log_size, queries, past, one, dtype)
        keys = caches.length_of(past) + queries
        return biased_mask(F.pad(log_size, (0, keys - log_size.shape[1])), queries, past, one, dtype, sample)

    return {kind: biased(one) for kind, one in mask.items()} if isinstance(mask, dict) else biased(mask)


def _dtype(language: nn.Module, tokens: Tensor) -> torch.dtype:
    return tokens.dtype if tokens.is_floating_point() else language.dtype


def _check_gaps(config: Any) -> None:
    """ValueError if the LLM of ``config`` reads more out of positions than where tokens are."""
    if config._attn_implementation not in PLAIN_BACKENDS:
        raise UserError(
            f"positions='original' does not go with {config._attn_implementation!r} in the LLM, which takes "
            "gaps between positions for borders of packed sequences; load with attn_implementation='sdpa'"
        )


def check(config: Any) -> None:
    """ValueError if the LLM of ``config`` takes no bias: another attention than sdpa or eager, or sliding windows."""
    unsupported_reason = llm_unsupported_reason(config)
    if unsupported_reason:
        raise UserError(
            f"llm_size_bias=True is not possible with this LLM: {unsupported_reason}; leave it at False, or load with "
            "attn_implementation='sdpa'"
        )


def biased_mask(
    log_size: Tensor, queries: int, past: Any, mask: Tensor | None, dtype: torch.dtype, sample: Tensor | None = None
) -> Tensor:
    """The additive attention mask: causal, without padding, with log(size) of the keys.

    Parameters
    ----------
    log_size : Tensor
        (B, T) of all keys, those in the cache included.
    queries : int
        How many of the last columns ask.
    past : object
        The KV cache or None; a static one has room for more keys than there are.
    mask : Tensor or None
        (B, T or more), 0 at padding; or (B, 1, queries, keys), True or 0 where a query sees a key, as generate()
        prepares it for static caches; None = no padding.
    sample : Tensor, optional
        (B, T), the same number for tokens that see each other; None = all do.

    Returns
    -------
    Tensor
        (B, 1, queries, keys) in ``dtype``.
    """
    lowest = torch.finfo(dtype).min
    keys = log_size.shape[1]
    room = getattr(next(iter(getattr(past, "layers", ())), None), "max_cache_len", keys)  # of a static cache
    if mask is None or mask.dim() == 2:
        mask = F.pad(_causal(log_size, queries, mask, sample), (0, room - keys))
    bias = F.pad(log_size, (0, mask.shape[-1] - keys)).to(dtype)[:, None, None]
    return bias.masked_fill(~mask, lowest) if mask.dtype == torch.bool else (bias + mask).clamp_min(lowest)


def _causal(log_size: Tensor, queries: int, real: Tensor | None, sample: Tensor | None) -> Tensor:
    """(B, 1, queries, T) bool, True where a query sees a key; a query in the padding sees itself."""
    rows, keys = log_size.shape
    columns = torch.arange(keys, device=log_size.device)
    asking = columns[keys - queries :, None]
    seen = (columns <= asking).expand(rows, -1, -1)
    if real is not None:
        seen = (seen & (real[:, None, :keys] != 0)) | (columns == asking)
    if sample is not None:
        seen = seen & (sample[:, None, :] == sample[:, keys - queries :, None])
    return seen[:, None]
