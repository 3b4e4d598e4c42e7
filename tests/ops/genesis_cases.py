"""Cases for the Triton kernels around a step of Genesis, against PyTorch, on memory laid out as its solver's.

test_triton.py runs them. tests/envs/test_genesis.py has Genesis' own memory, and says that it is laid out so.
"""

from __future__ import annotations

import math

import pytest
import torch
from step_cases import ALL, BODY, DEVICE, LATE, TASK, TOLERANCE, WIND, agree, poison, same_result
from torch import Tensor

from pydrone.envs import Randomization
from pydrone.envs.course_task import CourseTask
from pydrone.envs.drone import DroneState, clip_actions, propeller_rpm, rotate_inverse
from pydrone.envs.fused import Solver
from pydrone.envs.genesis_arrays import GenesisArrays
from pydrone.envs.hover_task import HoverTask

THRUST, MOMENTS = 3.16e-10, (-7.94e-12, 7.94e-12, -7.94e-12, 7.94e-12)


def solver_of(num_envs: int, seed: int = 0) -> Solver:
    """Drones at random; forces that others have applied."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g).to(DEVICE)

    qpos = normal(7, num_envs) * 0.1
    qpos[3] += 1
    qpos[3:] /= qpos[3:].norm(dim=0)
    shape = (4, num_envs, 3)
    return Solver(
        qpos=qpos,
        vel=normal(6, num_envs),
        error=torch.zeros(num_envs, dtype=torch.int32, device=DEVICE),
        quat=normal(4, num_envs, 4),
        arm=normal(*shape) * 0.03,
        force=normal(*shape) * 1e-3,
        torque=normal(*shape) * 1e-5,
        base_pos=normal(num_envs, 3),
        base_com=normal(num_envs, 3),
        base_force=normal(num_envs, 3),
        base_torque=normal(num_envs, 3),
    )


def arrays_of(solver: Solver) -> GenesisArrays:
    """Without a scene: what reads and writes memory alone."""
    arrays = GenesisArrays.__new__(GenesisArrays)
    arrays.solver, arrays.thrust, arrays.moments = solver, THRUST, MOMENTS
    return arrays


def tasks_of(num_envs: int, ranges: Randomization | None, task_type: type = HoverTask, **config) -> list[HoverTask]:
    """The same task in PyTorch and by the kernel, whose outputs start as NaN."""
    made = [
        task_type(num_envs, DEVICE, 3, task_type.config_type(**config), ranges, fused=fused) for fused in (False, True)
    ]
    poison(made[1])
    return made


def randomizers_agree(tasks: list[HoverTask]) -> None:
    for name in ("_drawn", "wind", "_history", "_rpm"):
        expected, found = (getattr(task.randomizer, name) for task in tasks)
        assert torch.equal(expected.isnan(), found.isnan()), name
        agree(expected.nan_to_num(), found.nan_to_num(), name)


@pytest.mark.parametrize(
    ("num_envs", "ranges"),
    [(1, None), (17, None), (17, BODY), (17, LATE), (17, WIND), (130, {**BODY, **LATE, **WIND})],
    ids=["one", "plain", "body", "late", "wind", "all"],
)
def test_forces(num_envs, ranges):
    tasks = tasks_of(num_envs, Randomization(**ranges) if ranges else None)
    g = torch.Generator().manual_seed(1)
    for step in range(3):
        found, before = solver_of(num_envs, step), solver_of(num_envs, step)
        actions = torch.randn(num_envs, 4, generator=g).to(DEVICE)
        actions[step % num_envs, step] = (math.nan, math.inf, -math.inf)[step]
        tasks[1].fused.propel(tasks[1], actions, found, THRUST, MOMENTS)
        drawn, clipped = tasks[0].randomizer, clip_actions(actions)
        rpm = propeller_rpm(clipped, tasks[0].config) if drawn is None else drawn.propeller_rpm(clipped)
        force, torque = arrays_of(before).wrench(rpm.nan_to_num(tasks[0].config.hover_rpm))
        before.force.add_(force), before.torque.add_(torque)
        if drawn is not None:
            arrays_of(before).wind(drawn.wind)
            randomizers_agree(tasks)
        for name, expected, got in zip(Solver._fields, before, found, strict=True):
            limit = TOLERANCE / 10 * expected.abs().max()
            assert (expected - got).abs().max() <= limit, name


@pytest.mark.parametrize("ranges", [None, ALL], ids=["plain", "all"])
def test_the_task_on_a_solver(ranges):
    kind = CourseTask if ranges else HoverTask
    tasks = tasks_of(17, ranges, kind, max_episode_length=3, **TASK)
    for step in range(4):
        solver = solver_of(17, step)
        solver.qpos[:3] += tasks[0].target.t()
        solver.error[step] = 4
        solver.vel[1, 5] = math.nan
        actions = torch.randn(17, 4, generator=torch.Generator().manual_seed(step)).to(DEVICE)
        rows = arrays_of(solver).rows()
        pos, quat, vel, ang_vel = rows.split((3, 4, 3, 3), dim=1)
        assert rows[step].isnan().all() and rows[:, 7:].isfinite().sum() == 16 * 6 - 1
        before = Solver(*(x.clone() for x in solver))
        for task in tasks:
            task.draw()
        expected = _without_draw(tasks[0], DroneState(pos, quat, rotate_inverse(quat, vel), ang_vel), actions)
        found = tasks[1].fused(tasks[1], solver, actions)
        assert found.dones[[step, 5]].all()
        _same(expected, found)
        ended = found.dones
        first = tasks[0].initial_states().t()
        assert torch.equal(solver.qpos, torch.where(ended, first[:7], before.qpos))
        assert torch.equal(solver.vel.nan_to_num(9), torch.where(ended, first[7:13], before.vel).nan_to_num(9))
        assert torch.equal(solver.error, before.error.masked_fill(ended, 0))
        assert all(torch.equal(*pair) for pair in zip(solver[3:], before[3:], strict=True))
        if ranges:
            randomizers_agree(tasks)


def _without_draw(task: HoverTask, state: DroneState, actions: Tensor):
    task.draw, draw = lambda: None, task.draw
    try:
        return task.step(state, clip_actions(actions))
    finally:
        task.draw = draw


def _same(expected, found) -> None:
    """Final observations of drones without a state are NaN in both."""
    assert torch.equal(expected.final_obs.isnan(), found.final_obs.isnan())
    same_result(
        expected._replace(final_obs=expected.final_obs.nan_to_num()),
        found._replace(final_obs=found.final_obs.nan_to_num()),
    )
