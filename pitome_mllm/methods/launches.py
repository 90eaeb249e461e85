"""What a launch takes beside the kernel: options, tiles, places in memory, and as little of Python as can be."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

KEPT = 512  # launches of so many kinds of merges are kept


class Tile(NamedTuple):
    """How many tokens of either side a program looks at, how many channels it multiplies at once, and with what."""

    rows: int
    columns: int
    step: int
    warps: int
    stages: int


class Tiles(NamedTuple):
    """The tiles of similarities, of energies (square) and of matches. Never tuned at run time: they decide near-ties.

    Fixed by dtype and width alone, so that a picture has the same groups in any batch; measured on an H200 (577 tokens,
    64 and 1,024 channels, batches of 1 and 16): none of those tried is faster at both by more than a microsecond.
    """

    energies: Tile
    matches: Tile

    @classmethod
    def of(cls, dtype: torch.dtype, channels: int) -> Tiles:
        """The tiles for a metric of so many channels."""
        width = power(channels)
        if dtype == torch.float32:
            return cls(Tile(64, 64, min(32, width), 4, 3), Tile(32, 64, min(32, width), 4, 3))
        if width <= 128:  # keys
            return cls(Tile(32, 32, width, 2, 3), Tile(32, 32, width, 4, 3))
        return cls(Tile(64, 64, 64, 4, 4), Tile(32, 32, 128, 4, 4))


class Energy(NamedTuple):
    """PiToMe's energy: the options of f, and how many tokens of the highest energy may merge."""

    candidates: int
    margin: float
    alpha: float
    elu: bool

    def scale(self, n: int) -> float:
        """The largest power of two by which no sum of ``n`` integers overflows: f is at most 1, alpha, 1 - margin."""
        return 2.0 ** min(40, 62 - math.ceil(math.log2(n * max(1.0, abs(self.alpha), abs(self.margin) + 1.0))))


@lru_cache(KEPT)
def places_of(batch: int, tokens: int, n: int, r: int, parts: int, sources: int) -> tuple[dict[str, Place], int]:
    """Where a merge keeps what it decides, and on the way there; and how many bytes that is in all."""
    whole, short, real = torch.int64, torch.int32, torch.float32
    shapes = {
        "group": (whole, (batch, tokens)),
        "leads_then_rest": (whole, (batch, tokens)),
        "member": (short, (batch, r)),
        "slot": (short, (batch, r)),
        "energy": (whole, (batch, n)),
        "order": (short, (batch, n)),
        "inverse": (real, (batch, tokens)),
        "least": (short, (batch, tokens)),
        "top": (real, (parts, batch, sources)),
        "best": (short, (parts, batch, sources)),
    }
    places, end = {}, 0
    for name, (dtype, shape) in shapes.items():
        places[name] = Place(end, dtype, shape)
        end += -(-math.prod(shape) * dtype.itemsize // 128) * 128
    return places, end


class Rows(NamedTuple):
    """All that is known of a metric (B, N, C) without its numbers."""

    device: torch.device
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    aligned: bool

    @classmethod
    def of(cls, x: Tensor) -> Rows:
        return cls(x.device, x.dtype, x.shape, x.stride(), x.data_ptr() % 16 == 0)


class Launch:
    """One launch of a kernel, with all that is known before there are numbers: the grid, shapes and places in memory.

    Triton looks at every argument of every launch, several times as long as launching takes. The first launch goes
    that way; later ones call what it compiled, with addresses. So a `Launch` serves one device, dtype, shape and
    alignment only.
    """

    def __init__(
        self,
        kernel: str,
        grid: tuple[int, int, int],
        inside: Sequence[Place],
        numbers: tuple,
        constants: dict[str, Any],
        **options: Any,
    ) -> None:
        """Launch ``kernel`` with tensors, those ``inside`` one piece of memory, ``numbers`` and ``constants``."""
        self._kernel, self._grid, self._inside = kernel, grid, inside
        self._numbers, self._constants = numbers, constants
        self._options = {"enable_fp_fusion": True, **options}  # by default as the environment or a later Triton has it
        self._offsets = [place.offset for place in inside]
        self._always = (*numbers, *constants.values())
        self._run: Callable[..., None] | None = None

    def __call__(self, stream: int, memory: Tensor, *outside: Tensor) -> None:
        if self._run is None:
            self._first_time(memory, *outside)
            return
        start = memory.data_ptr()
        inside = [start + offset for offset in self._offsets]
        self._run(stream, *[x.data_ptr() for x in outside], *inside, *self._always)

    def _first_time(self, memory: Tensor, *outside: Tensor) -> None:
        from . import triton_kernels as device_code

        tensors = *outside, *(place.of(memory) for place in self._inside)
        launch = getattr(device_code, self._kernel)[self._grid]
        compiled = launch(*tensors, *self._numbers, **self._constants, **self._options)
        self._run = device_code.launcher(compiled, self._grid)


class Place(NamedTuple):
    """Where in a piece of memory a tensor is."""

    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    def of(self, memory: Tensor) -> Tensor:
        size = math.prod(self.shape) * self.dtype.itemsize
        return memory[self.offset : self.offset + size].view(self.dtype).view(self.shape)


def power(width: int) -> int:
    """The next power of two, at least the 16 that a tensor core takes."""
    return max(16, 1 << (width - 1).bit_length())


def padded(tokens: int) -> int:
    """How many tokens the kernels count on that look at all of a picture's: few numbers, so that few are compiled."""
    return max(256, power(tokens))


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Launch on ``device``: Triton launches on the current one."""
    if device.type != "cuda" or device.index == torch._C._cuda_getDevice():
        return nullcontext()
    return torch.cuda.device(device)


def stream_of(device: torch.device) -> int:
    """The address of the current stream; 0 on a processor."""
    return torch._C._cuda_getCurrentRawStream(device.index) if device.type == "cuda" else 0


def is_transformed() -> bool:
    """Whether a transform of torch.func runs."""
    return torch._C._functorch.peek_interpreter_stack() is not None
