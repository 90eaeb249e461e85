"""From what the caller asks for (`Settings`) to what will be done to every picture (`Plan`)."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from .methods import METHODS, Reducer, get_method, unknown
from .schedule import SHAPES, Schedule, rounds, target_count
from .specs import Geometry

logger = logging.getLogger(__name__)

CHOICES = {
    "where": ("tower", "projector", "both", "packed"),
    "metric": ("keys", "history", "hidden", "projected"),
    "place": ("mid", "end"),
    "order": ("reading", "source"),
    "positions": ("compact", "original"),
    "schedule": tuple(SHAPES),
}
# What a setting is when neither the caller nor the method's preset says anything. How tokens merge goes with the
# method: choosing another one resets it. Where they merge does not.
HOW = {"metric": "keys", "place": "mid", "weighted": True, "proportional_attention": True, "order": "reading"}
WHERE = {"where": "tower", "schedule": "equal", "positions": "compact", "llm_size_bias": False}
DEFAULTS = {**HOW, **WHERE}
DEFAULT_METHOD = "pitome-tuned"
BACKENDS = ("inductor", "cudagraphs", "aot_eager", "eager")  # of torch.compile; True is the first one
SWITCHES = ("weighted", "proportional_attention", "llm_size_bias", "energies")


@dataclass(frozen=True)
class Settings:
    """What `attach` was asked for; see there. None = the preset's choice, else `DEFAULTS`."""

    method: str | Reducer = DEFAULT_METHOD
    keep: int | float | None = None
    ratio: float | None = None
    counts: Sequence[int] | None = None
    schedule: str | None = None
    where: str | None = None
    tower_keep: int | float | None = None
    metric: str | None = None
    place: str | None = None
    weighted: bool | None = None
    proportional_attention: bool | None = None
    order: str | None = None
    positions: str | None = None
    llm_size_bias: bool | None = None
    energies: bool = False
    compiled: bool | str = False
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def preset(self) -> Mapping[str, Any]:
        """What the method's preset brings; not its place where ratio or counts say what the tower's blocks keep."""
        known = isinstance(self.method, str) and self.method in METHODS
        preset = METHODS[self.method].settings if known else {}
        if self.ratio is None and self.counts is None:
            return preset
        return {k: v for k, v in preset.items() if k not in ("where", "schedule")}

    @property
    def place_of_merging(self) -> str:
        """The ``where`` that these settings come to."""
        return self.where or self.preset.get("where", DEFAULTS["where"])

    def changed(self, **given: Any) -> Settings:
        """These settings with ``given`` in place; what is no setting counts as an option of the method.

        A new method starts from its own preset, a new keep, ratio or counts replaces the old one, and a new place
        forgets tower_keep.
        """
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
        moved = changed.place_of_merging != self.place_of_merging
        return replace(changed, tower_keep=None) if moved and "tower_keep" not in given else changed


@dataclass(frozen=True)
class Plan:
    """What happens to every picture.

    Attributes
    ----------
    counts : patch tokens left after each merging block, class tokens not counted.
    rounds : patch tokens left after each step in front of the projector; empty if nothing merges there.
    packed : tokens of a tile left after each step behind the projector; empty if nothing merges there.
    entering : patches of the picture that the tower gets.
    compiled : the backend of torch.compile that the tower's graphs are made by; "" = it runs eagerly.
    """

    method: str
    reducer: Reducer
    geometry: Geometry
    where: str
    entering: int
    counts: tuple[int, ...]
    rounds: tuple[int, ...]
    metric: str
    place: str
    weighted: bool
    proportional_attention: bool
    order: str
    positions: str
    llm_size_bias: bool
    energies: bool
    compiled: str
    packed: tuple[int, ...] = ()

    @property
    def available(self) -> int:
        """Visual tokens per picture that reach the LLM of the plain model."""
        return self.geometry.available

    @property
    def keep(self) -> int:
        """Visual tokens per picture that reach the LLM."""
        if self.where == "packed":
            return self.packed[-1] if self.packed else self.available
        patches = [self.entering, *self.counts, *self.rounds][-1]
        return patches + self.geometry.visible_class_tokens

    def removed(self, block: int) -> int:
        """Tokens that block ``block`` removes; 0 for blocks behind the feature layer."""
        if block >= len(self.counts):
            return 0
        before = self.counts[block - 1] if block else self.entering
        return before - self.counts[block]

    @property
    def clues(self) -> tuple[str, ...]:
        """What merging needs to know of the attention of a block: "keys", "attention"."""
        needed = {"keys": self.metric in ("keys", "history"), "attention": "attention" in self.reducer.needs}
        return tuple(name for name, wanted in needed.items() if wanted)

    @property
    def context(self) -> dict[str, Any]:
        """What every `Reducer.match` gets besides metric, number, sizes, depth and attention."""
        if self.where == "packed":  # behind the projector there are neither grid nor class token
            return {}
        given = {"grid": self.geometry.grid} if "grid" in self.reducer.needs else {}
        return {"protected": self.geometry.class_tokens, **given}

    @property
    def steps(self) -> tuple[tuple[int, int, float], ...]:
        """Tokens before and after every merge, and its depth: in blocks, then before or behind the projector."""
        if self.where == "packed":
            return tuple((n, left, 1.0) for n, left in zip((self.available, *self.packed), self.packed))
        after = [(left, block / len(self.counts)) for block, left in enumerate(self.counts)]
        after += [(left, 1.0) for left in self.rounds]
        before = [self.entering, *(left for left, _ in after)]
        return tuple((n, left, depth) for n, (left, depth) in zip(before, after) if left < n)

    @property
    def merging(self) -> tuple[int, ...]:
        """Indices of the blocks that remove tokens."""
        return tuple(block for block in range(len(self.counts)) if self.removed(block))


def make_plan(settings: Settings, geometry: Geometry) -> Plan:
    """Resolve ``settings`` for pictures of ``geometry``.

    Raises
    ------
    ValueError : an unknown method, option or choice; a keep, ratio or counts that cannot be reached.
    """
    for name, choices in CHOICES.items():
        value = getattr(settings, name)
        if value not in choices and not (value is None and name in DEFAULTS):
            raise ValueError(f"unknown {name} {value!r}; choose one of {', '.join(map(repr, choices))}")
    for name in SWITCHES:
        value = getattr(settings, name)
        if not isinstance(value, bool) and not (value is None and name in DEFAULTS):
            raise ValueError(f"{name}={value!r} is not possible; choose True or False")
    reducer, name = _resolve(settings)
    settings = _complete(settings, name, geometry)
    _check_needs(settings, reducer, name, geometry)
    entering, counts, steps = _token_counts(settings, reducer, name, geometry)
    return Plan(
        method=name,
        reducer=reducer,
        geometry=geometry,
        entering=entering,
        counts=tuple(counts),
        rounds=() if settings.where == "packed" else tuple(steps),
        packed=tuple(steps) if settings.where == "packed" else (),
        energies=settings.energies,
        compiled=_backend(settings.compiled),
        **{name: getattr(settings, name) for name in (*HOW, "where", "positions", "llm_size_bias")},
    )


def _backend(compiled: bool | str) -> str:
    """The backend that ``compiled`` asks for; ValueError if there is no such one."""
    if compiled not in (True, False, *BACKENDS) or isinstance(compiled, int) and not isinstance(compiled, bool):
        choices = ", ".join(map(repr, (True, False, *BACKENDS)))
        raise ValueError(f"compiled={compiled!r} is not possible; choose one of {choices}")
    return compiled if isinstance(compiled, str) else BACKENDS[0] if compiled else ""


def _resolve(settings: Settings) -> tuple[Reducer, str]:
    """The reducer and its name."""
    names = [f.name for f in fields(Settings) if f.name != "options"]
    if isinstance(settings.method, Reducer):
        for option in settings.options:
            raise ValueError(unknown("setting", option, names) + " (a reducer instance brings its own options)")
        return settings.method, type(settings.method).__name__
    name = settings.method
    if not isinstance(name, str):
        raise ValueError(f"method={name!r} is neither a name nor a Reducer; names: {', '.join(METHODS)}")
    if name in METHODS:
        known = [*names, *(f.name for f in fields(METHODS[name].reducer))]
        for option in settings.options:
            if option not in known:
                raise ValueError(unknown(f"setting or option of {name}", option, known))
    return get_method(name, **settings.options), name


def _complete(settings: Settings, name: str, geometry: Geometry) -> Settings:
    """Every setting that the caller left open, by the method's preset, else by default.

    A preset gives way where it cannot hold: its place where ratio or counts say what every block of the tower keeps, a
    metric that exists in another place than the caller's only, and what this LLM does not take (with a warning).
    """
    chosen = {k: getattr(settings, k) for k in DEFAULTS if getattr(settings, k) is not None}
    left = {k: v for k, v in settings.preset.items() if k not in chosen}
    for setting in ("positions", "llm_size_bias"):
        if geometry.llm_obstacle and left.get(setting, DEFAULTS[setting]) != DEFAULTS[setting]:
            value = left.pop(setting)
            logger.warning("%s goes without %s=%r in this LLM: %s", name, setting, value, geometry.llm_obstacle)
    complete = {**DEFAULTS, **left, **chosen}
    if "where" not in chosen and complete["where"] not in geometry.places:
        complete["where"] = geometry.places[0]
    if "metric" not in chosen and complete["where"] == "packed":
        complete["metric"] = "hidden"
    if left.get("metric") == "projected" and complete["where"] != "projector":
        complete["metric"] = "hidden"
    return replace(settings, **complete)


def _check_needs(settings: Settings, reducer: Reducer, name: str, geometry: Geometry) -> None:
    """ValueError where the model, or the place, lacks something that the method needs."""
    if settings.where not in geometry.places:
        raise ValueError(
            f"where={settings.where!r} is not possible in this family: {geometry.obstacle}; choose "
            f"{' or '.join(f'where={place!r}' for place in geometry.places)}"
        )
    if geometry.original:
        _check_original(settings, reducer, name)
    if settings.where == "packed" and (settings.metric != "hidden" or reducer.needs):
        got = f"{name} needs {' and '.join(reducer.needs)}" if reducer.needs else f"got metric={settings.metric!r}"
        raise ValueError(f"where='packed' merges by what is projected, metric='hidden': {got}; choose another method")
    if geometry.tiled and not reducer.forms_groups:
        raise ValueError(f"{name} has no groups, so its tokens have no place among tiles; choose another method")
    if settings.metric == "projected" and settings.where != "projector":
        raise ValueError(
            f"metric='projected' exists in front of the projector only, got where={settings.where!r}; choose "
            "where='projector', or metric='hidden' or 'keys'"
        )
    if settings.positions == "original" and not reducer.forms_groups:
        raise ValueError(
            f"{name} has no groups, so its tokens have no original position; choose positions='compact', "
            "or a method that merges or drops tokens"
        )
    if settings.order == "source" and not reducer.source_order:
        raise ValueError(
            f"order='source' is known for ToMe and for PiToMe with protect=1 and steps=1, got {name}; "
            "choose order='reading'"
        )
    if "attention" in reducer.needs and not geometry.class_tokens:
        raise ValueError(
            f"{name} needs the attention of a class token, and this vision tower has none; "
            f"choose another method, such as {DEFAULT_METHOD}"
        )


def _check_original(settings: Settings, reducer: Reducer, name: str) -> None:
    """ValueError for what models of the original llava package do not take."""
    asked = {
        "positions='original'": settings.positions == "original",
        "llm_size_bias=True": settings.llm_size_bias,
        f"method={name!r}": reducer.shrinks_picture,
    }
    for setting in (setting for setting, wanted in asked.items() if wanted):
        raise ValueError(
            f"{setting} is not possible with the original llava package, which writes pictures of one size into the "
            "prompt itself; leave it out, or load the checkpoint in transformers' layout (llava-hf)"
        )


def _token_counts(
    settings: Settings, reducer: Reducer, name: str, geometry: Geometry
) -> tuple[int, list[int], list[int]]:
    """Patches that enter the tower, and those left after each merging block and each step before the projector."""
    patches, blocks, limit = geometry.patches, geometry.merging_blocks, reducer.max_removable
    if settings.where != "tower" and (settings.ratio is not None or settings.counts is not None):
        raise ValueError(f"ratio and counts say what tower blocks keep; with where={settings.where!r} give keep")
    if settings.where != "both" and settings.tower_keep is not None:
        raise ValueError(f"tower_keep={settings.tower_keep} goes with where='both', got where={settings.where!r}")
    if reducer.once and (settings.where == "both" or settings.keep is None):
        raise ValueError(
            f"{name} reduces in one step, got where={settings.where!r}, ratio={settings.ratio}, "
            f"counts={settings.counts}; choose where='tower' or 'projector', and give keep"
        )
    if reducer.shrinks_picture and settings.where != "tower":
        raise ValueError(
            f"{name} scales the picture, which the tower gets; choose where='tower', got {settings.where!r}"
        )
    if settings.where == "tower":
        keep = None if settings.keep is None else _patch_keep(settings, reducer, name, geometry)
        if reducer.shrinks_picture:
            return keep, [keep] * blocks, []
        shape = "last" if reducer.once else settings.schedule
        return patches, Schedule(keep, settings.ratio, settings.counts, shape).counts(patches, blocks, limit), []
    keep = _patch_keep(settings, reducer, name, geometry)
    if settings.where == "packed":
        return patches, [patches] * blocks, rounds(geometry.available, keep + geometry.visible_class_tokens, limit)
    if settings.where == "projector":
        return patches, [patches] * blocks, rounds(patches, keep, limit)
    tower = (
        round(math.sqrt(patches * keep))
        if settings.tower_keep is None
        else target_count(settings.tower_keep, patches, "tower_keep")
    )
    if tower < keep:
        raise ValueError(f"tower_keep={settings.tower_keep} is below keep={settings.keep}; choose {keep} to {patches}")
    counts = Schedule(tower, shape=settings.schedule).counts(patches, blocks, limit)
    return patches, counts, rounds(tower, keep, limit)


def _patch_keep(settings: Settings, reducer: Reducer, name: str, geometry: Geometry) -> int:
    """Patch tokens to keep, from ``keep`` tokens that reach the LLM."""
    visible = geometry.visible_class_tokens
    keep = target_count(settings.keep, geometry.available) - visible
    allowed = reducer.allowed(geometry.patches)
    if keep not in allowed:
        close = sorted(allowed, key=lambda count: abs(count - keep))[:3]
        raise ValueError(
            f"keep={settings.keep} cannot be reached with {name}; "
            f"the nearest possible are {', '.join(str(c + visible) for c in sorted(close))}"
        )
    return keep
