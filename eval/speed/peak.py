"""How much memory a call holds at most."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .clocks import Call


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
