"""Shared fixtures. Plain models to compare with: rollout_model.py."""

from __future__ import annotations

import os

import pytest
import torch

import pydrone

CPU_BACKENDS = ("reference", "cpu")


@pytest.fixture(params=CPU_BACKENDS)
def backend(request) -> str:
    """Every backend that runs on CPU tensors without an interpreter; skipped, with the reason, where not built."""
    reason = pydrone.backends()[request.param]
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    return request.param


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """PYDRONE_SHARD=3/8 keeps every eighth case from the fourth on: `make gpu` runs eight processes side by side."""
    if "PYDRONE_SHARD" in os.environ:
        shard, shards = map(int, os.environ["PYDRONE_SHARD"].split("/"))
        items[:] = items[shard::shards]
