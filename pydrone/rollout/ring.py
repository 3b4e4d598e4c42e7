"""The ring's counters, on the host and on the device, and which flags each rollout came with."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from pydrone.ops.schema import CURSOR_DISCARDED, CURSOR_NUM_STEPS
from pydrone.ops.streams import capturing


class BufferFull(RuntimeError):
    """An append would overwrite a rollout that has not been discarded; nothing was written."""


class Ring:
    """Steps [discarded, appended), counted from the first ever; step k is in slot k % capacity.

    The oldest rollout is steps [discarded, discarded + T). Eager calls follow these counters; calls in a captured CUDA
    graph follow ``cursor``. Python does not run during a replay: :meth:`advance` counts for it.

    Attributes:
        num_steps, capacity: T, and the number of slots.
        num_rollouts: R, rollouts that can be in the ring at once, at least in part. A rollout has one of R places.
        appended, discarded: steps since the first; ``discarded`` is a multiple of T.
        discards: how often the oldest rollout changed: minibatches drawn before the last change are stale.
        truncations, resets: for each place, whether its rollout came with ``truncated``, and with ``valid``.
        captured_truncations, captured_resets: whether a captured call came with them: then every replay does.
        cursor: int64 [CURSOR_SIZE] on the device.
    """

    def __init__(self, num_steps: int, capacity: int, num_rollouts: int, cursor: Tensor) -> None:
        self.num_steps, self.capacity, self.num_rollouts, self.cursor = num_steps, capacity, num_rollouts, cursor
        cursor[CURSOR_NUM_STEPS] = num_steps
        self.appended = self.discarded = self.discards = 0
        self.truncations, self.resets = [False] * num_rollouts, [False] * num_rollouts
        self.captured_truncations = self.captured_resets = False
        self._device = cursor.get_device() if cursor.is_cuda else None
        self._as_captured = False
        self._cursor_live = False  # whether the device's counters equal the host's

    def __len__(self) -> int:
        return self.appended - self.discarded

    @property
    def rollout(self) -> int:
        """Number of the oldest rollout, counted from the first ever."""
        return self.discarded // self.num_steps

    @property
    def place(self) -> int:
        """The oldest rollout's place."""
        return self.discarded // self.num_steps % self.num_rollouts

    @property
    def collecting(self) -> int:
        """The place of the rollout whose step is written next."""
        return self.where(self.appended)[1]

    @property
    def start(self) -> int:
        """Slot of its first step."""
        return self.discarded % self.capacity

    @property
    def slot(self) -> int:
        """Slot of the step that is written next."""
        return self.appended % self.capacity

    @property
    def has_truncations(self) -> bool:
        """Whether the oldest rollout, or any captured step, came with ``truncated``."""
        return self.truncations[self.place] or self.captured_truncations

    @property
    def has_resets(self) -> bool:
        """The same for ``valid``."""
        return self.resets[self.place] or self.captured_resets

    def where(self, step: int) -> tuple[int, int]:
        """(slot, place of its rollout) of a step, counted from the first ever."""
        return step % self.capacity, step // self.num_steps % self.num_rollouts

    def capturing(self) -> bool:
        """Whether calls follow the device's counters now."""
        return self._as_captured or (self._device is not None and capturing(self._device))

    @contextlib.contextmanager
    def as_captured(self) -> Iterator[None]:
        """Within it, :meth:`capturing` is True."""
        before, self._as_captured = self._as_captured, True
        try:
            yield
        finally:
            self._as_captured = before

    def require_room(self) -> None:
        """Raises BufferFull if the next step would overwrite a rollout that has not been discarded."""
        if self.appended - self.discarded >= self.capacity and not self.capturing():
            raise BufferFull(
                f"the ring of {self.capacity} steps holds {len(self)} that are not discarded: "
                "learn from the rollout and call clear() first"
            )

    def count(self, truncated: bool, valid: bool) -> None:
        """Counts a complete step; ``truncated``, ``valid``: whether it came with these flags."""
        place = self.appended // self.num_steps % self.num_rollouts
        if truncated:
            self.truncations[place] = True
        if valid:
            self.resets[place] = True
        self.appended += 1
        self._cursor_live = False

    def discard(self) -> None:
        """Discards the oldest full rollout; if none is full, rewinds to the start of the one being collected."""
        captured, place = self.capturing(), self.place
        if captured:
            if self.num_rollouts > 1:
                raise RuntimeError("clear: in a captured graph it needs a ring of one rollout, capacity == num_steps")
            self.cursor[CURSOR_DISCARDED] += self.num_steps
        elif len(self) >= self.num_steps:
            self.discarded += self.num_steps
            if self._cursor_live:
                self.cursor[CURSOR_DISCARDED] += self.num_steps
        else:
            self.appended = self.discarded
            self._cursor_live = False
        if not captured:
            self.truncations[place] = self.resets[place] = False
        self.discards += 1

    def advance(self, steps: int, rollouts: int) -> None:
        """Counts ``steps`` appends and ``rollouts`` discards that a graph is about to replay.

        Raises ValueError and BufferFull as :meth:`pydrone.buffer.RolloutBuffer.advance`, and changes nothing then.
        """
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
            raise ValueError(f"steps: expected an int of at least 0, got {steps!r}")
        complete = (len(self) + steps) // self.num_steps
        if isinstance(rollouts, bool) or not isinstance(rollouts, int) or not 0 <= rollouts <= complete:
            raise ValueError(f"rollouts: expected an int from 0 to {complete}, those full by then, got {rollouts!r}")
        if len(self) + steps > self.capacity:
            raise BufferFull(f"the ring of {self.capacity} steps holds {len(self)}; {steps} more would overwrite them")
        if not self._cursor_live:
            # The counters only: the host must not reset the device's flag.
            self.cursor[: CURSOR_DISCARDED + 1].copy_(torch.tensor([self.appended, self.discarded]))
            self._cursor_live = True
        self.appended += steps
        if rollouts:
            self.discarded += rollouts * self.num_steps
            self.discards += 1

    def restore(self, appended: int, discarded: int, truncations: list[bool], resets: list[bool]) -> None:
        """Takes over another ring's counters; minibatches drawn before are stale."""
        self.appended, self.discarded = appended, discarded
        self.truncations, self.resets = list(truncations), list(resets)
        self.discards += 1
        self._cursor_live = False
