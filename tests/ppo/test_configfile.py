"""Settings in TOML: what a file may contain, the error messages, and that a run's own file reproduces its settings."""

from __future__ import annotations

import dataclasses
import enum
import json
import sys
from pathlib import Path

import pytest
import torch

from pydrone.envs import Randomization, TaskOptions
from pydrone.ppo import configfile
from pydrone.ppo.config import PPOConfig, TrainConfig
from pydrone.ppo.training import checkpoint

if sys.version_info < (3, 11):
    pytest.importorskip("tomli")


@pytest.fixture
def read(tmp_path):
    def read(text: str) -> dict:
        path = tmp_path / "run.toml"
        path.write_text(text, encoding="utf-8")
        return configfile.read(path)

    return read


def build(values: dict) -> TrainConfig:
    parts = {"ppo": PPOConfig, "randomization": Randomization, "task": TaskOptions}
    return TrainConfig(**{**values, **{name: part(**values.get(name, {})) for name, part in parts.items()}})


def test_names_and_types(read):
    values = read(
        'env = "quadrotor"\nnum-envs = 64\nmax_iterations = 7\ntensorboard = false\ntarget_episode_length = 100\n'
        '[ppo]\nlr = 1\nhidden_dims = [64, 32]\nclip-param = 0.1\nschedule = "fixed"\n'
    )
    assert values == {
        "env": "quadrotor",
        "num_envs": 64,
        "iterations": 7,
        "tensorboard": False,
        "target_episode_length": 100.0,
        "ppo": {"learning_rate": 1.0, "hidden_dims": (64, 32), "clip": 0.1, "schedule": "fixed"},
    }
    assert type(values["target_episode_length"]) is float and type(values["ppo"]["learning_rate"]) is float
    assert read("") == {} and read('num_envs = "None"') == {"num_envs": None}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("num_env = 4", "num_env: no such setting; the nearest is num_envs"),
        ("[ppo]\nlearning_rat = 1.0", "ppo.learning_rat: no such setting; the nearest is learning_rate"),
        ("learning_rate = 1.0", "learning_rate: no such setting; the nearest is learning_rate in [ppo]"),
        ("[ppo]\nseed = 1", "ppo.seed: no such setting; the nearest is seed at the top, before any table"),
        ("[pp]\n", "pp: no such setting; the nearest is ppo"),
        ("iterations = 3\nmax-iterations = 4", "iterations: given twice, the second time as max-iterations"),
        ("num_envs = 4.5", 'num_envs: expected an int or "None", got 4.5'),
        ("num_steps = true", "num_steps: expected an int, got True"),
        ('tensorboard = "no"', "tensorboard: expected true or false, got 'no'"),
        ("env = 3", "env: expected a string, got 3"),
        ("[randomization]\nmass = 1", "randomization.mass: expected a list of 2, got 1"),
        ("weight_near = 1", "weight_near: no such setting; the nearest is weight_near in [task]"),
        ("device = 0", 'device: expected a string or "None", got 0'),
        ("ppo = 3", "ppo: expected a table, got 3"),
        ('[ppo]\ngamma = "0.9"', "ppo.gamma: expected a number, got '0.9'"),
        ("[ppo]\nhidden_dims = 64", "ppo.hidden_dims: expected a list, got 64"),
        ("[ppo]\nhidden_dims = [64, 1.5]", "ppo.hidden_dims[1]: expected an int, got 1.5"),
        ("num_envs = ", "expected TOML: "),
    ],
)
def test_mistakes_are_named(text, message, read, tmp_path):
    with pytest.raises(ValueError) as raised:
        read(text)
    assert str(raised.value).startswith(f"{tmp_path / 'run.toml'}: {message}")


class Schedule(str, enum.Enum):
    FIXED = "fixed"


def test_values_that_only_behave_like_plain_ones_are_written_as_those(read, tmp_path):
    """NumPy's and torch's scalars, enums, paths and devices, as a sweep hands them over."""
    np = pytest.importorskip("numpy")
    odd = {"learning_rate": np.float64(1e-3), "schedule": Schedule.FIXED, "num_epochs": np.int64(3)}
    odd |= {"hidden_dims": (np.int64(8), torch.tensor(4)), "normalize_obs": np.bool_(True)}
    plain = {"learning_rate": 1e-3, "schedule": "fixed", "num_epochs": 3, "hidden_dims": (8, 4), "normalize_obs": True}
    randomization = Randomization(mass=(np.float64(0.5), 2.0))
    config = TrainConfig(
        run_dir=Path("a"), device=torch.device("cpu"), ppo=PPOConfig(**odd), randomization=randomization
    )
    expected = TrainConfig(
        run_dir="a", device="cpu", ppo=PPOConfig(**plain), randomization=Randomization(mass=(0.5, 2.0))
    )
    assert repr(config) == repr(expected)
    settings = dataclasses.asdict(config)
    assert json.loads(json.dumps(settings))["ppo"]["learning_rate"] == 1e-3
    assert checkpoint.load(checkpoint.save(tmp_path / "model.pt", settings)) == settings
    assert read(configfile.dumps(config))["ppo"]["hidden_dims"] == (8, 4)


def test_the_file_of_a_run_gives_its_settings(read, tmp_path):
    ppo = PPOConfig(learning_rate=1e-05, hidden_dims=(7,), clipped_value_loss=False, chunk_size=None)
    odd = 'a "quoted" \\ name\n\x7f\u00e9\U0001f681'
    config = TrainConfig("quadrotor", 3, seed=-4, device="cpu", target_episode_length=12.5, wandb_project=odd, ppo=ppo)
    config.randomization = Randomization(mass=(0.8, 1.2), latency=(0, 2))
    config.task = TaskOptions(weight_near=0.5, resample_targets=False)
    path = configfile.write(tmp_path, config)
    text = path.read_text(encoding="utf-8")
    assert path.name == "config.toml" and build(configfile.read(path)) == config
    for field in (*dataclasses.fields(TrainConfig), *dataclasses.fields(PPOConfig)):
        assert field.metadata["help"] in text, "each setting follows its help text"


def test_folder_and_checkpoint_belong_to_one_run(read):
    """They are written as comments, so that the next run does not take them over."""
    text = configfile.dumps(TrainConfig(run_dir="runs/a", resume="runs/b"))
    assert '# run_dir = "runs/a"' in text and '# resume = "runs/b"' in text
    assert read(text).keys().isdisjoint({"run_dir", "resume"})


def test_settings_of_another_version_are_left_out():
    table = {"num_envs": 4, "gone": 1, "ppo": {"clip": 0.1, "gone": 2}}
    assert configfile.checked(TrainConfig, table, known_only=True) == {"num_envs": 4, "ppo": {"clip": 0.1}}


def test_the_second_tree_wins():
    first = {"a": 1, "b": 2, "ppo": {"c": 3, "d": 4}}
    assert configfile.merged(first, {"b": 5, "ppo": {"d": 6}, "e": 7}) == {
        "a": 1,
        "b": 5,
        "ppo": {"c": 3, "d": 6},
        "e": 7,
    }
    assert first["ppo"] == {"c": 3, "d": 4}
