"""GAE over a whole rollout: advantages, returns and statistics."""

from __future__ import annotations

import pytest
import torch
from conftest import GAMMA, LAM, close, rsl_rl_returns

import pydrone

pytestmark = pytest.mark.benchmark(group="gae")


def torch_loop(rewards, values, dones, last_values, advantages, returns) -> tuple[torch.Tensor, torch.Tensor]:
    """What one writes by hand, on [T, N]: a step's tensor operations, T times."""
    running = 1.0 - dones.float()
    carry, next_values = torch.zeros_like(last_values), last_values
    for t in reversed(range(rewards.shape[0])):
        delta = rewards[t] + GAMMA * next_values * running[t] - values[t]
        carry = delta + GAMMA * LAM * running[t] * carry
        advantages[t] = carry
        next_values = values[t]
    torch.add(advantages, values, out=returns)
    std, mean = torch.std_mean(advantages)
    return mean, std


def test_pydrone_buffer(benchmark, filled, data):
    """In the buffer's own storage, the statistics included."""
    advantages, returns = torch.empty_like(data.rewards), torch.empty_like(data.rewards)
    mean, std = torch_loop(data.rewards, data.values, data.dones, data.last_values, advantages, returns)
    benchmark(filled.compute_gae, data.last_values, GAMMA, LAM)
    count, ours, m2 = filled.statistics.tolist()
    assert close(filled.advantages.t(), advantages) and close(filled.returns.t(), returns)
    assert abs(ours - mean) < 1e-5 and abs((m2 / (count - 1)) ** 0.5 - std) < 1e-4


@pytest.mark.parametrize("time_dim", [0, 1])
def test_pydrone_gae(benchmark, data, time_dim):
    """The function, on a caller's [T, N] or contiguous [N, T] tensors."""
    tensors = [data.rewards, data.values, data.dones]
    tensors = [x if time_dim == 0 else x.t().contiguous() for x in tensors]
    out = torch.empty_like(tensors[0]), torch.empty_like(tensors[0])
    expected = torch.empty_like(data.rewards), torch.empty_like(data.rewards)
    torch_loop(data.rewards, data.values, data.dones, data.last_values, *expected)
    benchmark(pydrone.gae, *tensors, data.last_values, GAMMA, LAM, time_dim=time_dim, out=out)
    assert all(close(x if time_dim == 0 else x.t(), y) for x, y in zip(out, expected))


def test_torch_loop(benchmark, data):
    out = torch.empty_like(data.rewards), torch.empty_like(data.rewards)
    benchmark(torch_loop, data.rewards, data.values, data.dones, data.last_values, *out)


def test_rsl_rl(benchmark, rsl_rl_filled, filled, data):
    """rsl_rl's loop, which normalises too."""
    benchmark(rsl_rl_returns, rsl_rl_filled, data.last_values)
    assert close(filled.returns.t(), rsl_rl_filled.returns.squeeze(2))


def test_memcpy(benchmark, data):
    """The bytes that the operation has to move (17 a sample), copied: the bound of any implementation."""
    source = torch.zeros(data.num_envs * data.num_steps * 17 // 2, dtype=torch.uint8)
    target = torch.empty_like(source)
    benchmark(target.copy_, source)
