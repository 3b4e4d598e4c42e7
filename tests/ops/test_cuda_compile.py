"""The CUDA sources compile without a GPU, against any build of torch; their machine code is inspected with cuobjdump,
the toolkit's or Triton's."""

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

# Kernel: registers per thread, bytes of shared memory, barriers. A multiprocessor has 65,536 registers and most kernels
# have blocks of 256 threads: four blocks fit at 64 registers, three at 80, two at 128.
BUDGET = {
    # 8192 environments in blocks of 16 are 512 blocks: one wave on 132 multiprocessors if four fit. Shared memory: the
    # warps' statistics, 24 bytes per row. Barriers: those of the statistics and the ticket.
    "gae_rows float wide": (64, 392, 4),
    "gae_rows float direct": (80, 392, 4),  # with a cursor: wide and narrow accesses in one body; three blocks
    "gae_rows float generic": (128, 392, 4),  # checks the dtype at each element
    "gae_rows double wide": (128, 392, 4),
    "gae_rows double direct": (128, 392, 4),
    "gae_rows double generic": (128, 392, 4),
    # 34 steps of rewards, values and codes in flight (float64: 17). 8192 threads are 62 per multiprocessor: registers
    # are no limit.
    "gae_columns float direct": (255, 56, 4),
    "gae_columns float generic": (80, 56, 4),
    "gae_columns double direct": (255, 56, 4),
    "gae_columns double generic": (80, 56, 4),
    "append_step": (80, 1, 2),  # shared memory and barriers of the ticket
    # 128 row offsets; the rows, at most 128 x 304 bytes, are dynamic shared memory. One barrier after the offsets, one
    # after the rows.
    "gather_rows direct": (64, 1024, 1),
    "gather_rows staged": (64, 1024, 2),
}
# To stay within 64 or 80 registers, ptxas may spill one or two, away from the loads: (kernel, rows per warp,
# architecture) to bytes of stack. No other kernel may spill.
SPILLED = {
    ("gae_rows float direct", 2, 100): 8,
    ("gae_rows float wide", 1, 120): 16,
    ("gae_rows float wide", 2, 120): 8,
}
# From 9.0 on, the compiler reserves 1 KiB of shared memory per block for itself.
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
        self.rows = int(re.search(r"Li(\d+)E", symbol)[1]) if kind == "gae_rows" else 1  # per warp
        self.opcodes = Counter(OPCODE.findall(code))

    def __repr__(self) -> str:
        return f"{self.name}, {self.rows} rows, sm_{self.architecture}"

    def count(self, *prefixes: str) -> int:
        return sum(number for opcode, number in self.opcodes.items() if opcode.startswith(prefixes))


def by_function(listing: str, heading: str) -> dict[tuple[int, str], str]:
    """Splits cuobjdump's listing of an object for several architectures into {(architecture, symbol): its part}."""
    found = {}
    for part in re.split(r"^arch = sm_", listing, flags=re.MULTILINE)[1:]:
        for function in re.split(heading, part, flags=re.MULTILINE)[1:]:
            symbol, _, body = function.partition("\n")
            found[int(re.match(r"\d+", part)[0]), symbol.rstrip(":")] = body
    return found


def compiled(name: str, architectures: tuple[int, ...], folder: Path) -> Path:
    """Compiles a source for several architectures in one call of nvcc. Returns the object."""
    target, source = folder / f"{name}.o", ROOT / "csrc" / "cuda" / f"{name}.cu"
    codes = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in architectures]
    include = Path(torch.__path__[0], "include")
    command = ["nvcc", *FLAGS, "--threads", "0", *codes, f"-I{include}", "-c", str(source), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return target


def kernels_of(target: Path) -> list[Kernel]:
    def dump(option: str) -> str:
        return subprocess.run([CUOBJDUMP, option, str(target)], capture_output=True, text=True, check=True).stdout

    usage = by_function(dump("--dump-resource-usage"), r"^ Function ")
    code = by_function(dump("-sass"), r"^\s*Function : ")
    assert usage.keys() == code.keys()
    return [Kernel(symbol, number, usage[number, symbol], code[number, symbol]) for number, symbol in usage]


@pytest.fixture(scope="module", params=[(90,), pytest.param((80, 86, 89, 100, 120), marks=pytest.mark.slow)], ids=str)
def architectures(request) -> tuple[int, ...]:
    known = subprocess.run(["nvcc", "--list-gpu-code"], capture_output=True, text=True).stdout.split()
    found = tuple(number for number in request.param if f"sm_{number}" in known)
    assert 90 in found or 90 not in request.param
    return found


@pytest.fixture(scope="module")
def objects(architectures, tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("cuda")
    return [compiled(name, architectures, folder) for name in KERNELS]


@pytest.fixture(scope="module")
def kernels(architectures, objects) -> list[Kernel]:
    found = [kernel for path in objects for kernel in kernels_of(path)]
    assert len(found) == sum(KERNELS.values()) * len(architectures)
    assert {kernel.name for kernel in found} == BUDGET.keys()
    return found


def of(kernels: list[Kernel], name: str) -> list[Kernel]:
    found = [kernel for kernel in kernels if kernel.name == name]
    assert found, name
    return found


def test_errors_are_built_without_streams(objects):
    """What csrc/errors.h is for; tests/house/test_packaging.py says it of the CPU library."""
    for path in objects:
        names = subprocess.run(["nm", "-C", str(path)], capture_output=True, text=True, check=True).stdout.splitlines()
        assert any("runtime_error" in name for name in names)
        assert [x for x in names if re.search(r"std::.*(stream|locale|basic_ios|ios_base(?!::Init))", x)] == [], (
            path.name
        )


def test_no_minimum_or_maximum_drops_a_nan(kernels):
    """fminf, fmaxf, fmin and fmax return the operand that is a number."""
    for kernel in kernels:
        dropping = [x for x in kernel.opcodes if re.match("[FDH]MNMX", x) and ".NAN" not in x]
        assert dropping == [], kernel


def test_nothing_is_spilled(kernels):
    for kernel in kernels:
        spilled = SPILLED.get((kernel.name, kernel.rows, kernel.architecture), 0)
        assert kernel.stack <= spilled, kernel
        assert kernel.count("LDL", "STL") <= spilled // 2, kernel


def test_registers_shared_memory_and_barriers_are_within_budget(kernels):
    for kernel in kernels:
        registers, shared, barriers = BUDGET[kernel.name]
        assert kernel.registers <= registers, kernel
        assert kernel.shared <= shared, kernel
        assert kernel.count("BAR") <= barriers, kernel


@pytest.mark.parametrize("dtype", ["float", "double"])
def test_gae_rows_are_read_and_written_in_128_bits(kernels, dtype):
    """Rewards and values in, advantages and returns out: four steps per lane, 16 bytes in float and 32 in double."""
    for kernel in of(kernels, f"gae_rows {dtype} wide") + of(kernels, f"gae_rows {dtype} direct"):
        wide = 2 * kernel.rows * (2 if dtype == "double" else 1)
        assert kernel.count("LDG.E.128") == kernel.count("STG.E.128") == wide, kernel
    for kernel in of(kernels, f"gae_rows {dtype} wide"):
        assert kernel.count("LDG.E.U8") == 0, f"{kernel}: codes are one 32-bit load"


def test_gae_rows_scan_without_barrier_or_shared_memory(kernels):
    for kernel in of(kernels, "gae_rows float wide"):
        # Per row: the next lane's value, five steps of the scan, its run, carry and value out, two sums of five.
        own = kernel.rows * (1 + 5 + 1 + 2 + 10)
        # Statistics of block and launch are float64, two registers each: a mean and three sums, over the rows of 8
        # warps, then the lanes of a warp, then 8 warps. From 9.0 on, ptxas peels loops with an unknown trip count.
        assert kernel.count("SHFL") <= own + (130 if kernel.architecture >= 90 else 70), kernel
        # Per row, one ballot finds the ends and four count the valid samples.
        assert kernel.count("VOTE") == 5 * kernel.rows, kernel
        # All of these belong to statistics and ticket: the rows, 8 warps of the last block, its flag.
        assert kernel.count("STS") <= 3 * kernel.rows + 4, kernel
        assert kernel.count("LDS") <= 3 * kernel.rows + 7, kernel


def test_gae_columns_load_a_chunk_ahead(kernels):
    for kernel in of(kernels, "gae_columns float direct"):
        # Rewards, values and codes of 34 steps. From 10.0 on, ptxas duplicates the loop.
        copies = 2 if kernel.architecture >= 100 else 1
        assert kernel.count("LDG.E.U8") == 34 * copies, kernel
        assert kernel.count("LDG.E") >= 3 * 34 * copies, kernel


def test_append_and_gather_have_128_bit_copies(kernels):
    for kernel in of(kernels, "append_step"):
        # Four words of 16 bytes in flight; a final observation is copied one word at a time.
        assert kernel.count("LDG.E.128") >= 5 and kernel.count("STG.E.128") >= 5, kernel
    for name in ("gather_rows direct", "gather_rows staged"):
        for kernel in of(kernels, name):
            # Shared memory holds row offsets, not addresses: the compiler knows that the loads are global.
            assert kernel.count("LDG.E.128") >= 4 and kernel.count("STG.E.128") >= 4, kernel
            assert kernel.count("LD.E") == 0, kernel
    for kernel in of(kernels, "gather_rows staged"):
        assert kernel.count("STS.128") >= 4 and kernel.count("LDS.128") >= 4, kernel
