"""The statistics of the advantages in the launch that computes them, by one pass: count, and sums of the differences
from a pivot, one of the numbers, and of their squares.

About a pivot nothing cancels that matters, and sums move to another pivot by a few products. A program moves the sums
of its threads to one of its numbers, stores them in the workspace and takes a ticket, which counts all samples too. The
last program moves all sums to the first one's pivot and adds them up in a fixed order, so that runs are bit-equal. No
program waits for another.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sums_of(x, sampled):
    """(count, pivot, sum, sum of squares) over the tensors of the tuple ``x`` where ``sampled``, for each element. The
    pivot is finite if no sample is, as ``x`` is 0 where not ``sampled``."""
    count = sampled[0].to(tl.int32)
    pivot = x[0]
    for i in tl.static_range(1, len(x)):
        count += sampled[i].to(tl.int32)
        pivot = tl.where(sampled[i], x[i], pivot)
    total = tl.where(sampled[0], x[0] - pivot, 0.0)
    squares = total * total
    for i in tl.static_range(1, len(x)):
        difference = tl.where(sampled[i], x[i] - pivot, 0.0)
        total += difference
        squares += difference * difference
    return count, pivot, total, squares


@triton.jit
def moved(count, pivot, total, squares, new_pivot):
    """The sum and the sum of squares about ``new_pivot``."""
    offset = pivot.to(tl.float64) - new_pivot.to(tl.float64)
    new_total = total.to(tl.float64) + count.to(tl.float64) * offset
    return new_total, squares.to(tl.float64) + offset * (total.to(tl.float64) + new_total)


@triton.jit
def no_sums(shape, dtype: tl.constexpr):
    return (
        tl.zeros(shape, tl.int32), tl.zeros(shape, dtype), tl.zeros(shape, tl.float64), tl.zeros(shape, tl.float64)
    )  # fmt: skip


@triton.jit
def add_up(sums, count, pivot, total, squares):
    """Adds what ``sums_of`` returned to ``sums``, of the same kind with float64 sums."""
    kept = tl.where(sums[0] > 0, sums[1], pivot)
    total, squares = moved(count, pivot, total, squares, kept)
    return sums[0] + count, kept, sums[2] + total, sums[3] + squares


@triton.jit
def add2(a, b, other_a, other_b):
    return a + other_a, b + other_b


@triton.jit
def publish(count, pivot, total, squares, workspace, WARPS: tl.constexpr, PIVOT: tl.constexpr):
    """Stores the program's sums about thread PIVOT's pivot and takes a ticket: element 0 of the result, which
    only its thread has, since waiting for it is left to ``merge_if_last``. Low half: how many were taken before; high
    half: all samples so far."""
    thread = tl.arange(0, 32 * WARPS)
    count, pivot = tl.reshape(count, [32 * WARPS]), tl.reshape(pivot, [32 * WARPS])
    new_pivot = pivot.to(tl.float32)
    chosen = (thread == PIVOT) & (tl.abs(new_pivot) < float("inf"))
    # As integers, which a single instruction adds up across the lanes of a warp.
    bits = tl.sum(tl.where(chosen, new_pivot.to(tl.int32, bitcast=True), 0))
    new_pivot = bits.to(tl.float32, bitcast=True)
    total, squares = moved(count, pivot, tl.reshape(total, [32 * WARPS]), tl.reshape(squares, [32 * WARPS]), new_pivot)
    # Across the lanes of a warp. They swap halves first, so that even ones add up one sum and odd ones the other: half
    # as many shuffles.
    lane = tl.arange(0, 32)[None, :] + tl.zeros([WARPS, 1], tl.int32)
    total, squares = tl.reshape(total, [WARPS, 32]), tl.reshape(squares, [WARPS, 32])
    odd = lane % 2 == 1
    pair = tl.where(odd, squares, total) + tl.gather(tl.where(odd, total, squares), lane ^ 1, 1)
    pair = tl.sum(tl.reshape(pair, [WARPS, 16, 2]), 1)
    count = tl.sum(tl.reshape(count, [WARPS, 32]), 1)
    # Across warps, all by one exchange through shared memory.
    count, pair = tl.reduce((count[:, None] + tl.zeros([WARPS, 2], tl.int32), pair), 0, add2)
    which = tl.arange(0, 2)
    samples = tl.sum(tl.where(which == 0, count, 0))
    programs = tl.num_programs(0)
    tl.store(workspace + 1 + tl.program_id(0) + programs * which, pair)
    place = (workspace + 1 + 2 * programs + tl.program_id(0)).to(tl.pointer_type(tl.int32), bitcast=True)
    tl.store(place + which, tl.where(which == 0, samples, bits))
    tl.debug_barrier()
    samples = samples.to(tl.int64) << 32
    tickets = workspace.to(tl.pointer_type(tl.int64), bitcast=True) + tl.zeros([32 * WARPS], tl.int32)
    return tl.atomic_add(tickets, samples + 1, mask=thread == 0, sem="acq_rel", scope="gpu") + samples


@triton.jit
def merge_if_last(tickets, workspace, stats, WARPS: tl.constexpr, PARTIALS: tl.constexpr):
    """The program that took the last ticket writes (count, mean, M2) of all programs' sums to ``stats``."""
    programs = tl.num_programs(0)
    own = tl.arange(0, 32 * WARPS) == 0
    if tl.sum(tl.where(own, tickets.to(tl.int32), 0)) == programs - 1:
        samples = tl.sum(tl.where(own, (tickets >> 32).to(tl.int32), 0)).to(tl.float64)
        # All loads pass by the first-level cache (.cg), which may hold what was there before.
        place = workspace + 1
        counts = (place + 2 * programs).to(tl.pointer_type(tl.int32), bitcast=True)
        pivots = counts.to(tl.pointer_type(tl.float32), bitcast=True) + 1
        about = tl.load(pivots, cache_modifier=".cg")
        sums = tl.zeros([2], tl.float64)
        first = 0
        while first < programs:  # not a range: with numpy 2.5, Triton 3.6's interpreter rejects a tensor as its bound
            i = first + tl.arange(0, PARTIALS)
            count = tl.load(counts + 2 * i, mask=i < programs, other=0, cache_modifier=".cg")
            pivot = tl.load(pivots + 2 * i, mask=i < programs, other=0.0, cache_modifier=".cg")
            total = tl.load(place + i, mask=i < programs, other=0.0, cache_modifier=".cg")
            squares = tl.load(place + programs + i, mask=i < programs, other=0.0, cache_modifier=".cg")
            total, squares = moved(count, pivot, total, squares, about)
            sums += tl.sum(tl.join(total, squares), 0)
            first += PARTIALS
        which = tl.arange(0, 2)
        total = tl.sum(tl.where(which == 0, sums, 0.0))
        offset = total / tl.where(samples > 0, samples, 1.0)
        m2 = tl.sum(tl.where(which == 1, sums, 0.0)) - total * offset
        tl.store(stats, samples)
        tl.store(stats + 1, about.to(tl.float64) + offset)
        tl.store(stats + 2, tl.where(m2 < 0, 0.0, m2))
        tl.store(workspace, 0.0)  # the ticket
