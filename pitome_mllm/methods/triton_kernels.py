"""The device code of `kernels`: one merge of PiToMe or ToMe, in a handful of launches.

`prepare`, `add_energies` and `rank` (PiToMe only), `match`, `place`, `combine`, in this order. Every shape is static
and nothing waits for the host. Sums whose order is not fixed are sums of integers, so equal inputs give equal bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl
from triton import TritonError as TritonError
from triton.compiler import CompiledKernel

ROUNDING = tl.constexpr(2.0**-24)  # of a cosine in float32; as in `pitome`
NOTHING = tl.constexpr(-(2**63))


@triton.jit
def token(order, place, shift, ORDERED: tl.constexpr):
    """The token at a place, even in A and odd in B: by energy, or by position; ``shift`` further back."""
    if ORDERED:
        return shift + tl.load(order + place)
    return shift + place


# TRITON_INTERPRET=1 was set at import. The interpreter multiplies the bits of bfloat16 as if they were whole numbers.
INTERPRETED = tl.constexpr(not isinstance(token, triton.JITFunction))

_VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])


def launcher(compiled: Any, grid: tuple[int, int, int]) -> Callable[..., None] | None:
    """Launches what a first launch compiled: takes a stream, addresses and all constants, which Triton does since 3.5.

    None if there is no such way. Those of 3.6 to 3.9 are known down to the function in C: what Triton does around it,
    such as describing each launch to its own profiler, takes longer than all else.
    """
    if not isinstance(compiled, CompiledKernel) or _VERSION < (3, 5):
        return None
    start, run = compiled[grid], compiled.run
    takes_more = run.global_scratch_size or run.profile_scratch_size or getattr(run, "gsan_enabled", False)
    if not (3, 6) <= _VERSION <= (3, 9) or takes_more:
        return lambda stream, *args: start(*args, stream=stream)
    launch, kernel = run.launch, (compiled.function, run.launch_cooperative_grid, run.launch_pdl)
    about, no_hooks, no_scratch = compiled.packed_metadata, (None, None, None), (None, None)
    if _VERSION == (3, 6):
        return lambda stream, *args: launch(*grid, stream, *kernel, *no_scratch, about, *no_hooks, *args)
    known = *kernel, about, *no_hooks, *no_scratch, run.arg_annotations, run.kernel_signature
    # ``held``: from 3.8 on Triton unloads what nobody has, such as one of two that threads compiled at once
    return lambda stream, *args, held=compiled: launch(*grid, stream, *known, args)


@triton.jit(do_not_specialize=["tokens", "protected"])
def prepare(
    metric, inverse, energy, least, batch_stride, row_stride, tokens, protected,
    WIDTH: tl.constexpr, STEP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """1 / length of every row, 0 where that is no number, and what `add_energies` and `place` begin with."""
    b = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = i < tokens
    row = metric + b * batch_stride + i * row_stride
    square = tl.zeros((ROWS,), tl.float32)
    for start in range(0, WIDTH, STEP):
        c = start + tl.arange(0, STEP)
        value = tl.load(row[:, None] + c[None, :], mask=there[:, None] & (c < WIDTH)[None, :], other=0.0).to(tl.float32)
        square += tl.sum(value * value, 1)
    one_by = tl.div_rn(1.0, tl.maximum(tl.sqrt_rn(square), 1e-12))
    tl.store(inverse + b * tokens + i, tl.where(square < float("inf"), one_by, 0.0), mask=there)
    tl.store(energy + b * (tokens - protected) + i, tl.zeros((ROWS,), tl.int64), mask=i < tokens - protected)
    tl.store(least + b * tokens + i, i, mask=there)


@triton.jit
def cosines(
    metric, inverse, i, j, row_stride,
    WIDTH: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Cosines (rows of i, rows of j) of tokens ``i`` and ``j`` of one picture; 0 to a row that is no number."""
    dot = tl.zeros((i.shape[0], j.shape[0]), tl.float32)
    for start in range(0, WIDTH, STEP):
        c = start + tl.arange(0, STEP)
        if WIDTH % STEP == 0:
            left = tl.load(metric + i[:, None] * row_stride + c[None, :])
            right = tl.load(metric + j[:, None] * row_stride + c[None, :])
        else:
            inside = (c < WIDTH)[None, :]
            left = tl.load(metric + i[:, None] * row_stride + c[None, :], mask=inside, other=0.0)
            right = tl.load(metric + j[:, None] * row_stride + c[None, :], mask=inside, other=0.0)
        if INTERPRETED:
            left, right = left.to(tl.float32), right.to(tl.float32)
        dot = tl.dot(left, tl.trans(right), dot, input_precision=PRECISION)
    scale = tl.load(inverse + i)[:, None] * tl.load(inverse + j)[None, :]
    return tl.where(scale > 0.0, dot * scale, 0.0)


@triton.jit(do_not_specialize=["tokens", "protected", "margin", "alpha", "scale"])
def add_energies(
    metric, inverse, energy, batch_stride, row_stride, tokens, protected, margin, alpha, scale,
    WIDTH: tl.constexpr, STEP: tl.constexpr, SIDE: tl.constexpr, ELU: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add f of the similarities of two tiles of tokens to the energies of both, as integers: ``scale`` is 1.

    Similarity is symmetric: tile i meets the tiles behind it up to half way round, and each pair of tiles meets once.
    """
    tiles, turn, b = tl.num_programs(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    first = tl.program_id(0)
    second = (first + turn) % tiles
    if (2 * turn == tiles) & (first >= turn):
        return
    n = tokens - protected
    i = first * SIDE + tl.arange(0, SIDE)
    j = second * SIDE + tl.arange(0, SIDE)
    c = cosines(
        metric + b * batch_stride, inverse + b * tokens,
        protected + tl.minimum(i, n - 1), protected + tl.minimum(j, n - 1), row_stride, WIDTH, STEP, PRECISION,
    )  # fmt: skip
    c = tl.where(i[:, None] == j[None, :], tl.floor(c + 0.5), c)  # to itself exactly 1, or 0
    value = tl.where(c > margin - ROUNDING, c, 0.0)
    if ELU:
        value = tl.maximum(c - margin, 0.0)
    value += alpha * (tl.exp(tl.minimum(c, margin) - margin) - 1.0)
    whole = tl.where((i < n)[:, None] & (j < n)[None, :], (value * scale).to(tl.int64), 0)
    tl.atomic_add(energy + b * n + i, tl.sum(whole, 1), mask=i < n, sem="relaxed")
    if turn > 0:
        tl.atomic_add(energy + b * n + j, tl.sum(whole, 0), mask=j < n, sem="relaxed")


@triton.jit(do_not_specialize=["n"])
def rank(energy, order, n, ROWS: tl.constexpr, ALL: tl.constexpr):
    """Write tokens by energy, highest first, the first of equals first: a token's rank is how many are ahead of it."""
    b = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    j = tl.arange(0, ALL)
    own = tl.load(energy + b * n + i, mask=i < n, other=0)
    other = tl.load(energy + b * n + j, mask=j < n, other=NOTHING)
    ahead = (other[None, :] > own[:, None]) | ((other[None, :] == own[:, None]) & (j[None, :] < i[:, None]))
    tl.store(order + b * n + tl.sum(ahead.to(tl.int32), 1), i, mask=i < n)


@triton.jit(do_not_specialize=["tokens", "protected", "shift_a", "shift_b", "sources", "targets", "share"])
def match(
    metric, inverse, order, top, best, batch_stride, row_stride, tokens, protected, shift_a, shift_b, sources, targets,
    share,
    WIDTH: tl.constexpr, STEP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ORDERED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The most similar token of B, the first of equals, for tokens of A; among one ``share`` of the columns."""
    part, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    order += b * (tokens - protected)
    p = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    i = token(order, 2 * tl.minimum(p, sources - 1), shift_a, ORDERED)
    high = tl.full((ROWS,), float("-inf"), tl.float32)
    found = tl.zeros((ROWS,), tl.int32)
    for start in range(part * share, tl.minimum(part * share + share, targets), COLUMNS):
        q = start + tl.arange(0, COLUMNS)
        j = token(order, 2 * tl.minimum(q, targets - 1) + 1, shift_b, ORDERED)
        c = cosines(metric + b * batch_stride, inverse + b * tokens, i, j, row_stride, WIDTH, STEP, PRECISION)
        c = tl.where((q < targets)[None, :], c, float("-inf"))
        highest = tl.max(c, 1)
        foremost = tl.min(tl.where(c == highest[:, None], q[None, :], targets), 1)
        found = tl.where(highest > high, foremost, found)
        high = tl.maximum(highest, high)
    at = (part * tl.num_programs(2) + b) * sources + p
    tl.store(top + at, high, mask=p < sources)
    tl.store(best + at, found, mask=p < sources)


@triton.jit(do_not_specialize=["tokens", "protected", "shift_a", "shift_b", "sources", "r", "parts"])
def place(
    top, best, order, least, group, leads_then_rest, member, slot, tokens, protected, shift_a, shift_b,
    sources, r, parts,
    ALL: tl.constexpr, HALF: tl.constexpr, CHUNK: tl.constexpr, ORDERED: tl.constexpr, SELECT: tl.constexpr,
):  # fmt: skip
    """Number the groups of one picture in reading order; with SELECT only the ``r`` most similar sources go.

    ``least`` begins with every token's own index, and ends with that of the first token of its group.
    """
    batch, b = tl.num_programs(0), tl.program_id(0).to(tl.int64)
    order += b * (tokens - protected)
    least += b * tokens
    group += b * tokens
    p = tl.arange(0, HALF)
    goes = p < sources
    high = tl.load(top + b * sources + p, mask=goes, other=float("-inf"))
    q = tl.load(best + b * sources + p, mask=goes, other=0)
    for part in range(1, parts):
        at = (part * batch + b) * sources + p
        higher = tl.load(top + at, mask=goes, other=float("-inf"))
        q = tl.where(higher > high, tl.load(best + at, mask=goes, other=0), q)
        high = tl.maximum(higher, high)
    if SELECT:
        tl.store(top + b * sources + p, high, mask=goes)
        tl.debug_barrier()
        ahead = tl.zeros((HALF,), tl.int32)
        for start in range(0, sources, CHUNK):
            j = start + tl.arange(0, CHUNK)
            other = tl.load(top + b * sources + j, mask=j < sources, other=float("-inf"))
            before = (other[None, :] > high[:, None]) | ((other[None, :] == high[:, None]) & (j[None, :] < p[:, None]))
            ahead += tl.sum((before & (j < sources)[None, :]).to(tl.int32), 1)
        goes = goes & (ahead < r)
    i = token(order, tl.where(goes, 2 * p, 0), shift_a, ORDERED)
    j = token(order, tl.where(goes, 2 * q + 1, 0), shift_b, ORDERED)
    tl.atomic_min(least + j, i, mask=goes, sem="relaxed")
    tl.debug_barrier()
    root = tl.load(least + j, mask=goes, other=0, cache_modifier=".cg")
    tl.store(least + i, root, mask=goes)  # what others read there is of B
    tl.debug_barrier()

    k = tl.arange(0, ALL)
    there = k < tokens
    root = tl.load(least + k, mask=there, other=-1, cache_modifier=".cg")
    leads, follows = there & (root == k), there & (root != k)
    ahead = tl.cumsum(leads.to(tl.int32), 0)  # groups that begin up to here
    tl.store(group + k, (ahead - 1).to(tl.int64), mask=leads)
    tl.store(leads_then_rest + b * tokens + ahead - 1, k.to(tl.int64), mask=leads)
    tl.debug_barrier()
    number = tl.load(group + root, mask=follows, other=0, cache_modifier=".cg")
    at = k - ahead  # how many others do not begin a group
    tl.store(group + k, number, mask=follows)
    tl.store(leads_then_rest + b * tokens + tokens - r + at, k.to(tl.int64), mask=follows)
    tl.store(member + b * r + at, k, mask=follows)
    tl.store(slot + b * r + at, number.to(tl.int32), mask=follows)


@triton.jit(do_not_specialize=["tokens", "rest"])
def combine(
    x, size, y, total, logs, lead, member, slot, x_batch_stride, x_row_stride, lead_stride, tokens, rest,
    WIDTH: tl.constexpr, STEP: tl.constexpr, REST: tl.constexpr, SIZED: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """The mean of one group, WEIGHTED by size: its first token and a share of the others' distance.

    In the order, and with the rounding, of `Merge.reduce`. Beside it the sum of the sizes, and its logarithm in rows as
    `log_sizes` makes them.
    """
    k, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    c = tl.program_id(2) * STEP + tl.arange(0, STEP)
    x += b * x_batch_stride
    size += b * tokens
    s = tl.arange(0, REST)
    mine = tl.load(slot + b * rest + s, mask=s < rest, other=-1) == k
    who = tl.load(member + b * rest + s, mask=s < rest, other=0)  # ascending
    first = tl.load(lead + b * lead_stride + k)
    start = tl.load(x + first * x_row_stride + c, mask=c < WIDTH, other=0.0).to(tl.float32)
    count = tl.sum(mine.to(tl.int32), 0)
    whole = 1.0 + count.to(tl.float32)
    sizes = whole
    if SIZED:
        sizes = tl.load(size + first) + tl.sum(tl.load(size + who, mask=mine, other=0.0), 0)
    if WEIGHTED:
        whole = sizes
    mean = start
    last = -1
    for _ in range(count):
        last = tl.min(tl.where(mine & (who > last), who, tokens), 0)
        weight = 1.0
        if SIZED and WEIGHTED:
            weight = tl.load(size + last)
        value = tl.load(x + last * x_row_stride + c, mask=c < WIDTH, other=0.0).to(tl.float32)
        mean += (value - start) * tl.div_rn(weight, whole)
    groups = tl.num_programs(0)
    at = b * groups + k
    tl.store(y + at * WIDTH + c, mean.to(y.dtype.element_ty), mask=c < WIDTH)
    if tl.program_id(2) == 0:
        tl.store(total + at, sizes)
        row, beyond = (groups + 7) // 8 * 8, groups + tl.arange(0, 8)  # `whole_vectors`
        logs += b * row
        tl.store(logs + k, tl.log(sizes).to(logs.dtype.element_ty))
        if k == 0:
            tl.store(logs + beyond, 0.0, mask=beyond < row)
