"""``pydrone train``: its options, and a training from start to finish."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from pydrone.cli import train
from pydrone.envs import Randomization, TaskOptions
from pydrone.ppo.config import PPOConfig, TrainConfig
from pydrone.ppo.presets import PRESETS

ROOT = Path(__file__).resolve().parents[2]


def parse(*argv: str) -> TrainConfig:
    tyro = pytest.importorskip("tyro")
    return tyro.cli(tyro.conf.OmitArgPrefixes[train.for_tyro(TrainConfig)], args=list(argv))


def test_defaults_are_those_of_the_configuration():
    assert dataclasses.asdict(parse()) == dataclasses.asdict(TrainConfig())
    assert isinstance(parse(), TrainConfig) and isinstance(parse().ppo, PPOConfig)


def test_the_defaults_of_the_task():
    config, ppo = TrainConfig(), PPOConfig()
    assert (config.num_steps, config.iterations, config.env) == (100, 301, "genesis-hover")
    assert (ppo.learning_rate, ppo.schedule, ppo.desired_kl) == (3e-4, "adaptive", 0.01)
    assert (ppo.num_epochs, ppo.num_minibatches, ppo.clip, ppo.entropy_coef) == (5, 4, 0.2, 0.004)
    assert (ppo.value_loss_coef, ppo.clipped_value_loss, ppo.max_grad_norm) == (1.0, True, 1.0)
    assert (ppo.gamma, ppo.lam, ppo.hidden_dims, ppo.init_std) == (0.99, 0.95, (128, 128), 1.0)


@pytest.mark.parametrize(
    ("flags", "name", "value"),
    [
        (("--num-steps-per-env", "24"), "num_steps", 24),
        (("--num-steps", "24"), "num_steps", 24),
        (("--max-iterations", "7"), "iterations", 7),
        (("--iterations", "7"), "iterations", 7),
        (("--num-envs", "512"), "num_envs", 512),
        (("--target-episode-length", "1000"), "target_episode_length", 1000.0),
        (("--no-tensorboard",), "tensorboard", False),
    ],
)
def test_flags(flags, name, value):
    assert dataclasses.asdict(parse(*flags)) == dataclasses.asdict(TrainConfig(**{name: value}))


@pytest.mark.parametrize(
    ("flags", "name", "value"),
    [
        (("--lr", "1e-3"), "learning_rate", 1e-3),
        (("--num-learning-epochs", "3"), "num_epochs", 3),
        (("--num-mini-batches", "2"), "num_minibatches", 2),
        (("--clip-param", "0.1"), "clip", 0.1),
        (("--hidden-dims", "64", "32"), "hidden_dims", (64, 32)),
        (("--schedule", "fixed"), "schedule", "fixed"),
    ],
)
def test_flags_of_the_algorithm(flags, name, value):
    assert dataclasses.asdict(parse(*flags).ppo) == dataclasses.asdict(PPOConfig(**{name: value}))


def parsed(*argv: str) -> TrainConfig:
    """With presets and files."""
    pytest.importorskip("tyro")
    return train._parse(list(argv))


@pytest.mark.parametrize("env", ["genesis-hover", "quadrotor", "quadrotor-course"])
def test_presets(env, tmp_path):
    """The default is to hover where that is the task; files and flags win over a preset."""
    hover, plain = PRESETS["hover"].settings, dataclasses.asdict
    example, tables = plain(TrainConfig(env=env)), {"task": TaskOptions, "ppo": PPOConfig}
    named = plain(
        TrainConfig(env=env, **{name: tables[name](**x) if name in tables else x for name, x in hover.items()})
    )
    assert plain(parsed("--env", env, "--preset", "hover")) == named
    assert plain(parsed("--env", env)) == (example if env == "quadrotor-course" else named)
    assert plain(parsed("--env", env, "--preset", "genesis-example")) == example
    file = tmp_path / "settings.toml"
    file.write_text("[task]\nhold = 2.0\n[ppo]\nlam = 0.9\n")
    alone = plain(parsed("--env", env, "--config", str(file)))  # as before there were presets
    assert alone == plain(TrainConfig(env=env, task=TaskOptions(hold=2.0), ppo=PPOConfig(lam=0.9)))
    mixed = parsed("--env", env, "--preset", "hover", "--config", str(file), "--gamma", "0.95")
    assert plain(mixed.task) == plain(TaskOptions(**hover["task"] | {"hold": 2.0}))
    assert plain(mixed.ppo) == plain(PPOConfig(**hover["ppo"] | {"lam": 0.9, "gamma": 0.95}))


def test_an_unknown_preset_is_refused():
    with pytest.raises(ValueError, match=r"--preset: expected one of hover, .*, got 'fast'"):
        parsed("--preset", "fast")


def test_help_shows_every_default_and_every_name(run):
    pytest.importorskip("tyro")
    result = run("train", "--preset", "genesis-example", "--help")
    assert result.returncode == 0
    text = " ".join(result.stdout.replace("│", " ").split())
    for config in (TrainConfig, PPOConfig, Randomization, TaskOptions):
        for field in dataclasses.fields(config):
            if field.name in ("ppo", "randomization", "task"):
                continue
            assert f"--{field.name.replace('_', '-')}" in text
            assert field.metadata["help"] in text
            if field.name == "env_kwargs":  # empty
                continue
            default = field.default
            default = " ".join(map(str, default)) if isinstance(default, tuple) else default
            assert f"(default: {default})" in text, field.name
            assert all(alias in text for alias in field.metadata["aliases"])
    text = " ".join(run("train", "--help").stdout.replace("│", " ").split())
    assert "(default: 0.98)" in text and all(f"{name}: {x.help}" in text for name, x in PRESETS.items())


def test_number_of_environments_depends_on_the_device(trained):
    seen = trained()
    assert seen.name == "quadrotor" and seen.env["num_envs"] == 1024 and seen.env["seed"] == 1
    assert trained("--num-envs", "3").env["num_envs"] == 3


def test_options_of_the_task_reach_the_environment(trained, tmp_path):
    """Only options that were changed, as environments of other packages do not know them."""
    example = ("--preset", "genesis-example")
    assert trained(*example, "--weight-near", "0").env.keys() == {"num_envs", "device", "seed"}
    file = tmp_path / "settings.toml"
    file.write_text("[task]\nhold = 1.0\nweight_near = 1.0\n")
    env = trained(*example, "--config", str(file), "--near-decay", "5").env
    del env["num_envs"], env["device"], env["seed"]
    assert env == {"hold": 1.0, "weight_near": 1.0, "near_decay": 5.0}
    assert PRESETS["hover"].settings["task"].items() <= trained().env.items()


def test_train_from_beginning_to_end(run, tmp_path):
    for module in ("tyro", "matplotlib", "tensorboard"):
        pytest.importorskip(module)
    folder = tmp_path / "run"
    sizes = ("--num-envs", "16", "--num-steps-per-env", "8", "--max-iterations", "2")
    result = run("train", "--env", "quadrotor", "--device", "cpu", *sizes, "--run-dir", str(folder))
    assert result.returncode == 0, result.stderr
    assert "16 environments on cpu" in result.stdout and "2/2  reward" in result.stdout
    names = {entry.name for entry in folder.iterdir()}
    assert {"model_2.pt", "progress.jsonl", "config.json", "learning_curve.png"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert (folder / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((folder / "config.json").read_text())["num_envs"] == 16
    for path in ("model_2.pt", "learning_curve.png"):
        assert str(folder / path) in result.stdout
    assert "Memory of the rollout and its minibatches: " in result.stdout
    assert result.stdout.count("iterations are done") == 1


@pytest.mark.slow  # the default tests train in Genesis in tests/envs/test_genesis.py, where it is built already
@pytest.mark.genesis
def test_train_in_genesis(run, tmp_path):
    """64 drones, a few iterations; in its own process, as Genesis is initialised once, for one device."""
    for module in ("tyro", "matplotlib", "genesis"):
        pytest.importorskip(module)
    argv = ("--device", "cpu", "--num-envs", "64", "--num-steps-per-env", "100", "--max-iterations", "4")
    result = run("train", *argv, "--no-tensorboard", "--run-dir", str(tmp_path))
    assert result.returncode == 0, result.stderr[-2000:]
    assert "4/4  reward" in result.stdout and (tmp_path / "model_4.pt").exists()
    rows = [json.loads(line) for line in (tmp_path / "progress.jsonl").read_text().splitlines()]
    # An untrained policy lets the drone fall for half a second, at least 45 steps, until it is 10 cm above the ground.
    assert len(rows) == 4 and all(30 < row["episode_length"] < 200 and row["episodes"] > 0 for row in rows)


def test_says_why_the_slow_backend_runs(here, monkeypatch, capsys):
    from pydrone.ops import dispatch, native

    monkeypatch.setattr(dispatch, "_cache", {})
    monkeypatch.delenv("PYDRONE_BACKEND", raising=False)
    monkeypatch.setattr(native, "CPU_MISSING", "no C++ compiler was found")
    assert here() == 0
    said = [line for line in capsys.readouterr().out.splitlines() if "no C++ compiler was found" in line]
    assert len(said) == 1 and said[0].startswith("Backend reference, plain PyTorch and slower")
    monkeypatch.setattr(dispatch, "_cache", {})
    monkeypatch.setenv("PYDRONE_BACKEND", "reference")
    assert here("--run-dir", "asked-for") == 0
    assert "Backend reference" not in capsys.readouterr().out
