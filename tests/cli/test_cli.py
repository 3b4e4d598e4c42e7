"""The command line: what it accepts, what it shows, what it says when something is missing."""

from __future__ import annotations

import dataclasses
import importlib.machinery
import json
import os
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest

import pydrone
from pydrone.cli import main as cli
from pydrone.envs import Randomization, TaskOptions
from pydrone.ppo.config import PPOConfig, TrainConfig
from pydrone.report import learning_curve

ROOT = Path(__file__).resolve().parents[2]


def run(*argv: str, blocked: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    """``pydrone ARGV`` in a process of its own, where the modules ``blocked`` cannot be imported."""
    code = (
        "import sys\n"
        f"for name in {blocked!r}: sys.modules[name] = None\n"
        "from pydrone.cli.main import main\n"
        f"sys.exit(main({list(argv)!r}))"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)


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
    for config in (TrainConfig, PPOConfig, Randomization, TaskOptions):
        for field in dataclasses.fields(config):
            if field.name in ("ppo", "randomization", "task"):
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


def test_options_of_the_task_reach_the_environment(trained, tmp_path):
    """Only those that were changed: an environment of another package knows none of them."""
    assert trained("--weight-near", "0").env.keys() == {"num_envs", "device", "seed"}
    env = trained("--config", str(ROOT / "examples" / "hover.toml"), "--near-decay", "5").env
    del env["num_envs"], env["device"], env["seed"]
    assert env == {"hold": 1.0, "weight_near": 1.0, "near_decay": 5.0}


def test_a_wrong_option_of_the_task_is_named_before_a_folder_is_made(tmp_path, capsys):
    pytest.importorskip("tyro")
    folder = tmp_path / "run"
    with pytest.raises(SystemExit) as stopped:
        cli.main(["train", "--near-decay", "0", "--run-dir", str(folder)])
    assert stopped.value.code == 2 and not folder.exists()
    assert "near_decay: expected a finite number above 0, got 0.0" in capsys.readouterr().err


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
    assert "Memory of the rollout and its minibatches: " in result.stdout
    assert result.stdout.count("iterations are done") == 1


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


@pytest.mark.parametrize(
    ("argv", "environ", "message"),
    [
        (("--device", "foo"), {}, "--device foo: expected cpu, cuda, cuda:1, ..."),
        (("--run-dir", "file/run"), {}, "--run-dir file/run: cannot be made: Not a directory"),
        (("--resume", "file"), {}, "file: expected a checkpoint, got a file that PyTorch cannot read"),
        ((), {"PYDRONE_BACKEND": "nope"}, "PYDRONE_BACKEND: expected one of reference, cpu, triton, cuda, got 'nope'"),
    ],
)
def test_a_set_up_that_fails_is_one_sentence(argv, environ, message, here, making, monkeypatch, tmp_path, capsys):
    """Said before an environment is built or a folder made."""
    making(AssertionError("an environment was built"))
    (tmp_path / "file").write_bytes(b"no checkpoint")
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert here(*argv) == 1
    assert capsys.readouterr().err == f"pydrone: {message}\n"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_more_minibatches_than_samples_by_the_default_size(here, making, monkeypatch, capsys):
    """How many environments there are by default is known only after the arguments were read."""
    from pydrone.ppo import config

    making(AssertionError("an environment was built"))
    monkeypatch.setattr(config, "default_num_envs", lambda device: 3)
    assert here("--num-envs", "None", "--num-steps", "2", "--num-minibatches", "7") == 1
    said = capsys.readouterr().err
    assert said == "pydrone: num_minibatches: expected at most num_envs * num_steps, 6 samples, got 7\n"


@pytest.mark.parametrize("error", [ValueError, OSError, RuntimeError])
def test_an_environment_that_cannot_be_built_is_one_sentence(error, here, making, capsys):
    making(error("the driver\n  is too old"))
    assert here() == 1
    assert capsys.readouterr().err == "pydrone: the driver is too old\n"


def test_ctrl_c_while_starting_up(here, making, capsys):
    making(KeyboardInterrupt())
    assert here() == 130
    assert capsys.readouterr().err == "pydrone: interrupted\n"


def test_a_second_ctrl_c_stops_at_once(here, monkeypatch, capsys):
    from pydrone.envs.quadrotor import Quadrotor

    step = Quadrotor.step
    monkeypatch.setattr(Quadrotor, "step", lambda *args: (signal.raise_signal(signal.SIGINT), step(*args))[1])
    assert here() == 130
    captured = capsys.readouterr()
    assert captured.out.count("finishing this iteration and saving; Ctrl-C again stops now") == 1
    assert captured.err == "pydrone: interrupted\n"


@pytest.mark.skipif(os.name != "posix", reason="pipes of POSIX")
def test_a_closed_output_ends_quietly():
    read, write = os.pipe()
    os.close(read)
    code = "import sys; from pydrone.cli.main import main; sys.exit(main(['memory']))"
    result = subprocess.run([sys.executable, "-c", code], stdout=write, stderr=subprocess.PIPE, text=True, timeout=300)
    os.close(write)
    assert (result.returncode, result.stderr) == (141, "")


def test_resuming(here, trained, tmp_path, capsys):
    """Other targets than the first run had; at the end nothing is done, and nothing written."""
    assert here("--run-dir", "first") == 0
    path = str(tmp_path / "first" / "model_2.pt")
    capsys.readouterr()
    assert here("--resume", path, "--run-dir", "second") == 0
    assert capsys.readouterr().out == "Nothing to do: the checkpoint stands at iteration 2 of 2.\n"
    assert [entry.name for entry in tmp_path.iterdir()] == ["first"]
    assert here("--resume", path, "--iterations", "3", "--hidden-dims", "32", "--run-dir", "third") == 1
    said = capsys.readouterr().err
    assert "hidden_dims: expected (128, 128)" in said and "got (32,)" in said and said.count("\n") == 1
    assert trained("--resume", path, "--seed", "5", "--iterations", "3").env["seed"] == 5 + 2


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


def test_settings_from_a_file(trained, tmp_path, capsys):
    """The file over the defaults, the command line over the file."""
    (tmp_path / "run.toml").write_text("num_envs = 5\nseed = 7\n[ppo]\nnum_mini_batches = 2\n")
    seen = trained("--config", "run.toml", "--seed", "-9")
    assert seen.env["num_envs"] == 5 and seen.env["seed"] == -9
    with pytest.raises(SystemExit):
        cli.main(["train", "--config=run.toml", "--help"])
    assert "(default: 7)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("num_env = 5", "run.toml: num_env: no such setting; the nearest is num_envs"),
        ("[ppo]\ngamma = 1.5", "gamma: expected a number from 0 to 1, got 1.5"),
        (None, "--config run.toml: cannot be read: No such file or directory"),
    ],
)
def test_a_file_of_settings_that_cannot_be(text, message, here, making, tmp_path, capsys):
    making(AssertionError("an environment was built"))
    if text is not None:
        (tmp_path / "run.toml").write_text(text)
    assert cli.main(["train", "--env", "quadrotor", "--config", "run.toml"]) == 1
    assert capsys.readouterr().err == f"pydrone: {message}\n"


def test_the_file_of_a_run_repeats_it(here, tmp_path, capsys):
    """Into a folder of its own, with equal figures; its settings are those of the first."""
    assert here("--run-dir", "first", "--lr", "1e-3", "--seed", "6") == 0
    assert cli.main(["train", "--config", "first/config.toml", "--run-dir", "second"]) == 0
    first, second = (learning_curve.read(tmp_path / name)[-1] for name in ("first", "second"))
    assert first["value_loss"] == second["value_loss"] and first["reward"] == second["reward"]
    texts = [(tmp_path / name / "config.toml").read_text() for name in ("first", "second")]
    assert texts[0].replace('run_dir = "first"', "") == texts[1].replace('run_dir = "second"', "")


def test_resuming_a_run_by_its_folder(here, tmp_path, capsys):
    """With the run's settings, in its folder, from the newest checkpoint that is whole, to the bit."""
    assert here("--run-dir", "whole", "--iterations", "4", "--lr", "1e-3") == 0
    assert here("--run-dir", "parts", "--save-interval", "1", "--lr", "1e-3", "--iterations", "3") == 0
    newest = tmp_path / "parts" / "model_3.pt"
    newest.write_bytes(newest.read_bytes()[:-100])
    capsys.readouterr()
    assert cli.main(["train", "--resume", "parts", "--iterations", "4"]) == 0
    said = capsys.readouterr().out
    assert f"Passed over: {Path('parts', 'model_3.pt')}: expected a checkpoint, got a file whose checksum" in said
    assert f"Resuming from {Path('parts', 'model_2.pt')}\n" in said and "4/4  reward" in said
    assert "begin anew" not in said
    a, b = (learning_curve.read(tmp_path / name) for name in ("whole", "parts"))
    timed = ("time/", "steps_per_second")
    assert [{k: x for k, x in row.items() if not k.startswith(timed)} for row in a] == [
        {k: x for k, x in row.items() if not k.startswith(timed)} for row in b
    ]
    assert [entry.name for entry in tmp_path.iterdir() if entry.name.startswith("runs")] == []
    assert cli.main(["train", "--resume", "parts"]) == 0
    assert capsys.readouterr().out.endswith("Nothing to do: the checkpoint stands at iteration 4 of 4.\n")


def test_resuming_a_folder_without_a_checkpoint(here, making, tmp_path, capsys):
    making(AssertionError("an environment was built"))
    (tmp_path / "empty").mkdir()
    assert here("--resume", "empty") == 1
    said = capsys.readouterr().err
    assert said == (
        "pydrone: --resume empty: expected a run's folder with a checkpoint model_ITERATION.pt, found none\n"
    )


def test_a_full_disk_is_one_sentence(here, monkeypatch, capsys):
    from pydrone.ppo.training import checkpoint

    def full(path, state):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save", full)
    assert here() == 1
    assert capsys.readouterr().err == "pydrone: [Errno 28] No space left on device\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_signal_is_no_failure(number, here, monkeypatch, tmp_path, capsys):
    from pydrone.envs.quadrotor import Quadrotor

    step, steps = Quadrotor.step, []

    def signalled(self, actions):
        steps.append(1)
        if len(steps) == 2:
            signal.raise_signal(number)
        return step(self, actions)

    monkeypatch.setattr(Quadrotor, "step", signalled)
    assert here("--run-dir", "run", "--iterations", "9") == 0
    assert "Interrupted, after 1 iterations." in capsys.readouterr().out
    assert [entry.name for entry in (tmp_path / "run").glob("*.pt")] == ["model_1.pt"]


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_a_signal_from_outside_saves_and_exits_with_0(tmp_path):
    for name in ("tyro", "matplotlib"):
        pytest.importorskip(name)
    sizes = ("--num-envs", "4", "--num-steps", "8", "--num-minibatches", "2", "--iterations", "1000000")
    command = [sys.executable, "-m", "pydrone.cli.main", "train", "--env", "quadrotor", "--device", "cpu", *sizes]
    command += ["--no-tensorboard", "--run-dir", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if "reward" in line:
            process.send_signal(signal.SIGTERM)
            break
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "finishing this iteration and saving" in out and "Interrupted, after" in out
    (path,) = tmp_path.glob("model_*.pt")
    assert f"Checkpoint: {path}" in out


class Wandb(types.ModuleType):
    """Stands in for Weights & Biases: remembers what it is told."""

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
    """Imported only where asked for; told of every figure; a resumed run goes on in the same one."""
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
    assert run.arguments["config"]["num_envs"] == 2 and run.arguments["config"]["ppo"]["gamma"] == 0.99
    assert [row["train/iteration"] for row in run.rows] == [1, 2] and run.finished
    logged = learning_curve.read(tmp_path / "with")[-1]
    assert run.rows[-1] == {name if "/" in name else f"train/{name}": x for name, x in logged.items()}
    assert run.metrics == [("train/iteration", {}), ("*", {"step_metric": "train/iteration"})]
    assert cli.main(["train", "--resume", "with", "--iterations", "3"]) == 0
    assert stub.runs[1].arguments["id"] == "id0" and stub.runs[1].rows[0]["train/iteration"] == 3


def test_without_weights_and_biases_one_sentence_says_what_to_install(here, making, monkeypatch, capsys):
    making(AssertionError("an environment was built"))
    found = cli.importlib.util.find_spec
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None if name == "wandb" else found(name))
    assert here("--wandb") == 1
    assert capsys.readouterr().err == 'pydrone: wandb not installed; `pip install "pydrone-rl[wandb]"` installs it\n'
