"""The Gaussian policy, against torch.distributions and by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Normal

from pydrone.ppo.policy.actor_critic import MIN_STD, ActorCritic


def make(obs=17, actions=4, **kwargs) -> ActorCritic:
    torch.manual_seed(0)
    return ActorCritic(obs, actions, **kwargs)


def plain_mlp(state: dict, name: str, x: torch.Tensor) -> torch.Tensor:
    """The network from its state_dict alone, without the module's code."""
    for layer in (0, 2):
        x = torch.tanh(x @ state[f"{name}.{layer}.weight"].T + state[f"{name}.{layer}.bias"])
    return x @ state[f"{name}.4.weight"].T + state[f"{name}.4.bias"]


def test_state_dict_is_two_plain_perceptrons_and_a_std():
    shapes = {name: tuple(x.shape) for name, x in make().state_dict().items()}
    layers = {"0.weight": (128, 17), "0.bias": (128,), "2.weight": (128, 128), "2.bias": (128,)}
    expected = {"std_param": (4,)}
    for name, outputs in (("actor", 4), ("critic", 1)):
        expected |= {f"{name}.{layer}": shape for layer, shape in layers.items()}
        expected |= {f"{name}.4.weight": (outputs, 128), f"{name}.4.bias": (outputs,)}
    assert shapes == expected


def test_networks_compute_what_their_weights_say():
    policy, obs = make(), torch.randn(50, 17)
    state = policy.state_dict()
    torch.testing.assert_close(policy.mean(obs), plain_mlp(state, "actor", obs))
    torch.testing.assert_close(policy.value(obs), plain_mlp(state, "critic", obs).squeeze(1))
    torch.testing.assert_close(policy(obs), policy.mean(obs))


def test_gradients_through_the_in_place_tanh_are_right():
    policy = make(obs=3, actions=2, hidden_dims=(8, 8)).double()
    obs, actions = torch.randn(5, 3).double(), torch.randn(5, 2).double()

    def outputs(*parameters):
        names = [name for name, _ in policy.named_parameters()]
        new = torch.func.functional_call(policy, dict(zip(names, parameters)), (obs,))
        return new, actions.sum()

    parameters = [p.detach().clone().requires_grad_() for p in policy.parameters()]
    assert torch.autograd.gradcheck(lambda *p: outputs(*p)[0], parameters)


def test_act_is_consistent_with_torch_distributions_and_with_evaluate():
    policy, obs = make(init_std=0.7), torch.randn(64, 17)
    step = policy.act(obs)
    normal = Normal(step.mean, step.std)
    torch.testing.assert_close(step.log_probs, normal.log_prob(step.actions).sum(-1))
    new = policy.evaluate(obs, step.actions)
    for name in ("log_probs", "values", "mean"):
        torch.testing.assert_close(getattr(step, name), getattr(new, name))
    assert torch.equal(step.std, new.std.expand(64, 4)) and not step.actions.requires_grad
    assert step.std.stride(0) == 0, "the standard deviation is one row, not N"


def test_actions_have_the_mean_and_the_std_they_are_given():
    policy = make(obs=2, actions=3)
    with torch.no_grad():
        policy.std_param.copy_(torch.tensor([0.1, 1.0, 3.0]))
    obs = torch.zeros(100_000, 2)
    noise = policy.act(obs).actions - policy.mean(obs)
    # Four standard errors.
    assert (noise.mean(0).abs() < 4 * policy.std / math.sqrt(1e5)).all()
    assert ((noise.std(0) / policy.std - 1).abs() < 4 / math.sqrt(2e5)).all()


def test_std_does_not_fall_to_zero():
    policy = make(obs=2, actions=2)
    with torch.no_grad():
        policy.std_param.copy_(torch.tensor([-1.0, 0.5]))
    assert policy.std.tolist() == pytest.approx([MIN_STD, 0.5])
    assert policy.act(torch.zeros(3, 2)).log_probs.isfinite().all()


def test_initialisation_is_that_of_torch():
    policy = make()
    torch.manual_seed(0)
    layer = torch.nn.Linear(17, 128)
    assert torch.equal(policy.actor[0].weight, layer.weight) and torch.equal(policy.actor[0].bias, layer.bias)
    assert policy.std.tolist() == [1.0] * 4


def test_observations_by_group():
    policy = make(obs={"policy": 3, "critic": (5,)}, actions=2)
    obs = {"policy": torch.randn(4, 3), "critic": torch.randn(4, 5)}
    state = policy.state_dict()
    step = policy.act(obs)
    torch.testing.assert_close(step.mean, plain_mlp(state, "actor", obs["policy"]))
    torch.testing.assert_close(step.values, plain_mlp(state, "critic", obs["critic"]).squeeze(1))
    alone = make(obs={"policy": 3}, actions=2)
    assert alone.value({"policy": obs["policy"]}).shape == (4,)


@pytest.mark.parametrize(
    "obs",
    [
        {"policy": ((3,), torch.float32), "critic": ((5,), torch.float32)},  # as the adapters give them
        {"policy": (3, torch.uint8), "critic": ((5,), torch.float16)},
    ],
)
def test_groups_with_dtypes_have_the_width_of_their_shape(obs):
    policy = make(obs=obs, actions=2)
    assert policy.actor[0].weight.shape == (128, 3) and policy.critic[0].weight.shape == (128, 5)
    step = policy.act(
        {name: torch.ones(4, width, dtype=obs[name][1]) for name, width in (("policy", 3), ("critic", 5))}
    )
    assert step.mean.shape == (4, 2) and step.values.dtype == torch.float32


@pytest.mark.parametrize(
    ("obs", "message"),
    [
        ({"state": 3}, r"obs: expected a group named 'policy', got \['state'\]"),
        ((3, 64, 64), r"got shape \[3, 64, 64\]"),
        ({"policy": ((8, 8), torch.uint8)}, r"got shape \[8, 8\]"),
    ],
)
def test_observations_that_do_not_fit(obs, message):
    with pytest.raises(ValueError, match=message):
        make(obs=obs)
