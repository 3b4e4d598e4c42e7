"""``pydrone train --wandb``."""

from __future__ import annotations

import importlib.machinery
import sys
import types

from pydrone.cli import main as cli
from pydrone.cli import train
from pydrone.report import learning_curve


class Wandb(types.ModuleType):
    """Stands in for Weights & Biases and records the calls."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
        self.runs = []

    def init(self, **arguments) -> types.SimpleNamespace:
        run = types.SimpleNamespace(id=arguments["id"] or f"id{len(self.runs)}", arguments=arguments, rows=[])
        run.metrics, run.finished = [], False
        run.log = run.rows.append
        run.define_metric = lambda name, **more: run.metrics.append((name, more))
        run.finish = lambda: setattr(run, "finished", True)
        self.runs.append(run)
        return run


def test_weights_and_biases(here, monkeypatch, tmp_path):
    """Imported only on request; gets every figure; a resumed run continues the same W&B run."""
    stub = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", stub)
    assert here("--run-dir", "without") == 0 and stub.runs == []
    assert here("--run-dir", "with", "--wandb", "--wandb-project", "drones") == 0
    (run,) = stub.runs
    assert {k: run.arguments[k] for k in ("project", "name", "id", "resume")} == {
        "project": "drones",
        "name": "with",
        "id": None,
        "resume": "allow",
    }
    assert run.arguments["config"]["num_envs"] == 2 and run.arguments["config"]["ppo"]["gamma"] == 0.98
    assert [row["train/iteration"] for row in run.rows] == [1, 2] and run.finished
    logged = learning_curve.read(tmp_path / "with")[-1]
    assert run.rows[-1] == {name if "/" in name else f"train/{name}": x for name, x in logged.items()}
    assert run.metrics == [("train/iteration", {}), ("*", {"step_metric": "train/iteration"})]
    assert cli.main(["train", "--resume", "with", "--iterations", "3"]) == 0
    assert stub.runs[1].arguments["id"] == "id0" and stub.runs[1].rows[0]["train/iteration"] == 3


def test_without_weights_and_biases_one_sentence_says_what_to_install(here, making, monkeypatch, capsys):
    making(AssertionError("an environment was built"))
    found = train.importlib.util.find_spec
    monkeypatch.setattr(train.importlib.util, "find_spec", lambda name: None if name == "wandb" else found(name))
    assert here("--wandb") == 1
    assert capsys.readouterr().err == 'pydrone: wandb not installed; `pip install "pydrone-rl[wandb]"` installs it\n'
