from __future__ import annotations

import pytest
from capture_emulation import refused
from torch.utils._python_dispatch import TorchDispatchMode

from pydrone.ops import native


class NoSync(TorchDispatchMode):
    """Refuses operations that would synchronise host and device, or whose output shape depends on data."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert (reason := refused(func, args)) is None, reason
        return func(*args, **(kwargs or {}))


@pytest.fixture
def no_sync() -> NoSync:
    return NoSync()


@pytest.fixture(params=["native", "pytorch"])
def computed_by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Who computes the steps of tasks on a CPU."""
    if request.param == "native" and native.CPU_MISSING is not None:
        pytest.skip(f"no native library: {native.CPU_MISSING}")
    monkeypatch.setenv("PYDRONE_BACKEND", "reference" if request.param == "pytorch" else "")
    return request.param
