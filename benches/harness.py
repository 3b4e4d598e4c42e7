"""How a comparison is measured: outputs first, then every contender in turn, round after round, in one process.

* **Checked.** A contender runs once and its outputs are held against the float64 truth. One that is wrong has no time.
* **Interleaved.** In every round each contender has its turn, so that what else the machine does hits all of them. Slow
  ones sit out some rounds. Ratios are of medians within one comparison.
* **Hot**: a turn is one call untimed and then timed ones, on the same memory. **Cold**: a turn is one timed call on
  memory that has not been touched since so much other memory was that it has left the last-level cache: each contender
  has ``sets`` copies of its storage and rotates over copies of the inputs, and the others run in between.
* **Time** is wall time of the whole eager call as its user would make it; on CUDA the device is waited for before the
  clock starts and before it stops.
* **Launches** are the operations that PyTorch dispatches to a kernel: without views and bare allocations, with
  ``torch.ops.pydrone``'s. They are counted in a run that is not timed. NumPy and compiled code are not seen by it.
"""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

MIN_TURNS, MAX_TURNS = 3, 60
SLOW = 1.0  # seconds of a call from which on two turns have to do
MAX_CACHE = 512 << 20
ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "resize_", "lift_fresh"}


class Absent(Exception):
    """A contender cannot take part; the reason."""


class Run(NamedTuple):
    """One contender, ready: its memory allocated, its inputs in the form in which its own user would have them."""

    call: Callable[[], object]
    """What is timed."""
    outputs: Callable[[], dict[str, Tensor]]
    """What the last call gave, for ``Truth.check``. An epoch of minibatches reads another one."""
    laps: list[float] | None = None
    """Seconds that a part of each call took (GAE's in an iteration), appended by the call."""
    launches: Callable[[], int | None] | None = None
    """Says how many there are, where the dispatcher does not see them; None: unknown."""


@dataclass
class Contender:
    """``prepare(rollout)`` allocates and returns a Run. ``against``: the pydrone it is to be compared with."""

    name: str
    prepare: Callable[..., Run]
    useful_bytes: int = 0
    """Bytes that the operation has to read plus those that it has to write, at the least, a sample."""
    against: str = "pydrone"
    storage_bytes: int = 0
    """About what ``prepare`` allocates, a sample."""


@dataclass
class Result:
    """What came out for one contender: seconds of each turn by "hot" and "cold", or why there are none."""

    name: str
    against: str
    useful_bytes: int
    seconds: dict[str, list[float]] = field(default_factory=dict)
    first_seconds: float = 0.0
    """Of the first call, in which launches are counted and pages are faulted in; no result."""
    share: float | None = None
    launches: int | None = None
    absent: str | None = None
    wrong: str | None = None

    def median(self, cache: str) -> float | None:
        return statistics.median(self.seconds[cache]) if self.seconds.get(cache) else None

    def spread(self, cache: str) -> float:
        """The interquartile range."""
        seconds = self.seconds[cache]
        low, _, high = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else seconds * 3
        return high - low


@dataclass
class Comparison:
    """All results of one operation at one size, and in words how cold was cold."""

    operation: str
    size: str
    num_envs: int
    num_steps: int
    results: dict[str, Result]
    cold: str = ""
    hot: str = ""
    """Why there are no hot figures."""


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        returns = func._schema.returns
        view = any(x.alias_info is not None and not x.alias_info.is_write for x in returns)
        if not view and func._schema.name.split("::")[1] not in ALLOCATIONS:
            self.count += 1
        return func(*args, **(kwargs or {}))


def count_launches(call: Callable[[], object]) -> int:
    """Operations dispatched by ``call``."""
    with _Counter() as counter:
        call()
    return counter.count


def cache_bytes(device: torch.device) -> int:
    """The last-level cache, or 32 MiB where the system does not say; at most MAX_CACHE."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text[:-1]) << {"K": 10, "M": 20}.get(text[-1], 0))
    return min(max(sizes) or 32 << 20, MAX_CACHE)


def available_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) << 10
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


class _Plan(NamedTuple):
    sets: int
    inputs: int
    text: str


def _plan(contenders: list[Contender], rollout, device: torch.device, caches: tuple[str, ...]) -> _Plan:
    """How many copies make a call cold, within half of the memory there is."""
    samples, cache = rollout.size.samples, cache_bytes(device)
    storage = sum(c.storage_bytes * samples for c in contenders)
    touched = sum(c.useful_bytes * samples for c in contenders)
    if "cold" not in caches or touched == 0:
        return _Plan(1, 1, "")
    # An input is read again ``inputs`` turns later, and each turn touches what its operation has to.
    inputs = min(max(2, -(-5 * cache * len(contenders) // (4 * touched))), 256)
    # Between two uses of one copy of its storage a contender sees ``sets`` rounds of all the others.
    sets = min(max(-(-5 * cache // (4 * touched)), 4), 32)
    room = available_bytes(device) // 2 - inputs * rollout.nbytes
    sets = max(1, min(sets, room // max(1, storage))) if storage < (1 << 30) else 1
    if room < storage * sets:
        raise Absent(f"needs {(inputs * rollout.nbytes + storage * sets) / 1e9:.1f} GB of memory")
    text = (
        f"{sets} copies of each contender's storage, {inputs} of the inputs; {sets * touched / 1e6:.0f} MB are touched "
        f"between two uses of one; the last-level cache has {cache / 1e6:.0f} MB"
    )
    return _Plan(sets, inputs, text)


class Harness:
    """Measures comparisons on one device. ``budget``: seconds for the timed turns of each."""

    def __init__(self, device: str = "cpu", budget: float = 3.0) -> None:
        self.device, self.budget = torch.device(device), budget

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def time(self, call: Callable[[], object]) -> float:
        self.wait()
        start = time.perf_counter()
        call()
        self.wait()
        return time.perf_counter() - start

    def compare(
        self,
        operation: str,
        rollout,
        truth,
        contenders: list[Contender],
        caches: tuple[str, ...] = ("hot", "cold"),
        budget: float | None = None,
    ) -> Comparison:
        """Prepares, checks, counts and times ``contenders`` on copies of ``rollout``."""
        size = rollout.size
        results = {c.name: Result(c.name, c.against, c.useful_bytes * size.samples) for c in contenders}
        comparison = Comparison(operation, str(size), size.num_envs, size.num_steps, results)
        try:
            plan = _plan(contenders, rollout, self.device, caches)
        except Absent as reason:
            for result in results.values():
                result.absent = str(reason)
            return comparison
        comparison.cold = plan.text
        largest = max(result.useful_bytes for result in results.values())
        if "hot" in caches and largest > cache_bytes(self.device):
            comparison.hot = f"nothing stays hot: a call touches {largest / 1e6:.0f} MB, more than the last-level cache"
            caches = tuple(cache for cache in caches if cache != "hot")
        inputs = [rollout, *(rollout.clone() for _ in range(plan.inputs - 1))]
        runs: dict[str, list[Run]] = {}
        for i, contender in enumerate(contenders):
            result = results[contender.name]
            try:
                ready = [contender.prepare(inputs[i % len(inputs)])]
                self._check(ready[0], truth, result)
                # Contenders that stand in a row take inputs that do, and so do the rounds.
                others = [(i + k * len(contenders)) % len(inputs) for k in range(1, plan.sets)]
                ready += [contender.prepare(inputs[k]) for k in others]
                runs[contender.name] = ready
            except Absent as reason:
                result.absent = str(reason)
            except AssertionError as error:
                result.wrong = str(error) or "an assertion failed"
        self.wait()
        for cache in caches:
            self._rounds(runs, results, cache, (budget or self.budget) / len(caches))
        for name, ready in runs.items():
            laps = [lap for run in ready for lap in run.laps or ()]
            if laps:
                cold = results[name].seconds.get("cold") or results[name].seconds["hot"]
                results[name].share = statistics.median(laps) / statistics.median(cold)
        runs.clear()
        gc.collect()
        return comparison

    def _check(self, run: Run, truth, result: Result) -> None:
        start = time.perf_counter()
        if run.launches is None:
            result.launches = count_launches(run.call)
        else:
            run.call()
            result.launches = run.launches()
        self.wait()
        result.first_seconds = time.perf_counter() - start
        truth.check(run.outputs())

    def _estimate(self, call: Callable[[], object], first: float) -> float:
        """Seconds of a call, to plan with. Of slow ones the first call has to do."""
        return first if first > SLOW else min(self.time(call), self.time(call))

    def _rounds(self, runs: dict[str, list[Run]], results: dict[str, Result], cache: str, budget: float) -> None:
        gc.collect()
        gc.disable()
        try:
            seconds = {n: self._estimate(ready[0].call, results[n].first_seconds) for n, ready in runs.items()}
            for ready in runs.values():
                for run in ready:
                    # First calls fault pages in; none of them is timed.
                    if cache == "cold" and len(ready) > 1:
                        run.call()
                    if run.laps is not None:
                        run.laps.clear()
            per_turn = {name: (1 if cache == "cold" else 2) * x for name, x in seconds.items()}
            share = budget / max(1, len(runs))
            least = {name: MIN_TURNS if x < SLOW else 2 for name, x in seconds.items()}
            turns = {n: int(min(max(share / max(x, 1e-6), least[n]), MAX_TURNS)) for n, x in per_turn.items()}
            rounds = max(turns.values(), default=0)
            for r in range(rounds):
                for name, ready in runs.items():
                    turn = r * turns[name] // rounds
                    if (r + 1) * turns[name] // rounds == turn:
                        continue
                    run = ready[turn % len(ready)]
                    if cache == "hot":
                        run.call()
                    results[name].seconds.setdefault(cache, []).append(self.time(run.call))
        finally:
            gc.enable()
