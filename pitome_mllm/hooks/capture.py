"""A call as one CUDA graph, and copies of what it made. All that needs a GPU is in `Capture`."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache, partial
from operator import itemgetter
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..methods import Merge, Reducer
from ..plan import Plan
from ..stats import Stats

Made = TypeVar("Made")
_ATOMS = (bool, int, float, str, type(None), torch.dtype, torch.device, Plan, Reducer)


class _Turn:
    """Graphs of one device run one after the other: they share the workspace that libraries gave their stream."""

    def __init__(self, device: torch.device) -> None:
        self.lock = threading.RLock()
        self.stream = torch.cuda.Stream(device)  # where all are captured
        self.last = torch.cuda.Event()  # after the last one, and the copies of what it made


_turn = lru_cache(_Turn)


class Capture:
    """``call`` as one CUDA graph, with its ``inputs`` and what it makes at fixed places.

    It takes as many tensors, and ran before, with tensors like these. The ``pool`` of memory, from `new_pool`, is
    shared by graphs of which only one runs at a time. What ``call`` raises while it is captured, leaves the process as
    before.
    """

    def __init__(self, call: Callable[..., Any], inputs: Sequence[Tensor], pool: Any, device: torch.device) -> None:
        self._device = device
        self._turn = turn = _turn(self._device)
        self._freed = False
        with turn.lock, torch.cuda.device(self._device), _own_stream(turn):
            self._inputs = [torch.empty_like(x).copy_(x) for x in inputs]
            with _without_autocast_cache(self._device.type):  # which holds casts of weights for a while only
                call(*self._inputs)  # libraries set themselves up for this stream
                self._graph, self.made = _captured(call, self._inputs, pool, turn.stream)

    def replay(self, inputs: Sequence[Tensor], read: Callable[[], Made]) -> Made | None:
        """What ``read`` makes of ``made``, made of ``inputs`` on the current stream; the next replay writes over it.

        None once the memory was given back.
        """
        turn = self._turn
        with turn.lock, torch.cuda.device(self._device):
            if self._freed:
                return None
            stream = torch.cuda.current_stream()
            stream.wait_event(turn.last)
            if self._inputs:
                torch._foreach_copy_(self._inputs, list(inputs))
            self._graph.replay()
            made = read()
            turn.last.record(stream)
        return made

    def free(self) -> None:
        """Give the memory back, once nothing runs in it any more."""
        with self._turn.lock:
            self._turn.last.synchronize()
            self._freed, self.made = True, None
            self._graph.reset()


def new_pool() -> Any:
    """Memory for the graphs of one attachment."""
    return torch.cuda.graph_pool_handle()


@contextmanager
def _own_stream(turn: _Turn) -> Iterator[None]:
    """Within it the stream where graphs are captured, after all that was asked of the current one, and back."""
    current = torch.cuda.current_stream()
    turn.stream.wait_stream(current)
    turn.stream.wait_event(turn.last)
    try:
        with torch.cuda.stream(turn.stream):
            yield
    finally:
        current.wait_stream(turn.stream)


@contextmanager
def _without_autocast_cache(kind: str) -> Iterator[None]:
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


def _captured(call: Callable[..., Any], inputs: list[Tensor], pool: Any, stream: Any) -> tuple[Any, Any]:
    """The graph of ``call`` and what it makes."""
    graph = torch.cuda.CUDAGraph()
    try:
        # other threads may allocate and wait meanwhile
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            made = call(*inputs)
    except BaseException:
        _end_capture(stream.device.index, pool)
        raise
    return graph, made


def _end_capture(device: int, pool: Any) -> None:
    """What torch leaves open where a capture fails: its memory pool, and its generator, which would refuse to draw."""
    with suppress(RuntimeError):  # where it was closed
        torch._C._cuda_endAllocateToPool(device, pool)
        torch._C._cuda_releasePool(device, pool)
    generator = torch.cuda.default_generators[device]
    generator.graphsafe_set_state(generator.clone_state())


class Copies:
    """Makes what a call made again, with copies of its tensors; TypeError for what is of a kind not known here."""

    def __init__(self, made: Any) -> None:
        found: dict[int, Tensor] = {}
        self._remake = _remaker(made, found) or (lambda fresh: made)
        kinds: dict[tuple, list[Tensor]] = {}  # alike, so that one kernel copies many
        for tensor in found.values():
            kinds.setdefault((tensor.dtype, tensor.device, tensor.is_contiguous()), []).append(tensor)
        self._kinds = [(tensors, list(map(id, tensors))) for tensors in kinds.values()]

    def __call__(self) -> Any:
        fresh: dict[int, Tensor] = {}
        for tensors, names in self._kinds:
            copies = list(map(torch.empty_like, tensors))
            torch._foreach_copy_(copies, tensors)
            fresh.update(zip(names, copies))
        return self._remake(fresh)


_Remake = Callable[[dict[int, Tensor]], Any]


def _remaker(value: Any, found: dict[int, Tensor]) -> _Remake | None:
    """What makes ``value`` of fresh tensors, given by the ids of its own, which are noted in ``found``; None if it has
    none.
    """
    if isinstance(value, Tensor):
        found[id(value)] = value
        return itemgetter(id(value))
    if isinstance(value, _ATOMS):
        return None
    if isinstance(value, (Merge, Stats)):
        kept = value.__getstate__() if isinstance(value, Merge) else vars(value)
        parts = {name: _gone if _is_recipe(each) else each for name, each in kept.items()}
        varied = _remakers({name: each for name, each in parts.items() if each is not _gone}, found)

        def made(fresh: dict[int, Tensor]) -> Any:
            new = object.__new__(type(value))
            vars(new).update(parts, **{name: make(fresh) for name, make in varied})
            return new

        return made
    if isinstance(value, dict):  # transformers' outputs too
        return partial(_remade_dict, value, _remakers(value, found))
    if isinstance(value, (list, tuple)):
        return partial(_remade_sequence, value, _remakers(dict(enumerate(value)), found))
    raise TypeError(f"it makes a {type(value).__name__}, which cannot be copied")


def _remakers(parts: dict[Any, Any], found: dict[int, Tensor]) -> list[tuple[Any, _Remake]]:
    makers = ((name, _remaker(each, found)) for name, each in parts.items())
    return [(name, make) for name, make in makers if make is not None]


def _remade_dict(value: dict, varied: list[tuple[Any, _Remake]], fresh: dict[int, Tensor]) -> Any:
    new = copy.copy(value)
    for name, make in varied:
        new[name] = make(fresh)
    return new


def _remade_sequence(value: Any, varied: list[tuple[Any, _Remake]], fresh: dict[int, Tensor]) -> Any:
    parts = list(value)
    for place, make in varied:
        parts[place] = make(fresh)
    return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)


def _is_recipe(value: Any) -> bool:
    """A function that makes a tensor of others, which only the call itself could ask."""
    return callable(value) and not isinstance(value, _ATOMS)


def _gone(merge: Merge) -> Tensor:
    raise RuntimeError(
        "the order in which the reference code leaves tokens is not kept by a graph; use graph=False, or attach with "
        "order='source'"
    )
