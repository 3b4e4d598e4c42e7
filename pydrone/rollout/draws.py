"""Draws minibatches from a ring: each is a range of an epoch's permutation, gathered by one launch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from pydrone.ops.dispatch import bump
from pydrone.ops.pages import Recycler, Spec
from pydrone.ops.schema import SCALAR_TYPES
from pydrone.rollout.minibatch import Drawn, InRing, Minibatch, Plan
from pydrone.rollout.ring import Ring
from pydrone.rollout.scan import Scan
from pydrone.rollout.storage import Storage


class Part(NamedTuple):
    """A minibatch before it is gathered: ``size`` positions of one epoch's permutation, from ``first`` on.

    The permutation's key is (key, rollout, epoch); ``start`` is the slot of the rollout's first step.
    """

    plan: Plan
    key: int
    rollout: int
    start: int
    epoch: int
    first: int
    size: int


class Draws:
    """Draws minibatches of the oldest rollout.

    Attributes:
        key: of this buffer's permutations.
        epoch: the number of the next epoch of the oldest rollout.
        reused: the tensors that ``reuse=True`` hands out each time, by the size of the largest minibatch.
    """

    def __init__(self, storage: Storage, ring: Ring, scan: Scan, key: int) -> None:
        self._storage, self._ring, self._scan, self.key = storage, ring, scan, key
        self.epoch = 0
        self.reused: dict[int, dict[str, Tensor]] = {}
        self._turns: dict[int, int] = {}  # minibatches handed out so far, by the keys of ``reused``
        self._recycler = Recycler()
        self._wanted: dict[int, dict[str, Spec]] = {}  # a minibatch's tensors, by its size
        stored = storage.layout.stored
        self._names = [*stored]
        self._offsets = [field.offset for field in stored.values()]
        self._dtypes = [SCALAR_TYPES[field.dtype] for field in stored.values()]

    def next_epoch(self) -> int:
        """Begins an epoch and returns its number."""
        self.epoch += 1
        return self.epoch - 1

    def iterate(self, plan: Plan, epochs: int, lazy: bool, discards: int) -> Iterator[Minibatch]:
        """Yields the minibatches of ``epochs`` epochs; ``discards``: the ring's count when they were requested."""
        for _ in range(epochs):
            epoch = self.next_epoch()
            for first, size in plan.parts():
                self._require_rollout(discards)
                part = self.part(plan, epoch, first, size)
                yield self._lazy(part) if lazy else self.minibatch(part)

    def part(self, plan: Plan, epoch: int, first: int, size: int) -> Part:
        """A minibatch of the oldest rollout, by the ring's present counters."""
        return Part(plan, self.key, self._ring.rollout, self._ring.start, epoch, first, size)

    def minibatch(self, part: Part) -> Minibatch:
        """Gathers a minibatch, in one launch."""
        self._hand_out(part.plan)
        tensors = self._gathered(part)
        if part.plan.normalize == "minibatch":
            advantages = tensors["advantages"]
            mean, std = advantages.mean(), advantages.std() if part.size > 1 else 0.0
            advantages.sub_(mean).div_(std + 1e-8)
        return Minibatch(tensors, *self._groups(), self._indices(part))

    def _lazy(self, part: Part) -> Drawn:
        """A minibatch that is gathered when one of its tensors is first read."""
        plan, storage = part.plan, self._storage
        discards, runs, turn = self._ring.discards, self._scan.runs, self._hand_out(plan)
        captured = self._ring.capturing()

        def require_unchanged() -> None:
            self._require_rollout(discards)
            if captured != self._ring.capturing():  # other counters would say where it is
                raise RuntimeError(
                    "minibatches: expected to be read in the capture that they were drawn in, or outside"
                )
            if runs != self._scan.runs:
                raise RuntimeError(
                    f"minibatches: {self._scan.method}() has renewed the advantages while they were being read"
                )

        def gather() -> dict[str, Tensor]:
            require_unchanged()
            return self._gathered(part)

        def overwritten() -> bool:
            return plan.reuse and turn != self._turns[plan.largest]

        def place() -> InRing:
            require_unchanged()
            _, key, rollout, start, epoch, first, size = part
            num_steps, samples, shuffle = self._ring.num_steps, plan.samples, int(plan.shuffle)
            numbers = [num_steps, start, samples, key, rollout, epoch, shuffle, first, size]
            statistics = storage.statistics if plan.normalize else None
            cursor = self._ring.cursor if captured else None
            groups = storage.groups(storage.views)
            planes = storage.advantages, self._scan.targets
            return InRing(groups, storage.views, *planes, numbers, statistics, plan.subset, cursor)

        names = (*self._names, "advantages", "returns")
        return Drawn(names, part.size, *self._groups(), self._indices(part), gather, overwritten, place)

    def _require_rollout(self, discards: int) -> None:
        if discards != self._ring.discards:
            raise RuntimeError("minibatches: the rollout was discarded while they were being read")

    def _groups(self) -> tuple[tuple[str, ...], bool]:
        return tuple(self._storage.layout.obs), self._storage.layout.obs_is_mapping

    def _hand_out(self, plan: Plan) -> int:
        """Numbers a minibatch among those that share the reused tensors: the latest one owns them."""
        if not plan.reuse:
            return 0
        turn = self._turns[plan.largest] = self._turns.get(plan.largest, 0) + 1
        return turn

    def _gathered(self, part: Part) -> dict[str, Tensor]:
        plan = part.plan
        tensors = self._outputs(part.size, plan.largest, plan.reuse)
        self._gather(part, tensors, self._names, self._storage.statistics if plan.normalize is True else None)
        bump([*tensors.values()])
        return tensors

    def _indices(self, part: Part) -> Callable[[], Tensor]:
        """A function that computes a minibatch's ``indices``, even after its rollout was discarded."""

        def indices() -> Tensor:
            made = {"indices": torch.empty(part.size, dtype=torch.int64, device=self._storage.device)}
            self._gather(part, made, [], None)
            return made["indices"]

        return indices

    def _outputs(self, size: int, largest: int, reuse: bool) -> dict[str, Tensor]:
        if not reuse:
            return self._fresh(size)
        if largest not in self.reused:
            self.reused[largest] = self._fresh(largest)
        kept = self.reused[largest]
        return kept if size == largest else {name: x[:size] for name, x in kept.items()}

    @torch.inference_mode(False)
    def _fresh(self, size: int) -> dict[str, Tensor]:
        if size not in self._wanted:
            self._wanted[size] = {x.name: (x.shape, x.dtype) for x in self._storage.layout.minibatch(size)}
        wanted = self._wanted[size]
        return dict(zip(wanted, self._recycler.empty(wanted.values(), self._storage.device), strict=True))

    def _gather(self, part: Part, tensors: dict[str, Tensor], names: list[str], statistics: Tensor | None) -> None:
        plan, key, rollout, start, epoch, first, _ = part
        storage, ring = self._storage, self._ring
        storage.ops.gather(
            storage.rows,
            self._offsets if names else [],
            self._dtypes if names else [],
            [tensors[name] for name in names],
            storage.layout.fields["values"].offset,
            storage.advantages if names else None,
            self._scan.targets if names else None,
            statistics,
            plan.subset,
            ring.num_steps,
            start,
            plan.samples,
            key,
            rollout,
            epoch,
            plan.shuffle,
            first,
            ring.cursor if ring.capturing() else None,
            tensors.get("advantages"),
            tensors.get("returns"),
            tensors.get("indices"),
        )


def mix_seed(seed: int, rank: int) -> int:
    """A signed 64-bit key of (seed, rank): two rounds of splitmix64 (Steele, Lea and Flood, OOPSLA 2014)."""
    mask = (1 << 64) - 1
    x = seed & mask
    for word in (rank, 0):
        x = (x + 0x9E3779B97F4A7C15 * (2 * (word & mask) + 1)) & mask
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        x ^= x >> 31
    return x - (1 << 64) if x >> 63 else x
