"""Checkpoints: whole or not at all, and no code runs from them."""

from __future__ import annotations

import errno
import io
import os
import pickle
import zipfile

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
    path = checkpoint.save(tmp_path / "model.pt", {"policy": Evil()})
    with pytest.raises(SystemExit, match="code ran"):
        torch.load(path, weights_only=False)
    with pytest.raises(ValueError, match="expected a checkpoint, got a file that PyTorch cannot read"):
        checkpoint.load(path)


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
