"""The contenders: pydrone, code written by hand, and other packages, each run through its own code.

Each module has some of ``gae``, ``append``, ``epoch`` and ``iteration``: functions that take a ``Rollout``, allocate,
and return a ``Run``. Their docstrings say what is timed. Inputs have the form in which the package's own collector
supplies them (shapes, dtypes, containers), and are made before the clock starts.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterable
from types import ModuleType

import torch
from measurement import Absent, Run
from torch import Tensor


def need(name: str) -> ModuleType:
    """Imports a peer; raises Absent if that fails."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Absent(f"cannot be imported ({error})") from None


def exhaust(batches: Iterable[object]) -> None:
    """The timed part of an epoch: makes and drops the minibatches, like a learner that takes no time."""
    for _ in batches:
        pass


def epoch_run(batches: Callable[[], Iterable], fields: Callable[[object], dict[str, Tensor]]) -> Run:
    """A Run of one pass over ``batches()``. ``fields`` names a batch's tensors as ``Truth.check`` does."""

    def outputs() -> dict[str, Tensor]:
        parts = [{name: x.clone() for name, x in fields(batch).items()} for batch in batches()]
        return {"shuffled": True, **{name: torch.cat([part[name] for part in parts]) for name in parts[0]}}

    return Run(lambda: exhaust(batches()), outputs)


class Lap:
    """``with lap:`` appends the block's seconds; nothing on CUDA, where it would have to wait for the device."""

    def __init__(self, device: str) -> None:
        self.seconds: list[float] = []
        self._cuda = torch.device(device).type == "cuda"

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        if not self._cuda:
            self.seconds.append(time.perf_counter() - self._start)
