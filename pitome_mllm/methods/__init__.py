"""The methods by name. Adding one: a file beside this one, and a row in `METHODS`."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from ..errors import UserError
from .baselines import RandomDrop, Uniform
from .cdpruner import CDPruner
from .crossget import CrossGET
from .dart import DART
from .dct import DCT
from .diffrate import DiffRate
from .divprune import DivPrune
from .mctf import MCTF
from .merge import Merge
from .pitome import PiToMe
from .pooling import Downsample, GridPool
from .prumerge import PruMerge
from .reducer import Reducer
from .staged import Staged
from .tofu import ToFu
from .tome import ToMe
from .visionzip import VisionZip


@dataclass(frozen=True)
class Method:
    """A name for a reducer and what belongs to it.

    Attributes
    ----------
    options : of the reducer, as its paper has them.
    settings : of `attach`, without which it would be another method; all others are the library's, or its paper's.
    library : options that `attach` gives the reducer unless ``published=True``.
    spectral : whether its paper proves that merging keeps the spectrum of the token graph.
    variant : it is what somebody published, so that `attach` always runs it as published.
    """

    reducer: type[Reducer]
    summary: str
    reference: str
    options: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    library: Mapping[str, Any] = field(default_factory=dict)
    spectral: bool = False
    variant: bool = False


_PITOME = "arXiv 2405.16148"
_ONCE = {"where": "projector"}  # where methods that reduce once belong
_PROJECTED = {"where": "projector", "metric": "projected"}
_METRIC_FREE = {"metric": "hidden"}  # so that no keys are read
_SOURCE = dict(metric="hidden", place="end", weighted=False, proportional_attention=False, order="source")
_DROP = _ONCE | _METRIC_FREE  # dropping earlier loses more

METHODS: dict[str, Method] = {
    "pitome": Method(
        PiToMe,
        "merge inside large clusters, protect the rare tokens",
        _PITOME,
        library={"protect": 0.5, "alpha": 0.0, "margin": 0.6},
        spectral=True,
    ),
    "pitome-bsm": Method(
        PiToMe, "split by energy, most similar pairs first, nothing protected", _PITOME, {"protect": 0.0}
    ),
    "pitome-llava": Method(
        Staged,
        "what the authors' LLaVA code does: ToMe, then energy; after the block, unweighted, out of order",
        _PITOME,
        settings=_SOURCE,
        variant=True,
    ),
    "tome": Method(ToMe, "alternate by position, most similar pairs first", "arXiv 2210.09461"),
    "tofu": Method(
        ToFu, "ToMe's matching, means keep the largest norm", "arXiv 2312.01026", settings={"weighted": False}
    ),
    "mctf": Method(MCTF, "alike, of little attention, small; from both sides", "arXiv 2403.10030"),
    "crossget": Method(CrossGET, "match on the complete graph", "arXiv 2305.17455"),
    "diffrate": Method(DiffRate, "keep what the class token looks at, merge the rest into it", "arXiv 2305.17997"),
    "dct": Method(DCT, "drop high frequencies of the token sequence", "arXiv 2305.15099"),
    "visionzip": Method(
        VisionZip, "dominant tokens by class attention, few others", "arXiv 2412.04467", settings=_ONCE
    ),
    "prumerge": Method(
        PruMerge, "keep what the class token looks at, absorb by attention", "arXiv 2403.15388", settings=_ONCE
    ),
    "prumerge-plus": Method(
        PruMerge, "prumerge, half of it from equal distances", "arXiv 2403.15388", {"uniform": 0.5}, _ONCE
    ),
    "divprune": Method(DivPrune, "keep the most diverse tokens (max-min)", "arXiv 2503.02175", settings=_PROJECTED),
    "dart": Method(DART, "keep what duplicates a few pivots least", "arXiv 2502.11494", settings=_DROP),
    "cdpruner": Method(
        CDPruner,
        "keep the most diverse tokens (determinant); without the question",
        "arXiv 2506.10967",
        settings=_PROJECTED,
    ),
    "random": Method(RandomDrop, "drop a random subset (control)", "control", settings=_DROP),
    "uniform": Method(Uniform, "keep tokens at equal distances (control)", "control", settings=_DROP),
    "pool": Method(GridPool, "mean of neighbouring patches (control)", "control", settings=_METRIC_FREE),
    "downsample": Method(Downsample, "a smaller picture, fewer patches from the start (control)", "control"),
}


def get_method(name: str, **options: Any) -> Reducer:
    """The reducer called ``name`` as its paper has it, but for ``options``.

    Raises
    ------
    ValueError
        No such method, or an option that this method does not have; both name what there is.
    """
    if name == "pitome-tuned":
        raise UserError(
            "the method 'pitome-tuned' is gone: attach(model, 'pitome', keep=...) does the same; its rule alone is "
            f"get_method('pitome', {', '.join(f'{k}={v}' for k, v in METHODS['pitome'].library.items())})"
        )
    if name not in METHODS:
        raise UserError(unknown("method", name, METHODS))
    method = METHODS[name]
    known = [f.name for f in fields(method.reducer)]
    for option in options:
        if option not in known:
            raise UserError(unknown(f"option of {name}", option, known))
    return method.reducer(**{**method.options, **options})


def unknown(what: str, got: str, choices: Iterable[str]) -> str:
    """The message for a name that is none of ``choices``."""
    choices = list(choices)
    close = difflib.get_close_matches(str(got), choices, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else "."
    return f"unknown {what} {got!r}{hint} Choices: {', '.join(choices) or 'none'}"


__all__ = ["METHODS", "Merge", "Method", "Reducer", "UserError", "get_method", "unknown"]
