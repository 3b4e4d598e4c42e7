"""Files that are not valid checkpoints: the error names the file, and no code in it runs."""

from __future__ import annotations

import ast
import io
import json
import pickle
import struct
import warnings
import zipfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import pydrone
from pydrone.cli import main as cli
from pydrone.envs import make
from pydrone.ppo.config import PPOConfig, TrainConfig
from pydrone.ppo.trainer import CHECKPOINT_KEYS, Trainer
from pydrone.ppo.training import checkpoint
from pydrone.ppo.training.run_log import CONFIG, PROGRESS
from pydrone.report import learning_curve

CODE_RAN = "code in the file ran"


class Evil:
    """Unpickling it calls a function, which must never happen."""

    def __reduce__(self):
        return (exec, (f"raise SystemExit({CODE_RAN!r})",))


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A valid checkpoint."""
    config = TrainConfig(
        env="quadrotor",
        num_steps=4,
        iterations=1,
        tensorboard=False,
        ppo=PPOConfig(hidden_dims=(8,), num_minibatches=2, num_epochs=1),
    )
    folder = tmp_path_factory.mktemp("run")
    return Trainer(make("quadrotor", num_envs=4), config, folder, echo=lambda line: None).train().checkpoint


def saved(x: object, **options) -> bytes:
    content = io.BytesIO()
    torch.save(x, content, **options)
    return content.getvalue()


def sealed(change) -> bytes:
    """Turns a checkpoint's bytes into those of the changed state, with a valid checksum."""

    def make(whole: bytes) -> bytes:
        state = torch.load(io.BytesIO(whole), weights_only=True)
        return checkpoint._sealed(saved(change(state)))

    return make


def archive(name: str, content: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as written:
        written.writestr(name, content)
    return file.getvalue()


def torchscript() -> bytes:
    content = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.script(nn.Linear(2, 2)), content)
    return content.getvalue()


def npz() -> bytes:
    content = io.BytesIO()
    np.savez(content, w=np.zeros(3))
    return content.getvalue()


def safetensors() -> bytes:
    header = json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(8)


WHAT = "expected a checkpoint"
# Kind of file: its content, from a valid checkpoint's bytes, and what the error says besides the file's name.
FILES = {
    "empty": (lambda whole: b"", WHAT),
    "text": (lambda whole: b"iteration,reward\n1,2\n", WHAT),
    "random": (lambda whole: bytes(torch.randint(256, (5000,)).tolist()), WHAT),
    "half": (lambda whole: whole[: len(whole) // 2], "checksum is missing or wrong"),
    "without its last byte": (lambda whole: whole[:-1], "checksum is missing or wrong"),
    "changed": (lambda whole: whole[:999] + bytes([whole[999] ^ 1]) + whole[1000:], "checksum is missing or wrong"),
    "pickle with code": (lambda whole: pickle.dumps(Evil()), WHAT),
    "pickle with code, protocol 2": (lambda whole: pickle.dumps({"iteration": Evil()}, protocol=2), WHAT),
    "torch.save with code": (lambda whole: saved({"iteration": Evil()}), "checksum is missing or wrong"),
    "torch.save of old with code": (lambda whole: saved(Evil(), _use_new_zipfile_serialization=False), WHAT),
    "code under a right checksum": (sealed(lambda state: {**state, "policy": Evil()}), WHAT),
    "another library's": (lambda whole: saved({"model_state_dict": {}, "iter": 3}), "checksum is missing or wrong"),
    "zip": (lambda whole: archive("a.txt", b"a"), "checksum is missing or wrong"),
    "zip with a pickle": (lambda whole: archive("archive/data.pkl", pickle.dumps(Evil())), "checksum"),
    "TorchScript": (lambda whole: torchscript(), "checksum is missing or wrong"),
    "npz": (lambda whole: npz(), "checksum is missing or wrong"),
    "safetensors": (lambda whole: safetensors(), WHAT),
    "a list": (sealed(lambda state: [state]), "got a list"),
    "weights alone": (sealed(lambda state: state["policy"]), "without iteration, policy, learner, config"),
    "iteration of text": (sealed(lambda state: {**state, "iteration": "3"}), "iteration: expected an int"),
    "settings of text": (sealed(lambda state: {**state, "config": "ppo"}), "config: expected the settings"),
    "settings of no policy": (
        sealed(lambda state: {**state, "config": {"env": "quadrotor", "ppo": 3}}),
        "",
    ),
    "weights of text": (sealed(lambda state: {**state, "policy": {"actor.0.weight": "1"}}), ""),
    "no settings": (sealed(lambda state: {**state, "config": {}}), "config: expected the settings"),
}


@pytest.fixture(params=FILES)
def bad(request, trained, tmp_path) -> tuple[Path, str]:
    make, says = FILES[request.param]
    path = tmp_path / "model_1.pt"
    path.write_bytes(make(trained.read_bytes()))
    return path, says


def test_a_bad_file_is_named_by_every_command(bad, capsys, monkeypatch):
    """There is no traceback, and no code in the file runs (it would raise SystemExit)."""
    for needed in ("tyro", "matplotlib"):
        pytest.importorskip(needed)
    path, says = bad
    monkeypatch.chdir(path.parent)
    flags = ["--env", "quadrotor", "--device", "cpu", "--num-envs", "4", "--iterations", "2", "--no-tensorboard"]
    commands = {
        "eval": ["eval", str(path), "--episodes", "1", "--steps", "1", "--device", "cpu"],
        "export": ["export", str(path), "--format", "torchscript"],
        "train": ["train", "--resume", str(path), *flags],
    }
    for name, argv in commands.items():
        try:
            status = cli.main(argv)
        except SystemExit as stop:
            pytest.fail(f"{name}: {stop}")
        said = capsys.readouterr().err
        assert status == 1, (name, said)
        assert str(path) in said and says in said and said.count("\n") == 1, (name, said)
    assert [x.name for x in path.parent.rglob("*") if x.is_file()] == ["model_1.pt"], "nothing is left beside it"


def test_a_folder_of_bad_files_has_no_checkpoint(bad):
    """newest() skips a file that cannot be loaded as a training's checkpoint; a loadable one is checked later."""
    path, said = bad[0], []
    found = checkpoint.newest(path.parent, CHECKPOINT_KEYS, said.append)
    try:
        checkpoint.load(path, required=CHECKPOINT_KEYS)
    except ValueError as error:
        assert found is None and said == [str(error)]
    else:
        assert found == path and not said


def test_the_planted_code_would_run(tmp_path):
    """Otherwise the tests above would prove nothing."""
    for content in (pickle.dumps(Evil()), saved({"iteration": Evil()})):
        with pytest.raises(SystemExit, match=CODE_RAN):
            torch.load(io.BytesIO(content), weights_only=False)


def test_the_sources_load_nothing_that_may_contain_code():
    """Only torch.load with weights_only=True; no other unpickler, and no eval or exec, but for the text of a launch,
    which Triton's prepared.py makes from positions and numbers."""
    loads = []
    kernels = Path(*find_spec("pydrone._triton").submodule_search_locations)
    for path in {*Path(pydrone.__file__).parent.rglob("*.py"), *kernels.rglob("*.py")}:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            where = f"{path.name}:{getattr(node, 'lineno', '')}"
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = {alias.name.split(".")[0] for alias in node.names} | {getattr(node, "module", None) or ""}
                assert not names & {"pickle", "cPickle", "dill", "joblib", "marshal", "shelve"}, where
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                if called != "eval" or path != kernels / "prepared.py":
                    assert called not in ("eval", "exec", "np.load", "numpy.load"), where
                if called.endswith("torch.load"):
                    options = {word.arg: ast.unparse(word.value) for word in node.keywords}
                    assert options.get("weights_only") == "True", where
                    loads.append(where)
    assert len(loads) == 1, loads


def test_invalid_lines_of_a_log_are_skipped(tmp_path):
    """One bad line must not cost hours of training their plots."""
    lines = [b'{"iteration": 1, "reward": 2.0}', b"[1, 2]", b"7", b"{}", b'{"iteration": "x"}', b"\xff\xfe", b'{"iter']
    (tmp_path / PROGRESS).write_bytes(b"\n".join([*lines, b'{"iteration": 2, "reward": 3.0}']) + b"\n")
    assert [row["iteration"] for row in learning_curve.read(tmp_path)] == [1, 2]
    for settings in (b"", b"[]", b"\xff", b'{"env"'):
        (tmp_path / CONFIG).write_bytes(settings)
        assert learning_curve.settings_of(tmp_path) == {}
