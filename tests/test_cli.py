"""The command line: what it accepts, what it shows, what it says when something is missing."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import types

import pytest

import pydrone
from pydrone import cli, report
from pydrone.ppo.config import PPOConfig, TrainConfig


def run(*argv: str, blocked: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    """``pydrone ARGV`` in a process of its own, where the modules ``blocked`` cannot be imported."""
    code = (
        "import sys\n"
        f"for name in {blocked!r}: sys.modules[name] = None\n"
        "from pydrone.cli import main\n"
        f"sys.exit(main({list(argv)!r}))"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)


@pytest.fixture
def trained(monkeypatch):
    """Runs ``pydrone train ARGV`` up to where an environment would be built, and returns its configuration."""
    pytest.importorskip("tyro")
    import pydrone.envs

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


def parse(*argv: str) -> TrainConfig:
    tyro = pytest.importorskip("tyro")
    return tyro.cli(tyro.conf.OmitArgPrefixes[cli._described(TrainConfig)], args=list(argv))


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


def test_help_shows_every_default_and_every_name():
    pytest.importorskip("tyro")
    result = run("train", "--help")
    assert result.returncode == 0
    text = " ".join(result.stdout.replace("│", " ").split())
    for config in (TrainConfig, PPOConfig):
        for field in dataclasses.fields(config):
            if field.name == "ppo":
                continue
            assert f"--{field.name.replace('_', '-')}" in text
            assert field.metadata["help"] in text
            default = field.default
            default = " ".join(map(str, default)) if isinstance(default, tuple) else default
            assert f"(default: {default})" in text, field.name
            assert all(alias in text for alias in field.metadata["aliases"])


def test_number_of_environments_depends_on_the_device(trained):
    seen = trained()
    assert seen.name == "quadrotor" and seen.env["num_envs"] == 1024 and seen.env["seed"] == 1
    assert trained("--num-envs", "3").env["num_envs"] == 3


def test_train_from_beginning_to_end(tmp_path):
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


@pytest.mark.genesis
def test_train_in_genesis(tmp_path):
    """64 drones, a few iterations; in a process of its own, as the simulator knows one device and one start."""
    for module in ("tyro", "matplotlib", "genesis"):
        pytest.importorskip(module)
    argv = ("--device", "cpu", "--num-envs", "64", "--num-steps-per-env", "100", "--max-iterations", "4")
    result = run("train", *argv, "--no-tensorboard", "--run-dir", str(tmp_path))
    assert result.returncode == 0, result.stderr[-2000:]
    assert "4/4  reward" in result.stdout and (tmp_path / "model_4.pt").exists()
    rows = [json.loads(line) for line in (tmp_path / "progress.jsonl").read_text().splitlines()]
    # A policy that knows nothing falls for half a second, 45 steps and more, before it is 10 cm above the ground.
    assert len(rows) == 4 and all(30 < row["episode_length"] < 200 and row["episodes"] > 0 for row in rows)


@pytest.mark.parametrize("module", ["tyro", "matplotlib", "genesis"])
def test_without_the_train_extra_one_sentence_says_what_to_install(module, monkeypatch, capsys):
    if module != "tyro":
        pytest.importorskip("tyro")
        found = cli.importlib.util.find_spec
        monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None if name == module else found(name))
    else:
        monkeypatch.setitem(sys.modules, "tyro", None)
    argv = ["--env", "genesis-hover", "--no-tensorboard"]
    if module == "matplotlib":
        argv[1] = "quadrotor"
    assert cli.main(["train", *argv]) == 1
    said = capsys.readouterr().err
    assert module in said and 'pip install "pydrone-rl[train]"' in said and said.count("\n") == 1


def test_a_device_that_is_not_there(capsys):
    torch = pytest.importorskip("torch")
    for name in ("tyro", "matplotlib"):
        pytest.importorskip(name)
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    assert cli.main(["train", "--env", "quadrotor", "--no-tensorboard", "--device", "cuda"]) == 1
    assert "--device cuda: this PyTorch finds no CUDA device" in capsys.readouterr().err


def test_a_checkpoint_that_is_not_there(capsys):
    for name in ("tyro", "matplotlib"):
        pytest.importorskip(name)
    argv = ["train", "--env", "quadrotor", "--no-tensorboard", "--device", "cpu", "--resume", "gone.pt"]
    assert cli.main(argv) == 1
    assert "--resume gone.pt: no such file" in capsys.readouterr().err


def test_figures_of_a_run_read_back(tmp_path):
    """What is not finite is left out, a torn line skipped, an iteration done again counts as its later self."""
    log = report.RunLog(tmp_path, tensorboard=False)
    log.write({"iteration": 1, "episode_length": float("nan"), "kl": 0.5})
    log.write({"iteration": 2, "episode_length": 60.0, "kl": 0.25})
    log.close()
    with open(tmp_path / report.PROGRESS, "a") as file:
        file.write('{"iteration": 3, "epi\n')
    log = report.RunLog(tmp_path, tensorboard=False)
    log.write({"iteration": 2, "episode_length": 61.0})
    log.close()
    assert report.read(tmp_path) == [{"iteration": 1, "kl": 0.5}, {"iteration": 2, "episode_length": 61.0}]
    pytest.importorskip("matplotlib")
    assert report.plot(tmp_path).read_bytes().startswith(b"\x89PNG")


def test_memory_hands_its_arguments_on(monkeypatch):
    seen = []
    module = types.ModuleType("pydrone.memory")
    module.main = lambda argv: seen.append(argv)
    monkeypatch.setitem(sys.modules, "pydrone.memory", module)
    monkeypatch.setattr(pydrone, "memory", module, raising=False)
    assert cli.main(["memory", "--num-envs", "8"]) == 0
    assert seen == [["--num-envs", "8"]]


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


def test_help_imports_nothing_of_weight():
    blocked = ("tyro", "matplotlib", "tensorboard", "genesis", "gymnasium", "rich")
    result = run("memory-is-not-this", blocked=blocked)
    assert result.returncode == 2 and "invalid choice" in result.stderr
