"""The same rows of what people use today: torch loops, rsl_rl, and other packages' GAE kernels, each by its own code.

What is not installed is a row that says so.
"""

from __future__ import annotations

from collections.abc import Callable

import harness
from peers import by_hand, gpu_kernels, rsl_rl
from workload import BATCH_BYTES, GAE_BYTES, NUM_MINIBATCHES, POLICY_BYTES, ROW_BYTES, Rollout, Truth

from .cases import gae_sets
from .clock import Clock, in_a_line
from .operations import on_device, whole_call

GAE = {
    "torch loop": by_hand.gae_loop,
    "torch.compile": by_hand.gae_compiled,
    "rsl_rl": rsl_rl.gae,
    "rl-triton": gpu_kernels.gae_rl_triton,
    "PufferLib": gpu_kernels.gae_pufferlib,
}
APPEND = {"copy_ a field": by_hand.append_copies, "rsl_rl": rsl_rl.append}
EPOCH = {"index_select": by_hand.epoch_index_select, "rsl_rl": rsl_rl.epoch}
REPLAYED = 600  # launches that a graph of repetitions has, about


def gae(rollout: Rollout, truth: Truth, clock: Clock, cache: int) -> list[dict]:
    """On copies of the inputs that are larger than the cache together, and on one of them."""
    copies = [rollout, *(rollout.clone() for _ in range(gae_sets(rollout, cache) - 1))]

    def measure(prepare: Callable[[Rollout], harness.Run]) -> dict:
        runs = [prepare(copy) for copy in copies]
        found = whole_call(runs[0], truth, clock, 1)
        times = int(max(1, REPLAYED // (found["launches"] or REPLAYED)))
        hot, source = clock.device_time([runs[0].call], times)
        cold, _ = clock.device_time([run.call for run in runs], graph=source == "graph")
        return found | on_device(1e6 * hot, 1e6 * cold, GAE_BYTES * rollout.size.samples) | {"device_time": source}

    return [row("gae", name, measure, prepare) for name, prepare in GAE.items()]


def storage(rollout: Rollout, truth: Truth, clock: Clock) -> list[dict]:
    """A step's append and an epoch's minibatch: a call is a whole rollout or epoch, which no cache holds."""
    samples = rollout.size.samples
    append, batch = 2 * (ROW_BYTES + POLICY_BYTES), 2 * (BATCH_BYTES + POLICY_BYTES)

    def measured(per: int, nbytes: int, graph: bool) -> Callable[[Callable], dict]:
        def measure(prepare: Callable[[Rollout], harness.Run]) -> dict:
            run = prepare(rollout)
            found = whole_call(run, truth, clock, per)
            cold, source = clock.device_time([run.call], graph=graph)
            return found | on_device(None, 1e6 * cold / per, nbytes * samples // per) | {"device_time": source}

        return measure

    step = measured(rollout.num_steps, append, True)
    # randperm may wait for the device, which a capture would not survive.
    minibatch = measured(NUM_MINIBATCHES, batch, False)
    found = [row("append", name, step, prepare) for name, prepare in APPEND.items()]
    return found + [row("minibatch", name, minibatch, prepare) for name, prepare in EPOCH.items()]


def row(what: str, name: str, measure: Callable[..., dict], *arguments: object) -> dict:
    """``measure``'s figures, or why there are none."""
    found = {"what": what, "backend": name}
    try:
        return found | measure(*arguments)
    except harness.Absent as reason:
        return found | {"absent": str(reason)}
    except Exception as error:  # another package's, of any kind
        return found | {"failed": in_a_line(error)}
