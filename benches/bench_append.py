"""Storing a rollout step by step, with the old mean and std of the policy: 124 bytes a sample and the done flag."""

from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.benchmark(group="append")


def test_pydrone(benchmark, buffer, data):
    steps = [data.step(t) for t in range(data.num_steps)]

    def rollout() -> None:
        buffer.clear()
        for step in steps:
            buffer.append(**step)

    benchmark(rollout)
    assert torch.equal(buffer.obs, data.obs.transpose(0, 1)) and torch.equal(buffer["mu"], data.mu.transpose(0, 1))
    assert torch.equal(buffer.rewards, data.rewards.t()) and torch.equal(buffer.dones.bool(), data.dones.t())


def test_copies(benchmark, data):
    """A ``copy_`` a field and step into preallocated [T, N, ...] tensors."""
    fields = data.step(0)
    storage = {name: torch.zeros(data.num_steps, *x.shape, dtype=x.dtype) for name, x in fields.items()}
    steps = [data.step(t) for t in range(data.num_steps)]

    def rollout() -> None:
        for t, step in enumerate(steps):
            for name, x in step.items():
                storage[name][t].copy_(x)

    benchmark(rollout)
    assert torch.equal(storage["obs"], data.obs)


def test_rsl_rl(benchmark, rsl_rl_storage, data):
    storage, transitions = rsl_rl_storage

    def rollout() -> None:
        storage.clear()
        for transition in transitions:
            storage.add_transition(transition)

    benchmark(rollout)
    assert torch.equal(storage.observations["policy"], data.obs)


def test_memcpy(benchmark, data):
    """The same bytes in one copy."""
    source = torch.zeros(data.num_envs * data.num_steps * 129, dtype=torch.uint8)
    target = torch.empty_like(source)
    benchmark(target.copy_, source)
