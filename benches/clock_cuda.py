"""The GPU's clock: device time hot and cold, the whole eager call, launches, waits of the host.

* **Hot, cold**: device time of a contender's launches in a CUDA graph, between two events, with the same replay queued
  ahead of it. Hot repeats one launch on the same memory; cold rotates over copies that together exceed the L2 cache.
* A contender that cannot be captured in a graph (host code that waits, launches on another stream) gets the profiler's
  sum of its kernels instead: ``Result.device_time`` says which.
* **Eager**: wall time of whole calls in a row, with a wait for the device before the first and after the last.
"""

from __future__ import annotations

import time

import torch
from cases import COLD
from clock import Plan, Turn
from cuda_device import CudaDevice, StandIn
from measurement import Absent, Call, Contender, Graphed, Result, Run, nothing

MOST_IN_A_GRAPH = 20_000
EAGER_ROW = 0.02  # seconds of calls in a row: makes the final wait for the device negligible
WARM_UP = 0.02  # seconds of replays before the first timed one: an idle GPU clocks down


class CudaClock:
    kind = "cuda"

    def __init__(self, on: CudaDevice | StandIn) -> None:
        self.on, self.device, self.cache_bytes = on, on.name, on.cache_bytes
        self.wait = on.wait

    def plan(self, contenders: list[Contender], rollout, figures: tuple[str, ...]) -> Plan:
        samples = rollout.size.samples
        useful = max((c.useful_bytes * samples for c in contenders), default=0)
        if "cold" not in figures or not rollout.copied or useful == 0:
            return Plan()
        sets = min(64, -(-COLD * self.cache_bytes // useful))
        needed = sets * (rollout.nbytes + sum(c.storage_bytes * samples for c in contenders))
        if needed > self.on.available_bytes() // 2:
            raise Absent(f"needs {needed / 1e9:.1f} GB of GPU memory")
        cache = f"the L2 cache has {self.cache_bytes / 1e6:.0f} MB"
        return Plan(sets, sets, f"launches rotate over {sets * useful / 1e6:.0f} MB of useful bytes; {cache}")

    def count(self, run: Run) -> dict[str, int | None]:
        for _ in range(2):  # pydrone --capture captures its training in the second call
            run.call()
        return {"launches": self.on.launches(run.call), **self.on.host_calls(run.call)}

    def turn(self, contender: Contender, ready: list[Run], figure: str, per: int, result: Result) -> Turn:
        if figure == "eager":
            return self._eager(ready[0])
        if contender.on_host:
            raise Absent("computes on the host")
        kernels = ready[0].kernels
        if figure == "hot" and result.useful_bytes / (per if kernels else 1) > self.cache_bytes:
            raise Absent("nothing stays in the cache")
        if kernels:
            result.device_time = "graph"
            launches = kernels.hot if figure == "hot" else kernels.cold
            return self.replayed(launches, per, times=max(1, self.on.in_a_graph // len(launches)))
        runs = ready[:1] if figure == "hot" else ready
        in_a_call = result.counts.get("launches") or self.on.in_a_graph
        if in_a_call * len(runs) > MOST_IN_A_GRAPH:
            raise Absent(f"{in_a_call * len(runs)} launches are too many for a graph")
        if self._held(contender, runs[0], result):
            graphs = [run.graph or Graphed(run.call) for run in runs]
            result.device_time = "graph"
            times = int(max(1, self.on.in_a_graph // (in_a_call * len(runs))))
            times = times if graphs[0].before is nothing else 1
            turn = self.replayed([x.call for x in graphs], 1, times, graphs[0].before, graphs[0].generators)
            graphs[0].check()
            return turn
        result.device_time = "profiler"

        def profiled(turn: int) -> float:
            calls = [run.call for run in runs]
            return self.on.kernel_seconds(lambda: [call() for call in calls]) / len(calls)

        return profiled

    def replayed(
        self,
        launches: list[Call],
        per: int,
        times: int,
        before: Call = nothing,
        generators: tuple[torch.Generator, ...] = (),
    ) -> Turn:
        """Device seconds for ``per`` of ``launches``: one graph makes them in turn, ``times`` times over.

        ``before`` is the host's part of a replay.
        """

        def call() -> None:
            for _ in range(times):
                for launch in launches:
                    launch()

        before()
        call()  # loads kernels, which a capture cannot
        replay = self.on.captured(call, generators)

        def once(turn: int) -> float:
            def ahead() -> None:
                before()
                replay()
                before()

            return self.on.seconds(replay, ahead) / (times * len(launches)) * per

        until = time.perf_counter() + (WARM_UP if self.on.real else 0)
        once(0)
        while time.perf_counter() < until:
            once(0)
        return once

    def _eager(self, run: Run) -> Turn:
        def seconds(times: int) -> float:
            self.wait()
            start = time.perf_counter()
            for _ in range(times):
                run.call()
            self.wait()
            return (time.perf_counter() - start) / times

        seconds(1)
        times = max(1, min(self.on.in_a_graph, int(EAGER_ROW / seconds(1))))
        return lambda turn: seconds(times)

    def _held(self, contender: Contender, run: Run, result: Result) -> bool:
        """Whether a graph captures all launches of the call. A wait of the host makes a capture fail."""
        if run.graph is not None:
            return True
        seen = result.counts.get("launches")
        if not contender.capturable or seen is None or result.counts.get("host_waits"):
            return False
        try:
            return (self.on.launches(self.on.captured(run.call)) or 0) >= seen
        except RuntimeError:
            return False
