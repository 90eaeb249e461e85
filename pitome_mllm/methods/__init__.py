"""The methods by name. Adding one: a file beside this one, and a row in `METHODS`."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from .base import Merge, Reducer
from .baselines import GridPool, RandomDrop
from .pitome import PiToMe
from .staged import Staged
from .tome import ToMe


@dataclass(frozen=True)
class Method:
    """A named preset: a reducer, its options, and the settings of `attach` that belong to it."""

    reducer: type[Reducer]
    summary: str
    reference: str
    options: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)


_PITOME = "arXiv 2405.16148"

METHODS: dict[str, Method] = {
    "pitome": Method(PiToMe, "merge inside large clusters, protect the rare tokens (the paper)", _PITOME),
    "pitome-bsm": Method(
        PiToMe, "split by energy, most similar pairs first, nothing protected", _PITOME, {"protect": 0.0}
    ),
    "pitome-llava": Method(
        Staged,
        "what the authors' LLaVA code does: ToMe, then energy; after the block, unweighted, out of order",
        _PITOME,
        settings={
            "metric": "hidden",
            "place": "end",
            "weighted": False,
            "proportional_attention": False,
            "order": "source",
        },
    ),
    "pitome-tuned": Method(PiToMe, "the default; equal to pitome until it is tuned by measurement", _PITOME),
    "tome": Method(ToMe, "alternate by position, most similar pairs first", "arXiv 2210.09461"),
    "random": Method(RandomDrop, "drop a random subset (control)", "control"),
    "pool": Method(GridPool, "mean of neighbouring patches (control)", "control"),
}


def get_method(name: str, **options: Any) -> Reducer:
    """The reducer called ``name``, with its preset options overridden by ``options``.

    Raises
    ------
    ValueError : no such method, or an option that this method does not have; both name what there is.
    """
    if name not in METHODS:
        raise ValueError(unknown("method", name, METHODS))
    method = METHODS[name]
    known = [f.name for f in fields(method.reducer)]
    for option in options:
        if option not in known:
            raise ValueError(unknown(f"option of {name}", option, known))
    return method.reducer(**{**method.options, **options})


def unknown(what: str, got: str, choices: Iterable[str]) -> str:
    """The message for a name that is none of ``choices``."""
    choices = list(choices)
    close = difflib.get_close_matches(str(got), choices, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else "."
    return f"unknown {what} {got!r}{hint} Choices: {', '.join(choices) or 'none'}"


__all__ = ["METHODS", "Merge", "Method", "Reducer", "get_method", "unknown"]
