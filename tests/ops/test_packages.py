"""Optional packages that are missing, and such that are installed and broken."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pydrone.cli.main import main
from pydrone.envs.genesis_hover import init_genesis
from pydrone.ppo.exporting import files
from pydrone.ppo.training.run_log import RunLog
from pydrone.report import curves, learning_curve, live, trajectories, video

USES: dict[str, Callable[[Path], object]] = {
    "genesis": lambda path: init_genesis(torch.device("cpu"), 0),
    "tensorboard": lambda path: RunLog(path),
    "wandb": lambda path: RunLog(path, False, wandb_project="x"),
    "matplotlib": lambda path: learning_curve.plot(path),
    "matplotlib, paths": lambda path: trajectories.draw("", [], path / "x.png"),
    "matplotlib, several runs": lambda path: curves.draw([], path / "x.png"),
    "av": lambda path: video.render(None, 0, path / "x.mp4"),
    "onnx": lambda path: files._write_onnx(path, (), {}, (1, 0), {}),
    "rich": lambda path: live.LiveView(""),
}


@pytest.fixture(params=USES)
def use(request, tmp_path, monkeypatch) -> tuple[str, Callable[[], object]]:
    """A package that has not been imported, and something that does."""
    module = request.param.partition(",")[0]
    for name in [x for x in sys.modules if x.split(".")[0] == module or x.startswith(f"torch.utils.{module}")]:
        monkeypatch.delitem(sys.modules, name)
    return module, lambda: USES[request.param](tmp_path)


def test_a_missing_package_is_named_with_its_installation(use, monkeypatch):
    module, run = use

    class Missing:
        @staticmethod
        def find_spec(name, path=None, target=None):
            if name == module:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(sys, "meta_path", [Missing, *sys.meta_path])
    with pytest.raises(ImportError, match=rf" needs {module}: `pip install .*` installs it"):
        run()


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import no_such_part", "No module named 'no_such_part'"),
        ("from math import no_such_name", "cannot import name 'no_such_name' from 'math'"),
    ],
)
def test_of_an_installed_package_the_import_that_fails_is_named(use, source, reason, tmp_path, monkeypatch):
    module, run = use
    (tmp_path / module).mkdir()
    (tmp_path / module / "__init__.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ImportError, match=f" needs {module}, which is installed, but cannot be imported: {reason}"):
        run()


def test_the_commands_say_it_in_one_line(tmp_path, monkeypatch, capsys):
    for name in [x for x in sys.modules if x.split(".")[0] in ("tyro", "matplotlib")]:
        monkeypatch.delitem(sys.modules, name)
    for module in ("tyro", "matplotlib"):
        (tmp_path / f"{module}.py").write_text("from math import no_such_name")
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "progress.jsonl").write_text('{"iteration": 1, "reward": 1.0}\n')
    for argv, module in ((["train"], "tyro"), (["plot", str(tmp_path)], "matplotlib")):
        assert main(argv) == 1
        said = capsys.readouterr().err
        assert said.startswith("pydrone: ") and said.count("\n") == 1
        assert f"needs {module}, which is installed, but cannot be imported: cannot import name" in said
