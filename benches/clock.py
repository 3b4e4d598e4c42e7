"""The clock's interface, the CPU's clock, and which clock a device gets."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from measurement import Absent, Call, Contender, Result, Run
from torch.utils._python_dispatch import TorchDispatchMode

MAX_CACHE = 512 << 20
ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "resize_", "lift_fresh"}

Turn = Callable[[int], float]
"""Given the number of the turn, measures once and returns the seconds of a whole call."""


class Plan(NamedTuple):
    """How many copies of its memory a cold call needs."""

    sets: int = 1
    """Copies of each contender's storage."""
    inputs: int = 1
    """Copies of the rollout."""
    text: str = ""
    """How cold is cold, for the report."""
    hot: str = ""
    """Why there are no hot figures."""


class Clock(Protocol):
    kind: str
    """cpu or cuda: decides which contenders take part and which figures are measured."""
    device: str
    cache_bytes: int
    """Of the last-level cache."""

    def plan(self, contenders: list[Contender], rollout, figures: tuple[str, ...]) -> Plan:
        """Raises Absent if there is not enough memory."""

    def wait(self) -> None:
        """Waits until the device is idle."""

    def count(self, run: Run) -> dict[str, int | None]:
        """Makes the first call of ``run`` and counts its launches."""

    def turn(self, contender: Contender, ready: list[Run], figure: str, per: int, result: Result) -> Turn:
        """A Turn for one figure of a contender; raises Absent if it has none. ``ready``: its copies."""


def for_device(device: str) -> Clock:
    """The clock of "cpu", "cuda", "cuda:1", ... or "stand-in"; ValueError if there is no such device."""
    if device == "stand-in":
        from clock_cuda import CudaClock
        from cuda_device import StandIn

        return CudaClock(StandIn())
    kind = torch.device(device).type
    if kind == "cuda":
        from clock_cuda import CudaClock
        from cuda_device import CudaDevice

        return CudaClock(CudaDevice(device))
    if kind != "cpu":
        raise ValueError(f"expected cpu, cuda or stand-in, got {device}")
    return CpuClock()


class CpuClock:
    """Wall time of a call. **Hot**: right after an untimed call on the same memory. **Cold**: on a copy; since its last
    use, the other contenders have touched more memory than the cache holds."""

    kind, device = "cpu", "cpu"

    def __init__(self) -> None:
        self.cache_bytes = _cache_bytes()

    def plan(self, contenders: list[Contender], rollout, figures: tuple[str, ...]) -> Plan:
        samples, cache = rollout.size.samples, self.cache_bytes
        storage = sum(c.storage_bytes * samples for c in contenders)
        touched = sum(c.useful_bytes * samples for c in contenders)
        largest = max((c.useful_bytes * samples for c in contenders), default=0)
        hot = ""
        if "hot" in figures and largest > cache:
            hot = f"nothing stays hot: a call touches {largest / 1e6:.0f} MB, more than the last-level cache"
        if "cold" not in figures or not rollout.copied or touched == 0:
            return Plan(hot=hot)
        # An input is read again ``inputs`` turns later; each turn touches its operation's useful bytes.
        inputs = min(max(2, -(-5 * cache * len(contenders) // (4 * touched))), 256)
        # Between two uses of one copy of its storage a contender sees ``sets`` rounds of all the others.
        sets = min(max(-(-5 * cache // (4 * touched)), 4), 32)
        # Use half of the available memory.
        room = _available_bytes() // 2 - inputs * rollout.nbytes
        sets = max(1, min(sets, room // max(1, storage))) if storage < (1 << 30) else 1
        if room < storage * sets:
            raise Absent(f"needs {(inputs * rollout.nbytes + storage * sets) / 1e9:.1f} GB of memory")
        text = (
            f"{sets} copies of each contender's storage, {inputs} of the inputs; {sets * touched / 1e6:.0f} MB are "
            f"touched between two uses of one; the last-level cache has {cache / 1e6:.0f} MB"
        )
        return Plan(sets, inputs, text, hot)

    def wait(self) -> None:
        pass

    def count(self, run: Run) -> dict[str, int | None]:
        if run.launches is None:
            return {"launches": dispatched(run.call)}
        run.call()
        return {"launches": run.launches()}

    def turn(self, contender: Contender, ready: list[Run], figure: str, per: int, result: Result) -> Turn:
        if figure == "eager":
            raise Absent("hot and cold are whole calls already")
        if figure == "cold" and len(ready) > 1:
            for run in ready:  # first calls fault pages in: do not time them
                run.call()

        def measure(turn: int) -> float:
            run = ready[turn % len(ready)]
            if figure == "hot":
                run.call()
            start = time.perf_counter()
            run.call()
            return time.perf_counter() - start

        return measure


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


def dispatched(call: Call) -> int:
    """Number of operations that PyTorch dispatches to a kernel in ``call``, without views and bare allocations."""
    with _Counter() as counter:
        call()
    return counter.count


def _cache_bytes() -> int:
    """Size of the last-level cache, or 32 MiB if the system does not say; at most MAX_CACHE."""
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text[:-1]) << {"K": 10, "M": 20}.get(text[-1], 0))
    return min(max(sizes) or 32 << 20, MAX_CACHE)


def _available_bytes() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) << 10
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
