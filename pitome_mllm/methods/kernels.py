"""Merges of PiToMe and ToMe in a handful of launches, on CUDA devices with Triton; elsewhere in torch's operations.

The torch path is the reference: the fused one takes the same decisions up to near-ties, and combines with the same
bits. `fuses` alone decides which of the two a merge takes. The environment variable ``PITOME_KERNELS`` forces either:
"torch", or "fused", which raises where a merge of these methods cannot be fused; "auto", the default, fuses what it
can.
"""

from __future__ import annotations

import logging
import math
import os
import subprocess
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .errors import UserError
from .merge import Merge

logger = logging.getLogger(__name__)

SWITCH = "PITOME_KERNELS"
CHOICES = ("auto", "torch", "fused")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MOST = 2048  # tokens of a picture, whose groups one program numbers
is_compiling: Callable[[], bool] = getattr(getattr(torch, "compiler", None), "is_compiling", lambda: False)


def fuses(metric: Tensor) -> bool:
    """Whether a merge by ``metric`` (B, N, C) takes the fused kernels. Never within torch.compile.

    Raises
    ------
    ValueError : the switch says what it cannot say.
    RuntimeError : the switch says "fused", and this merge cannot be.
    """
    if is_compiling():
        return False
    choice = os.environ.get(SWITCH, CHOICES[0])
    if choice not in CHOICES:
        raise UserError(f"{SWITCH}={choice!r} is not possible; choose one of {', '.join(CHOICES)}")
    if choice == "torch" or (choice == "auto" and metric.device.type != "cuda"):
        return False
    reason = _device_obstacle(metric.device) or _obstacle(metric)
    if reason and choice == "fused":
        raise RuntimeError(f"{SWITCH}=fused, but {reason}; leave it at auto, or set it to torch")
    _say(reason)
    return not reason


def _obstacle(metric: Tensor) -> str:
    """Why this merge cannot be fused; "" if it can."""
    if torch.jit.is_tracing():
        return "a trace holds torch's operations"
    if type(metric) not in (Tensor, torch.nn.Parameter):
        return f"a {type(metric).__name__} has no memory of its own"
    if metric.requires_grad:
        return "the fused kernels have no gradient"
    if metric.dtype not in DTYPES:
        return f"there are no kernels for {metric.dtype}"
    if metric.shape[1] > MOST:
        return f"{metric.shape[1]} tokens are more than the {MOST} that one program numbers"
    return ""


@lru_cache
def _device_obstacle(device: torch.device) -> str:
    """Why nothing can be fused on this device; "" if it can. Compiles the smallest kernel to find out."""
    try:
        from . import triton_kernels as device_code
    except (ImportError, AttributeError, TypeError) as error:  # there is none, or one of long ago
        return f"Triton cannot be imported, or is too old ({error})"
    if device.type == "cpu":
        return "" if device_code.INTERPRETED.value else "a processor runs Triton with TRITON_INTERPRET=1 only"
    if torch.version.cuda is None or torch.cuda.get_device_capability(device) < (8, 0):
        return "this is no NVIDIA GPU of compute capability 8.0 or newer"
    try:
        _prepare(torch.ones(1, 2, 16, device=device), 0)
    except (RuntimeError, OSError, subprocess.SubprocessError) as error:
        return f"Triton cannot compile ({error})"
    return ""


@lru_cache
def _say(reason: str) -> None:
    """Tell, once for each reason, by what merges run on a GPU."""
    if reason:
        logger.warning("merging by torch's operations: %s", reason)
    else:
        logger.info("merging by fused Triton kernels")


@dataclass(frozen=True)
class Tiles:
    """How many tokens and channels a program looks at. Fixed by dtype and width, never tuned at run time.

    Attributes
    ----------
    side : tokens of both halves of a tile of similarities, for energies.
    rows, columns : sources and targets of such a tile, for matches.
    step : channels that are multiplied at once.
    warps, stages : of the programs that multiply.
    """

    side: int = 64
    rows: int = 32
    columns: int = 64
    step: int = 128
    warps: int = 4
    stages: int = 3

    @classmethod
    def of(cls, metric: Tensor) -> Tiles:
        """The tiles for a metric (B, N, C)."""
        step = 64 if metric.dtype == torch.float32 else 128
        return cls(step=min(step, _power(metric.shape[-1])))


def merge_by_energy(
    metric: Tensor,
    r: int,
    protected: int,
    candidates: int,
    *,
    margin: float,
    alpha: float,
    elu: bool,
    source: Callable[[Tensor], Tensor] | None = None,
    tiles: Tiles | None = None,
) -> FusedMerge:
    """PiToMe's merge: ``candidates`` tokens of the highest energy alternate between A and B, and r of A join B.

    Parameters
    ----------
    metric : (B, N, C).
    source : makes of all tokens by energy (B, N - protected) what the reference code leaves.
    """
    from . import triton_kernels as device_code

    batch, tokens, width = metric.shape
    n, tiles = tokens - protected, tiles or Tiles.of(metric)
    # The largest power of two by which no sum of n integers overflows: f is at most 1, or alpha, or 1 - margin.
    scale = 2.0 ** min(40, 62 - math.ceil(math.log2(n * max(1.0, abs(alpha), abs(margin) + 1.0))))
    with _on(metric.device):
        metric, inverse, energy, least = _prepare(metric, protected)
        shape = (*metric.stride()[:2], tokens, protected)
        count = -(-n // tiles.side)
        device_code.add_energies[(count, count // 2 + 1, batch)](
            metric, inverse, energy, *shape, margin, alpha, scale, WIDTH=width, STEP=tiles.step, SIDE=tiles.side,
            ELU=elu, PRECISION=_precision(metric), num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
        mean = torch.empty(batch, n, device=metric.device)
        order = torch.empty(batch, n, dtype=torch.int32, device=metric.device)
        rows = max(1, min(16, 16384 // _all(tokens)))
        device_code.rank[(-(-n // rows), batch)](
            energy, mean, order, n, 1.0 / (scale * n), ROWS=rows, ALL=_all(tokens), num_warps=8
        )
        halves = (candidates + 1) // 2, candidates // 2
        merge = _match(metric, inverse, least, order, protected, (protected, protected), halves, r, tiles)
    merge.energy = mean
    if source is not None:
        merge._source = lambda: source(order.long() + protected)
    return merge


def merge_by_position(metric: Tensor, r: int, protected: int, tiles: Tiles | None = None) -> FusedMerge:
    """ToMe's merge: tokens at even places are A, those at odd ones B, protected ones neither, and r of A join B."""
    tokens, tiles = metric.shape[1], tiles or Tiles.of(metric)
    shifts = protected + protected % 2, protected - protected % 2
    halves = (tokens - shifts[0] + 1) // 2, (tokens - shifts[1]) // 2
    with _on(metric.device):
        metric, inverse, _, least = _prepare(metric, protected)
        return _match(metric, inverse, least, None, protected, shifts, halves, r, tiles)


def _prepare(metric: Tensor, protected: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The metric (B, N, C) with whole rows, 1 / length (B, N) of them, and what energies and groups begin with."""
    from . import triton_kernels as device_code

    if metric.stride(-1) != 1:
        metric = metric.contiguous()
    batch, tokens, width = metric.shape
    inverse = torch.empty(batch, tokens, device=metric.device)
    energy = torch.empty(batch, tokens - protected, dtype=torch.int64, device=metric.device)
    least = torch.empty(batch, tokens, dtype=torch.int32, device=metric.device)
    step = min(1024, _power(width))
    rows = max(1, 1024 // step)
    device_code.prepare[(-(-tokens // rows), batch)](
        metric, inverse, energy, least, *metric.stride()[:2], tokens, protected, WIDTH=width, STEP=step, ROWS=rows
    )
    return metric, inverse, energy, least


def _match(
    metric: Tensor,
    inverse: Tensor,
    least: Tensor,
    order: Tensor | None,
    protected: int,
    shifts: tuple[int, int],
    halves: tuple[int, int],
    r: int,
    tiles: Tiles,
) -> FusedMerge:
    """Let the r most similar of the sources, tokens at places 0, 2, ..., join their targets, at 1, 3, ...

    Places are those of ``order`` (B, N - protected), or of the tokens themselves, ``shifts`` further back.
    """
    from . import triton_kernels as device_code

    batch, tokens, width = metric.shape
    (sources, targets), device, ordered = halves, metric.device, order is not None
    order = inverse if order is None else order  # not read
    blocks, columns = -(-sources // tiles.rows), -(-targets // tiles.columns)
    parts = max(1, min(columns, 132 // max(1, blocks * batch)))  # fill a GPU; what is found does not depend on it
    share = -(-columns // parts) * tiles.columns
    parts = -(-targets // share)
    top = torch.empty(parts, batch, sources, device=device)
    best = torch.empty(parts, batch, sources, dtype=torch.int32, device=device)
    device_code.match[(blocks, parts, batch)](
        metric, inverse, order, top, best, *metric.stride()[:2], tokens, protected, *shifts, sources, targets,
        share, WIDTH=width, STEP=tiles.step, ROWS=tiles.rows, COLUMNS=tiles.columns, ORDERED=ordered,
        PRECISION=_precision(metric), num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    group, leads_then_rest = torch.empty(2, batch, tokens, dtype=torch.int64, device=device)
    member, slot = torch.empty(2, batch, r, dtype=torch.int32, device=device)
    half = _all(tokens) // 2
    device_code.place[(batch,)](
        top, best, order, least, group, leads_then_rest, member, slot, tokens, protected, *shifts, sources, r,
        parts, ALL=2 * half, HALF=half, CHUNK=max(8, 16384 // half), ORDERED=ordered, SELECT=r < sources, num_warps=8,
    )  # fmt: skip
    return FusedMerge(group, leads_then_rest, tokens - r, member, slot)


class FusedMerge(Merge):
    """A merge that the kernels decided, and that they apply: every group gathers its tokens in reading order."""

    def __init__(self, group: Tensor, leads_then_rest: Tensor, count: int, member: Tensor, slot: Tensor) -> None:
        """Groups (B, N), the tokens that lead one and then the rest (B, N), and of these also token and group."""
        self.count = count
        self.energy = self._weight = self._source = None
        self.group = group
        self._may_drop = False
        self._first = leads_then_rest[:, :count]
        self._rest = leads_then_rest[:, count:]
        self._member, self._slot = member, slot

    def reduce(self, x: Tensor, size: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if x.dtype not in DTYPES or (x.requires_grad and torch.is_grad_enabled()) or is_compiling():
            return super().reduce(x, size)
        with _on(x.device):
            return self._combine(x, size)

    def _combine(self, x: Tensor, size: Tensor | None) -> tuple[Tensor, Tensor]:
        from . import triton_kernels as device_code

        x = x.detach() if x.stride(-1) == 1 else x.detach().contiguous()
        batch, tokens, width = x.shape
        y = torch.empty(batch, self.count, width, dtype=x.dtype, device=x.device)
        total = torch.empty(batch, self.count, 1, device=x.device)
        step = min(1024, _power(width))
        device_code.combine[(self.count, batch, -(-width // step))](
            x, total if size is None else size.float().contiguous(), self._first, self._member, self._slot, y, total,
            *x.stride()[:2], self._first.stride(0), tokens, tokens - self.count,
            WIDTH=width, STEP=step, REST=_all(tokens) // 2, SIZED=size is not None, num_warps=max(1, step // 256),
            enable_fp_fusion=False,
        )  # fmt: skip
        return y, total

    def in_source_order(self) -> FusedMerge:
        merge = super().in_source_order()
        if merge is not self:
            merge._slot = merge._group.gather(1, merge._rest).int()
        return merge


def _precision(metric: Tensor) -> str:
    """How tiles multiply: halves are exact in float32, and float32 takes three products, never one of tf32."""
    return "tf32x3" if metric.dtype == torch.float32 else "ieee"


def _power(width: int) -> int:
    """The next power of two, at least the 16 that a tensor core takes."""
    return max(16, 1 << (width - 1).bit_length())


def _all(tokens: int) -> int:
    """How many tokens the kernels count on that look at all of a picture's: few numbers, so that few are compiled."""
    return max(256, _power(tokens))


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Launch on ``device``: Triton launches on the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
