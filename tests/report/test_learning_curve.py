"""The learning curve of one run: reading its log and drawing it."""

from __future__ import annotations

import json

import pytest

from pydrone.ppo.training.run_log import CONFIG, PROGRESS, RunLog
from pydrone.report import learning_curve


def test_learning_curve(tmp_path, monkeypatch):
    """Integer ticks, the settings as title, markers in a short run, the target as a line."""
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: figures.append(self))

    def draw(iterations: int, **settings) -> Figure:
        (tmp_path / CONFIG).write_text(json.dumps(settings))
        (tmp_path / PROGRESS).unlink(missing_ok=True)
        log = RunLog(tmp_path, tensorboard=False)
        for i in range(iterations):
            log.write({"iteration": i + 1, "episode_length": 10.0 * i})
        log.close()
        learning_curve.plot(tmp_path)
        return figures[-1]

    short = draw(3, env="quadrotor", num_envs=16, seed=4, target_episode_length=900.0)
    assert short.get_suptitle() == "quadrotor, 16 environments, seed 4"
    length = short.axes[0]
    assert length.lines[0].get_marker() == "." and list(length.lines[1].get_ydata()) == [900, 900]
    assert all(float(x).is_integer() for x in short.axes[-1].get_xticks())
    long = draw(200, env="quadrotor")
    assert long.get_suptitle() == "quadrotor"
    assert long.axes[0].lines[0].get_marker() == "None" and len(long.axes[0].lines) == 1
    (tmp_path / CONFIG).unlink()
    learning_curve.plot(tmp_path)
    assert figures[-1].get_suptitle() == ""


def test_figures_of_a_run_read_back(tmp_path):
    """Non-finite figures and truncated lines are left out; of a repeated iteration the last one counts."""
    log = RunLog(tmp_path, tensorboard=False)
    log.write({"iteration": 1, "episode_length": float("nan"), "kl": 0.5})
    log.write({"iteration": 2, "episode_length": 60.0, "kl": 0.25})
    log.close()
    with open(tmp_path / PROGRESS, "a") as file:
        file.write('{"iteration": 3, "epi\n')
    log = RunLog(tmp_path, tensorboard=False)
    log.write({"iteration": 2, "episode_length": 61.0})
    log.close()
    assert learning_curve.read(tmp_path) == [{"iteration": 1, "kl": 0.5}, {"iteration": 2, "episode_length": 61.0}]
    pytest.importorskip("matplotlib")
    assert learning_curve.plot(tmp_path).read_bytes().startswith(b"\x89PNG")


def test_a_truncated_line_does_not_spoil_the_next_one(tmp_path):
    (tmp_path / PROGRESS).write_text('{"iteration": 1}\n{"iteration": 2, "epi')
    log = RunLog(tmp_path, tensorboard=False)
    log.write({"iteration": 2, "kl": 0.5})
    log.close()
    assert learning_curve.read(tmp_path) == [{"iteration": 1}, {"iteration": 2, "kl": 0.5}]
