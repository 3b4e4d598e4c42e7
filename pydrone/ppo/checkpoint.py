"""Checkpoints: files of plain containers and tensors that are there whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch


def save(path: str | os.PathLike[str], state: dict[str, Any]) -> Path:
    """Writes ``state`` to ``path``, in place of what stood there.

    Written to a file beside it, synced, then renamed: after a crash or a full disk ``path`` holds the old checkpoint
    or the new one, never half of one.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(beside, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    _sync_folder(path.parent)
    return path


def load(
    path: str | os.PathLike[str], device: torch.device | str = "cpu", required: Sequence[str] = ()
) -> dict[str, Any]:
    """Reads a checkpoint, its tensors onto ``device``. Runs no code from the file (``weights_only``).

    Raises:
        OSError: the file is not there, or cannot be read.
        ValueError: the file is not a checkpoint, or lacks a key of ``required``.
    """
    name = os.fspath(path)
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except (OSError, MemoryError, torch.OutOfMemoryError):
        raise  # says nothing of the file's contents
    except Exception as error:
        # Whatever the bytes happen to spell: the unpickler pops from empty lists, looks up missing keys, decodes text.
        raise ValueError(f"{name}: expected a checkpoint, got a file that PyTorch cannot read") from error
    if not isinstance(state, dict):
        raise ValueError(f"{name}: expected a checkpoint, got a {type(state).__name__}")
    missing = [key for key in required if key not in state]
    if missing:
        raise ValueError(f"{name}: expected a checkpoint of a training, got one without {', '.join(missing)}")
    return state


def _sync_folder(folder: Path) -> None:
    """The rename itself is on disk only once the folder is; Windows has no such call and needs none."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
