"""All that is known while something runs: by one task or thread, and by the hooks of one attachment.

A call of a vision tower has a `run.Run` and a call of the model a `Call`. Both are handed down as keywords, so that
they end with the call, whether it returns or raises. What a task or a thread chose, and what its last run did, is a
`State`. Nothing else of this package remembers anything between two calls, except what is marked on a KV cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary, ref

from torch import Tensor, nn

from ..families.anyres import Places
from ..families.features import selected_features
from ..families.geometry import Geometry
from ..methods import UserError
from ..plan import Plan
from ..stats import Stats
from .call import Call, Encoded


class Choice:
    """A plan in force until it is closed, which may happen in another task or thread than it was made in."""

    def __init__(self, plan: Plan | None, call: Call | None = None, outside: bool = False) -> None:
        self.plan = plan  # None = the plain model
        self.call = call  # the prompt of the generate() that runs with it; None if it is of `using`
        self.outside = outside  # a generate() calls a function of its caller's, which is no part of it
        self.closed = False  # it counts no more, wherever it is still listed

    def close(self) -> None:
        self.plan, self.call, self.closed = None, None, True


@dataclass(frozen=True, eq=False)
class State:
    """What one task or thread does with one attachment; never changed, but replaced."""

    choices: tuple[Choice, ...] = ()  # of `using` and generate(), innermost last
    stats: Stats | None = None  # of its last run; None before it, or if the plain model ran
    encoded: ref[Encoded] | None = None  # images that the model has not asked for yet; they end with their call

    @property
    def open(self) -> tuple[Choice, ...]:
        return tuple(choice for choice in self.choices if not choice.closed)


_FRESH = State()
# One variable for all attachments: a context keeps each variable that was ever set in it, and its value, for as long as
# its thread or task lives, so that one variable for each attachment would stay behind with its stats. Weak keys keep no
# model either. A dictionary in it is never changed: contexts that were copied share it.
_states: ContextVar[WeakKeyDictionary[Attached, State] | None] = ContextVar("pitome_states", default=None)


class Attached:
    """What hooks know of the attachment that they belong to: the model's parts, and the state of who calls."""

    def __init__(self, model: nn.Module, geometry: Geometry, plan: Plan) -> None:
        self.model, self.geometry = model, geometry
        self.family = family = geometry.family
        self.projector: nn.Module = model.get_submodule(family.projector)
        self.tower: nn.Module = model.get_submodule(family.tower)
        self.language: nn.Module = model.get_submodule(family.language)
        self.core: nn.Module = model.get_submodule(family.core)
        self.features = selected_features(vars(model.config))
        self.places: dict[tuple, Places] = {}  # how the model packs an image of the last few sizes
        self.distances: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}  # frequencies, what `masks` made of them
        self.told_of_videos = self.told_of_calibration = False
        self.replaced: dict[str, Any] = {}  # what instances had in place of methods of ours
        self._plan = plan

    @property
    def kinds(self) -> dict[str, str]:
        """What of pictures the core encodes and merging knows, "image", and "video" where frames merge too; and what
        calls name them.
        """
        family, core, found = self.family, type(self.core), {"image": self.family.pixels}
        if family.tiles == "features" and not family.videos and hasattr(core, "get_video_features"):
            found |= {"video": "pixel_values_videos"} if hasattr(self.model.config, "video_token_id") else {}
        return found

    @property
    def state(self) -> State:
        """The state of the calling task or thread."""
        states = _states.get()
        return _FRESH if states is None else states.get(self, _FRESH)

    @property
    def encoded(self) -> Encoded | None:
        """Images that the calling task's or thread's call brought, and that the model has not asked for yet."""
        encoded = self.state.encoded
        return None if encoded is None else encoded()

    def forget_encoded(self) -> None:
        """Have the model encode its images itself."""
        if self.state.encoded is not None:
            self.note(encoded=None)

    def note(self, **changes: Any) -> None:
        """Replace fields of the calling task's or thread's `State`."""
        states = WeakKeyDictionary(_states.get() or {})
        states[self] = replace(self.state, **changes)
        _states.set(states)

    @property
    def plan(self) -> Plan | None:
        """What happens to every image of the calling task or thread; None = the plain model."""
        for choice in reversed(self.state.choices):
            if not choice.closed:
                return choice.plan
        return self._plan

    @property
    def generating(self) -> Call | None:
        """The prompt of the generate() that the calling task or thread is in."""
        innermost = (choice for choice in reversed(self.state.open) if choice.call is not None or choice.outside)
        return next((choice.call for choice in innermost), None)

    @contextmanager
    def choosing(self, plan: Plan | None, call: Call | None = None, outside: bool = False) -> Iterator[None]:
        """``plan`` within a ``with`` block, while generate() runs with ``call``, or calls what is ``outside`` of it."""
        choice = Choice(plan, call, outside)
        self.note(choices=(*self.state.open, choice))
        try:
            yield
        finally:
            choice.close()
            self.note(choices=self.state.open)

    def check_calls(self, module: nn.Module) -> None:
        """ValueError if ``module`` is a replica that nn.DataParallel made: it carries another one's parts."""
        if getattr(module, "_is_replica", False):
            raise UserError(
                "nn.DataParallel copies the model in every call, and copies of one with merging would use parts of the "
                "first; use DistributedDataParallel with one process for each GPU, or call the model itself"
            )
