"""What a session measures: each comparison once, when its first case asks for it; results are kept for the report."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from clock import Clock
from contenders import KERNELS, PER, contenders
from harness import Harness
from measurement import Comparison
from peers.kernels import Agreement
from peers.train import Setting, Sound
from workload import GPU_SCAN_SIZES, SIZES, Rollout, Size, Truth

# The sizes of a training iteration; at larger ones the simulator takes most of the time.
TRAINING_SIZES = {"cpu": [(1024, 100)], "cuda": [(8192, 100)]}
# Small: kernels take less than calls.
CALL_SIZES = [(256, 16)]
SWEEP_SIZES = [
    *((n, 100) for n in (256, 1024, 4096, 16384)),
    *((1024, t) for t in (12, 48, 192, 768)),
]
TRAININGS = ("update", "training", "training on Genesis")
SWEPT = ("gae", "append", "minibatch epoch")
# Seconds of timed turns for each comparison.
BUDGET = {
    "gae": 4.0,
    "append": 3.0,
    "minibatch epoch": 4.0,
    "iteration": 6.0,
    "calls": 3.0,
    **dict.fromkeys(KERNELS, 3.0),
    "update": 20.0,
    "training": 20.0,
    "training on Genesis": 20.0,
    "sweep": 0.6,
}
# On a CPU hot and cold are whole calls. An iteration's memory leaves every cache before it is used again.
FIGURES = {
    "cpu": {**dict.fromkeys(("gae", "append", "minibatch epoch"), ("hot", "cold")), "calls": ("hot",)},
    "cuda": {
        **dict.fromkeys(("gae", "append", "minibatch epoch"), ("hot", "cold", "eager")),
        "iteration": ("cold", "eager"),
        "calls": ("eager",),
        # What a graph's replays repeat on the same memory: larger than the cache, or in it as in a training.
        **dict.fromkeys(KERNELS, ("cold", "eager")),
        # Thousands of launches, most of them the simulator's or autograd's: only whole calls and counts.
        "update": ("eager",),
        "training": ("eager",),
        "training on Genesis": ("eager",),
    },
}


def parse_size(text: str) -> Size:
    num_envs, num_steps = text.split("x")
    return Size(int(num_envs), int(num_steps))


def figures(operation: str, kind: str) -> tuple[str, ...]:
    return FIGURES[kind].get(operation, ("cold",))


@dataclass(frozen=True)
class Case:
    """One line of a comparison."""

    operation: str
    size: Size
    figure: str
    contender: str

    @property
    def group(self) -> str:
        return f"{self.operation}, {self.size}, {self.figure}"

    def __str__(self) -> str:
        return "-".join((str(self.size), self.figure, self.contender.replace(" ", "_")))


def sizes(operation: str, kind: str, chosen: list[Size] | None) -> list[Size]:
    if chosen:
        return chosen
    if operation.startswith("sweep"):
        found = SWEEP_SIZES
    elif operation in (*KERNELS, *TRAININGS):
        found = TRAINING_SIZES[kind]
    elif operation == "calls":
        found = CALL_SIZES
    elif kind == "cuda":
        found = GPU_SCAN_SIZES if operation == "gae" else SIZES[:1]  # the sweep has others
    else:
        found = SIZES
    return [Size(*size) for size in found]


class Suite:
    """Measures on demand. ``scale`` multiplies BUDGET. ``limit``: seconds after which no comparison starts.

    ``keep`` is called after each comparison, with all so far.
    """

    def __init__(self, clock: Clock, scale: float = 1.0, limit: float | None = None) -> None:
        self.clock, self.scale = clock, scale
        self.until = None if limit is None else time.monotonic() + limit
        self.keep: Callable[[list[Comparison]], None] = lambda comparisons: None
        self.harness = Harness(clock)
        self.comparisons: dict[tuple[str, Size], Comparison] = {}
        #: comparisons of an earlier run, as its report has them, which are not measured again
        self.before: list[dict[str, Any]] = []
        self._made: tuple[tuple, Rollout, Truth] | None = None

    def cases(self, operation: str, chosen: list[Size] | None) -> list[Case]:
        """All cases of an operation, those of a comparison side by side."""
        names, kind = [c.name for c in contenders(operation, self.clock)], self.clock.kind
        found = sizes(operation, kind, chosen)
        return [Case(operation, s, f, n) for s in found for f in figures(operation, kind) for n in names]

    def comparison(self, operation: str, size: Size) -> Comparison | None:
        """The comparison, measured now or before; None if the time is up, or an earlier run has it."""
        if self.is_known(operation, size):
            return None
        key, name = (operation, size), operation.removeprefix("sweep: ")
        if key not in self.comparisons:
            if self.until is not None and time.monotonic() > self.until:
                return None
            rollout, truth = self._inputs(name, size)
            self.comparisons[key] = self.harness.compare(
                operation,
                rollout,
                truth,
                contenders(operation, self.clock),
                figures(operation, self.clock.kind),
                self.scale * BUDGET[operation.split(":")[0]],
                PER[name](size) if name in PER else 1,
            )
            self.keep(list(self.comparisons.values()))
        return self.comparisons[key]

    def is_known(self, operation: str, size: Size) -> bool:
        """Whether an earlier run has measured it."""
        return any((x["operation"], x["num_envs"], x["num_steps"]) == (operation, *size) for x in self.before)

    def _inputs(self, operation: str, size: Size):  # type: ignore[no-untyped-def]
        if operation in (*KERNELS, *TRAININGS):
            return Setting(size, self.clock.device), Sound() if operation in TRAININGS else Agreement()
        key = (operation == "gae", size)
        if self._made is None or self._made[0] != key:
            self._made = None
            rollout = Rollout(size, self.clock.device, everything=operation != "gae")
            self._made = (key, rollout, Truth(rollout))
        return self._made[1:]
