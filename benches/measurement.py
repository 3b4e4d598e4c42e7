"""The vocabulary of a comparison: a contender, its ready run, its result, and a group of results."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

Call = Callable[[], object]


class Absent(Exception):
    """A contender, or one of its figures, cannot be measured; the reason."""


class Kernels(NamedTuple):
    """The launches inside a call, for device time: they are repeated without the Python around them."""

    hot: list[Call]
    """One, on data that stays in the cache as it is repeated."""
    cold: list[Call]
    """Several, over more memory than the cache holds, or over all of the rollout where that is less."""
    check: Callable[..., None]
    """Given the truth: raises AssertionError unless the launches write what they must."""


class Graphed(NamedTuple):
    """What a CUDA graph captures of a contender."""

    call: Call
    before: Call = lambda: None
    """What the host does before the call and before each replay."""
    check: Call = lambda: None
    """Raises where the replays so far have gone wrong."""


class Run(NamedTuple):
    """One contender, ready: its memory allocated, its inputs in the form in which its own user would have them."""

    call: Call
    """What is timed."""
    outputs: Callable[[], dict[str, Tensor]]
    """What the last call gave, for ``Truth.check``. An epoch of minibatches reads another one."""
    laps: list[float] | None = None
    """Seconds that a part of each call took (GAE's in an iteration), appended by the call; empty on CUDA."""
    launches: Callable[[], int | None] | None = None
    """Returns their number, where PyTorch's dispatcher does not see them; None: unknown."""
    stages: Callable[[], dict[str, float]] | None = None
    """Seconds of the last call by its parts, where the contender reports them."""
    graph: Graphed | None = None
    """What a CUDA graph captures, where that is not just ``call``."""
    kernels: Kernels | None = None


@dataclass
class Contender:
    """Who takes part. ``prepare(rollout)`` allocates and returns a Run, or raises Absent."""

    name: str
    prepare: Callable[..., Run]
    useful_bytes: int = 0
    """Bytes of a sample that the operation must read plus those that it must write."""
    storage_bytes: int = 0
    """About what ``prepare`` allocates for a sample."""
    against: str = "pydrone"
    """The contender whose time is 1x."""
    capturable: bool = False
    """Whether a CUDA graph may hold the call. If not, device time is the profiler's."""
    on_host: bool = False
    """It computes in NumPy on the host: on CUDA only whole calls are timed."""


@dataclass
class Result:
    """What was measured of one contender, or why nothing was."""

    name: str
    against: str
    useful_bytes: int
    seconds: dict[str, list[float]] = field(default_factory=dict)
    """Of a whole call, a turn each, by figure: "hot", "cold", "eager"."""
    first_seconds: float = 0.0
    """Of the first call, in which launches are counted and pages are faulted in; only to plan with."""
    share: float | None = None
    """Of ``laps`` in the whole call."""
    counts: dict[str, int | None] = field(default_factory=dict)
    """launches; on CUDA also host_launches and host_waits."""
    device_time: str | None = None
    """Where CUDA's hot and cold come from: "graph" or "profiler"."""
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
        """In a line, why it has no figures or not all of them."""
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
    """Of the clock."""
    per: int = 1
    """How many of the operation a call does: the steps of a rollout, the minibatches of an epoch."""
    cold: str = ""
    """In words, how cold was cold."""
    hot: str = ""
    """Why there are no hot figures."""


def in_a_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:400]
