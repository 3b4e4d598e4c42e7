"""Environments from other packages, found through the metadata of a distribution that the test creates."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from pydrone.cli import main as cli
from pydrone.envs import known, make
from pydrone.ppo.config import TrainConfig

POINT = """
import torch
from pydrone.envs.base import StepResult


class Point:
    obs, actions, max_episode_length, autoreset = 2, 1, 5, "same_step"

    def __init__(self, num_envs, device="cpu", seed=0, gain=1.0):
        self.num_envs, self.device, self.gain = num_envs, torch.device(device), gain
        self.age = torch.zeros(num_envs, dtype=torch.int64)

    def reset(self):
        return torch.zeros(self.num_envs, 2)

    def step(self, actions):
        self.age = self.age % 5 + 1
        obs, dones = torch.zeros(self.num_envs, 2), self.age == 5
        return StepResult(obs, -actions[:, 0].square() * self.gain, dones, dones, obs, None, {})

    def randomize_episode_lengths(self):
        pass

    def close(self):
        pass


def broken(**kwargs):
    return 3


def fewer(num_envs, **kwargs):
    return Point(num_envs - 1)
"""


@pytest.fixture
def distribution(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Installs a package NAME with a module ``NAME_envs`` and the given entry points for the duration of the test."""

    def install(name: str = "acme", **points: str) -> None:
        site = tmp_path / name
        info = site / f"{name}-1.0.dist-info"
        info.mkdir(parents=True)
        (site / f"{name}_envs.py").write_text(POINT)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        lines = [f"{env} = {value}" for env, value in points.items()]
        (info / "entry_points.txt").write_text("\n".join(["[pydrone.envs]", *lines, ""]))
        monkeypatch.syspath_prepend(site)
        monkeypatch.delitem(sys.modules, f"{name}_envs", raising=False)

    return install


def test_an_installed_package_adds_an_environment(distribution) -> None:
    assert "point" not in known()
    distribution(point="acme_envs:Point")
    assert "point" in known()
    assert "acme_envs" not in sys.modules  # imported only on demand
    assert TrainConfig(env="point").env == "point"
    env = make("point", 3, gain=2.0)
    assert type(env).__module__ == "acme_envs"
    assert (env.num_envs, env.gain) == (3, 2.0)
    names = "genesis-course, genesis-hover, point, quadrotor, quadrotor-course"
    with pytest.raises(ValueError, match=f"env: expected one of {names}, got 'pint'"):
        TrainConfig(env="pint")
    with pytest.raises(ValueError, match=r"env: expected one of .*, got 3"):
        TrainConfig(env=3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("value", "options", "error", "text"),
    [
        ("acme_gone:Env", {}, ImportError, "env 'x': acme_gone:Env of acme cannot be imported: No module named"),
        (
            "acme_envs:Gone",
            {},
            ImportError,
            "env 'x': acme_envs:Gone of acme cannot be imported: .*no attribute 'Gone'",
        ),
        (
            "acme_envs:broken",
            {},
            ValueError,
            "expected acme_envs:broken of acme to make a .*Env, got a int without num_en",
        ),
        ("acme_envs:fewer", {}, ValueError, "env 'x': expected num_envs 4, got 3"),
        ("acme_envs:Point", {"wind": 1}, ValueError, "env 'x': .* cannot be called with num_envs, .* argument 'wind'"),
    ],
)
def test_what_a_package_offers_is_checked(value, options, error, text, distribution) -> None:
    distribution(x=value)
    with pytest.raises(error, match=text):
        make("x", 4, **options)


def test_two_packages_with_one_name(distribution) -> None:
    distribution("acme", x="acme_envs:Point")
    distribution("brand", x="brand_envs:Point")
    with pytest.raises(ValueError, match="'x' is offered more than once: acme_envs:Point of acme and brand_envs:Point"):
        make("x", 1)


def test_a_package_cannot_take_a_name_of_pydrones(distribution) -> None:
    distribution(quadrotor="acme_envs:Point")
    assert type(make("quadrotor", 1)).__module__ == "pydrone.envs.quadrotor"


def test_train_takes_it_by_name(distribution, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tyro")
    pytest.importorskip("matplotlib")
    distribution(point="acme_envs:Point")
    sizes = ["--num-envs", "4", "--num-steps", "6", "--iterations", "2", "--no-tensorboard", "--device", "cpu"]
    assert cli.main(["train", "--env", "point", *sizes, "--run-dir", str(tmp_path / "run")]) == 0
    assert "point: 4 environments on cpu" in capsys.readouterr().out
    assert cli.main(["train", "--env", "point", *sizes, "--wind", "0", "0.1"]) == 1
    assert "env 'point': acme_envs:Point of acme cannot be called with" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["train", "--env", "pint", *sizes])
    said = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert "env: expected one of genesis-course, genesis-hover, point," in said
