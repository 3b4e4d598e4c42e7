"""Shared fixtures. Plain models to compare with: rollout_model.py."""

from __future__ import annotations

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
