"""Stores steps in a ring: from a caller's tensors to one launch of the operation ``append``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import profiler

from pydrone.ops.dispatch import bump, increment_version
from pydrone.ops.prepared import Again
from pydrone.rollout.layout import of_append
from pydrone.rollout.ring import Ring
from pydrone.rollout.sources import Ends, Row, Sources
from pydrone.rollout.storage import Storage


class Call(NamedTuple):
    """The arguments of ``append`` that are the same in every step of a kind, and what repeats it for steps like earlier
    ones, without and with ``valid``."""

    memory: list[Tensor]
    layout: Tensor
    again: list[Again]
    again_valid: list[Again]


# The most that are kept, which differ in dtypes or strides of the tensors given. Further ones are not worth a search.
MOST = 4


class Steps:
    """Stores steps, whole or in halves, and has the ring count them.

    Attributes:
        begun: the call that began the unfinished step, "begin" or "slot"; None between steps.
    """

    def __init__(self, storage: Storage, ring: Ring, sources: Sources, look: bool) -> None:
        """``look``: whether the launches look for NaN and infinite observations."""
        self._storage, self._ring, self.sources, self._look = storage, ring, sources, look
        self.begun: str | None = None
        self._values_at = [*storage.layout.stored].index("values")
        self.prepare()

    def prepare(self) -> None:
        """Takes the storage's tensors; again after they have changed."""
        storage, look = self._storage, self._look
        self.written = [storage.rows, storage.values, storage.rewards, storage.codes, *storage.pool[:2]]
        # For each kind of call: without truncations, with them, and with their final observations too.
        self._calls: dict[str, tuple[Call, Call, Call]] = {
            "append": self._variants(True, [storage.values, storage.rewards], look),
            "begin": self._variants(True, [storage.values], look),
            "end": self._variants(False, [storage.rewards], False),
            "slot": self._variants(False, [storage.values, storage.rewards], False),
        }

    def _variants(self, row: bool, planes: list[Tensor], look: bool) -> tuple[Call, Call, Call]:
        storage = self._storage
        fields = storage.layout.stored.values() if row else []
        final = storage.layout.pool_fields.values()
        # Observations are the first fields; GAE's launch looks at rewards and values.
        looked_at = len(storage.layout.obs) if look else 0
        with torch.inference_mode(False):
            plain, with_final = (of_append(fields, len(planes), x, looked_at) for x in ([], final))
        memory, flag = [storage.rows, storage.codes, *planes], [storage.not_finite] if looked_at else []
        pooled = [*memory, *storage.pool, *flag]
        calls = ([*memory, *flag], plain), (pooled, plain), (pooled, with_final)
        return tuple([Call(*x, [], []) for x in calls])

    def require_start(self, call: str) -> None:
        """Raises, naming ``call``, if no step can begin: one is unfinished, or the ring is full (BufferFull)."""
        if self.begun is not None:
            self.require_idle(call)
        self._ring.require_room()

    def require_idle(self, call: str) -> None:
        """Raises RuntimeError, naming ``call``, if a step is unfinished."""
        if self.begun is not None:
            raise RuntimeError(f"{call}: expected end() first, {self.begun}() has begun a step")

    def store(self, kind: str, row: Row | None, ends: tuple | None) -> None:
        """Stores a step or half of one: its row, and how it ended (a tuple as :class:`Ends`, which costs less to make).

        An operation that checks its arguments, or knows them, does so before it writes. Python then checks only what
        the operation cannot see. If either check fails, Python checks everything, to name the fault.
        """
        ops = self._storage.ops
        if (unchecked := ops.unchecked) is not None:
            fields, final = () if row is None else self.sources.listed(row), ()
            if ends is not None:
                final = self.sources.quick_final(ends)
            if fields is not None and final is not None:
                try:
                    return self._launch(unchecked.append, kind, fields, ends, final, self.sources.fit)
                except (RuntimeError, TypeError):
                    pass
        fields, final = () if row is None else self.sources.row(row), ()
        if ends is not None:
            ends, final = self.sources.ends(Ends(*ends))
        self._launch(ops.append, kind, fields, ends, final)

    def _launch(
        self,
        append: Callable[..., None],
        kind: str,
        fields: Sequence[Tensor],
        ends: Ends | None,
        final: Sequence[Tensor],
        fit: Callable[[tuple], bool] | None = None,
    ) -> None:
        """``fit``: checks ``fields``, unless the launch repeats an earlier one."""
        ring = self._ring
        captured, (slot, place) = ring.capturing(), ring.where(ring.appended)
        # The step's tensors, each once: sources, then flags.
        given = (self._storage.views["values"][slot],) if kind == "slot" else fields  # the caller has written them
        dones = truncated = valid = None
        if ends is not None:
            rewards, dones, truncated, _, valid = ends
            given = (*given, rewards, *final, dones)
            if truncated is not None:
                given += (truncated,)
            if valid is not None:
                given += (valid,)
        call = self._calls[kind][0 if truncated is None else 2 if final else 1]
        kept = call.again if valid is None else call.again_valid
        # Who traces or profiles wants to see the operation.
        traced = torch.compiler.is_compiling()
        unusual = captured or traced or profiler._is_profiler_enabled
        for again in () if unusual else kept:
            if again(slot, place, given):
                break
        else:
            if fit is not None and fields and not fit(fields):
                raise TypeError("expected fields that the operation may take")
            # Loops in functions of their own would cost a call an element.
            flags = dones, truncated, valid
            count = len(given) - (dones is not None) - (truncated is not None) - (valid is not None)
            sources = [*given[:count]]
            if fields:
                sources.insert(len(fields), fields[self._values_at])
            cursor = ring.cursor if captured else None
            append(call.memory, sources, call.layout, *flags, slot, place, cursor, ends is not None)
            prepare = self._storage.ops.prepare_append
            if prepare is not None and not unusual and len(kept) < MOST:
                places = [*range(count)]
                if fields:
                    places.insert(len(fields), self._values_at)
                kept += prepare(call.memory, call.layout, places, flags, given)
        if not traced:
            increment_version(self.written)
        if ends is not None:
            self._count(captured, truncated, valid)

    def _count(self, captured: bool, truncated: Tensor | None, valid: Tensor | None) -> None:
        """Counts a complete step; a captured one is counted where it is replayed."""
        if captured:
            self._ring.captured_truncations |= truncated is not None
            self._ring.captured_resets |= valid is not None
        else:
            self._ring.count(truncated is not None, valid is not None)

    def turn(self, run: Callable[[tuple, tuple], None], row: dict[str, object], ends: Mapping | None) -> bool:
        """Ends a step and begins the next, in one operation.

        Args:
            run: called with the operation's arguments for the end and for the beginning; it may compute the sources of
                ``row``, except observations, before it stores them.
            row: arguments of ``begin``.
            ends: arguments of ``end``; None before the first step.

        Returns False, and stores nothing, if anything is unusual: then call ``end`` and ``begin``, which store the step
        or name the fault.
        """
        ring, captured = self._ring, self._ring.capturing()
        step = ring.appended + (ends is not None)
        full = not captured and step - ring.discarded >= ring.capacity
        if full or self.begun != (None if ends is None else "begin"):
            return False
        end, final, truncated, valid = ((), (), None, None, None, None, 0, 0), (), None, None
        if ends is not None:
            try:
                ended = Ends(**ends)
                if self._storage.ops.checks:
                    final = self.sources.quick_final(ended)
                else:
                    ended, final = self.sources.ends(ended)
            except (TypeError, ValueError):
                return False
            if final is None:
                return False
            rewards, dones, truncated, _, valid = ended
            memory, layout, *_ = self._calls["end"][0 if truncated is None else 2 if final else 1]
            end = memory, [rewards, *final], layout, dones, truncated, valid, *ring.where(ring.appended)
        fields = dict(row)
        whole = *(fields.pop(x) for x in ("obs", "actions", "values", "log_probs")), fields
        try:
            sources = self.sources.quick_row(whole) if self._storage.ops.checks else self.sources.row(whole)
        except (TypeError, ValueError):
            return False
        if sources is None:
            return False
        memory, layout, *_ = self._calls["begin"][0]
        cursor = ring.cursor if captured else None
        try:
            run(end, (memory, sources[: len(self._storage.layout.obs)], layout, *ring.where(step), cursor))
        except (RuntimeError, TypeError):
            return False
        bump(self.written)
        if ends is not None:
            self._count(captured, truncated, valid)
        self.begun = "begin"
        return True
