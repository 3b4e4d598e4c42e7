"""The precision of the networks' matrix products where torch computes them.

On CUDA it is a setting of the whole process. It is set around the policy's products only, and restored.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from pydrone.ops.schema import MATMUL

__all__ = ["MATMUL", "chosen", "forward", "products"]


def chosen(matmul: str | None, device: torch.device) -> str:
    """One of MATMUL. None: the device's default, on CUDA TF32, as Isaac Lab's and mjlab's training scripts set it."""
    if matmul is not None:
        return matmul
    return "tf32" if device.type == "cuda" else "float32"


def products(matmul: str | None, device: torch.device) -> contextlib.AbstractContextManager:
    """In it torch multiplies float32 matrices as ``matmul`` says, in networks and in their derivatives."""
    precision = chosen(matmul, device)
    if device.type != "cuda" or precision == "bfloat16":
        return contextlib.nullcontext()
    return _on_cuda("tf32" if precision == "tf32" else "ieee")


@contextlib.contextmanager
def _on_cuda(precision: str) -> Iterator[None]:
    settings = torch.backends.cuda.matmul, torch.backends.cudnn.rnn
    before = [x.fp32_precision for x in settings]
    try:
        for x in settings:
            x.fp32_precision = precision
        yield
    finally:
        for x, was in zip(settings, before, strict=True):
            x.fp32_precision = was


def forward(matmul: str | None, device: torch.device) -> contextlib.AbstractContextManager:
    """As :func:`products`; with bfloat16 torch's autocast, which must not be around a backward pass."""
    if chosen(matmul, device) == "bfloat16":
        return torch.autocast(device.type, torch.bfloat16)
    return products(matmul, device)
