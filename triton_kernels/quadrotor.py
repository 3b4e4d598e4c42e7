"""A step of the hover and course tasks in one launch, and the quadrotor's physics in the same one.

A program takes a block of drones, one a thread, with all of a drone's numbers in registers. What it computes is
specified by :mod:`pydrone.envs.hover_task`, ``course_task``, ``randomizer`` and ``quadrotor``, which name the terms;
the tuples of arguments are described in :mod:`pydrone.envs.fused`. Random numbers come from outside, a row a drone.
The sums of the log are stored by each program, and the last one to finish adds them in a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .launch import clamp, on_device_of, take_ticket
from .vectors import (
    INF,
    angle,
    columns,
    cross,
    finite_or_0,
    load3,
    load4,
    norm3,
    select3,
    select4,
    store3,
    store4,
)

# Drones a program; a warp has 32. Few, so that 8192 drones occupy all multiprocessors: a step is bound by latency.
BLOCK, WARPS = 64, 2
SUMS = 16  # columns of a program's sums, the first ones those of pydrone.envs.fused.LOG

# Columns of Randomizer's draws.
DRAWN, MASS, INERTIA, THRUST, LAG, LATENCY, WIND, NOISE = (tl.constexpr(n) for n in (13, 0, 1, 2, 6, 7, 8, 9))


@triton.jit
def rotate_inverse(w, x, y, z, vx, vy, vz):
    cx, cy, cz = cross(x, y, z, vx, vy, vz)
    dx, dy, dz = cross(x, y, z, cx, cy, cz)
    return vx + 2 * (dx - w * cx), vy + 2 * (dy - w * cy), vz + 2 * (dz - w * cz)


@triton.jit
def clipped(a):
    """An action clipped to [-1, 1]; NaN where it is NaN or infinite."""
    return tl.where(tl.abs(a) < INF, clamp(a, -1.0, 1.0), float("nan"))


@triton.jit
def propeller_rpm(a, row, live, varied, c, num_envs):
    """The propeller speeds of actions, after latency and motor lag."""
    if varied is not None:  # noqa: SIM102 (None has no history)
        if varied.history is not None:
            # what is read here was stored a step ago: the history moves on at the end of the step
            late = tl.load(varied.drawn + row * DRAWN + LATENCY, mask=live, other=0.0).to(tl.int32)
            held = live & (late > 0) & (late <= varied.latest)
            a = select4(late > 0, load4(varied.history, (late - 1) * num_envs + row, held), a)
    r0, r1 = a[0] * c.rpm_range + c.hover_rpm, a[1] * c.rpm_range + c.hover_rpm
    r2, r3 = a[2] * c.rpm_range + c.hover_rpm, a[3] * c.rpm_range + c.hover_rpm
    if varied is not None:  # noqa: SIM102
        if varied.rpm is not None:
            # without lag 2^-inf = 0
            left = tl.exp2(c.lag / tl.load(varied.drawn + row * DRAWN + LAG, mask=live, other=1.0))
            o0, o1, o2, o3 = load4(varied.rpm, row, live)
            r0, r1 = r0 + (o0 - r0) * left, r1 + (o1 - r1) * left
            r2, r3 = r2 + (o2 - r2) * left, r3 + (o3 - r3) * left
    return r0, r1, r2, r3


@triton.jit
def moved(pos, quat, vel, spin, rpm, row, live, varied, body, SUBSTEPS: tl.constexpr):
    """The quadrotor after a step at propeller speeds ``rpm``."""
    r0, r1, r2, r3 = rpm
    px, py, pz = pos
    qw, qx, qy, qz = quat
    vx, vy, vz = vel
    wx, wy, wz = spin
    s0, s1, s2, s3 = r0 * r0, r1 * r1, r2 * r2, r3 * r3
    gx, gy, gz = 0.0, 0.0, body.gravity
    dx, dy, dz = body.damping
    if varied is not None:
        drawn = varied.drawn + row * DRAWN
        s0 *= tl.load(drawn + THRUST, mask=live, other=1.0)
        s1 *= tl.load(drawn + THRUST + 1, mask=live, other=1.0)
        s2 *= tl.load(drawn + THRUST + 2, mask=live, other=1.0)
        s3 *= tl.load(drawn + THRUST + 3, mask=live, other=1.0)
    m = body.wrench
    thrust = s0 * m[0] + s1 * m[4] + s2 * m[8] + s3 * m[12]
    tx = s0 * m[1] + s1 * m[5] + s2 * m[9] + s3 * m[13]
    ty = s0 * m[2] + s1 * m[6] + s2 * m[10] + s3 * m[14]
    tz = s0 * m[3] + s1 * m[7] + s2 * m[11] + s3 * m[15]
    if varied is not None:
        mass = tl.load(drawn + MASS, mask=live, other=1.0)
        inertia = tl.load(drawn + INERTIA, mask=live, other=1.0)
        bx, by, bz = load3(varied.wind, row, live)
        thrust /= mass
        tx, ty, tz = tx / inertia, ty / inertia, tz / inertia
        weight = mass * body.mass
        gx, gy, gz = bx / weight, by / weight, gz + bz / weight
        dx, dy, dz = dx / inertia, dy / inertia, dz / inertia
    dx, dy, dz = 1.0 / (1.0 + dx), 1.0 / (1.0 + dy), 1.0 / (1.0 + dz)
    h = body.h
    ex, ey, ez = body.gyro
    for _ in range(SUBSTEPS):
        vx += h * (gx + 2 * (qx * qz + qw * qy) * thrust)
        vy += h * (gy + 2 * (qy * qz - qw * qx) * thrust)
        vz += h * (gz + 2 * (0.5 - (qx * qx + qy * qy)) * thrust)
        px, py, pz = px + h * vx, py + h * vy, pz + h * vz
        nx = (wx + h * (wy * wz * ex + tx)) * dx
        ny = (wy + h * (wz * wx * ey + ty)) * dy
        nz = (wz + h * (wx * wy * ez + tz)) * dz
        mx, my, mz = (wx + nx) * 0.5, (wy + ny) * 0.5, (wz + nz) * 0.5
        wx, wy, wz = nx, ny, nz
        a2 = (mx * mx + my * my + mz * mz) * (h * h * 0.25)
        half = ((a2 * (2.0 / 15) + 1.0 / 3) * a2 + 1) * (h * 0.5)
        mx, my, mz = mx * half, my * half, mz * half
        ux, uy, uz = cross(qx, qy, qz, mx, my, mz)
        nw = qw - (qx * mx + qy * my + qz * mz)
        nx, ny, nz = qx + ux + qw * mx, qy + uy + qw * my, qz + uz + qw * mz
        length = tl.sqrt(nw * nw + nx * nx + ny * ny + nz * nz)
        qw, qx, qy, qz = nw / length, nx / length, ny / length, nz / length
    return (px, py, pz), (qw, qx, qy, qz), (vx, vy, vz), (wx, wy, wz)


@triton.jit
def observation(pos, quat, lin_vel, ang_vel, target, row, mask, normal, std, c, WIDTH: tl.constexpr):
    """The first 13 numbers of an observation; with noise, from twelve draws of ``normal``, if ``std`` is given."""
    px, py, pz = pos
    qw, qx, qy, qz = quat
    vx, vy, vz = lin_vel
    wx, wy, wz = ang_vel
    if std is not None:
        x, y, z = load3(normal, row, mask, WIDTH)
        px, py, pz = px + x * std[0], py + y * std[0], pz + z * std[0]
        x, y, z = load3(normal + 3, row, mask, WIDTH)
        half = std[1] * 0.5
        x, y, z = x * half, y * half, z * half
        ux, uy, uz = cross(qx, qy, qz, x, y, z)
        nw = qw - (qx * x + qy * y + qz * z)
        qx, qy, qz = qx + qw * x + ux, qy + qw * y + uy, qz + qw * z + uz
        length = tl.sqrt(nw * nw + qx * qx + qy * qy + qz * qz)
        qw, qx, qy, qz = nw / length, qx / length, qy / length, qz / length
        x, y, z = load3(normal + 6, row, mask, WIDTH)
        vx, vy, vz = vx + x * std[2], vy + y * std[2], vz + z * std[2]
        x, y, z = load3(normal + 9, row, mask, WIDTH)
        wx, wy, wz = wx + x * std[3], wy + y * std[3], wz + z * std[3]
    tx, ty, tz = target
    near, fast, turning = c.pos_scale, c.lin_vel_scale, c.ang_vel_scale
    return (
        clamp((tx - px) * near, -1.0, 1.0), clamp((ty - py) * near, -1.0, 1.0), clamp((tz - pz) * near, -1.0, 1.0),
        qw, qx, qy, qz,
        clamp(vx * fast, -1.0, 1.0), clamp(vy * fast, -1.0, 1.0), clamp(vz * fast, -1.0, 1.0),
        clamp(wx * turning, -1.0, 1.0), clamp(wy * turning, -1.0, 1.0), clamp(wz * turning, -1.0, 1.0),
    )  # fmt: skip


@triton.jit
def store_row(target, row, mask, o, a):
    """Stores an observation [17] of 13 numbers and the last action."""
    tile = columns((o[0], o[1], o[2], o[3], o[4], o[5], o[6], o[7], o[8], o[9], o[10], o[11], o[12], a[0], a[1], a[2]))
    tl.store(target + row[:, None] * 17 + tl.arange(0, 16)[None, :], tile, mask=mask[:, None])
    tl.store(target + row * 17 + 16, a[3], mask=mask)


@triton.jit
def crash_and_finite(pos, quat, lin_vel, ang_vel, a, target, c, TILT: tl.constexpr):
    px, py, pz = pos
    w, x, y, z = quat
    # a sum is finite only if its terms are
    total = px + py + pz + lin_vel[0] + lin_vel[1] + lin_vel[2] + ang_vel[0] + ang_vel[1] + ang_vel[2]
    finite = tl.abs(total + (w + x + y + z + a[0] + a[1] + a[2] + a[3])) < INF
    flying = (tl.abs(target[0] - px) <= c.max_xy) & (tl.abs(target[1] - py) <= c.max_xy)
    flying = flying & (tl.abs(target[2] - pz) <= c.max_z) & (pz >= c.min_height) & finite
    if TILT:
        sine = clamp(2 * (w * y - z * x), -1.0, 1.0)
        flying = flying & (angle(2 * (w * x + y * z), 1 - 2 * (x * x + y * y)) <= c.max_tilt)
        flying = flying & (angle(sine, tl.sqrt((1 - sine) * (1 + sine))) <= c.max_tilt)
    return flying == 0, finite


@triton.jit
def reward_terms(pos, quat, ang_vel, last_pos, target, far, a, last_a, crash, c, NEAR: tl.constexpr):
    px, py, pz = pos
    w, x, y, z = quat
    lx, ly, lz = last_pos
    tx, ty, tz = target
    gain = (px - lx) * (2 * tx - px - lx) + (py - ly) * (2 * ty - py - ly) + (pz - lz) * (2 * tz - pz - lz)
    j0, j1, j2, j3 = a[0] - last_a[0], a[1] - last_a[1], a[2] - last_a[2], a[3] - last_a[3]
    yaw = angle(w * z + x * y, 0.5 - y * y - z * z)
    near = tl.zeros_like(px)
    if NEAR:
        near = finite_or_0(tl.exp2(far * c.near_decay) * c.weights[5])
    return (
        finite_or_0(gain * c.weights[0]),
        finite_or_0((j0 * j0 + j1 * j1 + j2 * j2 + j3 * j3) * c.weights[1]),
        finite_or_0(tl.exp2(yaw * c.yaw_decay) * c.weights[2]),
        finite_or_0(norm3(ang_vel[0], ang_vel[1], ang_vel[2]) * c.per_pi * c.weights[3]),
        tl.where(crash, c.weights[4], 0.0),
        near,
    )


@triton.jit
def new_targets(task, draws, row, live, reached, c, WIDTH: tl.constexpr, WAYPOINTS: tl.constexpr):
    """The target after one that is reached, the first one of an episode, and a course's leg."""
    at = draws.uniform + row * WIDTH
    x = tl.load(at, mask=live, other=0.0) * c.target_span[0] + c.target_low[0]
    y = tl.load(at + 1, mask=live, other=0.0) * c.target_span[1] + c.target_low[1]
    z = tl.load(at + 2, mask=live, other=0.0) * c.target_span[2] + c.target_low[2]
    following, first, leg = (x, y, z), (x, y, z), reached
    if WAYPOINTS > 0:
        leg = (tl.load(task.leg + row, mask=live, other=0).to(tl.int32) + reached.to(tl.int32)) % WAYPOINTS
        wx, wy, wz = load3(task.waypoints, leg, live)
        following = (wx + x, wy + y, wz + z)
        wx, wy, wz = load3(task.waypoints, leg * 0, live)
        first = (wx + x, wy + y, wz + z)
    return following, first, leg


@triton.jit
def redrawn(column: tl.constexpr, varied, uniform, row, ended, WIDTH: tl.constexpr):
    """A column of the randomizer's draws for a new episode."""
    x = tl.load(uniform + row * WIDTH + column, mask=ended, other=0.0) * varied.span[column] + varied.low[column]
    if column == LATENCY:
        x = tl.floor(x)
    return tl.where(x > varied.high[column], varied.high[column], x)  # a product may round up


@triton.jit
def direction(normal, row, ended, WIDTH: tl.constexpr):
    """The horizontal direction of a new episode's wind."""
    x = tl.load(normal + row * WIDTH, mask=ended, other=1.0)
    y = tl.load(normal + row * WIDTH + 1, mask=ended, other=1.0)
    length = tl.sqrt(x * x + y * y)
    length = tl.where(length < 1e-6, 1e-6, length)
    return x / length, y / length


@triton.jit
def pass_on(varied, a, row, live, dones, num_envs):
    """Each place of the history takes what the one before holds, the first one ``a``; 0 where an episode ended."""
    place = varied.latest
    while place >= 0:
        x = a
        if place > 0:
            x = load4(varied.history, (place - 1) * num_envs + row, live & (dones == 0))
        store4(varied.history, place * num_envs + row, live, x)
        place -= 1


@triton.jit
def forget(varied, row, ended, zero, num_envs):
    """Nothing is on its way in a new episode."""
    place = varied.latest
    while place >= 0:
        store4(varied.history, place * num_envs + row, ended, (zero, zero, zero, zero))
        place -= 1


@triton.jit
def beginning(task, draws, row, ended, zero, c, WIDTH: tl.constexpr, INITIAL: tl.constexpr):
    """Where a new episode begins: position, quaternion, velocity in the world, angular velocity, body velocity."""
    still = (zero, zero, zero)
    pos, quat, vel, ang_vel, lin_vel = still, (zero + 1, zero, zero, zero), still, still, still
    if task.initial is None:
        pos = (zero + c.init_pos[0], zero + c.init_pos[1], zero + c.init_pos[2])
    else:
        drawn = tl.load(draws.uniform + row * WIDTH + (WIDTH - 1), mask=ended, other=0.0)
        one, at = (drawn * INITIAL).to(tl.int32), task.initial
        pos, quat, vel = load3(at, one, ended, 16), load4(at + 3, one, ended, 16), load3(at + 7, one, ended, 16)
        ang_vel, lin_vel = load3(at + 10, one, ended, 16), load3(at + 13, one, ended, 16)
    return pos, quat, vel, ang_vel, lin_vel


@triton.jit
def simulated(solver, row, live, num_envs):
    """The drones in Genesis' arrays, a row a coordinate; NaN where it could not integrate the step."""
    q, v, n = solver.qpos + row, solver.vel + row, num_envs
    bad = tl.where(tl.load(solver.error + row, mask=live, other=0) > 0, float("nan"), 0.0)
    pos = (tl.load(q, mask=live) + bad, tl.load(q + n, mask=live) + bad, tl.load(q + 2 * n, mask=live) + bad)
    quat = (
        tl.load(q + 3 * n, mask=live) + bad, tl.load(q + 4 * n, mask=live) + bad,
        tl.load(q + 5 * n, mask=live) + bad, tl.load(q + 6 * n, mask=live) + bad,
    )  # fmt: skip
    vel = (tl.load(v, mask=live) + bad, tl.load(v + n, mask=live) + bad, tl.load(v + 2 * n, mask=live) + bad)
    spin = (
        tl.load(v + 3 * n, mask=live) + bad, tl.load(v + 4 * n, mask=live) + bad, tl.load(v + 5 * n, mask=live) + bad,
    )  # fmt: skip
    return pos, quat, vel, spin


@triton.jit
def place(solver, row, ended, first, num_envs):
    """Drones whose episode ended in Genesis' arrays: 7 coordinates, 6 velocities, no error."""
    for k in tl.static_range(7):
        tl.store(solver.qpos + k * num_envs + row, first[k], mask=ended)
    for k in tl.static_range(6):
        tl.store(solver.vel + k * num_envs + row, first[7 + k], mask=ended)
    tl.store(solver.error + row, 0, mask=ended)


@triton.jit
def merge_programs(own, scratch, log, num_envs, NUM_SUMS: tl.constexpr, PARTIALS: tl.constexpr, MEANS: tl.constexpr):
    """Stores a program's sums [16]; the last program adds up all of them, and writes means and sums."""
    programs = tl.num_programs(0)
    column = tl.arange(0, NUM_SUMS)
    tl.store(scratch.partials + tl.program_id(0) * NUM_SUMS + column, own)
    if take_ticket(scratch.ticket) == programs - 1:
        # Which program is last changes from run to run; the order of the sums does not.
        sums = tl.zeros([PARTIALS, NUM_SUMS], tl.float64)
        first = 0
        while first < programs:  # not a range: with numpy 2.5, Triton 3.6's interpreter rejects a tensor as its bound
            i = first + tl.arange(0, PARTIALS)
            at = scratch.partials + i[:, None] * NUM_SUMS + column[None, :]
            sums += tl.load(at, mask=(i < programs)[:, None], other=0.0, cache_modifier=".cg")
            first += PARTIALS
        total = tl.sum(sums, 0)
        total = tl.where(column < MEANS, total / num_envs.to(tl.float64), total)
        tl.store(log + column, total.to(tl.float32))
        tl.store(scratch.ticket, 0)


@triton.jit(do_not_specialize=["num_envs"])
def step_kernel(
    drones, solver, actions, task, varied, draws, out, scratch, c, body, num_envs,
    POS: tl.constexpr, QUAT: tl.constexpr, LIN_VEL: tl.constexpr, ANG_VEL: tl.constexpr, UNIFORMS: tl.constexpr,
    NORMALS: tl.constexpr, SUBSTEPS: tl.constexpr, RESAMPLE: tl.constexpr, NEAR: tl.constexpr, TILT: tl.constexpr,
    WAYPOINTS: tl.constexpr, INITIAL: tl.constexpr, NUM_SUMS: tl.constexpr, BLOCK: tl.constexpr,
    PARTIALS: tl.constexpr,
):  # fmt: skip
    """``body`` None: ``drones`` are after the simulator's step, with body-frame velocities, and are only read.

    ``drones`` None: they are in the simulator's ``solver``, and are reset there.
    """
    PHYSICS: tl.constexpr = body is not None
    VARIED: tl.constexpr = varied is not None
    SENSES: tl.constexpr = NORMALS >= 24
    BLOWS: tl.constexpr = NORMALS % 24 != 0
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = row < num_envs
    zero = tl.zeros([BLOCK], tl.float32)
    nothing = (zero, zero, zero, zero)

    # Everything is loaded before the first store, which no load may overtake.
    if solver is not None:
        pos, quat, vel, ang_vel = simulated(solver, row, live, num_envs)
    else:
        pos, quat = load3(drones.pos, row, live, POS), load4(drones.quat, row, live, QUAT)
        vel, ang_vel = load3(drones.lin_vel, row, live, LIN_VEL), load3(drones.ang_vel, row, live, ANG_VEL)
    target, last_pos = load3(task.target, row, live), load3(task.last_pos, row, live)
    last_actions = load4(task.last_actions, row, live)
    age = tl.load(task.age + row, mask=live, other=0) + 1
    length = tl.load(task.sums + num_envs + row, mask=live, other=0.0) + 1
    gained = tl.load(task.sums + 2 * num_envs + row, mask=live, other=0.0)
    a0, a1, a2, a3 = load4(actions, row, live)
    a = (clipped(a0), clipped(a1), clipped(a2), clipped(a3))

    lin_vel = vel
    if PHYSICS:
        rpm = propeller_rpm(a, row, live, varied, c, num_envs)
        pos, quat, vel, ang_vel = moved(pos, quat, vel, ang_vel, rpm, row, live, varied, body, SUBSTEPS)
    if PHYSICS or solver is not None:
        lin_vel = rotate_inverse(quat[0], quat[1], quat[2], quat[3], vel[0], vel[1], vel[2])

    crash, finite = crash_and_finite(pos, quat, lin_vel, ang_vel, a, target, c, TILT)
    timeout = age >= c.max_age
    dones = crash | timeout
    ended = dones & live
    far = norm3(target[0] - pos[0], target[1] - pos[1], target[2] - pos[2])
    terms = reward_terms(pos, quat, ang_vel, last_pos, target, far, a, last_actions, crash, c, NEAR)
    reward = terms[0] + terms[1] + terms[2] + terms[3] + terms[4] + terms[5]
    gained += reward

    reached = far < c.at_target
    if task.held is not None:
        held = tl.where(reached, tl.load(task.held + row, mask=live, other=0) + 1, 0)
        reached = held >= c.hold_steps
        held = tl.where(reached | dones, 0, held)
    passed = zero
    if WAYPOINTS > 0:
        passed = tl.load(task.sums + 3 * num_envs + row, mask=live, other=0.0) + reached.to(tl.float32)
    # the target of a new episode must not show in the final observation of the old one
    following, first_target, leg = new_targets(
        task, draws, row, live, reached & RESAMPLE, c, UNIFORMS, WAYPOINTS
    )  # fmt: skip
    target = select3(reached & RESAMPLE, following, target)

    std, first_std, normal, first_normal = None, None, None, None
    if VARIED:
        uniform = draws.uniform + 3
        new = (
            redrawn(0, varied, uniform, row, ended, UNIFORMS), redrawn(1, varied, uniform, row, ended, UNIFORMS),
            redrawn(2, varied, uniform, row, ended, UNIFORMS), redrawn(3, varied, uniform, row, ended, UNIFORMS),
            redrawn(4, varied, uniform, row, ended, UNIFORMS), redrawn(5, varied, uniform, row, ended, UNIFORMS),
            redrawn(6, varied, uniform, row, ended, UNIFORMS), redrawn(7, varied, uniform, row, ended, UNIFORMS),
            redrawn(8, varied, uniform, row, ended, UNIFORMS), redrawn(9, varied, uniform, row, ended, UNIFORMS),
            redrawn(10, varied, uniform, row, ended, UNIFORMS), redrawn(11, varied, uniform, row, ended, UNIFORMS),
            redrawn(12, varied, uniform, row, ended, UNIFORMS),
        )  # fmt: skip
        if SENSES:
            std, first_std = load4(varied.drawn + NOISE, row, live, DRAWN), (new[9], new[10], new[11], new[12])
            normal, first_normal = draws.normal, draws.normal + 12
        if BLOWS:
            east, north = direction(draws.normal + (NORMALS - 2), row, ended, NORMALS)
    last = observation(pos, quat, lin_vel, ang_vel, target, row, live, normal, std, c, NORMALS)
    start, turned, moving, turning, body_moving = beginning(
        task, draws, row, ended, zero, c, UNIFORMS, INITIAL
    )  # fmt: skip
    # the drones from here on: those of new episodes where they begin
    pos, quat, vel = select3(dones, start, pos), select4(dones, turned, quat), select3(dones, moving, vel)
    ang_vel = select3(dones, turning, ang_vel)
    first = observation(
        pos, quat, body_moving, ang_vel, first_target, row, ended, first_normal, first_std, c, NORMALS
    )  # fmt: skip

    store_row(out.final_obs, row, live, last, a)
    f0, f1, f2, f3 = select4(dones, (first[0], first[1], first[2], first[3]), (last[0], last[1], last[2], last[3]))
    f4, f5, f6, f7 = select4(dones, (first[4], first[5], first[6], first[7]), (last[4], last[5], last[6], last[7]))
    f8, f9, f10, f11 = select4(
        dones, (first[8], first[9], first[10], first[11]), (last[8], last[9], last[10], last[11])
    )
    a = select4(dones, nothing, a)
    store_row(out.obs, row, live, (f0, f1, f2, f3, f4, f5, f6, f7, f8, f9, f10, f11,
                                   tl.where(dones, first[12], last[12])), a)  # fmt: skip
    tl.store(out.rewards + row, reward, mask=live)
    tl.store(out.dones + row, dones, mask=live)
    tl.store(out.truncated + row, timeout & (crash == 0), mask=live)
    tl.store(task.age + row, tl.where(dones, 0, age), mask=live)
    store3(task.target, row, live, select3(dones, first_target, target))
    store3(task.last_pos, row, live, pos)
    store4(task.last_actions, row, live, a)
    tl.store(task.sums + num_envs + row, tl.where(dones, 0.0, length), mask=live)
    tl.store(task.sums + 2 * num_envs + row, tl.where(dones, 0.0, gained), mask=live)
    if task.held is not None:
        tl.store(task.held + row, held, mask=live)
    if WAYPOINTS > 0:
        tl.store(task.sums + 3 * num_envs + row, tl.where(dones, 0.0, passed), mask=live)
        tl.store(task.leg + row, tl.where(dones, 0, leg).to(tl.int64), mask=live)
    if PHYSICS:
        store3(drones.pos, row, live, pos)
        store4(drones.quat, row, live, quat)
        store3(drones.lin_vel, row, live, vel)
        store3(drones.ang_vel, row, live, ang_vel)
    if solver is not None:
        place(solver, row, ended, pos + quat + vel + ang_vel, num_envs)
    if VARIED:
        for k in tl.static_range(13):
            tl.store(varied.drawn + row * DRAWN + k, new[k], mask=ended)
        if BLOWS:
            tl.store(varied.wind + row * 3, east * new[WIND], mask=ended)
            tl.store(varied.wind + row * 3 + 1, north * new[WIND], mask=ended)
        if varied.rpm is not None:
            hover = (zero + c.hover_rpm, zero + c.hover_rpm, zero + c.hover_rpm, zero + c.hover_rpm)
            if PHYSICS:
                store4(varied.rpm, row, live, select4(dones, hover, rpm))
            else:
                store4(varied.rpm, row, ended, hover)
        if varied.history is not None:
            if PHYSICS:
                pass_on(varied, a, row, live, dones, num_envs)
            else:
                forget(varied, row, ended, zero, num_envs)

    # the log: sums over the program's drones
    tile = columns((
        terms[0], terms[1], terms[2], terms[3], terms[4], terms[5], finite_or_0(far), tl.where(finite, 0.0, 1.0),
        tl.where(dones, 1.0, 0.0), tl.where(dones, length, 0.0), tl.where(dones, gained, 0.0),
        tl.where(dones, passed, 0.0), zero, zero, zero, zero,
    ))  # fmt: skip
    own = tl.sum(tl.where(live[:, None], tile, 0.0), 0)
    merge_programs(own, scratch, out.log, num_envs, NUM_SUMS, PARTIALS, 8)


def programs(num_envs: int) -> int:
    """How many programs a step takes: the rows of ``Scratch.partials``."""
    return triton.cdiv(num_envs, BLOCK)


def step(
    drones, solver, actions, task, varied, draws, out, scratch, constants, body, substeps, resample, near, tilt
) -> None:
    """A step of the task, and of the quadrotor if ``body`` is not None, see :mod:`pydrone.envs.fused`."""
    num_envs = len(actions)
    strides = (0, 0, 0, 0) if drones is None else [x.stride(0) for x in drones]
    with on_device_of(actions):
        step_kernel[(programs(num_envs),)](
            drones, solver, actions, task, varied, draws, out, scratch, constants, body, num_envs,
            *strides, UNIFORMS=draws.uniform.stride(0),
            NORMALS=0 if draws.normal is None else draws.normal.stride(0), SUBSTEPS=substeps, RESAMPLE=resample,
            NEAR=near, TILT=tilt, WAYPOINTS=0 if task.waypoints is None else len(task.waypoints),
            INITIAL=0 if task.initial is None else len(task.initial), NUM_SUMS=SUMS,
            BLOCK=BLOCK, PARTIALS=32, num_warps=WARPS, enable_fp_fusion=True,
        )  # fmt: skip
