"""Shared fixtures. The reference models are in rollout_model.py."""

from __future__ import annotations

import os

# Before torch loads OpenMP. Threads that spin while they wait take the time of the tests beside them.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch
from hypothesis import HealthCheck, settings
from torch.utils._python_dispatch import TorchDispatchMode

import pydrone

CPU_BACKENDS = ("reference", "cpu")

# Hypothesis draws the same examples in every run; `--hypothesis-profile soak` draws many new ones. Its health checks
# are off because of the function-scoped fixtures: the backend's name, and a seed that no example depends on.
_SETTINGS = {"deadline": None, "suppress_health_check": list(HealthCheck), "database": None}
settings.register_profile("fixed", max_examples=15, derandomize=True, **_SETTINGS)
settings.register_profile("few", max_examples=2, derandomize=True, **_SETTINGS)
settings.register_profile("soak", max_examples=1000, print_blob=True, **_SETTINGS)
settings.load_profile("fixed")


class Seen(TorchDispatchMode):
    """Keeps the names of the operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.names.append(str(operation))
        return operation(*args, **(kwargs or {}))


@pytest.fixture
def seen() -> Seen:
    """The operations that run within ``with seen:``."""
    return Seen()


@pytest.fixture(params=CPU_BACKENDS)
def backend(request) -> str:
    """Every backend that runs on CPU tensors without an interpreter. Skipped, with the reason, if it is not built."""
    reason = pydrone.backends()[request.param]
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    return request.param


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """PYDRONE_SHARD=3/8 keeps every eighth test, from the fourth on: `make gpu` runs eight processes in parallel."""
    if "PYDRONE_SHARD" in os.environ:
        shard, shards = map(int, os.environ["PYDRONE_SHARD"].split("/"))
        items[:] = items[shard::shards]
