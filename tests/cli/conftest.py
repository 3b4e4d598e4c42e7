"""Runs of the command line, in a process of their own or in this one."""

from __future__ import annotations

import subprocess
import sys
import types
from collections.abc import Callable

import pytest

from pydrone.cli import main as cli


@pytest.fixture
def run() -> Callable[..., subprocess.CompletedProcess]:
    """Runs ``pydrone ARGV`` in a process of its own, where the modules ``blocked`` cannot be imported."""

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
    """Runs ``pydrone train ARGV`` up to where an environment would be built, and returns its configuration."""
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
    """Runs ``pydrone train`` with two quadrotors, in this process and an empty folder."""
    for name in ("tyro", "matplotlib"):
        pytest.importorskip(name)
    monkeypatch.chdir(tmp_path)
    sizes = ("--num-envs", "2", "--num-steps", "4", "--num-minibatches", "2", "--iterations", "2")
    fixed = ("--env", "quadrotor", "--no-tensorboard", "--device", "cpu", *sizes)
    return lambda *argv: cli.main(["train", *fixed, *argv])


@pytest.fixture
def making(monkeypatch):
    """Has an environment's construction raise what it is called with."""
    import pydrone.envs

    def set_error(error: BaseException) -> None:
        def make(*_, **__):
            raise error

        monkeypatch.setattr(pydrone.envs, "make", make)

    return set_error
