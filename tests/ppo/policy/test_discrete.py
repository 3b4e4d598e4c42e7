"""Discrete actions: the categorical policy, against torch.distributions and on CartPole."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from pydrone.ppo.config import PPOConfig, TrainConfig
from pydrone.ppo.policy import distributions
from pydrone.ppo.policy.discrete import CategoricalActorCritic
from pydrone.ppo.policy.make import make_policy
from pydrone.ppo.policy.normalization import RunningMoments
from pydrone.ppo.trainer import Trainer


def make(obs=3, actions=4) -> CategoricalActorCritic:
    policy = make_policy(obs, ((), torch.int64), PPOConfig(hidden_dims=(8,)), actions)
    with torch.no_grad():
        policy.actor[-1].bias.copy_(torch.arange(actions) * 0.5)
        policy.actor[-1].weight.mul_(100)
    return policy


def test_formulas_by_hand():
    """p = (1/4, 3/4), q = (1/2, 1/2)."""
    p, q = torch.tensor([[0.25, 0.75]]).log(), torch.tensor([[0.5, 0.5]]).log()
    assert distributions.categorical_log_prob(torch.tensor([1]), p).item() == pytest.approx(math.log(0.75))
    assert distributions.categorical_entropy(torch.cat((p, q))).item() == pytest.approx((0.5623351 + math.log(2)) / 2)
    # 1/4 log(1/2) + 3/4 log(3/2); reversed, it is another number
    assert distributions.categorical_kl(p, q).item() == pytest.approx(0.1308120)
    assert distributions.categorical_kl(q, p).item() == pytest.approx(0.1438410)


def test_an_action_of_probability_0_adds_nothing():
    """0 log 0 is 0, and so is its gradient; an action that has become impossible makes the divergence infinite."""
    logits = torch.tensor([[-math.inf, 0.0, 0.0]], requires_grad=True)
    logs = logits.log_softmax(-1)
    entropy = distributions.categorical_entropy(logs)
    entropy.backward()
    assert entropy.item() == pytest.approx(math.log(2)) and logits.grad.tolist() == [[0, 0, 0]]
    even = torch.full((1, 3), 1 / 3).log()
    assert distributions.categorical_kl(logs, logs).item() == 0
    assert distributions.categorical_kl(logs, even).item() == pytest.approx(math.log(1.5))
    assert distributions.categorical_kl(even, logs).item() == math.inf
    assert (
        distributions.categorical_kl(logs * math.nan, logs).isnan()
        and distributions.categorical_entropy(logs * math.nan).isnan()
    )


def test_the_policy_against_torch_distributions():
    policy, obs = make(), torch.randn(50, 3)
    step = policy.act(obs)
    logits = policy.actor(obs)
    old = Categorical(logits=logits)
    assert step.actions.dtype == torch.int64 and step.actions.shape == (50,) and step.std is None
    torch.testing.assert_close(step.log_probs, old.log_prob(step.actions))
    torch.testing.assert_close(step.mean, old.logits)
    with torch.no_grad():
        policy.actor[-1].bias.add_(torch.randn(4))
    new = policy.evaluate(obs, step.actions)
    torch.testing.assert_close(new.log_probs, Categorical(logits=policy.actor(obs)).log_prob(step.actions))
    torch.testing.assert_close(policy.entropy(new), Categorical(logits=new.mean).entropy().mean())
    expected = kl_divergence(old, Categorical(logits=new.mean)).mean()
    torch.testing.assert_close(policy.kl(policy.stored(step), new), expected)
    assert torch.equal(policy.mode(obs), policy.actor(obs).argmax(-1))


def several(actions=(2, 4), **options) -> CategoricalActorCritic:
    config = PPOConfig(hidden_dims=(8,), **options)
    return make_policy(3, ((len(actions),), torch.int64), config, actions)


def test_several_choices_against_torch_distributions():
    """Their log-probabilities, entropies and divergences add up."""
    policy, obs = several(), torch.randn(50, 3)
    with torch.no_grad():
        policy.actor[-1].weight.mul_(100)
        policy.actor[-1].bias.copy_(torch.arange(6) * 0.5)
    parts = lambda: [Categorical(logits=x) for x in policy.actor(obs).split((2, 4), -1)]  # noqa: E731
    step, old = policy.act(obs), parts()
    assert step.actions.dtype == torch.int64 and step.actions.shape == (50, 2)
    assert step.actions.amax(0).tolist() == [1, 3] and step.actions.amin() == 0
    torch.testing.assert_close(step.mean, torch.cat([x.logits for x in old], -1))
    torch.testing.assert_close(step.log_probs, sum(x.log_prob(step.actions[:, i]) for i, x in enumerate(old)))
    with torch.no_grad():
        policy.actor[-1].bias.add_(torch.randn(6))
    new, now = policy.evaluate(obs, step.actions), parts()
    torch.testing.assert_close(new.log_probs, sum(x.log_prob(step.actions[:, i]) for i, x in enumerate(now)))
    torch.testing.assert_close(policy.entropy(new), sum(x.entropy().mean() for x in now))
    expected = sum(kl_divergence(a, b).mean() for a, b in zip(old, now))
    torch.testing.assert_close(policy.kl(policy.stored(step), new), expected)
    assert torch.equal(policy.mode(obs), torch.stack([x.logits.argmax(-1) for x in now], -1))


def test_weights_of_other_choices_of_the_same_sum_are_refused():
    state = several((2, 4)).state_dict()
    several((2, 4)).load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"choice_counts: expected \(4, 2\), got \(2, 4\)"):
        several((4, 2)).load_state_dict(state)


def test_actions_come_as_often_as_their_probability_says():
    policy = make()
    obs = torch.zeros(100_000, 3)
    step = policy.act(obs)
    counts = torch.bincount(step.actions, minlength=4) / 1e5
    p = policy.mean(obs[:1]).exp().squeeze(0)
    assert p.max() > 1.5 * p.min(), "the probabilities are to differ"
    assert ((counts - p).abs() < 4 * (p * (1 - p) / 1e5).sqrt()).all()  # four standard errors


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_forward_goes_through_torchs_exporters_as_it_is():
    policy, obs = make(), torch.randn(5, 3)
    policy.actor_normalizer = policy.critic_normalizer = RunningMoments(3)
    policy.observe(torch.randn(4, 6, 3) * 3 + 1)
    expected = policy.mean(obs)
    torch.testing.assert_close(torch.jit.trace(policy, (obs,))(obs), expected)
    torch.testing.assert_close(torch.export.export(policy, (obs,)).module()(obs), expected)


def test_first_policy_is_nearly_uniform():
    policy = make_policy(5, ((), torch.int64), PPOConfig(), 3)
    torch.testing.assert_close(policy.mean(torch.randn(10, 5)).exp(), torch.full((10, 3), 1 / 3), rtol=0, atol=0.01)


def test_an_action_space_that_is_neither():
    with pytest.raises(TypeError, match=r"env\.actions: expected an int, .* got \(\(\), torch\.int64\)"):
        make_policy(3, ((), torch.int64), PPOConfig())


def cart_poles(num_envs: int, vectorized: bool):
    gymnasium = pytest.importorskip("gymnasium")
    from pydrone.envs.adapters import GymnasiumEnv

    kwargs = {} if vectorized else {"vector_kwargs": {"autoreset_mode": gymnasium.vector.AutoresetMode.SAME_STEP}}
    mode = "vector_entry_point" if vectorized else "sync"
    return GymnasiumEnv(gymnasium.make_vec("CartPole-v1", num_envs, vectorization_mode=mode, **kwargs), seed=1)


def cart_pole_config(**ppo) -> TrainConfig:
    settings = {"hidden_dims": (32, 32), "learning_rate": 3e-3, "desired_kl": 0.02, "entropy_coef": 0.0} | ppo
    settings |= {"num_epochs": 8, "num_minibatches": 2, "gamma": 0.98}
    return TrainConfig(num_steps=32, iterations=60, tensorboard=False, seed=1, ppo=PPOConfig(**settings))


def test_learns_cart_pole():
    """A random policy balances for 22 steps; 195 is what the task's first version called solved."""
    trainer = Trainer(cart_poles(64, True), cart_pole_config(), echo=lambda _: None)
    first, lengths = trainer.iterate()["episode_length"], []
    for _ in range(59):
        lengths.append(trainer.iterate()["episode_length"])
    assert first < 30 and max(lengths) > 195, (first, max(lengths))


def test_discrete_with_all_the_rest_runs_in_gymnasiums_own_vector():
    """SAME_STEP, final observations, every option at once: the figures are finite and the state is restored."""
    options = {"normalize_obs": True, "normalize_values": True, "normalize_rewards": True, "autocast": True}
    trainer = Trainer(cart_poles(4, False), cart_pole_config(**options, obs_dtype="bfloat16"), echo=lambda _: None)
    for _ in range(3):
        figures = trainer.iterate()
    finite = {name: value for name, value in figures.items() if name != "action_std"}
    assert all(math.isfinite(value) for value in finite.values()), finite
    assert figures["reward"] == pytest.approx(1.0), "as the environment gave it"
