"""One timing loop for processors and GPUs: what is compared takes turns, and each turn of each is timed alone."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch

Key = TypeVar("Key", bound=Hashable)


@dataclass
class Call:
    """Something to time, which does one thing ``times`` times; ``prepare`` runs before every turn and is not timed."""

    run: Callable[[], Any]
    prepare: Callable[[], Any] | None = None
    times: int = 1


def clock_name(device: torch.device) -> str:
    """What times are taken by: CUDA events; else, with one thread, its own time, which others do not count into."""
    if device.type == "cuda":
        return "CUDA events"
    return "thread" if device.type == "cpu" and torch.get_num_threads() == 1 else "wall"


def milliseconds(call: Call, device: torch.device) -> float:
    """One turn, for each of the things that it does."""
    if call.prepare:
        call.prepare()
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        call.run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / call.times
    now = time.thread_time if clock_name(device) == "thread" else time.perf_counter
    began = now()
    call.run()
    return 1000 * (now() - began) / call.times


def in_turns(
    calls: Mapping[Key, Call], device: torch.device, repeats: int, warmup: int, done: Callable[[], Any] = lambda: None
) -> dict[Key, list[float]]:
    """Milliseconds of every call in ``repeats`` rounds, after ``warmup`` rounds that do not count.

    Times of the same round belong together: whatever else the machine did then hit all of them. Rounds differ in their
    order, so that nothing always comes behind the same.
    """
    taken: dict[Key, list[float]] = {key: [] for key in calls}
    order = list(calls)
    for turn in range(warmup + repeats):
        random.Random(turn).shuffle(order)
        for key in order:
            ms = milliseconds(calls[key], device)
            if turn >= warmup:
                taken[key].append(ms)
            done()
    return taken


def quantiles(values: list[float] | np.ndarray) -> tuple[float, float, float]:
    """The 20th, 50th and 80th percentile."""
    low, middle, high = np.quantile(values, (0.2, 0.5, 0.8))
    return float(low), float(middle), float(high)
