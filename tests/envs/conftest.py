from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode


class NoSync(TorchDispatchMode):
    """Refuses what would synchronise with a device's host, or have a shape that depends on data."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "unique", "equal"), name
        if name in ("index", "index_put_"):
            assert not any(t is not None and t.dtype == torch.bool for t in args[1]), "indexed by a mask"
        # a tensor made of Python numbers is a copy from the host
        assert name not in ("lift_fresh", "lift_fresh_copy"), name
        return func(*args, **(kwargs or {}))


@pytest.fixture
def no_sync() -> NoSync:
    return NoSync()
