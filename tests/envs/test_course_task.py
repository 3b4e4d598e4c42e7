from __future__ import annotations

import pytest
import torch

from pydrone.envs import make
from pydrone.envs.course_task import CourseConfig, CourseTask
from pydrone.envs.drone import DroneState, rotate_inverse
from pydrone.envs.quadrotor import GRAVITY, QuadrotorCourse, wrench_matrix
from pydrone.ppo.config import PPOConfig, TrainConfig
from pydrone.ppo.trainer import Trainer

pytestmark = pytest.mark.usefixtures("computed_by")

EXACT = {"target_low": (0.0,) * 3, "target_high": (0.0,) * 3}
TRIANGLE = ((1.0, 0.0, 1.0), (0.0, 1.0, 1.5), (-1.0, 0.0, 1.0))


def at(*positions: tuple[float, ...]) -> DroneState:
    n = len(positions)
    quat = torch.tensor([[1.0, 0, 0, 0]]).repeat(n, 1)
    return DroneState(torch.tensor(positions), quat, torch.zeros(n, 3), torch.zeros(n, 3))


def test_waypoints_come_in_their_order_and_round_again() -> None:
    t = CourseTask(1, config=CourseConfig(waypoints=TRIANGLE, at_target=0.2, **EXACT))
    still = torch.zeros(1, 4)
    assert t.target.tolist() == [[1, 0, 1]]
    for leg, (x, y, z) in enumerate((*TRIANGLE, *TRIANGLE)):
        assert t.leg.tolist() == [leg % 3]
        t.step(at((x, y - 0.21, z)), still)  # not near enough
        assert t.leg.tolist() == [leg % 3]
        result = t.step(at((x, y - 0.19, z)), still)
        assert not result.dones.any()
        following = torch.tensor([TRIANGLE[(leg + 1) % 3]])
        assert torch.equal(t.target, following)
        torch.testing.assert_close(result.obs[:, :3], (following - torch.tensor([[x, y - 0.19, z]])) / 3)


def test_the_step_that_passes_is_judged_by_the_waypoint_passed() -> None:
    t = CourseTask(1, config=CourseConfig(waypoints=TRIANGLE, at_target=0.3, **EXACT))
    # 10 * dt * (1 - 0.2^2) + the yaw's 1e-4
    assert t.step(at((0.8, 0, 1)), torch.zeros(1, 4)).rewards.item() == pytest.approx(0.0961, rel=1e-5)
    # the next target is (0, 1, 1.5); the drone stays at (0.8, 0, 1), so its distance stays the same
    assert t.step(at((0.8, 0, 1)), torch.zeros(1, 4)).rewards.item() == pytest.approx(1e-4, rel=1e-4)


def test_an_episode_begins_at_the_first_waypoint_and_counts_those_passed() -> None:
    t = CourseTask(2, config=CourseConfig(waypoints=TRIANGLE, max_episode_length=4, **EXACT))
    still = torch.zeros(2, 4)
    t.step(at((1, 0, 1), (0, 0, 1)), still)
    t.step(at((0, 1, 1.5), (0, 0, 1)), still)
    assert t.leg.tolist() == [2, 0]
    result = t.step(at((0, 1, 1.5), (0, 0, 0.05)), still)  # the second drone crashes without a waypoint
    assert result.dones.tolist() == [False, True]
    assert (result.log["episode/count"].item(), result.log["episode/targets"].item()) == (1, 0)
    result = t.step(at((-1, 0, 1), (0, 0, 1)), still)  # reaches a third waypoint in the step of the time-out
    assert result.truncated.tolist() == [True, False]
    assert result.log["episode/targets"].item() == 3
    assert t.leg.tolist() == [0, 0]
    assert t.target.tolist() == [[1, 0, 1]] * 2
    assert result.final_obs is not None
    # the final observation shows the next waypoint, which is the first one again
    torch.testing.assert_close(result.final_obs[0, :3], torch.tensor([2.0, 0, 0]) / 3)


def test_an_end_on_the_way_leads_back_to_the_first_waypoint() -> None:
    t = CourseTask(2, config=CourseConfig(waypoints=TRIANGLE, **EXACT))
    still = torch.zeros(2, 4)
    t.step(at((1, 0, 1), (1, 0, 1)), still)
    assert t.leg.tolist() == [1, 1]
    assert t.step(at((1, 0, 1), (1, 0, 0.05)), still).dones.tolist() == [False, True]
    assert t.leg.tolist() == [1, 0]
    assert t.target.tolist() == [[0, 1, 1.5], [1, 0, 1]]
    t.reset()
    assert t.leg.tolist() == [0, 0]
    assert t.target.tolist() == [[1, 0, 1]] * 2


def test_waypoints_are_shifted_by_the_seed() -> None:
    a, b, c = (CourseTask(500, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(a.target, b.target)
    assert not torch.equal(a.target, c.target)
    shift = a.target - torch.tensor(a.config.waypoints[0])
    assert (shift.abs() <= 0.1 + 1e-6).all()
    assert (shift.std(0) > 0.05).all()  # uniform on +-0.1: 0.058


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"waypoints": (TRIANGLE[0],)}, "waypoints: expected two or more of"),
        ({"waypoints": ((0.0, 1.0), (1.0, 0.0))}, "waypoints: expected two or more of"),
        # from 0.3 + 0.1 m before one waypoint to 0.1 m behind the other: 2.6 + 0.5 > 3
        ({"waypoints": ((1.3, 0.0, 1.0), (-1.3, 0.0, 1.0))}, r"got \(1.3, 0.0, 1.0\) to \(-1.3, 0.0, 1.0\)"),
        ({"waypoints": ((2.95, 0.0, 1.0), (1.0, 0.0, 1.0))}, r"got \(0.0, 0.0, 1.0\) to \(2.95, 0.0, 1.0\)"),
        ({"waypoints": ((0.0, 0.0, 2.0), (0.0, 0.0, 0.4))}, "2.0 m along z, at_target and shifts included"),
    ],
)
def test_courses_that_nobody_can_fly(config: dict, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        CourseConfig(**config)
    CourseConfig(waypoints=((1.2, 0.0, 1.0), (-1.2, 0.0, 1.0)))


def pilot(env: QuadrotorCourse) -> torch.Tensor:
    """Actions [N, 4] of a hand-written controller: position to attitude to propellers, from the full state."""
    accel = 3.0 * (env.task.target - env.pos) - 2.5 * env.vel
    accel = accel.clamp(-5, 5) + torch.tensor([0, 0, GRAVITY])
    body = rotate_inverse(env.quat, accel)
    up = body / body.norm(dim=-1, keepdim=True)
    # turn the body's z axis towards the desired acceleration
    turn = torch.stack((-up[:, 1], up[:, 0], torch.zeros(len(up))), dim=-1)
    torque = 150 * turn - 20 * env.ang_vel
    torque[:, 2] *= 0.1
    squares = torch.cat((body[:, 2:], torque), dim=-1) @ torch.linalg.inv(wrench_matrix().double()).float()
    rpm = squares.clamp(min=0).sqrt()
    return (rpm / env.config.hover_rpm - 1) / env.config.rpm_range


def test_the_course_can_be_flown() -> None:
    env = make("quadrotor-course", 32, seed=0, max_episode_length=1000)
    assert isinstance(env, QuadrotorCourse)
    env.reset()
    for _ in range(999):
        assert not env.step(pilot(env)).dones.any()
    result = env.step(pilot(env))
    assert result.truncated.all()
    assert result.log["episode/targets"].item() / 32 > 6  # more than a lap in 10 s
    # a drone that stays where it is passes none
    still = QuadrotorCourse(2, max_episode_length=50)
    for _ in range(50):
        result = still.step(torch.zeros(2, 4))
    assert result.log["episode/targets"].item() == 0


@pytest.mark.slow
def test_a_short_training_improves_on_the_course() -> None:
    env = make("quadrotor-course", 256, seed=1, max_episode_length=500)
    ppo = PPOConfig(learning_rate=1e-3, init_std=0.3, hidden_dims=(64, 64), gamma=0.98, entropy_coef=0.0)
    trainer = Trainer(env, TrainConfig(num_steps=64, ppo=ppo), echo=lambda line: None)
    figures = [trainer.iterate() for _ in range(40)]
    # measured: 0.39 with this seed, 0.23 with the next one
    passed = [x["env/episode/targets"] for x in figures]
    assert sum(passed[:5]) / 5 < 0.02
    assert sum(passed[-5:]) / 5 > 0.12
    assert figures[-1]["episode_length"] > 1.5 * figures[0]["episode_length"]
