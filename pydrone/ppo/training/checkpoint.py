"""Checkpoints: files of plain containers and tensors, written completely or not at all."""

from __future__ import annotations

import hashlib
import io
import operator
import os
import re
import sys
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch


class NotStorable(TypeError):
    """A checkpoint would hold something that :func:`load` refuses; the message names its key."""


def save(path: str | os.PathLike[str], state: dict[str, Any]) -> Path:
    """Writes ``state`` to ``path``, replacing an existing file.

    Written to a file beside it, synced, then renamed: after a crash or a full disk ``path`` holds the old checkpoint
    or the new one, never half of one. :func:`load` verifies the checksum in it.

    Raises:
        OSError: it cannot be written.
        NotStorable: :func:`load` would refuse it; nothing is written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = check(state)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(beside, "wb") as file:
            file.write(_sealed(content))
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    _sync_folder(path.parent)
    return path


def check(state: dict[str, Any]) -> bytes:
    """The bytes that hold ``state``, after reading them back, which takes milliseconds.

    What :func:`load` returns is equal, of the same types: tensors, None, numbers, text, bytes, and dicts, lists, tuples
    and sets of them. NumPy's arrays and scalars, which PyTorch's safe reader refuses, are stored as tensors.

    Raises NotStorable, with the key, for anything else.
    """
    content = io.BytesIO()
    try:
        torch.save(_mapped(state, _without_numpy), content)
        _read(content)
    except (OSError, MemoryError, torch.OutOfMemoryError):
        raise  # not the state's fault
    except Exception as error:
        found = _unreadable(state)
        if found is None:
            raise
        key, kind = found
        raise NotStorable(
            f"{key}: expected what a checkpoint can hold (tensors, NumPy arrays, numbers, text, bytes, None, and plain "
            f"dicts, lists, tuples and sets of them), got {kind}"
        ) from error
    return content.getvalue()


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
        state = _mapped(_read(io.BytesIO(content), device), _with_numpy)
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


def _read(content: io.BytesIO, device: torch.device | str = "cpu") -> Any:
    content.seek(0)
    return torch.load(content, map_location=device, weights_only=True)


# The keys of a dict that stands for a NumPy array or scalar: a tensor, and whether it was a scalar.
_NUMPY = ("numpy array of pydrone", "scalar")


def _without_numpy(x: Any) -> Any:
    """What stands for a NumPy array or scalar; anything else as it is."""
    np = sys.modules.get("numpy")  # without it there are none
    if np is None or not (type(x) is np.ndarray or isinstance(x, np.generic)):
        return x
    try:
        # A copy, since it may be read-only or strided; torch has one byte order.
        tensor = torch.from_numpy(np.array(x, x.dtype.newbyteorder("=")))
    except TypeError:  # of text, dates or objects
        return x
    return dict(zip(_NUMPY, (tensor, isinstance(x, np.generic))))


def _with_numpy(x: Any) -> Any:
    """The inverse of :func:`_without_numpy`."""
    if type(x) is not dict or tuple(x) != _NUMPY:
        return x
    tensor, scalar = x.values()
    array = tensor.cpu().numpy()
    return array[()] if scalar else array


def _mapped(x: Any, change: Callable[[Any], Any]) -> Any:
    """``x`` with ``change`` applied to it, else to its parts; the same object where nothing changes."""
    changed = change(x)
    if changed is not x:
        return changed
    if type(x) in (dict, OrderedDict):
        parts = {name: _mapped(part, change) for name, part in x.items()}
        return x if all(parts[name] is part for name, part in x.items()) else type(x)(parts)
    if type(x) in (list, tuple):
        items = [_mapped(part, change) for part in x]
        return x if all(map(operator.is_, items, x)) else type(x)(items)
    return x


def _unreadable(x: Any, path: str = "") -> tuple[str, str] | None:
    """Path and type of the first part of ``x`` that cannot be read again; None: there is none."""
    if _can_be_read(x):
        return None
    for part in x if isinstance(x, (dict, set)) else ():
        if not _can_be_read({part: None}):
            return f"{path}, {'a key' if isinstance(x, dict) else 'an element'}", _kind(part)
    named = x.items() if isinstance(x, dict) else enumerate(x) if isinstance(x, (list, tuple)) else ()
    for name, part in named:
        where = f"{path}.{name}" if path else f"{name}"
        found = _unreadable(part, where)
        if found is not None:
            return found
    return path, _kind(x)


def _can_be_read(x: Any) -> bool:
    try:
        content = io.BytesIO()
        torch.save(_mapped(x, _without_numpy), content)
        _read(content)
    except Exception:
        return False
    return True


def _kind(x: Any) -> str:
    kind, dtype = f"{type(x).__module__}.{type(x).__qualname__}".removeprefix("builtins."), getattr(x, "dtype", None)
    return kind if dtype is None else f"{kind} of {dtype}"


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
