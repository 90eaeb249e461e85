"""How long things take, by one clock: calls that are compared in turns, and an answer while it is given."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from ..families.features import pixels_of
from ..families.geometry import family_of
from .answer import AnswerCost
from .flops import at_least

Key = TypeVar("Key", bound=Hashable)
Made = TypeVar("Made")


def now(device: torch.device, own: bool = False) -> float:
    """Seconds on a steady clock, once ``device`` has finished what it was given; ``own``: this thread's time only."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()  # torch.cuda, torch.mps, torch.xpu
    return time.thread_time() if own else time.perf_counter()


def runs_alone(device: torch.device) -> bool:
    """Whether one thread does all the work, so that its own time counts and what others do does not."""
    return device.type == "cpu" and torch.get_num_threads() == 1


def milliseconds(call: Callable[[], Any], device: torch.device, times: int = 1) -> float:
    """How long a call takes that does a thing ``times`` times, for each."""
    own = runs_alone(device)
    began = now(device, own)
    call()
    return 1000 * (now(device, own) - began) / times


def in_turns(
    calls: Mapping[Key, Callable[[], Made]], repeats: int, warmup: int = 1, done: Callable[[], Any] = lambda: None
) -> dict[Key, list[Made]]:
    """What every call gives in ``repeats`` rounds, after ``warmup`` rounds that do not count.

    Times of the same round belong together: whatever else the machine did then hit all of them. Rounds differ in their
    order, so that nothing always comes behind the same.
    """
    taken: dict[Key, list[Made]] = {key: [] for key in calls}
    order = list(calls)
    for turn in range(warmup + repeats):
        random.Random(turn).shuffle(order)
        for key in order:
            made = calls[key]()
            if turn >= warmup:
                taken[key].append(made)
            done()
    return taken


class AnswerClock:
    """When the vision tower began and ended, and when each call of the model ended, since the clock was made."""

    def __init__(self, device: torch.device, own: bool = False) -> None:
        self.device, self.own, self.start = device, own, now(device, own)
        self.tower: list[float] = []
        self.calls: list[float] = []

    @property
    def total_ms(self) -> float:
        """Milliseconds until now."""
        return 1000 * (now(self.device, self.own) - self.start)

    def cost(self) -> AnswerCost:
        """The times of an answer; None for what did not happen."""
        tower, calls, ms = self.tower, self.calls, 1000.0
        spent = sum(tower[1::2]) - sum(tower[: len(tower) // 2 * 2 : 2])
        return AnswerCost(
            tower_ms=ms * spent if len(tower) > 1 else None,
            prefill_ms=ms * (calls[0] - self.start) if calls else None,
            per_token_ms=ms * (calls[-1] - calls[0]) / (len(calls) - 1) if len(calls) > 1 else None,
        )


@contextmanager
def timed(model: Any, own: bool = False) -> Iterator[AnswerClock]:
    """A clock of the one answer that ``model`` gives within; merging is part of the tower. ``own`` as in `now`."""
    tower, clock = model.get_submodule(family_of(model.config).tower), AnswerClock(model.device, own)

    def ticks(times: list[float]) -> Callable[..., None]:
        return lambda *_: times.append(now(clock.device, own))

    hooks = [
        tower.register_forward_pre_hook(ticks(clock.tower), prepend=True),
        tower.register_forward_hook(ticks(clock.tower)),
        model.register_forward_hook(ticks(clock.calls)),
    ]
    try:
        yield clock
    finally:
        for hook in hooks:
            hook.remove()


def measure(model: Any, inputs: Mapping[str, Any], *, new_tokens: int = 8, own: bool = False) -> AnswerCost:
    """Time one greedy answer of a model as it is now: plain, attached, or inside ``handle.using(...)``.

    The model is left as it was; an attached handle's ``stats`` then show this answer.

    Parameters
    ----------
    model : object
        On the device of ``inputs``.
    inputs : mapping
        From the processor, with pixel_values and input_ids.
    new_tokens : int, default 8
        Tokens to write, at least 2; the end-of-sequence token is suppressed so that all get written.
    own : bool, default False
        Count this thread's processor time instead of the time that passes.

    Raises
    ------
    ValueError
        No images in ``inputs``; an unsupported model; a number out of range.
    """
    at_least(new_tokens=(new_tokens, 2))
    pixels_of(inputs)
    length = {"min_new_tokens": new_tokens, "max_new_tokens": new_tokens}
    with timed(model, own) as clock:
        model.generate(**inputs, **length, do_sample=False, num_beams=1, use_cache=True)
    return clock.cost()
