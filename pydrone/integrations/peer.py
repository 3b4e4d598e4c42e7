"""Shared by the integrations: the check of a peer's version, patches that can be undone, and a rollout's arrays."""

from __future__ import annotations

import importlib.metadata
import re
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from pydrone.buffer import Minibatch, RolloutBuffer


def require(distribution: str, first: tuple[int, ...], before: tuple[int, ...]) -> str:
    """The installed version of ``distribution``, checked to be first <= version < before.

    Raises:
        ImportError: it is missing or of another version; the message names the supported versions.
    """
    supported = f"pydrone supports {distribution} from {_dotted(first)} to before {_dotted(before)}"
    try:
        version = importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        raise ImportError(f"{distribution} is not installed; {supported}") from None
    numbers = re.match(r"\d+(\.\d+)*", version)
    found = tuple(int(x) for x in numbers.group().split(".")) if numbers else ()
    if not first <= found < before:
        raise ImportError(f"{distribution} {version} is installed; {supported}")
    return version


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


class Arrays(RolloutBuffer):
    """A buffer of one rollout whose whole memory callers may read and write, as they do with a peer's arrays."""

    def array(self, name: str) -> Tensor:
        """[T, N, ...], whether filled or not: ``rewards``, ``values``, ``dones``, ``advantages``, ``returns`` as the
        scan reads and writes them, and the fields of the rows by the layout's names."""
        plane = name != "rows" and name in self._storage.tensors
        return self._storage.tensors[name].t() if plane else self._storage.views[name]

    def taken(self, array: Tensor, samples: Minibatch) -> Tensor:
        """[B, ...]: an array [T, N, ...] at the samples of a minibatch. Minibatches have values of the rows and return
        A + V: where a caller may have written into the planes, they are taken from there."""
        numbers = samples.indices
        return array[numbers % self.num_steps, numbers // self.num_steps]


class Change(NamedTuple):
    """``owner.name`` becomes ``value``."""

    owner: Any
    name: str
    value: Any


_INHERITED = object()


class Patches:
    """Replaces attributes of a peer's modules and classes, and restores them. Doing either twice has no effect.

    An attribute that someone else has replaced in the meantime is left as it is, with a RuntimeWarning.
    """

    def __init__(self) -> None:
        self._undo: list[tuple[Change, Any]] = []

    @property
    def installed(self) -> bool:
        return bool(self._undo)

    def install(self, changes: Sequence[Change]) -> None:
        if self._undo:
            return
        for change in changes:  # a missing attribute raises before anything is replaced
            getattr(change.owner, change.name)
        for change in changes:
            # From the owner's own dict: keeps a staticmethod one, and tells what was only inherited.
            self._undo.append((change, vars(change.owner).get(change.name, _INHERITED)))
            setattr(change.owner, change.name, change.value)

    def remove(self) -> None:
        while self._undo:
            change, original = self._undo.pop()
            if vars(change.owner).get(change.name) is not change.value:
                owner = getattr(change.owner, "__name__", change.owner)
                warnings.warn(
                    f"{owner}.{change.name} was replaced again after patch(); it is left as it is",
                    RuntimeWarning,
                    stacklevel=2,
                )
            elif original is _INHERITED:
                delattr(change.owner, change.name)
            else:
                setattr(change.owner, change.name, original)
