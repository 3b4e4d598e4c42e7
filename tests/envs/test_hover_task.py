from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pydrone.envs.drone import DroneState, clip_actions, propeller_rpm, roll_pitch, rotate_inverse, yaw
from pydrone.envs.hover_task import (
    INITIAL_STATES,
    REWARDS,
    Constants,
    HoverConfig,
    HoverTask,
    crashed,
    initial_motion,
    observe,
    reward_terms,
)

pytestmark = pytest.mark.usefixtures("computed_by")

C = Constants.of(HoverConfig())
ONE = (1.0, 0.0, 0.0, 0.0)


def quat(axis: str, degrees: float) -> tuple[float, ...]:
    half = math.radians(degrees) / 2
    return (math.cos(half), *(math.sin(half) * (name == axis) for name in "xyz"))


def state(
    pos: tuple[float, ...] = (0, 0, 1),
    q: tuple[float, ...] = ONE,
    lin: tuple[float, ...] = (0, 0, 0),
    ang: tuple[float, ...] = (0, 0, 0),
    n: int = 1,
) -> DroneState:
    return DroneState(*(torch.tensor([part], dtype=torch.float32).repeat(n, 1) for part in (pos, q, lin, ang)))


def row(*values: float) -> Tensor:
    return torch.tensor([values], dtype=torch.float32)


def test_propeller_rpm() -> None:
    actions = clip_actions(row(0, 1, -1, 5))
    assert actions.tolist() == [[0, 1, -1, 1]]
    # (1 + 0.8 a) * 14468.429
    torch.testing.assert_close(propeller_rpm(actions, C.config), row(14468.429, 26043.172, 2893.686, 26043.172))


@pytest.mark.parametrize(
    ("q", "vec", "expected"),
    [
        (ONE, (1, 2, 3), (1, 2, 3)),
        (quat("z", 90), (1, 0, 0), (0, -1, 0)),  # nose to the left: the world's x lies to the right
        (quat("z", 90), (0, 1, 0), (1, 0, 0)),
        (quat("x", 90), (0, 0, 1), (0, 1, 0)),
        (quat("y", 90), (1, 0, 0), (0, 0, 1)),
        (quat("y", 180), (1, 2, 3), (-1, 2, -3)),
    ],
)
def test_rotate_inverse(q: tuple[float, ...], vec: tuple[float, ...], expected: tuple[float, ...]) -> None:
    torch.testing.assert_close(rotate_inverse(row(*q), row(*vec)), row(*expected), atol=1e-6, rtol=0)


@pytest.mark.parametrize("angle", [-170, -90, 0, 30, 120])
def test_angles_about_one_axis(angle: float) -> None:
    rad = torch.tensor([math.radians(angle)])
    torch.testing.assert_close(yaw(row(*quat("z", angle))), rad)
    torch.testing.assert_close(roll_pitch(row(*quat("x", angle)))[0], rad)
    if abs(angle) <= 90:
        torch.testing.assert_close(roll_pitch(row(*quat("y", angle)))[1], rad, atol=1e-3, rtol=0)


def test_angles_of_a_combined_rotation() -> None:
    # roll 10, then pitch 20, then yaw 30 degrees about the fixed axes: q = qz qy qx
    cr, sr, cp, sp, cy, sy = (f(math.radians(a / 2)) for a in (10, 20, 30) for f in (math.cos, math.sin))
    q = row(
        cr * cp * cy + sr * sp * sy,
        sr * cp * cy - cr * sp * sy,
        cr * sp * cy + sr * cp * sy,
        cr * cp * sy - sr * sp * cy,
    )
    angles = torch.stack((*roll_pitch(q), yaw(q))).flatten().rad2deg()
    torch.testing.assert_close(angles, torch.tensor([10.0, 20.0, 30.0]))


def test_observation_table() -> None:
    s = state(pos=(1.5, -0.6, 0.4), q=quat("z", 60), lin=(1.5, -6, 0.3), ang=(math.pi / 2, -2 * math.pi, 0))
    obs = observe(s, row(0, 0, 1), row(0.1, -0.2, 1, -1), C)
    expected = row(
        -0.5, 0.2, 0.2,  # (target - pos) / 3
        math.sqrt(3) / 2, 0, 0, 0.5,
        0.5, -1, 0.1,  # velocity / 3, clipped
        0.5, -1, 0,  # angular velocity / pi, clipped
        0.1, -0.2, 1, -1,
    )  # fmt: skip
    torch.testing.assert_close(obs, expected)
    assert observe(state(pos=(-9, 9, 1)), row(0, 0, 1), row(0, 0, 0, 0), C)[0, :3].tolist() == [1, -1, 0]


@pytest.mark.parametrize(
    ("name", "kwargs", "expected"),
    [
        # 10 * dt * (0.5^2 - 0.2^2)
        ("target", {"last_pos": row(0, 0, 0.5), "s": state(pos=(0, 0, 0.8))}, 0.021),
        ("target", {"last_pos": row(0, 0, 0.8), "s": state(pos=(0, 0, 0.5))}, -0.021),
        # -1e-4 * dt * (1 + 4)
        ("smooth", {"actions": row(1, 0, 0, 0), "last_actions": row(0, 2, 0, 0)}, -5e-6),
        ("yaw", {}, 1e-4),
        ("yaw", {"s": state(q=quat("z", math.degrees(0.1)))}, 1e-4 * math.exp(-1)),
        ("yaw", {"s": state(q=quat("z", math.degrees(-0.2)))}, 1e-4 * math.exp(-2)),
        ("yaw", {"s": state(q=quat("x", 50))}, 1e-4),
        # -2e-4 * dt * |(3, 4, 0)|
        ("angular", {"s": state(ang=(3 * math.pi, 4 * math.pi, 0))}, -1e-5),
        ("crash", {}, 0),
        ("crash", {"crash": torch.tensor([True])}, -0.1),
    ],
)
def test_reward_table(name: str, kwargs: dict, expected: float) -> None:
    args = {"s": state(), "last_pos": row(0, 0, 1), "target": row(0, 0, 1), "actions": row(0, 0, 0, 0)}
    args |= {"last_actions": row(0, 0, 0, 0), "crash": torch.tensor([False])} | kwargs
    terms = reward_terms(*args.values(), C)
    assert terms.shape == (5, 1)
    assert terms[REWARDS.index(name)].item() == pytest.approx(expected, rel=1e-5, abs=1e-12)


@pytest.mark.parametrize(
    ("pos", "config", "expected"),
    [
        # weight * dt * exp(-decay * distance)
        ((0, 0, 1), {"weight_near": 2.0}, 0.02),
        ((0, 0.06, 0.92), {"weight_near": 2.0}, 0.02 * math.exp(-1)),
        ((0.3, -0.4, 1), {"weight_near": 1.0, "near_decay": 4.0}, 0.01 * math.exp(-2)),
    ],
)
def test_the_reward_near_the_target(pos: tuple[float, ...], config: dict, expected: float) -> None:
    c = Constants.of(HoverConfig(**config))
    s, target, still = state(pos=pos), row(0, 0, 1), row(0, 0, 0, 0)
    paid = reward_terms(s, row(0, 0, 1), target, still, still, torch.tensor([False]), c)
    assert paid.shape == (6, 1) and REWARDS[5] == "near"
    assert paid[5].item() == pytest.approx(expected, rel=1e-5)
    without = reward_terms(s, row(0, 0, 1), target, still, still, torch.tensor([False]), C)
    assert torch.equal(paid[:5], without)


def test_the_reward_near_the_target_is_off_by_default() -> None:
    off, on = HoverTask(1, config=HoverConfig()), task(1, weight_near=1.0)
    assert "reward/near" not in off.step(state(), row(0, 0, 0, 0)).log and off.rewards == REWARDS[:5]
    result = on.step(state(pos=(0.9, -0.5, 1)), row(0, 0, 0, 0))
    near = 0.01 * math.exp(-1)
    assert result.log["reward/near"].item() == pytest.approx(near, rel=1e-5) and on.rewards == REWARDS
    # |(0.9, -0.6)|^2 - 0.1^2 = 1.16
    assert result.rewards.item() == pytest.approx(0.116 + 1e-4 + near, rel=1e-5)


NAN = float("nan")


@pytest.mark.parametrize(
    ("s", "target", "expected"),
    [
        (state(), (0, 0, 1), False),
        (state(pos=(2.99, 0, 1)), (0, 0, 1), False),
        (state(pos=(3.01, 0, 1)), (0, 0, 1), True),
        (state(pos=(3.01, 0, 1)), (1, 0, 1), False),
        (state(pos=(0, -3.01, 1)), (0, 0, 1), True),
        (state(pos=(0, 0, 2.99)), (0, 0, 1), False),
        (state(pos=(0, 0, 3.01)), (0, 0, 1), True),
        (state(pos=(0, 0, 0.11)), (0, 0, 1), False),
        (state(pos=(0, 0, 0.09)), (0, 0, 1), True),
        (state(q=quat("x", 179)), (0, 0, 1), False),  # upside down does not end the episode
        (state(pos=(NAN, 0, 1)), (0, 0, 1), True),
        (state(q=(NAN, 0, 0, 0)), (0, 0, 1), True),
        (state(lin=(0, math.inf, -math.inf)), (0, 0, 1), True),
        (state(ang=(0, 0, math.inf)), (0, 0, 1), True),
    ],
)
def test_crash_table(s: DroneState, target: tuple[float, ...], expected: bool) -> None:
    assert crashed(s, row(*target), C).tolist() == [expected]


@pytest.mark.parametrize(("axis", "angle", "expected"), [("x", 44, 0), ("x", -46, 1), ("y", 46, 1), ("z", 90, 0)])
def test_tilt_limit(axis: str, angle: float, expected: bool) -> None:
    limited = Constants.of(HoverConfig(max_tilt=45.0))
    assert crashed(state(q=quat(axis, angle)), row(0, 0, 1), limited).tolist() == [bool(expected)]


def task(n: int = 4, **config: float) -> HoverTask:
    t = HoverTask(n, seed=1, config=HoverConfig(**config))
    t.target.copy_(torch.tensor([0.9, -0.6, 1.0]))  # not reached by standing still
    return t


def test_reset_observation() -> None:
    t = HoverTask(1000, seed=0)
    obs = t.reset()
    assert (t.target[:, :2].abs() <= 1).all()
    assert t.target[:, 0].std() > 0.5  # uniform on [-1, 1]: 0.577
    assert (t.target[:, 2] == 1).all()
    torch.testing.assert_close(obs[:, :2], t.target[:, :2] / 3)
    assert obs[0, 2:].tolist() == [0, 1] + [0] * 13


def test_step_running() -> None:
    t = task(1)
    t.step(state(pos=(0, 0, 1)), row(0, 0, 0, 0))
    actions = row(0.5, 0, 0, 0)
    s = state(pos=(0.3, 0, 1))
    result = t.step(s, actions)
    # |(0.9, -0.6)|^2 - |(0.6, -0.6)|^2 = 0.45; a - a_last = 0.5
    expected = 0.1 * 0.45 - 1e-6 * 0.25 + 1e-4
    assert result.rewards.item() == pytest.approx(expected, rel=1e-5)
    assert result.dones.tolist() == result.truncated.tolist() == [False]
    torch.testing.assert_close(result.obs, observe(s, row(0.9, -0.6, 1), actions, C))
    assert result.log["distance"].item() == pytest.approx(math.hypot(0.6, 0.6), rel=1e-5)
    assert result.log["reward/target"].item() == pytest.approx(0.045, rel=1e-5)
    # the next step starts from here: standing still gives no reward
    assert t.step(s, actions).rewards.item() == pytest.approx(1e-4, rel=1e-4)


def test_end_is_judged_and_observed_before_the_reset() -> None:
    t = task(2, max_episode_length=10)
    t.age.fill_(9)  # the next step is the time-out
    s = state(pos=(0.5, -0.6, 0.5), q=quat("z", 20), lin=(0.3, 0, 0), ang=(0, 1, 0), n=2)
    s.pos[1, 2] = 0.05  # the second drone hits the ground in the same step
    actions = torch.full((2, 4), 0.25)
    target = t.target.clone()
    result = t.step(s, actions)
    assert result.dones.tolist() == [True, True]
    assert result.truncated.tolist() == [True, False]
    assert result.final_obs is not None
    torch.testing.assert_close(result.final_obs, observe(s, target, actions, C))
    # rewards for the positions before the reset: |(0.9, -0.6)|^2 - |(0.4, 0, 0.5)|^2 and |(0.4, 0, 0.95)|^2
    moved = torch.tensor([1.17 - 0.41, 1.17 - 1.0625 - 1.0])  # a crash weighs 10, as does a squared metre
    other = 1e-4 * math.exp(-10 * math.radians(20)) - 1e-6 * 4 * 0.0625 - 2e-6 / math.pi
    torch.testing.assert_close(result.rewards, 0.1 * moved + other)
    # the next observation belongs to a new episode
    assert (result.obs[:, 13:] == 0).all()
    assert (t.last_actions == 0).all()
    assert result.obs[:, 2:13].tolist() == [[0, 1] + [0] * 9] * 2
    torch.testing.assert_close(result.obs[:, :2], t.target[:, :2] / 3)
    assert (t.target != target).any()
    assert t.age.tolist() == [0, 0]
    # the reward of its first step is relative to the start position
    torch.testing.assert_close(t.step(state(n=2), torch.zeros(2, 4)).rewards, torch.full((2,), 1e-4))


def test_time_out_at_the_limit_and_not_later() -> None:
    t = task(1, max_episode_length=3)
    ends = [tuple(flag.item() for flag in t.step(state(), row(0, 0, 0, 0))[2:4]) for _ in range(6)]
    assert ends == [(False, False), (False, False), (True, True)] * 2


def test_only_ended_environments_start_anew() -> None:
    t = task(3)
    s = state(pos=(0.2, 0, 1), n=3)
    s.pos[1, 0] = 5
    before = t.target.clone()
    result = t.step(s, torch.full((3, 4), 0.5))
    assert result.dones.tolist() == [False, True, False]
    assert t.age.tolist() == [1, 0, 1]
    assert (t.last_actions[:, 0] == torch.tensor([0.5, 0, 0.5])).all()
    torch.testing.assert_close(t.last_pos, torch.tensor([[0.2, 0, 1], [0, 0, 1], [0.2, 0, 1]]))
    assert (t.target == before).all(dim=1).tolist() == [True, False, True]


def test_a_reached_target_moves_on() -> None:
    t = task(2)
    t.target[0] = torch.tensor([0.05, 0.05, 1.0])  # 0.07 m away
    t.target[1] = torch.tensor([0.08, 0.08, 1.0])  # 0.11 m away
    before = t.target.clone()
    s = state(n=2)
    result = t.step(s, torch.zeros(2, 4))
    assert not result.dones.any()
    assert (t.target == before).all(dim=1).tolist() == [False, True]
    torch.testing.assert_close(result.obs, observe(s, t.target, torch.zeros(2, 4), C))
    # this step's reward uses the old target, the next step's the new one; at rest neither has any progress
    torch.testing.assert_close(result.rewards, torch.full((2,), 1e-4))
    torch.testing.assert_close(t.step(s, torch.zeros(2, 4)).rewards, torch.full((2,), 1e-4))


def test_final_observation_of_a_target_reached_at_the_end_shows_the_moved_target() -> None:
    t = task(1, max_episode_length=1)
    t.target.copy_(row(0.01, 0, 1))
    result = t.step(state(), row(0, 0, 0, 0))
    assert result.truncated.tolist() == [True]
    assert result.final_obs is not None
    assert result.final_obs[0, :2].norm() > 0.01  # not the old target, 0.003


def test_a_diverged_simulation_is_a_crash_with_finite_rewards() -> None:
    t = task(1)
    s = state(pos=(NAN, NAN, NAN), q=(NAN,) * 4, lin=(NAN,) * 3, ang=(NAN,) * 3)
    result = t.step(s, row(0, 0, 0, 0))
    assert result.dones.tolist() == [True]
    assert result.truncated.tolist() == [False]
    assert result.rewards.item() == pytest.approx(-0.1)
    assert torch.isfinite(result.obs).all()
    assert t.step(state(), row(0, 0, 0, 0)).rewards.item() == pytest.approx(1e-4)


def test_episode_log() -> None:
    t = task(2, max_episode_length=3)
    logs = [t.step(state(n=2), torch.zeros(2, 4)).log for _ in range(3)]
    assert [log["episode/count"].item() for log in logs] == [0, 0, 2]
    assert logs[2]["episode/length"].item() == 6
    assert logs[2]["episode/return"].item() == pytest.approx(6e-4, rel=1e-5)


def test_randomized_ages_spread_time_outs() -> None:
    t = task(4096, max_episode_length=8)
    t.randomize_ages()
    counts = torch.bincount(t.age, minlength=8)
    assert len(counts) == 8
    assert (counts > 4096 / 8 * 0.7).all()
    ended = [t.step(state(n=4096), torch.zeros(4096, 4)).truncated for _ in range(8)]
    assert torch.stack(ended).sum(0).eq(1).all()
    assert ended[0].sum() == counts[7]


def test_seed_decides_targets() -> None:
    a, b, c = (HoverTask(8, seed=seed).target.clone() for seed in (1, 1, 2))
    torch.manual_seed(123)
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_made_and_stepped_under_inference_mode() -> None:
    with torch.inference_mode():
        t = task(2)
        t.step(state(n=2), torch.zeros(2, 4))
    t.step(state(n=2), torch.zeros(2, 4))


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"dt": 0}, "dt: expected a positive number of seconds, got 0"),
        ({"max_episode_length": 0}, "max_episode_length: expected at least 1 step, got 0"),
        ({"init_tilt": 181.0}, "init_tilt: expected at most 180 degrees, got 181.0"),
        ({"init_tilt": -1.0}, "init_tilt: expected a finite number of at least 0, got -1.0"),
        ({"init_velocity": math.inf}, "init_velocity: expected a finite number of at least 0, got inf"),
        ({"init_angular_velocity": NAN}, "init_angular_velocity: expected a finite number of at least 0, got nan"),
        ({"hold": -0.5}, "hold: expected a finite number of at least 0, got -0.5"),
        ({"weight_near": -1.0}, "weight_near: expected a finite number of at least 0, got -1.0"),
        ({"weight_near": NAN}, "weight_near: expected a finite number of at least 0, got nan"),
        ({"near_decay": 0.0}, "near_decay: expected a finite number above 0, got 0.0"),
    ],
)
def test_config_errors(config: dict, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        HoverConfig(**config)


def test_num_envs_error() -> None:
    with pytest.raises(ValueError, match="num_envs: expected at least 1, got 0"):
        HoverTask(0)


def test_a_target_that_stays() -> None:
    """Reached or not, it stays until the episode ends, and observations keep showing it."""
    task = HoverTask(2, seed=3, config=HoverConfig(resample_targets=False, max_episode_length=3))
    first = task.target.clone()
    there = DroneState(first.clone(), *state(n=2)[1:])
    for _ in range(2):
        result = task.step(there, torch.zeros(2, 4))
        assert torch.equal(task.target, first) and torch.equal(result.obs[:, :3], torch.zeros(2, 3))
    task.step(there, torch.zeros(2, 4))
    assert (task.target != first).any(dim=1).all()
    # with resampling on, it moves in the next step
    task.resample_targets = True
    second = task.target.clone()
    task.step(DroneState(second.clone(), *state(n=2)[1:]), torch.zeros(2, 4))
    assert (task.target != second).any(dim=1).all()


def test_a_target_moves_on_once_it_was_held() -> None:
    """Three consecutive steps within 0.1 m; leaving, or a new episode, restarts the count."""
    t = task(3, hold=0.03)
    assert t.held is not None
    first = t.target.clone()
    inside, outside = (first + torch.tensor([x, 0, 0]) for x in (0.09, 0.11))

    def step(*pos: Tensor) -> list[bool]:
        before = t.target.clone()
        t.step(DroneState(torch.stack(pos), *state(n=3)[1:]), torch.zeros(3, 4))
        return (t.target != before).any(dim=1).tolist()

    floor = torch.tensor([0.9, -0.6, 0.0])
    assert step(inside[0], inside[1], inside[2]) == [False] * 3
    assert step(inside[0], outside[1], inside[2]) == [False] * 3
    assert t.held.tolist() == [2, 0, 2]
    assert step(inside[0], inside[1], floor) == [True, False, True]  # the third crashed: a new episode
    assert t.held.tolist() == [0, 1, 0]
    assert step(t.target[0], inside[1], t.target[2]) == [False] * 3
    assert step(t.target[0], inside[1], t.target[2]) == [False, True, False]
    assert t.held.tolist() == [2, 0, 2]
    t.reset()
    assert t.held.tolist() == [0, 0, 0]
    # a time-out at the target also begins a new episode
    t.age.fill_(t.config.max_episode_length - 1)
    step(*t.target.clone())
    assert t.held.tolist() == [0, 0, 0]


@pytest.mark.parametrize("hold", [0.0, 0.01])
def test_without_a_time_to_hold_nothing_is_counted(hold: float) -> None:
    t = task(1, hold=hold)
    target = t.target.clone()
    t.step(DroneState(target.clone(), *state()[1:]), torch.zeros(1, 4))
    assert t.held is None and (t.target != target).any()


def test_initial_motion_by_hand() -> None:
    """By half of the tilt about y, a quarter of the way around from x; about x without a direction."""
    uniform = torch.tensor([[0.25, 0.5, 0.5, 0.0, 1.0, 0.75, 0.5, 0.0], [0.0, 1.0, *[0.5] * 6]], dtype=torch.float64)
    quat, lin_vel, ang_vel = initial_motion(uniform, math.pi / 3, 2.0, 4.0)
    half, whole = math.pi / 12, math.pi / 6
    expected = [[math.cos(half), 0, math.sin(half), 0], [math.cos(whole), math.sin(whole), 0, 0]]
    torch.testing.assert_close(quat, torch.tensor(expected, dtype=torch.float64))
    assert lin_vel.tolist() == [[0, -2, 2], [0, 0, 0]] and ang_vel.tolist() == [[2, 0, -4], [0, 0, 0]]


def test_initial_states() -> None:
    """All ranges are reached and kept, velocities agree in both frames, and the seed decides."""
    config = HoverConfig(init_tilt=60.0, init_velocity=1.5, init_angular_velocity=3.0)
    initial = Constants.of(config, seed=1).initial
    assert initial.shape == (INITIAL_STATES, 16) and initial.dtype == torch.float32
    pos, quat, world, ang_vel, body = initial.split((3, 4, 3, 3, 3), dim=1)
    assert torch.equal(pos, torch.tensor(config.init_pos).expand_as(pos)) and not quat[:, 3].any()
    torch.testing.assert_close(rotate_inverse(quat, world), body, atol=1e-6, rtol=0)
    tilt = 2 * torch.acos(quat[:, 0].double()).rad2deg()
    for x, most in ((tilt, 60.0), (body, 1.5), (ang_vel, 3.0)):
        assert x.abs().max() <= most * (1 + 1e-5) and x.abs().amax(0).min() > 0.99 * most
    assert torch.equal(initial, Constants.of(config, seed=1).initial)
    assert not torch.equal(initial, Constants.of(config, seed=2).initial)
    at_rest = [[*config.init_pos, 1.0, *[0.0] * 12]]
    assert Constants.of(HoverConfig(), seed=1).initial.tolist() == at_rest


def test_an_episode_begins_in_one_of_the_initial_states() -> None:
    config = HoverConfig(init_tilt=30.0, init_velocity=1.0, max_episode_length=2)
    t = HoverTask(500, config=config, seed=4)
    begun = [t.initial_states().clone()]
    for step in range(4):
        result = t.step(state(n=500), torch.zeros(500, 4))
        assert result.dones.all() == result.dones.any() == (step % 2 == 1)
        if step % 2 == 1:
            begun.append(t.initial_states().clone())
            pos, quat, _, ang_vel, lin_vel = begun[-1].split((3, 4, 3, 3, 3), dim=1)
            expected = observe(DroneState(pos, quat, lin_vel, ang_vel), t.target, torch.zeros(500, 4), t.constants)
            assert torch.equal(result.obs, expected) and torch.equal(t.last_pos, pos)
    known = {tuple(row) for row in t.constants.initial.tolist()}
    for rows in begun:
        assert {tuple(row) for row in rows.tolist()} <= known
        assert len(rows.unique(dim=0)) > 400  # of 4096
    assert len(torch.cat(begun).unique(dim=0)) > 1000  # other ones in each episode
