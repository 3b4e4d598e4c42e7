"""Non-default streams, DLPack and deterministic algorithms on a GPU."""

from __future__ import annotations

import pytest
import torch
from rollout_model import random_step
from torch import Tensor

import pydrone
from pydrone import RolloutBuffer

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

pytestmark = pytest.mark.gpu


def iteration(buf: RolloutBuffer, steps: list[dict[str, Tensor]], last: Tensor) -> list[Tensor]:
    for step in steps:
        buf.append(**step)
    buf.compute_gae(last)
    out = [buf.advantages.clone(), buf.returns.clone(), buf.statistics.clone()]
    for mb in buf.minibatches(4, 2):
        out += [mb.obs, mb.advantages, mb.returns, mb.indices]
    buf.clear()
    return out


def test_two_buffers_on_two_streams_do_not_interfere(backend):
    """Each buffer has its own workspace: running both at once on two streams gives the same results as each alone."""
    bufs = [RolloutBuffer(4096, 20, obs=17, actions=4, seed=i, backend=backend) for i in range(2)]
    given = [[random_step(buf) for _ in range(20)] for buf in bufs]
    last = torch.randn(4096)
    alone = [[iteration(*x, last) for _ in range(3)] for x in zip(bufs, given, strict=True)]
    bufs = [RolloutBuffer(4096, 20, obs=17, actions=4, seed=i, backend=backend) for i in range(2)]
    streams = [torch.cuda.Stream() for _ in bufs]
    torch.cuda.synchronize()
    together: list[list] = [[], []]
    for _ in range(3):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                together[i].append(iteration(bufs[i], given[i], last))
    torch.cuda.synchronize()
    for ours, theirs in zip(together, alone, strict=True):
        for x, y in zip(ours, theirs, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(x, y, strict=True))


def test_deterministic_algorithms(backend):
    rewards, values, last = torch.randn(70, 9), torch.randn(70, 9), torch.randn(70)
    expected = pydrone.gae(rewards, values, rewards > 1, last, stats=True, backend=backend)
    torch.use_deterministic_algorithms(True)
    try:
        found = pydrone.gae(rewards, values, rewards > 1, last, stats=True, backend=backend)
        buf = RolloutBuffer(70, 2, obs=3, actions=2, capacity=3, backend=backend)
        for _ in range(3):
            for _ in range(2):
                buf.append(**random_step(buf), truncated=torch.ones(70))
            buf.compute_gae(torch.zeros(70), final_values=torch.ones(70, 2))
            assert len(list(buf.minibatches(2))) == 2
            buf.clear()
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def test_dlpack_views_show_the_rollout(backend):
    buf = RolloutBuffer(70, 2, obs=3, actions=2, backend=backend)
    steps = [random_step(buf) for _ in range(4)]
    for step in steps[:2]:
        buf.append(**step)
    view = torch.from_dlpack(buf.obs)
    assert view.data_ptr() == buf.obs.data_ptr()
    buf.clear()
    for step in steps[2:]:
        buf.append(**{name: torch.from_dlpack(x) for name, x in step.items()})
    assert torch.equal(view[:, 1], steps[3]["obs"])
