"""The vocabulary of a comparison: a contender, its ready run, its result, and a group of results."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

Call = Callable[[], object]


def nothing() -> None:
    """Does nothing."""


class Absent(Exception):
    """A contender, or one of its figures, cannot be measured; the message is the reason."""


class Kernels(NamedTuple):
    """The launches inside a call, to measure device time without the Python around them."""

    hot: list[Call]
    """One launch, whose data stays in the cache when it is repeated."""
    cold: list[Call]
    """Several launches over more memory than the cache holds, or over all of the rollout if that is less."""
    check: Callable[..., None]
    """Given the truth: raises AssertionError unless the launches write what they must."""
    generators: tuple[torch.Generator, ...] = ()
    """As for Graphed."""


class Graphed(NamedTuple):
    """The part of a contender that a CUDA graph captures."""

    call: Call
    before: Call = nothing
    """What the host does before the call and before each replay."""
    check: Call = nothing
    """Raises if a replay so far has gone wrong."""
    generators: tuple[torch.Generator, ...] = ()
    """Besides torch's own, those that the call draws from."""


class Run(NamedTuple):
    """A contender ready to run: memory allocated, inputs in the form that its users have."""

    call: Call
    """The timed call."""
    outputs: Callable[[], dict[str, Tensor]]
    """The last call's outputs, for ``Truth.check``. For minibatches: those of another epoch."""
    laps: list[float] | None = None
    """Seconds of a part of each call (GAE in an iteration), appended by the call; empty on CUDA."""
    launches: Callable[[], int | None] | None = None
    """Returns the number of launches if PyTorch's dispatcher cannot see them; None: unknown."""
    stages: Callable[[], dict[str, float]] | None = None
    """Seconds of the last call by stage, if the contender reports them."""
    graph: Graphed | None = None
    """What a CUDA graph captures, if not just ``call``."""
    kernels: Kernels | None = None


@dataclass
class Contender:
    """One participant of a comparison. ``prepare(rollout)`` allocates and returns a Run, or raises Absent."""

    name: str
    prepare: Callable[..., Run]
    useful_bytes: int = 0
    """Bytes per sample that the operation must read plus those that it must write."""
    storage_bytes: int = 0
    """Approximate bytes that ``prepare`` allocates per sample."""
    against: str = "pydrone"
    """The contender whose time is 1x."""
    capturable: bool = False
    """Whether a CUDA graph can capture the call. If not, device time is the profiler's."""
    on_host: bool = False
    """Whether it computes in NumPy on the host: then on CUDA only whole calls are timed."""


@dataclass
class Result:
    """The measurements of one contender, or why there are none."""

    name: str
    against: str
    useful_bytes: int
    seconds: dict[str, list[float]] = field(default_factory=dict)
    """Seconds of a whole call, one number a turn, by figure: "hot", "cold", "eager"."""
    first_seconds: float = 0.0
    """Seconds of the first call, which counts launches and faults pages in; only used for planning."""
    share: float | None = None
    """The share of ``laps`` in the whole call."""
    counts: dict[str, int | None] = field(default_factory=dict)
    """launches; on CUDA also host_launches and host_waits."""
    device_time: str | None = None
    """The source of CUDA's hot and cold figures: "graph" or "profiler"."""
    stages: dict[str, float] = field(default_factory=dict)
    absent: str | None = None
    wrong: str | None = None
    failed: str | None = None

    def median(self, figure: str) -> float | None:
        return statistics.median(self.seconds[figure]) if self.seconds.get(figure) else None

    def spread(self, figure: str) -> float:
        """The interquartile range."""
        seconds = self.seconds[figure]
        low, _, high = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else seconds * 3
        return high - low

    @property
    def problem(self) -> str | None:
        """Why figures are missing, in one line."""
        for word, reason in (("WRONG", self.wrong), ("FAILED", self.failed), ("absent", self.absent)):
            if reason:
                return f"{word}: {reason}"
        return None


@dataclass
class Comparison:
    """All results of one operation at one size."""

    operation: str
    size: str
    num_envs: int
    num_steps: int
    results: dict[str, Result]
    kind: str = "cpu"
    """The clock's kind."""
    per: int = 1
    """How many operations a call performs: the steps of a rollout, the minibatches of an epoch."""
    cold: str = ""
    """How cold calls were made cold, in words."""
    hot: str = ""
    """Why there are no hot figures."""


def in_a_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:400]
