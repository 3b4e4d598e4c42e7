from __future__ import annotations

import pytest
from capture_emulation import refused
from torch.utils._python_dispatch import TorchDispatchMode


class NoSync(TorchDispatchMode):
    """Refuses operations that would synchronise host and device, or whose output shape depends on data."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert (reason := refused(func, args)) is None, reason
        return func(*args, **(kwargs or {}))


@pytest.fixture
def no_sync() -> NoSync:
    return NoSync()
