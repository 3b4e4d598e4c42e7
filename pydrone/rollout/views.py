"""A buffer's oldest rollout, as views."""

from __future__ import annotations

import torch
from torch import Tensor

from pydrone.ops.schema import INVALID, TRUNCATED
from pydrone.rollout.layout import Layout
from pydrone.rollout.ring import Ring
from pydrone.rollout.scan import Scan
from pydrone.rollout.storage import Storage

_NAMES = ("rewards", "dones", "truncated", "advantages", "returns")  # what buf[name] accepts besides fields


class Rollout:
    """The oldest rollout of a ring; while it is being collected, its steps so far.

    Each property is a view, or a copy if the rollout wraps around the ring's end.
    """

    def __init__(self, storage: Storage, ring: Ring, scan: Scan) -> None:
        self.layout: Layout = storage.layout
        self._storage, self._ring, self._scan = storage, ring, scan

    @property
    def obs(self) -> Tensor | dict[str, Tensor]:
        """[N, T, ...], or a dict of groups; in the dtype it is stored in."""
        return self._storage.groups({f"obs.{name}": self._field(f"obs.{name}") for name in self.layout.obs})

    @property
    def actions(self) -> Tensor:
        """[N, T, ...]."""
        return self["actions"]

    @property
    def log_probs(self) -> Tensor:
        """[N, T] float32."""
        return self["log_probs"]

    @property
    def rewards(self) -> Tensor:
        """[N, T] float32."""
        return self._plane(self._storage.rewards)

    @property
    def values(self) -> Tensor:
        """[N, T] float32, as appended. Only read it: minibatches gather another copy."""
        return self._plane(self._storage.values)

    @property
    def dones(self) -> Tensor:
        """[N, T] uint8 codes: 0 running, 1 terminated, 2 truncated, 3 no transition (NEXT_STEP's reset step)."""
        return self._plane(self._storage.codes)

    @property
    def truncated(self) -> Tensor:
        """[N, T] bool, a copy."""
        return self.dones == TRUNCATED

    @property
    def valid(self) -> Tensor | None:
        """bool [N, T], a copy: False in the reset steps of NEXT_STEP autoreset. None if no step came with ``valid``.

        Whatever is computed from a rollout leaves them out: docs/conventions.md lists where.
        """
        return self.dones != INVALID if self._ring.has_resets else None

    @property
    def advantages(self) -> Tensor:
        """[N, T] float32, not normalised."""
        self._scan.require("advantages")
        return self._storage.advantages

    @property
    def returns(self) -> Tensor:
        """[N, T] float32: advantages + values; after :meth:`~pydrone.buffer.RolloutBuffer.compute_vtrace`, vs."""
        self._scan.require("returns")
        return self._storage.returns

    @property
    def statistics(self) -> Tensor:
        """float64 [3]: count, mean and M2 of the advantages of all valid samples.

        Minibatches normalise with it: an all-reduce over several processes, say, may write it in place.
        """
        self._scan.require("statistics")
        return self._storage.statistics

    def __getitem__(self, name: str) -> Tensor:
        """A field by name, [N, T, ...]; while the rollout is being collected, its steps so far.

        A view, or a copy if the rollout wraps around the ring's end.
        """
        if name in _NAMES or (name == "obs" and not self.layout.obs_is_mapping):
            return getattr(self, name)
        if name not in self._storage.views or name == "final_row":
            names = [x for x in self._storage.views if x not in ("final_row", "obs.obs")]
            names = names if self.layout.obs_is_mapping else ["obs", *names]
            raise KeyError(f"{name}: not a field of this buffer; it has {', '.join([*names, *_NAMES])}")
        return self._field(name)

    def _field(self, name: str) -> Tensor:
        return self._plane(self._storage.views[name].transpose(0, 1))

    def _plane(self, plane: Tensor) -> Tensor:
        start, steps = self._ring.start, min(len(self._ring), self._ring.num_steps)
        if start + steps <= self._ring.capacity:
            return plane[:, start : start + steps]
        return torch.cat([plane[:, start:], plane[:, : start + steps - self._ring.capacity]], dim=1)
