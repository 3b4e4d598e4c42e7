"""``pydrone train``: settings from a file, and resumed runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from pydrone.cli import main as cli
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


def test_resuming_a_folder_without_a_checkpoint(here, making, tmp_path, capsys):
    making(AssertionError("an environment was built"))
    (tmp_path / "empty").mkdir()
    assert here("--resume", "empty") == 1
    said = capsys.readouterr().err
    assert said == (
        "pydrone: --resume empty: expected a run's folder with a checkpoint model_ITERATION.pt, found none\n"
    )
