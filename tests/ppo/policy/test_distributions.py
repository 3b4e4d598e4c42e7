"""The Gaussian's formulas: cases worked out by hand, then torch.distributions as the oracle."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from pydrone.ppo.policy.distributions import gaussian_entropy, gaussian_kl, gaussian_log_prob


def test_kl_by_hand():
    """Old N(1, 1), new N(0, 2): log 2 + (1 + 1) / 8 - 1/2. A mean over samples, a sum over dimensions."""
    one = math.log(2) + 0.25 - 0.5
    mean, std = torch.zeros(3, 1), torch.tensor([2.0])
    assert gaussian_kl(torch.ones(3, 1), torch.ones(3, 1), mean, std).item() == pytest.approx(one)
    old_mean = torch.tensor([[1.0, 1.0], [1.0, 1.0]])
    assert gaussian_kl(old_mean, torch.ones(2, 2), torch.zeros(2, 2), std.expand(2)).item() == pytest.approx(2 * one)
    # reversed, it is another number
    back = gaussian_kl(torch.zeros(3, 1), torch.full((3, 1), 2.0), torch.ones(3, 1), torch.ones(1)).item()
    assert back == pytest.approx(-math.log(2) + (4 + 1) / 2 - 0.5)


@pytest.mark.parametrize("state_dependent", [False, True])
def test_gaussians_against_torch_distributions(state_dependent):
    torch.manual_seed(0)
    batch, dims = 200, 4
    old_mean, mean, actions = torch.randn(3, batch, dims, dtype=torch.float64)
    std = torch.rand(dims, dtype=torch.float64) + 0.2
    old_std = torch.rand(batch if state_dependent else 1, dims, dtype=torch.float64).expand(batch, dims) + 0.2
    old, new = Normal(old_mean, old_std), Normal(mean, std)
    torch.testing.assert_close(
        gaussian_kl(old_mean, old_std, mean, std),
        kl_divergence(old, new).sum(-1).mean(),
        rtol=1e-12,
        atol=0,
    )
    if not state_dependent:
        per_dim = gaussian_kl(old_mean, old_std[0], mean, std)
        torch.testing.assert_close(per_dim, kl_divergence(old, new).sum(-1).mean(), rtol=1e-12, atol=0)
    torch.testing.assert_close(gaussian_log_prob(actions, mean, std), new.log_prob(actions).sum(-1))
    torch.testing.assert_close(gaussian_entropy(std), new.entropy().sum(-1)[0])


def test_kl_of_a_policy_with_itself_is_zero():
    mean, std = torch.randn(1000, 4), torch.rand(4) + 0.5
    assert gaussian_kl(mean, std.expand(1000, 4), mean, std).abs().item() < 1e-5
