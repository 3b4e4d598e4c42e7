"""The Triton kernels compile to machine code without a GPU; what that code holds is read with Triton's cuobjdump."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

CUBINS = Path(__file__).with_name("triton_cubins.py")
# Registers of a thread. 64 let 8192 environments' GAE be one wave of programs on 132 multiprocessors.
BUDGET = {"gae rows": 64, "gae columns": 255, "append": 80, "gather": 128}
WIDE = ["gae rows", "gae rows, no statistics", "gae rows, second rollout", "gae rows, few", "gae rows, pool"]


@pytest.fixture(scope="module", params=[80, 90])
def kernels(request, tmp_path_factory) -> dict[str, dict]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    command = [sys.executable, str(CUBINS), str(request.param)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return {line["name"]: line for line in map(json.loads, done.stdout.splitlines())}


def count(kernel: dict, prefix: str) -> int:
    return sum(number for opcode, number in kernel["opcodes"].items() if opcode.startswith(prefix))


def test_nothing_is_spilled(kernels):
    assert len(kernels) == 16
    for name, kernel in kernels.items():
        # With a wrap ptxas keeps to 48 registers, five programs to a multiprocessor, by sparing one for a while.
        allowed = 8 if name == "gae rows, wrapped" else 0
        assert kernel["stack"] <= allowed, name
        assert count(kernel, "LDL") + count(kernel, "STL") <= allowed // 4, name


def test_registers_are_within_budget(kernels):
    for name, kernel in kernels.items():
        if name not in ("gae rows, float64", "gae rows, odd"):
            assert kernel["registers"] <= BUDGET[name.split(",")[0]], name


@pytest.mark.parametrize("name", WIDE)
def test_gae_rows_are_read_and_written_in_128_bits(kernels, name):
    kernel = kernels[name]
    rows_of_a_warp = 1 if name.endswith("few") else 2
    # Rewards and values; advantages and returns. Codes are four bytes to a lane, one 32-bit load.
    assert count(kernel, "LDG.E.128") == 2 * rows_of_a_warp
    assert count(kernel, "STG.E.128") == 2 * rows_of_a_warp
    assert count(kernel, "LDG.E.U8") == 0


def test_gae_rows_scan_without_barrier_or_shared_memory(kernels):
    kernel = kernels["gae rows, no statistics"]
    for opcode in ("BAR", "LDS", "STS", "SHFL.BFLY"):
        assert count(kernel, opcode) == 0, opcode
    # Per row: two operands turned, one turned back, one value from the next lane; five steps of two operands.
    assert count(kernel, "SHFL") == 2 * (4 + 10)


def test_gae_columns_need_no_shuffle_to_scan(kernels):
    kernel = kernels["gae columns"]
    assert count(kernel, "SHFL.UP") == 0
    assert count(kernel, "LDG.E.U8") == 20, "all of a chunk's codes are loaded ahead"


def test_a_cursor_keeps_the_wide_accesses(kernels):
    assert count(kernels["gae rows, cursor"], "LDG.E.128") >= 4
    assert count(kernels["gae rows, cursor"], "STG.E.128") >= 4
