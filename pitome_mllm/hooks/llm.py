"""What merged tokens are to the LLM: where they were in the picture, and how many patches each stands for.

With ``positions="original"`` a visual token has the position id of its group's first patch. With ``llm_size_bias``
every query adds log(size) to its logit for a visual token (proportional attention): one that stands for ten patches
then draws as much attention as the ten did. The sizes stay on the KV cache, for decoding and later turns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..families import PLAIN_BACKENDS, llm_obstacle
from .layout import at_placeholders, place_pictures
from .state import CALL, Call

SIZE_MARK = "_pitome_log_size"  # on a KV cache: (B, P) float32, log(size) of what stands at each of its places


def before_language(language: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    """Forward pre-hook of the LLM: the tower has run, so visual tokens can take their positions and their sizes."""
    call, past = kwargs.get(CALL), kwargs.get("past_key_values")
    if call is None:
        return None if marked(past) is None else (args, _biased(language, None, (), kwargs))
    call.reached = True
    kwargs = {name: value for name, value in kwargs.items() if name != CALL}
    stats, plan = language._pitome.state.stats, language._pitome.plan
    pictures = stats is not None and bool(call.image.any())
    weighed = pictures and plan is not None and plan.llm_size_bias and plan.keep < plan.available
    if pictures and call.move and kwargs.get("position_ids") is not None:
        kwargs = _moved(language, call, stats.first, kwargs)
    if weighed or marked(past) is not None:
        kwargs = _biased(language, call, stats.sizes if weighed else (), kwargs)
    return args, kwargs


def _moved(language: nn.Module, call: Call, first: Sequence[Tensor], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Visual tokens at the positions of the first patches of their groups, (K,) for each picture."""
    if language.config._attn_implementation not in PLAIN_BACKENDS:
        raise ValueError(
            f"positions='original' does not go with {language.config._attn_implementation!r} in the LLM, which takes "
            "gaps between positions for borders of packed sequences; load with attn_implementation='sdpa'"
        )
    positions = kwargs["position_ids"]
    image = call.image.to(positions.device)
    kwargs = {**kwargs, "position_ids": place_pictures(positions, image, first)}
    if kwargs.get("attention_mask") is None and kwargs.get("past_key_values") is None:
        kwargs["attention_mask"] = torch.ones_like(image, dtype=torch.long)  # else sdpa sees packed sequences too
    return kwargs


def _biased(language: nn.Module, call: Call | None, sizes: Sequence[Tensor], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Keys of visual tokens with log(size) in the attention mask; ``call`` brings new ones of ``sizes`` (K,)."""
    check(language.config)
    past = kwargs.get("past_key_values")
    embeds = kwargs.get("inputs_embeds")
    tokens = kwargs["input_ids"] if embeds is None else embeds
    fresh = torch.zeros(tokens.shape[:2], dtype=torch.float32, device=tokens.device)
    if len(sizes):
        log_sizes = [size.to(tokens.device).log() for size in sizes]
        fresh = at_placeholders(call.image.to(tokens.device), log_sizes)
    log_size = continued(past, fresh)
    mark(past, log_size)
    if call is not None:
        call.log_size = log_size  # for the cache that the model makes itself
    dtype = language.dtype if embeds is None else embeds.dtype
    mask = biased_mask(log_size, tokens.shape[1], past, kwargs.get("attention_mask"), dtype)
    return {**kwargs, "attention_mask": mask}


def check(config: Any) -> None:
    """ValueError if the LLM of ``config`` takes no bias: another attention than sdpa or eager, or sliding windows."""
    obstacle = llm_obstacle(config)
    if obstacle:
        raise ValueError(
            f"llm_size_bias=True is not possible with this LLM: {obstacle}; leave it at False, or load with "
            "attn_implementation='sdpa'"
        )


def marked(past: Any) -> Tensor | None:
    """The log sizes that a KV cache carries."""
    return getattr(past, SIZE_MARK, None)


def mark(past: Any, log_size: Tensor) -> None:
    """Remember ``log_size`` (B, P) on a KV cache."""
    if past is not None:
        setattr(past, SIZE_MARK, log_size)


def continued(past: Any, fresh: Tensor) -> Tensor:
    """Log sizes (B, P + S) of a cache of P places and of the S columns of ``fresh`` (B, S) behind it."""
    length = 0 if past is None else int(past.get_seq_length())
    before = marked(past)
    if before is None:
        before = fresh.new_zeros(len(fresh), 0)
    if len(before) != len(fresh):  # beams or several answers repeat each row of the prompt
        if len(fresh) % len(before):
            raise ValueError(f"the KV cache was filled with {len(before)} rows; got {len(fresh)}, no multiple of them")
        before = before.repeat_interleave(len(fresh) // len(before), 0)
    before = F.pad(before[:, :length], (0, max(length - before.shape[1], 0)))  # cropped, or text since then
    return torch.cat([before, fresh], 1)


def biased_mask(log_size: Tensor, queries: int, past: Any, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The additive attention mask: causal, without padding, with log(size) of the keys.

    Parameters
    ----------
    log_size : (B, T) of all keys, those in the cache included.
    queries : how many of the last columns ask.
    past : the KV cache or None; a static one has room for more keys than there are.
    mask : (B, T or more), 0 at padding; or (B, 1, queries, keys), True or 0 where a query sees a key, as generate()
        prepares it for static caches; None = no padding.

    Returns
    -------
    (B, 1, queries, keys) in ``dtype``.
    """
    lowest = torch.finfo(dtype).min
    keys = log_size.shape[1]
    room = getattr(next(iter(getattr(past, "layers", ())), None), "max_cache_len", keys)  # of a static cache
    if mask is None or mask.dim() == 2:
        mask = F.pad(_causal(log_size, queries, mask), (0, room - keys))
    bias = F.pad(log_size, (0, mask.shape[-1] - keys)).to(dtype)[:, None, None]
    return bias.masked_fill(~mask, lowest) if mask.dtype == torch.bool else (bias + mask).clamp_min(lowest)


def _causal(log_size: Tensor, queries: int, real: Tensor | None) -> Tensor:
    """(B, 1, queries, T) bool, True where a query sees a key; a query in the padding sees itself."""
    rows, keys = log_size.shape
    columns = torch.arange(keys, device=log_size.device)
    asking = columns[keys - queries :, None]
    seen = (columns <= asking).expand(rows, -1, -1)
    if real is not None:
        seen = (seen & (real[:, None, :keys] != 0)) | (columns == asking)
    return seen[:, None]
