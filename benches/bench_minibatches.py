"""An epoch of four shuffled minibatches of everything that PPO learns from: 132 bytes a sample."""

from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.benchmark(group="minibatch epoch")

NUM_MINIBATCHES = 4


@pytest.mark.parametrize("reuse", [True, False], ids=["reuse", "fresh"])
def test_pydrone(benchmark, filled, data, reuse):
    """A permutation of its own for every epoch; advantages normalised on the way."""

    def epoch() -> None:
        for _ in filled.minibatches(NUM_MINIBATCHES, reuse=reuse):
            pass

    benchmark(epoch)
    samples = data.obs.transpose(0, 1).flatten(0, 1)
    seen = []
    for mb in filled.minibatches(NUM_MINIBATCHES, reuse=reuse):
        assert torch.equal(mb.obs, samples[mb.indices])
        seen.append(mb.indices)
    assert torch.equal(torch.cat(seen).sort().values, torch.arange(len(samples)))


def test_index_select(benchmark, data):
    """One randperm and ``index_select(out=)`` a field: what can be written by hand without a kernel."""
    total = data.num_envs * data.num_steps
    names = ("obs", "actions", "values", "log_probs", "mu", "sigma", "rewards", "rewards")
    fields = [getattr(data, name).flatten(0, 1) for name in names]
    size = total // NUM_MINIBATCHES
    outputs = [torch.empty(size, *x.shape[1:]) for x in fields]

    def epoch() -> None:
        indices = torch.randperm(total)
        for i in range(NUM_MINIBATCHES):
            for x, out in zip(fields, outputs):
                torch.index_select(x, 0, indices[i * size : (i + 1) * size], out=out)

    benchmark(epoch)


def test_rsl_rl(benchmark, rsl_rl_filled):
    """rsl_rl's generator, whose one permutation serves all epochs: here it is made for one."""

    def epoch() -> None:
        for _ in rsl_rl_filled.mini_batch_generator(NUM_MINIBATCHES, num_epochs=1):
            pass

    benchmark(epoch)


def test_memcpy(benchmark, data):
    """The same bytes in one copy."""
    source = torch.zeros(data.num_envs * data.num_steps * 132, dtype=torch.uint8)
    target = torch.empty_like(source)
    benchmark(target.copy_, source)
