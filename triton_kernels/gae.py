"""GAE in one launch, for either layout, with the statistics of the advantages.

Env-major ([N, C] with steps contiguous): one warp per environment, with a tile of steps in its registers, scanned
backwards across the lanes; loads and stores are 128 bits wide. Time-major (environments contiguous): one thread per
environment, which loads twenty steps at a time and walks backwards over them. Both are correct for any strides.
The statistics need no extra launch: each program stores (count, mean, M2) in the workspace, and the last one to finish
merges them in a fixed order, so that runs are bit-equal.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import (
    CURSOR_DISCARDED,
    INVALID,
    RUNNING,
    TERMINATED,
    TRUNCATED,
    encode,
    power_of_2,
    take_ticket,
)
from .prepared import Launches

# Warps of an env-major program. One row per warp, or WARP_ROWS from MANY_ENVS environments on: 8192 are then one wave
# of programs on 132 multiprocessors, and there are half as many partial statistics.
WARPS, WARP_ROWS, MANY_ENVS = 8, 2, 4096
# Threads of a time-major program, and the most steps that a thread holds: more would take long to compile.
COLUMNS, COLUMN_STEPS = 64, 20


@triton.jit
def temporal_difference(code, reward, value, next_value, at_truncation, gamma):
    """r + gamma * V' - V, with V' chosen by the code. Selects, never products: 0 * NaN is NaN."""
    next_value = tl.where(code == TRUNCATED, at_truncation, next_value)
    next_value = tl.where(code == TERMINATED, 0.0, next_value)
    return tl.where(code == INVALID, 0.0, reward + gamma * next_value - value)


@triton.jit
def link(code, decay):
    """The factor of a step on the advantage after it; a negative number marks a cut."""
    return tl.where(code == RUNNING, decay, -1.0).to(decay.dtype)


@triton.jit
def join(later, later_link, advantage, link):
    """Joins a run of steps to the run after it, unless there is a cut."""
    # The sign bit, not a comparison: the product of links with a cut keeps it even if it underflows to -0.
    if link.dtype == tl.float64:
        cut = link.to(tl.int64, bitcast=True) < 0
    else:
        cut = link.to(tl.int32, bitcast=True) < 0
    return tl.where(cut, advantage, advantage + link * later), tl.where(cut, link, link * later_link)


@triton.jit
def moments_about(near, count, deviations, squares):
    """(count, mean, M2), float64, from the sums of deviations from ``near`` and of their squares.

    ``near`` is the mean rounded to float32, whose error may be large compared to the spread.
    """
    count = count.to(tl.float64)
    offset = deviations.to(tl.float64) / tl.where(count > 0, count, 1.0)
    return count, near.to(tl.float64) + offset, squares.to(tl.float64) - count * offset * offset


@triton.jit
def merge(count, mean, m2, other_count, other_mean, other_m2):
    """Merges two samples' (count, mean, M2) (Chan, Golub and LeVeque 1979)."""
    total = count + other_count
    share = other_count / tl.where(total > 0, total, 1.0)
    difference = other_mean - mean
    return total, mean + difference * share, m2 + other_m2 + difference * difference * count * share


@triton.jit
def wrapped(slot, capacity, WRAP: tl.constexpr):
    if WRAP:
        slot = tl.where(slot >= capacity, slot - capacity, slot)
    return slot


@triton.jit
def load_code(columns, strides, rows, slot, mask, CODED: tl.constexpr):
    """The steps' codes; INVALID outside the mask."""
    if CODED:
        return tl.load(columns[2] + rows * strides[2][0] + slot * strides[2][1], mask=mask, other=INVALID).to(tl.int32)
    else:
        done = tl.load(columns[2] + rows * strides[2][0] + slot * strides[2][1], mask=mask, other=0) != 0
        truncated = None
        if columns[3] is not None:
            truncated = tl.load(columns[3] + rows * strides[3][0] + slot * strides[3][1], mask=mask, other=0) != 0
        valid = None
        if columns[4] is not None:
            valid = tl.load(columns[4] + rows * strides[4][0] + slot * strides[4][1], mask=mask, other=0) != 0
        return tl.where(mask, encode(done, truncated, valid), INVALID)


@triton.jit
def load_final(columns, strides, rows, slot, wanted, pool_size):
    """Values of the true final observations, from a plane or the pool; NaN where the pool has none."""
    if columns[6] is not None:
        place = tl.load(columns[6] + rows * strides[6][0] + slot * strides[6][1], mask=wanted, other=-1)
        found = (place >= 0) & (place < pool_size)
        return tl.load(columns[5] + place.to(tl.int64) * strides[5][0], mask=found, other=float("nan"))
    else:
        return tl.load(columns[5] + rows * strides[5][0] + slot * strides[5][1], mask=wanted, other=0.0)


@triton.jit
def split4(x, ROWS: tl.constexpr):
    """[ROWS, 128] to four [ROWS, 32]: steps 4 i + k in lane i, for k = 0 .. 3. None leaves its thread."""
    even, odd = tl.split(tl.reshape(x, [ROWS, 32, 2, 2]))
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return x0, x1, x2, x3


@triton.jit
def join4(x0, x1, x2, x3, ROWS: tl.constexpr):
    return tl.reshape(tl.join(tl.join(x0, x2), tl.join(x1, x3)), [ROWS, 128])


@triton.jit
def scan_lanes(advantage, link, carry, ROWS: tl.constexpr):
    """The advantage after each lane's steps, from each lane's own steps and ``carry``, the advantage after all."""
    lane = tl.arange(0, 32)[None, :] + tl.zeros([ROWS, 1], tl.int32)
    # Reversed with one shuffle each: a reverse scan reverses its operands with five butterfly shuffles, twice.
    advantage = tl.gather(advantage, 31 - lane, 1)
    link = tl.gather(link, 31 - lane, 1)
    advantage, link = tl.associative_scan((advantage, link), 1, join)
    advantage, link = join(carry, 0.0, advantage, link)
    return tl.where(lane == 31, carry, tl.gather(advantage, tl.maximum(30 - lane, 0), 1))


@triton.jit
def scan_rows(
    columns, strides, last_value, advantages, returns, gamma, decay, env, exists, capacity, start, pool_size,
    NUM_STEPS: tl.constexpr, CODED: tl.constexpr, BOOTSTRAP: tl.constexpr, WITH_STATS: tl.constexpr,
    WRAP: tl.constexpr, ALIGN: tl.constexpr, START_ALIGN: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Env-major: tiles of [ROWS, 128], the last one first. Returns (count, mean, M2), each [ROWS]."""
    dtype: tl.constexpr = advantages.dtype.element_ty
    count = tl.zeros([ROWS], tl.float64)
    mean = tl.zeros([ROWS], tl.float64)
    m2 = tl.zeros([ROWS], tl.float64)
    lane = tl.arange(0, 32)[None, :] + tl.zeros([ROWS, 1], tl.int32)
    # Row strides come in units of ALIGN elements: the compiler sees the factor and can widen accesses.
    rows = env[:, None] * ALIGN
    value_after = last_value[:, None]
    carry = tl.zeros([ROWS, 1], dtype)
    TILES: tl.constexpr = (NUM_STEPS + 127) // 128
    for tile in range(TILES):
        first = (TILES - 1 - tile) * 128
        t = first + tl.arange(0, 128)[None, :]
        mask = exists[:, None] & (t < NUM_STEPS)
        slot = wrapped(start * START_ALIGN + t, capacity, WRAP)
        codes = load_code(columns, strides, rows, slot, mask, CODED)
        reward = tl.load(columns[0] + rows * strides[0][0] + slot * strides[0][1], mask=mask, other=0.0).to(dtype)
        value = tl.load(columns[1] + rows * strides[1][0] + slot * strides[1][1], mask=mask, other=0.0).to(dtype)
        if BOOTSTRAP == 1:
            final = load_final(columns, strides, rows, slot, codes == TRUNCATED, pool_size).to(dtype)
            f = split4(final, ROWS)
        r = split4(reward, ROWS)
        # Steps beyond the last hold last_values, so that the last step finds it as the next step's value.
        v = split4(tl.where(t < NUM_STEPS, value, value_after), ROWS)
        c = split4(codes, ROWS)
        next_head = tl.gather(v[0], tl.minimum(lane + 1, 31), 1)
        next_value = tl.where(lane == 31, value_after, next_head)

        run = tl.zeros([ROWS, 32], dtype)
        run_link = tl.full([ROWS, 32], 1.0, dtype)
        a = ()
        links = ()
        for k in tl.static_range(3, -1, -1):
            at_truncation = next_value
            if BOOTSTRAP == 1:
                at_truncation = f[k]
            elif BOOTSTRAP == 2:
                at_truncation = v[k]
            delta = temporal_difference(c[k], r[k], v[k], next_value, at_truncation, gamma)
            run, run_link = join(run, run_link, delta, link(c[k], decay))
            a = (run,) + a
            links = (run_link,) + links
            next_value = v[k]
        after = scan_lanes(run, run_link, carry, ROWS)
        a0, _ = join(after, 0.0, a[0], links[0])
        a1, _ = join(after, 0.0, a[1], links[1])
        a2, _ = join(after, 0.0, a[2], links[2])
        a3, _ = join(after, 0.0, a[3], links[3])
        advantage = join4(a0, a1, a2, a3, ROWS)
        if TILES > 1:
            carry = tl.sum(tl.where(lane == 0, a0, 0.0), 1)[:, None]
            value_after = tl.sum(tl.where(lane == 0, v[0], 0.0), 1)[:, None]
        tl.store(advantages + rows * strides[8][0] + t * strides[8][1], advantage, mask=mask)
        if returns is not None:
            tl.store(returns + rows * strides[9][0] + t * strides[9][1], advantage + value, mask=mask)
        if WITH_STATS:
            sampled = codes != INVALID
            number = tl.sum(tl.where(sampled, 1.0, 0.0).to(dtype), 1)
            average = tl.sum(tl.where(sampled, advantage, 0.0), 1) / tl.where(number > 0, number, 1.0)
            deviation = tl.where(sampled, advantage - average[:, None], 0.0)
            number, average, squares = moments_about(
                average, number, tl.sum(deviation, 1), tl.sum(deviation * deviation, 1)
            )
            if TILES > 1:
                count, mean, m2 = merge(count, mean, m2, number, average, squares)
            else:
                count, mean, m2 = number, average, squares
    return count, mean, m2


@triton.jit
def walk_columns(
    columns, strides, last_value, advantages, returns, gamma, decay, env, exists, capacity, start, pool_size,
    NUM_STEPS: tl.constexpr, CODED: tl.constexpr, BOOTSTRAP: tl.constexpr, WITH_STATS: tl.constexpr,
    WRAP: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Time-major: one thread per environment loads STEPS steps, then uses them. Returns (count, mean, M2)."""
    dtype: tl.constexpr = advantages.dtype.element_ty
    count = tl.zeros(env.shape, tl.float64)
    mean = tl.zeros(env.shape, tl.float64)
    m2 = tl.zeros(env.shape, tl.float64)
    next_value = last_value
    carry = tl.zeros(env.shape, dtype)
    for chunk in range((NUM_STEPS + STEPS - 1) // STEPS):
        latest = NUM_STEPS - 1 - chunk * STEPS
        c = ()
        r = ()
        v = ()
        f = ()
        a = ()
        for i in tl.static_range(STEPS):
            mask = exists & (latest - i >= 0)
            slot = wrapped(start + latest - i, capacity, WRAP)
            c = c + (load_code(columns, strides, env, slot, mask, CODED),)
            reward = tl.load(columns[0] + env * strides[0][0] + slot * strides[0][1], mask=mask, other=0.0)
            value = tl.load(columns[1] + env * strides[1][0] + slot * strides[1][1], mask=mask, other=0.0)
            r = r + (reward.to(dtype),)
            v = v + (value.to(dtype),)
        if BOOTSTRAP == 1:
            for i in tl.static_range(STEPS):
                slot = wrapped(start + latest - i, capacity, WRAP)
                f = f + (load_final(columns, strides, env, slot, c[i] == TRUNCATED, pool_size).to(dtype),)
        number = tl.zeros(env.shape, dtype)
        total = tl.zeros(env.shape, dtype)
        for i in tl.static_range(STEPS):
            at_truncation = next_value
            if BOOTSTRAP == 1:
                at_truncation = f[i]
            elif BOOTSTRAP == 2:
                at_truncation = v[i]
            delta = temporal_difference(c[i], r[i], v[i], next_value, at_truncation, gamma)
            carry, _ = join(carry, 0.0, delta, link(c[i], decay))
            next_value = v[i]
            a = a + (carry,)
            t = latest - i
            mask = exists & (t >= 0)
            tl.store(advantages + env * strides[8][0] + t * strides[8][1], carry, mask=mask)
            if returns is not None:
                tl.store(returns + env * strides[9][0] + t * strides[9][1], carry + v[i], mask=mask)
            number += tl.where(c[i] == INVALID, 0.0, 1.0).to(dtype)
            total += tl.where(c[i] == INVALID, 0.0, carry)
        if WITH_STATS:
            average = total / tl.where(number > 0, number, 1.0)
            deviations = tl.zeros(env.shape, dtype)
            squares = tl.zeros(env.shape, dtype)
            for i in tl.static_range(STEPS):
                deviation = tl.where(c[i] == INVALID, 0.0, a[i] - average)
                deviations += deviation
                squares += deviation * deviation
            number, average, squares = moments_about(average, number, deviations, squares)
            count, mean, m2 = merge(count, mean, m2, number, average, squares)
    return count, mean, m2


@triton.jit
def merge_programs(count, mean, m2, workspace, stats, PARTIALS: tl.constexpr):
    """Stores a program's statistics in the workspace; the last program merges all of them into ``stats``."""
    programs = tl.num_programs(0)
    partials = workspace + 1
    tl.store(partials + tl.program_id(0), count)
    tl.store(partials + programs + tl.program_id(0), mean)
    tl.store(partials + 2 * programs + tl.program_id(0), m2)
    ticket = workspace.to(tl.pointer_type(tl.int32), bitcast=True)
    if take_ticket(ticket) == programs - 1:
        # Sums about one of the means: one pass without cancellation. Which program is last changes from run to run; the
        # order of the sums does not.
        about = tl.load(partials + programs, cache_modifier=".cg")
        counts = tl.zeros([PARTIALS], tl.float64)
        sums = tl.zeros([PARTIALS], tl.float64)
        squares = tl.zeros([PARTIALS], tl.float64)
        first = 0
        while first < programs:  # not a range: with numpy 2.5, Triton 3.6's interpreter rejects a tensor as its bound
            i = first + tl.arange(0, PARTIALS)
            number = tl.load(partials + i, mask=i < programs, other=0.0, cache_modifier=".cg")
            offset = tl.load(partials + programs + i, mask=i < programs, other=0.0, cache_modifier=".cg") - about
            spread = tl.load(partials + 2 * programs + i, mask=i < programs, other=0.0, cache_modifier=".cg")
            offset = tl.where(number > 0, offset, 0.0)
            counts += number
            sums += number * offset
            squares += spread + number * offset * offset
            first += PARTIALS
        count = tl.sum(counts)
        offset = tl.sum(sums) / tl.where(count > 0, count, 1.0)
        m2 = tl.sum(squares) - count * offset * offset
        tl.store(stats, count)
        tl.store(stats + 1, tl.where(count > 0, about + offset, 0.0))
        tl.store(stats + 2, tl.where(m2 < 0, 0.0, m2))
        tl.store(ticket, 0)


@triton.jit(do_not_specialize=["num_envs", "capacity", "start", "pool_size"])
def gae_kernel(
    columns, strides, last_values, cursor, advantages, returns, stats, workspace, gamma: tl.float64,
    decay: tl.float64, num_envs, capacity, start, pool_size,
    NUM_STEPS: tl.constexpr, CODED: tl.constexpr, BOOTSTRAP: tl.constexpr, ENV_MAJOR: tl.constexpr,
    WRAP: tl.constexpr, ALIGN: tl.constexpr, START_ALIGN: tl.constexpr, ENVS: tl.constexpr, STEPS: tl.constexpr,
    PARTIALS: tl.constexpr,
):  # fmt: skip
    """``columns``: rewards, values, dones, truncated, valid, final_values, final_rows; ``strides``: theirs, then those
    of last_values, advantages, returns. WRAP and ``start`` (in units of START_ALIGN) apply without a cursor."""
    dtype: tl.constexpr = advantages.dtype.element_ty
    WITH_STATS: tl.constexpr = stats is not None
    gamma = tl.full((), gamma, dtype)
    decay = tl.full((), decay, dtype)
    env = (tl.program_id(0) * ENVS + tl.arange(0, ENVS)).to(tl.int64)
    exists = env < num_envs
    last_value = tl.load(last_values + env * strides[7][0], mask=exists, other=0.0).to(dtype)
    if cursor is not None:
        start = (tl.load(cursor + CURSOR_DISCARDED).to(tl.uint64) % capacity.to(tl.uint64)).to(tl.int32)
    if not ENV_MAJOR:
        count, mean, m2 = walk_columns(
            columns, strides, last_value, advantages, returns, gamma, decay, env, exists, capacity,
            start * START_ALIGN, pool_size, NUM_STEPS, CODED, BOOTSTRAP, WITH_STATS, WRAP, STEPS,
        )  # fmt: skip
    elif cursor is None:
        count, mean, m2 = scan_rows(
            columns, strides, last_value, advantages, returns, gamma, decay, env, exists, capacity, start, pool_size,
            NUM_STEPS, CODED, BOOTSTRAP, WITH_STATS, WRAP, ALIGN, START_ALIGN, ENVS,
        )  # fmt: skip
    # With a cursor both bodies are compiled, so that a rollout that does not wrap, the usual case, has wide accesses.
    elif (start + NUM_STEPS <= capacity) & (start % 4 == 0):
        count, mean, m2 = scan_rows(
            columns, strides, last_value, advantages, returns, gamma, decay, env, exists, capacity, start // 4,
            pool_size, NUM_STEPS, CODED, BOOTSTRAP, WITH_STATS, False, ALIGN, 4, ENVS,
        )  # fmt: skip
    else:
        count, mean, m2 = scan_rows(
            columns, strides, last_value, advantages, returns, gamma, decay, env, exists, capacity, start, pool_size,
            NUM_STEPS, CODED, BOOTSTRAP, WITH_STATS, True, ALIGN, 1, ENVS,
        )  # fmt: skip
    if WITH_STATS:
        # Plain sums: in float64 they lose no digit that the float32 advantages had.
        total = tl.sum(count)
        squares = tl.sum(m2 + count * mean * mean)
        mean = tl.sum(count * mean) / tl.where(total > 0, total, 1.0)
        merge_programs(total, mean, squares - total * mean * mean, workspace, stats, PARTIALS)


# Outputs must not overlap inputs, which are numbered as gae's tensors.
LAUNCHES = Launches(gae_kernel, written=(9, 10), apart=range(8))


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
    if advantages.numel() == 0:
        if stats is not None:
            stats.zero_()
        return

    def arrange(tensors, numbers):
        *columns, last_values, final_values, final_rows, cursor, advantages, returns, stats, workspace = tensors
        columns = (*columns, final_values, final_rows)
        rewards, (num_envs, num_steps) = columns[0], advantages.shape
        env_major = rewards.stride(0) != 1 or rewards.stride(1) == 1
        # Row strides and a start that are multiples of four elements allow 128-bit accesses.
        per_row = [x for x in (*columns, advantages, returns) if x is not None and x.dim() == 2]
        align = 4 if env_major and all(x.stride(0) % 4 == 0 for x in per_row) else 1
        start_align = 4 if env_major and cursor is None and start % 4 == 0 else 1
        strides = tuple(_strides(x, align) for x in (*columns, last_values, advantages, returns))
        envs = (WARP_ROWS * WARPS if num_envs >= MANY_ENVS else WARPS) if env_major else COLUMNS
        chunks = triton.cdiv(num_steps, COLUMN_STEPS)
        programs = triton.cdiv(num_envs, envs)
        arguments = (
            columns, strides, last_values, cursor, advantages, returns, stats,
            None if stats is None else workspace, *numbers, num_envs, rewards.shape[1],
            start // start_align, 0 if final_rows is None else final_values.shape[0],
        )  # fmt: skip
        constants = {
            "NUM_STEPS": num_steps, "CODED": coded, "BOOTSTRAP": bootstrap, "ENV_MAJOR": env_major,
            "WRAP": cursor is not None or start + num_steps > rewards.shape[1], "ALIGN": align,
            "START_ALIGN": start_align, "ENVS": envs, "STEPS": triton.cdiv(num_steps, chunks),
            "PARTIALS": power_of_2(programs, 32, 512), "num_warps": WARPS if env_major else COLUMNS // 32,
            "enable_fp_fusion": True,
        }  # fmt: skip
        return (programs,), arguments, constants

    tensors = (
        rewards, values, dones, truncated, valid, last_values, final_values, final_rows, cursor, advantages, returns,
        stats, workspace,
    )  # fmt: skip
    LAUNCHES((start, coded, bootstrap), tensors, (gamma, gamma * lam), arrange, checked)


def _strides(tensor: Tensor | None, align: int) -> tuple[int, ...]:
    """The strides; those over environments of a 2-D tensor in units of ``align`` elements."""
    if tensor is None or tensor.dim() == 1:
        return () if tensor is None else tensor.stride()
    return tensor.stride(0) // align, tensor.stride(1)


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
    """V-trace or Retrace(lambda), see :mod:`pydrone.ops.schema`."""
    raise RuntimeError("off_policy: not implemented in Triton yet")
