"""The recurrence of GAE, V-trace and Retrace, and the two ways in which a program of gae.py walks through it.

x_t = weight_t * delta_t + (0 at an episode's end, else link_t * x_{t+1}), where the weight and the link are 1 and
gamma * lambda in GAE (Schulman et al. 2016, arXiv:1506.02438, eq. 16), rho_t and gamma * c_t in V-trace (Espeholt et
al. 2018, arXiv:1802.01561, eq. 1), 1 and gamma * c_{t+1} in Retrace (Munos et al. 2016, arXiv:1606.02647, eq. 4).

``columns``: rewards, values, dones, truncated, valid, final_values, final_rows, log_rhos, q_values; ``strides``:
theirs, then those of last_values, advantages, returns. ``factors``: gamma, gamma * lambda, and the bounds of rho and c.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .launch import INVALID, RUNNING, TERMINATED, TRUNCATED, encode
from .moments import add_up, no_sums, publish, sums_of

# Places in ``columns``; only V-trace and Retrace read the last two.
REWARDS, VALUES, DONES, LOG_RHOS, Q_VALUES = (tl.constexpr(i) for i in (0, 1, 2, 7, 8))


@triton.jit
def temporal_difference(code, reward, value, next_value, at_truncation, gamma):
    """r + gamma * V' - V, with V' chosen by the code. Selects, never products: 0 * NaN is NaN."""
    next_value = tl.where(code == TRUNCATED, at_truncation, next_value)
    next_value = tl.where(code == TERMINATED, 0.0, next_value)
    return tl.where(code == INVALID, 0.0, reward + gamma * next_value - value)


@triton.jit
def ratios(log_rho, codes, factors):
    """rho, the weight of V-trace's temporal differences, and gamma * c. Bounded by selects, which keep a NaN; what an
    invalid step holds is not used."""
    ratio = tl.exp(log_rho)
    ratio = tl.where(codes == INVALID, 0.0, ratio)
    # abs: the sign bit of a link, that of a NaN too, would mark a cut.
    trace = tl.abs(factors[1] * tl.where(ratio > factors[3], factors[3], ratio))
    return tl.where(ratio > factors[2], factors[2], ratio), trace


@triton.jit
def link(code, decay):
    """The factor of a step on the x after it; a negative number marks a cut."""
    return tl.where(code == RUNNING, decay, -1.0).to(decay.dtype)


@triton.jit
def join(later, later_link, x, link):
    """Joins a run of steps to the run after it, unless there is a cut."""
    # The sign bit, not a comparison: the product of links with a cut keeps it even if it underflows to -0.
    if link.dtype == tl.float64:
        cut = link.to(tl.int64, bitcast=True) < 0
    else:
        cut = link.to(tl.int32, bitcast=True) < 0
    return tl.where(cut, x, x + link * later), tl.where(cut, link, link * later_link)


@triton.jit
def policy_advantage(code, delta, rho, later, gamma):
    """V-trace's, rho_t (r_t + gamma vs_{t+1} - V_t), from x_{t+1}."""
    ahead, _ = join(later, 0.0, delta, link(code, gamma))
    return tl.where(code == INVALID, 0.0, rho * ahead)


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
def load_steps(columns, strides, rows, slot, mask, WHICH: tl.constexpr, dtype: tl.constexpr):
    place = columns[WHICH] + rows * strides[WHICH][0] + slot * strides[WHICH][1]
    return tl.load(place, mask=mask, other=0.0).to(dtype)


@triton.jit
def split4(x):
    """[R, 4 L] to four [R, L]: every fourth number. None leaves its thread."""
    even, odd = tl.split(tl.reshape(x, [x.shape[0], x.shape[1] // 4, 2, 2]))
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return x0, x1, x2, x3


@triton.jit
def load_four(
    columns, strides, rows, slots, masks, WHICH: tl.constexpr, dtype: tl.constexpr, CODED: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """Each lane's four steps of a column, [R, L] each: of a tile [R, 4 L] or, if there are four slots, one by one."""
    found = ()
    for k in tl.static_range(len(slots)):
        if WHICH == DONES:
            found = found + (load_code(columns, strides, rows, slots[k], masks[k], CODED),)
        else:
            found = found + (load_steps(columns, strides, rows, slots[k], masks[k], WHICH, dtype),)
    if len(slots) == 1:
        return split4(found[0])
    else:
        return shaped(found, LANES)


@triton.jit
def shaped(x, LANES: tl.constexpr):
    """Four flat tensors to four [R, LANES]."""
    shape: tl.constexpr = [x[0].shape[0] // LANES, LANES]
    return tl.reshape(x[0], shape), tl.reshape(x[1], shape), tl.reshape(x[2], shape), tl.reshape(x[3], shape)


@triton.jit
def join4(x):
    return tl.reshape(tl.join(tl.join(x[0], x[2]), tl.join(x[1], x[3])), [x[0].shape[0], 4 * x[0].shape[1]])


@triton.jit
def rows_of_thread(x, ROWS: tl.constexpr):
    """[ROWS * R, L] to a tuple of ROWS [R, L]: a thread's rows, each by itself."""
    if ROWS == 1:
        return (x,)
    else:
        return tl.split(tl.permute(tl.reshape(x, [2, x.shape[0] // 2, x.shape[1]]), 1, 2, 0))


@triton.jit
def of_last_lane(x, lane):
    """[R, L] to [R]. Sums of bits: of numbers, -0 would lose its sign."""
    bits: tl.constexpr = tl.int32 if x.dtype == tl.float32 else tl.int64
    last = tl.where(lane == x.shape[1] - 1, x.to(bits, bitcast=True), 0)
    return tl.sum(last, 1).to(x.dtype, bitcast=True)


@triton.jit
def of_segment_before(x, SEGMENTS: tl.constexpr):
    """The number of the segment that is later in time; the first segment has that of the last one."""
    segment = tl.arange(0, SEGMENTS)[None, :] + tl.zeros([x.shape[0] // SEGMENTS, 1], tl.int32)
    x = tl.gather(tl.reshape(x, [x.shape[0] // SEGMENTS, SEGMENTS]), (segment + (SEGMENTS - 1)) % SEGMENTS, 1)
    return tl.reshape(x, [x.shape[0] * SEGMENTS])


@triton.jit
def scan_segments(run, run_link, SEGMENTS: tl.constexpr):
    """Joins each segment's whole to those before it."""
    shape: tl.constexpr = [run.shape[0] // SEGMENTS, SEGMENTS]
    run, _ = tl.associative_scan((tl.reshape(run, shape), tl.reshape(run_link, shape)), 1, join)
    return tl.reshape(run, [run.shape[0] * SEGMENTS])


@triton.jit
def shifted(x, x_after, lane, SEGMENTS: tl.constexpr):
    """What the lane before has, which is later in time; ``x_after`` in lane 0 of the first segment. And the next tile's
    ``x_after``, in that lane."""
    head = tl.gather(x, (lane + (x.shape[1] - 1)) % x.shape[1], 1)
    if SEGMENTS > 1:
        head = tl.where(lane == 0, of_segment_before(of_last_lane(x, lane), SEGMENTS)[:, None], head)
    return tl.where(first_lane(lane, SEGMENTS), x_after, head), head


@triton.jit
def first_lane(lane, SEGMENTS: tl.constexpr):
    if SEGMENTS == 1:
        return lane == 0
    else:
        return (lane == 0) & ((tl.arange(0, lane.shape[0]) % SEGMENTS == 0)[:, None])


@triton.jit
def scan_rows(
    columns, strides, last_value, advantages, returns, workspace, factors, env, exists, capacity, start, pool_size,
    NUM_STEPS: tl.constexpr, CODED: tl.constexpr, BOOTSTRAP: tl.constexpr, WRAP: tl.constexpr, ALIGN: tl.constexpr,
    START_ALIGN: tl.constexpr, LANES: tl.constexpr, SEGMENTS: tl.constexpr, WARPS: tl.constexpr,
    STORE_FIRST: tl.constexpr,
):  # fmt: skip
    """Env-major: tiles of [ROWS, 4 * LANES] steps, the last one first. Returns the ticket, see ``publish``."""
    dtype: tl.constexpr = factors[0].dtype
    ROWS: tl.constexpr = env.shape[0]  # of segments
    THREAD_ROWS: tl.constexpr = ROWS * LANES // (32 * WARPS)
    TILE: tl.constexpr = 4 * LANES * SEGMENTS
    TILES: tl.constexpr = (NUM_STEPS + TILE - 1) // TILE
    # The last steps are in lane 0 of the first segment, so that a scan runs backwards in time.
    lane = tl.arange(0, LANES)[None, :] + tl.zeros([ROWS, 1], tl.int32)
    segment = tl.arange(0, ROWS) % SEGMENTS
    # Of two dimensions, not three: Triton 3.6 then sees which of them is contiguous.
    i = tl.arange(0, 4 * LANES)
    within = ((LANES - 1 - i // 4) * 4 + i % 4)[None, :] + ((SEGMENTS - 1 - segment) * (4 * LANES))[:, None]
    # Row strides come in units of ALIGN elements: the compiler sees the factor and can widen accesses.
    rows = env[:, None] * ALIGN
    here = exists[:, None]
    # Where not all steps of a row can be read in 128 bits, each lane reads one by one what it needs, by flat tensors:
    # otherwise layouts would be converted in shared memory, and Triton 3.6 would order lanes by rows.
    WIDE: tl.constexpr = ALIGN == 4 and START_ALIGN == 4 and not WRAP
    own = (LANES - 1 - lane) * 4 + ((SEGMENTS - 1 - segment) * (4 * LANES))[:, None]
    flat_rows = tl.reshape(rows + tl.zeros([ROWS, LANES], tl.int64), [ROWS * LANES])
    flat_here = tl.reshape(here & (lane >= 0), [ROWS * LANES])
    value_after = last_value[:, None] + tl.zeros([ROWS, LANES], dtype)
    carry = tl.zeros([ROWS, LANES], dtype)
    trace_after = tl.zeros([ROWS, LANES], dtype)
    sums = no_sums([ROWS // THREAD_ROWS, LANES], dtype)
    ticket = tl.zeros([32 * WARPS], tl.int64)
    for tile in range(TILES):
        t = (TILES - 1 - tile) * TILE + within
        mask = here & (t < NUM_STEPS)
        flat_slots = ()
        flat_masks = ()
        for k in tl.static_range(4):
            flat_t = tl.reshape((TILES - 1 - tile) * TILE + own + k, [ROWS * LANES])
            flat_slots = flat_slots + (wrapped(start * START_ALIGN + flat_t, capacity, WRAP),)
            flat_masks = flat_masks + (flat_here & (flat_t < NUM_STEPS),)
        if WIDE:
            places = (rows, (start * START_ALIGN + t,), (mask,))
        else:
            places = (flat_rows, flat_slots, flat_masks)
        c = load_four(columns, strides, *places, DONES, dtype, CODED, LANES)
        r = load_four(columns, strides, *places, REWARDS, dtype, CODED, LANES)
        read = load_four(columns, strides, *places, VALUES, dtype, CODED, LANES)
        # Steps beyond the last hold last_values, so that the last step finds it as the next step's value.
        v = ()
        for k in tl.static_range(4):
            v = v + (tl.where((TILES - 1 - tile) * TILE + own + k < NUM_STEPS, read[k], last_value[:, None]),)
        b = v
        base = read
        f = v
        if BOOTSTRAP == 1:
            f = ()
            for k in tl.static_range(4):
                wanted = tl.reshape(c[k] == TRUNCATED, [ROWS * LANES])
                f = f + (load_final(columns, strides, flat_rows, flat_slots[k], wanted, pool_size).to(dtype),)
            f = shaped(f, LANES)
        if columns[LOG_RHOS] is not None:
            log_rhos = load_four(columns, strides, *places, LOG_RHOS, dtype, CODED, LANES)
            p = ()
            d = ()
            for k in tl.static_range(4):
                rho, trace = ratios(log_rhos[k], c[k], factors)
                p = p + (rho,)
                d = d + (trace,)
        if columns[Q_VALUES] is not None:
            b = load_four(columns, strides, *places, Q_VALUES, dtype, CODED, LANES)
            base = b
            # The link of the step before.
            trace, trace_after = shifted(d[0], trace_after, lane, SEGMENTS)
            d = (d[1], d[2], d[3], trace)
        next_value, value_after = shifted(v[0], value_after, lane, SEGMENTS)

        deltas = ()
        a = ()
        links = ()
        for k in tl.static_range(3, -1, -1):
            at_truncation = next_value
            if BOOTSTRAP == 1 or BOOTSTRAP == 2:
                at_truncation = f[k]
            delta = temporal_difference(c[k], r[k], b[k], next_value, at_truncation, factors[0])
            deltas = (delta,) + deltas
            if columns[LOG_RHOS] is None:
                step_link = link(c[k], factors[1])
            else:
                step_link = link(c[k], d[k])
                if columns[Q_VALUES] is None:
                    delta = tl.where(c[k] == INVALID, 0.0, p[k] * delta)
            if k == 3:
                run = delta
                run_link = step_link
            else:
                run, run_link = join(run, run_link, delta, step_link)
            a = (run,) + a
            links = (run_link,) + links
            next_value = v[k]
        if TILES > 1:
            run, _ = join(tl.where(first_lane(lane, SEGMENTS), carry, 0.0), 0.0, run, run_link)
        run, run_link = tl.associative_scan((run, run_link), 1, join)
        if SEGMENTS > 1:
            whole = scan_segments(of_last_lane(run, lane), of_last_lane(run_link, lane), SEGMENTS)
            whole = of_segment_before(whole, SEGMENTS)
            run, _ = join(tl.where(segment > 0, whole, 0.0)[:, None], 0.0, run, run_link)
            head = tl.where(lane == 0, whole[:, None], tl.gather(run, (lane + (LANES - 1)) % LANES, 1))
        else:
            head = tl.gather(run, (lane + (LANES - 1)) % LANES, 1)
        after = tl.where(first_lane(lane, SEGMENTS), carry, head)
        carry = head  # the first lane has that of the first steps
        x0, _ = join(after, 0.0, a[0], links[0])
        x1, _ = join(after, 0.0, a[1], links[1])
        x2, _ = join(after, 0.0, a[2], links[2])
        x3, _ = join(after, 0.0, a[3], links[3])
        x = (x0, x1, x2, x3)
        out = x
        if columns[LOG_RHOS] is not None and advantages is not None:
            later = (x1, x2, x3, after)
            out = ()
            for k in tl.static_range(4):
                out = out + (policy_advantage(c[k], deltas[k], p[k], later[k], factors[0]),)
        if workspace is not None:
            numbers = ()
            sampled = ()
            for k in tl.static_range(4):
                numbers = numbers + rows_of_thread(out[k], THREAD_ROWS)
                sampled = sampled + rows_of_thread(c[k] != INVALID, THREAD_ROWS)
            count, pivot, total, squares = sums_of(numbers, sampled)
            if TILES > 1:
                sums = add_up(sums, count, pivot, total, squares)
            else:
                sums = (count, pivot, total.to(tl.float64), squares.to(tl.float64))
                if not STORE_FIRST:
                    ticket = publish(*sums, workspace, WARPS, SEGMENTS * LANES - 1)
        if advantages is not None:
            tl.store(advantages + rows * strides[10][0] + t * strides[10][1], join4(out), mask=mask)
        if returns is not None:
            totals = join4((x0 + base[0], x1 + base[1], x2 + base[2], x3 + base[3]))
            tl.store(returns + rows * strides[11][0] + t * strides[11][1], totals, mask=mask)
    if workspace is not None and (TILES > 1 or STORE_FIRST):
        ticket = publish(*sums, workspace, WARPS, SEGMENTS * LANES - 1)
    return ticket


@triton.jit
def walk_columns(
    columns, strides, last_value, advantages, returns, workspace, factors, env, exists, capacity, start, pool_size,
    NUM_STEPS: tl.constexpr, CODED: tl.constexpr, BOOTSTRAP: tl.constexpr, WRAP: tl.constexpr, STEPS: tl.constexpr,
    WARPS: tl.constexpr,
):  # fmt: skip
    """Time-major: one thread per environment loads STEPS steps, then uses them. Returns the ticket."""
    dtype: tl.constexpr = factors[0].dtype
    sums = no_sums(env.shape, dtype)
    next_value = last_value
    carry = tl.zeros(env.shape, dtype)
    trace_after = tl.zeros(env.shape, dtype)
    for chunk in range((NUM_STEPS + STEPS - 1) // STEPS):
        latest = NUM_STEPS - 1 - chunk * STEPS
        c = ()
        r = ()
        v = ()
        b = ()
        f = ()
        p = ()
        for i in tl.static_range(STEPS):
            mask = exists & (latest - i >= 0)
            slot = wrapped(start + latest - i, capacity, WRAP)
            c = c + (load_code(columns, strides, env, slot, mask, CODED),)
            r = r + (load_steps(columns, strides, env, slot, mask, REWARDS, dtype),)
            v = v + (load_steps(columns, strides, env, slot, mask, VALUES, dtype),)
            if columns[LOG_RHOS] is not None:
                p = p + (load_steps(columns, strides, env, slot, mask, LOG_RHOS, dtype),)
            if columns[Q_VALUES] is not None:
                b = b + (load_steps(columns, strides, env, slot, mask, Q_VALUES, dtype),)
        if BOOTSTRAP == 1:
            for i in tl.static_range(STEPS):
                slot = wrapped(start + latest - i, capacity, WRAP)
                f = f + (load_final(columns, strides, env, slot, c[i] == TRUNCATED, pool_size).to(dtype),)
        numbers = ()
        sampled = ()
        for i in tl.static_range(STEPS):
            at_truncation = next_value
            if BOOTSTRAP == 1:
                at_truncation = f[i]
            elif BOOTSTRAP == 2:
                at_truncation = v[i]
            baseline = v[i]
            if columns[Q_VALUES] is not None:
                baseline = b[i]
            delta = temporal_difference(c[i], r[i], baseline, next_value, at_truncation, factors[0])
            later = carry
            if columns[LOG_RHOS] is not None:
                rho, trace = ratios(p[i], c[i], factors)  # not before: one register a step in flight, not two
            if columns[LOG_RHOS] is None:
                carry, _ = join(later, 0.0, delta, link(c[i], factors[1]))
            elif columns[Q_VALUES] is not None:
                carry, _ = join(later, 0.0, delta, link(c[i], trace_after))
                trace_after = trace
            else:
                carry, _ = join(later, 0.0, tl.where(c[i] == INVALID, 0.0, rho * delta), link(c[i], trace))
            next_value = v[i]
            t = latest - i
            mask = exists & (t >= 0)
            advantage = carry
            if advantages is not None:
                if columns[LOG_RHOS] is not None:
                    advantage = policy_advantage(c[i], delta, rho, later, factors[0])
                tl.store(advantages + env * strides[10][0] + t * strides[10][1], advantage, mask=mask)
            if returns is not None:
                tl.store(returns + env * strides[11][0] + t * strides[11][1], carry + baseline, mask=mask)
            numbers = numbers + (advantage,)
            sampled = sampled + (c[i] != INVALID,)
        if workspace is not None:
            count, pivot, total, squares = sums_of(numbers, sampled)
            sums = add_up(sums, count, pivot, total, squares)
    if workspace is not None:
        return publish(*sums, workspace, WARPS, 0)
    else:
        return 0
