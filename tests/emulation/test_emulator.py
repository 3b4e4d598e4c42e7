"""The emulation itself: correct kernels compute, and the mistakes in mistakes/cuda/mistakes.cu are detected."""

from __future__ import annotations

import cuda_on_cpu
import pytest
import torch

SOURCES = cuda_on_cpu.Path(__file__).with_name("mistakes")
MISTAKES = cuda_on_cpu.FOLDER.with_name(f"{cuda_on_cpu.FOLDER.name}-mistakes")
X = torch.arange(64.0)
NAN = float("nan")
REVERSE, NO_BARRIER, SUM, LANE_GONE, TWO_SHUFFLES, ONE_WARP, HALF_A_MASK, TICKETS, SHARED, GRID = range(10)
AGAIN, OVERTAKEN = 10, 11


@pytest.fixture(scope="module")
def run(operations):
    library = torch.library.Library("pydrone_emulated", "FRAGMENT")
    library.define("mistake(int kind, Tensor x, Tensor(a!) out) -> ()")
    torch.ops.load_library(str(cuda_on_cpu.build(MISTAKES, SOURCES)))

    def call(kind: int) -> torch.Tensor:
        out = torch.full((64,), NAN)
        torch.ops.pydrone_emulated.mistake(kind, X, out)
        return out

    yield call
    del library


def test_correct_kernels(run):
    assert torch.equal(run(REVERSE), X.flip(0))
    assert run(SUM).tolist() == [31 * 16.0] * 32 + [31 * 16.0 + 32 * 32.0] * 32


def test_a_missing_barrier_reads_nan(run):
    assert run(NO_BARRIER).isnan().any()


def test_what_a_warp_overwrites_too_early_shows(run):
    assert all(torch.equal(run(AGAIN), X) for _ in range(20))
    assert any(not torch.equal(run(OVERTAKEN), X) for _ in range(20))


@pytest.mark.parametrize(
    "kind, message",
    [
        (LANE_GONE, "wait for each other: 62 at __shfl_xor_sync, 2 at the end"),
        (TWO_SHUFFLES, "wait for each other: 32 at __shfl_sync, 32 at __shfl_up_sync"),
        (ONE_WARP, "wait for each other: 1 at __shfl_sync, 32 at __syncthreads, 31 at the end"),
        (HALF_A_MASK, "__shfl_sync: expected all lanes"),
        (SHARED, "49408 bytes of shared memory, expected 49152 at most"),
        (GRID, "launch: invalid"),
    ],
)
def test_what_would_hang_or_fail_on_a_gpu_is_an_error(kind, message, run):
    with pytest.raises(RuntimeError, match=message):
        run(kind)
    assert torch.equal(run(REVERSE), X.flip(0))  # the next launch is unaffected


def test_the_order_of_blocks_changes_each_time(run):
    first, second = run(TICKETS), run(TICKETS)
    assert sorted(first.tolist()) == X.tolist() and not torch.equal(first, X) and not torch.equal(first, second)


def test_cuda_syntax_without_a_rule_is_refused():
    assert cuda_on_cpu.rewritten("f<<<a, b, 0, s>>>(x); // <<<") == "emulated::launch(f, a, b, 0, s, x); // <<<"
    for text in ("__shared__ alignas(16) float x[4];", 'asm volatile("x");'):
        with pytest.raises(ValueError, match="no rule rewrites"):
            cuda_on_cpu.rewritten(text)
