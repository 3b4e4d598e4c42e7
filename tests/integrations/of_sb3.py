"""Runs Stable-Baselines3's own tests of PPO with its class, and with pydrone's in its place.

pip downloads them in its sdist; nothing of that is kept. They need pandas.

>>> .venv/bin/python tests/integrations/of_sb3.py          # the arguments of pytest may follow

The results that differ are printed at the end.
"""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import pytest

DISTRIBUTION = "stable_baselines3"
OTHERS = "not (SAC or TD3 or DDPG or DQN or A2C)"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--pydrone", action="store_true", help="pydrone's PPO in place of Stable-Baselines3's")


def pytest_configure(config: pytest.Config) -> None:
    """As pytest's plugin: before a test imports the class."""
    if config.getoption("--pydrone"):
        import stable_baselines3

        from pydrone.integrations.sb3 import PPO, RolloutBuffer

        # In Stable-Baselines3's order: some tests want a reward that few orders of the minibatches give.
        RolloutBuffer.__init__.__defaults__ = tuple(
            "sb3" if x == "full" else x for x in RolloutBuffer.__init__.__defaults__
        )
        stable_baselines3.PPO = stable_baselines3.ppo.PPO = PPO


def run(folder: Path, swap: bool, arguments: list[str]) -> dict[str, str]:
    """The outcome of each test."""
    files = [x.name for x in sorted((folder / "tests").glob("test_*.py")) if "PPO" in x.read_text()]
    command = [sys.executable, "-m", "pytest", "-p", Path(__file__).stem, *["--pydrone"] * swap, "-k", OTHERS]
    command += ["-rA", "-q", "--tb=short", "--continue-on-collection-errors", *arguments]
    command += [f"tests/{x}" for x in files]
    shutil.copy(__file__, folder)  # pytest imports its plugins from there
    print("with pydrone:" if swap else "without:", flush=True)
    done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, text=True)
    print(done.stdout.splitlines()[-1], flush=True)
    (folder / f"with-{int(swap)}.log").write_text(done.stdout)
    found = re.findall(r"^(PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS) (tests/\S+)", done.stdout, re.MULTILINE)
    return {test: outcome for outcome, test in found}


def main(arguments: list[str]) -> int:
    with tempfile.TemporaryDirectory() as name:
        folder, version = Path(name), importlib.metadata.version(DISTRIBUTION)
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:", "-d", name]
        subprocess.run([*pip, f"{DISTRIBUTION}=={version}"], check=True)
        (archive,) = folder.glob("*.tar.gz")
        with tarfile.open(archive) as file:
            file.extractall(folder, filter="data")
        source = folder / f"{DISTRIBUTION}-{version}"
        (source / DISTRIBUTION).rename(source / "unused")  # the installed package is tested
        before, after = (run(source, swap, arguments) for swap in (False, True))
        worse = {x: y for x, y in after.items() if y != before.get(x)}
        worse |= dict.fromkeys(before.keys() - after.keys(), "gone")
        for test, outcome in worse.items():
            print(f"{test}: {before.get(test, 'not there')} without pydrone, {outcome} with it")
        if worse:
            print((source / "with-1.log").read_text())
        return bool(worse)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
