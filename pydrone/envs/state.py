"""The state of environments that keep it in tensors and generators: saved with a training, and restored.

An environment with ``state_dict()`` and ``load_state_dict(state)`` is continued bit for bit by ``pydrone train
--resume``. If all of its state is in tensors and generators, they are one line each::

    def state_dict(self):
        return state_of(self)

    def load_state_dict(self, state):
        restore(self, state)

A ``state_dict()`` may hold tensors, NumPy arrays, numbers, text, bytes, None, and plain dicts, lists, tuples and sets
of them: ``load_state_dict`` then gets an equal one. Anything else is refused before the first iteration: a path, an
enum, a generator (hold its state instead).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

# Constants that earlier versions kept in tensors, and stored with the state.
FORMER = ("_upright", "task._first_obs")


def state_of(env: object) -> dict[str, Tensor]:
    """Every tensor and the state of every generator in ``env``, by path: ``task.age``, ``task.generator``.

    Searches attributes, dicts and lists, recursively in pydrone's own objects. Tuples are taken for constants and left
    out. Tensors are not copied. State in Python numbers is not found; a CUDA graph could not capture it either.
    """
    return {path: x.get_state() if isinstance(x, torch.Generator) else x.detach() for path, x in _leaves(env)}


def restore(env: object, state: Mapping[str, Tensor]) -> None:
    """Restores, in place, what :func:`state_of` returned for an environment like this one, on any device.

    Raises ValueError, and changes nothing, if a path, a shape or a dtype differs.
    """
    leaves = dict(_leaves(env))
    state = {path: x for path, x in state.items() if path in leaves or path not in FORMER}
    if leaves.keys() != state.keys():
        differ = ", ".join(sorted(leaves.keys() ^ state.keys()))
        raise ValueError(f"state: expected the tensors of this environment; it or the state lacks {differ}")
    own = {path: x.get_state() if isinstance(x, torch.Generator) else x for path, x in leaves.items()}
    for path, x in own.items():
        given = state[path]
        if given.shape != x.shape or given.dtype != x.dtype:
            raise ValueError(
                f"state: {path}: expected {list(x.shape)} {x.dtype}, got {list(given.shape)} {given.dtype}"
            )
    with torch.no_grad():
        for path, x in leaves.items():
            if isinstance(x, torch.Generator):
                x.set_state(state[path].cpu())
            else:
                x.copy_(state[path])


def _leaves(
    x: Any, path: str = "", seen: frozenset[int] = frozenset()
) -> Iterator[tuple[str, Tensor | torch.Generator]]:
    if isinstance(x, torch.Generator) or (isinstance(x, Tensor) and not _repeats(x)):
        yield path, x
        return
    if id(x) in seen or isinstance(x, Tensor):
        return
    if isinstance(x, Mapping):
        parts = x.items()
    elif isinstance(x, (list, deque)):
        parts = enumerate(x)
    elif not path or (type(x).__module__.split(".")[0] == "pydrone" and not isinstance(x, tuple)):
        parts = getattr(x, "__dict__", {}).items()
    else:
        return
    for name, part in parts:
        yield from _leaves(part, f"{path}.{name}" if path else str(name), seen | {id(x)})


def _repeats(x: Tensor) -> bool:
    """Whether ``x`` is expanded (has a stride of 0): a constant, which cannot be written to."""
    return any(stride == 0 and size > 1 for stride, size in zip(x.stride(), x.shape))
