"""Memory for CPU tensors: sets of them in one block, page-aligned, on huge pages where Linux has them.

In 4 KiB pages a shuffled read of 105 MB misses the TLB at every row, and a scan that steps through planes of 8192
environments at every step. Rows of 128 bytes that do not start at a multiple of that straddle the pairs of cache lines
that a processor fetches together.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress

import torch
from torch import Tensor

_HUGE = 2 << 20  # bytes of a huge page; malloc serves what is smaller
_LINE = 64

Spec = tuple[tuple[int, ...], torch.dtype]


def together(
    specs: Sequence[Spec], device: torch.device, take: Callable[[int], mmap.mmap | ctypes.Array] | None = None
) -> list[Tensor]:
    """A tensor for each (shape, dtype), each with a storage of its own, side by side in a block of memory.

    Not initialised. ``take`` gives a block of so many bytes. Elsewhere than on a CPU, and where all are small,
    ``torch.empty``.
    """
    sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in specs]
    places = [-(-size // _LINE) * _LINE for size in sizes]
    total = sum(places)
    if device.type != "cpu" or total < _HUGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in specs]
    memory = (take or _map)(-(-total // _HUGE) * _HUGE)
    made, offset = [], 0
    for (shape, dtype), size, place in zip(specs, sizes, places, strict=True):
        count = size // dtype.itemsize
        made.append(
            torch.frombuffer(memory, dtype=dtype, count=count, offset=offset).view(shape)
            if count
            else torch.empty(shape, dtype=dtype)
        )
        offset += place
    return made


def _map(nbytes: int) -> mmap.mmap:
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel built without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


class Recycler:
    """Such blocks, one for each set of tensors, that come back when a set's last tensor is gone.

    Fresh memory costs a page fault a page: more, for a minibatch, than the gather that fills it. At most ``KEPT``
    blocks wait, all of one size: one is being filled while the one before may still be held.
    """

    KEPT = 2

    def __init__(self) -> None:
        self._free: list[mmap.mmap] = []

    def __reduce__(self) -> tuple:  # a copy has blocks of its own
        return Recycler, ()

    def empty(self, specs: Sequence[Spec], device: torch.device) -> list[Tensor]:
        """As :func:`together`."""
        return together(specs, device, self._take)

    def _take(self, nbytes: int) -> ctypes.Array:
        if self._free and len(self._free[0]) != nbytes:
            self._free.clear()
        memory = self._free.pop() if self._free else _map(nbytes)
        # The array stands between, because it can be told when it dies; the tensors hold on to it.
        block = (ctypes.c_char * nbytes).from_buffer(memory)
        weakref.finalize(block, self._give_back, memory).atexit = False
        return block

    def _give_back(self, memory: mmap.mmap) -> None:
        if len(self._free) < self.KEPT and all(len(x) == len(memory) for x in self._free):
            self._free.append(memory)
