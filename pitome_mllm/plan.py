"""What will be done to every image (`Plan`), from what the caller asks for."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

from .families.geometry import Geometry
from .methods import Reducer, UserError
from .schedule import EVERY, Schedule, fewest, gentle, picture_count, projector_counts, target_count
from .settings import HOW, Settings, resolve_settings

GRIDS = 64  # sizes of pictures whose plans are remembered
_AS_ASKED = ("where", "calibration", "energies", "logits", "graph", "published")


@dataclass(frozen=True)
class Plan:
    """What happens to every image.

    Attributes
    ----------
    counts : tuple of int
        Patch tokens left after each merging block, class tokens not counted.
    projector_counts : tuple of int
        Patch tokens left after each step before the projector; empty if nothing merges there.
    packed : tuple of int
        Tokens of a tile left after each step after the projector; empty if nothing merges there.
    input_patches : int
        Patches of the image that the tower gets.
    gentle : bool
        No merge removes over 40 % of the tokens, if there is another way.
    logits : str
        "merged" or "caller", whose columns a call's logits have.
    published : bool
        What the method's paper does was asked for.
    graph : bool or str
        Whether CUDA graphs are made: of the tower on the second equal call ("auto"), or of the tower and of the LLM's
        prefill on the first (True).
    asked : Settings
        What was asked for, of which pictures of another size make a plan of their own.
    merging : tuple of int
        Indices of the blocks that remove tokens.
    match_inputs : tuple of str
        What merging needs to know of the attention of a block: "keys", "attention".
    """

    method: str
    reducer: Reducer
    geometry: Geometry
    where: str
    input_patches: int
    counts: tuple[int, ...]
    projector_counts: tuple[int, ...]
    metric: str
    place: str
    weighted: bool
    proportional_attention: bool
    order: str
    calibration: str
    energies: bool
    logits: str
    graph: bool | str
    published: bool = False
    packed: tuple[int, ...] = ()
    gentle: bool = False
    asked: Settings = field(default=Settings(), repr=False, compare=False)
    merging: tuple[int, ...] = field(init=False, repr=False, compare=False)
    match_inputs: tuple[str, ...] = field(init=False, repr=False, compare=False)
    _removed: tuple[int, ...] = field(init=False, repr=False, compare=False)
    _merged_before: tuple[int, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Work out at once what every block asks for; torch.compile knows no `cached_property` of a frozen class."""
        removed = tuple(before - left for before, left in zip((self.input_patches, *self.counts), self.counts))
        needed = {"keys": self.metric == "keys", "attention": "attention" in self.reducer.needs}
        merging = tuple(block for block, r in enumerate(removed) if r)
        before = (max((b for b in merging if b < block), default=-1) for block in range(len(removed) + 1))
        vars(self).update(
            _removed=removed,
            merging=merging,
            _merged_before=tuple(before),
            match_inputs=tuple(name for name, wanted in needed.items() if wanted),
            _of_grids={},
            _of_tokens={},
        )

    def for_grid(self, grid: tuple[int, int]) -> Plan:
        """What was asked for, for images of another number of patches."""
        known: dict[tuple[int, int], Plan] = vars(self)["_of_grids"]
        if grid == self.geometry.grid:
            return self
        if grid not in known:
            if len(known) > GRIDS:
                known.clear()
            known[grid] = make_plan(self.asked, replace(self.geometry, grid=grid))
        return known[grid]

    def rounds(self, tokens: int) -> tuple[int, ...]:
        """Tokens left after each step after the projector, of a picture of as many ``tokens``; () = all are kept."""
        known: dict[int, tuple[int, ...]] = vars(self)["_of_tokens"]
        if tokens not in known:
            if len(known) > GRIDS:
                known.clear()
            keep = picture_count(self.asked.keep, tokens)
            known[tokens] = tuple(projector_counts(tokens, keep, self.max_removable))
        return known[tokens]

    def kept(self, tokens: int, ends: int = 0) -> int:
        """Tokens left behind the projector of a picture of as many ``tokens``, and of ``ends`` that only end its rows,
        which go where it merges.
        """
        return (self.rounds(tokens) or (tokens + ends,))[-1]

    @property
    def is_plain(self) -> bool:
        """Whether no token of any picture merges."""
        keep = self.asked.keep
        return isinstance(keep, float) and keep == 1 if self.where == "packed" else self.keep == self.available

    @property
    def available(self) -> int:
        """Visual tokens per image that reach the LLM of the plain model."""
        return self.geometry.available

    @property
    def keep(self) -> int:
        """Visual tokens per image that reach the LLM."""
        if self.where == "packed":
            return self.packed[-1] if self.packed else self.available
        patches = [self.input_patches, *self.counts, *self.projector_counts][-1]
        return patches + self.geometry.visible_class_tokens

    def removed(self, block: int) -> int:
        """Tokens that block ``block`` removes; 0 for blocks after the feature layer."""
        return self._removed[block] if block < len(self.counts) else 0

    def merged_before(self, block: int) -> int:
        """The last block before ``block`` that removes tokens, -1 = none does."""
        return self._merged_before[block] if block <= len(self.counts) else self._merged_before[-1]

    @property
    def context(self) -> dict[str, Any]:
        """What every `Reducer.match` gets besides metric, number, sizes, depth and attention."""
        if self.where == "packed":  # after the projector there are neither grid nor class token
            return {}
        given = {"grid": self.geometry.grid} if "grid" in self.reducer.needs else {}
        return {"protected": self.geometry.class_tokens, **given}

    @property
    def steps(self) -> tuple[tuple[int, int, float], ...]:
        """Tokens before and after every merge, and its depth: in blocks, then before or after the projector."""
        if self.where == "packed":
            return tuple((n, left, 1.0) for n, left in zip((self.available, *self.packed), self.packed))
        after = [(left, block / len(self.counts)) for block, left in enumerate(self.counts)]
        after += [(left, 1.0) for left in self.projector_counts]
        before = [self.input_patches, *(left for left, _ in after)]
        return tuple((n, left, depth) for n, (left, depth) in zip(before, after) if left < n)

    def max_removable(self, tokens: int) -> int:
        """The most tokens that one step before or after the projector removes."""
        most = self.reducer.max_removable
        return (gentle(most) if self.gentle else most)(tokens)


def make_plan(settings: Settings, geometry: Geometry) -> Plan:
    """Resolve ``settings`` for images of ``geometry``.

    Raises
    ------
    ValueError
        An unknown method, option or choice; a keep, ratio or counts that cannot be reached.
    """
    asked, (settings, reducer, name) = settings, resolve_settings(settings, geometry)
    input_patches, counts, steps = _token_counts(settings, reducer, name, geometry)
    return Plan(
        method=name,
        reducer=reducer,
        geometry=geometry,
        input_patches=input_patches,
        counts=tuple(counts),
        projector_counts=() if settings.where == "packed" else tuple(steps),
        packed=tuple(steps) if settings.where == "packed" else (),
        gentle=settings.merges != EVERY,
        asked=asked,
        **{name: getattr(settings, name) for name in (*HOW, *_AS_ASKED)},
    )


def _token_counts(
    settings: Settings, reducer: Reducer, name: str, geometry: Geometry
) -> tuple[int, list[int], list[int]]:
    """Patches that enter the tower, and those left after each merging block and each step before the projector."""
    patches, blocks, limit = geometry.patches, geometry.merging_blocks, reducer.max_removable
    if settings.where != "tower" and (settings.ratio is not None or settings.counts is not None):
        raise UserError(f"ratio and counts say what tower blocks keep; with where={settings.where!r} give keep")
    if settings.where != "both" and settings.tower_keep is not None:
        raise UserError(f"tower_keep={settings.tower_keep} goes with where='both', got where={settings.where!r}")
    if reducer.once and (settings.where == "both" or settings.keep is None):
        never = {"both", "packed" if reducer.needs else "", "projector" if reducer.shrinks_picture else ""}
        places = [f"where={place!r}" for place in geometry.family.places if place not in never]
        raise UserError(
            f"{name} reduces in one step, got where={settings.where!r}, ratio={settings.ratio}, "
            f"counts={settings.counts}; choose {' or '.join(places)}, and give keep"
        )
    if reducer.shrinks_picture and settings.where != "tower":
        raise UserError(
            f"{name} scales the picture, which the tower gets; choose where='tower', got {settings.where!r}"
        )
    shape = "last" if reducer.once else settings.schedule or "equal"
    if settings.where == "tower":
        if settings.keep is None:
            return patches, Schedule(None, settings.ratio, settings.counts, shape).counts(patches, blocks, limit), []
        keep = _patch_keep(settings, reducer, name, geometry)
        schedule = Schedule(keep, settings.ratio, settings.counts, shape, settings.merges)
        if reducer.shrinks_picture:
            return keep, [keep] * blocks, []
        return patches, schedule.counts(patches, blocks, limit), []
    keep = _patch_keep(settings, reducer, name, geometry)
    of_round = limit if settings.merges == EVERY else gentle(limit)
    if settings.where == "packed":
        return (
            patches,
            [patches] * blocks,
            projector_counts(geometry.available, keep + geometry.visible_class_tokens, of_round),
        )
    if settings.where == "projector":
        return patches, [patches] * blocks, projector_counts(patches, keep, of_round)
    tower = (
        max(min(round(math.sqrt(patches * keep)), max(keep, patches // 3)), fewest(patches, blocks, of_round))
        if settings.tower_keep is None
        else target_count(settings.tower_keep, patches, "tower_keep")
    )
    if tower < keep:
        raise UserError(f"tower_keep={settings.tower_keep} is below keep={settings.keep}; choose {keep} to {patches}")
    counts = Schedule(tower, shape=shape, merges=settings.merges).counts(patches, blocks, limit)
    return patches, counts, projector_counts(tower, keep, of_round)


def _patch_keep(settings: Settings, reducer: Reducer, name: str, geometry: Geometry) -> int:
    """Patch tokens to keep, from ``keep`` tokens that reach the LLM."""
    visible = geometry.visible_class_tokens
    count = picture_count if settings.where == "packed" else target_count
    keep = count(settings.keep, geometry.available) - visible
    allowed = reducer.allowed(geometry.patches)
    if keep not in allowed:
        close = sorted(allowed, key=lambda count: abs(count - keep))[:3]
        raise UserError(
            f"keep={settings.keep} cannot be reached with {name}; "
            f"the nearest possible are {', '.join(str(c + visible) for c in sorted(close))}"
        )
    return keep
