"""GAE, append and a minibatch of pydrone: launches, device time hot and cold, the whole eager call, waits."""

from __future__ import annotations

import harness
from peers import ours
from workload import NUM_MINIBATCHES, Rollout, Truth

from pydrone.ops import dispatch

from . import cases
from .cases import Case
from .clock import Clock

IN_A_ROW = 100  # launches, about: a call that takes microseconds is timed by so many that nothing waits between


def rows(rollout: Rollout, truth: Truth, backend: str, clock: Clock, cache: int) -> list[dict]:
    """Raises AssertionError where an output is wrong."""
    ops = dispatch.select(rollout.last_values.device, backend)
    steps, found = rollout.num_steps, []

    def add(what: str, run: harness.Run, per: int, case: Case | None = None, hot: int = 100, cold: int = 1) -> None:
        row = {"what": what, "backend": backend, **whole_call(run, truth, clock, per)}
        if case is not None:
            operation = getattr(ops, case.operation)
            case.check(operation, truth)
            again, rotated = case.runs(operation)
            row |= on_device(1e6 * clock.launches(again, hot), 1e6 * clock.launches(rotated, cold), case.nbytes)
        found.append(row)

    add("gae", ours.gae(rollout, backend), 1, cases.gae(rollout, backend, cache), cold=4)
    add("pydrone.gae(out=)", ours.gae_rows(rollout, backend), 1)
    add("append", ours.append(rollout, backend=backend), steps, cases.append(rollout, backend))
    add("begin + end", ours.append_split(rollout, backend=backend), steps)
    epoch, minibatches = ours.epoch(rollout, reuse=True, backend=backend), cases.gather(rollout, backend)
    add("minibatch", epoch, NUM_MINIBATCHES, minibatches, hot=10, cold=10)
    return found


def whole_call(run: harness.Run, truth: Truth, clock: Clock, per: int) -> dict:
    """The outputs of ``run`` checked; then its launches, eager time and waits, as one of ``per`` in a call.

    ``host_launches`` and ``host_waits`` are of all of them: one wait in a rollout's appends is one too many.
    """
    run.call()
    clock.wait()
    truth.check(run.outputs())
    launches = clock.count(run.call)
    found = {"launches": None if launches is None else launches / per, **clock.host_calls(run.call)}
    times = max(1, IN_A_ROW // max(per, launches or 1))
    return found | {"eager_us": 1e6 * clock.calls(run.call, times) / per}


def on_device(hot_us: float | None, cold_us: float, nbytes: int) -> dict:
    found = {"bytes": nbytes, "cold_us": cold_us, "cold_gb_s": nbytes / cold_us / 1e3}
    return found if hot_us is None else found | {"hot_us": hot_us}
