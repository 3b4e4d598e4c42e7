"""The minibatches of :meth:`pydrone.buffer.RolloutBuffer.minibatches`, and how an epoch is split into them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import NamedTuple

from torch import Tensor


class Plan(NamedTuple):
    """How an epoch's ``samples`` are split into ``count`` minibatches."""

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

    obs: [B, ...], or a dict of groups (float32 where they are stored in half precision, unless the buffer keeps
    dtypes). actions: [B, ...]. values, log_probs: [B], as appended. advantages: [B], normalised if requested. returns:
    [B]. Further fields by name: ``mb["mu"]``. indices: int64 [B], the number n * T + t of each sample; computed when
    read.
    """

    __slots__ = ("_gathered", "_grouped", "_groups", "_indices")

    def __init__(
        self, tensors: dict[str, Tensor], groups: tuple[str, ...], grouped: bool, indices: Callable[[], Tensor]
    ) -> None:
        self._gathered: dict[str, Tensor] | None = tensors
        self._groups, self._grouped, self._indices = groups, grouped, indices

    @property
    def _tensors(self) -> dict[str, Tensor]:
        return self._gathered

    @property
    def _names(self) -> tuple[str, ...]:
        return tuple(self._gathered)

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
        if name not in self._names:
            raise KeyError(f"{name}: not in this minibatch; it has {', '.join(self._names)}")
        return self._tensors[name]

    def __len__(self) -> int:
        return self._tensors["advantages"].shape[0]

    def __repr__(self) -> str:
        return f"Minibatch({len(self)} samples: {', '.join(self._names)})"


class InRing(NamedTuple):
    """Where a minibatch's samples are in the ring: arguments of ``ppo_gradients``, see :mod:`pydrone.ops.schema`.

    obs: [C, N, ...], or a dict of groups. fields: name to [C, N, ...]. advantages: [N, T]. returns: [N, T], or None
    where they are advantages + values: the operation forms no others. numbers: its ``drawn``. cursor: the device's
    counters, in a captured graph.
    """

    obs: Tensor | dict[str, Tensor]
    fields: dict[str, Tensor]
    advantages: Tensor
    returns: Tensor | None
    numbers: list[int]
    statistics: Tensor | None
    subset: Tensor | None
    cursor: Tensor | None


class Drawn(Minibatch):
    """A lazy minibatch: gathered when one of its tensors is first read.

    That read raises RuntimeError if the rollout or its advantages have changed. Any read raises it once a later
    minibatch has reused the tensors (``overwritten``). A deep copy is a plain, gathered Minibatch.
    place: where its samples are in the ring; raises RuntimeError if they are no longer there.
    """

    __slots__ = ("_gather", "_names", "_overwritten", "_size", "place")

    def __init__(
        self,
        names: tuple[str, ...],
        size: int,
        groups: tuple[str, ...],
        grouped: bool,
        indices: Callable[[], Tensor],
        gather: Callable[[], dict[str, Tensor]],
        overwritten: Callable[[], bool],
        place: Callable[[], InRing],
    ) -> None:
        self._names, self._size, self._groups, self._grouped, self._indices = names, size, groups, grouped, indices
        self._gather, self._overwritten, self.place = gather, overwritten, place
        self._gathered = None

    @property
    def _tensors(self) -> dict[str, Tensor]:
        if self._overwritten():
            raise RuntimeError(
                "minibatches: with reuse, a later minibatch has taken over this one's tensors; expected the last one "
                "that was handed out, or reuse=False"
            )
        if self._gathered is None:
            self._gathered = self._gather()
        return self._gathered

    def __deepcopy__(self, memo: dict[int, object]) -> Minibatch:
        return Minibatch(copy.deepcopy(self._tensors, memo), self._groups, self._grouped, self._indices)

    def __len__(self) -> int:
        return self._size
