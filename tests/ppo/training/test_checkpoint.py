"""Checkpoints: whole or not at all, and no code runs from them."""

from __future__ import annotations

import enum
import errno
import io
import os
import pickle
import random
import zipfile
from collections import OrderedDict, defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from pydrone.ppo.training import checkpoint


def test_round_trip(tmp_path):
    state = {"iteration": 7, "policy": {"w": torch.randn(3, 4)}, "config": {"hidden_dims": (128, 128), "run_dir": None}}
    path = checkpoint.save(tmp_path / "runs" / "model_7.pt", state)
    loaded = checkpoint.load(path)
    assert torch.equal(loaded["policy"].pop("w"), state["policy"].pop("w"))
    assert loaded == state
    assert [entry.name for entry in path.parent.iterdir()] == ["model_7.pt"], "nothing else is left"


@pytest.mark.parametrize("at", ["torch.save", "write", "fsync", "replace"])
def test_a_save_that_fails_leaves_the_old_checkpoint(at, tmp_path, monkeypatch):
    path = checkpoint.save(tmp_path / "model.pt", {"iteration": 1})

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    class Disk(io.FileIO):
        """Has room for 100 bytes."""

        def write(self, content):
            super().write(content[:100])
            full()

    if at == "torch.save":
        monkeypatch.setattr(torch, "save", full)
    elif at == "write":
        monkeypatch.setattr(checkpoint, "open", lambda name, mode: Disk(name, mode), raising=False)
    else:
        monkeypatch.setattr(checkpoint.os, at, full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(path, {"iteration": 2})
    monkeypatch.undo()
    assert checkpoint.load(path) == {"iteration": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.pt"]


@pytest.mark.skipif(os.name != "posix", reason="the limit is POSIX's")
def test_the_system_refuses_to_write_on(tmp_path):
    """As a full disk does, in the middle of the file."""
    import resource

    path = checkpoint.save(tmp_path / "model_1.pt", {"iteration": 1})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises(OSError):
            checkpoint.save(tmp_path / "model_2.pt", {"iteration": 2, "w": torch.zeros(5000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [entry.name for entry in tmp_path.iterdir()] == ["model_1.pt"]
    assert checkpoint.newest(tmp_path) == path


def test_the_file_is_synced_before_it_takes_the_name(tmp_path, monkeypatch):
    calls = []
    replace, fsync = checkpoint.os.replace, checkpoint.os.fsync
    monkeypatch.setattr(checkpoint.os, "fsync", lambda handle: (calls.append("fsync"), fsync(handle)))
    monkeypatch.setattr(checkpoint.os, "replace", lambda a, b: (calls.append("replace"), replace(a, b)))
    checkpoint.save(tmp_path / "model.pt", {})
    assert calls[:2] == ["fsync", "replace"]


class Evil:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code ran')",))


def test_no_code_runs_from_a_checkpoint(tmp_path):
    path, content = tmp_path / "model.pt", io.BytesIO()
    torch.save({"policy": Evil()}, content)
    path.write_bytes(checkpoint._sealed(content.getvalue()))
    with pytest.raises(SystemExit, match="code ran"):
        torch.load(path, weights_only=False)
    with pytest.raises(ValueError, match="expected a checkpoint, got a file that PyTorch cannot read"):
        checkpoint.load(path)


class Pair(NamedTuple):
    a: int


class Level(enum.IntEnum):
    LOW = 1


# What may be in the state of an environment, all of which comes back equal and of the same type.
STORABLE = {
    "array": np.arange(6.0).reshape(2, 3)[:, ::-1],
    "0-d array": np.array(2.5),
    "empty array": np.zeros((0, 3), np.int16),
    "half": np.float16([1, np.nan]),
    "uint16": np.uint16([65535]),
    "uint64": np.array([2**64 - 1], np.uint64),
    "bool array": np.array([True]),
    "complex": np.complex64([1j]),
    "float scalar": np.float64(0.1),
    "int scalar": np.int8(-3),
    "bool scalar": np.bool_(True),
    "state of MT19937": np.random.MT19937(3).state,
    "state of Philox": np.random.Philox(3).state,
    "legacy state": np.random.RandomState(3).get_state(),
    "state of PCG64": np.random.default_rng(3).bit_generator.state,
    "state of random": random.Random(3).getstate(),
    "state of torch": torch.Generator().manual_seed(3).get_state(),
    "nested": OrderedDict(a=[(np.float32(1), {"b": np.ones(1)})]),
    "plain": [None, True, 1 << 100, 1.5, 1j, "x", b"x", bytearray(b"x"), {1, 2}, (), {None: 1, (1, "a"): 2}],
    "tensors": [torch.ones(2, dtype=torch.uint16), torch.ones(1).expand(3), torch.nn.Parameter(torch.ones(1))],
}
READ_ONLY = np.ones(3)
READ_ONLY.flags.writeable = False
STORABLE |= {"read-only array": READ_ONLY, "foreign byte order": np.arange(3, dtype=">f4")}


def equal(a: object, b: object) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(equal(a[name], b[name]) for name in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, (np.ndarray, np.generic)):
        return a.dtype == b.dtype.newbyteorder(a.dtype.byteorder) and bool(np.array_equal(a, b, equal_nan=True))
    return a == b


@pytest.mark.parametrize("kind", STORABLE)
def test_what_is_saved_is_read_again_equal(kind, tmp_path):
    state = {"env": {"x": STORABLE[kind]}}
    assert equal(state, checkpoint.load(checkpoint.save(tmp_path / "model.pt", state)))


NOT_STORABLE = {
    "path": (Path("x"), r"env\.x: .*, got pathlib\.\w+"),
    "generator of numpy": (np.random.default_rng(0), r"env\.x: .*, got numpy\.random\S*Generator"),
    "generator of torch": (torch.Generator(), r"env\.x: .*, got torch\.\S*Generator"),
    "array of objects": ({"y": [np.array([None])]}, r"env\.x\.y\.0: .*, got numpy\.ndarray of object"),
    "dates": (np.datetime64("2026-01-01"), r"env\.x: .*, got numpy\.datetime64 of datetime64\[D\]"),
    "text of numpy": (np.str_("a"), r"env\.x: .*, got numpy\.str_"),
    "masked array": (np.ma.array([1.0], mask=[True]), r"env\.x: .*, got numpy\.ma\S*MaskedArray"),
    "key of numpy": ({np.int64(1): 2}, r"env\.x, a key: .*, got numpy\.int64"),
    "element of numpy": ({np.int64(1)}, r"env\.x, an element: .*, got numpy\.int64"),
    "enum": (Level.LOW, r"env\.x: .*, got \S*Level"),
    "named tuple": (Pair(1), r"env\.x: .*, got \S*Pair"),
    "defaultdict": (defaultdict(list, a=[1]), r"env\.x: .*, got collections\.defaultdict"),
    "frozenset": (frozenset({1}), r"env\.x: .*, got frozenset"),
    "function": (lambda: 0, r"env\.x: .*, got function"),
    "module": (random, r"env\.x: .*, got module"),
    "class": ([Evil()], r"env\.x\.0: .*, got \S*Evil"),
}


@pytest.mark.parametrize("kind", NOT_STORABLE)
def test_what_could_not_be_read_again_is_refused_by_its_key(kind, tmp_path):
    value, message = NOT_STORABLE[kind]
    path = checkpoint.save(tmp_path / "model.pt", {"iteration": 1})
    with pytest.raises(checkpoint.NotStorable, match=f"^{message}"):
        checkpoint.save(path, {"policy": {"w": torch.ones(1)}, "env": {"a": np.ones(1), "x": value}})
    assert checkpoint.load(path) == {"iteration": 1} and len(list(tmp_path.iterdir())) == 1


def test_other_tools_read_a_checkpoint(tmp_path):
    path = checkpoint.save(tmp_path / "model.pt", {"iteration": 1, "w": torch.arange(3)})
    assert torch.load(path, weights_only=True)["w"].tolist() == [0, 1, 2]
    assert zipfile.ZipFile(path).testzip() is None


def test_any_change_of_a_byte_and_any_cut_is_noticed(tmp_path):
    whole = checkpoint.save(tmp_path / "model.pt", {"w": torch.randn(3)}).read_bytes()
    path = tmp_path / "other.pt"
    for i in range(0, len(whole), 5):
        for content in (whole[:i], whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :]):
            path.write_bytes(content)
            with pytest.raises(ValueError, match="expected a checkpoint, got "):
                checkpoint.load(path)
    path.write_bytes(whole + b"x")
    with pytest.raises(ValueError, match="checksum is missing or wrong"):
        checkpoint.load(path)


def test_the_newest_that_can_be_loaded(tmp_path):
    said = []
    assert checkpoint.newest(tmp_path) is None
    for i in (9, 10, 100, 101):
        checkpoint.save(tmp_path / f"model_{i}.pt", {"iteration": i})
    (tmp_path / ".model_102.pt.77").write_bytes(b"half of one")
    (tmp_path / "model_103.pt").mkdir()
    (tmp_path / "model_best.pt").write_bytes(b"")
    cut = tmp_path / "model_101.pt"
    cut.write_bytes(cut.read_bytes()[:-1])
    changed = bytearray((tmp_path / "model_100.pt").read_bytes())
    changed[len(changed) // 2] ^= 1
    (tmp_path / "model_100.pt").write_bytes(changed)
    assert checkpoint.newest(tmp_path, skipped=said.append) == tmp_path / "model_10.pt"
    assert len(said) == 3
    for why, name in zip(said, ("model_103.pt", "model_101.pt", "model_100.pt")):
        assert name in why
    assert checkpoint.newest(tmp_path, required=("policy",)) is None
    checkpoint.remove_leftovers(tmp_path)
    assert not (tmp_path / ".model_102.pt.77").exists() and (tmp_path / "model_9.pt").exists()


# What the unpickler makes of them: nothing, no opcode, a list, an empty stack (IndexError), a memo that is not there
# (KeyError), text that is no UTF-8 (UnicodeDecodeError).
NO_CHECKPOINTS = [b"", b"not a checkpoint", pickle.dumps([1, 2], protocol=2)]
NO_CHECKPOINTS += [b"\x80\x02R.", b"\x80\x02h\x05.", b"\x80\x02X\x02\x00\x00\x00\xff\xfe.", b"\x80\x02}"]


@pytest.mark.parametrize("content", NO_CHECKPOINTS)
def test_files_that_are_no_checkpoints(tmp_path, content):
    path = tmp_path / "model.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.pt: expected a checkpoint, got "):
        checkpoint.load(path)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        checkpoint.load(tmp_path / "model.pt")


def test_keys_that_are_required(tmp_path):
    path = checkpoint.save(tmp_path / "model.pt", {"iteration": 7, "policy": {}})
    assert checkpoint.load(path, required=("iteration", "policy"))["iteration"] == 7
    with pytest.raises(ValueError, match=r"model\.pt: expected a checkpoint of a training, got one without learner"):
        checkpoint.load(path, required=("iteration", "learner"))


def test_a_folder_is_told_from_a_bad_file(tmp_path):
    with pytest.raises(OSError):
        checkpoint.load(tmp_path)
