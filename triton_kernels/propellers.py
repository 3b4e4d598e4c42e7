"""The forces of the propellers and the wind before a step of Genesis, in one launch, into its solver's arrays.

:meth:`pydrone.envs.genesis_arrays.GenesisArrays.wrench` and ``randomizer`` specify it; the tuples of arguments are
described in :mod:`pydrone.envs.fused`. A program takes a block of drones, one a thread.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .launch import on_device_of
from .quadrotor import BLOCK, DRAWN, THRUST, WARPS, clipped, pass_on, programs, propeller_rpm
from .vectors import cross, load3, load4, store3, store4


@triton.jit
def loaded(forces, torques, row, live, force, torque):
    """Force and torque in Genesis' arrays, which hold them negated, with these added."""
    fx, fy, fz = load3(forces, row, live)
    tx, ty, tz = load3(torques, row, live)
    return (fx - force[0], fy - force[1], fz - force[2]), (tx - torque[0], ty - torque[1], tz - torque[2])


@triton.jit
def of_propeller(k: tl.constexpr, rpm, row, live, varied, solver, c, thrust, moment, num_envs):
    square = rpm * rpm
    if varied is not None:
        square *= tl.load(varied.drawn + row * DRAWN + THRUST + k, mask=live, other=1.0)
    square = tl.where(square == square, square, c.hover_rpm * c.hover_rpm)
    at = k * num_envs + row
    w, x, y, z = load4(solver.quat, at, live)
    length = w * w + x * x + y * y + z * z
    length = tl.where(live, length, 1.0)
    lift, turn = square * thrust / length, square * moment / length
    ux, uy, uz = 2 * (x * z + w * y), 2 * (y * z - w * x), w * w - x * x - y * y + z * z
    fx, fy, fz = ux * lift, uy * lift, uz * lift
    ax, ay, az = load3(solver.arm, at, live)
    tx, ty, tz = cross(ax, ay, az, fx, fy, fz)
    torque = (tx + ux * turn, ty + uy * turn, tz + uz * turn)
    return loaded(solver.force, solver.torque, at, live, (fx, fy, fz), torque)


@triton.jit(do_not_specialize=["num_envs"])
def propel_kernel(actions, varied, solver, c, thrust, moments, num_envs, BLOCK: tl.constexpr):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = row < num_envs
    a0, a1, a2, a3 = load4(actions, row, live)
    a = (clipped(a0), clipped(a1), clipped(a2), clipped(a3))
    rpm = propeller_rpm(a, row, live, varied, c, num_envs)
    # Everything is loaded before the first store, which no load may overtake.
    force0, torque0 = of_propeller(0, rpm[0], row, live, varied, solver, c, thrust, moments[0], num_envs)
    force1, torque1 = of_propeller(1, rpm[1], row, live, varied, solver, c, thrust, moments[1], num_envs)
    force2, torque2 = of_propeller(2, rpm[2], row, live, varied, solver, c, thrust, moments[2], num_envs)
    force3, torque3 = of_propeller(3, rpm[3], row, live, varied, solver, c, thrust, moments[3], num_envs)
    if varied is not None:
        wind = load3(varied.wind, row, live)
        px, py, pz = load3(solver.base_pos, row, live)
        ox, oy, oz = load3(solver.base_com, row, live)
        turn = cross(px - ox, py - oy, pz - oz, wind[0], wind[1], wind[2])
        force, torque = loaded(solver.base_force, solver.base_torque, row, live, wind, turn)
        store3(solver.base_force, row, live, force)
        store3(solver.base_torque, row, live, torque)
        if varied.rpm is not None:
            store4(varied.rpm, row, live, rpm)
        if varied.history is not None:
            tl.debug_barrier()  # no thread stores a row of the history that another one has yet to load
            pass_on(varied, a, row, live, row < 0, num_envs)
    store3(solver.force, row, live, force0)
    store3(solver.torque, row, live, torque0)
    store3(solver.force, num_envs + row, live, force1)
    store3(solver.torque, num_envs + row, live, torque1)
    store3(solver.force, 2 * num_envs + row, live, force2)
    store3(solver.torque, 2 * num_envs + row, live, torque2)
    store3(solver.force, 3 * num_envs + row, live, force3)
    store3(solver.torque, 3 * num_envs + row, live, torque3)


def propel(actions, varied, solver, constants, thrust, moments) -> None:
    """Adds the forces of a step to the solver's, see :mod:`pydrone.envs.fused`."""
    num_envs = len(actions)
    with on_device_of(actions):
        propel_kernel[(programs(num_envs),)](
            actions, varied, solver, constants, thrust, moments, num_envs,
            BLOCK=BLOCK, num_warps=WARPS, enable_fp_fusion=True,
        )  # fmt: skip
