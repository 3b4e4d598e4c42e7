"""The hover protocol: its initial states and scenes, figures derived by hand, and the commands around it."""

from __future__ import annotations

import json
import math

import pytest
import torch

from pydrone.cli import main as cli
from pydrone.envs.drone import DroneState, rotate, rotate_inverse
from pydrone.envs.quadrotor import Quadrotor
from pydrone.ppo.config import PPOConfig, TrainConfig
from pydrone.ppo.trainer import Trainer
from pydrone.report import protocol
from pydrone.report import protocol_report as report

NAN = math.nan


def controller(obs: torch.Tensor) -> torch.Tensor:
    """A hand-made pilot: towards the target, upright. [N, 17] -> [N, 4]."""
    rel, quat, vel, turning = 3 * obs[:, :3], obs[:, 3:7], 3 * obs[:, 7:10], math.pi * obs[:, 10:13]
    body = rotate_inverse(quat, rel)
    up = rotate_inverse(quat, torch.tensor([[0.0, 0.0, 1.0]]).expand(len(obs), 3))
    lean = (0.25 * body[:, :2] - 0.25 * vel[:, :2]).clamp(-0.3, 0.3)
    # the body's z axis should lean along `lean` in the body frame
    roll, pitch = -(lean[:, 1] - up[:, 1] * -1), lean[:, 0] - up[:, 0] * -1
    x = 0.3 * roll - 0.06 * turning[:, 0]
    y = 0.3 * pitch - 0.06 * turning[:, 1]
    z = -0.1 * turning[:, 2]
    lift = 0.5 * body[:, 2] - 0.35 * vel[:, 2]
    signs = torch.tensor([[-1.0, -1, -1], [-1, 1, 1], [1, 1, -1], [1, -1, 1]])
    return (lift[:, None] + torch.stack((x, y, z), dim=1) @ signs.T).clamp(-1, 1)


def test_initial_states_are_as_stated_and_the_same_each_time():
    state, again = protocol.initial_states(), protocol.initial_states()
    assert all(torch.equal(x, y) for x, y in zip(state, again, strict=True))
    away = (state.pos - torch.tensor([0.0, 0.0, 1.0])).abs().amax(dim=0)
    tilt = torch.rad2deg(torch.acos(1 - 2 * state.quat[:, 1:3].square().sum(dim=1)))
    for most, limit in zip(
        (*away.tolist(), tilt.max().item(), state.lin_vel.abs().max().item(), state.ang_vel.abs().max().item()),
        (1.0, 1.0, 0.5, 45.0, 1.0, 2.0),
        strict=True,
    ):
        assert 0.97 * limit < most <= limit
    assert torch.equal(state.quat[:, 3], torch.zeros(256))  # no turn about z


def test_moving_targets_circle_at_their_speed_in_both_directions():
    now, later = protocol.moving_targets(0.0), protocol.moving_targets(0.01)
    speed = torch.linalg.vector_norm(later - now, dim=1) / 0.01
    torch.testing.assert_close(speed, torch.full((256,), 0.5), rtol=1e-3, atol=0)
    torch.testing.assert_close(torch.linalg.vector_norm(now[:, :2], dim=1), torch.full((256,), 0.5))
    torch.testing.assert_close(protocol.moving_targets(2 * math.pi), now)
    torch.testing.assert_close(now[0], torch.tensor([0.5, 0.0, 1.0]))
    assert later[0, 1] > 0 > later[1, 1] - now[1, 1]  # one way, and the other


def test_figures_by_hand():
    # Ten episodes of eight steps of 1.25 s: the last four count.
    distance = torch.full((8, 10), 0.1)
    distance[:3, 0] = 0.5  # settles with the fourth step
    distance[6, 1] = 0.25  # out once more: settles with the eighth, 0.1375 in the mean
    distance[:, 2] = 0.3  # never settles
    distance[4:, 3] = NAN  # crashes
    distance[:, 4:] = torch.tensor([0.01, 0.02, 0.03, 0.04, 0.05, 0.06])
    found = protocol.figures(distance, 1.25)
    # sorted: 0.01 to 0.06, 0.1, 0.1375, 0.3, infinite: of ten the fifth, and the tenth
    assert found["survival"] == 0.9 and found["crash_rate"] == pytest.approx(0.1)
    assert found["distance"] == pytest.approx(0.05) and found["distance_p95"] is None
    assert found["settled"] == 0.8
    # 0 for six, 3.75, 8.75, two infinite: the fifth is 0
    assert found["settling_time"] == 0.0
    assert protocol.figures(distance[:, :3], 1.25)["settling_time"] == 8.75
    assert protocol.figures(distance[:, :3], 1.25)["distance_p95"] == pytest.approx(0.3)
    assert protocol.figures(distance[:, 2:4], 1.25)["settling_time"] is None


def test_summary_over_runs():
    run = {"fixed": {"distance": 0.1}}
    runs = [run, {"fixed": {"distance": None}}, {"fixed": {"distance": 0.3}}]
    assert protocol.summary(runs) == {"fixed": {"distance": {"median": 0.3, "low": 0.1, "high": None}}}
    assert protocol.summary([run])["fixed"]["distance"] == {"median": 0.1, "low": 0.1, "high": 0.1}


def test_place_sets_the_state_that_is_observed():
    env = Quadrotor(3)
    env.reset()
    state = DroneState(*(x[:3].clone() for x in protocol.initial_states()))
    obs = env.place(state)
    torch.testing.assert_close(obs[:, :3], (env.task.target - state.pos) / 3)
    torch.testing.assert_close(obs[:, 3:7], state.quat)
    torch.testing.assert_close(obs[:, 7:10], state.lin_vel / 3)
    torch.testing.assert_close(obs[:, 10:13], state.ang_vel / math.pi)
    torch.testing.assert_close(rotate_inverse(env.quat, env.vel), state.lin_vel)
    torch.testing.assert_close(rotate(state.quat, rotate_inverse(state.quat, env.vel)), env.vel)
    # the progress of the next step is measured from there
    result = env.step(torch.zeros(3, 4))
    step = 0.01 * torch.linalg.vector_norm(env.vel, dim=1)
    assert (result.rewards.abs() < 10 * 0.01 * (2 * step * 2 + step**2) + 0.01).all()


def test_a_pilot_flies_the_scenes_that_are_stated(monkeypatch):
    monkeypatch.setattr(protocol, "SECONDS", 6.0)
    monkeypatch.setattr(protocol, "FINAL_SECONDS", 3.0)
    env = protocol.environment("quadrotor")
    seen = {}

    def act(obs: torch.Tensor) -> torch.Tensor:
        if not seen:
            drawn = env.task.randomizer
            seen.update(obs=obs.clone(), mass=drawn.mass.clone(), noise=drawn.noise.clone(), wind=drawn.wind.clone())
        return controller(obs)

    flight = protocol.fly(env, act)
    assert {name: x.shape for name, x in flight.distance.items()} == dict.fromkeys(protocol.SCENES, (600, 256))
    fixed, moving, fixed_random, _ = seen["obs"].split(256)
    torch.testing.assert_close(fixed[:, 3:13], moving[:, 3:13])  # the same initial states
    assert not torch.equal(fixed[:, 3:13], fixed_random[:, 3:13])  # seen with noise
    torch.testing.assert_close(fixed[:, :3] * 3, torch.tensor([0.0, 0.0, 1.0]) - protocol.initial_states().pos)
    torch.testing.assert_close(
        moving[:, :3] * 3 - fixed[:, :3] * 3, protocol.moving_targets(0.0) - torch.tensor([0, 0, 1.0])
    )
    assert (seen["mass"][:512] == 1).all() and (seen["mass"][512:] != 1).any()
    assert not seen["noise"][:512].any() and not seen["wind"][:512].any() and seen["wind"][512:].any()
    found = {name: protocol.figures(x, flight.dt) for name, x in flight.distance.items()}
    assert found["fixed"]["survival"] > 0.9 and found["fixed"]["distance"] < 0.05
    assert found["fixed"]["distance"] < found["moving"]["distance"] < 0.5
    again = protocol.fly(env, act)
    assert torch.equal(again.distance["fixed"].nan_to_num(-1), flight.distance["fixed"].nan_to_num(-1))


def test_a_drone_that_falls_has_crashed(monkeypatch):
    monkeypatch.setattr(protocol, "SECONDS", 2.0)
    env = protocol.environment("quadrotor")
    flight = protocol.fly(env, lambda obs: obs.new_full((len(obs), 4), -1.0))
    for distance in flight.distance.values():
        assert protocol.figures(distance, flight.dt)["survival"] == 0
        assert (distance.isnan().diff(dim=0) >= 0).all()  # NaN from the crash on


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "a"
    ppo = PPOConfig(num_minibatches=2, hidden_dims=(8,))
    config = TrainConfig("quadrotor", num_steps=4, iterations=1, tensorboard=False, ppo=ppo)
    Trainer(Quadrotor(2), config, path, echo=lambda line: None).train()
    return path


def test_from_a_run_to_a_comparison(run_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(protocol, "SECONDS", 0.05)
    monkeypatch.setattr(protocol, "FINAL_SECONDS", 0.02)
    assert cli.main(["eval", str(run_dir), "--protocol", "hover"]) == 0
    one = report.read(run_dir)
    assert one["env"] == "quadrotor" and one["runs"][0]["scenes"].keys() == protocol.SCENES.keys()
    assert one["runs"][0]["seconds_from_process_start"] > 0 and one["runs"][0]["seed"] == 1
    assert cli.main(["eval", str(run_dir), str(run_dir), "--protocol", "hover", "--out", str(tmp_path / "two")]) == 0
    assert "2 runs: median (lowest to highest)" in capsys.readouterr().out
    two = report.read(tmp_path / "two" / "protocol_hover_quadrotor.json")
    assert two["runs"] == [one["runs"][0]] * 2 and two["summary"] == one["summary"]
    out = tmp_path / "comparison.png"
    assert cli.main(["plot", "--protocol", "hover", str(run_dir), str(tmp_path / "two"), "--out", str(out)]) == 0
    assert out.stat().st_size > 10_000 and (run_dir / "protocol_hover_quadrotor.png").stat().st_size > 10_000
    assert "survival" in capsys.readouterr().out


def test_errors(run_dir, tmp_path, capsys):
    def error(*argv: object) -> str:
        assert cli.main([str(x) for x in argv]) == 1
        return capsys.readouterr().err

    assert "--steps 3: expected none with --protocol" in error("eval", run_dir, "--protocol", "hover", "--steps", 3)
    assert "expected one, got 2" in error("eval", run_dir, run_dir)
    assert "expected an environment with the hover task" in error(
        "eval", run_dir, "--protocol", "hover", "--env", "quadrotor-course"
    )
    assert "expected one file protocol_hover_ENV.json" in error("plot", "--protocol", "hover", tmp_path)
    other = tmp_path / "protocol_hover_x.json"
    other.write_text(json.dumps({"protocol": "race"}))
    assert "expected the figures of the hover protocol" in error("plot", "--protocol", "hover", other)
    stale = tmp_path / "stale.json"
    stale.write_text(json.dumps({"protocol": "hover", "summary": dict.fromkeys(protocol.SCENES)}))
    assert "expected version 1 of the protocol, got None" in error("plot", "--protocol", "hover", stale)
    assert "--x, --figure" in error("plot", "--protocol", "hover", other, "--x", "time")
    with pytest.raises(ValueError, match="expected an environment with the hover task"):
        protocol.environment("quadrotor-course")
