"""What a session measures: comparisons, each once and when its first case asks for it, kept for the report."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from contenders import contenders
from harness import Comparison, Harness
from peers.train import Setting, Sound
from workload import SIZES, Rollout, Size, Truth

# What a training iteration is measured at; a simulator takes the rest of the time at larger ones.
TRAINING_SIZES = {"cpu": [(1024, 100)], "cuda": [(8192, 100)]}
SWEEP_SIZES = [
    *((n, 100) for n in (256, 1024, 4096, 16384)),
    *((1024, t) for t in (12, 48, 192, 768)),
]
SWEPT = ("gae", "append", "minibatch epoch")
# Seconds of timed turns, a comparison.
BUDGET = {
    "gae": 4.0,
    "append": 3.0,
    "minibatch epoch": 4.0,
    "iteration": 6.0,
    "update": 20.0,
    "training": 20.0,
    "sweep": 0.6,
}
# An iteration's memory leaves every cache before it is used again.
CACHES = {"gae": ("hot", "cold"), "append": ("hot", "cold"), "minibatch epoch": ("hot", "cold")}


def parse_size(text: str) -> Size:
    num_envs, num_steps = text.split("x")
    return Size(int(num_envs), int(num_steps))


@dataclass(frozen=True)
class Case:
    """One line of a comparison."""

    operation: str
    size: Size
    cache: str
    contender: str

    @property
    def group(self) -> str:
        return f"{self.operation}, {self.size}, {self.cache}"

    def __str__(self) -> str:
        return "-".join((str(self.size), self.cache, self.contender.replace(" ", "_")))


def sizes(operation: str, device: str, chosen: list[Size] | None) -> list[Size]:
    if operation.startswith("sweep"):
        return [Size(*size) for size in SWEEP_SIZES]
    if operation in ("update", "training"):
        return [Size(*size) for size in TRAINING_SIZES[torch.device(device).type]]
    return chosen or [Size(*size) for size in SIZES]


def cases(operation: str, device: str, chosen: list[Size] | None) -> list[Case]:
    """All cases of an operation, a comparison's next to each other."""
    names = [c.name for c in contenders(operation)]
    found = sizes(operation, device, chosen)
    return [Case(operation, s, c, n) for s in found for c in CACHES.get(operation, ("cold",)) for n in names]


class Suite:
    """Measures on demand. ``scale`` multiplies BUDGET."""

    def __init__(self, device: str, scale: float) -> None:
        self.device, self.scale = device, scale
        self.harness = Harness(device)
        self.comparisons: dict[tuple[str, Size], Comparison] = {}
        self._made: tuple[tuple, Rollout, Truth] | None = None

    def comparison(self, operation: str, size: Size) -> Comparison:
        key = (operation, size)
        if key not in self.comparisons:
            rollout, truth = self._inputs(operation.removeprefix("sweep: "), size)
            budget = self.scale * BUDGET[operation.split(":")[0]]
            caches = CACHES.get(operation, ("cold",))
            found = self.harness.compare(operation, rollout, truth, contenders(operation), caches, budget)
            self.comparisons[key] = found
        return self.comparisons[key]

    def _inputs(self, operation: str, size: Size):  # type: ignore[no-untyped-def]
        if operation in ("update", "training"):
            return Setting(size, self.device), Sound()
        key = (operation == "gae", size)
        if self._made is None or self._made[0] != key:
            self._made = None
            rollout = Rollout(size, self.device, everything=operation != "gae")
            self._made = (key, rollout, Truth(rollout))
        return self._made[1:]
