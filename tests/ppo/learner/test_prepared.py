"""FusedUpdate and FusedAct: discrete actions, both value losses, networks that change. See test_fused.py."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from test_fused import batch, network
from torch import nn
from torch.distributions import Categorical, Normal

from pydrone.ops import native
from pydrone.ppo import FusedAct, FusedUpdate, fused_update
from pydrone.ppo.learner.networks import Unsupported
from pydrone.ppo.learner.prepared import check_shapes
from pydrone.ppo.policy.normalization import RunningMoments

pytestmark = pytest.mark.skipif(native.CPU_MISSING is not None, reason=f"no native library: {native.CPU_MISSING}")

METRICS = ("surrogate", "value", "entropy", "kl", "approx_kl", "clip_fraction")


def heads(logits, categories):
    """torch's distribution of each action."""
    return [Categorical(logits=x) for x in logits.split(list(categories), dim=1)]


def discrete(size, categories, width=5):
    given = batch(size, (width, width), len(categories))
    del given["critic_obs"], given["mu"], given["sigma"]
    given["actions"] = torch.stack([torch.randint(0, x, (size,)) for x in categories], 1)
    given["log_probs"] = -torch.tensor([float(x) for x in categories]).log().sum() + torch.randn(size) * 0.3
    return given


def by_autograd(
    actor, critic, categories, given, *, entropy_coef=0.0, value_clip=None, value_max=True, dtype=torch.float64
):
    """As Stable-Baselines3 computes it. Gradients, and METRICS without KL."""
    actor, critic = copy.deepcopy(actor).to(dtype), copy.deepcopy(critic).to(dtype)
    x = {name: y if name == "actions" else y.to(dtype) for name, y in given.items()}
    found = heads(actor(x["obs"]), categories)
    new = sum(d.log_prob(x["actions"][:, i]) for i, d in enumerate(found))
    entropy = sum(d.entropy() for d in found).mean()
    log_ratio = new - x["log_probs"]
    ratio = log_ratio.exp()
    surrogate = -torch.min(ratio * x["advantages"], ratio.clamp(0.8, 1.2) * x["advantages"]).mean()
    values = critic(x["obs"]).squeeze(-1)
    errors = (values - x["returns"]).square()
    if value_clip is not None:
        held = x["values"] + (values - x["values"]).clamp(-value_clip, value_clip)
        clipped = (held - x["returns"]).square()
        errors = torch.max(errors, clipped) if value_max else clipped
    value = errors.mean()
    (surrogate + 0.5 * value - entropy_coef * entropy).backward()
    outside = ((ratio - 1).abs() > 0.2).to(dtype).mean()
    figures = surrogate, value, entropy, (ratio - 1 - log_ratio).mean(), outside
    return [p.grad for p in (*actor.parameters(), *critic.parameters())], [y.item() for y in figures]


def check(actor, critic, categories, given, **options):
    update = FusedUpdate(actor, critic, categories=categories, value_loss_coef=0.5, **options)
    metrics = dict(zip(METRICS, update(None, **given).tolist(), strict=True))
    grads, figures = by_autograd(actor, critic, categories, given, **options)
    rounded, _ = by_autograd(actor, critic, categories, given, **options, dtype=torch.float32)
    for p, wanted, other in zip((*actor.parameters(), *critic.parameters()), grads, rounded, strict=True):
        limit = max(1e-5 * wanted.norm() + 1e-9, 4 * (other - wanted).norm())
        assert (p.grad.double() - wanted).norm() <= limit, p.shape
    assert metrics.pop("kl") != metrics["approx_kl"]  # NaN: the old distribution is not known
    assert list(metrics.values()) == pytest.approx(figures, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("categories", [(2,), (1,), (3, 2, 7), (33,), (5,) * 9])
@pytest.mark.parametrize("size", [1, 17, 128, 300])
def test_discrete_actions(size, categories):
    torch.manual_seed(size)
    actor, critic = network(5, (24, 17), sum(categories), "tanh"), network(5, (8,), 1, "tanh")
    check(actor, critic, categories, discrete(size, categories), entropy_coef=0.02)


def test_discrete_actions_by_hand():
    """Two choices with probabilities 1/4 and 3/4; the second was taken when its probability was 1/2: ratio 3/2."""
    logits = torch.tensor([0.25, 0.75]).log()
    actor, critic = nn.Linear(1, 2), nn.Linear(1, 1)
    for layer, bias in ((actor, logits), (critic, torch.tensor([1.0]))):
        nn.init.zeros_(layer.weight)
        layer.bias.data.copy_(bias)
    one = torch.ones(1)
    metrics = FusedUpdate(actor, critic, clip=1.0, categories=[2])(
        None,
        obs=torch.zeros(1, 1),
        actions=torch.tensor([[1]]),
        log_probs=torch.tensor([0.5]).log(),
        advantages=2 * one,
        returns=4 * one,
        values=one,
    )
    # -1.5 * 2; (1 - 4)^2; -(ln 1/4 + 3 ln 3/4) / 4; 0.5 - ln 1.5
    assert metrics[[0, 1, 2, 4, 5]].tolist() == pytest.approx([-3.0, 9.0, 0.5623351, 0.0945349, 0.0], abs=1e-6)
    # -2 * 1.5 * (0 - 1/4, 1 - 3/4)
    assert actor.bias.grad.tolist() == pytest.approx([0.75, -0.75], abs=1e-6)
    assert critic.bias.grad.tolist() == pytest.approx([-6.0])


@pytest.mark.parametrize("wrong", [2.0, -1.0, 0.5, float("nan")])
def test_an_action_that_is_no_choice_shows(wrong):
    torch.manual_seed(0)
    actor, critic, given = network(5, (8,), 2, "relu"), network(5, (8,), 1, "relu"), discrete(20, (2,))
    given["actions"] = given["actions"].float()
    given["actions"][7] = wrong
    metrics = FusedUpdate(actor, critic, categories=[2])(None, **given)
    assert metrics[0].isnan() and all(p.grad.isnan().any() for p in actor.parameters())
    assert metrics[1].isfinite()


@pytest.mark.parametrize(("value_clip", "value_max"), [(None, True), (0.2, True), (0.2, False), (0.0, False)])
def test_value_losses(value_clip, value_max):
    torch.manual_seed(3)
    actor, critic = network(5, (16,), 4, "elu"), network(5, (16,), 1, "elu")
    check(actor, critic, (4,), discrete(200, (4,)), value_clip=value_clip, value_max=value_max)


@pytest.mark.parametrize("num_envs", [1, 7, 130])
def test_acts_as_torchs_distributions(num_envs):
    """The same draws from the same generator."""
    torch.manual_seed(1)
    actor, critic = network(6, (16, 16), 8, "tanh"), network(6, (16,), 1, "tanh")
    obs, std = torch.randn(num_envs, 6), torch.rand(8) + 0.5
    act = FusedAct(actor, critic)
    torch.manual_seed(2)
    found = act(std, obs)
    torch.manual_seed(2)
    with torch.no_grad():
        gaussian = Normal(actor(obs), std.expand(num_envs, 8))
        actions = gaussian.sample()
        torch.testing.assert_close(found.actions, actions)
        torch.testing.assert_close(found.log_probs, gaussian.log_prob(actions).sum(1))
        torch.testing.assert_close(found.values, critic(obs).squeeze(1))
        torch.testing.assert_close(found.mean, gaussian.mean)
    categories = [3, 1, 4]
    act = FusedAct(actor, critic, categories=categories)
    for seed in range(5):
        torch.manual_seed(seed)
        found = act(None, obs)
        torch.manual_seed(seed)
        with torch.no_grad():
            each = heads(actor(obs), categories)
            choices = [x.sample() for x in each]
        assert torch.equal(found.actions, torch.stack(choices, 1).float())
        expected = sum(x.log_prob(y) for x, y in zip(each, choices, strict=True))
        torch.testing.assert_close(found.log_probs, expected)
        torch.testing.assert_close(found.mean, actor(obs).detach())


def test_follows_the_networks():
    """Weights that change, parameters and layers that are replaced."""
    torch.manual_seed(5)
    actor, critic, given = network(5, (8,), 2, "tanh"), network(5, (8,), 1, "tanh"), discrete(40, (2,))
    update, act = (
        FusedUpdate(actor, critic, categories=[2], value_loss_coef=0.5),
        FusedAct(actor, critic, categories=[2]),
    )
    for change in (
        lambda: actor[0].weight.data.mul_(2),
        lambda: setattr(actor[0], "weight", nn.Parameter(torch.randn(8, 5))),
        lambda: actor._modules.update({"0": nn.Linear(5, 8)}),
    ):
        change()
        for p in itertools.chain(actor.parameters(), critic.parameters()):
            p.grad = None
        metrics = update(None, **given)
        grads, figures = by_autograd(actor, critic, (2,), given)
        assert metrics[0].item() == pytest.approx(figures[0], rel=1e-5)
        torch.testing.assert_close(actor[0].weight.grad.double(), grads[0], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(act(None, given["obs"]).mean, actor(given["obs"]).detach())


def test_gradients_are_added_and_go_through_std():
    torch.manual_seed(6)
    actor, critic, given = network(4, (8,), 3, "silu"), network(4, (8,), 1, "silu"), batch(30, (4, 4), 3)
    log_std = torch.zeros(3, requires_grad=True)
    update = FusedUpdate(actor, critic, entropy_coef=0.1)
    first = update(log_std.exp(), **given)
    once = log_std.grad.clone(), actor[0].weight.grad.clone()
    assert torch.equal(first[2], fused_update(actor, critic, log_std.exp(), entropy_coef=0.1, **given)[2])
    torch.testing.assert_close(log_std.grad, 2 * once[0])
    torch.testing.assert_close(actor[0].weight.grad, 2 * once[1])
    assert once[0].abs().min() > 0


def test_reuse_writes_and_log_std_is_the_logarithm():
    torch.manual_seed(6)
    actor, critic, given = network(4, (8,), 3, "silu"), network(4, (8,), 1, "silu"), batch(30, (4, 4), 3)
    log_std = torch.full((3,), -0.3, requires_grad=True)
    parameters = [*actor.parameters(), *critic.parameters(), log_std]
    actor[0].bias.requires_grad_(False)
    expected = fused_update(actor, critic, log_std.exp(), entropy_coef=0.1, **given)
    once = [None if p.grad is None else p.grad.clone() for p in parameters]
    update = FusedUpdate(actor, critic, entropy_coef=0.1, log_std=True, reuse=True)
    for _ in range(2):
        metrics = update(log_std, **given)
        assert torch.equal(metrics, expected)
        for p, x in zip(parameters, once, strict=True):
            torch.testing.assert_close(p.grad, x, rtol=1e-6, atol=1e-8)
    kept = critic[0].weight.grad
    update(log_std, **given | {"returns": given["returns"] + 1})
    assert critic[0].weight.grad is kept and not torch.equal(kept, once[4])
    torch.manual_seed(1)
    with_log = FusedAct(actor, critic, log_std=True)(log_std, given["obs"])
    torch.manual_seed(1)
    without = FusedAct(actor, critic)(log_std.exp(), given["obs"])
    assert all(map(torch.equal, with_log, without))


def test_fewer_metrics():
    actor, critic, given = network(5, (8,), 2, "tanh"), network(5, (8,), 1, "tanh"), discrete(30, (2,))
    update = FusedUpdate(actor, critic, categories=[2], reuse=True)
    whole, names = update(None, **given), ("log_probs", "advantages", "returns", "values")
    samples = [given["obs"]], [], given["actions"].float(), *(given[x] for x in names), None, None
    assert torch.equal(update.run(None, samples, measured=4)[:3], whole[:3])
    with pytest.raises(RuntimeError, match=r"metrics: expected shape \[6\], got \[5\]"):
        update.run(None, samples, measured=5)


def test_what_is_refused():
    class Twice(nn.Sequential):
        def forward(self, x):
            return 2 * super().forward(x)

    actor, critic, given = network(5, (8,), 2, "tanh"), network(5, (8,), 1, "tanh"), discrete(10, (2,))
    with pytest.raises(Unsupported, match=r"^actor: expected nn.Sequential, Twice has a forward of its own$"):
        FusedUpdate(Twice(*actor), critic)
    for wrong in ([0], [True], [2.0]):
        with pytest.raises(ValueError, match=r"^categories: expected positive ints"):
            FusedUpdate(actor, critic, categories=wrong)
    with pytest.raises(TypeError, match=r"^std: expected None, actions are discrete, got Tensor$"):
        FusedUpdate(actor, critic, categories=[2])(torch.ones(2), **given)
    with pytest.raises(TypeError, match=r"^std: expected a tensor, got NoneType$"):
        FusedUpdate(actor, critic)(None, **given)
    with pytest.raises(RuntimeError, match=r"actor: expected shape \[3, 8\], got \[2, 8\]"):
        FusedUpdate(actor, critic, categories=[3])(None, **given)
    with pytest.raises(RuntimeError, match=r"^categories: expected 1 numbers, one for each action, got 2"):
        FusedUpdate(actor, critic, categories=[1, 1])(None, **given)
    with pytest.raises(RuntimeError, match=r"^values: requires grad"):
        FusedUpdate(actor, critic, categories=[2])(None, **given | {"values": torch.zeros(10, requires_grad=True)})
    update, act = FusedUpdate(actor, critic, categories=[2]), FusedAct(actor, critic, categories=[2])
    handle = actor[1].register_forward_hook(lambda *_: None)
    for call in (lambda: update(None, **given), lambda: act(None, given["obs"])):
        with pytest.raises(Unsupported, match=r"^actor: place 1 has hooks"):
            call()
    assert all(p.grad is None for p in actor.parameters())
    handle.remove()
    update(None, **given)


def test_shapes_are_checked_before_a_kernel_is_launched():
    """On CUDA; the CPU's operation checks them itself."""
    networks = FusedUpdate(network(5, (8,), 2, "tanh"), network(7, (8,), 1, "tanh"))._networks
    networks.check_inputs(([torch.zeros(9, 2), torch.zeros(9, 3)], [torch.zeros(9, 7)]), 9)
    for seen, message in (
        (([torch.zeros(9, 4)], []), r"^obs: expected 5 numbers a sample, got 4$"),
        (([torch.zeros(8, 5)], []), r"^obs: expected shape \[9, width\], got \[8, 5\]$"),
        (([torch.zeros(9, 5)], []), r"^critic_obs: expected 7 numbers a sample, got 5$"),
        (([torch.zeros(9, 5)], [torch.zeros(9, 5)]), r"^critic_obs: expected 7 numbers a sample, got 5$"),
    ):
        with pytest.raises(ValueError, match=message):
            networks.check_inputs(seen, 9)
    check_shapes([("mu", torch.zeros(3, 2), [3, 2])])
    with pytest.raises(ValueError, match=r"^mu: expected shape \[3, 2\], got \[3, 1\]$"):
        check_shapes([("mu", torch.zeros(3, 1), [3, 2])])
    with pytest.raises(ValueError, match=r"^actions: expected at least one sample, got \[0, 2\]$"):
        check_shapes([("actions", torch.zeros(0, 2), [0, 2])])


def test_a_layer_that_is_used_twice():
    """nn.Sequential.children() leaves the second use out."""
    torch.manual_seed(8)
    tied, activation = nn.Linear(5, 5), nn.Tanh()
    actor, critic = nn.Sequential(tied, activation, tied, activation, nn.Linear(5, 3)), network(5, (4,), 1, "tanh")
    given = discrete(50, (3,))
    metrics = FusedUpdate(actor, critic, categories=[3], value_loss_coef=0.5)(None, **given)
    grads, figures = by_autograd(actor, critic, (3,), given)
    assert metrics[0].item() == pytest.approx(figures[0], rel=1e-5)
    torch.testing.assert_close(tied.weight.grad.double(), grads[0], rtol=1e-4, atol=1e-6)


def test_normalisers():
    torch.manual_seed(9)
    actor, critic, given = network(5, (8,), 2, "tanh"), network(5, (8,), 1, "tanh"), discrete(64, (2,))
    moments = RunningMoments(5)
    moments.update(torch.randn(50, 4, 5) * 3 + 1)
    metrics = FusedUpdate(actor, critic, categories=[2], obs_normalizer=moments, critic_normalizer=moments)(
        None, **given
    )
    seen = ((given["obs"] - moments.shift) / moments.std).clamp(-10, 10)
    _, figures = by_autograd(actor, critic, (2,), given | {"obs": seen})
    assert metrics[:3].tolist() == pytest.approx(figures[:3], rel=1e-5, abs=1e-5)
