"""How long a call takes, by the clock."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ..families.features import pixels_of
from ..families.geometry import family_of, geometry
from ..methods import UserError


@dataclass(frozen=True)
class Timing:
    """Repeated wall-clock times of one thing.

    Attributes
    ----------
    runs : tuple of float
        Milliseconds of each repetition, in the order they ran.
    """

    runs: tuple[float, ...]

    @property
    def median(self) -> float:
        """Milliseconds."""
        return statistics.median(self.runs)

    @property
    def spread(self) -> tuple[float, float]:
        """The 20th and the 80th percentile, interpolated."""
        if len(self.runs) == 1:
            return self.runs[0], self.runs[0]
        cuts = statistics.quantiles(self.runs, n=5, method="inclusive")
        return cuts[0], cuts[-1]


@dataclass(frozen=True)
class Latency:
    """How long a model takes.

    Attributes
    ----------
    tower : Timing
        The vision tower with its merging, all images of the batch at once.
    prefill : Timing
        From images and prompt to the first new token: tower, projector and LLM.
    per_token : Timing
        Each new token after the first.
    new_tokens : int
        How many tokens every run wrote.
    device : str
        Where the model ran.
    """

    tower: Timing
    prefill: Timing
    per_token: Timing
    new_tokens: int
    device: str

    @property
    def tower_ms(self) -> float:
        """The median of ``tower``."""
        return self.tower.median

    @property
    def prefill_ms(self) -> float:
        """The median of ``prefill``."""
        return self.prefill.median

    @property
    def per_token_ms(self) -> float:
        """The median of ``per_token``."""
        return self.per_token.median


def measure(
    model: Any, inputs: Mapping[str, Any], *, new_tokens: int = 8, repeats: int = 5, warmup: int = 1
) -> Latency:
    """Time a model as it is now: plain, attached, or inside ``handle.using(...)``.

    Every repetition runs the tower alone and one greedy ``generate``. The model is left as it was; an attached
    handle's ``stats`` then show the last repetition.

    Parameters
    ----------
    model : object
        On the device of ``inputs``.
    inputs : mapping
        From the processor, with pixel_values and input_ids.
    new_tokens : int, default 8
        Tokens to write, at least 2; the end-of-sequence token is suppressed so that all get written.
    repeats : int, default 5
        Timed repetitions.
    warmup : int, default 1
        Repetitions before those, not timed.

    Raises
    ------
    ValueError
        No images in ``inputs``; an unsupported model; a number out of range.
    """
    at_least(new_tokens=(new_tokens, 2), repeats=(repeats, 1), warmup=(warmup, 0))
    pixels = pixels_of(inputs)
    geometry(model.config)
    tower = model.get_submodule(family_of(model.config).tower)
    device = pixels.device
    taken: list[Any] = []
    for _ in range(warmup + repeats):
        tower_ms = _tower_ms(tower, pixels)
        clock = _answered(model, inputs, new_tokens)
        taken.append((tower_ms, clock.prefill_ms, clock.per_token_ms))
    towers, prefills, others = (Timing(times) for times in zip(*taken[warmup:], strict=True))
    return Latency(towers, prefills, others, new_tokens, str(device))


@torch.no_grad()
def _tower_ms(tower: Any, pixels: torch.Tensor) -> float:
    start = now(pixels.device)
    tower(pixels.flatten(0, -4), output_hidden_states=True, return_dict=True)
    return 1000 * (now(pixels.device) - start)


def _answered(model: Any, inputs: Mapping[str, Any], new_tokens: int) -> TokenClock:
    """A clock that has timed one answer of so many tokens."""
    from transformers import StoppingCriteriaList

    clock = TokenClock(pixels_of(inputs).device)
    model.generate(
        **inputs,
        do_sample=False,
        num_beams=1,
        use_cache=True,
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
        stopping_criteria=StoppingCriteriaList([clock]),
    )
    return clock


class TokenClock:
    """Notes when every new token of ``generate`` is known, as one of its stopping criteria.

    Parameters
    ----------
    device : torch.device
        Where the model is; the clock starts here and now.
    ended : callable
        Whether the answer is to end with this token.
    """

    def __init__(self, device: torch.device, ended: Callable[[], bool] = lambda: False) -> None:
        self.device, self.ended = device, ended
        self.ticks: list[float] = []
        self.start = now(device)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self.ticks.append(now(self.device))
        return torch.full((len(input_ids),), self.ended(), device=input_ids.device)

    @property
    def prefill_ms(self) -> float | None:
        """Milliseconds until the first new token; None without any."""
        return 1000 * (self.ticks[0] - self.start) if self.ticks else None

    @property
    def per_token_ms(self) -> float | None:
        """Milliseconds of each token after the first; None without any."""
        count = len(self.ticks) - 1
        return 1000 * (self.ticks[-1] - self.ticks[0]) / count if count > 0 else None


@contextmanager
def timed_tower(model: Any) -> Iterator[list[float]]:
    """Seconds at the start and at the end of every call of the vision tower within the block, its merging included."""
    tower, ticks = model.get_submodule(family_of(model.config).tower), []

    def tick(*_: Any) -> None:
        ticks.append(now(model.device))

    hooks = [tower.register_forward_pre_hook(tick, prepend=True), tower.register_forward_hook(tick)]
    try:
        yield ticks
    finally:
        for hook in hooks:
            hook.remove()


def spent_ms(ticks: list[float]) -> float | None:
    """Milliseconds of all calls that `timed_tower` noted; None without any."""
    return 1000 * (sum(ticks[1::2]) - sum(ticks[: len(ticks) // 2 * 2 : 2])) if len(ticks) > 1 else None


def now(device: torch.device) -> float:
    """Seconds on a steady clock, once ``device`` has finished what it was given."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()  # torch.cuda, torch.mps, torch.xpu
    return time.perf_counter()


def at_least(**numbers: tuple[int, int]) -> None:
    """ValueError for the first of ``name=(value, least)`` that is too small."""
    for name, (value, least) in numbers.items():
        if value < least:
            raise UserError(f"{name}={value} is not possible; give {least} or more")
