from __future__ import annotations

import dataclasses
import importlib
import math
import operator
from collections.abc import Iterator
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace

import capture_emulation
import pytest
import torch

from pydrone.envs import Randomization, make
from pydrone.envs.drone import DroneState, propeller_rpm, roll_pitch, yaw
from pydrone.envs.genesis_arrays import of_scene
from pydrone.envs.genesis_hover import GenesisHover
from pydrone.envs.hover_task import HoverTask, observe
from pydrone.envs.quadrotor import Quadrotor, QuadrotorCourse
from pydrone.ppo.config import PPOConfig, TrainConfig
from pydrone.ppo.learner.fused_loss import FusedLoss
from pydrone.ppo.trainer import Trainer
from pydrone.ppo.training import graphs
from pydrone.report.protocol import initial_states

# Not imported here: importing it takes ten seconds, in each of the processes that collect the tests.
pytestmark = [pytest.mark.genesis, pytest.mark.skipif(find_spec("genesis") is None, reason="genesis not found")]

N = 64
LIMIT = 40


@pytest.fixture(scope="module")
def env() -> Iterator[GenesisHover]:
    made = make("genesis-hover", N, "cpu", seed=3, max_episode_length=LIMIT)
    assert isinstance(made, GenesisHover)
    yield made
    made.close()
    with pytest.raises(RuntimeError, match="this environment was closed"):
        made.step(torch.zeros(N, 4))


def test_hover_rpm_keeps_the_height(env: GenesisHover) -> None:
    obs = env.reset()
    assert obs.shape == (N, 17)
    for _ in range(LIMIT - 1):
        result = env.step(torch.zeros(N, 4))
        assert not result.dones.any()
    # hover_rpm balances g = 9.8, so the drone sinks at 0.01 m/s^2
    expected = torch.tensor([0, 0, 1 - 0.01 * (0.01 * (LIMIT - 1)) ** 2 / 2]).expand(N, 3)
    torch.testing.assert_close(env.state().pos, expected, atol=1e-4, rtol=0)


def test_time_out_returns_the_true_final_observation(env: GenesisHover) -> None:
    env.reset()
    actions = torch.full((N, 4), 0.05)
    for _ in range(LIMIT - 1):
        env.step(actions)
    target = env.task.target.clone()
    kick = torch.zeros(N, 6)
    kick[1::2, 2] = -200.0  # every other drone hits the ground in the step of its time-out
    env.drone.set_dofs_velocity(kick)
    height = env.state().pos[:, 2].clone()
    result = env.step(actions)
    crashed = torch.arange(N) % 2 == 1
    assert result.dones.all()
    assert torch.equal(result.truncated, ~crashed)
    assert result.final_obs is not None
    final_z = target[:, 2] - 3 * result.final_obs[:, 2]
    accel = 9.8 * 1.04**2 - 9.81
    # at rest half a step before: falls as the semi-implicit integrator computes
    fall = accel * 0.005**2 * 3
    torch.testing.assert_close(final_z[~crashed], (height + fall)[~crashed], atol=1e-4, rtol=0)
    assert (result.rewards[crashed] < -0.09).all()
    assert (result.rewards[~crashed].abs() < 0.01).all()
    # every drone is reset
    assert (result.obs[:, 2:] == torch.tensor([0.0, 1.0] + [0.0] * 13)).all()
    state = env.state()
    assert (state.pos == torch.tensor([0.0, 0.0, 1.0])).all()
    assert (state.quat == torch.tensor([1.0, 0.0, 0.0, 0.0])).all()
    assert (state.lin_vel == 0).all()
    assert (state.ang_vel == 0).all()
    assert (env.drone.get_pos() == torch.tensor([0.0, 0.0, 1.0])).all()


def test_only_ended_drones_are_reset(env: GenesisHover) -> None:
    env.reset()
    env.step(torch.full((N, 4), 0.1))
    env.task.target[5] = torch.tensor([9.0, 0.0, 1.0])  # out of range: ends the episode
    result = env.step(torch.full((N, 4), 0.1))
    assert result.dones.nonzero().flatten().tolist() == [5]
    moved = env.state().pos[:, 2] != 1
    assert moved.nonzero().flatten().tolist() == [n for n in range(N) if n != 5]


def test_conventions_are_those_of_genesis(env: GenesisHover) -> None:
    geom = pytest.importorskip("genesis.utils.geom")
    env.reset()
    g = torch.Generator().manual_seed(0)
    for _ in range(15):
        actions = 0.2 * torch.randn(N, 4, generator=g)
        result = env.step(actions)
    assert not result.dones.any()
    state = env.state()
    inverse = geom.inv_quat(env.drone.get_quat())
    torch.testing.assert_close(state.pos, env.drone.get_pos())
    torch.testing.assert_close(state.quat, env.drone.get_quat())
    torch.testing.assert_close(state.lin_vel, geom.transform_by_quat(env.drone.get_vel(), inverse), atol=1e-5, rtol=0)
    torch.testing.assert_close(state.ang_vel, geom.transform_by_quat(env.drone.get_ang(), inverse), atol=1e-4, rtol=0)
    assert state.ang_vel.abs().max() > 1
    angles = geom.quat_to_xyz(state.quat, rpy=True)
    ours = torch.stack((*roll_pitch(state.quat), yaw(state.quat)), dim=-1)
    torch.testing.assert_close(ours, angles, atol=1e-5, rtol=0)
    torch.testing.assert_close(result.obs, observe(state, env.task.target, actions, env.task.constants))


def test_the_quadrotor_without_simulator_agrees(env: GenesisHover) -> None:
    twin = Quadrotor(N, seed=0, max_episode_length=LIMIT)
    env.reset()
    twin.reset()
    g = torch.Generator().manual_seed(1)
    for _ in range(20):
        actions = 0.15 * torch.randn(N, 4, generator=g)
        env.step(actions)
        twin.step(actions)
    state = env.state()
    # over 0.2 s with tilts of up to 45 degrees; Genesis turns the thrust with the drone only once per step
    torch.testing.assert_close(state.pos, twin.pos, atol=0.005, rtol=0)
    torch.testing.assert_close(state.quat, twin.quat, atol=0.01, rtol=0)
    torch.testing.assert_close(state.ang_vel, twin.ang_vel, atol=0.1, rtol=0)
    assert (state.quat[:, 1:3].norm(dim=-1) > 0.05).any()


def test_drones_are_placed_as_the_twin_places_them(env: GenesisHover) -> None:
    twin = Quadrotor(N, seed=0, max_episode_length=LIMIT)
    twin.reset()
    env.reset()
    env.task.target.copy_(twin.task.target)
    state = DroneState(*(x[:N].clone() for x in initial_states()))
    torch.testing.assert_close(env.place(state), twin.place(state), atol=1e-6, rtol=0)
    for found, wanted in zip(env.state(), state, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    actions = torch.zeros(N, 4)
    env.step(actions), twin.step(actions)
    torch.testing.assert_close(env.state().pos, twin.pos, atol=1e-4, rtol=0)
    torch.testing.assert_close(env.task.last_pos, env.state().pos)
    env.reset()


# one second of the same open-loop actions: the twin's largest error in m, degrees and rad/s (docs/environments.md)
ROLL, PITCH, YAW = (torch.tensor(signs) for signs in ([-1.0, -1, 1, 1], [-1.0, 1, 1, -1], [-1.0, 1, -1, 1]))
SECOND = {
    "hover": (torch.zeros(4), 1e-4, 0.01, 1e-4),
    "climb": (torch.full((4,), 0.1), 1.5e-4, 0.01, 1e-4),
    "sink": (torch.full((4,), -0.03), 1e-4, 0.01, 1e-4),
    "roll": (0.002 * ROLL, 0.008, 0.01, 1e-4),
    "pitch": (0.002 * PITCH, 0.008, 0.01, 1e-4),
    "roll over": (0.01 * ROLL, 0.025, 0.02, 5e-4),
    "yaw": (0.1 * YAW, 1e-4, 0.05, 2e-3),
    "all": (0.05 + 0.002 * ROLL - 0.001 * PITCH + 0.05 * YAW, 0.004, 0.3, 0.2),
}


def test_a_second_of_the_quadrotor_without_simulator(env: GenesisHover) -> None:
    far = {"max_xy": 99.0, "max_z": 99.0, "min_height": -99.0}
    twin = Quadrotor(N, seed=0, **far)
    env.reset()
    twin.reset()
    actions = torch.zeros(N, 4)
    actions[: len(SECOND)] = torch.stack([action for action, *_ in SECOND.values()])
    off = torch.zeros(N, 3)
    for _ in range(100):
        # not env.step, which would end episodes
        env.drone.set_propellers_rpm(propeller_rpm(actions, env.config))
        env.scene.step(update_visualizer=False)
        assert not twin.step(actions).dones.any()
        state = env.state()
        chord = torch.minimum((state.quat - twin.quat).norm(dim=-1), (state.quat + twin.quat).norm(dim=-1))
        angle = torch.rad2deg(4 * torch.asin(chord / 2))
        pos, rate = (state.pos - twin.pos).norm(dim=-1), (state.ang_vel - twin.ang_vel).norm(dim=-1)
        off = torch.maximum(off, torch.stack((pos, angle, rate), dim=-1))
    for row, (name, (_, *limits)) in enumerate(SECOND.items()):
        way = (state.pos[row] - torch.tensor(env.config.init_pos)).norm()
        print(f"{name}: flew {way:.3f} m, off by {off[row, 0]:.5f} m, {off[row, 1]:.4f} deg, {off[row, 2]:.5f} rad/s")
        assert (off[row] <= torch.tensor(limits)).all(), name
    # the drones did move
    assert state.pos[1, 2] > 1.7 and state.pos[5, 2] < 0 and state.ang_vel[5, 0] > 8 and state.ang_vel[6, 2] > 40
    assert state.pos[3, 1] < -0.5 and state.pos[4, 0] > 0.5


@pytest.mark.slow
def test_randomization_and_the_course_are_those_of_the_quadrotor() -> None:
    ranges = Randomization(
        mass=(0.7, 1.3),
        inertia=(0.7, 1.4),
        thrust=(0.97, 1.03),
        motor_lag=(0.0, 0.05),
        latency=(0, 2),
        wind=(0.0, 0.03),
        pos_noise=(0.0, 0.02),
        gyro_noise=(0.1, 0.1),
    )
    options = {"seed": 1, "max_episode_length": LIMIT, "randomization": ranges}
    env, twin, plain = make("genesis-course", N, **options), QuadrotorCourse(N, **options), QuadrotorCourse(N, seed=1)
    try:
        plain.reset()
        torch.testing.assert_close(env.reset(), twin.reset())
        drawn = env.task.randomizer
        torch.testing.assert_close(env.drone.get_links_mass()[:, :1], 0.027 * drawn.mass)
        inertia = env.drone.get_links_inertia()[:, 0].diagonal(dim1=1, dim2=2).sort(dim=1).values
        torch.testing.assert_close(inertia, torch.tensor([1.4e-5, 1.4e-5, 2.17e-5]) * drawn.inertia, rtol=1e-4, atol=0)
        g = torch.Generator().manual_seed(1)
        for _ in range(20):
            actions = 0.1 * torch.randn(N, 4, generator=g)
            ours, theirs = env.step(actions), twin.step(actions)
            plain.step(actions)
            torch.testing.assert_close(ours.obs, theirs.obs, atol=0.05, rtol=0)
        state = env.state()
        torch.testing.assert_close(state.pos, twin.pos, atol=0.01, rtol=0)
        torch.testing.assert_close(state.quat, twin.quat, atol=0.02, rtol=0)
        assert (state.pos - plain.pos).norm(dim=-1).mean() > 0.03  # randomization has an effect
        # after a crash the drone draws new values, and Genesis takes them over
        before = drawn.mass.clone()
        env.task.target[5] = torch.tensor([9.0, 0.0, 1.0])
        assert env.step(torch.zeros(N, 4)).dones.nonzero().flatten().tolist() == [5]
        assert (drawn.mass != before).flatten().nonzero().flatten().tolist() == [5]
        torch.testing.assert_close(env.drone.get_links_mass()[:, :1], 0.027 * drawn.mass)
    finally:
        env.close()


# What pydrone.envs.genesis_arrays uses of each version, below the scene's rigid_solver and the drone.
INTERNALS = {
    "1.4.5": {
        "rigid_solver": (
            "_errno",
            "clear_external_force",
            "dyn_info",
            "dyn_state.dofs.vel",
            *(f"dyn_state.links.{name}" for name in ("pos", "quat", "root_COM", "i_pos", "i_quat")),
            *(f"dyn_state.links.cfrc_applied_{name}" for name in ("ang", "vel")),
            "n_links",
            "rigid_config",
            "rigid_info.qpos",
            "set_drone_rpm",
        ),
        "drone": ("KF", "KM", "_model", "_prev_prop_t", "_propellers_link_idx", "_propellers_revs", "_propellers_spin"),
    }
}


def test_this_version_of_genesis_has_the_internals(env: GenesisHover) -> None:
    version = pytest.importorskip("genesis").__version__
    assert version in INTERNALS, f"find out what Genesis {version} has of {INTERNALS}"
    for names, owner in zip(INTERNALS[version].values(), (env.scene.rigid_solver, env.drone), strict=True):
        for name in names:
            operator.attrgetter(name)(owner)
    assert env.not_direct is None and env.arrays is not None


INITIAL = {"init_tilt": 45.0, "init_velocity": 1.0, "init_angular_velocity": 2.0}


@pytest.mark.parametrize("direct", [True, False], ids=["arrays", "public"])
def test_drones_begin_an_episode_tilted_and_moving(env: GenesisHover, direct, monkeypatch) -> None:
    """As the quadrotor without simulator, whose drones begin in the same states, and they fly on like those."""
    twin = make("quadrotor", N, seed=1, **INITIAL)
    monkeypatch.setattr(env, "task", HoverTask(N, "cpu", 1, twin.config))
    monkeypatch.setattr(env, "arrays", env.arrays if direct else None)
    assert torch.equal(env.reset(), twin.reset())
    crash = torch.arange(N) % 3 == 0
    for step in range(4):
        expected, state = twin.task.initial_states(), env.state()
        if step == 0:
            assert torch.equal(torch.cat(state[:2], dim=1), expected[:, :7])
            torch.testing.assert_close(state.lin_vel, expected[:, 13:], atol=1e-6, rtol=0)
            assert torch.equal(state.ang_vel, expected[:, 10:13])
        if step == 1:
            for task in (env.task, twin.task):
                task.age.masked_fill_(crash, 10_000)
        ours, theirs = env.step(torch.zeros(N, 4)), twin.step(torch.zeros(N, 4))
        assert torch.equal(ours.dones, theirs.dones) and torch.equal(ours.dones, crash & (step == 1))
        torch.testing.assert_close(ours.obs, theirs.obs, atol=2e-3, rtol=0)


@pytest.mark.parametrize("initial", [{}, INITIAL], ids=["at rest", "moving"])
def test_straight_to_the_arrays_steps_are_the_same_to_the_bit(env: GenesisHover, initial, monkeypatch) -> None:
    """With all that is randomised in this scene; mass and inertia: below."""
    ranges = Randomization(thrust=(0.9, 1.1), motor_lag=(0.0, 0.05), latency=(0, 2), wind=(0.01, 0.05))
    monkeypatch.setattr(env, "task", HoverTask(N, "cpu", 1, dataclasses.replace(env.config, **initial), ranges))
    compare(env, monkeypatch, 200, 0)


def compare(env: GenesisHover, monkeypatch: pytest.MonkeyPatch, steps: int, wind_error: float) -> None:
    """Flies twice, by the arrays and by Genesis' public methods, which drones end that cannot go on."""

    def fly() -> list[torch.Tensor]:
        env.task.generator.manual_seed(5)
        env.reset()
        env.randomize_episode_lengths()
        g, seen = torch.Generator().manual_seed(2), []
        links = env.arrays_tried.solver
        for t in range(steps):
            actions = 0.3 * torch.randn(N, 4, generator=g)
            if t % 10 == 3:
                actions[1, 2], actions[2, 0], actions[3, 3] = math.nan, math.inf, -math.inf
                velocity = env.drone.get_dofs_velocity()
                velocity[4, 1], velocity[5, 3] = math.nan, 1e38  # which Genesis flags as an error
                env.drone.set_dofs_velocity(velocity)
            result = env.step(actions)
            errors.append(int(result.log["non_finite"] * N))
            state = torch.cat(env.state(), dim=1)
            seen += [x.clone() for x in (*result[:5], state, *links) if x is not None]
        return seen

    errors: list[int] = []
    env.arrays_tried = env.arrays
    straight = fly()
    monkeypatch.setattr(env, "arrays", None)
    public = fly()
    assert sum(errors) >= 2 * 5 * (steps // 10) and sum(x.sum() for x in public if x.dtype == torch.bool) > steps
    for found, expected in zip(straight, public, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=wind_error, equal_nan=True)


def test_a_training_in_graphs_around_the_simulator_is_the_uncaptured_one(env: GenesisHover, monkeypatch) -> None:
    monkeypatch.setattr(graphs, "why_not_update", lambda iteration: None)  # as on CUDA
    captured = capture_emulation.emulate(monkeypatch)
    simulated, step = [], env.scene.step
    monkeypatch.setattr(env.scene, "step", lambda **options: simulated.append(step(**options)))

    def train(capture: bool) -> tuple[list[dict[str, float]], dict[str, torch.Tensor], torch.Tensor]:
        env.task.generator.manual_seed(5)
        ppo = PPOConfig(hidden_dims=(16,), num_epochs=1, num_minibatches=2, learner="torch")
        trainer = Trainer(env, TrainConfig(num_steps=5, iterations=4, capture=capture, ppo=ppo), echo=lambda line: None)
        trainer.learner.fused_loss = FusedLoss(trainer.policy)  # as on CUDA
        assert graphs.why_not(trainer) is None
        figures = [trainer.iterate() for _ in range(4)]
        return figures, trainer.policy.state_dict(), torch.cat(env.state(), dim=1)

    expected, weights, state = train(False)
    assert len(simulated) == 4 * 5
    found, weights_found, state_found = train(True)
    assert captured == ["_compute"] and len(simulated) == 2 * 4 * 5, "the capture simulates nothing"
    for ours, theirs in zip(found, expected, strict=True):
        for name in theirs.keys() - {x for x in theirs if x.startswith("time/")} - {"steps_per_second"}:
            assert ours[name] == pytest.approx(theirs[name], abs=0, rel=0, nan_ok=True), name
    assert all(torch.equal(x, weights[name]) for name, x in weights_found.items())
    assert torch.equal(state_found, state) and sum(x["episodes"] for x in found) > 0


@pytest.mark.parametrize(
    ("owner", "name", "value", "reason"),
    [
        ("genesis.engine.solvers.rigid.abd.forward_kinematics", "kernel_masked_forward_kinematics_links_geoms", None,
         "AttributeError: module "),
        ("genesis.utils.misc", "qd_to_torch", lambda x, copy: x.to_torch()[..., :1], "ValueError: an array of shape"),
        ("genesis", "use_zerocopy", False, "'copy=False' is not supported"),
        ("rigid", "set_drone_rpm", None, "AttributeError: "),
        ("rigid", "set_drone_rpm", lambda *args: None, "ValueError: forces differ from those of set_propellers_rpm"),
        ("drone", "set_propellers_rpm", lambda rpm: None, "ValueError: forces differ"),
        ("rigid", "get_error_envs_mask", lambda: torch.ones(N), "ValueError: a reset leads elsewhere"),
    ],
)  # fmt: skip
def test_without_an_internal_the_public_methods_are_called(env, owner, name, value, reason, monkeypatch) -> None:
    owned = {"rigid": env.scene.rigid_solver, "drone": env.drone}
    owner = owned[owner] if owner in owned else importlib.import_module(owner)
    if value is None and isinstance(owner, ModuleType):
        monkeypatch.delattr(owner, name)
    elif value is None:
        monkeypatch.delattr(type(owner), name)
    else:
        monkeypatch.setattr(owner, name, value)
    arrays, why = of_scene(env.scene, env.drone, N, env.device)
    assert arrays is None and why.startswith("Genesis 1.") and reason in why
    monkeypatch.undo()
    env.scene.rigid_solver.clear_external_force()
    monkeypatch.setattr(env, "arrays", None)
    env.reset()
    assert not env.step(torch.zeros(N, 4)).dones.any()


def test_on_cuda_a_warning_says_why_not() -> None:
    with pytest.warns(RuntimeWarning, match="dozens of further launches .*: Genesis .* has other internals: Attribute"):
        of_scene(None, SimpleNamespace(), N, torch.device("cuda"))


@pytest.mark.slow
def test_with_mass_and_inertia_too_steps_are_the_same(monkeypatch) -> None:
    ranges = Randomization(mass=(0.7, 1.3), inertia=(0.7, 1.4), thrust=(0.9, 1.1), latency=(0, 2), wind=(0.01, 0.05))
    made = make("genesis-course", N, seed=1, max_episode_length=LIMIT, randomization=ranges)
    try:
        assert made.not_direct is None
        compare(made, monkeypatch, 200, 0)
    finally:
        made.close()


def test_runs_repeat(env: GenesisHover) -> None:
    def run() -> torch.Tensor:
        env.task.generator.manual_seed(5)
        env.reset()
        env.randomize_episode_lengths()
        g = torch.Generator().manual_seed(2)
        return torch.stack([env.step(torch.randn(N, 4, generator=g)).obs.clone() for _ in range(30)])

    first = run()
    torch.rand(5)
    assert torch.equal(first, run())


def test_what_is_not_finite_ends_its_own_episode_alone(env: GenesisHover) -> None:
    def run(broken: bool) -> torch.Tensor:
        env.task.generator.manual_seed(5)
        env.reset()
        seen = []
        for t in range(LIMIT + 5):
            actions = torch.full((N, 4), 0.02)
            if broken and t in (3, LIMIT - 1, LIMIT):
                actions[1, 2], actions[2, 0], actions[3, 3] = math.nan, math.inf, -math.inf
                velocity = env.drone.get_dofs_velocity()
                velocity[4, 1] = math.nan
                velocity[5, 3] = 1e38  # finite, until Genesis multiplies it
                env.drone.set_dofs_velocity(velocity)
            result = env.step(actions)
            ended = (result.dones & ~result.truncated).nonzero().flatten().tolist()
            assert ended == ([1, 2, 3, 4, 5] if broken and t in (3, LIMIT - 1, LIMIT) else [])
            assert result.log["non_finite"] == len(ended) / N
            assert result.obs.isfinite().all() and result.rewards.isfinite().all()
            seen.append(result.obs.clone())
        return torch.stack(seen)

    expected = run(False)
    others = [0, *range(6, N)]
    assert torch.equal(run(True)[:, others], expected[:, others])
    env.drone.set_propellers_rpm(torch.zeros(N, 4))  # a step that an exception leaves
    assert env.reset().isfinite().all() and torch.equal(run(False), expected)


def test_a_policy_learns_from_it(env: GenesisHover) -> None:
    trainer = Trainer(env, TrainConfig(num_envs=N, num_steps=LIMIT, iterations=2, device="cpu"))
    before = [x.detach().clone() for x in trainer.policy.parameters()]
    for _ in range(2):
        assert trainer.iterate()["episodes"] > 0
    assert all(x.isfinite().all() for x in trainer.policy.parameters())
    assert not all(torch.equal(x, y) for x, y in zip(before, trainer.policy.parameters(), strict=True))


def test_another_device_than_genesis_has_is_refused(env: GenesisHover) -> None:
    with pytest.raises(ValueError, match="device: Genesis was initialised on 'cpu' already, got 'cuda'"):
        make("genesis-hover", 1, "cuda")
    with pytest.raises(ValueError, match="device: expected 'cpu' or 'cuda', got 'meta'"):
        make("genesis-hover", 1, "meta")
