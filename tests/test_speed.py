"""The native CPU kernels against a memcpy of the same bytes, in one process. A mistake (an extra copy, a lost vector
loop, a page fault per page) would multiply this ratio. The limits are two and a half to four times what a quiet machine
measured; times are in docs/benchmarks.md.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch

import pydrone
from pydrone.buffer import RolloutBuffer

N, T, OBS, ACTIONS = 4096, 50, 17, 4
ROW = 4 * (OBS + 3 * ACTIONS + 2)  # bytes of a sample's observation, action, mean, std, log-probability and value

pytestmark = pytest.mark.skipif(pydrone.backends()["cpu"] is not None, reason=f"cpu: {pydrone.backends()['cpu']}")


@pytest.fixture(scope="module")
def steps() -> list[dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    shapes = {"obs": (OBS,), "actions": (ACTIONS,), "mu": (ACTIONS,), "sigma": (ACTIONS,)}
    scalars = dict.fromkeys(("rewards", "values", "log_probs"), ())
    return [
        {name: torch.randn(N, *shape) for name, shape in (shapes | scalars).items()} | {"dones": torch.rand(N) < 0.01}
        for _ in range(T)
    ]


@pytest.fixture(scope="module")
def buf(steps) -> RolloutBuffer:
    buf = RolloutBuffer(N, T, OBS, ACTIONS, fields={"mu": ACTIONS, "sigma": ACTIONS})
    fill(buf, steps)
    buf.compute_gae(torch.zeros(N))
    return buf


def fill(buf: RolloutBuffer, steps: list[dict[str, torch.Tensor]]) -> None:
    buf.clear()
    for step in steps:
        buf.append(**step)


def best(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def ratio(call: Callable[[], object], nbytes: int) -> float:
    """The call's best time over that of a memcpy that reads and writes ``nbytes`` in total; runs alternate."""
    source, target = torch.ones(nbytes // 8), torch.ones(nbytes // 8)
    ours, copies = [], []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # other processes on a second core would distort the measurement
    try:
        for _ in range(25):
            ours.append(best(call))
            copies.append(best(lambda: target.copy_(source)))
    finally:
        torch.set_num_threads(threads)
    return min(ours) / min(copies)


def test_gae(buf):
    # Per sample 9 bytes are read and 8 written. Measured: 2.2.
    assert ratio(lambda: buf.compute_gae(torch.zeros(N)), 17 * N * T) < 8


@pytest.mark.parametrize("order, most", [("[T, N]", 8), ("[N, T]", 16)])
def test_gae_of_ones_own_tensors(order, most):
    # Measured: 2.9 and 6.5.
    shape = (T, N) if order == "[T, N]" else (N, T)
    rewards, values, dones = torch.randn(shape), torch.randn(shape), torch.rand(shape) < 0.01
    out, last = (torch.empty(shape), torch.empty(shape)), torch.zeros(N)
    time_dim = 0 if order == "[T, N]" else 1
    assert ratio(lambda: pydrone.gae(rewards, values, dones, last, time_dim=time_dim, out=out), 17 * N * T) < most


def test_append(steps):
    # Measured: 2.3.
    buf = RolloutBuffer(N, T, OBS, ACTIONS, fields={"mu": ACTIONS, "sigma": ACTIONS})
    assert ratio(lambda: fill(buf, steps), 2 * (ROW + 5) * N * T) < 8


@pytest.mark.parametrize("reuse", [False, True])
def test_minibatches(buf, reuse):
    # Includes advantages and returns. Measured: 2.3.
    assert ratio(lambda: [None for _ in buf.minibatches(4, reuse=reuse)], 2 * (ROW + 8) * N * T) < 8


def test_the_call_of_a_small_step():
    # Against one copy_ for each of the eight fields. Measured: 0.83.
    shapes = {"obs": (OBS,), "actions": (ACTIONS,), "mu": (ACTIONS,), "sigma": (ACTIONS,)}
    step = {name: torch.randn(8, *shape) for name, shape in shapes.items()}
    step |= {name: torch.randn(8) for name in ("rewards", "values", "log_probs", "dones")}
    storage = {name: torch.zeros(100, *x.shape) for name, x in step.items()}
    buf = RolloutBuffer(8, 100, OBS, ACTIONS, fields={"mu": ACTIONS, "sigma": ACTIONS})

    def copies() -> None:
        for t in range(100):
            for name, x in step.items():
                storage[name][t].copy_(x)

    times = [(best(lambda: fill(buf, [step] * 100)), best(copies)) for _ in range(25)]
    assert min(x for x, _ in times) / min(y for _, y in times) < 2.5
