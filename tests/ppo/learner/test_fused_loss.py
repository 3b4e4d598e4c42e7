"""The learner with the loss as one operation, on the CPU by its reference, equals the learner by autograd."""

from __future__ import annotations

import copy

import pytest
import torch

from pydrone.buffer import RolloutBuffer
from pydrone.ppo.config import PPOConfig
from pydrone.ppo.learner import fused_loss
from pydrone.ppo.learner.learner import Learner
from pydrone.ppo.policy.make import make_policy

N, T, OBS, ACTIONS = 24, 10, 5, 3
OPTIONS = [
    {},
    {"clipped_value_loss": False, "entropy_coef": 0.0, "activation": "silu"},
    {"normalize_values": True, "normalize_obs": True},
    {"chunk_size": 17, "advantage_scope": "minibatch"},
    {"critic_obs": ("policy", "critic"), "obs_dtype": "bfloat16"},
]


def with_fused_loss(policy, config: PPOConfig) -> Learner:
    """A learner as CUDA has it."""
    learner = Learner(policy, config)
    learner.fused_loss = fused_loss.FusedLoss()
    return learner


def rollout(policy) -> RolloutBuffer:
    """Acted by the policy before some noise is put on its parameters, so that ratios and values are clipped."""
    dtype = policy.obs_dtype
    buf = RolloutBuffer(N, T, obs=policy.obs, actions=ACTIONS, obs_dtype=dtype, fields=policy.fields())
    for _ in range(T):
        obs = {name: torch.randn(N, width) for name, width in policy.obs.items()}
        step = policy.act(obs)
        rewards, dones = torch.randn(N), torch.rand(N) < 0.1
        given = {"obs": obs, "actions": step.actions, "values": step.values, "log_probs": step.log_probs}
        buf.append(**given, rewards=rewards, dones=dones, **policy.stored(step))
    buf.compute_gae(torch.randn(N))
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            parameter.add_((0.3 if name.startswith("critic") else 0.03) * torch.randn_like(parameter))
    return buf


@pytest.mark.parametrize("options", OPTIONS, ids=lambda x: ",".join(x) or "defaults")
def test_an_update_equals_autograds(options):
    config = PPOConfig(hidden_dims=(16, 16), learner="torch", num_epochs=3, **options)
    policy = make_policy({"policy": OBS, "critic": 2}, ACTIONS, config)
    buf, other = rollout(policy), copy.deepcopy(policy)
    expected = Learner(policy, config).update(buf)
    buf._draws.epoch = 0
    calls = []
    learner = with_fused_loss(other, config)
    run = learner.fused_loss.backward
    learner.fused_loss.backward = lambda *args: calls.append(1) or run(*args)
    found = learner.update(buf)
    assert len(calls) >= 12
    for name, value in expected.items():
        assert found[name].item() == pytest.approx(value.item(), rel=1e-4, abs=2e-6), name
    for (name, x), y in zip(policy.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(y, x, rtol=1e-4, atol=2e-5, msg=name)


def test_gradients_add_to_what_is_there_and_a_frozen_deviation_gets_none():
    config = PPOConfig(hidden_dims=(8,), learner="torch")
    policy = make_policy({"policy": OBS, "critic": 2}, ACTIONS, config)
    policy.std_param.requires_grad_(False)
    mb = next(rollout(policy).minibatches(1))
    loss = fused_loss.FusedLoss()
    samples = {name: mb[name] for name in loss.SAMPLES}
    loss.backward(policy, mb.obs, samples, len(mb), config)
    once = [p.grad.clone() for p in policy.parameters() if p.requires_grad]
    loss.backward(policy, mb.obs, samples, len(mb), config)
    assert policy.std_param.grad is None and max(x.abs().max() for x in once) > 0
    for x, p in zip(once, (p for p in policy.parameters() if p.requires_grad), strict=True):
        torch.testing.assert_close(p.grad, 2 * x)


def test_why_not(monkeypatch):
    config = PPOConfig(hidden_dims=(8,))
    policy = make_policy(OBS, ACTIONS, config)
    assert fused_loss.why_not(policy) == "its kernel runs on CUDA, the policy is on cpu"
    assert Learner(policy, config).fused_loss is None

    monkeypatch.setattr(fused_loss.triton, "serves", lambda device: True)
    monkeypatch.setattr(fused_loss.triton, "missing", lambda: "triton is not installed")
    assert fused_loss.why_not(policy) == "triton is not installed"
    monkeypatch.setattr(fused_loss.triton, "missing", lambda: None)
    assert fused_loss.why_not(policy) is None
    discrete = make_policy(OBS, ((), torch.int64), config, 3)
    assert fused_loss.why_not(discrete) == "actions are discrete"
    recurrent = make_policy(OBS, ACTIONS, PPOConfig(hidden_dims=(8,), recurrent="gru"))
    assert fused_loss.why_not(recurrent) == "the policy is recurrent"
