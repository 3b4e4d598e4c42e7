"""Checkpoints: files of plain containers and tensors, written completely or not at all."""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch


def save(path: str | os.PathLike[str], state: dict[str, Any]) -> Path:
    """Writes ``state`` to ``path``, replacing an existing file.

    Written to a file beside it, synced, then renamed: after a crash or a full disk ``path`` holds the old checkpoint
    or the new one, never half of one. :func:`load` verifies the checksum in it.

    Raises OSError where it cannot be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()
    torch.save(state, content)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(beside, "wb") as file:
            file.write(_sealed(content.getvalue()))
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    _sync_folder(path.parent)
    return path


def copied(state: Any) -> Any:
    """``state`` with copies of the tensors in its dicts, lists and tuples."""
    if isinstance(state, torch.Tensor):
        return state.detach().clone()
    if isinstance(state, dict):
        return {name: copied(x) for name, x in state.items()}
    return type(state)(map(copied, state)) if isinstance(state, (list, tuple)) else state


def load(
    path: str | os.PathLike[str], device: torch.device | str = "cpu", required: Sequence[str] = ()
) -> dict[str, Any]:
    """Reads a checkpoint, its tensors onto ``device``. Runs no code from the file (``weights_only``).

    Raises:
        OSError: the file is not there, or cannot be read.
        ValueError: the file is not a checkpoint, was truncated or changed, or lacks a key of ``required``.
    """
    name = os.fspath(path)
    content = Path(path).read_bytes()
    if content.startswith(b"PK") and not _intact(content):
        raise ValueError(
            f"{name}: expected a checkpoint, got a file whose checksum is missing or wrong: it "
            "is damaged, or another program's"
        )
    try:
        state = torch.load(io.BytesIO(content), map_location=device, weights_only=True)
    except (MemoryError, torch.OutOfMemoryError):
        raise  # not the file's fault
    except Exception as error:
        # Damaged bytes can raise anything: the unpickler pops from empty lists, looks up missing keys, decodes text.
        raise ValueError(f"{name}: expected a checkpoint, got a file that PyTorch cannot read") from error
    if not isinstance(state, dict):
        raise ValueError(f"{name}: expected a checkpoint, got a {type(state).__name__}")
    missing = [key for key in required if key not in state]
    if missing:
        raise ValueError(f"{name}: expected a checkpoint of a training, got one without {', '.join(missing)}")
    return state


def newest(
    run_dir: str | os.PathLike[str], required: Sequence[str] = (), skipped: Callable[[str], None] = lambda why: None
) -> Path | None:
    """The checkpoint ``model_ITERATION.pt`` of a run's folder with the highest iteration that can be loaded.

    ``skipped`` is called with the reason for each one passed over. None: none can be loaded. Raises OSError where the
    folder cannot be read.
    """
    numbered = ((_MODEL.fullmatch(path.name), path) for path in Path(run_dir).iterdir())
    found = sorted((int(match[1]), path) for match, path in numbered if match)
    for _, path in reversed(found):
        try:
            load(path, required=required)
        except (OSError, ValueError) as error:
            skipped(str(error))
        else:
            return path
    return None


def remove_leftovers(run_dir: str | os.PathLike[str]) -> None:
    """Removes the temporary files of processes that were killed while saving into a run's folder."""
    for path in Path(run_dir).glob(".model_*.pt.*"):
        path.unlink(missing_ok=True)


_MODEL = re.compile(r"model_(\d+)\.pt")


# Stored as the comment of torch's zip file, so that torch.load and any zip tool can still read it.
_MARK = b"pydrone sha256 "
_COMMENT = len(_MARK) + 64


def _sealed(content: bytes) -> bytes:
    """A zip without a comment, with the digest of all its bytes as the comment."""
    body = content[:-2]  # without the comment's length
    return body + _COMMENT.to_bytes(2, "little") + _MARK + hashlib.sha256(body).hexdigest().encode()


def _intact(content: bytes) -> bool:
    """Whether these are the bytes that :func:`_sealed` returned."""
    end = len(content) - _COMMENT - 2
    return end > 0 and content == _sealed(content[:end] + bytes(2))


def _sync_folder(folder: Path) -> None:
    """Makes the rename durable. Windows has no such call and needs none."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
