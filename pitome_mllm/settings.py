"""What the caller asks for (`Settings`), and what that comes to for one model (`resolve_settings`)."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from .families.geometry import Geometry
from .methods import METHODS, Reducer, UserError, get_method, unknown
from .schedule import EVERY, SHAPES, check_merges

logger = logging.getLogger(__name__)

CHOICES = {
    "where": ("tower", "projector", "both", "packed"),
    "metric": ("keys", "hidden", "projected"),
    "place": ("mid", "end"),
    "order": ("reading", "source"),
    "calibration": ("distance", "size", "none"),
    "schedule": tuple(SHAPES),
    "logits": ("merged", "caller"),
}
# What a setting is when neither the caller nor the method's preset says anything. How tokens merge goes with the
# method: choosing another one resets it. Where they merge does not.
HOW = {"metric": "keys", "place": "mid", "weighted": True, "proportional_attention": True, "order": "reading"}
WHERE = {"where": "tower", "schedule": "equal", "merges": EVERY, "calibration": "distance"}
DEFAULTS: dict[str, Any] = {**HOW, **WHERE}
DEFAULT_METHOD = "pitome-tuned"
GRAPHS = (True, False, "auto")
SWITCHES = ("weighted", "proportional_attention", "energies")
GONE = {
    "compiled": "graph=True runs the vision tower as CUDA graphs without a compiler; to use one, leave it out and call "
    "torch.compile on the tower yourself",
    "positions": "write calibration='distance' or 'size' for original positions, calibration='none' for compact ones",
    "llm_size_bias": "write calibration='distance' or 'size' for True, calibration='none' for False",
}


@dataclass(frozen=True)
class Settings:
    """What `attach` was asked for; see there. None = the preset's choice, else `DEFAULTS`."""

    method: str | Reducer = DEFAULT_METHOD
    keep: int | float | None = None
    ratio: float | None = None
    counts: Sequence[int] | None = None
    schedule: str | None = None
    merges: int | str | None = None
    where: str | None = None
    tower_keep: int | float | None = None
    metric: str | None = None
    place: str | None = None
    weighted: bool | None = None
    proportional_attention: bool | None = None
    order: str | None = None
    calibration: str | None = None
    energies: bool = False
    logits: str = "merged"
    graph: bool | str = "auto"
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def preset(self) -> Mapping[str, Any]:
        """What the method's preset brings; not its place where ratio or counts say what the tower's blocks keep."""
        preset = METHODS[self.method].settings if isinstance(self.method, str) and self.method in METHODS else {}
        if self.ratio is None and self.counts is None:
            return preset
        return {k: v for k, v in preset.items() if k not in ("where", "schedule", "merges")}

    @property
    def place_of_merging(self) -> str:
        """The ``where`` that these settings come to."""
        return self.where or self.preset.get("where", DEFAULTS["where"])

    def changed(self, **given: Any) -> Settings:
        """These settings with ``given`` in place; what is no setting counts as an option of the method.

        A new method starts from its own preset, a new keep, ratio or counts replaces the old one, a new place forgets
        tower_keep, and what leaves no choice of blocks forgets merges.
        """
        for name in GONE.keys() & given.keys():
            raise UserError(f"{name}={given[name]!r} is gone: {GONE[name]}")
        if given.get("method", "") is None:
            given["method"] = DEFAULT_METHOD
        known = {f.name for f in fields(Settings)} - {"options"}
        settings = {k: v for k, v in given.items() if k in known}
        options = {k: v for k, v in given.items() if k not in known}
        if settings.get("method", self.method) != self.method:
            settings = {**dict.fromkeys(HOW), "options": options, **settings}
        else:
            settings["options"] = {**self.options, **options}
        if any(settings.get(k) is not None for k in ("keep", "ratio", "counts")):
            settings = {**dict.fromkeys(("keep", "ratio", "counts")), **settings}
        changed = replace(self, **settings)
        place, forgotten = changed.place_of_merging, set[str]()
        if place != self.place_of_merging:
            forgotten.add("tower_keep")
        once = isinstance(changed.method, str) and changed.method in METHODS and METHODS[changed.method].reducer.once
        if once or changed.ratio is not None or changed.counts is not None or place not in ("tower", "both"):
            forgotten.add("merges")
        none: dict[str, Any] = dict.fromkeys(forgotten - given.keys())
        return replace(changed, **none)


def resolve_settings(settings: Settings, geometry: Geometry) -> tuple[Settings, Reducer, str]:
    """The settings with nothing left open, for models of ``geometry``, and the method: its reducer and its name.

    Raises
    ------
    ValueError
        An unknown method, option or choice, or one that this model or place does not take.
    """
    for name, choices in CHOICES.items():
        value = getattr(settings, name)
        if value not in choices and not (value is None and name in DEFAULTS):
            raise UserError(f"unknown {name} {value!r}; choose one of {', '.join(map(repr, choices))}")
    for name in SWITCHES:
        value = getattr(settings, name)
        if not isinstance(value, bool) and not (value is None and name in DEFAULTS):
            raise UserError(f"{name}={value!r} is not possible; choose True or False")
    if not any(settings.graph is choice or settings.graph == choice == "auto" for choice in GRAPHS):  # 1 is not True
        raise UserError(f"graph={settings.graph!r} is not possible; choose True, False or 'auto'")
    reducer, name = _resolve(settings)
    merges, settings = settings.merges, _complete(settings, reducer, name, geometry)
    _check_needs(settings, reducer, name, geometry)
    _check_merges(merges, settings, reducer, name)
    return settings, reducer, name


def _resolve(settings: Settings) -> tuple[Reducer, str]:
    """The reducer and its name."""
    names = [f.name for f in fields(Settings) if f.name != "options"]
    if isinstance(settings.method, Reducer):
        for option in settings.options:
            raise UserError(unknown("setting", option, names) + " (a reducer instance brings its own options)")
        return settings.method, type(settings.method).__name__
    name = settings.method
    if not isinstance(name, str):
        raise UserError(f"method={name!r} is neither a name nor a Reducer; names: {', '.join(METHODS)}")
    if name in METHODS:
        known = [*names, *(f.name for f in fields(METHODS[name].reducer))]
        for option in settings.options:
            if option not in known:
                raise UserError(unknown(f"setting or option of {name}", option, known))
    return get_method(name, **settings.options), name


def _complete(settings: Settings, reducer: Reducer, name: str, geometry: Geometry) -> Settings:
    """Every setting that the caller left open, by the method's preset, else by default.

    A preset gives way where it cannot hold: its place where ratio or counts say what every block of the tower keeps, a
    metric that exists in another place than the caller's only, and what this LLM does not take (with a warning).
    """
    chosen = {k: getattr(settings, k) for k in DEFAULTS if getattr(settings, k) is not None}
    left = {k: v for k, v in settings.preset.items() if k not in chosen}
    complete = {**DEFAULTS, **left, **chosen}
    if "calibration" not in chosen:
        complete["calibration"] = _best_calibration(complete["calibration"], reducer, geometry)
    if "where" not in chosen and complete["where"] not in geometry.family.places:
        complete["where"] = geometry.family.places[0]
    if "metric" not in chosen and complete["where"] == "packed":
        complete["metric"] = "hidden"
    if left.get("metric") == "projected" and complete["where"] != "projector":
        complete["metric"] = "hidden"
    return replace(settings, **complete)


def _best_calibration(wanted: str, reducer: Reducer, geometry: Geometry) -> str:
    """The calibration ``wanted``, or the best that method and LLM take; a warning where the LLM takes none."""
    if wanted == "none" or not reducer.forms_groups:
        return "none"
    if geometry.llm_unsupported_reason:
        logger.warning("calibration='none', which costs accuracy: %s", geometry.llm_unsupported_reason)
        return "none"
    return wanted if geometry.llm_rotary else "size"


def _check_calibration(kind: str, reducer: Reducer, name: str, geometry: Geometry) -> None:
    """UserError where the method or the LLM does not take a calibration that is asked for."""
    reason = geometry.llm_unsupported_reason
    if kind != "none" and not reducer.forms_groups:
        reason = f"{name} has no groups, so nobody knows where its tokens stand"
    if kind == "distance" and not geometry.llm_rotary:
        reason = reason or "the LLM has no rotary embedding; calibration='size' is possible"
    if kind != "none" and reason:
        raise UserError(f"calibration={kind!r} is not possible: {reason}; or choose calibration='none'")


def _check_needs(settings: Settings, reducer: Reducer, name: str, geometry: Geometry) -> None:
    """ValueError where the model, or the place, lacks something that the method needs."""
    if settings.where not in geometry.family.places:
        raise UserError(
            f"where={settings.where!r} is not possible in this family: {geometry.family.unsupported_reason}; choose "
            f"{' or '.join(f'where={place!r}' for place in geometry.family.places)}"
        )
    if geometry.family.original:
        _check_original(settings, reducer, name)
    if settings.where == "packed" and (settings.metric != "hidden" or reducer.needs):
        got = f"{name} needs {' and '.join(reducer.needs)}" if reducer.needs else f"got metric={settings.metric!r}"
        raise UserError(f"where='packed' merges by what is projected, metric='hidden': {got}; choose another method")
    if geometry.family.tiles and not reducer.forms_groups:
        raise UserError(f"{name} has no groups, so its tokens have no place among tiles; choose another method")
    if settings.metric == "projected" and settings.where != "projector":
        raise UserError(
            f"metric='projected' exists in front of the projector only, got where={settings.where!r}; choose "
            "where='projector', or metric='hidden' or 'keys'"
        )
    _check_calibration(settings.calibration, reducer, name, geometry)
    if settings.order == "source" and not reducer.source_order:
        raise UserError(
            f"order='source' is known for ToMe and for PiToMe with protect=1 and steps=1, got {name}; "
            "choose order='reading'"
        )
    if "attention" in reducer.needs and not geometry.class_tokens:
        raise UserError(
            f"{name} needs the attention of a class token, and this vision tower has none; "
            f"choose another method, such as {DEFAULT_METHOD}"
        )


def _check_merges(merges: int | str | None, settings: Settings, reducer: Reducer, name: str) -> None:
    """ValueError where the caller asks for ``merges`` that are no number, or for some where no blocks merge."""
    check_merges(merges, settings.ratio, settings.counts)
    if merges is not None and (reducer.once or settings.where not in ("tower", "both")):
        why = f"{name} reduces in one step" if reducer.once else f"no block merges with where={settings.where!r}"
        raise UserError(f"merges={merges!r} says how many blocks of the tower merge, but {why}; leave it out")


def _check_original(settings: Settings, reducer: Reducer, name: str) -> None:
    """ValueError for what models of the original llava package do not take."""
    asked = {
        f"method={name!r}": reducer.shrinks_picture,
        "logits='caller'": settings.logits == "caller",
    }
    for setting in (setting for setting, wanted in asked.items() if wanted):
        raise UserError(
            f"{setting} is not possible with the original llava package, which writes pictures of one size into the "
            "prompt itself; leave it out, or load the checkpoint in transformers' layout (llava-hf)"
        )
