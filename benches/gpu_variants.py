"""The kernels with other launch parameters: Triton's by their launchers' constants, CUDA's by recompiling.

The sources stay as they are. A CUDA variant is a copy of its source with other constants. It registers its operation in
a namespace of its own, so that one process can call all variants.
"""

from __future__ import annotations

import contextlib
import importlib
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from cases import Operation
from machine import ROOT
from torch.utils import cpp_extension

from pydrone.ops.schema import SCHEMAS

SOURCES = ROOT / "csrc" / "cuda"
# As setup.py has them.
FLAGS = ["-std=c++20", "-O3", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000", "-DTORCH_STABLE_ONLY"]
LIBRARIES = ["-ltorch", "-ltorch_cpu", "-ltorch_cuda", "-lc10", "-lc10_cuda", "-lcudart"]

FOUR_ROWS = {"if (two) return PYDRONE_ROWS(32, 2);": "if (two) return PYDRONE_ROWS(32, 4);"}


class Variant(NamedTuple):
    kernel: str
    """One of KERNELS."""
    backend: str
    parameters: dict[str, object] = {}
    """New values of the source's or the Triton launcher's constants, by name; the others stay."""
    text: dict[str, str] = {}
    """Further replacements in a CUDA source, old text to new."""

    @property
    def operation(self) -> str:
        return self.kernel.split()[0]


# The constants of each kernel that are varied, in CUDA and in Triton. kMinBlocks is how many blocks must be resident at
# once, which limits a thread's registers. kManyWarps: 1 for several rows a warp, BEYOND for one.
# kFewBlocks: blocks are halved below it.
BEYOND = 1 << 30
GAE = ("WARPS", "LEAST_WARPS", "PROGRAMS", "WARPS_A_ROW", "THREAD_ROWS", "MANY", "STORE_FIRST", "REGISTERS")
KERNELS = {
    "gae rows": (("kMostWarps", "kManyWarps", "kMinBlocks", "kFewBlocks"), GAE),
    "gae columns": (("kColumnSteps", "kColumnEnvs", "kFewColumnEnvs"), ("COLUMNS", "COLUMN_STEPS")),
    "append": (("kThreads", "kUnroll"), ("ENVS", "WARPS")),
    "gather": (("kSamples", "kThreads", "kUnroll", "kStaged"), ("SAMPLES", "WARPS")),
    "ppo_gradients tf32": ((), ("TILES", "WARPS", "ROWS", "ADD_WARPS")),
    "ppo_gradients bfloat16": ((), ("TILES", "WARPS", "ROWS", "ADD_WARPS")),
    "clipped_adam": ((), ("LEAST", "MOST", "PROGRAMS", "WARPS")),
    "ppo_act": ((), ("ENVS", "WARPS", "CHUNKS")),
    "quadrotor": ((), ("BLOCK", "WARPS")),
    "layers": ((), ("COLUMNS", "WARPS")),
}
# Of KERNELS, those of the learner and the environment: only Triton has them, and whole rows of bench_ppo.py are timed.
ROWS = tuple(KERNELS)[4:]
# GAE at sizes of its own, whatever the sweep's: the shape of a launch depends on them.
SIZED = tuple(f"gae rows {x}" for x in ("4096x24", "1024x100", "16384x128", "65536x100", "256x2048"))
SIZED += tuple(f"gae rows {x}" for x in ("8192x8", "32768x8", "32768x16"))
KERNELS |= dict.fromkeys(SIZED, ((), GAE))
# Samples in a tile, each for networks of any size.
TILES = tuple({samples: 1 << 20} for samples in (16, 32, 64))


def _rows(warps: int, many: int, blocks: int, text: dict[str, str]) -> Variant:
    # Only the kernel that the sweep runs gets the bound.
    bound = f"sizeof(T) == 4 && mode == kWide ? {blocks} : 1"
    return Variant("gae rows", "cuda", {"kMostWarps": warps, "kManyWarps": many, "kMinBlocks": bound}, text)


def _each(kernel: str, backend: str, names: str, values: str) -> list[Variant]:
    """A variant for each comma-separated row of ``values`` of the constants ``names``."""
    rows = [[int(x) for x in row.split()] for row in values.split(",")]
    return [Variant(kernel, backend, dict(zip(names.split(), row, strict=True))) for row in rows]


def cuda() -> list[Variant]:
    """CUDA's variants; the first of a kernel is the unchanged source."""
    threads = "kSamples kThreads kUnroll"
    return [
        Variant("gae rows", "cuda"),
        *(_rows(warps, many, 32 // warps, {}) for warps in (4, 8, 16) for many in (1, BEYOND)),
        *(_rows(8, 1, blocks, {}) for blocks in (2, 3, 5)),
        *(_rows(warps, 1, blocks, FOUR_ROWS) for warps, blocks in ((16, 1), (8, 2), (4, 5))),
        *_each("gae rows", "cuda", "kFewBlocks", "32, 64, 256, 512"),
        Variant("gae columns", "cuda"),
        *_each("gae columns", "cuda", "kColumnSteps kColumnEnvs", "4 32, 6 32, 7 32, 10 32, 13 32, 16 32, 8 16, 8 8"),
        *_each("gae columns", "cuda", "kFewColumnEnvs", "16, 32"),
        Variant("append", "cuda"),
        *_each("append", "cuda", "kThreads kUnroll", "256 1, 256 2, 256 8, 128 2, 128 4, 512 2, 512 4"),
        Variant("gather", "cuda"),
        *_each("gather", "cuda", threads, "128 256 4, 128 256 2, 128 256 8, 128 128 4, 128 512 2, 64 128 4, 64 256 4"),
        *_each("gather", "cuda", threads, "32 128 4, 256 256 2, 256 512 4, 256 512 2, 512 512 4"),
        *_each("gather", "cuda", "kSamples kStaged", "256 0, 64 0"),
    ]


def triton() -> list[Variant]:
    """Triton's variants; the first of a kernel is the unchanged launcher."""
    return [
        *(x for kernel in ("gae rows", *SIZED) for x in _gae(kernel)),
        Variant("gae columns", "triton"),
        *_each("gae columns", "triton", "COLUMNS COLUMN_STEPS", "32 10, 32 20, 32 25, 64 10, 64 25, 64 34, 128 20"),
        Variant("append", "triton"),
        *_each("append", "triton", "ENVS WARPS", "32 4, 16 2, 16 8, 8 2, 8 4, 32 2, 64 4, 128 4"),
        Variant("gather", "triton"),
        *_each("gather", "triton", "SAMPLES WARPS", "128 4, 128 8, 64 2, 64 4, 64 8, 32 1, 32 4, 16 1, 16 2"),
        *_gradients("tf32"),
        *_gradients("bfloat16"),
        Variant("clipped_adam", "triton"),
        *_each("clipped_adam", "triton", "LEAST WARPS", "256 2, 512 2, 1024 4, 1024 8, 2048 4"),
        Variant("ppo_act", "triton"),
        *(Variant("ppo_act", "triton", {"ENVS": envs, "WARPS": warps, "CHUNKS": dict.fromkeys(range(8, 13), chunk)})
          for envs, warps in ((16, 1), (32, 2), (64, 4), (64, 8), (128, 8)) for chunk in (32, 64)),
        Variant("quadrotor", "triton"),
        *_each("quadrotor", "triton", "BLOCK WARPS", "32 1, 64 1, 64 2, 128 2, 128 4"),
        Variant("layers", "triton"),
        *_each("layers", "triton", "COLUMNS WARPS", "64 4, 64 8, 128 4, 256 8"),
    ]  # fmt: skip


def _gae(kernel: str) -> list[Variant]:
    """Programs of other sizes, of fewer warps to an environment, and of one row or two to a thread."""
    rows = "8 2 1 0, 4 2 1 0, 16 2 1 1, 8 2 1 1, 16 1 1 0, 8 1 1 0, 4 1 1 0, 16 1 1 1"
    found = [Variant(kernel, "triton"), *_each(kernel, "triton", "WARPS THREAD_ROWS MANY STORE_FIRST", rows)]
    found += _each(kernel, "triton", "PROGRAMS LEAST_WARPS", "256 4, 512 4, 512 1, 64 8")
    if kernel in ("gae rows", "gae rows 65536x100"):
        found += _each(kernel, "triton", "REGISTERS", "48, 80, 128")
    if kernel == "gae rows 256x2048":
        found += _each(kernel, "triton", "WARPS_A_ROW WARPS", "8 8, 4 4, 2 4, 8 16, 4 16")
    return found


def _gradients(matmul: str) -> list[Variant]:
    kernel, tiles = f"ppo_gradients {matmul}", [{"TILES": x, "WARPS": warps} for x in TILES for warps in (4, 8)]
    sums = [{"ROWS": rows, "ADD_WARPS": 4} for rows in (8, 32)]
    return [Variant(kernel, "triton", x) for x in ({}, *tiles, *sums)]


@contextlib.contextmanager
def launched_with(variant: Variant) -> Iterator[Operation]:
    """Triton's launcher with the variant's constants; the module's own are restored afterwards.

    For a kernel of ROWS None, as whole rows call it.
    """
    module = importlib.import_module(f"pydrone._triton.{variant.operation}")
    before = {name: getattr(module, name) for name in variant.parameters}
    try:
        for name, x in variant.parameters.items():
            setattr(module, name, x)
        _forget(module)
        yield None if variant.kernel in ROWS else getattr(module, variant.operation)
    finally:
        for name, x in before.items():
            setattr(module, name, x)
        _forget(module)


def _forget(module: ModuleType) -> None:
    """Empties the caches of what a launcher has derived from its constants: tables, and prepared launches."""
    for x in vars(module).values():
        if not isinstance(x, type) and hasattr(x, "cache_clear"):
            x.cache_clear()


def constants(variant: Variant) -> dict[str, str]:
    """The values of all varied constants of the variant's kernel, in this variant."""
    names = KERNELS[variant.kernel][variant.backend == "triton"]
    if variant.backend == "triton":
        module = importlib.import_module(f"pydrone._triton.{variant.operation}")
        found = {name: getattr(module, name) for name in names}
    else:
        source = whole((SOURCES / f"{variant.operation}.cu").read_text())
        found = {name: _assigned(name, source)[1] for name in names}
    found |= variant.parameters
    if "kMinBlocks" in found:  # a conditional expression: the value for the kernel that runs
        found["kMinBlocks"] = re.search(r"kWide \? (\d+)", found["kMinBlocks"])[1]
    return {name: str(x) for name, x in found.items()} | ({"rows of a warp": "4"} if variant.text else {})


def whole(source: str) -> str:
    """A CUDA source with the headers of its folder in place, where constants are defined."""
    seen = set()

    def header(include: re.Match) -> str:
        if include[1] in seen:
            return ""
        seen.add(include[1])
        return text((SOURCES / include[1]).read_text().replace("#pragma once\n", ""))

    def text(part: str) -> str:
        return re.sub(r'^#include "(\w+\.cuh)"$', header, part, flags=re.MULTILINE)

    return text(source)


def _assigned(name: str, source: str) -> re.Match:
    """The source's definition `name = value` of the constant; group 1 is the value."""
    found = list(re.finditer(rf"\b{name} = ([^,;]+)(?=[,;])", source))
    if len(found) != 1:
        raise ValueError(f"{name}: expected one definition in the CUDA source, found {len(found)}")
    return found[0]


def changed(source: str, variant: Variant, namespace: str) -> str:
    """The CUDA source with the variant's constants and its operation in ``namespace``."""
    source = whole(source)
    for name, x in variant.parameters.items():
        found = _assigned(name, source)
        source = source[: found.start(1)] + str(x) + source[found.end(1) :]
    library = "STABLE_TORCH_LIBRARY_IMPL(pydrone,"
    for old, new in {**variant.text, library: library.replace("pydrone", namespace)}.items():
        if source.count(old) != 1:
            raise ValueError(f"{old!r}: expected once in the CUDA source, found {source.count(old)} times")
        source = source.replace(old, new)
    return source


def find_nvcc() -> str | None:
    home = cpp_extension.CUDA_HOME
    return shutil.which("nvcc", path=f"{home}/bin") if home else shutil.which("nvcc")


def compiled(variant: Variant, namespace: str, folder: Path, architecture: str, link: bool = True) -> Path:
    """Compiles the variant's library, or without ``link`` its object, for sm_<architecture>.

    Raises RuntimeError with nvcc's message.
    """
    nvcc = find_nvcc()
    if nvcc is None:
        raise RuntimeError("nvcc was not found")
    folder.mkdir(parents=True, exist_ok=True)
    source, target = folder / f"{namespace}.cu", folder / f"{namespace}.{'so' if link else 'o'}"
    source.write_text(changed((SOURCES / f"{variant.operation}.cu").read_text(), variant, namespace))
    command = [nvcc, *FLAGS, "-Xcompiler=-fPIC,-fvisibility=hidden", f"-arch=sm_{architecture}", f"-I{SOURCES}"]
    command += [f"-I{path}" for path in cpp_extension.include_paths("cuda" if link else "cpu")]
    if link:
        command += ["-shared", "--cudart=shared", *(f"-L{path}" for path in cpp_extension.library_paths("cuda"))]
        command += LIBRARIES
    else:
        command += ["-c"]
    done = subprocess.run([*command, str(source), "-o", str(target)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"nvcc: {done.stderr.strip()[-400:]}")
    return target


_libraries: list[torch.library.Library] = []


def loaded(variant: Variant, namespace: str, library: Path) -> Operation:
    """Loads the variant's library and returns its operation."""
    _libraries.append(torch.library.Library(namespace, "DEF"))
    _libraries[-1].define(variant.operation + SCHEMAS[variant.operation])
    torch.ops.load_library(str(library))
    return getattr(getattr(torch.ops, namespace), variant.operation).default
