"""The CUDA kernels on the CPU: csrc/cuda compiled as C++ with headers that replace CUDA's (cuda_on_cpu.py)."""

from __future__ import annotations

import cuda_on_cpu
import pytest
import torch

from pydrone.ops import dispatch, native
from pydrone.ops.schema import SCHEMAS
from pydrone.rollout import storage


@pytest.fixture(scope="session")
def operations() -> dispatch.Backend:
    """The emulated backend: the operations of torch.ops.pydrone_emulated, with pydrone's schemas."""
    library = torch.library.Library("pydrone_emulated", "DEF")
    for name, schema in SCHEMAS.items():
        native.define(library, name, schema)
        native.fall_back(library, name)
    torch.ops.load_library(str(cuda_on_cpu.build()))
    ops = torch.ops.pydrone_emulated
    yield dispatch.Backend("cuda", True, *(getattr(ops, name).default for name in SCHEMAS))
    del library


@pytest.fixture
def backend(operations, monkeypatch) -> str:
    """Replaces the fixture of tests/conftest.py. Planes are env-major, as on a GPU."""
    monkeypatch.setitem(dispatch._cache, ("cpu", "emulated", None), operations)
    monkeypatch.setattr(storage, "allocate", allocated)
    return "emulated"


def allocated(wanted, device) -> dict[str, torch.Tensor]:
    return {x.name: torch.zeros(x.shape, dtype=x.dtype) for x in wanted}
