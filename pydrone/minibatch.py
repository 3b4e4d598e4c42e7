"""What :meth:`pydrone.buffer.RolloutBuffer.minibatches` yields, and how it parts an epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from torch import Tensor


class Plan(NamedTuple):
    """An epoch in parts: ``samples`` over ``count`` minibatches."""

    samples: int
    count: int
    shuffle: bool
    normalize: bool | str
    drop_last: bool
    reuse: bool
    subset: Tensor | None

    @property
    def largest(self) -> int:
        return self.samples // self.count if self.drop_last else -(-self.samples // self.count)

    def parts(self) -> Iterator[tuple[int, int]]:
        """(first position, size) of each minibatch."""
        total = self.count * (self.samples // self.count) if self.drop_last else self.samples
        for i in range(self.count):
            first = i * total // self.count
            yield first, (i + 1) * total // self.count - first


class Minibatch:
    """B samples of a rollout.

    obs: [B, ...], or a dict of groups (float32 where they are stored in half precision). actions: [B, ...]. values,
    log_probs: [B], as appended. advantages: [B], normalised if asked for. returns: [B]. Further fields by name:
    ``mb["mu"]``. indices: int64 [B], which sample each is, n * T + t; computed when asked for.
    """

    __slots__ = ("_grouped", "_groups", "_indices", "_tensors")

    def __init__(
        self, tensors: dict[str, Tensor], groups: tuple[str, ...], grouped: bool, indices: Callable[[], Tensor]
    ) -> None:
        self._tensors, self._groups, self._grouped, self._indices = tensors, groups, grouped, indices

    @property
    def obs(self) -> Tensor | dict[str, Tensor]:
        if not self._grouped:
            return self._tensors["obs.obs"]
        return {name: self._tensors[f"obs.{name}"] for name in self._groups}

    @property
    def actions(self) -> Tensor:
        return self._tensors["actions"]

    @property
    def values(self) -> Tensor:
        return self._tensors["values"]

    @property
    def log_probs(self) -> Tensor:
        return self._tensors["log_probs"]

    @property
    def advantages(self) -> Tensor:
        return self._tensors["advantages"]

    @property
    def returns(self) -> Tensor:
        return self._tensors["returns"]

    @property
    def indices(self) -> Tensor:
        return self._indices()

    def __getitem__(self, name: str) -> Tensor:
        if name == "obs":
            return self.obs
        if name not in self._tensors:
            raise KeyError(f"{name}: not in this minibatch; it has {', '.join(self._tensors)}")
        return self._tensors[name]

    def __len__(self) -> int:
        return self._tensors["advantages"].shape[0]

    def __repr__(self) -> str:
        return f"Minibatch({len(self)} samples: {', '.join(self._tensors)})"


class InRing(NamedTuple):
    """Where a minibatch's samples lie, as ``ppo_gradients`` is told: see :mod:`pydrone.ops.schema`.

    obs: [C, N, ...], or a dict of groups. fields: name to [C, N, ...]. advantages: [N, T]. numbers: the operation's
    ``drawn``.
    """

    obs: Tensor | dict[str, Tensor]
    fields: dict[str, Tensor]
    advantages: Tensor
    numbers: list[int]
    statistics: Tensor | None
    subset: Tensor | None


class Drawn(Minibatch):
    """A minibatch that has not left the ring: it is gathered when a tensor of it is first asked for.

    place: where its samples lie; raises RuntimeError where they are no longer there.
    """

    __slots__ = ("_gather", "_gathered", "_size", "place")

    def __init__(self, size: int, gather: Callable[[], Minibatch], place: Callable[[], InRing]) -> None:
        self._size, self._gather, self.place = size, gather, place
        self._gathered: Minibatch | None = None

    def _made(self) -> Minibatch:
        if self._gathered is None:
            self._gathered = self._gather()
        return self._gathered

    @property
    def _tensors(self) -> dict[str, Tensor]:
        return self._made()._tensors

    @property
    def _groups(self) -> tuple[str, ...]:
        return self._made()._groups

    @property
    def _grouped(self) -> bool:
        return self._made()._grouped

    @property
    def _indices(self) -> Callable[[], Tensor]:
        return self._made()._indices

    def __len__(self) -> int:
        return self._size
