"""``pydrone eval``: figures derived by hand from scripted flights, then a run from its checkpoint to the plot."""

from __future__ import annotations

import json
import math

import pytest
import torch

from pydrone.cli import eval as command
from pydrone.cli import main as cli
from pydrone.envs import Randomization
from pydrone.envs.drone import DroneState
from pydrone.envs.hover_task import HoverConfig, HoverTask
from pydrone.envs.quadrotor import Quadrotor
from pydrone.ppo.config import PPOConfig, TrainConfig
from pydrone.ppo.trainer import Trainer
from pydrone.ppo.training import checkpoint
from pydrone.report import evaluation, protocol, runs, video

NAN = math.nan


class Scripted:
    """A hover task with drone positions from a script [T, N, 3]. Every target is (1, 0, 1) by default."""

    autoreset, obs, actions = "same_step", 17, 4

    def __init__(self, script: torch.Tensor, **config) -> None:
        steps, self.num_envs, _ = script.shape
        fixed = {"target_low": (1.0, 0.0, 1.0), "target_high": (1.0, 0.0, 1.0)}
        self.config = HoverConfig(**{"dt": 0.5, "max_episode_length": steps, **fixed, **config})
        self.task = HoverTask(self.num_envs, config=self.config)
        self.device, self.max_episode_length = torch.device("cpu"), steps
        self.script, self._t = script, 0
        self.pos = torch.zeros(self.num_envs, 3)

    def reset(self):
        self._t = 0
        return self.task.reset()

    def step(self, actions):
        self.pos.copy_(self.script[self._t])
        self._t += 1
        still = torch.zeros(self.num_envs, 3)
        upright = torch.tensor([[1.0, 0, 0, 0]]).repeat(self.num_envs, 1)
        result = self.task.step(DroneState(self.pos, upright, still, still), actions)
        self.pos.masked_fill_(result.dones[:, None], 0)  # a reset overwrites the state
        return result


def script() -> torch.Tensor:
    """20 steps of half a second, of which the last ten count. Each drone flies along x towards (1, 0, 1)."""
    x = torch.zeros(20, 3)
    x[:, 0] = torch.tensor([0.0] * 11 + [0.85] * 5 + [0.95] * 4)  # 1, then 0.15, then 0.05 m away
    x[:, 1] = torch.tensor([0.5] * 4 + [0.95] * 16)  # crashes in its fourth step; the rest is another episode
    x[:, 2] = torch.tensor([NAN] + [1.0] * 19)  # invalid from the first step
    pos = torch.stack((x, torch.zeros_like(x), torch.ones_like(x)), dim=-1)
    pos[3, 1, 2] = 0.0
    return pos


def fly(env, **options) -> evaluation.Episodes:
    return evaluation.fly(env, lambda obs: torch.zeros(env.num_envs, 4), **options)


@pytest.mark.parametrize("resample", [False, True])
def test_figures_of_a_scripted_flight(resample):
    flown = fly(Scripted(script()), resample=resample)
    assert flown.length.tolist() == [20, 4, 1] and flown.crashed.tolist() == [False, True, True]
    # drone 0, last ten: 1 once, 0.15 five times, 0.05 four times. Drone 1: 0.5 three times, then below the target.
    assert evaluation.final_distance(flown.paths, flown.length)[:2].tolist() == pytest.approx([0.15, 0.5])
    assert evaluation.targets_reached(flown).tolist() == [4 if resample else 1, 0, 0]
    figures = evaluation.summary(flown)
    assert figures["episodes"] == 3 and figures["success_rate"] == pytest.approx(1 / 3)
    assert figures["final_distance"] == pytest.approx(0.325)
    assert figures["final_distance_quartiles"] == pytest.approx([0.2375, 0.4125])
    assert figures["targets_reached"] == pytest.approx((4 if resample else 1) / 3)
    assert figures["crash_rate"] == pytest.approx(2 / 3)
    assert figures["episode_length"] == pytest.approx(25 / 3)
    assert figures["episode_seconds"] == pytest.approx(25 / 6)
    assert flown.paths.pos[3, 1].tolist() == [0.5, 0.0, 0.0]  # the state at the crash, not the one after the reset
    assert flown.paths.pos[4:, 1].isnan().all() and flown.paths.distance[4:, 1].isnan().all()


def test_targets_that_have_to_be_held():
    """Drone 0 is within 0.1 m for its last four steps, drone 1 from its fifth step on, in another episode."""
    moving, fixed = (fly(Scripted(script(), hold=1.0), resample=resample) for resample in (True, False))
    assert moving.paths.hold == 2
    assert evaluation.targets_reached(moving).tolist() == [2, 0, 0]
    assert evaluation.targets_reached(fixed).tolist() == [1, 0, 0]
    flown = fly(Scripted(script(), hold=2.5))
    assert flown.paths.hold == 5 and evaluation.targets_reached(flown).tolist() == [0, 0, 0]


def test_success_is_staying_near_a_fixed_target_and_reaching_a_moving_one():
    fixed, moving = (fly(Scripted(script()), resample=resample) for resample in (False, True))
    assert evaluation.succeeded(fixed).tolist() == [True, False, False]  # 0.15 < 2 * 0.1
    assert evaluation.succeeded(fixed, within=0.14).tolist() == [False, False, False]
    assert evaluation.succeeded(moving, within=0.14).tolist() == [True, False, False]
    near = script()
    near[:3, 1, 0] = 0.95  # at the target until it crashes
    for resample in (False, True):
        flown = fly(Scripted(near), resample=resample)
        assert evaluation.targets_reached(flown)[1] > 0 and not evaluation.succeeded(flown)[1]
    away = fly(Scripted(script()[:11]), resample=True)
    assert evaluation.succeeded(away).tolist() == [False, False, False]  # no crash, but nothing reached


def test_the_return_counts_the_first_episode_alone():
    """Only the yaw reward (0.01 per second while yaw is 0) and -10 per second in the step of a crash."""
    flown = fly(Scripted(script(), weight_target=0.0))
    assert flown.returns.tolist() == pytest.approx([20 * 0.005, 4 * 0.005 - 5, 0.005 - 5])


def test_targets_move_on_or_stay_and_the_task_is_as_before():
    spread = {"target_low": (0.0, 0.0, 1.0), "target_high": (0.2, 0.2, 1.0), "at_target": 9.0}
    env = Scripted(torch.ones(6, 2, 3), **spread)
    task = env.task
    stay, move, again = (fly(env, resample=resample, seed=5) for resample in (False, True, True))
    assert (stay.paths.target == stay.paths.target[0]).all()
    assert (move.paths.target[1:] != move.paths.target[:-1]).any(dim=-1).all()
    assert torch.equal(stay.paths.target[0], move.paths.target[0]) and torch.equal(
        move.paths.target, again.paths.target
    )
    assert env.task is task and task.resample_targets
    with pytest.raises(ValueError, match="actions"):
        evaluation.fly(env, lambda obs: (_ for _ in ()).throw(ValueError("actions")), resample=False)
    assert env.task is task and task.resample_targets


def test_drones_without_thrust_fall():
    """At 0.2 of its hover speed the drone falls at 9.42 m/s^2: 0.9 m in 0.437 s."""
    flown = evaluation.fly(Quadrotor(4), lambda obs: -torch.ones(4, 4))
    assert flown.crashed.all() and ((flown.length - 44).abs() <= 1).all()
    assert flown.paths.distance.shape == (int(flown.length.max()), 4)  # it stopped before the time limit
    assert flown.paths.pos[-1, 0, 2] < 0.1 < flown.paths.pos[-2, 0, 2]


def test_an_episode_that_is_left_is_no_crash():
    flown = fly(Scripted(script()), max_steps=3)
    assert flown.length.tolist() == [3, 3, 1] and flown.crashed.tolist() == [False, False, True]
    with pytest.raises(ValueError, match="max_steps: expected at least 1, got 0"):
        fly(Scripted(script()), max_steps=0)


def test_an_environment_without_a_task():
    env = Scripted(script())
    env.task = type("Bare", (), {"step": env.task.step, "reset": env.task.reset})()
    flown = fly(env)
    assert flown.paths is None and evaluation.succeeded(flown) is None and flown.length.tolist() == [20, 4, 1]
    figures = evaluation.summary(flown)
    assert set(figures) == {"episodes", "crash_rate", "episode_length", "episode_return"}
    assert "episode steps" in command.table({"mine": figures})
    env.max_episode_length = None
    with pytest.raises(ValueError, match="max_steps: expected a number of steps"):
        fly(env)


def test_quartiles():
    assert evaluation.quartiles([]) is None and evaluation.quartiles([2.0]) == [2.0, 2.0]
    assert evaluation.quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == [2.0, 4.0]


def test_table():
    figures = {"success_rate": 0.125, "final_distance": None, "final_distance_quartiles": None, "crash_rate": 1.0}
    lines = command.table({"fixed target": figures, "b": figures | {"targets_reached": 2.0}}).splitlines()
    assert [line.split("  ")[-1].strip() for line in lines] == ["b", lines[1], "12.5 %", "-", "-", "2.00", "100.0 %"]
    assert lines[5].startswith("targets reached per episode") and lines[5].split()[-2] == "-"
    assert len({len(line) for line in lines}) == 1


def test_the_camera_stays_behind_the_drone():
    """The target is ahead along x, then to the left: the camera turns to it; near the target it does not turn."""
    pos = torch.tensor([[0.0, 0.0, 1.0]]).repeat(300, 1)
    target = torch.tensor([[1.0, 0.0, 1.0]]).repeat(300, 1)
    target[100:] = torch.tensor([0.0, 1.0, 1.0])
    target[250:] = torch.tensor([-0.1, 0.0, 1.0])
    shots = video.camera_path(pos, target, list(range(300)))
    for step, (dx, dy) in ((0, (1, 0)), (99, (1, 0)), (249, (0, 1)), (299, (0, 1))):
        (x, y, z), look = shots[step]
        assert (x, y) == pytest.approx((-video.BEHIND * dx, -video.BEHIND * dy), abs=1e-3) and z > 1
        assert look[0] * dx + look[1] * dy > 0 and look[2] < 1
    assert shots[100][0] != pytest.approx(shots[249][0], abs=0.1)  # it turns slowly


# ------------------------------------------------------------------------------------------------------ from a run


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run of two quadrotors and two iterations."""
    pytest.importorskip("matplotlib")
    ppo = PPOConfig(num_minibatches=2, hidden_dims=(16, 8))
    config = TrainConfig(env="quadrotor", num_steps=4, iterations=2, tensorboard=False, ppo=ppo)
    folder = tmp_path_factory.mktemp("runs") / "first"
    Trainer(Quadrotor(2), config, folder, echo=lambda line: None).train()
    return folder


def evaluate(*argv) -> int:
    return cli.main(["eval", *map(str, argv), "--device", "cpu"])


def test_a_recurrent_policy_forgets_where_an_episode_ends(tmp_path):
    ppo = PPOConfig(num_minibatches=2, hidden_dims=(8,), recurrent="gru", rnn_dim=4, normalize_obs=True)
    config = TrainConfig(env="quadrotor", num_steps=4, iterations=1, tensorboard=False, ppo=ppo)
    Trainer(Quadrotor(2), config, tmp_path, echo=lambda line: None).train()
    env = Quadrotor(3, max_episode_length=20, max_xy=0.2)
    policy, told = runs.load_policy(runs.load(tmp_path), env), []

    def ended(dones):
        told.append(dones)
        policy.reset(dones)
        if dones is None:
            assert policy.memory is None
        else:
            assert all(bool((x[dones] == 0).all()) for x in policy.memory.values())

    flights = [evaluation.fly(env, policy.mode, seed=1, ended=ended) for _ in range(2)]
    assert torch.equal(flights[0].returns, flights[1].returns)
    assert sum(x is None for x in told) == 2 and any(bool(x.any()) for x in told if x is not None)


def test_eval_from_beginning_to_end(run_dir, tmp_path, capsys):
    assert evaluate(run_dir, "--episodes", 5, "--out", tmp_path / "a") == 0
    said = capsys.readouterr().out
    for text in ("iteration 2, trained in quadrotor", "fixed target", "moving targets", "crash rate", "below 0.2 m"):
        assert text in said
    assert (tmp_path / "a" / "eval_quadrotor.png").read_bytes().startswith(b"\x89PNG")
    written = json.loads((tmp_path / "a" / "eval_quadrotor.json").read_text())
    assert written["iteration"] == 2 and list(written["results"]) == ["fixed target", "moving targets"]
    assert all(result["episodes"] == 5 for result in written["results"].values())
    # actions are deterministic: the checkpoint file itself, with any torch seed, gives the same results
    torch.manual_seed(99)
    assert evaluate(run_dir / "model_2.pt", "--episodes", 5, "--out", tmp_path / "b") == 0
    assert json.loads((tmp_path / "b" / "eval_quadrotor.json").read_text()) == written
    assert evaluate(run_dir, "--episodes", 2, "--steps", 9, "--targets", "fixed", "--out", tmp_path / "c") == 0
    results = json.loads((tmp_path / "c" / "eval_quadrotor.json").read_text())["results"]
    assert list(results) == ["fixed target"] and results["fixed target"]["episode_length"] == 9


def test_with_the_task_and_the_randomisation_of_the_run(run_dir, tmp_path, monkeypatch):
    ppo = PPOConfig(num_minibatches=2, hidden_dims=(8,))
    ranges = Randomization(wind=(0.01, 0.01), latency=(0, 2))
    config = TrainConfig(
        "quadrotor",
        num_steps=4,
        iterations=1,
        tensorboard=False,
        ppo=ppo,
        randomization=ranges,
    )
    Trainer(Quadrotor(2, hold=0.25, weight_near=3.0), config, tmp_path, echo=lambda line: None).train()
    made, real = [], evaluation.fly
    monkeypatch.setattr(
        evaluation, "fly", lambda env, *args, **options: made.append(env) or real(env, *args, **options)
    )
    for flags in ((), ("--randomize",)):
        assert evaluate(tmp_path, "--episodes", 3, "--steps", 3, *flags) == 0
        assert json.loads((tmp_path / "eval_quadrotor.json").read_text())["randomized"] == bool(flags)
    plain, random = (env.task.randomizer for env in (made[0], made[-1]))
    assert plain is None and random.ranges == ranges
    assert {(env.config.hold, env.config.weight_near) for env in made} == {(0.25, 3.0)}
    assert evaluate(run_dir, "--episodes", 1, "--steps", 1, "--randomize", "--out", tmp_path) == 0
    assert made[-1].task.randomizer.ranges == protocol.RANGES  # the run has none of its own


@pytest.mark.parametrize(("trained", "flags", "flown"), [(4, (), 1500), (1600, (), 1600), (4, ("--steps", 9), 9)])
def test_short_episodes_are_for_training(trained, flags, flown, tmp_path, monkeypatch, capsys):
    config = TrainConfig("quadrotor", num_steps=4, iterations=1, tensorboard=False, ppo=PPOConfig(num_minibatches=2))
    Trainer(Quadrotor(2, max_episode_length=trained), config, tmp_path, echo=lambda line: None).train()
    made, real = [], evaluation.fly
    monkeypatch.setattr(evaluation, "fly", lambda env, *args, **rest: made.append(env) or real(env, *args, **rest))
    assert evaluate(tmp_path, "--episodes", 1, "--targets", "fixed", *flags) == 0
    assert made[0].max_episode_length == flown and "Changed" not in capsys.readouterr().out


def test_another_task_than_that_of_the_training_is_said(run_dir, tmp_path, capsys):
    assert evaluate(run_dir, "--episodes", 1, "--steps", 3) == 0
    assert "Changed" not in capsys.readouterr().out
    config = TrainConfig(num_steps=4, iterations=1, tensorboard=False, ppo=PPOConfig(num_minibatches=2))
    Trainer(Quadrotor(2, dt=0.02, hold=0.5), config, tmp_path, echo=lambda line: None).train()
    capsys.readouterr()
    assert evaluate(tmp_path, "--episodes", 1, "--steps", 3) == 0
    said = capsys.readouterr().out
    line = next(line for line in said.splitlines() if line.startswith("Changed since the checkpoint: "))
    assert line == "Changed since the checkpoint: dt 0.02, now 0.01."  # the task's options are the run's


def test_a_run_of_an_environment_object_is_flown_from_python(tmp_path, monkeypatch, capsys):
    """It has no name to build it by, whatever the settings' default is."""

    class Own(Quadrotor):
        pass

    ppo = PPOConfig(num_minibatches=2, hidden_dims=(8,))
    config = TrainConfig(num_steps=4, iterations=1, tensorboard=False, ppo=ppo)
    Trainer(Own(2), config, tmp_path, echo=lambda line: None).train()
    capsys.readouterr()
    with monkeypatch.context() as context:
        context.setattr("pydrone.envs.make", lambda *_, **__: pytest.fail("an environment was built"))
        assert evaluate(tmp_path, "--episodes", 1) == 1
    path, label = tmp_path / "model_1.pt", f"{__name__}:{Own.__qualname__}"
    assert capsys.readouterr().err == (
        f"pydrone: {path}: trained in an environment object, {label}, which no registered name builds: fly it from "
        "Python by pydrone.report.evaluation.fly(env, policy.mode), with the policy of "
        "pydrone.report.runs.load_policy(runs.load(RUN), env), or name an environment that fits by --env\n"
    )
    env = Own(3)
    flown = evaluation.fly(env, runs.load_policy(runs.load(tmp_path), env).mode, max_steps=5)
    assert flown.length.tolist() == [5, 5, 5]
    assert evaluate(tmp_path, "--episodes", 1, "--steps", 3, "--env", "quadrotor") == 0
    assert f"trained in {label}" in capsys.readouterr().out


def test_beside_the_checkpoint_by_default(run_dir):
    assert evaluate(run_dir, "--episodes", 1, "--steps", 3) == 0
    assert (run_dir / "eval_quadrotor.json").is_file() and (run_dir / "eval_quadrotor.png").is_file()


def test_the_policy_is_the_checkpoints(run_dir):
    run = runs.load(run_dir)
    policy = runs.load_policy(run, Quadrotor(1))
    assert not policy.training and policy.actor[0].weight.shape == (16, 17)
    for name, x in policy.state_dict().items():
        assert torch.equal(x, run.state["policy"][name])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("gone",), "gone: no such run folder or checkpoint"),
        (
            ("RUN", "--env", "nope"),
            "name: expected one of genesis-course, genesis-hover, quadrotor, quadrotor-course, got 'nope' "
            "(or gymnasium:ID)",
        ),
        (("RUN", "--video", "a.avi"), "--video a.avi: expected a file name that ends in .mp4"),
        (("RUN", "--device", "foo"), "--device foo: expected cpu, cuda, cuda:1, ..."),
    ],
)
def test_what_cannot_be_evaluated_is_one_sentence(run_dir, argv, message, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["eval", *(str(run_dir) if x == "RUN" else x for x in argv)]) == 1
    assert capsys.readouterr().err == f"pydrone: {message}\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--episodes", "0"), "argument --episodes: expected a whole number of at least 1, got '0'"),
        (("--within", "nan"), "argument --within: expected a number above 0, got 'nan'"),
    ],
)
def test_arguments_that_are_out_of_range(argv, message, capsys):
    with pytest.raises(SystemExit) as error:
        cli.main(["eval", "run", *argv])
    assert error.value.code == 2 and message in capsys.readouterr().err


def test_a_policy_that_does_not_fit(run_dir, monkeypatch, capsys):
    monkeypatch.setattr(Quadrotor, "obs", 21)
    assert evaluate(run_dir, "--episodes", 1) == 1
    said = capsys.readouterr().err
    assert "a policy trained in quadrotor does not fit an environment with observations 21" in said


def test_without_genesis_a_video_is_one_sentence(run_dir, monkeypatch, capsys):
    monkeypatch.setattr(video, "missing", lambda: ["genesis-world"])
    assert evaluate(run_dir, "--video", "a.mp4") == 1
    said = capsys.readouterr().err
    assert said == 'pydrone: --video: genesis-world not installed; `pip install "pydrone-rl[train]"` installs it\n'


def test_the_newest_checkpoint_is_that_of_the_latest_iteration(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint model_ITERATION\.pt"):
        runs.checkpoint_of(tmp_path)
    for name in ("model_9.pt", "model_100.pt", "model_20.pt"):
        checkpoint.save(tmp_path / name, {"iteration": 1})
    for name in (".model_300.pt.7", "model_400.pt.bak", "best.pt", "model_500.pt"):  # model_500.pt is not a checkpoint
        (tmp_path / name).touch()
    assert runs.checkpoint_of(tmp_path).name == "model_100.pt"


def test_a_checkpoint_without_settings(tmp_path):
    state = {"iteration": 1, "policy": {}, "learner": {}, "config": None}
    path = checkpoint.save(tmp_path / "model_1.pt", state)
    with pytest.raises(ValueError, match="config: expected the settings of a training, got NoneType"):
        runs.load(path)


def test_a_machine_without_opengl(run_dir, monkeypatch, tmp_path, capsys):
    pytest.importorskip("av")

    def fail(*_, **__):
        raise AttributeError("'NoneType' object has no attribute 'glGetError'")

    monkeypatch.setattr("pydrone.envs.genesis_hover.init_genesis", fail)
    monkeypatch.setattr(video, "missing", lambda: [])
    argv = ("--episodes", 1, "--steps", 3, "--out", tmp_path, "--video", tmp_path / "a.mp4")
    assert evaluate(run_dir, *argv) == 1
    captured = capsys.readouterr()
    assert "crash rate" in captured.out  # the results are printed all the same
    assert "needs OpenGL by EGL" in captured.err and captured.err.count("\n") == 1


@pytest.mark.slow
@pytest.mark.genesis
def test_a_video(run_dir, tmp_path, capfd):
    """Half a second in real time; the drone and its target are visible, and the picture moves."""
    for name in ("genesis", "av"):
        pytest.importorskip(name)
    import av

    out = tmp_path / "made" / "flight.mp4"
    argv = ("--episodes", 2, "--targets", "fixed", "--steps", 40, "--out", tmp_path, "--video", out)
    assert evaluate(run_dir, *argv) == 0
    assert f"Video: {out}" in capfd.readouterr().out
    with av.open(str(out)) as container:
        assert container.streams.video[0].average_rate == video.FPS
        frames = [torch.from_numpy(frame.to_ndarray(format="rgb24")).float() for frame in container.decode(video=0)]
    assert len(frames) == 10 and frames[0].shape == (*video.RESOLUTION[::-1], 3)
    red, green, blue = frames[0].unbind(-1)
    assert ((red > 120) & (green < 80) & (blue < 80)).sum() > 50  # the target's ball
    assert (frames[0] - frames[-1]).abs().mean() > 1
    assert [entry.name for entry in out.parent.iterdir()] == [out.name]
