"""Memory for large CPU tensors: page-aligned, on huge pages where Linux has them.

A shuffled read of 105 MB in 4 KiB pages misses the TLB at every row, and rows of 128 bytes that do not start at a
multiple of that straddle the pairs of cache lines that a processor fetches together.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import weakref
from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor

_LARGE = 8 << 20  # bytes; below that malloc keeps what is freed, and hands it out again without a page fault
_HUGE = 2 << 20
_LINE = 64


def _map(nbytes: int) -> mmap.mmap:
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel built without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """``torch.empty``, or large CPU memory as above (which is zero)."""
    nbytes = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or nbytes < _LARGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype, device=device)
    return torch.frombuffer(_map(nbytes), dtype=dtype).view(shape)


class Recycler:
    """Sets of CPU tensors in blocks of such memory, a block a set, which come back when a set's last tensor is gone.

    Fresh memory costs a page fault a page: more, for a minibatch, than the gather that fills it. ``KEPT`` blocks wait
    at most; a block that is wanted again after the set before the last is there.
    """

    KEPT = 2

    def __init__(self) -> None:
        self._free: list[mmap.mmap] = []

    def empty(self, specs: Sequence[tuple[tuple[int, ...], torch.dtype]], device: torch.device) -> list[Tensor]:
        """A tensor for each (shape, dtype), each with a storage of its own."""
        sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in specs]
        places = [-(-size // _LINE) * _LINE for size in sizes]
        total = sum(places)
        if device.type != "cpu" or total < _HUGE or not hasattr(mmap, "MADV_HUGEPAGE"):
            return [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in specs]
        memory = self._take(-(-total // _HUGE) * _HUGE)
        # The array stands between, because it can be told when it dies; the tensors hold on to it.
        block = (ctypes.c_char * len(memory)).from_buffer(memory)
        weakref.finalize(block, self._give_back, memory).atexit = False
        made, offset = [], 0
        for (shape, dtype), size, place in zip(specs, sizes, places, strict=True):
            count = size // dtype.itemsize
            whole = torch.frombuffer(block, dtype=dtype, count=count, offset=offset) if count else torch.empty(0)
            made.append(whole.to(dtype).view(shape))
            offset += place
        return made

    def _take(self, nbytes: int) -> mmap.mmap:
        for i, memory in enumerate(self._free):
            if len(memory) == nbytes:
                return self._free.pop(i)
        self._free.clear()  # of another size: those are over
        return _map(nbytes)

    def _give_back(self, memory: mmap.mmap) -> None:
        if len(self._free) < self.KEPT:
            self._free.append(memory)
