"""Proportional attention inside the LLM: every query adds log(size) to its logits for a visual token.

A token that stands for ten patches then draws as much attention as the ten did. The sizes stay on the KV cache, so
that the decoding loop and later turns go on with them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .specs import llm_obstacle

SIZE_MARK = "_pitome_log_size"  # on a KV cache: (B, P) float32, log(size) of what stands at each of its places


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
        before = before.repeat_interleave(len(fresh) // max(len(before), 1), 0)
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
