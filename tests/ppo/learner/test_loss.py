"""The losses: cases worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

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


@pytest.mark.parametrize("log_ratio", [100.0, 1e30, math.inf])
@pytest.mark.parametrize(("advantage", "expected"), [(1.0, -1.2), (0.0, 0.0), (1e-39, -1.2e-39)])
def test_a_ratio_that_overflows_is_clipped_like_any_other(log_ratio, advantage, expected):
    """Without a gradient, as at any ratio above the range; the unclipped product's would be inf * 0."""
    new = torch.tensor([log_ratio], requires_grad=True)
    result = loss.surrogate_loss(new, torch.zeros(1), torch.tensor([advantage]), 0.2)
    result.backward()
    assert result.item() == pytest.approx(expected) and new.grad.item() == 0


@pytest.mark.parametrize(
    ("log_ratio", "advantage"), [(math.nan, 0.0), (math.nan, -1.0), (0.0, math.nan), (1e3, math.nan)]
)
def test_surrogate_shows_what_is_not_a_number(log_ratio, advantage):
    result = loss.surrogate_loss(torch.tensor([log_ratio]), torch.zeros(1), torch.tensor([advantage]), 0.2)
    assert result.isnan()


def test_a_ratio_that_overflows_shows_where_it_counts():
    """With a negative advantage the loss is the unclipped product, and infinite."""
    assert loss.surrogate_loss(torch.tensor([100.0]), torch.zeros(1), torch.tensor([-1.0]), 0.2).item() == math.inf


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
