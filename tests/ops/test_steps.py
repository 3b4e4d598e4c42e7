"""The steps of the environments by the native library: step_cases.py, and what only this kernel promises."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import step_cases
import torch
from step_cases import *  # noqa: F403 (its tests and their fixture)
from step_cases import ALL, TASK, compare, pair, same_result, scatter
from torch import Tensor

from pydrone.envs.course_task import CourseTask
from pydrone.envs.drone import DroneState
from pydrone.envs.fused import NativeStep, Solver
from pydrone.envs.hover_task import HoverTask
from pydrone.envs.quadrotor import Quadrotor, QuadrotorCourse
from pydrone.ops import native

STEP = torch.ops.pydrone.task_step.default
pytestmark = pytest.mark.skipif(native.CPU_MISSING is not None, reason=f"no native library: {native.CPU_MISSING}")


@pytest.fixture(autouse=True)
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The native library's kernel, also for what is imported. Its new outputs start as NaN, or True."""
    monkeypatch.setattr(step_cases, "DEVICE", "cpu")
    monkeypatch.setattr(step_cases, "TOLERANCE", 1e-5)
    assert isinstance(Quadrotor(1, fused=True).task.fused, NativeStep)
    torch.use_deterministic_algorithms(True)  # which fills empty tensors
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("num_envs", [1, 7, 63, 64, 65, 513])
def test_any_number_of_drones(num_envs: int) -> None:
    """Blocks and vectors that are full, nearly full, and nearly empty."""
    envs = pair(QuadrotorCourse, num_envs, randomization=ALL, max_episode_length=4, **TASK)
    scatter(*envs)
    for env in envs:
        env.randomize_episode_lengths()
    assert compare(envs, 5) >= num_envs


def flight(env: Quadrotor, steps: int = 6) -> list[Tensor]:
    """What a few steps of many drones return and leave."""
    g, found = torch.Generator().manual_seed(0), []
    scatter(env)
    for _ in range(steps):
        result = env.step(0.4 * torch.randn(env.num_envs, 4, generator=g))
        found += [result.obs.clone(), result.rewards.clone(), result.dones, result.final_obs, *result.log.values()]
    return found + [x.clone() for x in env.state_dict().values()]


def test_any_number_of_threads_computes_the_same() -> None:
    """To the bit, the log's sums included; above 1024 drones, a step takes several."""
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            env = QuadrotorCourse(4500, seed=3, randomization=ALL, max_episode_length=4, fused=True, **TASK)
            found.append(flight(env))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(found[0], other, strict=True))


def test_a_drone_does_not_depend_on_those_beside_it() -> None:
    """The first of seventy drones, on the same random numbers, alone."""
    many, one = (HoverTask(n, seed=3, fused=True) for n in (70, 1))
    for _ in range(3):
        rows = torch.randn(70, 13) * 0.2
        rows[:, 3] += 1
        actions = torch.rand(70, 4) * 2 - 1
        for task in (many, one):
            task.draw = lambda: None
        one.draws[0].copy_(many.draws[0][:1])
        one.target.copy_(many.target[:1])
        wanted = many.step(DroneState(*rows.split((3, 4, 3, 3), dim=1)), actions)
        found = one.step(DroneState(*rows[:1].split((3, 4, 3, 3), dim=1)), actions[:1])
        for name in ("obs", "rewards", "dones", "truncated", "final_obs"):
            assert torch.equal(getattr(wanted, name)[:1], getattr(found, name)), name


def test_a_result_lives_on_as_those_of_pytorch() -> None:
    """All but observations and rewards, which a step overwrites: autograd finds out if it saved them."""
    env = Quadrotor(5, max_episode_length=2)
    first = env.step(torch.zeros(5, 4))
    kept = (first.dones, first.truncated, first.final_obs, *first.log.values())
    copies, weight = [x.clone() for x in kept], torch.ones(17, requires_grad=True)
    loss = (first.obs * weight).sum()
    assert env.step(torch.zeros(5, 4)).dones.all() and not first.dones.any()
    assert all(torch.equal(*pair) for pair in zip(kept, copies, strict=True))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("name", ["last_actions", "_obs"])
def test_actions_may_lie_where_the_step_writes(name: str) -> None:
    plain, fused = (Quadrotor(100, seed=2, fused=wanted) for wanted in (False, True))
    for _ in range(2):
        same_result(*(env.step(getattr(env.task, name).flatten()[:400].view(100, 4)) for env in (plain, fused)))


def test_a_state_may_lie_where_the_step_writes() -> None:
    """Drones at their targets, which move on."""
    plain, fused = (HoverTask(100, seed=2, fused=wanted) for wanted in (False, True))
    upright, still = torch.tensor([[1.0, 0, 0, 0]]).expand(100, 4), torch.zeros(100, 3)
    same_result(*(x.step(DroneState(x.target, upright, still, still), torch.zeros(100, 4)) for x in (plain, fused)))


def test_a_limit_that_is_never_reached() -> None:
    env = Quadrotor(2, max_episode_length=10**12, hold=1e9, fused=True)
    assert not env.step(torch.zeros(2, 4)).dones.any()


def test_other_dtypes_are_converted() -> None:
    rows = [torch.zeros(3, 3, dtype=torch.int64), torch.ones(3, 4), *torch.zeros(2, 3, 3)]
    results = [HoverTask(3, seed=1, fused=x).step(DroneState(*rows), torch.zeros(3, 4).half()) for x in (False, True)]
    same_result(*results)


def arguments(task_type: type = CourseTask, **changed: object) -> dict[str, object]:
    """Those of a valid call, with all options."""
    task, found = task_type(6, randomization=ALL, config=task_type.config_type(**TASK), fused=True), {}
    task.fused._operation = lambda *args: found.update(zip((x.name for x in STEP._schema.arguments), args, strict=True))
    env = QuadrotorCourse(6)
    task.fused(task, DroneState(env.pos, env.quat, env.vel, env.ang_vel), torch.zeros(6, 4), env._body)
    return found | changed


WRONG = {
    "pos": torch.zeros(5, 3),
    "quat": torch.zeros(6, 8)[:, ::2],
    "vel": torch.zeros(6, 3, dtype=torch.float64),
    "ang_vel": torch.zeros(3, 6).t(),
    "actions": torch.zeros(6, 3),
    "target": torch.zeros(6, 2),
    "last_pos": torch.zeros(18),
    "last_actions": torch.zeros(6, 3),
    "age": torch.zeros(6),
    "held": torch.zeros(6, dtype=torch.int64),
    "leg": None,
    "waypoints": torch.zeros(0, 3),
    "sums": torch.zeros(3, 6),
    "initial": torch.zeros(0, 16),
    "drawn": torch.zeros(6, 12),
    "wind": None,
    "history": torch.zeros(0, 6, 4),
    "rpm": torch.zeros(7, 4),
    "uniform": torch.zeros(6, 3),
    "normal": torch.zeros(6, 25),
    "obs": torch.zeros(6, 16),
    "final_obs": torch.zeros(5, 17),
    "rewards": torch.zeros(6, 1),
    "dones": torch.zeros(6, dtype=torch.uint8),
    "truncated": torch.zeros(5, dtype=torch.bool),
    "log": torch.zeros(16),
    "numbers": torch.zeros(89),
    "max_age": 2**31,
    "hold_steps": -1,
    "substeps": -1,
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_argument_is_named_and_nothing_written(name: str) -> None:
    given = arguments(**{name: WRONG[name]})
    before = {key: x.clone() for key, x in given.items() if isinstance(x, Tensor)}
    with pytest.raises(RuntimeError, match=rf"^{name}: expected"):
        STEP(*given.values())
    for key, x in before.items():
        torch.testing.assert_close(given[key], x, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("name", "other"), [("obs", "final_obs"), ("rewards", "log"), ("last_pos", "pos"), ("drawn", "normal")]
)
def test_shared_memory_is_refused(name: str, other: str) -> None:
    given = arguments()
    whole = torch.zeros(6 * 40)
    for key in (name, other):
        given[key] = whole[: given[key].numel()].view(given[key].shape)
    with pytest.raises(RuntimeError, match="expected memory of its own, got some shared with"):
        STEP(*given.values())


@pytest.mark.parametrize("substeps", [0, 2])
def test_opcheck(substeps: int) -> None:
    given = arguments(substeps=substeps)
    torch.use_deterministic_algorithms(False)
    assert torch.library.opcheck(STEP, tuple(given.values()), test_utils=("test_schema", "test_faketensor"))


def test_a_simulators_memory_is_refused() -> None:
    task = HoverTask(2, fused=True)
    assert isinstance(task.fused, NativeStep) and not task.fused.in_solver
    with pytest.raises(ValueError, match="state: expected the drones' rows"):
        task.fused(task, Solver(*(None,) * 11), torch.zeros(2, 4))
