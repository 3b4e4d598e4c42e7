"""The loss's formulas: cases worked out by hand, then torch.distributions as the oracle."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from pydrone.ppo.learner import loss


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected", "gradient"),
    [
        # ratio within 0.8 .. 1.2: -ratio * A; d/d log_prob is the same
        (1.1, 2.0, -2.2, -2.2),
        (0.9, -2.0, 1.8, 1.8),
        # A > 0 and ratio above the range: held at 1.2, no gradient
        (1.5, 2.0, -2.4, 0.0),
        # A > 0 and ratio below the range: the unclipped one is the smaller gain
        (0.5, 2.0, -1.0, -1.0),
        # A < 0 and ratio below the range: held at 0.8, no gradient
        (0.5, -2.0, 1.6, 0.0),
        # A < 0 and ratio above the range: the unclipped one is the larger loss
        (1.5, -2.0, 3.0, 3.0),
    ],
)
def test_surrogate_by_hand(ratio, advantage, expected, gradient):
    old = torch.tensor([-0.3], dtype=torch.float64)
    new = (old + math.log(ratio)).requires_grad_()
    result = loss.surrogate_loss(new, old, torch.tensor([advantage], dtype=torch.float64), 0.2)
    result.backward()
    assert result.item() == pytest.approx(expected) and new.grad.item() == pytest.approx(gradient)


def test_surrogate_is_a_mean():
    ratios, advantages = torch.tensor([1.5, 0.5, 1.1]), torch.tensor([2.0, -2.0, 2.0])
    result = loss.surrogate_loss(ratios.log(), torch.zeros(3), advantages, 0.2)
    assert result.item() == pytest.approx((-2.4 + 1.6 - 2.2) / 3)


@pytest.mark.parametrize(
    ("value", "old", "target", "expected", "gradient"),
    [
        # moved by 0.1, within the clip of 0.2: the squared error, 0.4^2
        (1.1, 1.0, 1.5, 0.16, -0.8),
        # moved up by 0.5 towards the target: held at 1.2, whose error 0.8 is the larger; no gradient
        (1.5, 1.0, 2.0, 0.64, 0.0),
        # moved up by 0.5 past the target: its own error 1.5 is larger than that of 1.2; no clip
        (1.5, 1.0, 0.0, 2.25, 3.0),
        # moved down by 0.5 towards the target: held at 0.8, whose error is 0.8; no gradient
        (0.5, 1.0, 0.0, 0.64, 0.0),
        # moved down by 0.5 away from the target: its own error, 1.5
        (0.5, 1.0, 2.0, 2.25, -3.0),
    ],
)
def test_clipped_value_loss_by_hand(value, old, target, expected, gradient):
    values = torch.tensor([value], dtype=torch.float64, requires_grad=True)
    old, target = torch.tensor([old], dtype=torch.float64), torch.tensor([target], dtype=torch.float64)
    result = loss.value_loss(values, old, target, 0.2)
    result.backward()
    assert result.item() == pytest.approx(expected) and values.grad.item() == pytest.approx(gradient)


def test_plain_value_loss():
    result = loss.value_loss(torch.tensor([1.0, 4.0]), torch.zeros(2), torch.tensor([2.0, 2.0]), None)
    assert result.item() == pytest.approx((1 + 4) / 2)


def test_kl_by_hand():
    """Old N(1, 1), new N(0, 2): log 2 + (1 + 1) / 8 - 1/2. A mean over samples, a sum over dimensions."""
    one = math.log(2) + 0.25 - 0.5
    mean, std = torch.zeros(3, 1), torch.tensor([2.0])
    assert loss.gaussian_kl(torch.ones(3, 1), torch.ones(3, 1), mean, std).item() == pytest.approx(one)
    old_mean = torch.tensor([[1.0, 1.0], [1.0, 1.0]])
    assert loss.gaussian_kl(old_mean, torch.ones(2, 2), torch.zeros(2, 2), std.expand(2)).item() == pytest.approx(
        2 * one
    )
    # reversed, it is another number
    back = loss.gaussian_kl(torch.zeros(3, 1), torch.full((3, 1), 2.0), torch.ones(3, 1), torch.ones(1)).item()
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
        loss.gaussian_kl(old_mean, old_std, mean, std), kl_divergence(old, new).sum(-1).mean(), rtol=1e-12, atol=0
    )
    if not state_dependent:
        per_dim = loss.gaussian_kl(old_mean, old_std[0], mean, std)
        torch.testing.assert_close(per_dim, kl_divergence(old, new).sum(-1).mean(), rtol=1e-12, atol=0)
    torch.testing.assert_close(loss.gaussian_log_prob(actions, mean, std), new.log_prob(actions).sum(-1))
    torch.testing.assert_close(loss.gaussian_entropy(std), new.entropy().sum(-1)[0])


def test_kl_of_a_policy_with_itself_is_zero():
    mean, std = torch.randn(1000, 4), torch.rand(4) + 0.5
    assert loss.gaussian_kl(mean, std.expand(1000, 4), mean, std).abs().item() < 1e-5
