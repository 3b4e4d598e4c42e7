"""``pydrone train``: Ctrl-C and SIGTERM."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest


def test_ctrl_c_while_starting_up(here, making, capsys):
    making(KeyboardInterrupt())
    assert here() == 130
    assert capsys.readouterr().err == "pydrone: interrupted\n"


def test_a_second_ctrl_c_stops_at_once(here, monkeypatch, capsys):
    from pydrone.envs.quadrotor import Quadrotor

    step = Quadrotor.step
    monkeypatch.setattr(Quadrotor, "step", lambda *args: (signal.raise_signal(signal.SIGINT), step(*args))[1])
    assert here() == 130
    captured = capsys.readouterr()
    assert captured.out.count("finishing this iteration and saving; Ctrl-C again stops now") == 1
    assert captured.err == "pydrone: interrupted\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_signal_is_not_a_failure(number, here, monkeypatch, tmp_path, capsys):
    from pydrone.envs.quadrotor import Quadrotor

    step, steps = Quadrotor.step, []

    def signalled(self, actions):
        steps.append(1)
        if len(steps) == 2:
            signal.raise_signal(number)
        return step(self, actions)

    monkeypatch.setattr(Quadrotor, "step", signalled)
    assert here("--run-dir", "run", "--iterations", "9") == 0
    assert "Interrupted, after 1 iterations." in capsys.readouterr().out
    assert [entry.name for entry in (tmp_path / "run").glob("*.pt")] == ["model_1.pt"]


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_a_signal_from_outside_saves_and_exits_with_0(tmp_path):
    for name in ("tyro", "matplotlib"):
        pytest.importorskip(name)
    sizes = ("--num-envs", "4", "--num-steps", "8", "--num-minibatches", "2", "--iterations", "1000000")
    command = [sys.executable, "-m", "pydrone.cli.main", "train", "--env", "quadrotor", "--device", "cpu", *sizes]
    command += ["--no-tensorboard", "--run-dir", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if "reward" in line:
            process.send_signal(signal.SIGTERM)
            break
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "finishing this iteration and saving" in out and "Interrupted, after" in out
    (path,) = tmp_path.glob("model_*.pt")
    assert f"Checkpoint: {path}" in out
