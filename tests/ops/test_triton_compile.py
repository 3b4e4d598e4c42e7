"""The Triton kernels compile without a GPU; their machine code is inspected with Triton's cuobjdump."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pydrone.ops.schema import ACTIVATIONS

pytest.importorskip("triton")

CUBINS = Path(__file__).with_name("triton_cubins.py")
# Triton keeps what it compiled under the hash of sources, options and its version: only what has changed is compiled.
CACHE = CUBINS.parents[2] / "build" / "triton"
FEW = "90 few"
ARCHITECTURES = [FEW, *(pytest.param(x, marks=pytest.mark.slow) for x in ("80", "86", "89", "90", "100", "120"))]

# Kernel and case: registers per thread, bytes of shared memory. A multiprocessor has 65,536 registers. Programs of "gae
# rows" have 512 threads: at 64 registers two fit, and 8192 environments, 32 per program, are one wave on 132
# multiprocessors.
BUDGET = {
    "gae rows": (64, 384),  # shared memory: 24 bytes of statistics of each of 16 warps
    "gae rows, no statistics": (64, 0),
    "gae rows, second rollout": (64, 384),
    "gae rows, few": (64, 192),
    "gae rows, several warps": (64, 384),
    "gae rows, short": (64, 384),
    "vtrace rows": (64, 384),
    "retrace rows": (64, 0),
    # If not all loads are wide, Triton 3.6 converts layouts through shared memory; 3.7 does not.
    "gae rows, pool": (80, 8192),  # also loads final values; three programs
    "gae rows, cursor": (64, 8192),
    "gae rows, wrapped": (64, 8192),
    # Rows not aligned to 16 bytes: layout conversions in shared memory. Correct, not fast.
    "gae rows, odd": (80, 8192),
    "gae rows, long": (64, 384),
    "gae rows, float64": (80, 8192),
    # 128 programs of 64 threads: registers are no limit. Up to twenty steps are in flight.
    "gae columns": (168, 48),
    "gae columns, pool": (168, 48),
    "vtrace columns": (168, 48),
    "retrace columns": (168, 0),
    # 512 programs of 128 threads for 8192 environments, four per multiprocessor; all fields of 16 environments are in
    # registers. Shared memory: Triton 3.6 only.
    "append": (80, 4096),
    "append, cursor": (80, 4096),
    # Eight programs of 64 threads per multiprocessor hide the latency of rows read out of order.
    "gather": (128, 2048),
    "gather, cursor": (128, 2048),
    # Two programs of 256 threads; two samples of four actions per thread. Shared memory: sums of 8 warps.
    "loss": (128, 4096),
    "loss, normalised values": (128, 4096),
    "loss, strided": (128, 4096),
    "loss, one action": (128, 4096),
    "loss, 17 actions": (128, 4096),
    # Streams of 16 elements per thread; five programs of 256 threads. Shared memory: sums of 8 warps.
    **{f"layer, {x}": (48, 0) for x in ACTIVATIONS},
    **{f"layer back, {x}": (48, 4096) for x in (*ACTIVATIONS, "none")},
    "loss, float64": (192, 4096),
    # 128 programs of 64 threads for 8192 drones: registers are no limit. Shared memory: rows of 16 for 64 drones.
    "env step": (128, 4096),
    "env step, all options": (192, 4096),
    "task": (128, 4096),
    "task, all options": (160, 4096),
    "propellers": (64, 4096),
    "propellers, all options": (128, 4096),
    "task in a solver": (128, 4096),
    "task in a solver, all options": (160, 4096),
    # One program of 256 threads, which has all registers and, in TF32 with 128 units, nearly all shared memory of a
    # multiprocessor. The estimate of shared memory is held below.
    "gradients": (255, 219_136),
    "gradients, bfloat16": (255, 109_568),
    "gradients, float32": (255, 51_200),
    "gradients, as many inputs as units": (255, 92_160),
    "gradients, discrete": (255, 92_160),
    "gradients, sum": (64, 4096),
    # Fewer programs than fit: registers are no limit. Shared memory: sums of 4 warps.
    "adam": (64, 128),
    "adam, squares": (64, 64),
    "adam, wide": (128, 128),  # up to sixteen elements of four arrays per thread
    "adam, wide, squares": (64, 64),
    # Two programs of 128 threads per multiprocessor are one wave of 8192 environments. Shared memory: weights' blocks.
    "act, bfloat16": (232, 16384),
    "act, discrete": (255, 20480),
    "step": (255, 20480),
    "step, float32": (255, 40960),
}
# Only in the slow tests: each takes seconds.
LEFT_OUT = {"gradients, bfloat16", "gradients, float32", "gradients, as many inputs as units"}
LEFT_OUT |= {"act, bfloat16", "act, discrete", "step, float32", "gae columns, pool", "task, all options"}
LEFT_OUT |= {"vtrace columns", "retrace columns"}
LEFT_OUT |= {"propellers, all options", "task in a solver, all options"}
# To stay within 48 or 56 registers, which fits one more program per multiprocessor, ptxas may spill one or two, away
# from the loads: bytes of stack allowed for it. No other kernel may spill.
SPILLED = dict.fromkeys(
    ("gae rows", "gae rows, second rollout", "gae rows, cursor", "gae rows, wrapped", "append, cursor"), 8
)
SPILLED |= {"vtrace rows": 16}  # on 8.0, 10.0 and 12.0
# Tiles of 32 samples do not quite fit: a percent of the instructions. With tiles of 16, which fit, weights would be
# read from shared memory twice as often.
SPILLED |= {"gradients": 160, "gradients, bfloat16": 320, "gradients, as many inputs as units": 12}
SPILLED |= {"step, float32": 144}  # whose operands are split in two
# On 10.0, the compiler keeps the weights in registers, not in shared memory.
OF_100 = {"gradients": 3000, "gradients, bfloat16": 1600, "gradients, as many inputs as units": 320}
SPILLED_ON = {100: OF_100 | {"gradients, discrete": 24}, 120: {"gradients, discrete": 24}}
# Where tensor cores read registers (HMMA: 8.x and 12.0), a tile's activations fill a thread's. What a step needs after
# the networks is then spilled.
SPILLED_BESIDE_HMMA = {"act, discrete": 160, "step": 400, "step, float32": 900}
WIDE = ["gae rows", "gae rows, no statistics", "gae rows, second rollout", "gae rows, few", "gae rows, pool"]
WIDE += ["gae rows, several warps", "gae rows, short", "gae rows, long"]


def compiled(arguments: str) -> dict[str, dict]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(CACHE)
    command = [sys.executable, str(CUBINS), *arguments.split()]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return {line["name"]: line for line in map(json.loads, done.stdout.splitlines())}


@pytest.fixture(scope="module", params=ARCHITECTURES)
def kernels(request) -> dict[str, dict]:
    return compiled(request.param)


def count(kernel: dict, prefix: str) -> int:
    return sum(number for opcode, number in kernel["opcodes"].items() if opcode.startswith(prefix))


def test_nothing_is_spilled(kernels, request):
    few = request.node.callspec.params["kernels"] == FEW
    assert kernels.keys() == BUDGET.keys() - (LEFT_OUT if few else set())
    for name, kernel in kernels.items():
        allowed = SPILLED | SPILLED_ON.get(kernel["architecture"], {})
        allowed |= SPILLED_BESIDE_HMMA if count(kernel, "HMMA") else {}
        assert kernel["stack"] <= allowed.get(name, 0), name
        assert count(kernel, "LDL") + count(kernel, "STL") <= allowed.get(name, 0) // 4, name


def test_registers_and_shared_memory_are_within_budget(kernels):
    for name, kernel in kernels.items():
        registers, shared = BUDGET[name]
        assert kernel["registers"] <= registers, name
        assert kernel["shared"] <= shared, name


def test_no_minimum_or_maximum_drops_a_nan(kernels):
    """PTX's min and max return the other operand, unless they are marked .NaN. The interpreter computes with numpy,
    which returns the NaN: without a GPU no test of results shows this."""
    for name, kernel in kernels.items():
        assert [x for x in kernel["minima and maxima"] if ".NaN." not in x] == [], name


def test_a_layer_adds_its_rows_without_barriers(kernels):
    """Barriers are for the program's sums and the last program's; a sum of rows across warps would have four more."""
    for name, kernel in kernels.items():
        if name.startswith("layer back"):
            assert count(kernel, "BAR") <= (7 if name == "layer back, none" else 11), name  # that one is narrow


@pytest.mark.parametrize("name", WIDE)
def test_gae_rows_are_read_and_written_in_128_bits(kernels, name):
    kernel = kernels[name]
    rows_of_a_thread = 1 if name.endswith(("few", "several warps", "short", "long")) else 2
    # Rewards and values; advantages and returns. Codes are four bytes per lane: one 32-bit load.
    assert count(kernel, "LDG.E.128") == 2 * rows_of_a_thread
    assert count(kernel, "STG.E.128") == 2 * rows_of_a_thread
    assert count(kernel, "LDG.E.U8") == 0


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_layers_are_read_and_written_in_128_bits(kernels, name):
    forward, back = kernels[f"layer, {name}"], kernels[f"layer back, {name}"]
    # Four of a tile; one of the bias. SiLU also stores what it is given.
    assert count(forward, "LDG.E.128") == 4 + 1 and count(forward, "STG.E.128") == (8 if name == "silu" else 4)
    sums = count(back, "LDG.E.128.STRONG")
    assert count(back, "LDG.E.128") - sums == 2 * 4 and count(back, "STG.E.128") == 4


def test_gae_rows_scan_without_barrier_or_shared_memory(kernels):
    kernel = kernels["gae rows, no statistics"]
    for opcode in ("BAR", "LDS", "STS", "SHFL.BFLY"):
        assert count(kernel, opcode) == 0, opcode
    # Per row: the value and the advantage of the lane before; five steps of two operands, the last one of one.
    assert count(kernel, "SHFL") == 2 * (2 + 9)


def test_statistics_cost_a_few_barriers_and_shuffles(kernels):
    """Two sums over 32 lanes, which share the shuffles, then over 16 warps, in float64, with the count; the ticket. And
    in the last program, the sums of all."""
    own, without = kernels["gae rows"], kernels["gae rows, no statistics"]
    assert count(own, "BAR") <= 14
    assert count(own, "SHFL") - count(without, "SHFL") <= 71
    assert count(own, "MEMBAR") == count(own, "ATOMG") == 1
    before = kernels["gae rows"]["before the ticket"]
    # Until the sums are stored: the scan, the pivot's way to all warps, ten and twelve shuffles for the sums, one more.
    assert before["SHFL"] - count(without, "SHFL") <= 27
    assert before["BAR"] <= 6
    # Rows are stored while the ticket is on its way.
    assert before["STG.E.128"] == 0


def test_several_warps_exchange_little(kernels):
    """A value and two operands of a scan go from warp to warp; the statistics are those of any shape."""
    several, one = kernels["gae rows, several warps"], kernels["gae rows"]
    assert count(several, "BAR") - count(one, "BAR") <= 10
    assert count(several, "LDS") - count(one, "LDS") <= 5
    assert count(several, "LDG") - count(several, "LDG.E.128") <= 2 + 5, "one tile: no loop, no load before it is used"


def test_gae_columns_need_no_shuffle_to_scan(kernels):
    kernel = kernels["gae columns"]
    assert count(kernel, "SHFL.UP") == 0
    assert count(kernel, "LDG.E.U8") == 20, "all of a chunk's codes are loaded ahead"


def test_a_cursor_keeps_the_wide_accesses(kernels):
    assert count(kernels["gae rows, cursor"], "LDG.E.128") >= 4
    assert count(kernels["gae rows, cursor"], "STG.E.128") >= 4


def test_fields_are_loaded_before_the_first_is_stored(kernels):
    """Loads are not moved above stores: only what few programs need (pool, statistics) is loaded later."""
    for name, later in {"append": 8, "append, cursor": 8, "gather": 5, "gather, cursor": 5}.items():
        kernel = kernels[name]
        assert count(kernel, "LDG") - kernel["loads before the first store"] <= later, name


def test_the_loss_is_read_and_written_in_128_bits(kernels):
    """Two samples per thread: mean, actions, mu and sigma in, the gradient out. Also std, twice."""
    kernel = kernels["loss"]
    assert 8 <= count(kernel, "LDG.E.128") <= 10
    assert count(kernel, "STG.E.128") == 2
    assert kernel["loads before the first store"] >= 8 + 2 * 5, "everything is in flight before the first result"


def test_a_step_is_loaded_before_anything_is_stored(kernels):
    """Loads are not moved above stores. Later: partial sums and, in the steps of several programs, late actions."""
    names = [name for name in kernels if name.startswith(("env step", "task", "propellers"))]
    assert len(names) >= 5
    for name in names:
        kernel = kernels[name]
        early = kernel["loads before the first store"]
        sums = count(kernel, "LDG.E.128.STRONG")
        late = 1 if name in ("env step, all options", "propellers, all options") else 0
        assert count(kernel, "LDG") - early <= sums + late, name


def test_rows_of_four_are_read_and_written_in_128_bits(kernels):
    """Attitude, last actions and actions in; attitude and last actions out."""
    assert count(kernels["env step"], "LDG.E.128") - count(kernels["env step"], "LDG.E.128.STRONG") == 3
    assert count(kernels["env step"], "STG.E.128") == 2


def test_gradients_use_tensor_cores(kernels):
    for name, kernel in kernels.items():
        if name.startswith("gradients") and name != "gradients, sum":
            assert count(kernel, "HMMA") + count(kernel, "HGMMA") >= 100, name
            assert count(kernel, "FFMA") <= 400, f"{name}: a product without tensor cores"


def test_gradients_fit_into_shared_memory(kernels):
    for name, kernel in kernels.items():
        if name.startswith("gradients") and name != "gradients, sum":
            assert kernel["shared"] <= kernel["estimated shared"] <= kernel["most shared"], name


def test_gradients_read_and_write_wide_rows_in_128_bits(kernels):
    """Weights of 128 units, and their gradients."""
    kernel = kernels["gradients" if kernels["gradients"]["architecture"] == 90 else "gradients, bfloat16"]
    assert count(kernel, "LDG.E.128") >= 32
    assert count(kernel, "STG.E.128") >= 32


def test_adam_reads_and_writes_in_128_bits(kernels):
    """Parameter, gradient and both moments in; all but the gradient out."""
    for name, accesses in {"adam": 1, "adam, wide": 4}.items():
        assert count(kernels[name], "LDG.E.128") == 4 * accesses, name
        assert count(kernels[name], "STG.E.128") == 3 * accesses, name
        assert count(kernels[f"{name}, squares"], "LDG.E.128") == accesses, name


def test_acting_multiplies_on_tensor_cores(kernels):
    for name in kernels.keys() & {"act, bfloat16", "act, discrete", "step", "step, float32"}:
        kernel = kernels[name]
        assert sum(count(kernel, opcode) for opcode in ("HMMA", "HGMMA", "UTCHMMA")) >= 56, name
        assert count(kernel, "LDG.E.128") >= 32, f"{name}: the hidden layers' weights are read in 128 bits"
        assert count(kernel, "STG.E.128") >= 2, f"{name}: actions and means of contiguous tensors are written so"
