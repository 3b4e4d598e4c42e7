"""Fixtures that run the command line, in a new process or in this one."""

from __future__ import annotations

import subprocess
import sys
import types
from collections.abc import Callable

import pytest

from pydrone.cli import main as cli


@pytest.fixture
def run() -> Callable[..., subprocess.CompletedProcess]:
    """Runs ``pydrone ARGV`` in a new process in which the modules ``blocked`` cannot be imported."""

    def in_a_process(*argv: str, blocked: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
        code = (
            "import sys\n"
            f"for name in {blocked!r}: sys.modules[name] = None\n"
            "from pydrone.cli.main import main\n"
            f"sys.exit(main({list(argv)!r}))"
        )
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)

    return in_a_process


@pytest.fixture
def trained(monkeypatch, tmp_path):
    """Runs ``pydrone train ARGV`` until it would build the environment, and returns its configuration."""
    pytest.importorskip("tyro")
    import pydrone.envs

    monkeypatch.chdir(tmp_path)

    class Stop(Exception):
        pass

    def parse(*argv: str) -> types.SimpleNamespace:
        seen = types.SimpleNamespace()

        def make(name, **kwargs):
            seen.name, seen.env = name, kwargs
            raise Stop

        monkeypatch.setattr(pydrone.envs, "make", make)
        with pytest.raises(Stop):
            cli.main(["train", "--env", "quadrotor", "--device", "cpu", *argv])
        return seen

    return parse


@pytest.fixture
def here(monkeypatch, tmp_path):
    """Runs ``pydrone train`` with two quadrotors, in this process and in an empty folder."""
    for name in ("tyro", "matplotlib"):
        pytest.importorskip(name)
    monkeypatch.chdir(tmp_path)
    sizes = ("--num-envs", "2", "--num-steps", "4", "--num-minibatches", "2", "--iterations", "2")
    fixed = ("--env", "quadrotor", "--no-tensorboard", "--device", "cpu", *sizes)
    return lambda *argv: cli.main(["train", *fixed, *argv])


@pytest.fixture
def making(monkeypatch):
    """Makes the construction of an environment raise the given error."""
    import pydrone.envs

    def set_error(error: BaseException) -> None:
        def make(*_, **__):
            raise error

        monkeypatch.setattr(pydrone.envs, "make", make)

    return set_error
