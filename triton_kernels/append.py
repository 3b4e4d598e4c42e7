"""Stores one step of all environments in the ring, in one launch: packed rows, planes, codes, and the pool of final
observations.

A program takes a block of environments. It loads all narrow fields and scalars before the first store: the compiler
does not move loads above stores that might alias, so each field would otherwise pay the memory latency in turn.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from pydrone.ops.schema import DTYPES

from .launch import (
    CURSOR_APPENDED,
    CURSOR_DISCARDED,
    CURSOR_FLAG,
    CURSOR_NUM_STEPS,
    CURSOR_TICKET,
    TRITON_TYPES,
    TRUNCATED,
    encode,
    power_of_2,
    take_ticket,
)
from .prepared import Launches, contents

# Most environments per program; warps; most elements per tile; fields up to NARROW wide are all loaded before any is
# stored.
ENVS, WARPS, MAX_TILE, NARROW = 16, 4, 2048, 64

# LENGTH constants describe a field, and one flat tuple all fields (kernels take no nested ones): byte offset, stored
# type, width, tile width, stride over environments, then three inner (size, stride) pairs, the last dimension first.
OFFSET, KIND, WIDTH, TILE, STRIDE, DIMS, LENGTH = (tl.constexpr(i) for i in (0, 1, 2, 3, 4, 5, 11))


@triton.jit
def load_field(source, env, mask, first, FIELDS: tl.constexpr, AT: tl.constexpr):
    column = first + tl.arange(0, FIELDS[AT + TILE])[None, :]
    mask = mask[:, None] & (column < FIELDS[AT + WIDTH])
    offset = env[:, None] * FIELDS[AT + STRIDE]
    for j in tl.static_range(DIMS, LENGTH, 2):
        if FIELDS[AT + j] > 1:
            offset += (column % FIELDS[AT + j]).to(tl.int64) * FIELDS[AT + j + 1]
            column = column // FIELDS[AT + j]
    return tl.load(source + offset, mask=mask, other=0)


@triton.jit
def store_field(rows, row, mask, first, x, not_finite, ROW_BYTES: tl.constexpr, FIELDS: tl.constexpr, AT: tl.constexpr):
    """Stores a tile of the field described at AT in rows ``row``; sets ``not_finite`` if a number is not finite."""
    column = first + tl.arange(0, FIELDS[AT + TILE])[None, :]
    mask = mask[:, None] & (column < FIELDS[AT + WIDTH])
    kind: tl.constexpr = FIELDS[AT + KIND]
    if kind == tl.int1:
        item: tl.constexpr = 1
        elements = rows.to(tl.pointer_type(tl.int8), bitcast=True)
        x = (x != 0).to(tl.int8)
    else:
        item: tl.constexpr = kind.primitive_bitwidth // 8
        elements = rows.to(tl.pointer_type(kind), bitcast=True)
        if (x.dtype == tl.float64) and (item == 2):
            x = x.to(tl.float32)  # as torch does
        x = x.to(kind)
    tl.store(elements + row[:, None] * (ROW_BYTES // item) + FIELDS[AT + OFFSET] // item + column, x, mask=mask)
    if not_finite is not None:  # noqa: SIM102, both known when the kernel is compiled
        if kind.is_floating():
            # From the bits, as the compiler may fold x - x to 0. The store hardly ever happens.
            if item == 8:
                bad = (x.to(tl.int64, bitcast=True) & 0x7FF0000000000000) == 0x7FF0000000000000
            elif item == 4:
                bad = (x.to(tl.int32, bitcast=True) & 0x7F800000) == 0x7F800000
            elif kind == tl.float16:
                bad = (x.to(tl.int16, bitcast=True) & 0x7C00) == 0x7C00
            else:
                bad = (x.to(tl.int16, bitcast=True) & 0x7F80) == 0x7F80
            tl.store(not_finite + tl.zeros(x.shape, tl.int32), tl.full(x.shape, 1, tl.int32), mask=mask & bad)


@triton.jit
def copy_fields(
    rows, row, sources, env, mask, not_finite, ROW_BYTES: tl.constexpr, FIELDS: tl.constexpr, LOOKED_AT: tl.constexpr,
    NARROW: tl.constexpr,
):  # fmt: skip
    held = ()
    for i in tl.static_range(len(FIELDS) // LENGTH):
        if FIELDS[i * LENGTH + WIDTH] <= min(FIELDS[i * LENGTH + TILE], NARROW):
            held = held + (load_field(sources[i], env, mask, 0, FIELDS, i * LENGTH),)
        else:
            held = held + (0,)
    for i in tl.static_range(len(FIELDS) // LENGTH):
        if FIELDS[i * LENGTH + WIDTH] <= min(FIELDS[i * LENGTH + TILE], NARROW):
            store_field(
                rows, row, mask, 0, held[i], not_finite if i < LOOKED_AT else None, ROW_BYTES, FIELDS, i * LENGTH
            )
        else:
            for first in range(0, FIELDS[i * LENGTH + WIDTH], FIELDS[i * LENGTH + TILE]):
                x = load_field(sources[i], env, mask, first, FIELDS, i * LENGTH)
                store_field(
                    rows, row, mask, first, x, not_finite if i < LOOKED_AT else None, ROW_BYTES, FIELDS, i * LENGTH
                )


@triton.jit
def store_step(
    rows, sources, planes, plane_sources, codes, flags, pool, final_sources, pool_count, final_rows, not_finite,
    strides, env, exists, num_envs, slot, pool_slot, pool_rows, ROW_BYTES: tl.constexpr, FIELDS: tl.constexpr,
    LOOKED_AT: tl.constexpr, POOL_ROW_BYTES: tl.constexpr, FINAL_FIELDS: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    # All flags and scalars are loaded before the fields are stored.
    if codes is not None:
        done = tl.load(flags[0] + env * strides[0][0], mask=exists, other=0) != 0
        truncated = None
        if flags[1] is not None:
            truncated = tl.load(flags[1] + env * strides[0][1], mask=exists, other=0) != 0
        valid = None
        if flags[2] is not None:
            valid = tl.load(flags[2] + env * strides[0][2], mask=exists, other=0) != 0
        code = encode(done, truncated, valid)
    held = ()
    for i in tl.static_range(len(planes)):
        held = held + (tl.load(plane_sources[i] + env * strides[2][i], mask=exists, other=0),)

    if len(FIELDS) > 0:
        looked = None
        if not_finite is not None:
            looked = not_finite + pool_slot
        row = slot.to(tl.int64) * num_envs + env
        copy_fields(rows, row, sources, env, exists, looked, ROW_BYTES, FIELDS, LOOKED_AT, NARROW)
    for i in tl.static_range(len(planes)):
        plane = planes[i] + env * strides[1][i][0] + slot.to(tl.int64) * strides[1][i][1]
        tl.store(plane, held[i].to(planes[i].dtype.element_ty), mask=exists)
    if codes is not None:
        tl.store(codes + env * strides[3][0] + slot.to(tl.int64) * strides[3][1], code.to(tl.uint8), mask=exists)
        if (pool_count is not None) and (flags[1] is not None):
            wanted = exists & (code == TRUNCATED)
            number = tl.sum(wanted.to(tl.int32))
            final_row = final_rows + env * strides[4][0] + slot.to(tl.int64) * strides[4][1]
            count = pool_count + pool_slot.to(tl.int64) * strides[5][0]
            if len(FINAL_FIELDS) > 0:
                # Places in the pool: one atomic per program that has a truncation, which few do.
                place = tl.atomic_add(count, number, mask=number > 0, sem="relaxed")
                place = place + tl.cumsum(wanted.to(tl.int32)) - 1
                fits = wanted & (place >= 0) & (place < pool_rows)
                tl.store(final_row, tl.where(fits, place, -1), mask=wanted)
                if number > 0:
                    row = pool_slot.to(tl.int64) * pool_rows + place
                    copy_fields(pool, row, final_sources, env, fits, None, POOL_ROW_BYTES, FINAL_FIELDS, 0, NARROW)
            else:
                tl.atomic_add(count + strides[5][1], number, mask=number > 0, sem="relaxed")
                tl.store(final_row, tl.full(env.shape, -1, tl.int32), mask=wanted)


@triton.jit
def place(cursor, position, capacity, num_pools):
    """Slot and rollout of the step at ``position``, counted from the first ever appended."""
    num_steps = tl.maximum(tl.load(cursor + CURSOR_NUM_STEPS), 1)
    position = position.to(tl.uint64)
    pool_slot = (position // num_steps.to(tl.uint64) % num_pools.to(tl.uint64)).to(tl.int32)
    return (position % capacity.to(tl.uint64)).to(tl.int32), pool_slot


@triton.jit(do_not_specialize=["num_envs", "capacity", "slot", "pool_slot", "num_pools", "pool_rows"])
def append_kernel(
    rows, sources, planes, plane_sources, codes, flags, pool, final_sources, pool_count, final_rows, not_finite, cursor,
    strides, num_envs, capacity, slot, pool_slot, num_pools, pool_rows, ROW_BYTES: tl.constexpr, FIELDS: tl.constexpr,
    LOOKED_AT: tl.constexpr, POOL_ROW_BYTES: tl.constexpr, FINAL_FIELDS: tl.constexpr, COMMIT: tl.constexpr,
    ENVS: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    """``flags``: dones, truncated, valid. ``strides``: those of flags, planes, plane sources, codes, final_rows and
    pool_count."""
    env = (tl.program_id(0) * ENVS + tl.arange(0, ENVS)).to(tl.int64)
    exists = env < num_envs
    if cursor is None:
        store_step(
            rows, sources, planes, plane_sources, codes, flags, pool, final_sources, pool_count, final_rows, not_finite,
            strides, env, exists, num_envs, slot, pool_slot, pool_rows, ROW_BYTES, FIELDS, LOOKED_AT, POOL_ROW_BYTES,
            FINAL_FIELDS, NARROW,
        )  # fmt: skip
    else:
        appended = tl.load(cursor + CURSOR_APPENDED)
        if appended - tl.load(cursor + CURSOR_DISCARDED) < capacity:
            slot, pool_slot = place(cursor, appended, capacity, num_pools)
            store_step(
                rows, sources, planes, plane_sources, codes, flags, pool, final_sources, pool_count, final_rows,
                not_finite, strides, env, exists, num_envs, slot, pool_slot, pool_rows, ROW_BYTES, FIELDS, LOOKED_AT,
                POOL_ROW_BYTES, FINAL_FIELDS, NARROW,
            )  # fmt: skip
            if COMMIT:  # noqa: SIM102, known when the kernel is compiled
                # The last program moves the head; all others have read it by then.
                if take_ticket(cursor + CURSOR_TICKET) == tl.num_programs(0) - 1:
                    tl.store(cursor + CURSOR_APPENDED, appended + 1)
                    tl.store(cursor + CURSOR_TICKET, 0)
        else:
            tl.store(cursor + CURSOR_FLAG, 1)


LAUNCHES = Launches(append_kernel)


def append(memory, sources, layout, dones, truncated, valid, slot, pool_slot, cursor, commit, checked=None) -> None:
    """Stores one step of all environments, see :mod:`pydrone.ops.schema`. ``checked``: as :class:`Launches`."""
    num_memory, num_flags = len(memory), len(memory) + len(sources)
    if memory[0].shape[1] == 0:
        return

    def arrange(tensors, numbers):
        memory, sources = tensors[:num_memory], tensors[num_memory:num_flags]
        dones, truncated, valid, cursor = tensors[num_flags:]
        capacity, num_envs, _ = memory[0].shape
        described = layout.tolist()
        envs = power_of_2(MAX_TILE // max([1, *(width for _, _, width, _ in described[1:])]), 1, ENVS)
        step = taken_apart(memory, sources, described, dones, truncated, valid, MAX_TILE // envs)
        arguments = (
            *step.tensors, cursor, step.strides, num_envs, capacity, *numbers, step.num_rollouts, step.pool_rows,
        )  # fmt: skip
        constants = {"COMMIT": commit, "ENVS": envs, "NARROW": NARROW, "num_warps": WARPS, "enable_fp_fusion": True}
        return (triton.cdiv(num_envs, envs),), arguments, step.constants | constants

    tensors = (*memory, *sources, dones, truncated, valid, cursor)
    key = contents(layout), num_memory, num_flags, commit
    LAUNCHES(key, tensors, (slot, pool_slot), arrange, checked)


class TakenApart(NamedTuple):
    """append's arguments as :func:`store_step` takes them."""

    tensors: tuple  # rows to not_finite
    strides: tuple
    num_rollouts: int
    pool_rows: int
    constants: dict[str, object]


def taken_apart(memory, sources, layout: list, dones, truncated, valid, widest_tile: int) -> TakenApart:
    """``layout``: as nested lists; ``widest_tile``: most columns of a tile."""
    (num_fields, num_planes, _, looked_at), *described = layout
    *memory, not_finite = memory if looked_at else (*memory, None)
    rows, planes = memory[0], memory[2 : 2 + num_planes]
    codes = None if dones is None else memory[1]
    # Without truncations nothing goes to the pool.
    final_obs, count, final_rows = (truncated is not None and memory[2 + num_planes :]) or (None, None, None)
    given = sources[:num_fields]
    plane_sources = sources[num_fields : num_fields + num_planes]
    final_sources = [] if final_obs is None else sources[num_fields + num_planes :]
    pool_bytes = final_obs.shape[2] if final_sources else 1
    tensors = (
        rows, tuple(given), tuple(planes), tuple(plane_sources), codes, (dones, truncated, valid), final_obs,
        tuple(final_sources), count, final_rows, not_finite,
    )  # fmt: skip
    strides = (
        tuple(0 if flag is None else flag.stride(0) for flag in (dones, truncated, valid)),
        tuple(plane.stride() for plane in planes),
        tuple(source.stride(0) for source in plane_sources),
        (0, 0) if codes is None else codes.stride(),
        (0, 0) if final_rows is None else final_rows.stride(),
        (0, 0) if count is None else count.stride(),
    )
    constants = {
        "ROW_BYTES": rows.shape[2],
        "FIELDS": _fields("sources", given, described[:num_fields], rows.shape[2], widest_tile),
        "LOOKED_AT": looked_at,
        "POOL_ROW_BYTES": pool_bytes,
        "FINAL_FIELDS": _fields("final sources", final_sources, described[num_fields:], pool_bytes, widest_tile),
    }
    num_rollouts = next((x.shape[0] for x in (count, not_finite) if x is not None), 1)
    return TakenApart(tensors, strides, num_rollouts, final_obs.shape[1] if final_sources else 0, constants)


def _fields(name: str, sources, described, row_bytes: int, widest_tile: int) -> tuple:
    """The flat description of all fields for a kernel."""
    fields = []
    for i, (source, (offset, dtype, width, _)) in enumerate(zip(sources, described)):
        kind, dims = DTYPES[dtype], []
        for size, stride in zip(source.shape[:0:-1], source.stride()[:0:-1], strict=True):
            if dims and stride == dims[-2] * dims[-1]:
                dims[-2] *= size
            elif size != 1:
                dims += [size, stride]
        if len(dims) > 6:
            raise ValueError(f"{name}[{i}]: expected at most 3 unrelated inner strides, got {source.stride()}")
        if offset % kind.itemsize or row_bytes % kind.itemsize or offset + width * kind.itemsize > row_bytes:
            size = width * kind.itemsize
            raise ValueError(f"{name}[{i}]: expected {size} aligned bytes in a row of {row_bytes}, got offset {offset}")
        tile = power_of_2(width, 1, widest_tile)
        fields += [offset, TRITON_TYPES[kind], width, tile, source.stride(0), *dims, *[1, 0] * (3 - len(dims) // 2)]
    return tuple(fields)
