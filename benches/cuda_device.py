"""The device under a CUDA clock: graphs, events, the profiler; and a CPU that stands in for it."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from clock import dispatched
from measurement import Call

from pydrone.ops import triton

LAUNCHES = ("cudaLaunch", "cuLaunch", "cudaGraphLaunch", "cudaMemcpyAsync", "cudaMemsetAsync")
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")


class CudaDevice:
    """A GPU. Raises ValueError if there is none."""

    real = True
    in_a_graph = 100  # launches, at least about so many: they make a replay's own cost negligible

    def __init__(self, name: str = "cuda") -> None:
        if not torch.cuda.is_available():
            built = f"is built for CUDA {torch.version.cuda}" if torch.version.cuda else "is built without CUDA"
            raise ValueError(f"no CUDA device is seen by torch {torch.__version__}, which {built}")
        self.name = name
        torch.cuda.set_device(torch.device(name).index or 0)
        self.cache_bytes = torch.cuda.get_device_properties(name).L2_cache_size

    def available_bytes(self) -> int:
        return torch.cuda.mem_get_info()[0]

    def wait(self) -> None:
        torch.cuda.synchronize()

    def captured(self, call: Call, generators: Sequence[torch.Generator] = ()) -> Call:
        """Captures ``call``, which must have run before, and returns the graph's replay.

        ``generators``: those that it draws from, besides torch's own.
        """
        self.wait()
        graph = torch.cuda.CUDAGraph()
        for generator in generators:
            graph.register_generator_state(generator)
        # The default capture mode forbids the loading that a kernel's first launch may do.
        with torch.cuda.graph(graph, capture_error_mode="relaxed"):
            call()
        self.wait()
        return graph.replay

    def seconds(self, call: Call, before: Call) -> float:
        """Device seconds of ``call``; ``before`` is queued ahead of it, so that the GPU is already busy."""
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        before()
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def launches(self, call: Call) -> int | None:
        """Number of kernels, copies and fills in one call; None if the profiler sees none, as without CUPTI."""
        return len(self._on_device(self._events(call))) or None

    def kernel_seconds(self, call: Call) -> float:
        """Total time of the kernels, copies and fills in one call, without the gaps between them."""
        events = self._on_device(self._events(call))
        if not events:
            raise RuntimeError("the profiler has seen nothing of the device: is CUPTI there?")
        return sum(event.time_range.elapsed_us() for event in events) / 1e6

    def host_calls(self, call: Call) -> dict[str, int]:
        """How often the host launches (a graph counts once) and how often it waits for the device, in one call."""
        own, found = (self._host_calls(x) for x in (lambda: None, call))
        if not found["host_launches"]:
            return {}
        return {name: n - own[name] for name, n in found.items()}  # without the profiler's

    def _host_calls(self, call: Call) -> dict[str, int]:
        names = [event.name for event in self._events(call, wait=False)]
        return {
            "host_launches": sum(name.startswith(LAUNCHES) for name in names),
            "host_waits": sum(name in WAITS for name in names),
        }

    def _events(self, call: Call, wait: bool = True) -> list:
        from torch.profiler import ProfilerActivity, profile

        self.wait()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
            call()
            if wait:
                self.wait()
        return list(recorded.events())

    @staticmethod
    def _on_device(events: list) -> list:
        from torch.autograd import DeviceType

        # The profiler marks an optimiser's step on the device's time line too: that is no launch.
        device = [event for event in events if event.device_type == DeviceType.CUDA]
        return [event for event in device if not getattr(event, "is_user_annotation", False)]


class StandIn:
    """A CPU in place of a GPU, to run the CUDA clock's code without one. Its figures mean nothing.

    A graph is the call itself, a launch is an operation that PyTorch dispatches, and nothing waits. With
    ``TRITON_INTERPRET=1`` Triton's kernels, interpreted, compute the learner's operations.
    """

    real, in_a_graph, name, cache_bytes = False, 1, "cpu", 1 << 12

    def __init__(self) -> None:
        if triton.interpreted():
            from peers import kernels

            kernels.interpret()

    def available_bytes(self) -> int:
        return 1 << 30

    def wait(self) -> None:
        pass

    def captured(self, call: Call, generators: Sequence[torch.Generator] = ()) -> Call:
        return call

    def seconds(self, call: Call, before: Call) -> float:
        before()
        return self.kernel_seconds(call)

    def launches(self, call: Call) -> int | None:
        return dispatched(call) or None

    def kernel_seconds(self, call: Call) -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    def host_calls(self, call: Call) -> dict[str, int]:
        return {"host_launches": dispatched(call), "host_waits": 0}
