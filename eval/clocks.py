"""One timing loop for processors and GPUs: what is compared takes turns, each timed alone; and the memory it takes."""

from __future__ import annotations

import random
import time
import weakref
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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


class Alive(TorchDispatchMode):
    """Counts the bytes of tensors that operations make, as long as these live; ``peak`` is the most at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for value in (leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)):
            if value.untyped_storage().data_ptr() not in self._known:
                self._enter(value.untyped_storage())
        return result

    def _enter(self, storage: Any) -> None:
        place, size = storage.data_ptr(), storage.nbytes()
        self._known.add(place)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._leave, place, size)

    def _leave(self, place: int, size: int) -> None:
        self._known.discard(place)
        self.now -= size


def peak_bytes(call: Call, device: torch.device) -> int:
    """Most memory during one turn: on a GPU all that is allocated, weights included; else of what operations make."""
    if call.prepare:
        call.prepare()
    if device.type != "cuda":
        with Alive() as alive:
            call.run()
        return alive.peak
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    call.run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device)
