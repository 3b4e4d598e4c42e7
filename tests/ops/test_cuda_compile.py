"""The CUDA sources compile without a GPU, against any build of torch; their machine code is inspected with cuobjdump,
the toolkit's or Triton's."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from filelock import FileLock

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "build" / "compiled"
FLAGS = ["-std=c++20", "-O3", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000", "-DTORCH_STABLE_ONLY"]

# Kernel: registers per thread, bytes of shared memory, barriers. A multiprocessor has 65,536 registers: two blocks of
# 16 warps fit at 64 registers a thread, one at 128; three blocks of 8 at 80.
BUDGET = {
    # 8192 environments in blocks of 32 are 256 blocks: one wave on 132 multiprocessors if two fit. Shared memory: the
    # warps' sums, 20 bytes each, and what the tiles of a row come to, twice. Barriers: that of the statistics, and of
    # the tiles.
    "gae rows float wide": (64, 320, 1),
    "gae rows float direct": (80, 320, 1),
    "gae rows float generic": (80, 320, 1),  # checks the dtype at each element
    "gae rows double wide": (80, 320, 1),
    "gae rows double generic": (80, 320, 1),
    "gae tiles float wide": (64, 704, 2),
    "gae tiles float direct": (80, 704, 2),
    "gae tiles float generic": (80, 704, 2),
    "gae tiles double wide": (128, 1088, 2),
    "gae tiles double generic": (128, 1088, 2),
    # Blocks of 13 warps, of which two fit at 72 registers. Shared memory: what 416 threads' steps come to, twice.
    "gae columns float direct": (72, 4480, 2),
    "gae columns float generic": (80, 4480, 2),
    "gae columns double direct": (128, 7808, 2),
    "gae columns double generic": (128, 7808, 2),
    # Another number a step in flight; the factors of runs of steps differ.
    "vtrace rows float wide": (64, 320, 1),
    "vtrace rows float direct": (80, 320, 1),
    "vtrace rows float generic": (80, 320, 1),
    "vtrace rows double generic": (128, 320, 1),
    "vtrace tiles float wide": (64, 704, 2),
    "vtrace tiles float direct": (80, 704, 2),
    "vtrace tiles float generic": (128, 704, 2),
    "vtrace tiles double generic": (168, 1088, 2),
    "vtrace columns float direct": (152, 7808, 2),
    "vtrace columns float generic": (96, 7808, 2),
    "vtrace columns double generic": (152, 14464, 2),
    "retrace rows float wide": (64, 320, 1),
    "retrace rows float direct": (80, 320, 1),
    "retrace rows float generic": (80, 320, 1),
    "retrace rows double generic": (128, 320, 1),
    "retrace tiles float wide": (128, 704, 2),
    "retrace tiles float direct": (80, 704, 2),
    "retrace tiles float generic": (128, 704, 2),
    "retrace tiles double generic": (168, 1088, 2),
    "retrace columns float direct": (152, 7808, 2),
    "retrace columns float generic": (96, 7808, 2),
    "retrace columns double generic": (152, 14464, 2),
    "append_step": (80, 1, 2),  # shared memory and barriers of the ticket
    # 256 row offsets; the rows, at most 128 x 304 bytes, are dynamic shared memory. One barrier after the offsets, one
    # after the rows.
    "gather_rows direct": (64, 2048, 1),
    "gather_rows staged": (64, 2048, 2),
}
# Where ptxas spills a register or two, away from the loads: (kernel, architecture) to bytes of stack. No other kernel
# may spill.
SPILLED = {
    ("gae columns float direct", 80): 8,
    ("gae rows float wide", 100): 56,  # 32 bytes by 28 instructions, with two environments a warp
    ("gae rows float wide", 120): 8,
}
# From 9.0 on, the compiler reserves 1 KiB of shared memory per block for itself.
RESERVED = 1024
KERNELS = {"gae": 24, "off_policy": 24, "append": 1, "gather": 2}

OPCODE = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", re.MULTILINE)
KERNEL = re.compile(r"(append_step|gather_rows|scan_rows|scan_tiles|scan_columns)(?:I(\w+?)EEv)?")
ESTIMATORS, MODES = ("gae", "vtrace", "retrace"), ("generic", "direct", "wide")


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
        kind, given = KERNEL.search(symbol).groups()
        flag, mode, estimator = (re.search(x, given or "") for x in (r"Lb([01])E", r"ModeE(\d)E", r"EstimatorE(\d)E"))
        integers = [int(x) for x in re.findall(r"Li(\d+)E", f"{given}E")]
        self.name = kind
        if kind == "gather_rows":
            self.name += (" direct", " staged")[int(flag[1])]
        elif estimator:
            variant = MODES[int(mode[1] if mode else flag[1])]
            kind, dtype = kind.removeprefix("scan_"), {"f": "float", "d": "double"}[given[0]]
            self.name = f"{ESTIMATORS[int(estimator[1])]} {kind} {dtype} {variant}"
        self.architecture = architecture
        # Lanes that share an environment, and environments that a lane takes at once.
        self.lanes, self.rows = integers if kind == "rows" else (32, 1)
        self.listing = [x for x in OPCODE.findall(code) if x != "NOP"]  # which pads the end
        numbers = dict(re.findall(r"(\w+):(\d+)", usage))
        self.registers, self.stack = int(numbers["REG"]), int(numbers["STACK"]) + int(numbers["LOCAL"])
        self.shared = int(numbers["SHARED"]) - (RESERVED if architecture >= 90 else 0)
        self.opcodes = Counter(self.listing)

    def __repr__(self) -> str:
        return f"{self.name}, {self.lanes} lanes, {self.rows} rows, sm_{self.architecture}"

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


def compiled(name: str, architectures: tuple[int, ...]) -> Path:
    """Compiles a source for several architectures in one call of nvcc, unless build/ has the object of equal sources.
    Returns the object."""
    source = ROOT / "csrc" / "cuda" / f"{name}.cu"
    codes = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in architectures]
    include = Path(torch.__path__[0], "include")
    command = ["nvcc", *FLAGS, *codes, f"-I{include}", "-c", str(source)]
    headers = [x.read_text() for x in sorted([*source.parents[1].glob("*.h"), *source.parent.glob("*.cuh")])]
    seen = [*command, source.read_text(), *headers, torch.__version__, nvcc("--version")]
    kind = f"{name}-{'-'.join(map(str, architectures))}"
    target = FOLDER / f"{kind}-{hashlib.sha256(chr(0).join(seen).encode()).hexdigest()[:16]}.o"
    FOLDER.mkdir(parents=True, exist_ok=True)
    with FileLock(FOLDER / f"{kind}.lock"):
        if not target.exists():
            for old in FOLDER.glob(f"{kind}-*.o"):
                old.unlink()
            made = target.with_suffix(".new")
            done = subprocess.run([*command, "--threads", "0", "-o", str(made)], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            made.rename(target)
    return target


def nvcc(option: str) -> str:
    return subprocess.run(["nvcc", option], capture_output=True, text=True, check=True).stdout


def kernels_of(target: Path) -> list[Kernel]:
    def dump(option: str) -> str:
        return subprocess.run([CUOBJDUMP, option, str(target)], capture_output=True, text=True, check=True).stdout

    usage = by_function(dump("--dump-resource-usage"), r"^ Function ")
    code = by_function(dump("-sass"), r"^\s*Function : ")
    assert usage.keys() == code.keys()
    return [Kernel(symbol, number, usage[number, symbol], code[number, symbol]) for number, symbol in usage]


@pytest.fixture(scope="module", params=[(90,), pytest.param((80, 86, 89, 100, 120), marks=pytest.mark.slow)], ids=str)
def architectures(request) -> tuple[int, ...]:
    known = nvcc("--list-gpu-code").split()
    found = tuple(number for number in request.param if f"sm_{number}" in known)
    assert 90 in found or 90 not in request.param
    return found


@pytest.fixture(scope="module")
def objects(architectures) -> list[Path]:
    return [compiled(name, architectures) for name in KERNELS]


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
        spilled = SPILLED.get((kernel.name, kernel.architecture), 0)
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
    """Rewards and values in, advantages and returns out: four steps per lane, 16 bytes in float and 32 in double.
    And, in one load each, the sums of eight blocks; one store for a block's own."""
    for kernel in of(kernels, f"gae rows {dtype} wide"):
        wide = 2 * kernel.rows * (2 if dtype == "double" else 1)
        assert kernel.count("LDG.E.128") == wide + 8, kernel
        assert kernel.count("STG.E.128") == wide + 1, kernel


def test_gae_rows_scan_without_barrier_or_shared_memory(kernels):
    for kernel in of(kernels, "gae rows float wide"):
        # Per row: the next lane's value, the steps of the scan, and what follows.
        own = kernel.rows * (1 + kernel.lanes.bit_length() - 1 + 1)
        # Statistics are float64, two registers each. A warp's sums, the block's, the launch's: five steps, four and one
        # to the first lane, five and one. Twice two for the ticket. ptxas duplicates the last of these.
        assert kernel.count("SHFL") <= own + 2 * (5 + 5 + 1 + 2 * 6) + 2, kernel
        # Per row, one ballot finds the ends; samples are counted in one instruction a warp and two a block.
        assert kernel.count("VOTE") <= kernel.rows + 1, kernel
        assert kernel.count("REDUX") == 3, kernel
        # All of these belong to the statistics: a warp's sums and count, and the block's.
        assert kernel.count("STS") <= 2 and kernel.count("LDS") <= 2, kernel


def test_little_follows_the_scan(kernels):
    """The statistics' share of a launch's time: from the last shuffle of the scan to the block's sums in memory, and
    from there to the end. One barrier, one fence, one atomic, and one load of the sums of eight blocks."""
    for kernel in of(kernels, "gae rows float wide"):
        fence = next(i for i, x in enumerate(kernel.listing) if x.startswith("MEMBAR"))
        scan = max(i for i, x in enumerate(kernel.listing) if x.startswith("SHFL.UP"))
        before, after = Counter(kernel.listing[scan:fence]), Counter(kernel.listing[fence:])

        def count(found: Counter, *prefixes: str) -> int:
            return sum(number for opcode, number in found.items() if opcode.startswith(prefixes))

        assert kernel.count("MEMBAR") == kernel.count("ATOM") == kernel.count("BAR") == 1, kernel
        assert count(after, "BAR", "LDS", "STS") == 0 and count(after, "LDG.E.128") == 8, kernel
        assert sum(before.values()) <= 230 and count(before, "DADD", "DMUL", "DFMA", "DSETP") <= 16, kernel
        assert count(after, "DADD", "DMUL", "DFMA", "DSETP") <= 56, kernel
        assert count(before, "MUFU.RCP") == 0, f"{kernel}: no division before the last block"


def test_long_rows_exchange_by_one_barrier(kernels):
    for estimator in ("gae", "vtrace"):
        for kernel in of(kernels, f"{estimator} tiles float wide"):
            # The tiles in flight are loaded twice in the code: the first ones, and the next ones during the loop.
            numbers = 2 if estimator == "gae" else 3
            assert kernel.count("LDG.E.128") == 2 * numbers + 8, kernel
            assert kernel.count("BAR") == 2, kernel


def test_gae_columns_load_a_chunk_ahead(kernels):
    for kernel in of(kernels, "gae columns float direct"):
        first = next(i for i, x in enumerate(kernel.listing) if x.startswith("BAR"))
        # Rewards, values and codes of eight steps before the first barrier, by which threads that share an environment
        # exchange what theirs come to.
        loads = Counter(kernel.listing[:first])
        assert loads["LDG.E.U8"] >= 8 and loads["LDG.E"] >= 16, kernel


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
