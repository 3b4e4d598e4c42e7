"""Checkpoints: whole or not at all, and no code runs from them."""

from __future__ import annotations

import pickle

import pytest
import torch

from pydrone.ppo import checkpoint


def test_round_trip(tmp_path):
    state = {"iteration": 7, "policy": {"w": torch.randn(3, 4)}, "config": {"hidden_dims": (128, 128), "run_dir": None}}
    path = checkpoint.save(tmp_path / "runs" / "model_7.pt", state)
    loaded = checkpoint.load(path)
    assert torch.equal(loaded["policy"].pop("w"), state["policy"].pop("w"))
    assert loaded == state
    assert [entry.name for entry in path.parent.iterdir()] == ["model_7.pt"], "nothing else is left"


def test_a_save_that_fails_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = checkpoint.save(tmp_path / "model.pt", {"iteration": 1})

    def torn(state, file):
        file.write(b"half a checkpoint")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", torn)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(path, {"iteration": 2})
    monkeypatch.undo()
    assert checkpoint.load(path) == {"iteration": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.pt"]


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
    torch.save({"policy": Evil()}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="expected a checkpoint"):
        checkpoint.load(tmp_path / "model.pt")


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
