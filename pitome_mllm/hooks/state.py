"""All that is known while something runs: by one call, by one task or thread, and by the hooks of one attachment.

A call of a vision tower has a `tower.Run` and a call of the model a `Call`. Both are handed down as keywords, so that
they end with the call, whether it returns or raises. What a task or a thread chose, and what its last run did, is a
`State`. Nothing else of this package remembers anything between two calls, except what is marked on a KV cache.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..families.anyres import Places
from ..families.features import selected_features
from ..families.geometry import Geometry
from ..methods import UserError
from ..plan import Plan
from ..stats import Stats
from .columns import Columns
from .layout import Layout

CALL = "pitome_call"  # the keyword that hands a Call from the model down to its LLM


class Call:
    """One prompt as the model gets it.

    No dataclass: wrappers such as FSDP go through the fields of those that they find among the arguments.

    Attributes
    ----------
    kwargs : the arguments, with every per-token tensor shortened.
    image : (B, S) bool, the placeholders among the tokens of this call; on the host, as ``layout`` and ``sample`` are.
    layout : what every place of the KV cache is after this call; None if the caller's columns are.
    move : visual tokens take their original positions as soon as the tower has run.
    weigh : the LLM is told how many patches they stand for.
    sample : (B, S) int64, the sample that a token belongs to where several are packed into one row; else None.
    fresh : the layout of the tokens of this call only; None if they are the caller's.
    answer : how the output of this call comes to the caller's columns; None if it stays as it is.
    owner : the module whose call it is, the model or its core.
    told : the layout with those positions and sizes, for the rows that the LLM had, once it was called.
    reached : the LLM was called.
    """

    def __init__(
        self,
        kwargs: dict[str, Any],
        image: Tensor,
        layout: Layout | None = None,
        move: bool = False,
        weigh: bool = False,
        sample: Tensor | None = None,
    ) -> None:
        self.kwargs, self.image, self.layout = kwargs, image, layout
        self.move, self.weigh, self.sample = move, weigh, sample
        self.fresh: Layout | None = None
        self.answer: Columns | None = None
        self.owner: nn.Module | None = None
        self.told: Layout | None = None
        self.reached = False

    def again(self) -> Call:
        """The same call with pictures that are encoded anew."""
        return Call(self.kwargs, self.image, self.layout, self.move, self.weigh, self.sample)

    def part(self, rows: int, width: int, length: int) -> Tensor:
        """(``rows``, ``width``) of ``image``, behind ``length`` places of a KV cache.

        generate() may repeat rows, split the prompt into chunks, and bring it again with the tokens that followed.
        """
        start = max(length - self.layout.places + self.image.shape[1], 0)
        image = self.image.repeat_interleave(max(rows // len(self.image), 1), 0)
        return F.pad(image, (0, max(start + width - image.shape[1], 0)))[:, start : start + width]


class Encoded:
    """Pictures that a call brought, encoded before the model asks for them."""

    def __init__(self, pixels: Tensor, plan: Plan, output: Any) -> None:
        self.pixels, self.plan, self.output = pixels, plan, output

    def answers(self, pixels: Tensor | None, plan: Plan | None) -> bool:
        """Whether these are ``pixels``, or what generate() made of them for beams: each picture several times."""
        if pixels is None or plan is not self.plan:
            return False
        if pixels is self.pixels:
            return True
        times, rest = divmod(len(pixels), len(self.pixels))
        alike = (pixels.shape[1:], pixels.dtype, pixels.device) == (
            self.pixels.shape[1:],
            self.pixels.dtype,
            self.pixels.device,
        )
        return alike and times > 0 and not rest and torch.equal(pixels[::times], self.pixels)

    def repeated(self, pixels: Tensor) -> Any:
        """The model's output for ``pixels``, which hold each of these pictures several times."""
        times = len(pixels) // len(self.pixels)
        output = copy.copy(self.output)
        output.pooler_output = [one for one in self.output.pooler_output for _ in range(times)]
        return output


class Choice:
    """A plan in force until it is closed, which may happen in another task or thread than it was made in.

    Attributes
    ----------
    plan : what to do; None = the plain model.
    call : the prompt of the generate() that runs with it; None if it is of `using`.
    outside : a generate() calls a function of its caller's, which is no part of it.
    closed : it counts no more, wherever it is still listed.
    """

    def __init__(self, plan: Plan | None, call: Call | None = None, outside: bool = False) -> None:
        self.plan, self.call, self.outside, self.closed = plan, call, outside, False

    def close(self) -> None:
        self.plan, self.call, self.closed = None, None, True


@dataclass(frozen=True, eq=False)
class State:
    """What one task or thread does with one attachment; never changed, but replaced.

    Attributes
    ----------
    choices : of `using` and generate(), innermost last.
    stats : of its last run, None before it or if the plain model ran.
    encoded : pictures that the model has not asked for yet.
    """

    choices: tuple[Choice, ...] = ()
    stats: Stats | None = None
    encoded: Encoded | None = None

    @property
    def open(self) -> tuple[Choice, ...]:
        return tuple(choice for choice in self.choices if not choice.closed)


_FRESH = State()
# One variable for all attachments, since a context keeps every variable that was ever set in it, and weak keys, since
# it must not keep a model either. A dictionary in it is never changed: contexts that were copied share it.
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
        self.places: dict[tuple, Places] = {}  # how the model packs a picture of the last few sizes
        self.told_of_videos = False
        self.replaced: dict[str, Any] = {}  # what instances had in place of methods of ours
        self._plan = plan

    @property
    def state(self) -> State:
        """The state of the calling task or thread."""
        states = _states.get()
        return _FRESH if states is None else states.get(self, _FRESH)

    def note(self, **changes: Any) -> None:
        """Replace fields of the calling task's or thread's `State`."""
        states = WeakKeyDictionary(_states.get() or {})
        states[self] = replace(self.state, **changes)
        _states.set(states)

    @property
    def plan(self) -> Plan | None:
        """What happens to every picture of the calling task or thread; None = the plain model."""
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


class Hook(functools.partial):
    """A hook that torch.compile leaves alone, so that what a task or thread chose is asked anew in every call.

    It is a `partial` because torch.compile would look into a method. Copies of a model share it.
    """

    def __new__(cls, function: Callable[..., Any]) -> Hook:
        return super().__new__(cls, torch.compiler.disable(function))

    def __deepcopy__(self, memo: dict[int, Any]) -> Hook:
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        return refuse_pickling(type(self))


def refuse_pickling(cls: type) -> Any:
    """What pickle calls for whatever belongs to an attachment: ValueError."""
    raise UserError(
        f"a model with merging attached cannot be pickled ({cls.__name__}); call handle.remove() before torch.save or "
        "handing it to another process, or write it with model.save_pretrained(folder), which saves the plain model"
    )
