from __future__ import annotations

import hashlib
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pydrone.envs import Randomization, make
from pydrone.envs.drone import DroneState
from pydrone.envs.hover_task import HoverConfig
from pydrone.envs.quadrotor import GRAVITY, Quadrotor
from pydrone.envs.randomizer import Randomizer

pytestmark = pytest.mark.usefixtures("computed_by")

ALL = Randomization(
    mass=(0.8, 1.2),
    inertia=(0.7, 1.4),
    thrust=(0.9, 1.1),
    motor_lag=(0.0, 0.05),
    latency=(0, 2),
    wind=(0.0, 0.02),
    pos_noise=(0.0, 0.01),
    att_noise=(0.01, 0.02),
    vel_noise=(0.05, 0.05),
    gyro_noise=(0.1, 0.2),
)


def fixed(**values: float) -> Randomization:
    """Exactly these values, for every drone."""
    return Randomization(**{name: (value, value) for name, value in values.items()})


def fly(env: Quadrotor, steps: int, action: float = 0.0) -> Quadrotor:
    for _ in range(steps):
        assert not env.step(torch.full((env.num_envs, 4), action)).dones.any()
    return env


def fingerprint(env: Quadrotor, steps: int = 60) -> str:
    digest = hashlib.sha256(env.reset().numpy().tobytes())
    env.randomize_episode_lengths()
    g = torch.Generator().manual_seed(0)
    for _ in range(steps):
        result = env.step(0.3 * torch.randn(env.num_envs, 4, generator=g))
        for x in (result.obs, result.rewards, result.dones, result.truncated, result.final_obs, *result.log.values()):
            digest.update(x.contiguous().numpy().tobytes())
    return digest.hexdigest()


def test_off_is_bit_for_bit_as_without() -> None:
    bare = Quadrotor(16, seed=3, max_episode_length=20)
    off = Quadrotor(16, seed=3, max_episode_length=20, randomization=Randomization())
    on = Quadrotor(16, seed=3, max_episode_length=20, randomization=ALL)
    assert off.task.randomizer is None
    assert fingerprint(bare) == fingerprint(off) != fingerprint(on)
    assert not Randomization().varies()
    assert ALL.varies("wind") and not fixed(mass=1.1).varies("wind")


@pytest.mark.parametrize("name", ["mass", "inertia", "thrust"])
def test_a_factor_of_one_changes_nothing(name: str) -> None:
    # drawn from a range around 1, then set to 1
    bare, env = (Quadrotor(4, seed=3, randomization=r) for r in (None, Randomization(**{name: (0.9, 1.1)})))
    env.task.randomizer._drawn[:, :6] = 1
    bare.ang_vel[:] = env.ang_vel[:] = torch.tensor([1.0, 2.0, 3.0])
    fly(bare, 20, 0.02), fly(env, 20, 0.02)
    torch.testing.assert_close(env.pos, bare.pos)
    torch.testing.assert_close(env.quat, bare.quat)


def test_draws_cover_their_ranges_and_repeat_by_the_seed() -> None:
    drawn = Quadrotor(4000, seed=1, randomization=ALL).task.randomizer
    for name, x in {
        "mass": drawn.mass,
        "inertia": drawn.inertia,
        "thrust": drawn.thrust,
        "motor_lag": drawn.motor_lag,
    }.items():
        low, high = getattr(ALL, name)
        assert low <= x.min() < low + 0.01 * (high - low) < high - 0.01 * (high - low) < x.max() <= high, name
        assert x.std().item() == pytest.approx((high - low) / math.sqrt(12), rel=0.05)
    counts = torch.bincount(drawn.latency.long().flatten())
    assert len(counts) == 3 and (counts > 1200).all()
    assert drawn.thrust.std(dim=1).min() > 0  # each propeller has its own
    # the wind is horizontal, from all directions
    assert (drawn.wind[:, 2] == 0).all()
    assert drawn.wind.norm(dim=1).max().item() == pytest.approx(0.02, rel=0.01)
    quadrants = torch.bincount((drawn.wind[:, 0] > 0) * 2 + (drawn.wind[:, 1] > 0))
    assert (quadrants > 850).all()
    again, other = (Quadrotor(4000, seed=seed, randomization=ALL).task.randomizer for seed in (1, 2))
    assert torch.equal(again._drawn, drawn._drawn) and torch.equal(again.wind, drawn.wind)
    assert not torch.equal(other._drawn, drawn._drawn)


def test_only_drones_whose_episode_ended_draw_anew() -> None:
    env = Quadrotor(8, seed=0, randomization=ALL)
    env.reset()
    drawn = env.task.randomizer
    before, wind = drawn._drawn.clone(), drawn.wind.clone()
    env.pos[3, 2] = 0.0  # a crash
    result = env.step(torch.zeros(8, 4))
    assert result.dones.nonzero().flatten().tolist() == [3]
    assert (drawn._drawn != before).any(dim=1).nonzero().flatten().tolist() == [3]
    assert (drawn.wind != wind).any(dim=1).nonzero().flatten().tolist() == [3]
    env.reset()
    assert (drawn._drawn != before).any(dim=1).all()


# semi-implicit Euler after k substeps of h = 5 ms from rest: a h^2 k (k + 1) / 2
HALF_SECOND = 0.005**2 * 100 * 101 / 2


@pytest.mark.parametrize(
    ("values", "accel"),
    [
        # hover_rpm accelerates the nominal mass by 9.8 m/s^2
        ({"mass": 1.05}, 9.8 / 1.05),
        ({"thrust": 0.96}, 9.8 * 0.96),
        ({"mass": 1.25, "thrust": 1.25}, 9.8),
    ],
)
def test_mass_and_thrust(values: dict, accel: float) -> None:
    env = fly(Quadrotor(1, randomization=fixed(**values)), 50)
    expected = torch.tensor([[0, 0, 1 + (accel - GRAVITY) * HALF_SECOND]])
    torch.testing.assert_close(env.pos, expected, atol=2e-5, rtol=0)


def test_inertia() -> None:
    roll = torch.tensor([[-0.01, -0.01, 0.01, 0.01]])
    rates = []
    for inertia in (None, fixed(inertia=2.0)):
        env = Quadrotor(1, randomization=inertia)
        env.step(roll)
        rates.append(env.ang_vel[0, 0].item())
    assert rates[0] > 0.05
    assert rates[1] == pytest.approx(rates[0] / 2, rel=1e-3)


@pytest.mark.parametrize("factor", [1.0, 1.25])
def test_wind(factor: float) -> None:
    """The same wind moves a heavier drone less; stronger propellers keep its height."""
    env = fly(Quadrotor(3, seed=5, randomization=fixed(wind=0.01, mass=factor, thrust=factor)), 50)
    drift = env.task.randomizer.wind / (0.027 * factor) * HALF_SECOND
    torch.testing.assert_close(env.pos[:, :2], drift[:, :2], atol=2e-5, rtol=0)
    assert drift.norm(dim=1).min().item() == pytest.approx(0.01 / (0.027 * factor) * HALF_SECOND, rel=1e-3)


def test_latency() -> None:
    """The first action arrives ``latency`` steps late; until then the drone hovers."""
    for late in (0, 1, 3):
        ranges = Randomization(latency=(late, late)) if late else Randomization(mass=(1.0, 1.0 + 1e-9))
        env = Quadrotor(1, randomization=ranges)
        heights = []
        for t in range(6):
            env.step(torch.full((1, 4), 0.5 if t == 0 else 0.0))
            heights.append(env.vel[0, 2].item())
        kicks = [t for t in range(6) if heights[t] - (heights[t - 1] if t else 0) > 0.01]
        assert kicks == [late]
    mixed = Quadrotor(200, seed=0, randomization=Randomization(latency=(0, 2)))
    mixed.step(torch.full((200, 4), 0.5))
    kicked = mixed.vel[:, 2] > 0.01
    assert torch.equal(kicked, mixed.task.randomizer.latency[:, 0] == 0)
    # a delayed action is dropped at the end of its episode
    mixed.pos[:, 2] = 0
    assert mixed.step(torch.full((200, 4), 0.5)).dones.all()
    mixed.step(torch.zeros(200, 4))
    assert (mixed.vel[:, 2].abs() < 0.01).all()


def test_motor_lag() -> None:
    task = HoverConfig()
    drawn = Randomizer(2, fixed(motor_lag=0.05), torch.Generator().manual_seed(0), task)
    drawn.motor_lag[1] = 0
    for t in range(1, 6):
        rpm = drawn.propeller_rpm(torch.ones(2, 4))
        # 1 - exp(-t dt / tau) of the way from hover to 1.8 times as much
        assert rpm[0, 0].item() == pytest.approx(
            task.hover_rpm * (1 + 0.8 * (1 - math.exp(-t * 0.01 / 0.05))), rel=1e-5
        )
        assert rpm[1, 0].item() == pytest.approx(task.hover_rpm * 1.8, rel=1e-6)
    drawn.restart(torch.tensor([True, False]))
    left = drawn.propeller_rpm(torch.zeros(2, 4))
    assert left[0].tolist() == pytest.approx([task.hover_rpm] * 4)


def test_sensor_noise() -> None:
    n = 20000
    ranges = fixed(pos_noise=0.02, att_noise=0.03, vel_noise=0.1, gyro_noise=0.2)
    drawn = Randomizer(n, ranges, torch.Generator().manual_seed(0), HoverConfig())
    half = math.radians(40) / 2
    parts = ([1.0, 2, 3], [math.cos(half), 0, math.sin(half), 0], [0.5, 0, -0.5], [1.0, 0, -1])
    state = DroneState(*(torch.tensor([part]).repeat(n, 1) for part in parts))
    sensed = drawn.sense(state)
    for name, std in {"pos": 0.02, "lin_vel": 0.1, "ang_vel": 0.2}.items():
        error = getattr(sensed, name) - getattr(state, name)
        torch.testing.assert_close(error.std(0), torch.full((3,), std), rtol=0.03, atol=0)
        torch.testing.assert_close(error.mean(0), torch.zeros(3), rtol=0, atol=4 * std / math.sqrt(n))
    torch.testing.assert_close(sensed.quat.norm(dim=-1), torch.ones(n))
    # the angle between the attitudes, from |q . p| = cos(angle / 2): its rms is sqrt(3) times that about one axis
    angle = 2 * torch.acos((sensed.quat * state.quat).sum(-1).abs().clamp(max=1).double())
    assert angle.square().mean().sqrt().item() == pytest.approx(0.03 * math.sqrt(3), rel=0.03)
    assert not torch.equal(drawn.sense(state).pos, sensed.pos)


def test_noise_is_in_the_observations_and_nowhere_else() -> None:
    bare, env = (Quadrotor(64, seed=2, max_episode_length=4, randomization=r) for r in (None, fixed(pos_noise=0.03)))
    for t in range(8):
        if t == 4:  # after the reset the two have different targets
            break
        env.task.target.copy_(bare.task.target)
        a, b = bare.step(torch.zeros(64, 4)), env.step(torch.zeros(64, 4))
        torch.testing.assert_close(a.rewards, b.rewards)
        assert torch.equal(bare.pos, env.pos)
        error = (a.final_obs - b.final_obs)[:, :3] if t == 3 else (a.obs - b.obs)[:, :3]
        assert error.std().item() == pytest.approx(0.01, rel=0.25)
        assert torch.equal(a.final_obs[:, 3:], b.final_obs[:, 3:])
    # the first observation of an episode has noise too
    error = b.obs[:, :3] - (env.task.target - env.pos) / 3
    assert error.std().item() == pytest.approx(0.01, rel=0.25)
    assert env.reset()[:, 2].std().item() == pytest.approx(0.01, rel=0.25)


def test_a_step_can_be_captured(no_sync: TorchDispatchMode) -> None:
    env = make("quadrotor-course", 4, seed=0, max_episode_length=3, randomization=ALL)
    env.reset()
    drawn = env.task.randomizer
    state = (env.pos, env.task.leg, drawn._drawn, drawn._history, drawn._rpm, drawn.wind, drawn.mass)
    addresses = [x.data_ptr() for x in state]
    with no_sync:
        for _ in range(4):
            env.step(torch.zeros(4, 4))
    assert addresses == [x.data_ptr() for x in state]
    assert drawn._history is state[3] and drawn._rpm is state[4]


@pytest.mark.parametrize(
    ("ranges", "text"),
    [
        ({"mass": (1.2, 0.8)}, r"mass: expected low <= high, got \(1.2, 0.8\)"),
        ({"mass": (0.0, 1.0)}, r"mass: expected a low end above 0, got \(0.0, 1.0\)"),
        ({"wind": (-1.0, 1.0)}, r"wind: expected no number below 0, got \(-1.0, 1.0\)"),
        ({"thrust": 1.1}, r"thrust: expected two finite numbers \(low, high\), got 1.1"),
        ({"inertia": (1.0, math.inf)}, "inertia: expected two finite numbers"),
        ({"latency": (0, 1.5)}, r"latency: expected two whole steps \(low, high\), got \(0, 1.5\)"),
        ({"gyro_noise": (0.1,)}, "gyro_noise: expected two finite numbers"),
    ],
)
def test_ranges_that_cannot_be(ranges: dict, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Randomization(**ranges)
    assert Randomization(mass=[0.9, 1.1]).mass == (0.9, 1.1)  # a list, as read from JSON and TOML
