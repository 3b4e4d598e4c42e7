"""The fused operation's products in bfloat16, against the same roundings in float64, and against none."""

from __future__ import annotations

import copy
import math
import os
import subprocess
import sys

import pytest
import torch
from test_fused import ACTIVATIONS, SIZES, batch, by_autograd, network, rollout
from torch import Tensor, nn

from pydrone.envs.quadrotor import Quadrotor
from pydrone.ops import native
from pydrone.ppo import fused_update
from pydrone.ppo.config import PPOConfig, TrainConfig
from pydrone.ppo.learner import fused
from pydrone.ppo.learner.learner import Learner
from pydrone.ppo.learner.networks import Unsupported
from pydrone.ppo.policy.make import make_policy
from pydrone.ppo.policy.normalization import RunningMoments
from pydrone.ppo.trainer import Trainer

pytestmark = pytest.mark.skipif(native.CPU_MISSING is not None, reason=f"no native library: {native.CPU_MISSING}")
HAS_BF16 = native.CPU_MISSING is None and torch.ops.pydrone.has_bf16()
on_bf16 = pytest.mark.skipif(not HAS_BF16, reason="no AVX512_BF16, or PYDRONE_ISA leaves it out")


class RoundedLinear(torch.autograd.Function):
    """A linear layer whose three products take operands rounded to bfloat16, by way of float32; sums are float64."""

    @staticmethod
    def rounded(x: Tensor) -> Tensor:
        return x.float().bfloat16().double()

    @staticmethod
    def forward(ctx, x, weight, bias):
        x, weight = RoundedLinear.rounded(x), RoundedLinear.rounded(weight)
        ctx.save_for_backward(x, weight)
        return x @ weight.T + bias

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        rounded = RoundedLinear.rounded(grad)
        return rounded @ weight, rounded.T @ x, grad.sum(0)


class Rounded(nn.Module):
    """A network of :class:`RoundedLinear`, with the parameters of a plain one."""

    def __init__(self, plain: nn.Sequential) -> None:
        super().__init__()
        self.plain = plain

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.plain:
            x = RoundedLinear.apply(x, layer.weight, layer.bias) if isinstance(layer, nn.Linear) else layer(x)
        return x


def gradients(actor, critic, std, given, **options) -> tuple[list[Tensor], Tensor]:
    """Of every parameter and std, and the metrics."""
    parameters = [*actor.parameters(), *critic.parameters(), std]
    for p in parameters:
        p.grad = None
    metrics = fused_update(actor, critic, std, **given, **options, autocast=True)
    assert all(p.grad.shape == p.shape and p.grad.dtype == torch.float32 for p in parameters)
    return [p.grad for p in parameters], metrics


def check(actor, critic, std, given, **options):
    """Against float64 with the same roundings, where some fall to the other side, and without any."""
    found, metrics = gradients(actor, critic, std, given, **options)
    for networks, limit, of_metrics in (((Rounded(actor), Rounded(critic)), 1e-3, 1e-5), ((actor, critic), 0.2, 4e-3)):
        expected, figures = by_autograd(*networks, std, given, **options)
        for x, wanted in zip(found, expected, strict=True):
            assert (x.double() - wanted).norm() <= limit * wanted.norm() + 1e-9, (x.shape, limit)
        assert metrics[:5].tolist() == pytest.approx(figures[:5], rel=of_metrics, abs=of_metrics, nan_ok=True)
        assert abs(metrics[5].item() - figures[5]) < 2.5 / len(given["obs"])  # a ratio or two fall to the other side


@on_bf16
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("size", "hidden", "widths", "actions"), SIZES)
def test_gradients(size, hidden, widths, actions, activation):
    torch.manual_seed(size)
    actor, critic = network(widths[0], hidden, actions, activation), network(widths[1], hidden, 1, activation)
    std = (torch.rand(actions) + 0.5).requires_grad_()
    check(actor, critic, std, batch(size, widths, actions), value_clip=0.2, entropy_coef=0.01, value_loss_coef=0.7)


@on_bf16
def test_by_hand():
    """Ties go to even, below and above; the outputs, the bias and the sums are not rounded."""
    step = 2.0**-8  # half the distance of neighbours above 1
    for first, second, rounded in ((1 + step, 3 * step, 1 + 3 * step), (1 + 3 * step, 0.0, 1 + 4 * step)):
        actor, critic = nn.Linear(2, 1), nn.Linear(2, 1)
        for layer, bias in ((actor, 0.0), (critic, 2.0**-20)):
            nn.init.ones_(layer.weight)
            nn.init.constant_(layer.bias, bias)
        given = {"obs": torch.tensor([[first, second]]), "actions": torch.tensor([[rounded]])}
        given |= {name: torch.zeros(1) for name in ("log_probs", "advantages", "returns", "values")}
        found, metrics = gradients(actor, critic, torch.ones(1, requires_grad=True), given)
        value = rounded + 2.0**-20
        assert metrics[1].item() == pytest.approx(value**2, rel=1e-7)
        assert found[3].item() == 2 * value  # the bias's: as it is
        grad = torch.tensor(2 * value).bfloat16().item()
        assert found[2].tolist() == [[grad * (rounded - second), grad * second]]


@on_bf16
def test_no_clip_no_kl_and_one_observation():
    torch.manual_seed(3)
    actor, critic, std = network(9, (40,), 2, "elu"), network(9, (24, 8), 1, "elu"), torch.ones(2, requires_grad=True)
    given = batch(200, (9, 9), 2)
    for name in ("critic_obs", "mu", "sigma"):
        del given[name]
    check(actor, critic, std, given)


@on_bf16
def test_groups_and_normalizers():
    torch.manual_seed(5)
    actor, critic, std = network(7, (32,), 2, "silu"), network(5, (32,), 1, "silu"), torch.ones(2, requires_grad=True)
    given, plain = batch(140, (7, 5), 2), {}
    moments = {"obs": RunningMoments(7), "critic_obs": RunningMoments(5), "returns": RunningMoments()}
    for name, x in moments.items():
        x.update((given[name] * 3 + 1).reshape(10, 14, *given[name].shape[1:]))
        plain[name] = x.normalize(given[name]).clamp(-0.5, 0.5) if "obs" in name else x.normalize(given[name])
    plain["values"] = moments["returns"].normalize(given["values"])
    expected, figures = gradients(actor, critic, std, given | plain, value_clip=0.2)
    given["obs"], given["critic_obs"] = given["obs"].split([3, 4], -1), given["critic_obs"].split([1, 2, 2], -1)
    normalizers = {"obs_normalizer": moments["obs"], "critic_normalizer": moments["critic_obs"], "obs_clip": 0.5}
    normalizers["value_normalizer"] = moments["returns"]
    found, metrics = gradients(actor, critic, std, given, value_clip=0.2, **normalizers)
    for x, wanted in zip(found, expected, strict=True):
        assert (x - wanted).norm() <= 1e-3 * wanted.norm()
    assert metrics.tolist() == pytest.approx(figures.tolist(), rel=1e-4)


@on_bf16
@pytest.mark.parametrize("activation", ["tanh", "silu"])
def test_what_earlier_calls_left_behind(activation):
    """Odd widths and ragged tiles are padded with zeros, whatever lay there; two runs are equal to the bit."""
    torch.manual_seed(6)
    small = network(5, (33, 7), 3, activation), network(3, (33, 7), 1, activation), torch.ones(3, requires_grad=True)
    large = network(90, (150,), 9, activation), network(90, (150,), 1, activation), torch.ones(9, requires_grad=True)
    given, poison = batch(131, (5, 3), 3), batch(400, (90, 90), 9)
    clean, figures = gradients(*small, given)
    clean = [x.clone() for x in clean]
    assert gradients(*large, {name: torch.full_like(x, math.nan) for name, x in poison.items()})[1].isnan().any()
    found, again = gradients(*small, given)
    assert torch.equal(again, figures) and not figures.isnan().any()
    assert all(torch.equal(x, y) for x, y in zip(found, clean, strict=True))


@on_bf16
def test_threads():
    torch.manual_seed(7)
    actor, critic, std = network(17, (64, 64), 4, "tanh"), network(17, (64, 64), 1, "tanh"), torch.ones(4)
    std.requires_grad_()
    given, threads = batch(1000, (17, 17), 4), torch.get_num_threads()
    try:
        found = []
        for count in (1, 3, 3):
            torch.set_num_threads(count)
            found.append([x.clone() for x in gradients(actor, critic, std, given)[0]])
    finally:
        torch.set_num_threads(threads)
    for one, three, again in zip(*found, strict=True):
        assert torch.equal(three, again) and torch.allclose(one, three, rtol=1e-4, atol=1e-6)


@on_bf16
def test_what_is_not_a_number_shows():
    actor, critic, std = network(3, (16,), 2, "relu"), network(3, (16,), 1, "relu"), torch.ones(2, requires_grad=True)
    given = batch(40, (3, 3), 2)
    given["obs"][7, 1] = math.nan
    found, metrics = gradients(actor, critic, std, given)
    assert metrics[0].isnan() and not metrics[1].isnan()
    assert found[0].isnan().any() and not found[4].isnan().any()


# ------------------------------------------------------------------------------------------- acting, and the learner


@on_bf16
@pytest.mark.parametrize("settings", [{}, {"normalize_obs": True, "normalize_values": True, "activation": "silu"}])
@pytest.mark.parametrize("num_envs", [1, 131])
def test_acting_is_what_is_learnt_from(num_envs, settings):
    torch.manual_seed(0)
    policy = make_policy(5, 3, PPOConfig(hidden_dims=(33, 16), autocast=True, **settings))
    if settings:
        policy.observe(torch.randn(10, 9, 5) * 2)
        policy.observe_returns(torch.randn(10, 9) * 3 + 1)
    obs = torch.randn(num_envs, 5)
    found = fused.act(policy, obs)
    networks = [Rounded(copy.deepcopy(x).double()) for x in (policy.actor, policy.critic)]
    seen = policy._actor_input(obs).double()
    mean, values = (x(seen).detach() for x in networks)
    torch.testing.assert_close(found.mean.double(), mean, rtol=0, atol=1e-4)
    torch.testing.assert_close(found.values.double(), policy._denormalized(values).squeeze(-1), rtol=0, atol=1e-3)
    near = policy.mean(obs)  # torch's autocast
    assert 0 < (found.mean - near).abs().max() < 0.02 and not torch.equal(
        found.mean, policy.actor(policy._actor_input(obs))
    )
    ones = torch.ones(num_envs)
    surrogate, value_loss, _, kl, *_ = fused_update(
        policy.actor,
        policy.critic,
        policy.std,
        obs=obs,
        actions=found.actions,
        log_probs=found.log_probs,
        advantages=ones,
        returns=found.values,
        values=found.values,
        mu=found.mean,
        sigma=found.std,
        obs_normalizer=policy.actor_normalizer,
        critic_normalizer=policy.critic_normalizer,
        obs_clip=policy.obs_clip,
        value_normalizer=policy.value_normalizer,
        autocast=True,
    )
    assert kl == 0 and value_loss < 1e-10 and surrogate.item() == pytest.approx(-1, abs=1e-6)


@on_bf16
@pytest.mark.parametrize("obs", [5, {"policy": 5, "critic": 8}], ids=["shared", "privileged"])
def test_the_learner_takes_it_and_is_near_torchs_autocast(obs):
    found = []
    for learner in ("torch", "fused"):
        torch.manual_seed(0)
        config = PPOConfig(learner=learner, autocast=True, schedule="fixed", hidden_dims=(32, 32))
        policy = make_policy(obs, 2, config)
        learning = Learner(policy, config)
        assert (learning.not_fused is None) == (learner == "fused")
        minibatch = next(iter(rollout(policy, act=learning.act).minibatches(num_minibatches=2, num_epochs=1)))
        metrics = learning.compute_gradients(minibatch)
        assert metrics[3].abs() <= (1e-6 if learner == "torch" else 0)  # what was acted by is learnt from
        found.append(([p.grad.clone() for p in policy.parameters()], metrics))
        assert all(math.isfinite(x) for x in learning.update(rollout(policy)).values())
    for x, y in zip(found[0][0], found[1][0], strict=True):
        assert (x - y).norm() <= 0.05 * x.norm()
    assert torch.allclose(found[0][1], found[1][1], rtol=0.02, atol=1e-3)


@on_bf16
def test_training():
    lines = []
    ppo = PPOConfig(autocast=True, hidden_dims=(8,))
    config = TrainConfig(env="quadrotor", num_steps=4, iterations=2, ppo=ppo, tensorboard=False)
    trainer = Trainer(Quadrotor(8), config, echo=lines.append)
    trainer.train()
    assert trainer.learner.not_fused is None and not any("by autograd" in x for x in lines)


# ---------------------------------------------------------------------------------------------- where there is none

REASON = "matmul is 'bfloat16', and the processor has no AVX512_BF16, or PYDRONE_ISA leaves it out"


def test_without_the_instructions_torch_does_it_and_says_why(monkeypatch):
    monkeypatch.setattr(torch.ops.pydrone, "has_bf16", lambda: False)
    line, x = nn.Linear(1, 1), torch.zeros(1)
    given = {"obs": x[None], "actions": x[None], "log_probs": x, "advantages": x, "returns": x, "values": x}
    with pytest.raises(Unsupported, match=f"^{REASON}$"):
        fused_update(line, line, torch.ones(1), **given, autocast=True)
    assert line.weight.grad is None
    config = PPOConfig(autocast=True, hidden_dims=(8,))
    assert Learner(make_policy(5, 2, config), config).not_fused == REASON
    lines = []
    config = TrainConfig(env="quadrotor", num_steps=4, iterations=1, ppo=config, tensorboard=False)
    Trainer(Quadrotor(8), config, echo=lines.append).train()
    assert sum(f"Gradients by autograd: {REASON}." in x for x in lines) == 1


@pytest.mark.parametrize("settings", [{}, {"learner": "torch"}, {"recurrent": "gru", "rnn_dim": 4}], ids=str)
@pytest.mark.parametrize(("ours", "torchs"), [(False, False), (True, False), (False, True)])
def test_autocast_on_a_processor_that_emulates_it_is_said_to_be_slow_before_it_starts(
    ours, torchs, settings, monkeypatch
):
    if not ours:
        monkeypatch.setattr(torch.ops.pydrone, "has_bf16", lambda: False)
    elif not torch.ops.pydrone.has_bf16():
        pytest.skip("this processor has no AVX512_BF16")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: torchs, raising=False)
    for autocast in (False, True):
        lines: list[str] = []

        def compute(*_, lines=lines):
            lines.append("started")
            raise ZeroDivisionError

        ppo = PPOConfig(autocast=autocast, hidden_dims=(8,), num_minibatches=1, **settings)
        config = TrainConfig(env="quadrotor", num_steps=4, iterations=1, ppo=ppo, tensorboard=False)
        trainer = Trainer(Quadrotor(8), config, echo=lines.append)
        monkeypatch.setattr(trainer, "compute", compute)
        with pytest.raises(ZeroDivisionError):
            trainer.train()
        said = [x for x in lines[: lines.index("started")] if "matmul: this processor has no AVX512_BF16" in x]
        assert len(said) == (autocast and not ours and not torchs)


def test_lesser_instructions_have_none():
    code = "import torch, pydrone.ops.native; q = torch.ops.pydrone; assert not q.has_bf16(); x = torch.zeros(1, 1)\n"
    code += "y = x[0]; q.ppo_act([x], [], x, [x, y], [x, y], y, 0, 2, *[None] * 4, 1.0, *[None] * 3, x, y, y, x)"
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYDRONE_ISA": "baseline"}, capture_output=True
    )
    assert b"matmul: expected 0 or 1, this processor has no AVX512_BF16, or PYDRONE_ISA names less" in done.stderr
