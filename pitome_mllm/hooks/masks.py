"""The masks of an LLM's attention: who sees whom in each kind of its layers, and what a query is told of the keys.

A sliding window counts positions where the LLM is told of them, as in the plain model: who asks sees back as far as
there, over fewer tokens. (Keys that as many places behind them have pushed out of the KV cache are gone all the same.)
With "none" it counts places.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..families.geometry import RECURRENT, SLIDING, layer_kinds
from . import axes, caches
from .layout import Layout
from .transfers import on

NEAR = 2.0  # what D is subtracted from, which is 1 at distance 0
TABLE = 4096  # distances that are worked out at once


def distances(language: nn.Module, ids: Tensor, reach: int, kind: str) -> Tensor:
    """(L,) float32, log(2 - D(d)) for every distance d up to ``reach`` or more, of the model's own frequencies for a
    ``kind`` of layers; where it has several axes (A, L), what each adds to D.

    Kept until those change; where they do so with the length of a prompt, position ``ids`` say which it is.
    """
    handle, rotary, name = language._pitome, language.rotary_emb, f"{kind}_inv_freq"
    which = (kind,) if hasattr(rotary, name) else ()
    scaled = any(way in str(getattr(rotary, "rope_type", "")) for way in ("dynamic", "longrope"))
    if scaled:
        rotary(ids, ids, *which)
    frequencies = getattr(rotary, name if which else "inv_freq")
    kept = handle.distances.get((kind, ids.dim()))
    if scaled or kept is None or kept[0] is not frequencies or kept[1].shape[-1] <= reach:
        distance = torch.arange(TABLE * (reach // TABLE + 1), device=frequencies.device)
        if ids.dim() == 2:
            table = (NEAR - (distance[:, None] * frequencies.float()).cos().mean(-1)).log()
        else:
            table = axes.nearness(rotary, distance)
        handle.distances[kind, ids.dim()] = kept = frequencies, table
    return kept[1]


def calibrated(
    language: nn.Module, layout: Layout, tokens: Tensor, kwargs: dict[str, Any], sample: Tensor | None
) -> Tensor | dict[str, Tensor]:
    """The attention mask of a call with what the LLM is told; a dict where there is one for every kind of layer.

    ``sample`` (B, T) is the same number for tokens that see each other; None = all do.
    """
    past, mask, family = caches.cache_in(kwargs), kwargs.get("attention_mask"), language._pitome.family
    dtype = tokens.dtype if tokens.is_floating_point() else language.dtype
    layout, kinds = layout.on(tokens.device), layer_kinds(language.config)
    positions = axes.from_ids(kwargs["position_ids"], layout.position)
    asking, ids = positions - family.first_position, axes.as_ids(positions)
    length, queries = caches.length_of(past), tokens.shape[1]

    def made_for(kind: str) -> Tensor:
        one = mask.get(kind) if isinstance(mask, dict) else mask
        window = language.config.sliding_window if kind == SLIDING else None
        keys, first = (queries, 0) if past is None else past.get_mask_sizes(queries, kinds.index(kind))
        if one is None or one.dim() == 2:
            places = torch.arange(max(first + keys, length + queries), device=tokens.device)
            one = seen(places[length : length + queries], places[first : first + keys], one, window)
        elif one.dtype != torch.bool:
            one = one > torch.finfo(one.dtype).min / 2
        if sample is not None:
            one = one & (sample[:, None, :, None] == sample[:, None, None, :])
        position, size = (x[:, first:] for x in layout.of_places(first + one.shape[-1]))
        if window is not None and position.dim() == 2:  # of several axes none is what a window counts
            own = slice(length - first, length - first + queries) if family.prefix else None
            one = in_window(one, asking, position, window, own)
        table = None
        if layout.calibration == "distance":
            reach = layout.reach + max(first + one.shape[-1] - layout.places, 0)
            table = on(tokens.device, distances(language, ids, reach, kind))
        return calibrated_mask(one, asking, position, size, table, dtype)

    made: dict[str, Any] = {kind: made_for(kind) for kind in {*kinds} - {RECURRENT}}
    if isinstance(mask, dict):
        return {**mask, **made}
    if RECURRENT in kinds:
        made[RECURRENT] = None if mask is None or queries == 1 else mask[:, -queries:].contiguous()
    return made if len(made) > 1 else made[kinds[0]]


def calibrated_mask(
    mask: Tensor, asking: Tensor, position: Tensor, size: Tensor, table: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The additive attention mask (B, 1, T, N) that tells of sizes, and of distances with a ``table``.

    Parameters
    ----------
    mask : Tensor
        (B or 1, 1, T, N) bool, True where a query sees a key.
    asking : Tensor
        (B or 1, T) position ids of the queries, or (B or 1, T, A) where they have several axes.
    position, size : Tensor
        (B, N) or (B, N, A), and (B, N) of the keys; the size of text is 0.
    table : Tensor or None
        (L,) what a distance adds; or (A, L), see `distances`.
    """
    bias = size.clamp(min=1).log()[:, None]
    if table is not None:
        told = (mask[:, 0] & (size > 0)[:, None]).any(-1, keepdim=True)  # text before an image is as without one
        bias = _of_distances(asking, position, table).mul_(told).add_(bias)
    return torch.where(mask, bias[:, None].to(dtype), torch.finfo(dtype).min)


def _of_distances(asking: Tensor, position: Tensor, table: Tensor) -> Tensor:
    """(B, T, N) what a table of distances adds to the logits of queries and keys; see `calibrated_mask`."""

    def looked_up(asking: Tensor, position: Tensor, table: Tensor) -> Tensor:
        distance = (asking[:, :, None] - position[:, None]).abs_().clamp_(max=len(table) - 1)  # the largest tensor here
        return table[distance]

    if table.dim() == 1:
        return looked_up(asking, position, table)
    near = sum(looked_up(asking[..., a], position[..., a], one) for a, one in enumerate(table))
    return (NEAR - near).log_()


def in_window(mask: Tensor, asking: Tensor, position: Tensor, window: int, own: slice | None) -> Tensor:
    """``mask`` (B or 1, 1, T, N) without the keys that are a ``window`` of positions or more behind a query.

    ``own`` : which keys are the queries' own, if those that see each other do so across any window; else None.
    """
    near = (asking[:, :, None] - position[:, None] < window)[:, None]
    if own is not None:
        near[..., own] |= mask[..., own] & mask[..., own].mT
    return mask & near


def seen(asking: Tensor, keys: Tensor, real: Tensor | None, window: int | None) -> Tensor:
    """(B or 1, 1, T, N) bool, True where those at places ``asking`` (T,) see those at ``keys`` (N,).

    Parameters
    ----------
    real : Tensor or None
        (B, places), 0 at padding, which sees itself; None = there is none.
    window : int or None
        How many places a query sees, its own included; None = all.
    """
    asking = asking[:, None]
    mask = (keys <= asking)[None]
    if real is not None:
        mask = (mask & (real[:, None, keys.clamp(max=real.shape[1] - 1)] != 0)) | (keys == asking)
    return (mask if window is None else mask & (keys > asking - window))[:, None]
