"""Emulates torch.cuda.graph on a CPU: records operations while Python runs and replays them on the same memory.

A capture has no effect: written memory and the generators are restored. An operation that would make the host wait
for the device is an error, as in a real capture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pydrone.ppo.training import graphs
from pydrone.rollout.scan import Scan

# Names of operator packets. multinomial reads the sum of the probabilities.
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "unique", "equal", "multinomial"}


def refused(func: torch._ops.OpOverload, args: tuple) -> str | None:
    """Why a capture refuses the operation: a wait for the device or a copy from host memory; None if it does not."""
    name = func.overloadpacket.__name__
    if name in WAITS:
        return f"{name} waits for the device"
    if name in ("index", "index_put_") and any(x is not None and x.dtype == torch.bool for x in args[1]):
        return f"{name} by a mask waits for the device"
    if name in ("lift_fresh", "lift_fresh_copy"):
        return f"{name}: a tensor made of Python numbers is a copy from the host"
    return None


class Recorder(TorchDispatchMode):
    """Records each operation with its arguments and results."""

    def __init__(self, generators: list[torch.Generator]) -> None:
        super().__init__()
        self.generators = [torch.default_generator, *generators]
        self.operations: list[tuple[Callable, tuple, dict, Any]] = []
        self.before: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def __enter__(self) -> Recorder:
        self.states = [x.get_state() for x in self.generators]
        return super().__enter__()

    def __exit__(self, *reason: object) -> None:
        super().__exit__(*reason)
        for memory, was in reversed(self.before.values()):
            memory.copy_(was)
        for generator, state in zip(self.generators, self.states, strict=True):
            generator.set_state(state)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if (reason := refused(func, args)) is not None:
            raise RuntimeError(reason)
        for x in written(func, args, kwargs):
            storage = x.untyped_storage()
            # views that another library has made of one allocation are storages that begin alike and overlap
            place = storage.data_ptr(), storage.nbytes()
            if place not in self.before:
                memory = torch.empty(0, dtype=torch.uint8).set_(storage)
                self.before[place] = memory, memory.clone()
        result = func(*args, **kwargs)
        self.operations.append((func, args, kwargs, result))
        return result

    def replay(self) -> None:
        for func, args, kwargs, result in self.operations:
            again = func(*args, **kwargs)
            for old, new in zip(tensors(result), tensors(again), strict=True):
                if old.data_ptr() != new.data_ptr():  # else a view, or written in place
                    old.detach().copy_(new)


def tensors(x: object) -> Iterator[Tensor]:
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, (list, tuple)):
        for y in x:
            yield from tensors(y)


def written(func: torch._ops.OpOverload, args: tuple, kwargs: dict) -> Iterator[Tensor]:
    for i, argument in enumerate(func._schema.arguments):
        if argument.is_write:
            yield from tensors(args[i] if i < len(args) else kwargs.get(argument.name))


def capture(
    run: Callable[[], None], generators: Sequence[torch.Generator], stream: None, env: object = None
) -> Callable[[], None]:
    """Replaces pydrone.ppo.training.graphs.capture."""
    recorder = Recorder(list(generators))
    with graphs.outside(env, lambda call: recorder.operations.append((call, (), {}, None))), recorder:
        run()
    return torch.no_grad()(recorder.replay)


def emulate(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Captures as if the CPU had graphs. Returns what is captured."""
    seen, evaluate = [], Scan._evaluate

    def of_the_whole_pool(self, *arguments):
        """A CPU values the rows in use, whose number it knows; CUDA all of them, and products of other sizes round
        otherwise."""
        with self._ring.as_captured():
            return evaluate(self, *arguments)

    def recorded(run, *arguments):
        seen.append(run.__name__)
        return capture(run, *arguments)

    monkeypatch.setattr(Scan, "_evaluate", of_the_whole_pool)
    monkeypatch.setattr(graphs, "side_stream", lambda device: None)
    monkeypatch.setattr(graphs, "aside", lambda run, stream: run())
    monkeypatch.setattr(graphs, "waiting", lambda call: call())
    monkeypatch.setattr(graphs, "capture", recorded)
    return seen
