from __future__ import annotations

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pydrone.envs import Randomization
from pydrone.envs.drone import rotate_inverse, yaw
from pydrone.envs.quadrotor import GRAVITY, KF, MASS, Quadrotor, QuadrotorCourse, wrench_matrix

pytestmark = pytest.mark.usefixtures("computed_by")


def test_wrench_table() -> None:
    # front left and back left spin faster: a force on the left (+y) rolls to the right (+x)
    left = torch.tensor([0.0, 0.0, 1.0, 1.0]) @ wrench_matrix()
    assert left[1] > 0
    assert left[2] == 0
    # the back propellers (-x): nose down, +y
    back = torch.tensor([0.0, 1.0, 1.0, 0.0]) @ wrench_matrix()
    assert back[2] > 0
    assert back[1] == 0
    # the two diagonals spin in opposite directions
    assert (torch.tensor([0.0, 1.0, 0.0, 1.0]) @ wrench_matrix())[3] > 0
    even = torch.full((4,), 1e8) @ wrench_matrix()
    torch.testing.assert_close(even, torch.tensor([4 * 1e8 * KF / MASS, 0, 0, 0]))
    # 2 * KF * 0.028 m / 1.4e-5 kg m^2
    assert left[1].item() == pytest.approx(1.264e-6, rel=1e-4)


def test_hover_rpm_keeps_the_height() -> None:
    env = Quadrotor(2, seed=0)
    env.reset()
    for _ in range(100):
        result = env.step(torch.zeros(2, 4))
        assert not result.dones.any()
    # the task's hover_rpm was computed with g = 9.8: the drone sinks at 0.01 m/s^2, 5 mm in the first second
    torch.testing.assert_close(env.pos, torch.tensor([[0, 0, 0.995]] * 2), atol=2e-4, rtol=0)
    torch.testing.assert_close(env.quat, torch.tensor([[1.0, 0, 0, 0]] * 2), atol=1e-4, rtol=0)


def test_fall_follows_the_integrator_and_ends_in_a_crash() -> None:
    env = Quadrotor(1, seed=0)
    env.reset()
    accel = 4 * KF * (0.2 * 14468.429) ** 2 / MASS - GRAVITY
    for _ in range(10):
        result = env.step(-torch.ones(1, 4))
    # semi-implicit Euler: z = a h^2 k (k + 1) / 2 after k = 20 substeps of h = 5 ms
    assert env.pos[0, 2].item() == pytest.approx(1 + accel * 0.005**2 * 20 * 21 / 2, abs=1e-5)
    assert env.vel[0, 2].item() == pytest.approx(accel * 0.1, rel=1e-5)
    torch.testing.assert_close(result.obs[0, 7:10], torch.tensor([0, 0, accel * 0.1 / 3]))
    steps = 10
    while not result.dones.item():
        result = env.step(-torch.ones(1, 4))
        steps += 1
    assert steps == pytest.approx(math.sqrt(2 * 0.9 / -accel) / 0.01, abs=1)
    assert not result.truncated.item()
    assert env.pos.tolist() == [[0, 0, 1]]
    assert env.vel.tolist() == env.ang_vel.tolist() == [[0, 0, 0]]


def test_spin_about_z_turns_by_rate_times_time() -> None:
    env = Quadrotor(1)
    env.ang_vel[:, 2] = 2.0
    for _ in range(50):
        env.step(torch.zeros(1, 4))
    # damping multiplies the rate by exp(-2.7e-7 / 2.17e-5 * t)
    rate = 2.7e-7 / 2.17e-5
    assert yaw(env.quat).item() == pytest.approx(2 * (1 - math.exp(-0.5 * rate)) / rate, abs=1e-4)
    assert env.ang_vel[0, 2].item() == pytest.approx(2 * math.exp(-0.5 * rate), rel=1e-4)


def test_tumbling_keeps_angular_momentum_and_unit_quaternions() -> None:
    env = Quadrotor(1, substeps=20)
    env.ang_vel[:] = torch.tensor([3.0, -2.0, 5.0])
    inertia = torch.tensor([1.4e-5, 1.4e-5, 2.17e-5])

    def momentum() -> torch.Tensor:  # in the world
        w, axis, body = env.quat[0, 0], env.quat[0, 1:], inertia * env.ang_vel[0]
        cross = torch.linalg.cross(axis, body)
        return body + 2 * (w * cross + torch.linalg.cross(axis, cross))

    before = momentum()
    for _ in range(20):
        env.step(torch.zeros(1, 4))
    assert env.quat.norm().item() == pytest.approx(1, abs=1e-6)
    assert abs(env.ang_vel[0, 0] - 3) > 0.3  # it does precess
    torch.testing.assert_close(momentum(), before, rtol=0.02, atol=1e-7)


def test_thrust_follows_the_attitude() -> None:
    env = Quadrotor(1)
    half = math.radians(30) / 2
    env.quat[:] = torch.tensor([math.cos(half), 0, math.sin(half), 0])  # nose down by 30 degrees: flies forward
    env.step(torch.zeros(1, 4))
    expected = torch.tensor([[9.8 * 0.5, 0, 9.8 * math.sqrt(3) / 2 - GRAVITY]]) * 0.01
    torch.testing.assert_close(env.vel, expected, atol=1e-5, rtol=0)


def test_final_observation_is_the_state_before_the_reset() -> None:
    env = Quadrotor(3, seed=0, max_episode_length=5)
    env.reset()
    env.pos[1, 2] = 0.1  # sinks below the limit at the first step
    actions = torch.full((3, 4), -0.1)
    for t in range(5):
        result = env.step(actions)
        assert result.final_obs is not None
        if t == 0:
            assert result.dones.tolist() == [False, True, False]
            # for drones that go on, the observation equals the final observation
            assert torch.equal(result.obs[::2], result.final_obs[::2])
    assert result.truncated.tolist() == [True, False, True]
    z = 1 - result.final_obs[:, 2] * 3
    accel = 9.8 * 0.92**2 - GRAVITY
    assert z[0].item() == pytest.approx(1 + accel * 0.005**2 * 10 * 11 / 2, abs=1e-5)
    torch.testing.assert_close(result.final_obs[0, 13:], actions[0])
    assert result.obs[0, 2:].tolist() == [0, 1] + [0] * 13


def test_drones_begin_an_episode_tilted_and_moving() -> None:
    """In the state that the first observation shows; drones whose episode goes on are left alone."""
    env = Quadrotor(64, seed=0, init_tilt=45.0, init_velocity=1.0, init_angular_velocity=2.0)
    obs, everyone = env.reset(), torch.ones(64, dtype=torch.bool)
    for crash in (everyone, torch.arange(64) % 3 == 0):
        quat, lin_vel = env.quat[crash], rotate_inverse(env.quat, env.vel)[crash]
        assert quat[:, 0].min() < math.cos(math.radians(20)) and lin_vel.std() > 0.3
        assert torch.equal(obs[crash, 3:7], quat)
        torch.testing.assert_close(obs[crash, 7:10] * 3, lin_vel, atol=1e-6, rtol=0)
        torch.testing.assert_close(obs[crash, 10:13] * math.pi, env.ang_vel[crash], atol=1e-6, rtol=0)
        twin = Quadrotor(64, seed=0)  # whose drones begin at rest
        env.pos[crash, 2] = -1.0
        for name in ("pos", "quat", "vel", "ang_vel"):
            getattr(twin, name).copy_(getattr(env, name))
        result = env.step(torch.zeros(64, 4))
        twin.step(torch.zeros(64, 4))
        assert torch.equal(result.dones, crash)
        for name in ("pos", "quat", "vel", "ang_vel"):
            assert torch.equal(getattr(env, name)[~crash], getattr(twin, name)[~crash]), name
        obs = result.obs


def rollout(seed: int, steps: int = 40) -> torch.Tensor:
    env = Quadrotor(16, seed=seed, max_episode_length=20)
    env.reset()
    env.randomize_episode_lengths()
    g = torch.Generator().manual_seed(7)
    return torch.stack([env.step(torch.randn(16, 4, generator=g)).obs.clone() for _ in range(steps)])


def test_runs_repeat() -> None:
    first = rollout(1)
    torch.rand(3)
    assert torch.equal(first, rollout(1))
    assert not torch.equal(first, rollout(2))


def test_a_step_can_be_captured(no_sync: TorchDispatchMode) -> None:
    env = Quadrotor(4, seed=0, max_episode_length=3)
    env.reset()
    state = (env.pos, env.quat, env.vel, env.ang_vel, env.task.target, env.task.last_actions, env.task.age)
    addresses = [tensor.data_ptr() for tensor in state]
    with no_sync:
        outs = [env.step(torch.zeros(4, 4)) for _ in range(4)]
        env.randomize_episode_lengths()
    assert addresses == [tensor.data_ptr() for tensor in state]
    assert env.pos is state[0]
    assert len({out.obs.data_ptr() for out in outs if isinstance(out.obs, torch.Tensor)}) == 1
    with pytest.raises(AssertionError, match="nonzero"), no_sync:
        torch.ones(3).nonzero()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    "ranges", [None, Randomization(mass=(0.8, 1.2), latency=(0, 2), wind=(0, 0.1), pos_noise=(0, 1))]
)
def test_cuda_graph_replays_what_eager_computes(ranges: Randomization | None) -> None:
    env_type = Quadrotor if ranges is None else QuadrotorCourse
    envs = [env_type(256, "cuda", seed=3, max_episode_length=5, randomization=ranges) for _ in range(2)]
    actions = torch.full((256, 4), -0.2, device="cuda")
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for env in envs:
            for _ in range(3):
                env.step(actions)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    graph.register_generator_state(envs[0].generator)
    with torch.cuda.graph(graph):
        captured = envs[0].step(actions)
    for _ in range(12):
        graph.replay()
        eager = envs[1].step(actions)
        torch.testing.assert_close(captured.obs, eager.obs)
        assert torch.equal(captured.truncated, eager.truncated)


def test_actions_are_clipped_and_checked() -> None:
    a, b = Quadrotor(2, seed=0), Quadrotor(2, seed=0)
    assert torch.equal(a.step(torch.full((2, 4), 7.0)).obs, b.step(torch.ones(2, 4)).obs)
    with pytest.raises(ValueError, match=r"actions: expected shape \[2, 4\], got \[2, 3\]"):
        a.step(torch.zeros(2, 3))


LATE = Randomization(latency=(1, 2), motor_lag=(0.01, 0.05))


@pytest.mark.parametrize("ranges", [None, LATE], ids=["plain", "late"])
@pytest.mark.parametrize("env_type", [Quadrotor, QuadrotorCourse])
def test_what_is_not_finite_ends_its_own_episode_alone(env_type: type[Quadrotor], ranges: Randomization | None) -> None:
    env, twin = (env_type(5, seed=0, max_episode_length=4, randomization=ranges) for _ in range(2))
    for t in range(9):
        actions = torch.linspace(-0.2, 0.2, 20).view(5, 4)
        expected = twin.step(actions)
        if t in (1, 3, 7):  # at 3 and 7 also the time limit
            actions[1, 2], actions[2, 0], actions[3, 3] = math.nan, math.inf, -math.inf
            env.vel[4, 1] = math.nan
        result = env.step(actions)
        broken = torch.arange(5) > 0 if t in (1, 3, 7) else torch.zeros(5, dtype=torch.bool)
        limit = env.task.config.max_episode_length
        assert result.log["non_finite"] == broken.float().mean() and result.log["distance"].isfinite()
        assert (result.dones & ~result.truncated)[broken].all() and not (result.dones & ~result.truncated)[0]
        assert torch.equal(result.obs[0], expected.obs[0]) and result.rewards[0] == expected.rewards[0]
        assert result.obs.isfinite().all() and result.rewards.isfinite().all()
        assert (result.rewards[broken] < -0.09).all() and result.dones[0] == ((t + 1) % limit == 0)
    assert all(x.isfinite().all() for x in env.state_dict().values() if x.is_floating_point())


def test_substeps_error() -> None:
    with pytest.raises(ValueError, match="substeps: expected at least 1, got 0"):
        Quadrotor(1, substeps=0)
