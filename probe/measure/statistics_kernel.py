"""The Triton kernel that reduces a tensor to its five statistics columns in one launch, reading every element once.

Importing this file needs Triton.
"""

from __future__ import annotations

import triton
import triton.language as tl

BLOCK = 1024
"""Elements that one load of a program fetches: 128 threads, 16 bytes each or a multiple of it."""
TILE = 4 * BLOCK
"""Elements that a program fetches before it computes: enough bytes on their way to hide the memory's latency."""
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}
"""How the kernel is compiled: a product and a sum may be one instruction."""
SLOTS = 256
"""Programs whose results are added up at a time; more would cost the whole kernel registers."""

_BLOCK = tl.constexpr(BLOCK)
_TILE = tl.constexpr(TILE)
_SLOTS = tl.constexpr(SLOTS)
_INF = tl.constexpr(float("inf"))
_TINY_SQUARE = tl.constexpr(1e-30)
_TINY = tl.constexpr(1e-12)


@triton.jit(do_not_specialize=["n", "sums_ptr", "maxima_ptr"])
def reduce_columns(x_ptr, n, partial_ptr, counter_ptr, out_ptr, sums_ptr, maxima_ptr, ADD: tl.constexpr):
    """Write sum, sum of squares, number of non-finite values, maximum and negated minimum of ``n`` elements.

    A program adds up differences to the mean of its first block in float32, one chain of at most some 128 values a lane, then turns them
    into plain sums in float64: large means cost nothing and a card that is slow at float64 hardly computes in it. Where the squares leave
    float32, or a value is not finite, the program reads its elements again and works in float64. The program that is done last adds up
    what all of them left, in a fixed order: the result depends on nothing but the number of programs.

    Args:
        x_ptr: float32, float16 or bfloat16, (n,).
        n: Number of elements, at least 1.
        partial_ptr: float64, (5, programs), written.
        counter_ptr: int32, 0: how many programs are done. It is 0 again at the end.
        out_ptr: float64, (5,), written.
        sums_ptr: With ``ADD`` float64, (3,), which the first columns are added to.
        maxima_ptr: With ``ADD`` float64, (2,), which the last columns raise.
        ADD: Whether to.
    """
    pid = tl.program_id(0)
    programs = tl.num_programs(0)
    count, pivot, s, q, high, low = _sweep(x_ptr, n, pid, programs)
    k = count.to(tl.float64)
    p = pivot.to(tl.float64)
    total = s + k * p
    square = q + 2.0 * p * s + k * p * p
    bad = k * 0.0
    largest = tl.maximum(high, -low)
    sound = (q < _INF) & ((q >= k * _TINY_SQUARE) | (largest == 0.0) | (largest >= _TINY))
    if sound == 0:  # of NaN, every comparison is false
        total, square, bad = _again(x_ptr, n, pid, programs)
    tl.store(partial_ptr + pid, total)
    tl.store(partial_ptr + programs + pid, square)
    tl.store(partial_ptr + 2 * programs + pid, bad)
    tl.store(partial_ptr + 3 * programs + pid, high.to(tl.float64))
    tl.store(partial_ptr + 4 * programs + pid, -low.to(tl.float64))
    tl.debug_barrier()  # what all threads of this program stored is stored before one of them says so
    if tl.atomic_add(counter_ptr, 1, sem="acq_rel") == programs - 1:
        _finish(partial_ptr, programs, counter_ptr, out_ptr, sums_ptr, maxima_ptr, ADD)


@triton.jit
def _sweep(x_ptr, n, pid, programs):
    """Read one program's elements: every ``programs``-th tile, and what is left beyond the last whole one.

    Returns their number, a value near their mean (float32), the sum and the sum of squares of their differences to it (float64, added
    up in float32), and the largest and smallest (float32).
    """
    lane = tl.arange(0, _BLOCK)
    full = n // _TILE
    begin = pid.to(tl.int64) * _TILE
    start = x_ptr + begin + lane
    here = tl.minimum(n - begin, _BLOCK).to(tl.int32)
    first = tl.load(start, mask=lane < here, other=0.0).to(tl.float32)
    pivot = tl.sum(first / here.to(tl.float32), axis=0)
    sums = tl.zeros([_BLOCK], tl.float32)
    squares = tl.zeros([_BLOCK], tl.float32)
    highs = tl.full([_BLOCK], -_INF, tl.float32)
    lows = tl.full([_BLOCK], _INF, tl.float32)
    for _ in range(pid, full, programs):
        a = tl.load(start).to(tl.float32)
        b = tl.load(start + _BLOCK).to(tl.float32)
        c = tl.load(start + 2 * _BLOCK).to(tl.float32)
        d = tl.load(start + 3 * _BLOCK).to(tl.float32)
        highs = tl.maximum(highs, tl.maximum(tl.maximum(a, b), tl.maximum(c, d)))
        lows = tl.minimum(lows, tl.minimum(tl.minimum(a, b), tl.minimum(c, d)))
        a, b, c, d = a - pivot, b - pivot, c - pivot, d - pivot
        sums += (a + b) + (c + d)
        squares += (a * a + b * b) + (c * c + d * d)
        start += programs.to(tl.int64) * _TILE
    count = tl.maximum((full - pid + programs - 1) // programs, 0).to(tl.int64) * _TILE
    if pid == full % programs:
        count += n - full * _TILE
        for part in tl.static_range(4):
            place = full.to(tl.int64) * _TILE + part * _BLOCK + lane
            a = tl.load(x_ptr + place, mask=place < n, other=0.0).to(tl.float32)
            highs = tl.maximum(highs, tl.where(place < n, a, -_INF))
            lows = tl.minimum(lows, tl.where(place < n, a, _INF))
            a = tl.where(place < n, a - pivot, 0.0)
            sums += a
            squares += a * a
    s = tl.sum(sums, axis=0).to(tl.float64)
    q = tl.sum(squares, axis=0).to(tl.float64)
    return count, pivot, s, q, tl.max(highs, axis=0), tl.min(lows, axis=0)


@triton.jit
def _again(x_ptr, n, pid, programs):
    """Return sum, sum of squares and number of non-finite values of one program's elements, in float64 throughout."""
    place = pid.to(tl.int64) * _TILE + tl.arange(0, _BLOCK)
    stride = programs.to(tl.int64) * _TILE
    sums = tl.zeros([_BLOCK], tl.float64)
    squares = tl.zeros([_BLOCK], tl.float64)
    bad = tl.zeros([_BLOCK], tl.int32)
    for _ in range(pid, n // _TILE + 1, programs):
        for part in range(0, _TILE, _BLOCK):
            values = tl.load(x_ptr + place + part, mask=place + part < n, other=0.0).to(tl.float64)
            finite = tl.abs(values) < _INF
            bad += tl.where(finite, 0, 1)
            values = tl.where(finite, values, 0.0)
            sums += values
            squares += values * values
        place += stride
    return tl.sum(sums, axis=0), tl.sum(squares, axis=0), tl.sum(bad, axis=0).to(tl.float64)


@triton.jit
def _finish(partial_ptr, programs, counter_ptr, out_ptr, sums_ptr, maxima_ptr, ADD: tl.constexpr):
    """Add up what all programs left, and make the counter ready for the next launch."""
    slot = tl.arange(0, _SLOTS)
    sums = tl.zeros([_SLOTS], tl.float64)
    squares = tl.zeros([_SLOTS], tl.float64)
    bad = tl.zeros([_SLOTS], tl.float64)
    highs = tl.full([_SLOTS], -_INF, tl.float64)
    lows = tl.full([_SLOTS], -_INF, tl.float64)
    for start in range(0, programs, _SLOTS):
        column = partial_ptr + start + slot
        there = start + slot < programs
        # Past the first-level cache, which does not see what other processors wrote.
        sums += tl.load(column, mask=there, other=0.0, cache_modifier=".cg")
        squares += tl.load(column + programs, mask=there, other=0.0, cache_modifier=".cg")
        bad += tl.load(column + 2 * programs, mask=there, other=0.0, cache_modifier=".cg")
        highs = tl.maximum(highs, tl.load(column + 3 * programs, mask=there, other=-_INF, cache_modifier=".cg"))
        lows = tl.maximum(lows, tl.load(column + 4 * programs, mask=there, other=-_INF, cache_modifier=".cg"))
    total = tl.sum(sums, axis=0)
    square = tl.sum(squares, axis=0)
    wrong = tl.sum(bad, axis=0)
    high = tl.max(highs, axis=0)
    low = tl.max(lows, axis=0)
    tl.store(out_ptr, total)
    tl.store(out_ptr + 1, square)
    tl.store(out_ptr + 2, wrong)
    tl.store(out_ptr + 3, high)
    tl.store(out_ptr + 4, low)
    if ADD:
        tl.store(sums_ptr, tl.load(sums_ptr) + total)
        tl.store(sums_ptr + 1, tl.load(sums_ptr + 1) + square)
        tl.store(sums_ptr + 2, tl.load(sums_ptr + 2) + wrong)
        tl.store(maxima_ptr, tl.maximum(tl.load(maxima_ptr), high))
        tl.store(maxima_ptr + 1, tl.maximum(tl.load(maxima_ptr + 1), low))
    tl.store(counter_ptr, 0)
