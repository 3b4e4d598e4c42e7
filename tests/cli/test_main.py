"""``pydrone``: its commands and its exit."""

from __future__ import annotations

import os
import subprocess
import sys
import types

import pytest

import pydrone
from pydrone.cli import main as cli


def test_commands_and_version(capsys):
    for argv, status, said in (
        (["--version"], 0, f"pydrone {pydrone.__version__}"),
        (["--help"], 0, "train"),
        ([], 2, "COMMAND"),
        (["fly"], 2, "invalid choice: 'fly'"),
    ):
        with pytest.raises(SystemExit) as stopped:
            cli.main(argv)
        assert stopped.value.code == status
        captured = capsys.readouterr()
        assert said in captured.out + captured.err


def test_help_imports_nothing_heavy(run):
    blocked = ("tyro", "matplotlib", "tensorboard", "genesis", "gymnasium", "rich")
    result = run("memory-is-not-this", blocked=blocked)
    assert result.returncode == 2 and "invalid choice" in result.stderr


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_a_command_gets_what_follows_its_name(name, monkeypatch):
    seen = []
    module = types.ModuleType(f"pydrone.cli.{name}")
    module.main = lambda argv: seen.append(argv) or 7
    monkeypatch.setitem(sys.modules, module.__name__, module)
    assert cli.main([name, "--num-envs", "8"]) == 7
    assert seen == [["--num-envs", "8"]]


@pytest.mark.skipif(os.name != "posix", reason="pipes of POSIX")
def test_a_closed_output_ends_quietly():
    read, write = os.pipe()
    os.close(read)
    code = "import sys; from pydrone.cli.main import main; sys.exit(main(['memory']))"
    result = subprocess.run([sys.executable, "-c", code], stdout=write, stderr=subprocess.PIPE, text=True, timeout=300)
    os.close(write)
    assert (result.returncode, result.stderr) == (141, "")
