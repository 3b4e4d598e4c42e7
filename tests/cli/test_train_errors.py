"""``pydrone train``: its messages when something is missing, wrong or full."""

from __future__ import annotations

import sys

import pytest

from pydrone.cli import main as cli
from pydrone.cli import train


def test_a_wrong_option_of_the_task_is_named_before_a_folder_is_made(tmp_path, capsys):
    pytest.importorskip("tyro")
    folder = tmp_path / "run"
    with pytest.raises(SystemExit) as stopped:
        cli.main(["train", "--near-decay", "0", "--run-dir", str(folder)])
    assert stopped.value.code == 2 and not folder.exists()
    assert "near_decay: expected a finite number above 0, got 0.0" in capsys.readouterr().err


@pytest.mark.parametrize("module", ["tyro", "matplotlib", "genesis"])
def test_without_the_train_extra_one_sentence_says_what_to_install(module, monkeypatch, capsys):
    if module != "tyro":
        pytest.importorskip("tyro")
        found = train.importlib.util.find_spec
        monkeypatch.setattr(train.importlib.util, "find_spec", lambda name: None if name == module else found(name))
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
    """The error comes before an environment is built or a folder made."""
    making(AssertionError("an environment was built"))
    (tmp_path / "file").write_bytes(b"no checkpoint")
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert here(*argv) == 1
    assert capsys.readouterr().err == f"pydrone: {message}\n"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_more_minibatches_than_samples_by_the_default_size(here, making, monkeypatch, capsys):
    """The default number of environments is known only after the arguments are parsed."""
    from pydrone.ppo import config

    making(AssertionError("an environment was built"))
    monkeypatch.setattr(config, "default_num_envs", lambda device, env: 3)
    assert here("--num-envs", "None", "--num-steps", "2", "--num-minibatches", "7") == 1
    said = capsys.readouterr().err
    assert said == "pydrone: num_minibatches: expected at most num_envs * num_steps, 6 samples, got 7\n"


@pytest.mark.parametrize("error", [ValueError, OSError, RuntimeError])
def test_an_environment_that_cannot_be_built_is_one_sentence(error, here, making, capsys):
    making(error("the driver\n  is too old"))
    assert here() == 1
    assert capsys.readouterr().err == "pydrone: the driver is too old\n"


def test_a_full_disk_is_one_sentence(here, monkeypatch, capsys):
    from pydrone.ppo.training import checkpoint

    def full(path, state):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save", full)
    assert here() == 1
    assert capsys.readouterr().err == "pydrone: [Errno 28] No space left on device\n"
