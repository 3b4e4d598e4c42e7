"""GAE, V-trace and Retrace in one launch, for either layout, with the statistics of the advantages.

Env-major ([N, C] with steps contiguous): some lanes of a warp, a warp or several warps per environment, four steps in
each lane, scanned backwards across the lanes; loads and stores are 128 bits wide. Time-major (environments contiguous):
one thread per environment, which loads up to twenty steps at a time and walks backwards over them. Both are correct
for any strides. scan.py has the recurrence, moments.py the statistics.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import CURSOR_DISCARDED, power_of_2
from .moments import merge_if_last
from .prepared import Launches
from .scan import scan_rows, walk_columns

# Fewest and most warps of an env-major program: as many as leave PROGRAMS of them, about one a multiprocessor.
LEAST_WARPS, WARPS, PROGRAMS = 4, 16, 128
# Most warps of an environment: it has several where there would be less than ROW_WARPS in all.
WARPS_A_ROW, ROW_WARPS = 16, 4096
# Rows of a thread, from MANY warps of rows on, if they are one tile: 8192 environments are then one wave of programs on
# 132 multiprocessors.
THREAD_ROWS, MANY = 2, 4096
# Most registers of a thread, where rows are read in 128 bits: two programs of 16 warps fit on a multiprocessor. In
# float64, three of 8.
REGISTERS, DOUBLE_REGISTERS = 64, 80
# Threads of a time-major program, and the most steps that a thread holds: more would take long to compile. V-trace's
# have a fourth number, a log-ratio: 17 fit 168 registers on 8.0, 20 would take 218.
COLUMNS, COLUMN_STEPS, OFF_POLICY_STEPS = 64, 20, 17
# Whether an env-major program stores its rows before it takes its ticket, which then waits for them.
STORE_FIRST = False


@triton.jit(do_not_specialize=["num_envs", "capacity", "start", "pool_size"])
def gae_kernel(
    columns, strides, last_values, cursor, advantages, returns, stats, workspace, gamma: tl.float64,
    decay: tl.float64, rho_clip: tl.float64, c_clip: tl.float64, num_envs, capacity, start, pool_size,
    NUM_STEPS: tl.constexpr, CODED: tl.constexpr, BOOTSTRAP: tl.constexpr, ENV_MAJOR: tl.constexpr,
    WRAP: tl.constexpr, ALIGN: tl.constexpr, START_ALIGN: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
    SEGMENTS: tl.constexpr, WARPS: tl.constexpr, PARTIALS: tl.constexpr, STORE_FIRST: tl.constexpr,
):  # fmt: skip
    """``columns`` and ``strides``: see scan.py. WRAP and ``start`` (in units of START_ALIGN) apply without a cursor.
    ROWS, LANES, SEGMENTS, WARPS: see ``Shape``; time-major, LANES is the number of steps that a thread holds."""
    if returns is None:
        dtype: tl.constexpr = advantages.dtype.element_ty
    else:
        dtype: tl.constexpr = returns.dtype.element_ty
    gamma = tl.full((), gamma, dtype)
    decay = tl.full((), decay, dtype)
    factors = (gamma, decay, tl.full((), rho_clip, dtype), tl.full((), c_clip, dtype))
    env = (tl.program_id(0) * ROWS + tl.arange(0, ROWS * SEGMENTS) // SEGMENTS).to(tl.int64)
    exists = env < num_envs
    last_value = tl.load(last_values + env * strides[9][0], mask=exists, other=0.0).to(dtype)
    if cursor is not None:
        start = (tl.load(cursor + CURSOR_DISCARDED).to(tl.uint64) % capacity.to(tl.uint64)).to(tl.int32)
    if not ENV_MAJOR:
        ticket = walk_columns(
            columns, strides, last_value, advantages, returns, workspace, factors, env, exists, capacity,
            start * START_ALIGN, pool_size, NUM_STEPS, CODED, BOOTSTRAP, WRAP, LANES, WARPS,
        )  # fmt: skip
    elif cursor is None:
        ticket = scan_rows(
            columns, strides, last_value, advantages, returns, workspace, factors, env, exists, capacity, start,
            pool_size, NUM_STEPS, CODED, BOOTSTRAP, WRAP, ALIGN, START_ALIGN, LANES, SEGMENTS,
            WARPS, STORE_FIRST,
        )  # fmt: skip
    # With a cursor both bodies are compiled, so that a rollout that does not wrap, the usual case, has wide accesses.
    elif (start + NUM_STEPS <= capacity) & (start % 4 == 0):
        ticket = scan_rows(
            columns, strides, last_value, advantages, returns, workspace, factors, env, exists, capacity, start // 4,
            pool_size, NUM_STEPS, CODED, BOOTSTRAP, False, ALIGN, 4, LANES, SEGMENTS, WARPS, STORE_FIRST,
        )  # fmt: skip
    else:
        ticket = scan_rows(
            columns, strides, last_value, advantages, returns, workspace, factors, env, exists, capacity, start,
            pool_size, NUM_STEPS, CODED, BOOTSTRAP, True, ALIGN, 1, LANES, SEGMENTS, WARPS, STORE_FIRST,
        )  # fmt: skip
    if workspace is not None:
        merge_if_last(ticket, workspace, stats, WARPS, PARTIALS)


# Outputs must not overlap what is read: the columns and last_values.
LAUNCHES = Launches(gae_kernel, written=(11, 12), apart=range(10))


class Shape(NamedTuple):
    """How a launch divides its environments."""

    rows: int
    """Environments of a program."""
    lanes: int
    """Threads of an environment, in each of its segments."""
    segments: int
    warps: int
    """Warps of a program."""


def shape_of(num_envs: int, num_steps: int, dtype: torch.dtype = torch.float32) -> Shape:
    """The shape of an env-major launch. Numbers of float64 take twice the registers: half as many warps."""
    most = WARPS * 4 // dtype.itemsize
    lanes, segments = triton.next_power_of_2(triton.cdiv(num_steps, 4)), 1
    if lanes > 32:
        several = 1 << (max(ROW_WARPS // num_envs, 1).bit_length() - 1)
        segments = min(lanes // 32, several, WARPS_A_ROW)
    lanes = min(lanes, 32)
    row_warps = triton.cdiv(num_envs * segments * lanes, 32)
    rows = THREAD_ROWS if num_steps <= 4 * lanes and row_warps >= MANY else 1
    warps = power_of_2(row_warps // (rows * PROGRAMS), max(segments, LEAST_WARPS), max(segments, most))
    return Shape(rows * warps * 32 // (lanes * segments), lanes, segments, warps)


def gae(
    rewards,
    values,
    dones,
    truncated,
    valid,
    last_values,
    final_values,
    final_rows,
    gamma,
    lam,
    start,
    coded,
    bootstrap,
    cursor,
    advantages,
    returns,
    stats,
    workspace,
    checked=None,
) -> None:
    """Generalized advantage estimation, see :mod:`pydrone.ops.schema`. ``checked``: as :class:`Launches`."""
    columns = (rewards, values, dones, truncated, valid, final_values, final_rows, None, None)
    _launch(columns, last_values, cursor, advantages, returns, stats, workspace, gamma, lam, 1.0, 1.0, start, coded,
            bootstrap, checked)  # fmt: skip


def off_policy(
    rewards,
    values,
    dones,
    truncated,
    valid,
    last_values,
    final_values,
    final_rows,
    log_rhos,
    q_values,
    gamma,
    lam,
    rho_clip,
    c_clip,
    start,
    coded,
    bootstrap,
    cursor,
    advantages,
    targets,
    stats,
    workspace,
    checked=None,
) -> None:
    """V-trace or Retrace(lambda), see :mod:`pydrone.ops.schema`. ``checked``: as :class:`Launches`."""
    columns = (rewards, values, dones, truncated, valid, final_values, final_rows, log_rhos, q_values)
    _launch(columns, last_values, cursor, advantages, targets, stats, workspace, gamma, lam, rho_clip, c_clip, start,
            coded, bootstrap, checked)  # fmt: skip


def _launch(
    columns, last_values, cursor, advantages, returns, stats, workspace, gamma, lam, rho_clip, c_clip, start, coded,
    bootstrap, checked,
) -> None:  # fmt: skip
    if (returns if advantages is None else advantages).numel() == 0:
        if stats is not None:
            stats.zero_()
        return

    def arrange(tensors, numbers):
        *columns, last_values, cursor, advantages, returns, stats, workspace = tensors
        rewards, final_values, final_rows = columns[0], *columns[5:7]
        output = advantages if returns is None else returns
        num_envs, num_steps = output.shape
        env_major = rewards.stride(0) != 1 or rewards.stride(1) == 1
        # Row strides and a start that are multiples of four elements allow 128-bit accesses.
        per_row = [x for x in (*columns, advantages, returns) if x is not None and x.dim() == 2]
        align = 4 if env_major and all(x.stride(0) % 4 == 0 for x in per_row) else 1
        start_align = 4 if env_major and cursor is None and start % 4 == 0 else 1
        strides = tuple(_strides(x, align) for x in (*columns, last_values, advantages, returns))
        if env_major:
            shape = shape_of(num_envs, num_steps, output.dtype)
        else:
            chunks = triton.cdiv(num_steps, COLUMN_STEPS if columns[7] is None else OFF_POLICY_STEPS)
            shape = Shape(COLUMNS, triton.cdiv(num_steps, chunks), 1, COLUMNS // 32)
        registers = REGISTERS if output.dtype == torch.float32 else DOUBLE_REGISTERS
        programs = triton.cdiv(num_envs, shape.rows)
        arguments = (
            tuple(columns), strides, last_values, cursor, advantages, returns, stats,
            None if stats is None else workspace, *numbers, num_envs, rewards.shape[1],
            start // start_align, 0 if final_rows is None else final_values.shape[0],
        )  # fmt: skip
        constants = {
            "NUM_STEPS": num_steps, "CODED": coded, "BOOTSTRAP": bootstrap, "ENV_MAJOR": env_major,
            "WRAP": cursor is not None or start + num_steps > rewards.shape[1], "ALIGN": align,
            "START_ALIGN": start_align, "ROWS": shape.rows, "LANES": shape.lanes, "SEGMENTS": shape.segments,
            "WARPS": shape.warps, "PARTIALS": power_of_2(programs, 32 * shape.warps, 2048), "STORE_FIRST": STORE_FIRST,
            "num_warps": shape.warps, "enable_fp_fusion": True,
            "maxnreg": registers if align == 4 else None,
        }  # fmt: skip
        return (programs,), arguments, constants

    tensors = (*columns, last_values, cursor, advantages, returns, stats, workspace)
    LAUNCHES((start, coded, bootstrap), tensors, (gamma, gamma * lam, rho_clip, c_clip), arrange, checked)


def _strides(tensor: Tensor | None, align: int) -> tuple[int, ...]:
    """The strides; those over environments of a 2-D tensor in units of ``align`` elements."""
    if tensor is None or tensor.dim() == 1:
        return () if tensor is None else tensor.stride()
    return tensor.stride(0) // align, tensor.stride(1)
