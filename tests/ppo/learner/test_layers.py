"""Networks layer by layer: the same outputs and gradients as torch's own layers. On a CPU the operations between the
products run the reference; tests/ops has their kernels."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from pydrone.ops.schema import ACTIVATIONS
from pydrone.ppo.learner.layers import Layers
from pydrone.ppo.learner.networks import Unsupported
from pydrone.ppo.policy.actor_critic import mlp


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("hidden", [(), (5,), (160, 33, 8)], ids=str)
def test_equal_to_torchs_layers(hidden, activation):
    network = mlp(7, 3, hidden, activation)
    wide, x, grad = copy.deepcopy(network).double(), torch.randn(20, 7), torch.randn(20, 3)
    expected = wide(x.double())
    expected.backward(grad.double())
    found = Layers("float32")(network, x)
    found.backward(grad)
    torch.testing.assert_close(found.double(), expected)
    for ours, theirs in zip(network.parameters(), wide.parameters(), strict=True):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-4, atol=1e-5)


def test_inputs_and_parameters_that_want_no_gradient_get_none():
    network, x = mlp(4, 2, (6,)), torch.randn(5, 4, requires_grad=True)
    network[0].weight.requires_grad_(False)
    Layers("float32")(network, x).sum().backward()
    assert network[0].weight.grad is None and network[0].bias.grad is not None
    expected = torch.autograd.grad(network(x).sum(), x)[0]
    torch.testing.assert_close(x.grad, expected)


def test_factors_are_rounded_to_bfloat16_and_sums_are_not():
    network, x = nn.Linear(64, 1), torch.rand(3, 64)
    found = Layers("bfloat16")(network, x)
    rounded = x.bfloat16().double() @ network.weight.bfloat16().double().t() + network.bias.double()
    torch.testing.assert_close(found.double(), rounded, rtol=1e-6, atol=1e-6)
    assert (found.double() - network(x).double()).abs().max() > 1e-5


def test_other_networks_are_refused():
    with pytest.raises(Unsupported, match=r"network: expected a Linear layer with a bias in place 0"):
        Layers("float32")(nn.Sequential(nn.Linear(3, 1, bias=False)), torch.zeros(1, 3))
