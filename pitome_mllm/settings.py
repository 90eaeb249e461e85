"""What the caller asks for (`Settings`), and what that comes to for one model (`resolve_settings`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from .families.geometry import Geometry
from .methods import METHODS, Method, Reducer, UserError, get_method, unknown
from .schedule import EVERY, SHAPES, check_merges

CHOICES = {
    "where": ("tower", "projector", "both", "packed"),
    "metric": ("keys", "hidden", "projected"),
    "place": ("mid", "end"),
    "order": ("reading", "source"),
    "calibration": ("distance", "size", "none"),
    "schedule": tuple(SHAPES),
    "logits": ("merged", "caller"),
    **dict.fromkeys(("weighted", "proportional_attention", "energies", "published"), (True, False)),
    "graph": (True, False, "auto"),
}
# What a setting is where neither the caller nor the method's row says anything: what papers did, or what the library
# does with methods that reduce in one step, or in several.
PUBLISHED: dict[str, Any] = {
    "where": "tower",
    "schedule": "equal",
    "merges": EVERY,
    "metric": "keys",
    "place": "mid",
    "weighted": True,
    "proportional_attention": True,
    "order": "reading",
    "calibration": "none",
}
ONE_STEP = {**PUBLISHED, "calibration": "distance"}
STEPS = {**ONE_STEP, "where": "both", "merges": 6, "metric": "hidden", "weighted": False}
DEFAULT_METHOD = "pitome"
BLOCKS = ("tower", "both")  # where blocks of the tower merge
WHICH_BLOCKS = ("merges", "schedule")
IN_BLOCKS = (*WHICH_BLOCKS, "place", "proportional_attention")  # says nothing where none does
HOW = ("metric", "place", "weighted", "proportional_attention", "order")  # goes with the method: another one resets it
GONE = {
    "compiled": "graph=True runs the vision tower as CUDA graphs without a compiler; to use one, leave it out and call "
    "torch.compile on the tower yourself",
    "positions": "write calibration='distance' or 'size' for original positions, calibration='none' for compact ones",
    "llm_size_bias": "write calibration='distance' or 'size' for True, calibration='none' for False",
}


@dataclass(frozen=True)
class Settings:
    """What `attach` was asked for; see there. None = as `defaults` has it."""

    method: str | Reducer = DEFAULT_METHOD
    published: bool = False
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
    def row(self) -> Method | None:
        """The method's row; None for a `Reducer` or an unknown name."""
        return METHODS.get(self.method) if isinstance(self.method, str) else None

    @property
    def as_published(self) -> bool:
        """Whether the caller, or the method's row, asks for what was published."""
        return self.published or (self.row is not None and self.row.variant)

    @property
    def once(self) -> bool:
        """Whether the method reduces in one step."""
        return getattr(self.row.reducer if self.row else self.method, "once", False)

    @property
    def defaults(self) -> dict[str, Any]:
        """What is left open, for any model: by the method's kind, and its row; ratio and counts are of the tower."""
        found = PUBLISHED if self.as_published else ONE_STEP if self.once else STEPS
        found = {**found, **(self.row.settings if self.row else {})}
        if self.ratio is not None or self.counts is not None:
            found |= {name: PUBLISHED[name] for name in ("where", "schedule", "merges")}
        return found

    def changed(self, **given: Any) -> Settings:
        """These settings with ``given`` in place; what is no setting counts as an option of the method.

        A new method starts from its own defaults, a new keep, ratio or counts replaces the old one, a new place forgets
        tower_keep, and what leaves no choice of blocks, or none that merges, forgets what was said of them.
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
        place, forgotten = changed.where or changed.defaults["where"], set[str]()
        if place != (self.where or self.defaults["where"]):
            forgotten.update(("tower_keep",) if place in BLOCKS else ("tower_keep", *IN_BLOCKS))
        if changed.once or changed.ratio is not None or changed.counts is not None:
            forgotten.update(WHICH_BLOCKS)
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
        known = any(type(value) is type(choice) and value == choice for choice in choices)  # 1 is not True
        if not known and not (value is None and name in PUBLISHED):
            raise UserError(f"unknown {name} {value!r}; choose one of {', '.join(map(repr, choices))}")
    reducer, name = _resolve(settings)
    asked, settings = settings, _complete(settings, reducer, name, geometry)
    _check_needs(settings, reducer, name, geometry)
    _check_blocks(asked, settings, reducer, name)
    return settings, reducer, name


def _resolve(settings: Settings) -> tuple[Reducer, str]:
    """The reducer and its name."""
    names = [f.name for f in fields(Settings) if f.name != "options"]
    if isinstance(settings.method, Reducer):
        if settings.published:
            raise UserError(
                "published=True is what a method's paper does, and a Reducer has no paper; choose published=False"
            )
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
    library = {} if settings.row is None or settings.as_published else settings.row.library
    return get_method(name, **{**library, **settings.options}), name


def _complete(settings: Settings, reducer: Reducer, name: str, geometry: Geometry) -> Settings:
    """Every setting that the caller left open: its default, unless method, model or place leave no such choice."""
    chosen = {k: getattr(settings, k) for k in PUBLISHED if getattr(settings, k) is not None}
    left, places = settings.defaults, geometry.family.places
    if "calibration" not in chosen:
        left["calibration"] = _best_calibration(left["calibration"], reducer, geometry)
    if "where" not in chosen and left["where"] not in places:
        if settings.published:
            raise UserError(
                f"{name} as published merges where={left['where']!r}, which is not possible in this family: "
                f"{geometry.family.unsupported_reason}; leave published out, or give where={places[0]!r} too"
            )
        left["where"] = places[0]
    where = chosen.get("where", left["where"])
    if where == "packed" or (left["metric"] == "projected" and where != "projector"):
        left["metric"] = "hidden"
    return replace(settings, **{**left, **chosen})


def _best_calibration(wanted: str, reducer: Reducer, geometry: Geometry) -> str:
    """The calibration ``wanted``, or the best that method and LLM take."""
    known = reducer.forms_groups and not geometry.family.encoder
    if wanted == "none" or not known or geometry.llm_unsupported_reason:
        return "none"
    return wanted if geometry.llm_rotary else "size"


def _check_calibration(kind: str | None, reducer: Reducer, name: str, geometry: Geometry) -> None:
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
    if geometry.family.encoder and settings.logits == "caller":
        raise UserError("logits='caller' puts an LLM's logits at a prompt's columns, and an encoder alone has no LLM")
    if geometry.family.rotary and not reducer.forms_groups:
        raise UserError(f"{name} has no groups, so its tokens have no rotary position; choose another method")
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
    _check_calibration(str(settings.calibration), reducer, name, geometry)
    if settings.order == "source" and not reducer.source_order:
        raise UserError(
            f"order='source' is known for ToMe and for PiToMe as published (protect=1), got {name}; "
            "choose order='reading'"
        )
    if "attention" in reducer.needs and not geometry.class_tokens:
        raise UserError(
            f"{name} needs the attention of a class token, and this vision tower has none; "
            f"choose another method, such as {DEFAULT_METHOD}"
        )


def _check_blocks(asked: Settings, settings: Settings, reducer: Reducer, name: str) -> None:
    """UserError where the caller asks how blocks merge and none does, or how many where all or one do."""
    check_merges(asked.merges, settings.ratio, settings.counts)
    none = "" if settings.where in BLOCKS else f"no block merges with where={settings.where!r}"
    none = f"{name} scales the picture, and no block merges" if reducer.shrinks_picture else none
    for setting in IN_BLOCKS:
        value, which = getattr(asked, setting), setting in WHICH_BLOCKS
        why = f"{name} reduces in one step" if which and reducer.once else none
        if value is not None and why:
            says = "which blocks of the tower merge" if which else "how blocks of the tower merge"
            raise UserError(f"{setting}={value!r} says {says}, but {why}; leave it out")


def _check_original(settings: Settings, reducer: Reducer, name: str) -> None:
    """ValueError for what models of the original llava package do not take."""
    if reducer.shrinks_picture or settings.logits == "caller":
        asked = f"method={name!r}" if reducer.shrinks_picture else "logits='caller'"
        raise UserError(
            f"{asked} is not possible with the original llava package, which writes pictures of one size into the "
            "prompt itself; leave it out, or load the checkpoint in transformers' layout (llava-hf)"
        )
