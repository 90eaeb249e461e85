"""KV caches: which one a call fills, and the `Layout` of what it holds, which follows whatever callers do to it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from .layout import Layout, unchanged
from .positions import caller_positions

NAMES = ("past_key_values", "cache")  # of the argument; the latter since transformers 5.24
LAYOUT = "_pitome_layout"  # the attribute on a cache


def cache_in(kwargs: Mapping[str, Any]) -> Any:
    """The KV cache among the arguments of a call, by either name; None if there is none."""
    return next((kwargs[name] for name in NAMES if kwargs.get(name) is not None), None)


def cache_of(output: Any) -> Any:
    """The KV cache in a model's output, a dict or a tuple; None if there is none."""
    parts = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple) else ()
    return next((part for part in parts if hasattr(part, "get_seq_length")), None)


def name_for(module: nn.Module) -> str:
    """What a model or a part of it calls the KV cache that it takes."""
    parameters = inspect.signature(type(module).forward).parameters
    return next((name for name in NAMES if name in parameters), NAMES[0])


def length_of(past: Any) -> int:
    """The places that a KV cache holds; 0 of one that holds no rows of prompts, see `is_paged`."""
    return 0 if past is None or is_paged(past) else int(past.get_seq_length())


def is_paged(past: Any) -> bool:
    """Whether a KV cache holds pieces of many requests, as continuous batching (generate_batch) has it."""
    return past is not None and not hasattr(past, "get_seq_length")


def content_of(kwargs: Mapping[str, Any]) -> tuple[int, Layout | None]:
    """The places that a call's KV cache holds, and the layout of what it was filled with."""
    past = cache_in(kwargs)
    length = length_of(past)
    if past is not None and not length and not is_paged(past):
        forget(past)  # it was emptied layer by layer
    return length, layout_of(past)


def seen(length: int, layout: Layout | None, image: Tensor, mask: Tensor | None, positioned: bool) -> Layout | None:
    """The layout of what a KV cache of ``length`` places holds, for the rows of a call; None if it holds nothing.

    It was filled with ``layout``, by default the caller's columns; ``image`` (B, T) are the placeholders of the call,
    ``mask`` (B, T or more) is 0 at padding, ``positioned`` asks for positions.
    """
    if not length:
        return None
    if layout is None:
        layout = unchanged(len(image), 0, image.device)
        layout = layout.positioned(caller_positions(layout.real)) if positioned else layout
    return layout.on(image.device).repeated(len(image)).fitted_to(length, mask)


def layout_of(past: Any) -> Layout | None:
    """The layout that was remembered on a KV cache; what it holds may be longer by now, one to one."""
    return getattr(past, LAYOUT, None)


def remember(past: Any, layout: Layout) -> None:
    """Keep ``layout`` on a KV cache: it follows the rows and places of the cache from now on."""
    setattr(past, LAYOUT, layout)
    for name in _CHANGES:
        if hasattr(type(past), name):
            setattr(past, name, partial(_follow, past, name))


def forget(past: Any) -> None:
    """Leave nothing of ours on a KV cache."""
    for name in (LAYOUT, *_CHANGES):
        vars(past).pop(name, None)


def _follow(past: Any, name: str, *args: Any, **kwargs: Any) -> Any:
    """Call a method of a KV cache, and change the cache's layout alike."""
    out = getattr(type(past), name)(past, *args, **kwargs)
    layout = layout_of(past)
    if layout is not None:
        layout = _CHANGES[name](layout, past, *args, *kwargs.values())
    if layout is None or not layout.places:
        forget(past)
    else:
        setattr(past, LAYOUT, layout)
    return out


_CHANGES: dict[str, Callable[..., Layout | None]] = {
    "reset": lambda layout, past: None,
    "crop": lambda layout, past, removed: layout.fitted_to(min(length_of(past), layout.places)),
    "reorder_cache": lambda layout, past, rows: layout.rows(rows),
    "batch_select_indices": lambda layout, past, rows: layout.rows(rows),
    "batch_repeat_interleave": lambda layout, past, times: layout.repeated(times * len(layout.index)),
}
