"""The CUDA sources compile for a GPU that need not be there, against whatever build of torch is installed."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
FLAGS = ["-std=c++20", "-O3", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000", "-DTORCH_STABLE_ONLY"]
# Registers of a thread.
BUDGET = {"gae": 255, "append": 80, "gather": 64}

pytestmark = [
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc not found"),
    pytest.mark.skipif(not (ROOT / "csrc" / "cuda").is_dir(), reason="csrc/cuda is not in this source tree"),
]


def compiled(name: str, architecture: int, folder: Path) -> dict[str, tuple[int, int]]:
    """{mangled kernel: (registers, bytes of stack and spills)}, as ptxas says."""
    include = Path(torch.__path__[0], "include")
    code = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    source = ROOT / "csrc" / "cuda" / f"{name}.cu"
    command = ["nvcc", *FLAGS, code, "-Xptxas", "-v", f"-I{include}", "-c", str(source), "-o", str(folder / "out.o")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found, kernel, spilled = {}, None, 0
    for line in done.stderr.splitlines():
        if entry := re.search(r"Compiling entry function '(\w+)'", line):
            kernel = entry[1]
        elif frame := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            spilled = sum(map(int, frame.groups()))
        elif used := re.search(r"Used (\d+) registers", line):
            found[kernel] = (int(used[1]), spilled)
    return found


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize(("name", "kernels"), [("gae", 16), ("append", 1), ("gather", 2)])
def test_compiles_within_budget(name, kernels, architecture, tmp_path):
    found = compiled(name, architecture, tmp_path)
    assert len(found) == kernels
    for kernel, (registers, spilled) in found.items():
        assert spilled == 0, kernel
        assert registers <= BUDGET[name], kernel
    if name == "gae":
        # gae_rows<float, kWide, 1 or 2>: four blocks of 256 threads to a multiprocessor.
        wide = [
            registers for kernel, (registers, _) in found.items() if "gae_rowsIfLNS" in kernel and "ModeE2E" in kernel
        ]
        assert len(wide) == 2
        assert max(wide) <= 64
