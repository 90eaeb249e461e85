"""Merges of PiToMe and ToMe in a handful of launches, on CUDA devices with Triton; elsewhere in torch's operations.

The torch path is the reference: the fused one takes the same decisions up to near-ties, and combines with the same
bits where sizes are whole numbers, but for features of a single channel, which torch adds in an order of its own.

The environment variable ``PITOME_KERNELS`` forces either: "torch", or "fused", which raises where a
merge of these methods cannot be fused; "auto", the default, fuses what it can. Within torch.compile merges are always
torch's operations. A decision has no gradient; what it combines has one by torch's operations only.
"""

from __future__ import annotations

import logging
import os
import subprocess
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from .launches import KEPT, Energy, Launch, Rows, Tile, Tiles, is_transformed, on, padded, places_of, power, stream_of
from .merge import Merge, whole_vectors

logger = logging.getLogger(__name__)

SWITCH = "PITOME_KERNELS"
CHOICES = ("auto", "torch", "fused")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MOST = 2048  # tokens of a picture, whose groups one program numbers
Step = tuple[bool, Launch]  # with whether it reads the metric
is_compiling: Callable[[], bool] = getattr(getattr(torch, "compiler", None), "is_compiling", lambda: False)


def fuses(metric: Tensor) -> bool:
    """Whether a merge by ``metric`` (B, N, C) takes the fused kernels. Never within torch.compile."""
    if is_compiling():
        return False
    choice = os.environ.get(SWITCH) or CHOICES[0]
    if choice not in CHOICES:
        raise UserError(f"{SWITCH}={choice!r} is not possible; choose one of {', '.join(CHOICES)}")
    if choice == "torch" or (choice == "auto" and metric.device.type != "cuda"):
        return False
    reason = _torch_reason(metric) or _device_reason(metric.device)  # in this order: nothing is tried within a trace
    if reason and choice == "fused":
        raise RuntimeError(f"{SWITCH}=fused, but {reason}; leave it at auto, or set it to torch")
    _say(reason)
    return not reason


def _torch_reason(metric: Tensor) -> str:
    """Why this merge cannot be fused; "" if it can."""
    if torch.jit.is_tracing():
        return "a trace holds torch's operations"
    if is_transformed():
        return "transforms of torch.func, such as vmap, know torch's operations"
    if type(metric) not in (Tensor, torch.nn.Parameter):
        return f"a {type(metric).__name__} has no memory of its own"
    if metric.dtype not in DTYPES:
        return f"there are no kernels for {metric.dtype}"
    if metric.shape[1] > MOST:
        return f"{metric.shape[1]} tokens are more than the {MOST} that one program numbers"
    return ""


def is_capturing() -> bool:
    """Whether the current stream is captured into a CUDA graph, so that nothing on it can be waited for."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


@lru_cache
def _device_reason(device: torch.device) -> str:
    """Why nothing can be fused on this device; "" if it can. Merges two tokens twice to find out, see `Launch`.

    Within a capture, where nothing can be read, it is enough that nothing fails.
    """
    try:
        from . import triton_kernels as device_code
    except (ImportError, AttributeError, TypeError) as error:  # there is none, or one of long ago
        return f"Triton cannot be imported, or is too old ({error})"
    if device.type == "cpu":
        return "" if device_code.INTERPRETED.value else "a processor runs Triton with TRITON_INTERPRET=1 only"
    if torch.version.cuda is None or torch.cuda.get_device_capability(device) < (8, 0):
        return "this is no NVIDIA GPU of compute capability 8.0 or newer"
    rows = torch.ones(1, 2, 16, device=device, dtype=torch.float32)
    try:
        merges = [merge(rows, 1, 0, Energy(2, 0.5, 1.0, False)) for _ in range(2)]
        made = [torch.cat(each.reduce(rows), 2) for each in merges]  # 16 ones, of 2 tokens
        if not is_capturing() and any(each.flatten().tolist() != [1.0] * 16 + [2.0] for each in made):
            return "two equal tokens did not become one"
    except torch.cuda.OutOfMemoryError:  # says nothing about later merges, and is not remembered
        raise
    except (TypeError, AttributeError) as error:
        return f"Triton's launcher is another ({error})"
    except (RuntimeError, OSError, subprocess.SubprocessError, device_code.TritonError) as error:
        return f"Triton cannot compile ({error})"
    return ""


@lru_cache
def _say(reason: str) -> None:
    """Tell, once for each reason, by what merges run on a GPU."""
    if reason:
        logger.warning("merging by torch's operations: %s", reason)
    else:
        logger.info("merging by fused Triton kernels")


def merge(metric: Tensor, r: int, protected: int, energy: Energy | None = None) -> FusedMerge:
    """The merge of r tokens by ``metric`` (B, N, C): PiToMe's with an ``energy``, else ToMe's.

    Of tokens in the order of their energy, else of their places, those at even places are A and those at odd ones B;
    the r of A that are most similar to one of B join it. ``protected`` ones are neither.
    """
    metric = metric.detach()
    if metric.stride(-1) != 1:
        metric = metric.contiguous()
    rows = Rows.of(metric)
    launches, size, unit = _decision(rows, r, protected, energy)
    with on(rows.device):
        memory = torch.empty(size, dtype=torch.uint8, device=rows.device)
        stream = stream_of(rows.device)
        for reads, launch in launches:
            launch(stream, memory, *((metric,) if reads else ()))
    batch, tokens = rows.shape[:2]
    return FusedMerge(memory, (batch, tokens, tokens - protected, r), unit)


@lru_cache(KEPT)
def _decision(rows: Rows, r: int, protected: int, energy: Energy | None) -> tuple[tuple[Step, ...], int, float | None]:
    """The launches that decide a merge, the bytes that they take, and what makes means of their sums of energies."""
    batch, tokens, width = rows.shape
    tiles = Tiles.of(rows.dtype, width)
    n, tile, ordered = tokens - protected, tiles.matches, energy is not None
    shifts = (protected,) * 2 if ordered else (protected + protected % 2, protected - protected % 2)
    candidates = (energy.candidates,) * 2 if energy else (tokens - shifts[0], tokens - shifts[1])
    sources, targets = (candidates[0] + 1) // 2, candidates[1] // 2
    blocks, columns = -(-sources // tile.rows), -(-targets // tile.columns)
    parts = max(1, min(columns, 132 // max(1, blocks * batch)))  # fill a GPU; what is found does not depend on it
    share = -(-columns // parts) * tile.columns
    parts = -(-targets // share)
    places, size = places_of(batch, tokens, n, r, parts, sources)
    shape = (*rows.stride[:2], tokens, protected)

    def launch(kernel: str, grid: tuple, names: str, numbers: tuple, constants: dict, **options: Any) -> Step:
        inside = [places[name] for name in names.split() if name != "metric"]
        return names.startswith("metric "), Launch(kernel, grid, inside, numbers, constants, **options)

    similarity = {"PRECISION": "tf32x3" if rows.dtype == torch.float32 else "ieee"}  # never one product of tf32
    step = min(1024, power(width))
    some = max(4, 1024 // step)
    launches = [
        launch("prepare", (-(-tokens // some), batch, 1), "metric inverse energy least", shape,
               {"WIDTH": width, "STEP": step, "ROWS": some})
    ]  # fmt: skip
    if energy is not None:
        launches += _ranking(rows, n, shape, energy, tiles.energies, launch, similarity)
    launches.append(
        launch("match", (blocks, parts, batch), "metric inverse order top best",
               (*shape, *shifts, sources, targets, share),
               {"WIDTH": width, "STEP": tile.step, "ROWS": tile.rows, "COLUMNS": tile.columns, "ORDERED": ordered,
                **similarity}, num_warps=tile.warps, num_stages=tile.stages)
    )  # fmt: skip
    half, select = padded(tokens) // 2, r < sources
    launches.append(
        launch("place", (batch, 1, 1), "top best order least group leads_then_rest member slot",
               (tokens, protected, *shifts, sources, r, parts),
               {"ALL": 2 * half, "HALF": half, "CHUNK": max(8, 16384 // half), "ORDERED": ordered, "SELECT": select},
               num_warps=16 if select else 8)
    )  # fmt: skip
    return tuple(launches), size, 1 / (energy.scale(n) * n) if energy else None


def _ranking(
    rows: Rows, n: int, shape: tuple, energy: Energy, tile: Tile, launch: Callable[..., Step], similarity: dict
) -> list[Step]:
    """The launches that write tokens in the order of their energy."""
    batch, tokens, width = rows.shape
    count = -(-n // tile.rows)
    return [
        launch("add_energies", (count, count // 2 + 1, batch), "metric inverse energy",
               (*shape, energy.margin, energy.alpha, energy.scale(n)),
               {"WIDTH": width, "STEP": tile.step, "SIDE": tile.rows, "ELU": energy.elu, **similarity},
               num_warps=tile.warps, num_stages=tile.stages),
        launch("rank", (-(-n // 4), batch, 1), "energy order", (n,), {"ROWS": 4, "ALL": padded(tokens)}, num_warps=4),
    ]  # fmt: skip


class FusedMerge(Merge):
    """A merge that the kernels decided, and that they apply: every group gathers its tokens in reading order.

    What it says is looked up where it is asked for: most merges only reduce.
    """

    by_energy: Tensor
    _slot: Tensor
    _logs: tuple[Tensor, Tensor] | None = None  # sizes that were made, and what `log_sizes` makes of them

    def __init__(self, memory: Tensor, shape: tuple[int, int, int, int], unit: float | None) -> None:
        """What lies in ``memory``, of ``shape`` B, N, n, r; ``unit`` makes means of energies, None = there are none."""
        batch, tokens, n, r = shape
        self.count = tokens - r
        self._memory, self._shape, self._unit = memory, shape, unit
        self._weight = None
        self._may_drop = self._renumbered = False

    def __getattr__(self, name: str) -> Tensor | None:
        make = _ASKED.get(name)
        if make is None:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        value = make(self)
        setattr(self, name, value)
        return value

    def __getstate__(self) -> dict[str, Any]:
        """Without what is read from the memory again, as far as that was not changed, and what a tower is done with."""
        own = ("group", "_first", "_slot") if self._renumbered else ()
        gone = {"_logs", *_ASKED}.difference(own)
        return {name: value for name, value in vars(self).items() if name not in gone}

    def _read(self, name: str) -> Tensor:
        return places_of(*self._shape, 1, 1)[0][name].of(self._memory)

    def reduce(self, x: Tensor, size: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._combine(x, size, True) if self._fused(x, size) else super().reduce(x, size)

    def reduce_evenly(self, x: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
        return self._combine(x, size, False) if self._fused(x, size) else super().reduce_evenly(x, size)

    def _fused(self, x: Tensor, size: Tensor | None) -> bool:
        """Whether the kernel combines these. It looks at no bounds: torch's operations refuse what does not fit."""
        if is_compiling() or self._weight is not None or _torch_reason(x) or not self._fits(x):
            return False
        gradient = x.requires_grad or (size is not None and size.requires_grad)
        return (size is None or self._fits(size)) and not (gradient and torch.is_grad_enabled())

    def _fits(self, x: Tensor) -> bool:
        return x.device == self._memory.device and x.shape[:2] == self._shape[:2]

    def _combine(self, x: Tensor, size: Tensor | None, weighted: bool) -> tuple[Tensor, Tensor]:
        x = x.detach() if x.stride(-1) == 1 else x.detach().contiguous()
        if size is not None and (size.dtype != torch.float32 or not size.is_contiguous()):
            size = size.float().contiguous()
        batch, _, width = x.shape
        aligned = size is None or size.data_ptr() % 16 == 0
        launch = _combination(Rows.of(x), self._shape, size is not None, aligned, weighted, self._renumbered)
        with on(x.device):
            y = torch.empty((batch, self.count, width), dtype=x.dtype, device=x.device)
            total = torch.empty((batch, self.count, 1), dtype=torch.float32, device=x.device)
            logs = torch.empty((batch, 1, 1, whole_vectors(self.count)), dtype=x.dtype, device=x.device)
            own = (self._first, self._member, self._slot) if self._renumbered else ()
            launch(stream_of(x.device), self._memory, x, total if size is None else size, y, total, logs, *own)
        self._logs = self._logs or (total, logs)  # those of the features, which are reduced before keys
        return y, total

    def log_sizes(self, size: Tensor, dtype: torch.dtype) -> Tensor:
        """As `Merge.log_sizes`; what the kernel wrote is handed over once."""
        made, self._logs = self._logs, None
        if made is None or made[0] is not size or made[1].dtype != dtype:
            return super().log_sizes(size, dtype)
        return made[1][..., : self.count]

    def in_source_order(self) -> FusedMerge:
        merge = super().in_source_order()
        if merge is not self:
            merge._slot = merge._group.gather(1, merge._rest).int()
            merge._renumbered, merge._logs = True, None
        return merge


# What a fused merge says, and how it is read.
_ASKED: dict[str, Callable[[FusedMerge], Tensor | None]] = {
    "group": lambda merge: merge._read("group"),
    "_first": lambda merge: merge._read("leads_then_rest")[:, : merge.count],
    "_rest": lambda merge: merge._read("leads_then_rest")[:, merge.count :],
    "_member": lambda merge: merge._read("member"),
    "_slot": lambda merge: merge._read("slot"),
    "energy": lambda merge: None if merge._unit is None else merge._read("energy").float() * merge._unit,
    "by_energy": lambda merge: merge._read("order").long(),
}


@lru_cache(KEPT)
def _combination(
    rows: Rows, shape: tuple[int, int, int, int], sized: bool, aligned: bool, weighted: bool, renumbered: bool
) -> Launch:
    """The launch that makes of rows what a merge makes of them; ``aligned`` says how their sizes lie."""
    batch, tokens, width = rows.shape
    r, step = shape[3], min(1024, power(width))
    places = places_of(*shape, 1, 1)[0]
    return Launch(
        "combine", (tokens - r, batch, -(-width // step)),
        [] if renumbered else [places[name] for name in ("leads_then_rest", "member", "slot")],
        (*rows.stride[:2], tokens - r if renumbered else tokens, tokens, r),
        {"WIDTH": width, "STEP": step, "REST": padded(tokens) // 2, "SIZED": sized, "WEIGHTED": weighted},
        num_warps=max(1, step // 256), enable_fp_fusion=False,
    )  # fmt: skip
