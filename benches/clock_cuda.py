"""Device time, eager time, launches and waits, of calls without arguments."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

Run = Callable[[], object]

WARM_UP = 0.02  # seconds of replays before the first that counts: an idle GPU clocks down
LAUNCHES = ("cudaLaunch", "cuLaunch", "cudaGraphLaunch", "cudaMemcpyAsync", "cudaMemsetAsync")
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")


class Clock:
    """Medians, in seconds. On a CPU, where it only tries the code out, launches are called one by one."""

    def __init__(self, device: str, repeats: int) -> None:
        self.device, self.cuda, self.repeats = device, device == "cuda", repeats

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def captured(self, run: Run) -> Run:
        """``run``, which has run before, as a graph to replay; on a CPU itself."""
        if not self.cuda:
            return run
        self.wait()
        graph = torch.cuda.CUDAGraph()
        # What a kernel's first launch loads forbids the default capture mode.
        with torch.cuda.graph(graph, capture_error_mode="relaxed"):
            run()
        self.wait()
        return graph.replay

    def repeated(self, launches: list[Run], times: int = 1) -> Run:
        """A replay of ``launches`` in turn, ``times`` times over."""

        def run() -> None:
            for _ in range(times):
                for launch in launches:
                    launch()

        run()
        return self.captured(run)

    def launches(self, launches: list[Run], times: int = 1) -> float:
        """Device time of one of ``launches``, made in turn, ``times`` times over, in one graph."""
        replay = self.repeated(launches, times)
        self.warm_up(replay)
        return statistics.median(self.once(replay) for _ in range(self.repeats)) / (times * len(launches))

    def device_time(self, calls: list[Run], times: int = 1, graph: bool = True) -> tuple[float, str]:
        """The same of calls that are someone else's, and "graph" or "profiler", where it is from.

        What a graph does not hold, such as launches on another stream, is the sum of the profiler's kernel times.
        """
        if graph and self.cuda:
            calls[0]()
            seen = self.count(calls[0])
            try:
                whole = seen is not None and (self.count(self.captured(calls[0])) or 0) >= seen
            except RuntimeError:
                whole = False
            self.wait()
            if not whole:
                return self._profiled(calls), "profiler"
        elif self.cuda:
            return self._profiled(calls), "profiler"
        return self.launches(calls, times), "graph"

    def calls(self, run: Run, times: int) -> float:
        """The whole of one call, of ``times`` in a row that nothing waits for but the last."""
        seconds = []
        for _ in range(self.repeats + 2):
            self.wait()
            start = time.perf_counter()
            for _ in range(times):
                run()
            self.wait()
            seconds.append((time.perf_counter() - start) / times)
        return statistics.median(seconds[2:])

    def warm_up(self, replay: Run) -> None:
        until = time.perf_counter() + WARM_UP
        while True:
            self.once(replay)
            if time.perf_counter() > until:
                return

    def once(self, replay: Run) -> float:
        """Device seconds of one replay."""
        if not self.cuda:
            start = time.perf_counter()
            replay()
            return time.perf_counter() - start
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def count(self, run: Run) -> int | None:
        """Kernels, copies and fills of one call of ``run``; None where the profiler sees none, as without CUPTI."""
        if not self.cuda:
            return None
        run()
        return len(self._on_device(self._events(run))) or None

    def host_calls(self, run: Run) -> dict[str, int]:
        """How often the host launched something (a graph is one), and waited for the device, in one call of ``run``."""
        if not self.cuda:
            return {}
        run()
        own, found = (self._host_calls(x) for x in (lambda: None, run))
        if not found["host_launches"]:
            return {}
        return {name: n - own[name] for name, n in found.items()}  # without the profiler's

    def _host_calls(self, run: Run) -> dict[str, int]:
        names = [event.name for event in self._events(run, wait=False)]
        return {
            "host_launches": sum(name.startswith(LAUNCHES) for name in names),
            "host_waits": sum(name in WAITS for name in names),
        }

    def _profiled(self, calls: list[Run]) -> float:
        """Device time of one of ``calls``: of each kernel, copy and fill, without the gaps between them."""

        def run() -> None:
            for call in calls:
                call()

        run()
        seconds = []
        for _ in range(3):
            events = self._on_device(self._events(run))
            if not events:
                raise RuntimeError("the profiler has seen nothing of the device: is CUPTI there?")
            seconds.append(sum(event.time_range.elapsed_us() for event in events) / 1e6 / len(calls))
        return statistics.median(seconds)

    def _events(self, run: Run, wait: bool = True) -> list:
        from torch.profiler import ProfilerActivity, profile

        self.wait()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
            run()
            if wait:
                self.wait()
        return list(recorded.events())

    def _on_device(self, events: list) -> list:
        from torch.autograd import DeviceType

        # An optimiser's step is marked on the device's time line too; it is none of the launches.
        device = [event for event in events if event.device_type == DeviceType.CUDA]
        return [event for event in device if not getattr(event, "is_user_annotation", False)]


def in_a_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:400]
