"""Cases for the kernels of the quadrotor's and the tasks' steps, against PyTorch: test_steps.py runs them by the native
library, test_triton.py by Triton."""

from __future__ import annotations

import math
import os

import pytest
import torch
from torch import Tensor

from pydrone.envs import Randomization
from pydrone.envs.course_task import CourseTask
from pydrone.envs.drone import DroneState, clip_actions
from pydrone.envs.hover_task import HoverConfig, HoverTask
from pydrone.envs.quadrotor import Quadrotor, QuadrotorCourse
from pydrone.ppo.presets import PRESETS
from pydrone.report.evaluation import fly

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda"
#: compiled by Triton, code approximates divisions, roots and powers of 2 in the last bits
TOLERANCE = 1e-5 if DEVICE == "cpu" else 1e-4
BODY = {"mass": (0.8, 1.2), "inertia": (0.7, 1.4), "thrust": (0.9, 1.1)}
LATE = {"motor_lag": (0.0, 0.05), "latency": (0, 2)}
WIND = {"wind": (0.0, 0.05)}
NOISE = {"pos_noise": (0.0, 0.01), "att_noise": (0.01, 0.02), "vel_noise": (0.05, 0.05), "gyro_noise": (0.1, 0.2)}
ALL = Randomization(**BODY, **LATE, **WIND, **NOISE)
INITIAL = {"init_tilt": 60.0, "init_velocity": 1.5, "init_angular_velocity": 3.0}
TASK = {"hold": 0.02, "weight_near": 2.0, "max_tilt": 50.0, **INITIAL}


@pytest.fixture(autouse=True)
def kernel() -> None:
    """Triton's kernel; test_steps.py has another fixture of this name."""
    if not INTERPRETED and not torch.cuda.is_available():
        raise RuntimeError("no CUDA device: set TRITON_INTERPRET=1")


def pair(env_type: type = Quadrotor, num_envs: int = 5, **options) -> tuple[Quadrotor, Quadrotor]:
    """The same environment in PyTorch and by the kernel, whose outputs start as NaN."""
    plain, fused = (env_type(num_envs, DEVICE, seed=1, fused=wanted, **options) for wanted in (False, True))
    assert plain.task.fused is None and fused.task.not_fused is None
    poison(fused.task)
    return plain, fused


def poison(task: HoverTask) -> None:
    made, out = task.fused, task.fused._out
    for x in (out.obs, out.final_obs, out.rewards, out.log, *(() if made._scratch is None else made._scratch[:1])):
        x.fill_(math.nan)
    out.dones.fill_(True), out.truncated.fill_(True)


def scatter(*envs: Quadrotor) -> None:
    """Drones near their targets, moving and turning, so that some reach them and some tilt too far."""
    g = torch.Generator().manual_seed(2)
    n = envs[0].num_envs

    def normal(width: int, scale: float) -> Tensor:
        return (scale * torch.randn(n, width, generator=g)).to(DEVICE)

    off, turn, vel, spin = normal(3, 0.08), normal(4, 0.3), normal(3, 0.5), normal(3, 2.0)
    for env in envs:
        env.pos.copy_(env.task.target + off)
        env.quat.add_(turn).div_(env.quat.norm(dim=1, keepdim=True))
        env.vel.copy_(vel), env.ang_vel.copy_(spin)


def agree(wanted: Tensor, got: Tensor, name: str) -> None:
    assert wanted.dtype == got.dtype and wanted.shape == got.shape, name
    wanted, got = wanted.double(), got.double()
    assert got.isfinite().all(), name
    if got.numel():
        assert (wanted - got).abs().max() <= TOLERANCE * max(1.0, wanted.abs().max().item()), name


def same_result(expected, found) -> None:
    for name in ("obs", "rewards", "dones", "truncated", "final_obs"):
        agree(getattr(expected, name), getattr(found, name), name)
    assert found.valid is None and list(expected.log) == list(found.log)
    for name, x in expected.log.items():
        agree(x, found.log[name], name)


def same_state(expected: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    """Everything but what PyTorch's operations keep for themselves in a step."""
    assert expected.keys() == found.keys()
    for name in expected:
        if name.split(".")[-1] not in ("_step", "_draw", "_ended"):
            agree(expected[name], found[name], name)


def compare(envs: tuple[Quadrotor, Quadrotor], steps: int, scale: float = 0.4) -> int:
    """Steps both with the same actions; returns how many episodes ended."""
    g, ended = torch.Generator().manual_seed(0), 0
    for _ in range(steps):
        actions = (scale * torch.randn(envs[0].num_envs, 4, generator=g)).to(DEVICE)
        expected, found = (env.step(actions) for env in envs)
        same_result(expected, found)
        same_state(*(env.state_dict() for env in envs))
        ended += int(found.dones.sum())
    return ended


@pytest.mark.parametrize("steps", [15, pytest.param(100, marks=pytest.mark.slow)])
def test_steps_with_resets(steps):
    envs = pair(max_episode_length=17)
    assert torch.equal(*(env.reset() for env in envs))
    for env in envs:
        env.randomize_episode_lengths()
    assert compare(envs, steps) >= steps // 4


@pytest.mark.parametrize(
    ("env_type", "ranges", "options"),
    [
        (QuadrotorCourse, {}, {}),
        (QuadrotorCourse, {}, {"resample_targets": False, "substeps": 1}),
        (Quadrotor, {}, {"hold": 0.02, "max_episode_length": 3}),
        (Quadrotor, {}, {"weight_near": 2.0, "resample_targets": False}),
        (Quadrotor, {}, {"max_tilt": 50.0, "substeps": 3}),
        (Quadrotor, {}, INITIAL),
        (Quadrotor, NOISE, INITIAL),
        (Quadrotor, {}, PRESETS["hover"].settings["task"] | {"max_episode_length": 2}),
        (Quadrotor, BODY, {}),
        (Quadrotor, LATE, {}),
        (Quadrotor, WIND, {}),
        (Quadrotor, NOISE, {}),
        (QuadrotorCourse, ALL, TASK),
    ],
    ids=[
        "course",
        "course-stays",
        "hold",
        "near",
        "tilt",
        "initial",
        "initial-noise",
        "preset",
        "body",
        "late",
        "wind",
        "noise",
        "all",
    ],
)
def test_every_option(env_type, ranges, options):
    ranges = ranges if isinstance(ranges, Randomization) else Randomization(**ranges)
    envs = pair(env_type, 7, randomization=ranges, **{"max_episode_length": 2, **options})
    scatter(*envs)
    assert compare(envs, 3) >= 7


def test_several_programs_and_equal_runs():
    found = []
    for _ in range(2):
        envs = pair(num_envs=130, max_episode_length=2)
        scatter(*envs)
        compare(envs, 2)
        log = envs[1].step(torch.zeros(130, 4, device=DEVICE)).log
        assert all(x.isfinite() for x in log.values())
        found.append((envs[1].state_dict(), log))
        scratch = envs[1].task.fused._scratch
        assert scratch is None or scratch.ticket.item() == 0
    for one, other in zip(*found, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_one_drone_and_strided_actions():
    plain, fused = pair(num_envs=1)
    actions = torch.full((4, 2), 0.1, device=DEVICE)[:, :1].t()
    same_result(plain.step(actions), fused.step(actions))


@pytest.mark.parametrize("ranges", [None, Randomization(latency=(1, 2), motor_lag=(0.01, 0.05))])
def test_what_is_not_finite_ends_its_own_episode_alone(ranges):
    envs = pair(QuadrotorCourse, randomization=ranges, max_episode_length=3)
    for t in range(4):
        actions = torch.linspace(-0.2, 0.2, 20).view(5, 4)
        if t in (2, 3):  # at 2 also the time limit
            actions[1, 2], actions[2, 0], actions[3, 3] = math.nan, math.inf, -math.inf
            for env in envs:
                env.vel[4, 1] = math.nan
        expected, found = (env.step(actions.to(DEVICE)) for env in envs)
        assert torch.equal(found.dones, expected.dones) and torch.equal(found.truncated, expected.truncated)
        agree(expected.obs, found.obs, "obs"), agree(expected.rewards, found.rewards, "rewards")
        assert torch.equal(expected.final_obs.isnan(), found.final_obs.isnan())
        for name, x in expected.log.items():
            agree(x, found.log[name], name)
        if t in (2, 3):
            assert not found.truncated[1:].any()
            assert found.dones.tolist() == [t == 2, True, True, True, True]
            assert found.log["non_finite"].item() == pytest.approx(0.8)
        same_state(*(env.state_dict() for env in envs))


@pytest.mark.parametrize("ranges", [None, ALL], ids=["plain", "all"])
def test_the_task_alone_on_rows_of_a_simulator(ranges):
    config = {"max_episode_length": 3, **TASK}
    config = {"config": CourseTask.config_type(**config) if ranges else HoverConfig(**config)}
    tasks = [
        (CourseTask if ranges else HoverTask)(6, DEVICE, seed=3, randomization=ranges, fused=fused, **config)
        for fused in (False, True)
    ]
    poison(tasks[1])
    g = torch.Generator().manual_seed(0)
    for _ in range(3):
        rows = torch.randn(6, 13, generator=g).to(DEVICE) * 0.1
        rows[:, :3] += tasks[0].target
        rows[:, 3] += 1
        rows[:, 3:7] /= rows[:, 3:7].norm(dim=1, keepdim=True)
        actions = torch.randn(6, 4, generator=g).to(DEVICE)
        pos, quat, _, ang_vel = rows.split((3, 4, 3, 3), dim=1)
        before = rows.clone()
        results = []
        for task in tasks:
            if ranges:
                task.randomizer.propeller_rpm(clip_actions(actions))
            state = DroneState(pos, quat, rows[:, 7:10].contiguous(), ang_vel)
            results.append(task.step(state, clip_actions(actions)))
        same_result(*results)
        assert torch.equal(rows, before), "the simulator resets its drones"
        for name in ("target", "last_pos", "last_actions", "age", "held"):
            agree(getattr(tasks[0], name), getattr(tasks[1], name), name)
        if ranges:
            for name in ("_drawn", "wind", "_history", "_rpm"):
                agree(getattr(tasks[0].randomizer, name), getattr(tasks[1].randomizer, name), name)


def test_flights_are_watched():
    """Whoever watches a task's steps sees the drones before their reset: physics in PyTorch, the task's kernel."""
    envs = pair(num_envs=3, max_episode_length=5)
    seen = [fly(env, lambda obs: obs[:, :4] * 0.5, seed=4, traced=2) for env in envs]
    agree(seen[0].returns, seen[1].returns, "returns")
    assert torch.equal(seen[0].length, seen[1].length)
    agree(seen[0].paths.pos, seen[1].paths.pos, "paths")
