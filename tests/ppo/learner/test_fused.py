"""The fused operation's gradients, against autograd in float64 and by hand."""

from __future__ import annotations

import copy
import math
import os
import subprocess
import sys
import warnings

import pytest
import torch
from loss_cases import HAND, LOG_PROB
from torch import Tensor, nn

from pydrone.buffer import RolloutBuffer
from pydrone.envs.quadrotor import Quadrotor
from pydrone.ops import native
from pydrone.ppo import fused_update
from pydrone.ppo.config import PPOConfig, TrainConfig
from pydrone.ppo.learner import fused
from pydrone.ppo.learner.learner import Learner
from pydrone.ppo.learner.loss import surrogate_loss, value_loss
from pydrone.ppo.learner.networks import Unsupported
from pydrone.ppo.policy.actor_critic import ActorCritic
from pydrone.ppo.policy.distributions import gaussian_entropy, gaussian_kl, gaussian_log_prob
from pydrone.ppo.policy.make import make_policy
from pydrone.ppo.policy.normalization import RunningMoments
from pydrone.ppo.trainer import Trainer

pytestmark = pytest.mark.skipif(native.CPU_MISSING is not None, reason=f"no native library: {native.CPU_MISSING}")

ACTIVATIONS = {"tanh": nn.Tanh, "elu": nn.ELU, "relu": nn.ReLU, "silu": nn.SiLU}


def network(inputs: int, hidden: tuple[int, ...], outputs: int, activation: str) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width in hidden:
        layers += [nn.Linear(inputs, width), ACTIVATIONS[activation]()]
        inputs = width
    return nn.Sequential(*layers, nn.Linear(inputs, outputs))


def batch(size: int, widths: tuple[int, int], actions: int) -> dict[str, Tensor]:
    """Ratios on both sides of the clip range, values on both sides of theirs."""
    return {
        "obs": torch.randn(size, widths[0]),
        "critic_obs": torch.randn(size, widths[1]),
        "actions": torch.randn(size, actions),
        "log_probs": torch.randn(size) * 0.3 - 1.4 * actions,
        "advantages": torch.randn(size),
        "returns": torch.randn(size) * 2,
        "values": torch.randn(size) * 0.3,
        "mu": torch.randn(size, actions) * 0.1,
        "sigma": torch.rand(size, actions) + 0.5,
    }


def by_autograd(
    actor, critic, std, given, clip=0.2, value_clip=None, value_loss_coef=1.0, entropy_coef=0.0, dtype=torch.float64
):
    """Gradients and metrics."""
    actor, critic = copy.deepcopy(actor).to(dtype), copy.deepcopy(critic).to(dtype)
    std = std.detach().to(dtype).requires_grad_()
    x = {name: y.to(dtype) for name, y in given.items()}
    mean, values = actor(x["obs"]), critic(x.get("critic_obs", x["obs"])).squeeze(-1)
    log_probs = gaussian_log_prob(x["actions"], mean, std)
    surrogate = surrogate_loss(log_probs, x["log_probs"], x["advantages"], clip)
    value = value_loss(values, x["values"], x["returns"], value_clip)
    entropy = gaussian_entropy(std)
    (surrogate + value_loss_coef * value - entropy_coef * entropy).backward()
    kl = gaussian_kl(x["mu"], x["sigma"], mean, std) if "mu" in x else torch.tensor(math.nan)
    grads = [p.grad for p in (*actor.parameters(), *critic.parameters(), std)]
    return grads, [x.item() for x in (surrogate, value, entropy, kl, *of_ratios(log_probs, x["log_probs"], clip))]


def of_ratios(new: Tensor, old: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """The estimated KL, and the share of the samples whose ratio is beyond the clip, as Stable-Baselines3 has them."""
    ratio = torch.exp(new - old)
    return torch.mean((ratio - 1) - (new - old)), torch.mean((torch.abs(ratio - 1) > clip).double())


def check(actor, critic, std, given, **options):
    for p in (*actor.parameters(), *critic.parameters(), std):
        p.grad = None
    metrics = fused_update(actor, critic, std, **given, **options)
    expected, figures = by_autograd(actor, critic, std, given, **options)
    rounded, _ = by_autograd(actor, critic, std, given, **options, dtype=torch.float32)
    for p, wanted, other in zip((*actor.parameters(), *critic.parameters(), std), expected, rounded, strict=True):
        assert p.grad.shape == p.shape and p.grad.dtype == torch.float32
        # Where summands cancel, float32 does no better, in any order.
        limit = max(1e-5 * wanted.norm() + 1e-9, 4 * (other - wanted).norm())
        assert (p.grad.double() - wanted).norm() <= limit, p.shape
    assert metrics.tolist() == pytest.approx(figures, rel=1e-5, abs=1e-5, nan_ok=True)


# (batch, hidden layers, observations of actor and critic, actions): tiles of 128 samples, vectors of 4, 8 and 16.
SIZES = [
    (1, (128, 128), (17, 17), 4),
    (127, (128, 128), (17, 17), 4),
    (128, (64,), (1, 3), 1),
    (129, (48, 33), (17, 30), 5),
    (300, (), (7, 7), 3),
    (513, (200, 100, 50), (45, 48), 12),
    (257, (1, 1), (2, 5), 2),
    (130, (31, 17, 16, 15), (33, 187), 17),
]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("size", "hidden", "widths", "actions"), SIZES)
def test_gradients(size, hidden, widths, actions, activation):
    torch.manual_seed(size)
    actor, critic = network(widths[0], hidden, actions, activation), network(widths[1], hidden, 1, activation)
    std = (torch.rand(actions) + 0.5).requires_grad_()
    check(actor, critic, std, batch(size, widths, actions), value_clip=0.2, entropy_coef=0.01, value_loss_coef=0.7)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_large_preactivations(activation):
    """Where exponentials would overflow, and near zero, where differences would cancel."""
    torch.manual_seed(0)
    actor, critic = network(6, (32, 32), 3, activation), network(6, (32, 32), 1, activation)
    given = batch(256, (6, 6), 3)
    for scale in (1e-3, 30.0):
        for x in ("obs", "critic_obs"):
            given[x] = torch.randn(256, 6) * scale
        mean = actor(given["obs"]).detach()  # ratios that stay finite
        given |= {"actions": mean + 0.1 * torch.randn(256, 3), "mu": mean}
        check(actor, critic, torch.ones(3).requires_grad_(), given)


@pytest.mark.parametrize("isa", ["baseline", "x86-64-v3"])
def test_other_instructions(isa):
    """What processors with less run, as far as this one can."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    command += ["-k", "test_gradients or preactivations or hand"]
    done = subprocess.run(command, env=os.environ | {"PYDRONE_ISA": isa}, capture_output=True, text=True)
    if "PYDRONE_ISA: expected baseline, x86-64-v3 or x86-64-v4, as far as this processor" in done.stdout:
        pytest.skip(f"this processor has no {isa}")
    assert done.returncode == 0, done.stdout[-3000:]


def test_an_unknown_version_is_an_error():
    code = "import torch, pydrone.ppo as f; n = torch.nn.Linear(1, 1); x = torch.zeros(1)\n"
    code += "f.fused_update(n, n, x + 1, obs=x[None], actions=x[None], log_probs=x, advantages=x, returns=x, values=x)"
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYDRONE_ISA": "z80"}, capture_output=True)
    assert b"PYDRONE_ISA: expected baseline, x86-64-v3 or x86-64-v4" in done.stderr and b"got z80" in done.stderr


@pytest.mark.parametrize(("given", "expected"), HAND)
def test_by_hand(given, expected):
    def bias(value):
        layer = nn.Linear(1, 1)
        nn.init.zeros_(layer.weight)
        nn.init.constant_(layer.bias, value)
        return layer

    actor, critic, std = bias(0.5), bias(1.0), torch.tensor([2.0], requires_grad=True)
    values = {"advantages": 0.0, "returns": 1.0, "values": 1.0, "mu": 0.5, "sigma": 2.0, "ratio": 1.0} | given
    values["log_probs"] = LOG_PROB - math.log(values.pop("ratio"))
    tensors = {name: torch.tensor([x]) for name, x in values.items()}
    tensors |= {name: tensors[name][None] for name in ("mu", "sigma")}
    surrogate, value, entropy, kl, *_ = fused_update(
        actor, critic, std, obs=torch.ones(1, 1), actions=torch.tensor([[1.5]]), **tensors, value_clip=0.2
    ).tolist()
    found = {"mean": actor.bias.grad.item(), "value": critic.bias.grad.item(), "std": std.grad.item()}
    found |= {"surrogate": surrogate, "value_loss": value, "kl": kl}
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert entropy == pytest.approx(0.5 + 0.5 * math.log(2 * math.pi) + math.log(2))
    assert actor.weight.grad.item() == actor.bias.grad.item()  # the observation is 1


def test_no_clip_no_kl_and_one_observation():
    torch.manual_seed(3)
    actor, critic, std = network(9, (40,), 2, "elu"), network(9, (24, 8), 1, "elu"), torch.ones(2, requires_grad=True)
    given = batch(200, (9, 9), 2)
    for name in ("critic_obs", "mu", "sigma"):
        del given[name]
    check(actor, critic, std, given)


def test_any_strides_and_half_precision():
    torch.manual_seed(4)
    actor, critic, std = network(6, (32,), 2, "tanh"), network(3, (32,), 1, "tanh"), torch.ones(2, requires_grad=True)
    given = batch(150, (6, 3), 2)
    wide = {name: torch.full((150, 2 * max(1, x[0].numel())), math.nan) for name, x in given.items()}
    strided = {}
    for name, x in given.items():
        view = wide[name][:, ::2] if x.dim() == 2 else wide[name][:, 0]
        strided[name] = view.copy_(x)
    assert not strided["obs"].is_contiguous()
    check(actor, critic, std, strided)
    given["obs"], given["critic_obs"] = given["obs"].half(), given["critic_obs"].bfloat16()
    check(actor, critic, std, given)


def test_groups_and_normalizers():
    torch.manual_seed(5)
    actor, critic, std = network(7, (32,), 2, "silu"), network(5, (32,), 1, "silu"), torch.ones(2, requires_grad=True)
    given = batch(140, (7, 5), 2)
    moments = {name: RunningMoments(width) for name, width in (("obs", 7), ("critic_obs", 5))}
    moments["value"] = RunningMoments()
    for name, x in moments.items():
        data = given["returns"] if name == "value" else given[name]
        x.update((data * 3 + 1).reshape(10, 14, *data.shape[1:]))
    plain = dict(given)
    for name in ("obs", "critic_obs"):
        plain[name] = moments[name].normalize(given[name]).clamp(-0.5, 0.5)
    for name in ("values", "returns"):
        plain[name] = moments["value"].normalize(given[name])
    expected, figures = by_autograd(actor, critic, std, plain, value_clip=0.2)
    given["obs"] = given["obs"].split([3, 4], -1)
    given["critic_obs"] = given["critic_obs"].split([1, 2, 2], -1)
    normalizers = {"obs_normalizer": moments["obs"], "critic_normalizer": moments["critic_obs"], "obs_clip": 0.5}
    metrics = fused_update(
        actor, critic, std, **given, value_clip=0.2, **normalizers, value_normalizer=moments["value"]
    )
    for p, wanted in zip((*actor.parameters(), *critic.parameters(), std), expected, strict=True):
        assert (p.grad.double() - wanted).norm() <= 1e-5 * wanted.norm()
    assert metrics.tolist() == pytest.approx(figures, rel=1e-5)


def test_it_adds_to_what_is_there_as_backward_does():
    torch.manual_seed(6)
    actor, critic = network(4, (16,), 2, "tanh"), network(4, (16,), 1, "tanh")
    log_std = torch.zeros(2, requires_grad=True)
    actor[0].bias.requires_grad_(False)
    given = batch(50, (4, 4), 2)
    fused_update(actor, critic, log_std.exp(), **given, entropy_coef=0.1)
    parameters = [*actor.parameters(), *critic.parameters(), log_std]
    once = [None if p.grad is None else p.grad.clone() for p in parameters]
    assert [x is None for x in once].index(True) == 1 and sum(x is None for x in once) == 1
    fused_update(actor, critic, log_std.exp(), **given, entropy_coef=0.1)
    for p, x in zip(parameters, once):
        assert x is None or torch.equal(p.grad, 2 * x)


def arguments(operation: str, size: int = 5) -> tuple:
    policy = make_policy({"a": 4, "critic": 3}, 2, PPOConfig(hidden_dims=(6,), actor_obs=("a",)))
    parameters = [[x.detach() for x in network.parameters()] for network in (policy.actor, policy.critic)]
    obs, critic_obs, wide, scalar = torch.randn(size, 4), torch.randn(size, 3), torch.randn(size, 2), torch.randn(size)
    std, moments = torch.ones(2), (torch.zeros(4), torch.ones(4), None, None)
    if operation == "ppo_act":
        outputs = [torch.full_like(x, math.nan) for x in (wide, scalar, scalar, wide)]
        return [obs], [critic_obs], wide, *parameters, std, 0, False, *moments, 10.0, *[None] * 3, *outputs
    grads = [torch.full_like(x, math.nan) for x in (*parameters[0], *parameters[1], std)]
    given = [obs], [critic_obs], wide, *[scalar] * 4, wide, wide.abs() + 1
    values = (torch.tensor(0.5), torch.tensor(2.0))
    return *given, *parameters, std, 1, False, 0.2, 0.2, 1.0, 0.01, *moments, 10.0, *values, grads, torch.zeros(6)


@pytest.mark.parametrize("operation", ["ppo_act", "ppo_gradients"])
def test_opcheck(operation):
    assert torch.library.opcheck(getattr(torch.ops.pydrone, operation).default, arguments(operation))


def test_runs_are_equal_to_the_bit():
    torch.manual_seed(7)
    actor, critic, std = network(17, (64, 64), 4, "tanh"), network(17, (64, 64), 1, "tanh"), torch.ones(4)
    given, found = batch(1000, (17, 17), 4), []
    for _ in range(2):
        for p in (*actor.parameters(), *critic.parameters()):
            p.grad = None
        metrics = fused_update(actor, critic, std, **given)
        found.append([*(p.grad for p in (*actor.parameters(), *critic.parameters())), metrics])
    assert all(torch.equal(x, y) for x, y in zip(*found))


def test_what_is_not_a_number_shows():
    actor, critic, std = network(3, (16,), 2, "relu"), network(3, (16,), 1, "relu"), torch.ones(2)
    given = batch(40, (3, 3), 2)
    given["obs"][7, 1] = math.nan
    metrics = fused_update(actor, critic, std, **given)
    assert metrics[0].isnan() and not metrics[1].isnan()
    assert actor[0].weight.grad.isnan().any() and not critic[0].weight.grad.isnan().any()
    given["obs"][7, 1], given["returns"][3] = 0.0, math.inf
    assert fused_update(actor, critic, std, **given)[1].isinf()
    for name, figure in (("critic_obs", 1), ("values", 1), ("returns", 1), ("log_probs", 0), ("advantages", 0)):
        given = batch(40, (3, 3), 2)
        given[name][3] = math.nan
        metrics = fused_update(actor, critic, std, **given, value_clip=0.2)
        assert metrics[figure].isnan() and not metrics[1 - figure].isnan(), name


@pytest.mark.parametrize(
    ("std", "sigma", "surrogate", "kl"),
    [
        (math.nan, 1.0, math.nan, math.nan),
        (1.0, 0.0, None, math.inf),
        (1.0, -1.0, None, math.nan),
    ],
)
def test_the_logarithm_of_what_is_no_standard_deviation_shows(std, sigma, surrogate, kl):
    actor, critic = network(3, (16,), 2, "relu"), network(3, (16,), 1, "relu")
    given = batch(40, (3, 3), 2)
    given["sigma"][3, 1] = sigma
    metrics = fused_update(actor, critic, torch.tensor([1.0, std]), **given).tolist()
    if surrogate is not None:
        assert metrics[0] == pytest.approx(surrogate, nan_ok=True)
    assert metrics[3] == pytest.approx(kl, nan_ok=True)


# ---------------------------------------------------------------------------------------------- what it cannot serve


def test_networks_of_another_kind_are_refused():
    line, std, given = nn.Linear(3, 1), torch.ones(1), batch(4, (3, 3), 1)
    wrong = [
        (nn.Sequential(nn.Linear(3, 4), nn.Sigmoid(), nn.Linear(4, 1)), "in place 1, got Sigmoid"),
        (nn.Sequential(nn.Linear(3, 4), nn.ELU(0.5), nn.Linear(4, 1)), "in place 1, got ELU"),
        (nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.ELU(), nn.Linear(4, 1)), "elu and tanh"),
        (nn.Sequential(nn.Linear(3, 1, bias=False)), "with a bias"),
        (nn.Sequential(nn.Linear(3, 1), nn.Tanh()), "at its end, got Tanh"),
        (nn.Sequential(), "got no layer"),
    ]
    for net, message in wrong:
        with pytest.raises(Unsupported, match=message):
            fused_update(net, line, std, **given)
    with pytest.raises(Unsupported, match="critic: expected the actor's activation, got relu and tanh"):
        fused_update(network(3, (4,), 1, "tanh"), network(3, (4,), 1, "relu"), std, **given)


def test_a_group_of_no_width_is_nothing():
    actor, critic, std = network(3, (4,), 1, "tanh"), network(3, (4,), 1, "tanh"), torch.ones(1)
    given, found = batch(130, (3, 3), 1), []
    for obs in (given["obs"], [torch.zeros(130, 0), given["obs"], torch.zeros(130, 0)]):
        actor.zero_grad()
        fused_update(actor, critic, std, **(given | {"obs": obs}))
        found.append(actor[0].weight.grad)
    assert torch.equal(*found)


BAD = [
    ({"obs": torch.zeros(4, 2)}, r"actor: expected shape \[1, 2\], got \[1, 3\]"),
    ({"obs": torch.zeros(3, 3)}, r"obs: expected shape \[4, 3\], got \[3, 3\]"),
    ({"obs": torch.zeros(4)}, r"obs: expected shape \[4, width\]"),
    ({"obs": []}, "obs: expected at least one group"),
    ({"actions": torch.zeros(4, 2)}, "mu: expected shape"),
    ({"actions": torch.zeros(0, 1)}, "log_probs: expected shape"),
    ({"log_probs": torch.zeros(4, 1)}, "log_probs: expected shape"),
    ({"values": torch.zeros(4, dtype=torch.int64)}, "values: expected a floating dtype"),
    ({"sigma": None}, "sigma: expected both"),
    ({"clip": math.nan}, "clip: expected a finite number of at least 0, got nan"),
    ({"returns": torch.zeros(4, device="meta")}, "returns: expected device cpu, got meta"),
    (
        {"advantages": torch.zeros(4, requires_grad=True)},
        "advantages: requires grad, which the policy",
    ),
    ({"std": None}, "std: expected a tensor, got NoneType"),
    ({"std": torch.tensor([-0.001])}, "std: expected numbers above 0, got -0.001"),
    ({"std": torch.tensor([-200.0]).exp()}, "std: expected numbers above 0, got 0"),
    ({"obs": 3.0}, "obs: expected a tensor or several, got float"),
    ({"obs_clip": math.nan}, "obs_clip: expected a finite number of at least 0, got nan"),
    ({"obs_clip": -1.0}, "obs_clip: expected a finite number of at least 0, got -1"),
    ({"obs_normalizer": 3}, "obs_normalizer: expected running statistics with shift and std, got int"),
    ({"value_normalizer": "x"}, "value_normalizer: expected running statistics"),
    ({"autocast": "no"}, "autocast: expected a bool, got str"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[next(iter(x)) for x, _ in BAD])
def test_wrong_arguments_are_named(change, message):
    line, value, given = nn.Linear(3, 1), nn.Linear(3, 1), batch(4, (3, 3), 1)
    with pytest.raises((RuntimeError, TypeError, ValueError), match=message):
        fused_update(line, value, **({"std": torch.ones(1)} | given | change))
    assert line.weight.grad is None


def weight_normed() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.weight_norm(nn.Linear(3, 1))


def hooked(what: str) -> nn.Module:
    line = nn.Linear(3, 1)
    {
        "layer": lambda: line.register_forward_hook(lambda *_: None),
        "parameter": lambda: line.weight.register_hook(lambda x: 2 * x),
        "accumulated": lambda: line.weight.register_post_accumulate_grad_hook(lambda x: None),
    }[what]()
    return line


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (weight_normed, "actor: .*(computed|hooks)"),
        (lambda: hooked("layer"), "actor: place 0 has hooks"),
        (lambda: hooked("parameter"), "actor: a parameter in place 0 has hooks"),
        (lambda: hooked("accumulated"), "actor: a parameter in place 0 has hooks"),
    ],
)
def test_what_autograd_would_call_is_refused(make, message):
    with pytest.raises(Unsupported, match=message):
        fused_update(make(), nn.Linear(3, 1), torch.ones(1), **batch(4, (3, 3), 1))


def test_a_policy_of_ones_own_goes_the_torch_way():
    class Mine(ActorCritic):
        pass

    policy = make_policy(3, 2, PPOConfig(hidden_dims=(4,)))
    assert fused.why_not(policy) is None
    policy.__class__ = Mine
    assert fused.why_not(policy) == "the policy is a Mine, which may compute something else"


def test_frozen_parameters_get_no_gradient():
    torch.manual_seed(0)
    line, value = nn.Linear(3, 1), nn.Linear(3, 1)
    line.weight.requires_grad_(False)
    line.weight.grad = torch.ones(1, 3)  # left by something else
    fused_update(line, value, torch.ones(1), **batch(4, (3, 3), 1))
    assert line.weight.grad.eq(1).all() and line.bias.grad is not None


def test_one_standard_deviation_for_all_actions():
    torch.manual_seed(0)
    actor, critic, log_std = nn.Linear(3, 2), nn.Linear(3, 1), torch.zeros(1, requires_grad=True)
    given = batch(64, (3, 3), 2)
    fused_update(actor, critic, log_std.exp().expand(2), **given)
    one, log_std.grad = log_std.grad.clone(), None
    each = torch.ones(2, requires_grad=True)
    fused_update(actor, critic, each, **given)
    torch.testing.assert_close(one, each.grad.sum().reshape(1))


def test_no_samples():
    line, given = nn.Linear(3, 1), batch(0, (3, 3), 1)
    with pytest.raises(RuntimeError, match="actions: expected at least one sample"):
        fused_update(line, line, torch.ones(1), **given)


# ------------------------------------------------------------------------------------------------------- the learner


def rollout(policy: ActorCritic, num_envs: int = 64, num_steps: int = 16, act=None) -> RolloutBuffer:
    torch.manual_seed(1)
    obs_spec = policy.obs
    buffer = RolloutBuffer(num_envs, num_steps, obs=obs_spec, actions=2, fields=policy.fields())

    def observe():
        if isinstance(obs_spec, dict):
            return {name: torch.randn(num_envs, width) for name, width in obs_spec.items()}
        return torch.randn(num_envs, obs_spec)

    for _ in range(num_steps):
        obs = observe()
        step = (act or policy.act)(obs)
        buffer.append(
            obs=obs,
            actions=step.actions,
            rewards=torch.randn(num_envs),
            dones=torch.rand(num_envs) < 0.05,
            values=step.values,
            log_probs=step.log_probs,
            **policy.stored(step),
        )
    buffer.compute_gae(policy.value(observe()))
    return buffer


SETTINGS = [
    {},
    {"activation": "silu", "hidden_dims": (33, 16), "clipped_value_loss": False},
    {"normalize_obs": True, "normalize_values": True, "activation": "elu"},
    {"max_kl": 0.002},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=[", ".join(x) for x in SETTINGS])
@pytest.mark.parametrize("obs", [5, {"policy": 5, "critic": 8}], ids=["shared", "privileged"])
def test_an_update_equals_autograds(settings, obs):
    results = []
    for learner in ("torch", "fused"):
        torch.manual_seed(0)
        config = PPOConfig(learner=learner, schedule="fixed", **({"hidden_dims": (32, 32)} | settings))
        policy = make_policy(obs, 2, config)
        learning = Learner(policy, config)
        assert (learning.not_fused is None) == (learner == "fused")
        figures = [learning.update(rollout(policy)) for _ in range(2)]
        results.append((figures, policy.state_dict()))
    for ours, theirs in zip(results[1][0], results[0][0]):
        for name, x in theirs.items():
            assert ours[name].item() == pytest.approx(x.item(), rel=2e-3, abs=2e-5), name
    for name, x in results[0][1].items():
        assert torch.allclose(results[1][1][name], x, rtol=2e-3, atol=2e-4), name


def test_what_it_cannot_serve_goes_the_torch_way_and_says_why():
    cases = [
        ({"recurrent": "gru"}, {}, "the policy is recurrent"),
        ({"learner": "torch"}, {}, "learner is torch"),
        ({}, {"num_discrete_actions": 3}, "actions are discrete"),
    ]
    for settings, options, reason in cases:
        config = PPOConfig(**settings)
        policy = make_policy(5, ((), torch.int64) if options else 2, config, **options)
        assert reason in Learner(policy, config).not_fused
    config = PPOConfig(recurrent="gru", learner="fused")
    with pytest.raises(ValueError, match=r"^learner: 'fused' cannot be used: the policy is recurrent$"):
        Learner(make_policy(5, 2, config), config)
    assert "float64" in Learner(make_policy(5, 2, PPOConfig()).double(), PPOConfig()).not_fused


@pytest.mark.parametrize("learner", ["auto", "torch"])
def test_training_says_once_why_it_goes_the_torch_way(learner):
    lines = []
    ppo = PPOConfig(recurrent="gru", rnn_dim=8, learner=learner, hidden_dims=(8,))
    config = TrainConfig(env="quadrotor", num_steps=4, iterations=2, ppo=ppo, tensorboard=False)
    Trainer(Quadrotor(8), config, echo=lines.append).train()
    said = [x for x in lines if "Gradients by autograd: the policy is recurrent" in x]
    assert len(said) == (1 if learner == "auto" else 0)


# ------------------------------------------------------------------------------------------------------- acting


@pytest.mark.parametrize("settings", [{}, {"normalize_obs": True, "normalize_values": True, "activation": "elu"}])
@pytest.mark.parametrize("obs", [5, {"policy": 5, "critic": 8, "other": 2}], ids=["shared", "privileged"])
@pytest.mark.parametrize("num_envs", [1, 130])
def test_acting_is_the_policys(num_envs, obs, settings):
    torch.manual_seed(0)
    # A deviation whose square is rounded, as nearly all are.
    policy = make_policy(obs, 3, PPOConfig(hidden_dims=(33, 16), init_std=0.7, **settings))
    if settings:
        policy.observe(
            {k: torch.randn(10, 9, w) * 2 for k, w in obs.items()} if isinstance(obs, dict) else torch.randn(10, 9, obs)
        )
        policy.observe_returns(torch.randn(10, 9) * 3 + 1)
        policy.observe_returns(torch.randn(10, 9) * 3 + 2)
    seen = (
        {k: torch.randn(num_envs, w) for k, w in obs.items()} if isinstance(obs, dict) else torch.randn(num_envs, obs)
    )
    torch.manual_seed(1)
    expected = policy.act(seen)
    torch.manual_seed(1)
    found = fused.act(policy, seen)
    for name, x in expected._asdict().items():
        y = getattr(found, name)
        assert y.shape == x.shape and not y.requires_grad
        assert torch.allclose(y, x, rtol=1e-5, atol=1e-5), name
    # What was acted by is what is learnt from: nothing to round, no divergence.
    given = {"obs": seen if not isinstance(obs, dict) else seen["policy"]}
    given |= {"critic_obs": seen["critic"]} if isinstance(obs, dict) else {}
    zeros = torch.zeros(num_envs)
    *_, kl = fused_update(
        policy.actor,
        policy.critic,
        policy.std,
        **given,
        actions=found.actions,
        log_probs=found.log_probs,
        advantages=zeros,
        returns=zeros,
        values=zeros,
        mu=found.mean,
        sigma=found.std,
        obs_normalizer=policy.actor_normalizer,
        critic_normalizer=policy.critic_normalizer,
        obs_clip=policy.obs_clip,
    )
    assert kl == 0


def test_acting_by_what_is_stored():
    """Half-precision storage: the policy sees its observations rounded to it when it acts too."""
    torch.manual_seed(0)
    policy = make_policy(4, 2, PPOConfig(hidden_dims=(16,), obs_dtype="bfloat16"))
    obs = torch.randn(20, 4)
    torch.manual_seed(1)
    expected = policy.act(obs)
    torch.manual_seed(1)
    assert torch.allclose(fused.act(policy, obs).mean, expected.mean, atol=1e-6)
    assert not torch.allclose(policy.actor(obs), expected.mean, atol=1e-6)


def test_outputs_of_any_strides():
    policy = make_policy(4, 2, PPOConfig(hidden_dims=(16,)))
    obs, noise = torch.randn(200, 4), torch.randn(200, 2)
    rows = torch.full((200, 12), math.nan)
    dense = [torch.full((200, 2), math.nan), torch.full((200,), math.nan)]
    dense += [x.clone() for x in reversed(dense)]
    strided = [rows[:, :4:2], rows[:, 5], rows[:, 6], rows[:, 8::2]]
    parameters = [[x.detach() for x in network.parameters()] for network in (policy.actor, policy.critic)]
    for outputs in (dense, strided):
        torch.ops.pydrone.ppo_act(
            [obs], [], noise, *parameters, policy.std.detach(), 0, False, *[None] * 4, 10.0, *[None] * 3, *outputs
        )
    for x, y in zip(dense, strided):
        assert torch.equal(x, y) and not x.isnan().any()
    assert rows.isnan().sum() == 200 * 6
    with pytest.raises(RuntimeError, match="mean: expected memory of its own for every element"):
        bad = [*dense[:3], torch.zeros(1, 2).expand(200, 2)]
        torch.ops.pydrone.ppo_act(
            [obs], [], noise, *parameters, policy.std.detach(), 0, False, *[None] * 4, 10.0, *[None] * 3, *bad
        )
