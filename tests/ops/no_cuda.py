"""Triton's launches without a GPU: its own CUDA driver on a libcuda that launches nothing.

``install()`` sets the driver. Kernels are compiled for compute capability 9.0, and Triton binds, specialises and packs
arguments by its own code up to cuLaunchKernelEx, which keeps what it was given. Tensors are on the CPU.
"""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path
from typing import NamedTuple

MOST = 256  # arguments of a kernel

SOURCE = r"""
#include <string.h>
typedef unsigned long long u64;
long launches, pointers_checked;
int sizes[256], num_arguments;
unsigned grid[3];
u64 function, stream, arguments[256];
int cuGetErrorString(int e, const char** s) { *s = "no error was asked for"; return 0; }
int cuCtxGetCurrent(void** c) { *c = (void*)1; return 0; }
int cuCtxSetCurrent(void* c) { return 0; }
int cuCtxGetLimit(u64* x, int l) { *x = 0; return 0; }
int cuCtxSetLimit(int l, u64 x) { return 0; }
int cuDeviceGet(int* d, int i) { *d = i; return 0; }
int cuDeviceGetAttribute(int* x, int a, int d) { *x = 232448; return 0; }
int cuDevicePrimaryCtxRetain(void** c, int d) { *c = (void*)1; return 0; }
int cuDriverGetVersion(int* v) { *v = 13000; return 0; }
int cuFuncGetAttribute(int* x, int a, void* f) { *x = a == 0 ? 1024 : 0; return 0; }
int cuFuncSetAttribute(void* f, int a, int x) { return 0; }
int cuFuncSetCacheConfig(void* f, int x) { return 0; }
int cuModuleLoadData(void** m, const void* d) { static u64 n; *m = (void*)++n; return 0; }
int cuModuleGetFunction(void** f, void* m, const char* n) { *f = m; return 0; }
int cuPointerGetAttribute(void* out, int a, u64 p) { ++pointers_checked; *(u64*)out = p; return 0; }
int cuOccupancyMaxActiveClusters(int* n, void* f, const void* c) { *n = 1; return 0; }
int cuTensorMapEncodeTiled(void) { return 0; }
int cuTensorMapEncodeIm2col(void) { return 0; }
struct config { unsigned grid[3], block[3], shared; void* stream; };
int cuLaunchKernelEx(const struct config* c, void* f, void** given, void** extra) {
  ++launches;
  memcpy(grid, c->grid, sizeof(grid));
  function = (u64)f, stream = (u64)c->stream;
  for (int i = 0; i < num_arguments; ++i) arguments[i] = 0, memcpy(arguments + i, given[i], sizes[i]);
  return 0;
}
"""
SIZES = {"i1": 1, "u1": 1, "i8": 1, "u8": 1, "i16": 2, "u16": 2, "fp16": 2, "bf16": 2, "i32": 4, "u32": 4, "fp32": 4}


class Launch(NamedTuple):
    function: int
    grid: tuple[int, ...]
    stream: int
    arguments: tuple[int, ...]


class Stub:
    """The libcuda."""

    def __init__(self, folder: Path) -> None:
        (folder / "stub.c").write_text(SOURCE)
        command = ["cc", "-O1", "-w", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "stub.c", "-o", "libcuda.so.1"]
        subprocess.run(command, cwd=folder, check=True)
        self._library = ctypes.CDLL(str(folder / "libcuda.so.1"), mode=ctypes.RTLD_GLOBAL)
        self.types: list[str] = []

    def __getattr__(self, name: str) -> int:
        return ctypes.c_long.in_dll(self._library, name).value

    def expect(self, types: list[str]) -> None:
        """The types of the next launch's arguments."""
        sizes = (ctypes.c_int * MOST).in_dll(self._library, "sizes")
        sizes[: len(types)] = [SIZES.get(x, 8) for x in types]
        ctypes.c_int.in_dll(self._library, "num_arguments").value = len(types)
        self.types = types

    def last(self) -> Launch:
        def of(kind: type, name: str):  # type: ignore[no-untyped-def]
            return kind.in_dll(self._library, name)

        grid, given = of(ctypes.c_uint * 3, "grid"), of(ctypes.c_ulonglong * MOST, "arguments")
        numbers = (of(ctypes.c_ulonglong, name).value for name in ("function", "stream"))
        function, stream = numbers
        return Launch(function, tuple(grid), stream, tuple(given[: len(self.types)]))


def install(folder: Path, capability: int = 90, stream: int = 7) -> Stub:
    """Makes the stub Triton's driver, for this process. ``folder``: for its library."""
    stub = Stub(folder)
    from triton import knobs
    from triton.backends.nvidia import driver as nvidia
    from triton.runtime import driver

    knobs.nvidia.libcuda_path = str(folder)

    class Driver(nvidia.CudaDriver):
        def __init__(self) -> None:
            super().__init__()
            self.device = 0
            self.get_device_capability = lambda device=None: divmod(capability, 10)
            self.get_current_device = lambda: self.device
            self.get_current_stream = lambda device: stream

    driver.set_active(Driver())
    return stub
