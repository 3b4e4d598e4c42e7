"""Memory for CPU tensors: a set of tensors in one page-aligned block, on huge pages where Linux offers them.

On 4 KiB pages, a shuffled read of 105 MB misses the TLB at every row, and a scan over planes of 8192 environments
misses it at every step. Rows of 128 bytes not aligned to 128 straddle the pairs of cache lines that processors fetch
together.
"""

from __future__ import annotations

import ctypes
import functools
import math
import mmap
import weakref
from collections.abc import Callable, Collection
from contextlib import suppress

import torch
from torch import Tensor

_HUGE = 2 << 20  # bytes of a huge page; smaller blocks come from malloc
_LINE = 64

Spec = tuple[tuple[int, ...], torch.dtype]


def together(
    specs: Collection[Spec], device: torch.device, take: Callable[[int], mmap.mmap | ctypes.Array] | None = None
) -> list[Tensor]:
    """Uninitialised tensors, one per (shape, dtype), adjacent in one block of memory, each with its own storage.

    ``take`` returns a block of the given number of bytes. On other devices than the CPU, or if the tensors are smaller
    than a huge page together, each is a plain ``torch.empty``.
    """
    total, places = _places(tuple(specs))
    if device.type != "cpu" or total < _HUGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in specs]
    memory = (take or _map)(-(-total // _HUGE) * _HUGE)
    made = []
    for shape, dtype, count, offset in places:
        x = torch.frombuffer(memory, dtype=dtype, count=count, offset=offset) if count else torch.empty(0, dtype=dtype)
        made.append(x if len(shape) == 1 else x.view(shape))
    return made


@functools.lru_cache(64)
def _places(specs: tuple[Spec, ...]) -> tuple[int, list[tuple[tuple[int, ...], torch.dtype, int, int]]]:
    """Bytes of a block, and (shape, dtype, elements, offset) of its tensors."""
    total, places = 0, []
    for shape, dtype in specs:
        count = math.prod(shape)
        places.append((shape, dtype, count, total))
        total += -(-count * dtype.itemsize // _LINE) * _LINE
    return total, places


def _map(nbytes: int) -> mmap.mmap:
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a Linux kernel built without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


class Recycler:
    """Keeps the blocks of :func:`together` for reuse. A block returns when the last tensor of its set is freed.

    Fresh memory costs one page fault per page; for a minibatch, that is more than the gather that fills it. At most
    ``KEPT`` free blocks are held, all of one size: one is filled while the caller may still hold the previous one.
    """

    KEPT = 2

    def __init__(self) -> None:
        self._free: list[mmap.mmap] = []

    def __reduce__(self) -> tuple:  # a copy starts without blocks
        return Recycler, ()

    def empty(self, specs: Collection[Spec], device: torch.device) -> list[Tensor]:
        """Like :func:`together`, from reused blocks."""
        return together(specs, device, self._take)

    def _take(self, nbytes: int) -> ctypes.Array:
        if self._free and len(self._free[0]) != nbytes:
            self._free.clear()
        memory = self._free.pop() if self._free else _map(nbytes)
        # The tensors keep this array alive, and unlike an mmap it can carry a finalizer.
        block = (ctypes.c_char * nbytes).from_buffer(memory)
        weakref.finalize(block, self._give_back, memory).atexit = False
        return block

    def _give_back(self, memory: mmap.mmap) -> None:
        if len(self._free) < self.KEPT and all(len(x) == len(memory) for x in self._free):
            self._free.append(memory)
