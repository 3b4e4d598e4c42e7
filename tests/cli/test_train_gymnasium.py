"""``pydrone train --env gymnasium:ID`` to its end, and what the other commands make of the run."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

from pydrone.cli import main as cli
from pydrone.report import runs

for module in ("gymnasium", "tyro", "matplotlib"):
    pytest.importorskip(module, reason=f"{module} is not installed")

FIXED = ("--no-tensorboard", "--device", "cpu", "--no-live")

DICT = """
import gymnasium as gym, numpy as np

class Guess(gym.Env):
    observation_space = gym.spaces.Dict(b=gym.spaces.MultiDiscrete([3, 4]), a=gym.spaces.MultiBinary(2))
    action_space = gym.spaces.MultiDiscrete([3, 4], start=[1, 1])

    def _obs(self):
        self.shown = self.np_random.integers(0, [3, 4])
        return {"a": np.ones(2, np.int8), "b": self.shown}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self._obs(), {}

    def step(self, action):
        right = float((action - 1 == self.shown).sum())
        return self._obs(), right, False, False, {}

gym.register("Guess-v0", entry_point=Guess, max_episode_steps=20)
"""


def results(folder: Path, name: str) -> dict:
    path = folder / f"eval_gymnasium-{name.replace(':', '-')}.json"
    return json.loads(path.read_text())["results"][f"gymnasium:{name}"]


def test_cartpole_is_learnt_evaluated_resumed_plotted_and_exported(tmp_path, capsys):
    folder = tmp_path / "run"
    argv = ("--env", "gymnasium:CartPole-v1", "--iterations", "8", "--lr", "1e-3", "--run-dir", str(folder))
    assert cli.main(["train", *argv, *FIXED]) == 0
    assert "16 environments on cpu" in capsys.readouterr().out
    assert cli.main(["eval", str(folder), "--episodes", "8", "--device", "cpu"]) == 0
    assert (
        results(folder, "CartPole-v1")["episode_return"] > 150
    )  # an untrained policy falls after about 10 to 25 steps
    said = capsys.readouterr().out
    assert "ended before a time limit" in said and "crash" not in said
    before = runs.load(folder)
    assert cli.main(["train", "--resume", str(folder), "--iterations", "9"]) == 0
    out = capsys.readouterr().out
    assert "Resumed at iteration 8; gymnasium:CartPole-v1 cannot restore its simulator: all episodes begin anew" in out
    assert "9/9  reward" in out and before.iteration == 8 and runs.load(folder).iteration == 9
    assert cli.main(["plot", str(folder), "--out", str(tmp_path / "plot.png")]) == 0
    assert cli.main(["export", str(folder), "--format", "torchscript"]) == 0
    assert "4 observations to 2 actions" in capsys.readouterr().out


def test_what_a_checkpoint_restores_is_restored_to_the_bit(tmp_path):
    """All but the episodes: weights and the state of Adam."""
    first, second = tmp_path / "first", tmp_path / "second"
    argv = ("--env", "gymnasium:Pendulum-v1", "--num-envs", "2", "--num-steps", "8", *FIXED)
    assert cli.main(["train", *argv, "--iterations", "1", "--run-dir", str(first)]) == 0
    saved = runs.load(first)
    # An update of rate 1e-30 changes nothing in float32.
    small = ("--learning-rate", "1e-30", "--schedule", "fixed", "--iterations", "2", "--run-dir", str(second))
    assert cli.main(["train", "--resume", str(saved.checkpoint), *small]) == 0
    resumed = runs.load(second).state["policy"]
    assert all(x.equal(resumed[name]) for name, x in saved.state["policy"].items())


def test_groups_and_several_choices(tmp_path, monkeypatch, capsys):
    (tmp_path / "guess_envs.py").write_text(DICT)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    folder, name = tmp_path / "run", "guess_envs:Guess-v0"
    argv = ("--env", f"gymnasium:{name}", "--iterations", "12", "--learning-rate", "1e-3", "--num-steps", "50")
    assert cli.main(["train", *argv, "--run-dir", str(folder), *FIXED]) == 0
    assert json.loads((folder / "config.json").read_text())["ppo"]["actor_obs"] == ["a", "b"]
    assert cli.main(["eval", str(folder), "--episodes", "4", "--device", "cpu"]) == 0
    # Both choices are right in almost every step; by chance it would be 20 / 3 + 20 / 4, about 12.
    assert results(folder, name)["episode_return"] > 30
    assert cli.main(["export", str(folder), "--format", "torchscript"]) == 0
    assert "discrete from 1" in capsys.readouterr().out


def test_arguments_reach_training_and_evaluation(tmp_path, monkeypatch):
    import gymnasium

    made, make_vec = [], gymnasium.make_vec

    def noted(*args, **kwargs):
        made.append(kwargs.get("g"))
        return make_vec(*args, **kwargs)

    monkeypatch.setattr(gymnasium, "make_vec", noted)
    folder, copy = tmp_path / "run", tmp_path / "copy"
    argv = ("--env", "gymnasium:Pendulum-v1", "--env-kwargs", "g", "5.5", "--num-envs", "2", "--num-steps", "8")
    assert cli.main(["train", *argv, "--iterations", "1", "--run-dir", str(folder), *FIXED]) == 0
    assert cli.main(["eval", str(folder), "--episodes", "2", "--device", "cpu"]) == 0
    assert cli.main(["train", "--config", str(folder / "config.toml"), "--run-dir", str(copy), *FIXED]) == 0
    assert cli.main(["train", "--resume", str(folder), "--iterations", "2"]) == 0
    assert len(made) == 7 and set(made) == {5.5}
    assert json.loads((copy / "config.json").read_text())["env_kwargs"] == {"g": 5.5}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("gymnasium:Nope-v0",), "env 'gymnasium:Nope-v0': cannot be made: "),
        (("gymnasium:Blackjack-v1",), "env 'gymnasium:Blackjack-v1': observations: expected a Box, "),
        (("gymnasium:CartPole-v1", "--hold", "1"), "env 'gymnasium:CartPole-v1' with hold=1.0: cannot be made: "),
    ],
)
def test_refused_before_anything_is_written(argv, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "--env", *argv, *FIXED]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith(f"pydrone: {message}") and captured.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
