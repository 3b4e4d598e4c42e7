"""Builds csrc/cuda for the CPU, with the headers in cuda/ in place of CUDA's.

Syntax that C++ lacks is rewritten: launches, declarations of shared memory, one attribute. Everything else is compiled
unchanged, so that the tests run the real kernels.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from filelock import FileLock
from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).resolve().parents[2]
STAND_INS = Path(__file__).with_name("cuda")
SANITIZE = os.environ.get("PYDRONE_SANITIZE", "")
FOLDER = ROOT / "build" / ("emulated-sanitized" if SANITIZE else "emulated")
CXX = shlex.split(os.environ.get("CXX") or "c++")
FLAGS = ["-std=c++20", "-O2", "-fPIC", "-Wall", "-Wno-unknown-pragmas", "-Wno-psabi", "-Wno-unused-function"]
FLAGS += ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DTORCH_STABLE_ONLY", f"-I{STAND_INS}"]
FLAGS += [f"-I{path}" for path in include_paths()] + (["-g", f"-fsanitize={SANITIZE}"] if SANITIZE else [])

REWRITTEN = [
    (r"extern __shared__ (\w+) (\w+)\[\];", r"\1* const \2 = static_cast<\1*>(emulated::block.shared(nullptr, 0));"),
    (r"__shared__ (\w+) (\w+)\[(.+?)\];", r"auto& \2 = emulated::shared<\1[\3]>([] {});"),
    (r"__shared__ (\w+) (\w+);", r"auto& \2 = emulated::shared<\1>([] {});"),
    (r"(\w+)<<<(.+?)>>>\(", r"emulated::launch(\1, \2, "),
    (r'asm volatile\("atom\.add\.acq_rel\.gpu\.global\.u64 [^;]*;"\s[^;]*;', "before = atomicAdd(counter, x);"),
    (r"\b__noinline__\b", "__attribute__((noinline))"),
]


def rewritten(text: str) -> str:
    """CUDA source as C++ for cuda/cuda_runtime.h. Raises ValueError if CUDA syntax remains."""
    for pattern, by in REWRITTEN:
        text = re.sub(pattern, by, text)
    left = re.search(r"__shared__|<<<|asm\b", re.sub(r"//.*", "", text))
    if left:
        raise ValueError(f"csrc/cuda: no rule rewrites {left[0]!r} for the CPU: add one to {Path(__file__).name}")
    return text


def build(folder: Path = FOLDER, sources: Path = ROOT / "csrc") -> Path:
    """Builds ``sources``/cuda in ``folder`` and returns the library's path; reuses a library of the same sources."""
    files = [*sources.glob("*.h"), *sources.glob("cuda/*.cu*")]
    parts = {x: rewritten(x.read_text()) if x.parent.name == "cuda" else x.read_text() for x in sorted(files)}
    seen = [*parts.values(), *(x.read_text() for x in sorted(STAND_INS.rglob("*.h"))), torch.__version__, *CXX, *FLAGS]
    library = folder / f"emulated-{hashlib.sha256(chr(0).join(seen).encode()).hexdigest()[:16]}.so"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):  # one of the processes that test builds it
        return library if library.exists() else compile_library(library, parts, sources)


def compile_library(library: Path, parts: dict[Path, str], sources: Path) -> Path:
    folder = library.parent
    shutil.rmtree(folder, ignore_errors=True)
    for path, text in parts.items():
        target = folder / "csrc" / path.relative_to(sources)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
    units = sorted((folder / "csrc" / "cuda").glob("*.cu"))
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda x: run(*CXX, *FLAGS, "-c", "-x", "c++", str(x), "-o", f"{x}.o"), units))
    libraries = f"-L{Path(torch.__path__[0], 'lib')}", "-ltorch", "-ltorch_cpu", "-lc10"
    sanitize = [x for x in FLAGS if x.startswith("-fsanitize")]
    made = library.with_suffix(".new")
    run(*CXX, "-shared", *sanitize, *(f"{x}.o" for x in units), *libraries, "-o", str(made))
    return made.rename(library)


def run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)}\n{done.stdout}{done.stderr}")
