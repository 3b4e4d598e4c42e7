"""``pydrone train``: settings from a file, and resumed runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pydrone.cli import main as cli
from pydrone.envs import Randomization
from pydrone.envs.quadrotor import Quadrotor
from pydrone.ppo.config import PPOConfig, TrainConfig
from pydrone.ppo.trainer import Trainer
from pydrone.report import learning_curve


def test_settings_from_a_file(trained, tmp_path, capsys):
    """The file overrides the defaults; the command line overrides the file."""
    (tmp_path / "run.toml").write_text("num_envs = 5\nseed = 7\n[ppo]\nnum_mini_batches = 2\n")
    seen = trained("--config", "run.toml", "--seed", "-9")
    assert seen.env["num_envs"] == 5 and seen.env["seed"] == -9
    with pytest.raises(SystemExit):
        cli.main(["train", "--config=run.toml", "--help"])
    assert "(default: 7)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("num_env = 5", "run.toml: num_env: no such setting; the nearest is num_envs"),
        ("[ppo]\ngamma = 1.5", "gamma: expected a number from 0 to 1, got 1.5"),
        (None, "--config run.toml: cannot be read: No such file or directory"),
    ],
)
def test_a_file_of_settings_that_cannot_be(text, message, here, making, tmp_path, capsys):
    making(AssertionError("an environment was built"))
    if text is not None:
        (tmp_path / "run.toml").write_text(text)
    assert cli.main(["train", "--env", "quadrotor", "--config", "run.toml"]) == 1
    assert capsys.readouterr().err == f"pydrone: {message}\n"


def test_the_file_of_a_run_repeats_it(here, tmp_path, capsys):
    """In a new folder, with equal figures and the settings of the first run."""
    assert here("--run-dir", "first", "--lr", "1e-3", "--seed", "6") == 0
    assert cli.main(["train", "--config", "first/config.toml", "--run-dir", "second"]) == 0
    first, second = (learning_curve.read(tmp_path / name)[-1] for name in ("first", "second"))
    assert first["value_loss"] == second["value_loss"] and first["reward"] == second["reward"]
    texts = [(tmp_path / name / "config.toml").read_text() for name in ("first", "second")]
    assert texts[0].replace('run_dir = "first"', "") == texts[1].replace('run_dir = "second"', "")


def test_resuming(here, trained, tmp_path, capsys):
    """The environment gets a new seed; a finished run has nothing to do, and nothing is written."""
    assert here("--run-dir", "first") == 0
    path = str(tmp_path / "first" / "model_2.pt")
    capsys.readouterr()
    assert here("--resume", path, "--run-dir", "second") == 0
    assert capsys.readouterr().out == "Nothing to do: the checkpoint stands at iteration 2 of 2.\n"
    assert [entry.name for entry in tmp_path.iterdir()] == ["first"]
    assert here("--resume", path, "--iterations", "3", "--hidden-dims", "32", "--run-dir", "third") == 1
    said = capsys.readouterr().err
    assert "hidden_dims: expected (128, 128)" in said and "got (32,)" in said and said.count("\n") == 1
    assert trained("--resume", path, "--seed", "5", "--iterations", "3").env["seed"] == 5 + 2


def test_resuming_a_run_by_its_folder(here, tmp_path, capsys):
    """With the run's settings, in its folder, from the newest intact checkpoint, bit for bit."""
    assert here("--run-dir", "whole", "--iterations", "4", "--lr", "1e-3") == 0
    assert here("--run-dir", "parts", "--save-interval", "1", "--lr", "1e-3", "--iterations", "3") == 0
    newest = tmp_path / "parts" / "model_3.pt"
    newest.write_bytes(newest.read_bytes()[:-100])
    capsys.readouterr()
    assert cli.main(["train", "--resume", "parts", "--iterations", "4"]) == 0
    said = capsys.readouterr().out
    assert f"Passed over: {Path('parts', 'model_3.pt')}: expected a checkpoint, got a file whose checksum" in said
    assert f"Resuming from {Path('parts', 'model_2.pt')}\n" in said and "4/4  reward" in said
    assert "begin anew" not in said
    a, b = (learning_curve.read(tmp_path / name) for name in ("whole", "parts"))
    timed = ("time/", "steps_per_second")
    assert [{k: x for k, x in row.items() if not k.startswith(timed)} for row in a] == [
        {k: x for k, x in row.items() if not k.startswith(timed)} for row in b
    ]
    assert [entry.name for entry in tmp_path.iterdir() if entry.name.startswith("runs")] == []
    assert cli.main(["train", "--resume", "parts"]) == 0
    assert capsys.readouterr().out.endswith("Nothing to do: the checkpoint stands at iteration 4 of 4.\n")


def test_a_run_of_an_environment_object_is_resumed_from_python_alone(here, making, tmp_path, monkeypatch, capsys):
    """It has no name to build it by: not that of the settings' default, nor that of the class it derives from."""
    monkeypatch.chdir(tmp_path)

    class Own(Quadrotor):
        pass

    ppo = PPOConfig(hidden_dims=(8,), num_minibatches=2)
    config = TrainConfig(num_steps=4, iterations=1, tensorboard=False, ppo=ppo)
    Trainer(Own(2), config, "own", echo=lambda _: None).train()
    label = f"{__name__}:{Own.__qualname__}"
    assert json.loads(Path("own/config.json").read_text())["env"] == label
    making(AssertionError("an environment was built"))
    capsys.readouterr()
    for run in ("own", "own/model_1.pt"):
        assert cli.main(["train", "--resume", run, "--iterations", "2"]) == 1
        assert capsys.readouterr().err == (
            f"pydrone: --resume {run}: {Path('own', 'model_1.pt')}: trained in an environment object, {label}, which "
            "no registered name builds: resume it from Python by pydrone.ppo.trainer.Trainer(env, "
            "TrainConfig(resume=...)).train(), or name an environment that fits by --env\n"
        )
    assert cli.main(["train", "--config", "own/config.toml"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("pydrone: --config own/config.toml: env: expected one of genesis-course, ") and label in said
    # From Python, and in an environment that is named.
    lines = []
    config = TrainConfig(num_steps=4, iterations=2, tensorboard=False, ppo=ppo, resume="own/model_1.pt")
    assert Trainer(Own(2), config, "own", echo=lines.append).train().iterations == 2
    assert not [line for line in lines if "anew" in line or "Changed" in line]
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert here("--resume", "own/model_1.pt", "--run-dir", "named") == 0
    assert f"Changed since the checkpoint: env {label}, now quadrotor." in capsys.readouterr().out


def test_a_run_from_python_is_resumed_with_what_its_environment_was(here, tmp_path, capsys):
    """Its size, device and task, although the settings that the Trainer was given do not say so."""
    ranges = Randomization(wind=(0.01, 0.02))
    env = Quadrotor(3, hold=0.5, randomization=ranges, max_episode_length=70, max_xy=2.0)
    config = TrainConfig(num_steps=4, iterations=1, tensorboard=False, ppo=PPOConfig(num_minibatches=2))
    Trainer(env, config, tmp_path / "run", echo=lambda _: None).train()
    assert cli.main(["train", "--resume", "run", "--iterations", "2"]) == 0
    said = capsys.readouterr().out
    assert "quadrotor: 3 environments on cpu" in said and "anew" not in said
    # What the command line cannot set is said.
    assert "Changed since the checkpoint: max_xy 2.0, now 3.0." in said
    settings = json.loads((tmp_path / "run" / "config.json").read_text())
    assert settings["task"]["hold"] == 0.5 and settings["task"]["max_episode_length"] == 70
    assert settings["randomization"]["wind"] == [0.01, 0.02]


def test_what_a_resumed_run_keeps_is_refused_before_a_simulator_is_built(here, making, capsys):
    assert here("--run-dir", "run") == 0
    making(AssertionError("an environment was built"))
    capsys.readouterr()
    assert here("--resume", "run", "--iterations", "3", "--activation", "relu") == 1
    said = capsys.readouterr().err
    assert said == (
        f"pydrone: activation: expected 'tanh', that of the checkpoint {Path('run', 'model_2.pt')}, got 'relu': a "
        "resumed training keeps it\n"
    )


def test_resuming_with_another_learning_rate_takes_it(here, tmp_path, capsys):
    assert here("--run-dir", "run", "--desired-kl", "100") == 0
    assert here("--resume", "run", "--iterations", "3", "--lr", "1e-3", "--desired-kl", "1e9") == 0
    assert "learning_rate 0.0003, now 0.001; desired_kl 100.0, now 1000000000.0." in capsys.readouterr().out
    rows = learning_curve.read(tmp_path / "run")
    # The least KL of a step multiplies it by 1.5, at most once in each of 10 minibatches, up to the bound.
    assert rows[1]["learning_rate"] > 3e-4 and 1e-3 <= rows[2]["learning_rate"] <= 1e-2


def test_resuming_a_folder_without_a_checkpoint(here, making, tmp_path, capsys):
    making(AssertionError("an environment was built"))
    (tmp_path / "empty").mkdir()
    assert here("--resume", "empty") == 1
    said = capsys.readouterr().err
    assert said == (
        "pydrone: --resume empty: expected a run's folder with a checkpoint model_ITERATION.pt, found none\n"
    )
