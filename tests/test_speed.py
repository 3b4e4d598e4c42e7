"""What the native CPU kernels cost, by what a busy machine does not change: instructions a sample, operations a call,
page faults. An extra copy or a lost vector loop would multiply one of them. Times: benches/ and docs/benchmarks.md.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import subprocess
import sys

import instructions
import pytest

import pydrone

pytestmark = pytest.mark.skipif(pydrone.backends()["cpu"] is not None, reason=f"cpu: {pydrone.backends()['cpu']}")

# Instructions a sample of 31 numbers, measured (GCC 12) with the version for each instruction set.
ISAS = ("x86-64-v4", "x86-64-v3", "baseline")
MEASURED = {
    "append": (107, 111, 137),
    "gae of a buffer": (9, 10.3, 16),
    "gae of [T, N]": (6.9, 8.1, 12.7),
    "gae of [N, T]": (21.6, 22.8, 30.6),
    "vtrace of [T, N]": (10.9, 13.2, 29.4),
    "vtrace of [N, T]": (27.7, 30, 50),
    "minibatches": (160, 172, 277),
}
# What PyTorch's dispatcher runs; views read and write nothing.
VIEWS = {"aten.detach.default", "aten.view.default", "aten.select.int", "aten.t.default"}
OPERATION = {"append": "append", "minibatches": "gather"} | dict.fromkeys(
    ("vtrace of [T, N]", "vtrace of [N, T]"), "off_policy"
)


def count(*calls: str, **environment: str) -> dict[str, float]:
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        pytest.skip("tests/instructions.py knows the registers of Linux on x86-64 only")
    command = [sys.executable, instructions.__file__, *calls]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    if "PermissionError" in done.stderr and "ptrace" in done.stderr:
        pytest.skip("this machine does not let a process trace its child")
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def counted() -> dict[str, float]:
    return count()


@pytest.mark.parametrize("call", MEASURED)
def test_instructions_of_a_sample(call, counted):
    assert 0 < counted[call] < 1.5 * MEASURED[call][ISAS.index(instructions.isa())]


@pytest.mark.parametrize("isa", ISAS[1:])
def test_instructions_of_lesser_processors(isa):
    """GCC takes selects of wider vectors than the instruction set has apart into scalars: 36 instead of 10 and 16."""
    if ISAS.index(instructions.isa()) >= ISAS.index(isa):
        pytest.skip(f"{instructions.isa()} is what the test above counts, or less")
    call = "gae of [T, N]"
    assert 0 < count(call, PYDRONE_ISA=isa)[call] < 1.5 * MEASURED[call][ISAS.index(isa)]


def test_instructions_of_a_drones_step():
    """Of a quadrotor that hovers, with the hover task."""
    measured = dict(zip(ISAS, (282, 366, 665)))[instructions.isa()]
    assert 0 < count("step")["step"] < 1.5 * measured


@pytest.mark.parametrize("call", MEASURED)
def test_a_call_is_one_operation(call, seen):
    run = instructions.calls(64)[call]
    run()
    with seen:
        run()
    assert [x for x in seen.names if x not in VIEWS] == [f"pydrone.{OPERATION.get(call, 'gae')}.default"]


def faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


@pytest.mark.parametrize("call", MEASURED)
def test_memory_is_touched_the_first_time_only(call):
    run = instructions.calls(4096)[call]  # 32,768 samples: 128 KiB a scalar, 4 MB of rows
    run()
    run()
    taken = []
    for _ in range(5):
        before = faults()
        run()
        taken.append(faults() - before)
    assert min(taken) < 16, "page faults; a scalar of all samples is 32 pages"
