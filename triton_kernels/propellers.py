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
def take_off(target, row, mask, x, y, z):
    """Subtracts a vector, since Genesis' arrays hold forces negated."""
    ox, oy, oz = load3(target, row, mask)
    store3(target, row, mask, (ox - x, oy - y, oz - z))


@triton.jit(do_not_specialize=["num_envs"])
def propel_kernel(actions, varied, solver, c, thrust, moments, num_envs, BLOCK: tl.constexpr):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = row < num_envs
    a0, a1, a2, a3 = load4(actions, row, live)
    a = (clipped(a0), clipped(a1), clipped(a2), clipped(a3))
    rpm = propeller_rpm(a, row, live, varied, c, num_envs)
    if varied is not None:
        tl.debug_barrier()  # no thread stores a row of the history or the speeds that another one has yet to load
        if varied.rpm is not None:
            store4(varied.rpm, row, live, rpm)
        if varied.history is not None:
            pass_on(varied, a, row, live, row < 0, num_envs)
        bx, by, bz = load3(varied.wind, row, live)
        px, py, pz = load3(solver.base_pos, row, live)
        ox, oy, oz = load3(solver.base_com, row, live)
        tx, ty, tz = cross(px - ox, py - oy, pz - oz, bx, by, bz)
        take_off(solver.base_force, row, live, bx, by, bz)
        take_off(solver.base_torque, row, live, tx, ty, tz)
    for k in tl.static_range(4):
        square = rpm[k] * rpm[k]
        if varied is not None:
            square *= tl.load(varied.drawn + row * DRAWN + THRUST + k, mask=live, other=1.0)
        square = tl.where(square == square, square, c.hover_rpm * c.hover_rpm)
        at = k * num_envs + row
        w, x, y, z = load4(solver.quat, at, live)
        length = w * w + x * x + y * y + z * z
        lift, turn = square * thrust / length, square * moments[k] / length
        ux, uy, uz = 2 * (x * z + w * y), 2 * (y * z - w * x), w * w - x * x - y * y + z * z
        fx, fy, fz = ux * lift, uy * lift, uz * lift
        ax, ay, az = load3(solver.arm, at, live)
        tx, ty, tz = cross(ax, ay, az, fx, fy, fz)
        take_off(solver.force, at, live, fx, fy, fz)
        take_off(solver.torque, at, live, tx + ux * turn, ty + uy * turn, tz + uz * turn)


def propel(actions, varied, solver, constants, thrust, moments) -> None:
    """Adds the forces of a step to the solver's, see :mod:`pydrone.envs.fused`."""
    num_envs = len(actions)
    with on_device_of(actions):
        propel_kernel[(programs(num_envs),)](
            actions, varied, solver, constants, thrust, moments, num_envs,
            BLOCK=BLOCK, num_warps=WARPS, enable_fp_fusion=True,
        )  # fmt: skip
