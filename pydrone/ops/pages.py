"""Memory for large CPU tensors: page-aligned, on huge pages where Linux has them.

A shuffled read of 105 MB in 4 KiB pages misses the TLB at every row, and rows of 128 bytes that do not start at a
multiple of that straddle the pairs of cache lines that a processor fetches together.
"""

from __future__ import annotations

import math
import mmap
from contextlib import suppress

import torch
from torch import Tensor

_LARGE = 8 << 20  # bytes; below that malloc keeps what is freed, and hands it out again without a page fault


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """``torch.empty``, or large CPU memory as above (which is zero)."""
    nbytes = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or nbytes < _LARGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel built without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)
