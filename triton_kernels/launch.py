"""Shared by the kernels and launchers: schema constants as constexpr, element types, the current device, the ticket."""

from __future__ import annotations

import contextlib
import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from pydrone.ops import schema

RUNNING = tl.constexpr(schema.RUNNING)
TERMINATED = tl.constexpr(schema.TERMINATED)
TRUNCATED = tl.constexpr(schema.TRUNCATED)
INVALID = tl.constexpr(schema.INVALID)

CURSOR_APPENDED = tl.constexpr(schema.CURSOR_APPENDED)
CURSOR_DISCARDED = tl.constexpr(schema.CURSOR_DISCARDED)
CURSOR_FLAG = tl.constexpr(schema.CURSOR_FLAG)
CURSOR_TICKET = tl.constexpr(schema.CURSOR_TICKET)
CURSOR_NUM_STEPS = tl.constexpr(schema.CURSOR_NUM_STEPS)

# The kernels store a bool themselves, as a byte 0 or 1.
TRITON_TYPES = {
    torch.uint8: tl.uint8,
    torch.int8: tl.int8,
    torch.int16: tl.int16,
    torch.int32: tl.int32,
    torch.int64: tl.int64,
    torch.float16: tl.float16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bool: tl.int1,
    torch.bfloat16: tl.bfloat16,
    torch.uint16: tl.uint16,
    torch.uint32: tl.uint32,
    torch.uint64: tl.uint64,
}


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Makes the tensor's device current, if it is not, since Triton launches on the current device."""
    if not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.device)


@functools.lru_cache
def generation(device: torch.device) -> int:
    """The major compute capability; 0 where kernels are interpreted."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0


def power_of_2(number: int, least: int, most: int) -> int:
    """The next power of two, clamped to [least, most]."""
    return min(max(triton.next_power_of_2(number), least), most)


@triton.jit
def clamp(x, low, high):
    """``x`` within [low, high]. By selects, which keep a NaN: compiled tl.minimum, tl.maximum and tl.clamp drop it."""
    return tl.where(x > high, high, tl.where(x < low, low, x))


@triton.jit
def encode(done, truncated, valid):
    """Converts flags (booleans; the last two may be None) to codes."""
    code = tl.where(done, TERMINATED, RUNNING)
    if truncated is not None:
        code = tl.where(truncated, TRUNCATED, code)
    if valid is not None:
        code = tl.where(valid, code, INVALID)
    return code


@triton.jit
def take_ticket(ticket):
    """Adds one and returns the old value. All earlier reads and writes of the program are complete by then, and all
    writes of programs with smaller tickets are visible."""
    tl.debug_barrier()
    old = tl.atomic_add(ticket, 1, sem="acq_rel", scope="gpu")
    tl.debug_barrier()
    return old
