"""The launches of one operation with a buffer's arguments, hot and cold, and the check of their outputs.

The arguments are recorded, so that any backend's operation, or any variant of it, can make the same launches.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from measurement import Call, Kernels, Run
from peers import ours
from torch import Tensor
from workload import BATCH_BYTES, GAE_BYTES, GAMMA, LAM, NUM_MINIBATCHES, POLICY_BYTES, ROW_BYTES, Rollout, Truth

from pydrone.buffer import RolloutBuffer
from pydrone.ops import dispatch, reference

Operation = Callable[..., None]
COLD = 4  # rotating launches touch so many times the cache's size


class Case(NamedTuple):
    """An operation's launches, each a tuple of arguments."""

    operation: str
    """gae, append or gather."""
    whole: list[tuple]
    """Launches that together complete ``outputs``."""
    hot: list[tuple]
    """One launch, whose data stays in the cache when it is repeated."""
    cold: list[tuple]
    """Several launches over more memory than the cache holds, or over all of the rollout if that is less."""
    poison: Callable[[], None]
    """Overwrites the outputs of ``whole``, so that the check finds what a launch does not write."""
    outputs: Callable[[], dict[str, Tensor]]
    """For ``Truth.check``."""
    nbytes: int
    """Useful bytes of a launch: each byte that must be read or written counts once."""

    def check(self, operation: Operation, truth: Truth) -> None:
        """Raises AssertionError unless ``operation`` writes what it must."""
        self.poison()
        for arguments in self.whole:
            operation(*arguments)
        truth.check(self.outputs())

    def kernels(self, operation: Operation) -> Kernels:
        """The launches by ``operation``."""
        hot, cold = ([partial(operation, *arguments) for arguments in x] for x in (self.hot, self.cold))
        return Kernels(hot, cold, partial(self.check, operation))


def recorded(buf: RolloutBuffer, run: Call) -> list[tuple]:
    """The arguments of each launch of ``run`` on ``buf``."""
    kept, ops = [], buf._storage.ops

    def keep(launch: Operation) -> Operation:
        def call(*arguments) -> None:
            kept.append(arguments)
            launch(*arguments)

        return call

    kept_ops = {name: keep(getattr(ops, name)) for name in ("gae", "append", "gather")}
    buf._storage.ops = ops._replace(**kept_ops, prepared=None, prepare_append=None)
    try:
        run()
    finally:
        buf._storage.ops = ops
    return kept


def named(operation: str, arguments: tuple) -> dict[str, object]:
    return dict(zip(inspect.signature(getattr(reference, operation)).parameters, arguments, strict=True))


# Of planes [N, C]: contiguous along the steps of an environment, or along the environments of a step.
LAYOUTS = {"rows": Tensor.contiguous, "columns": lambda x: x.t().contiguous().t()}


def gae(rollout: Rollout, backend: str | None, cache: int, layout: str | None = None) -> Case:
    """The launch of ``compute_gae``, in the buffer's memory or in copies of one of LAYOUTS."""
    buf = ours.scan_buffer(rollout, backend)
    (arguments,) = recorded(buf, lambda: buf.compute_gae(rollout.last_values, GAMMA, LAM))
    if layout is not None:
        arguments = _each(arguments, lambda x: LAYOUTS[layout](x) if x.dim() == 2 else x)
    written = named("gae", arguments)
    written = {name: written[name] for name in ("advantages", "returns", "stats")}

    def poison() -> None:
        for x in written.values():
            x.fill_(float("nan"))

    def outputs() -> dict[str, Tensor]:
        scan = {name: written[name].t() for name in ("advantages", "returns")}
        return scan | ours.moments(written["stats"])

    nbytes = GAE_BYTES * rollout.size.samples
    sets = min(64, max(2, -(-COLD * cache // nbytes)))
    cold = [arguments, *(_each(arguments, torch.clone) for _ in range(sets - 1))]
    # Twice: a launch must leave the workspace fit for the next.
    return Case("gae", [arguments] * 2, [arguments], cold, poison, outputs, nbytes)


def append(rollout: Rollout, backend: str | None, cache: int = 0) -> Case:
    """The launches of a rollout's appends, into a ring of two."""
    buf = ours.buffer(rollout, backend=backend, capacity=2 * rollout.num_steps)
    each = recorded(buf, lambda: ours.fill(buf, rollout))
    step = rollout.step(0)

    def poison() -> None:
        for x in named("append", each[0])["memory"]:
            x.zero_()

    nbytes = 2 * (ROW_BYTES + POLICY_BYTES) * rollout.num_envs
    return Case("append", each, each[:1], each, poison, lambda: ours.stored(buf, step), nbytes)


def gather(rollout: Rollout, backend: str | None, cache: int = 0) -> Case:
    """The launches of an epoch's minibatches."""
    buf, batches = ours.filled(rollout, backend=backend), []
    each = recorded(buf, lambda: batches.extend(buf.minibatches(NUM_MINIBATCHES)))
    fields = [ours.policy_fields(mb) for mb in batches]

    def poison() -> None:
        for x in (x for part in fields for x in part.values()):
            x.fill_(float("nan"))

    def outputs() -> dict[str, Tensor]:
        return {"shuffled": True, **{name: torch.cat([part[name] for part in fields]) for name in fields[0]}}

    nbytes = 2 * (BATCH_BYTES + POLICY_BYTES) * len(batches[0])
    return Case("gather", each, each[:1], each, poison, outputs, nbytes)


def _each(arguments: tuple, change: Callable[[Tensor], Tensor]) -> tuple:
    return tuple(change(x) if isinstance(x, Tensor) else x for x in arguments)


def timed(prepare: Callable[..., Run], make: Callable[..., Case], cache: int, backend: str | None) -> Callable:
    """``prepare`` with the launches of ``make`` for device time, both on ``backend``."""

    def prepared(rollout: Rollout) -> Run:
        run = prepare(rollout, backend=backend)
        case = make(rollout, backend, cache)
        operation = getattr(dispatch.select(rollout.last_values.device, backend), case.operation)
        return run._replace(kernels=case.kernels(operation))

    return prepared
