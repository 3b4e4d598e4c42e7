"""The CUDA sources compile for GPUs that need not be there, against whatever build of torch is installed; what their
machine code holds is read with cuobjdump, the toolkit's or Triton's."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
FLAGS = ["-std=c++20", "-O3", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000", "-DTORCH_STABLE_ONLY"]

# Kernel: registers of a thread, bytes of shared memory, barriers. A multiprocessor has 65,536 registers and a block of
# most kernels 256 threads, so 64 registers let four of them be there at once, 80 three and 128 two.
BUDGET = {
    # 8192 environments in blocks of 16 are 512: one wave on 132 multiprocessors, if four fit. Shared memory: what the
    # warps leave for the statistics, 24 bytes a row. Barriers: theirs and the ticket's.
    "gae_rows float wide": (64, 392, 4),
    "gae_rows float direct": (80, 392, 4),  # with a cursor: wide and narrow accesses in one body, three blocks
    "gae_rows float generic": (128, 392, 4),  # dtypes told apart at each element
    "gae_rows double wide": (128, 392, 4),
    "gae_rows double direct": (128, 392, 4),
    "gae_rows double generic": (128, 392, 4),
    # 34 steps of rewards, values and codes in flight (float64: 17). 8192 threads are 62 to a multiprocessor: registers
    # do not bound them.
    "gae_columns float direct": (255, 56, 4),
    "gae_columns float generic": (80, 56, 4),
    "gae_columns double direct": (255, 56, 4),
    "gae_columns double generic": (80, 56, 4),
    "append_step": (80, 1, 2),  # the ticket's
    # 128 addresses of rows; the rows themselves, 128 x 304 bytes at most, are asked for at launch. One barrier after
    # the addresses, one after the rows.
    "gather_rows direct": (64, 1024, 1),
    "gather_rows staged": (64, 1024, 2),
}
# 64 and 80 registers are kept to by sparing one or two for a while, off the path of the loads: (kernel, rows of a
# warp, architecture) to bytes of stack. Nothing else may have any.
SPARED = {
    ("gae_rows float direct", 2, 100): 8,
    ("gae_rows float wide", 1, 120): 16,
    ("gae_rows float wide", 2, 120): 8,
}
# From 9.0 on the compiler reserves a kibibyte of shared memory a block for itself.
RESERVED = 1024
KERNELS = {"gae": 16, "append": 1, "gather": 2}

OPCODE = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", re.MULTILINE)
KERNEL = re.compile(r"(append_step|gather_rows|gae_rows|gae_columns)(?:I([fd]?)(?:Lb([01])E)?(?:LN\w+?ModeE(\d)E)?)?")


def find_cuobjdump() -> str | None:
    triton = find_spec("triton")
    shipped = Path(triton.origin).parent / "backends" / "nvidia" / "bin" if triton else ROOT
    return shutil.which("cuobjdump") or shutil.which("cuobjdump", path=str(shipped))


CUOBJDUMP = find_cuobjdump()

pytestmark = [
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc not found"),
    pytest.mark.skipif(CUOBJDUMP is None, reason="cuobjdump not found, neither on PATH nor in triton"),
    pytest.mark.skipif(not (ROOT / "csrc" / "cuda").is_dir(), reason="csrc/cuda is not in this source tree"),
]


class Kernel:
    """One kernel's machine code for one architecture."""

    def __init__(self, symbol: str, architecture: int, usage: str, code: str) -> None:
        kind, dtype, flag, mode = KERNEL.search(symbol).groups()
        dtype = {"f": " float", "d": " double"}.get(dtype, "")
        if kind == "gather_rows":
            variant = (" direct", " staged")[int(flag)]
        else:
            variant = "" if kind == "append_step" else (" generic", " direct", " wide")[int(mode or flag)]
        self.name, self.architecture = kind + dtype + variant, architecture
        numbers = dict(re.findall(r"(\w+):(\d+)", usage))
        self.registers, self.stack = int(numbers["REG"]), int(numbers["STACK"]) + int(numbers["LOCAL"])
        self.shared = int(numbers["SHARED"]) - (RESERVED if architecture >= 90 else 0)
        self.rows = int(re.search(r"Li(\d+)E", symbol)[1]) if kind == "gae_rows" else 1  # of a warp
        self.opcodes = Counter(OPCODE.findall(code))

    def __repr__(self) -> str:
        return f"{self.name}, {self.rows} rows, sm_{self.architecture}"

    def count(self, *prefixes: str) -> int:
        return sum(number for opcode, number in self.opcodes.items() if opcode.startswith(prefixes))


def by_function(listing: str, heading: str) -> dict[tuple[int, str], str]:
    """{(architecture, symbol): its part} of what cuobjdump prints of an object with code for several architectures."""
    found = {}
    for part in re.split(r"^arch = sm_", listing, flags=re.MULTILINE)[1:]:
        for function in re.split(heading, part, flags=re.MULTILINE)[1:]:
            symbol, _, body = function.partition("\n")
            found[int(re.match(r"\d+", part)[0]), symbol.rstrip(":")] = body
    return found


def compiled(name: str, architectures: tuple[int, ...], folder: Path) -> list[Kernel]:
    """In one call of nvcc, which reads the sources' headers once for every architecture all the same."""
    target, source = folder / f"{name}.o", ROOT / "csrc" / "cuda" / f"{name}.cu"
    codes = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in architectures]
    include = Path(torch.__path__[0], "include")
    command = ["nvcc", *FLAGS, "--threads", "0", *codes, f"-I{include}", "-c", str(source), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    def dump(option: str) -> str:
        return subprocess.run([CUOBJDUMP, option, str(target)], capture_output=True, text=True, check=True).stdout

    usage = by_function(dump("--dump-resource-usage"), r"^ Function ")
    code = by_function(dump("-sass"), r"^\s*Function : ")
    assert usage.keys() == code.keys()
    return [Kernel(symbol, number, usage[number, symbol], code[number, symbol]) for number, symbol in usage]


@pytest.fixture(scope="module", params=[(80, 90), pytest.param((86, 89, 100, 120), marks=pytest.mark.slow)], ids=str)
def kernels(request, tmp_path_factory) -> list[Kernel]:
    known = subprocess.run(["nvcc", "--list-gpu-code"], capture_output=True, text=True).stdout.split()
    architectures = tuple(number for number in request.param if f"sm_{number}" in known)
    assert 90 in architectures or 90 not in request.param
    folder = tmp_path_factory.mktemp("cuda")
    found = [kernel for name in KERNELS for kernel in compiled(name, architectures, folder)]
    assert len(found) == sum(KERNELS.values()) * len(architectures)
    assert {kernel.name for kernel in found} == BUDGET.keys()
    return found


def of(kernels: list[Kernel], name: str) -> list[Kernel]:
    found = [kernel for kernel in kernels if kernel.name == name]
    assert found, name
    return found


def test_nothing_is_spilled(kernels):
    for kernel in kernels:
        spared = SPARED.get((kernel.name, kernel.rows, kernel.architecture), 0)
        assert kernel.stack <= spared, kernel
        assert kernel.count("LDL", "STL") <= spared // 2, kernel


def test_registers_shared_memory_and_barriers_are_within_budget(kernels):
    for kernel in kernels:
        registers, shared, barriers = BUDGET[kernel.name]
        assert kernel.registers <= registers, kernel
        assert kernel.shared <= shared, kernel
        assert kernel.count("BAR") <= barriers, kernel


@pytest.mark.parametrize("dtype", ["float", "double"])
def test_gae_rows_are_read_and_written_in_128_bits(kernels, dtype):
    """Rewards and values in, advantages and returns out: four steps of a lane, 16 bytes of float and 32 of double."""
    for kernel in of(kernels, f"gae_rows {dtype} wide") + of(kernels, f"gae_rows {dtype} direct"):
        wide = 2 * kernel.rows * (2 if dtype == "double" else 1)
        assert kernel.count("LDG.E.128") == kernel.count("STG.E.128") == wide, kernel
    for kernel in of(kernels, f"gae_rows {dtype} wide"):
        assert kernel.count("LDG.E.U8") == 0, f"{kernel}: codes are one 32-bit load"


def test_gae_rows_scan_without_barrier_or_shared_memory(kernels):
    for kernel in of(kernels, "gae_rows float wide"):
        # Per row: value and run of the next lane, five steps of the scan, carry and value out, two sums of five.
        own = kernel.rows * (1 + 5 + 1 + 2 + 10)
        # The block's statistics and the launch's are float64, of two registers: a mean and three sums, over 8 warps'
        # rows, then a warp's lanes, then 8 warps. From 9.0 on ptxas peels loops whose trips it cannot tell.
        assert kernel.count("SHFL") <= own + (130 if kernel.architecture >= 90 else 70), kernel
        # One ballot a row finds the ends, four count the valid samples.
        assert kernel.count("VOTE") == 5 * kernel.rows, kernel
        # All of these are the statistics' and the ticket's: rows in, 8 warps of the last block, its flag.
        assert kernel.count("STS") <= 3 * kernel.rows + 4, kernel
        assert kernel.count("LDS") <= 3 * kernel.rows + 7, kernel


def test_gae_columns_load_a_chunk_ahead(kernels):
    for kernel in of(kernels, "gae_columns float direct"):
        # Rewards, values and codes of 34 steps. From 10.0 on ptxas makes two of the loop.
        copies = 2 if kernel.architecture >= 100 else 1
        assert kernel.count("LDG.E.U8") == 34 * copies, kernel
        assert kernel.count("LDG.E") >= 3 * 34 * copies, kernel


def test_append_and_gather_have_128_bit_copies(kernels):
    for kernel in of(kernels, "append_step"):
        # Four words of 16 bytes in flight; a final observation's, one at a time.
        assert kernel.count("LDG.E.128") >= 5 and kernel.count("STG.E.128") >= 5, kernel
    for name in ("gather_rows direct", "gather_rows staged"):
        for kernel in of(kernels, name):
            # Places of rows, not addresses, come out of shared memory: their loads are known to be global.
            assert kernel.count("LDG.E.128") >= 4 and kernel.count("STG.E.128") >= 4, kernel
            assert kernel.count("LD.E") == 0, kernel
    for kernel in of(kernels, "gather_rows staged"):
        assert kernel.count("STS.128") >= 4 and kernel.count("LDS.128") >= 4, kernel
