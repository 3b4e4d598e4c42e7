"""Tests on a GPU: the CPU suite's tests on the GPU backends, and tests of GPU features. Skipped without a GPU."""

from __future__ import annotations

import pytest
import torch
from torch.overrides import TorchFunctionMode

import pydrone
from pydrone import RolloutBuffer

GPU_BACKENDS = ("cuda", "triton")
FACTORIES = {
    *(torch.empty, torch.zeros, torch.ones, torch.full, torch.tensor, torch.as_tensor, torch.arange, torch.eye),
    *(torch.linspace, torch.rand, torch.randn, torch.randint, torch.randperm, torch.empty_strided),
}


class OnTheGPU(TorchFunctionMode):
    """Tensors that a test creates without naming a device lie on the GPU, with the same numbers as on the CPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.Tensor.numpy:
            return args[0].cpu().numpy(**kwargs)
        if func not in FACTORIES or kwargs.get("device") is not None:
            return func(*args, **kwargs)
        made = func(*args, **kwargs)
        return made.detach().cuda().requires_grad_(made.requires_grad)


@pytest.fixture(params=GPU_BACKENDS)
def backend(request, monkeypatch):
    """Replaces the fixture of tests/conftest.py: the GPU backends, with tensors and buffers on the GPU."""
    reason = pydrone.backends()[request.param]
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    device, *others = RolloutBuffer.__init__.__defaults__
    assert device == "cpu"
    monkeypatch.setattr(RolloutBuffer.__init__, "__defaults__", ("cuda", *others))
    with OnTheGPU():
        yield request.param
