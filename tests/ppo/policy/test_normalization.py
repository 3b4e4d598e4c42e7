"""Running statistics: by hand, against numpy's of everything seen, and what they make learnable."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from test_trainer import PointMass, config

from pydrone.buffer import RolloutBuffer
from pydrone.ppo.config import PPOConfig
from pydrone.ppo.policy.actor_critic import ActorCritic
from pydrone.ppo.policy.normalization import RewardScaler, RunningMoments
from pydrone.ppo.trainer import Trainer
from pydrone.ppo.training import checkpoint


def silent(env, settings, *args) -> Trainer:
    return Trainer(env, settings, *args, echo=lambda _: None)


def test_moments_by_hand():
    moments = RunningMoments(1)
    moments.update(torch.tensor([[[1.0], [3.0]]]))
    assert (moments.count.item(), moments.mean.item(), moments.m2.item()) == (2, 2, 2)
    # with 8: mean 4, squared differences 9 + 1 + 16
    moments.update(torch.tensor([[[8.0]]]))
    assert (moments.count.item(), moments.mean.item()) == (3, 4) and moments.m2.item() == pytest.approx(26)
    assert moments.normalize(torch.tensor([[4.0], [1.0]])).flatten().tolist() == pytest.approx(
        [0, -3 / (26 / 3) ** 0.5]
    )
    assert moments.denormalize(moments.normalize(torch.tensor([[7.0]]))).item() == pytest.approx(7)


@pytest.mark.parametrize("chunk", [1, 1 << 22])
def test_moments_of_many_rollouts_are_those_of_all_samples(monkeypatch, chunk):
    """Far from zero, where sums of squares in float32 would know nothing of a deviation of one."""
    monkeypatch.setattr("pydrone.ppo.policy.normalization.CHUNK", chunk)
    rollouts = [torch.randn(n, 5, 2) * torch.tensor([1.0, 30.0]) + 10_000 for n in (7, 1, 20)]
    moments = RunningMoments(2)
    for rollout in rollouts:
        moments.update(rollout)
    samples = torch.cat(rollouts).double().flatten(0, 1)
    torch.testing.assert_close(moments.mean, samples.mean(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(moments.m2 / moments.count, samples.var(0, correction=0), rtol=1e-9, atol=0)
    assert moments.mean.dtype == torch.float64 and moments.std.dtype == torch.float32


def test_moments_leave_out_what_is_not_valid():
    moments, x = RunningMoments(), torch.tensor([[1.0, float("nan"), 5.0]])
    moments.update(x, torch.tensor([[True, False, True]]))
    assert (moments.count.item(), moments.mean.item(), moments.m2.item()) == (2, 3, 8)
    moments.update(x, torch.zeros(1, 3, dtype=torch.bool))
    assert (moments.count.item(), moments.mean.item(), moments.m2.item()) == (2, 3, 8)
    fresh = RunningMoments()
    fresh.update(x, torch.zeros(1, 3, dtype=torch.bool))
    assert (fresh.shift.item(), fresh.std.item()) == (0, 1)


def test_what_never_varies_stays_finite():
    moments = RunningMoments(1)
    moments.update(torch.full((3, 4, 1), 0.1))
    assert moments.normalize(torch.tensor([[0.1]])).abs().item() < 1e-3


# ------------------------------------------------------------------------------------------------------- observations


def test_acting_learning_and_forward_see_normalised_observations():
    torch.manual_seed(0)
    plain = ActorCritic(2, 1, (8,))
    policy = ActorCritic(2, 1, (8,), normalize_obs=True)
    policy.load_state_dict({**policy.state_dict(), **plain.state_dict()})
    obs = torch.randn(6, 4, 2) * 3 + 50
    policy.observe(obs)
    seen = (obs - obs.mean((0, 1))) / obs.std((0, 1), correction=0)
    for name in ("mean", "value", "forward", "mode"):
        torch.testing.assert_close(getattr(policy, name)(obs[0]), getattr(plain, name)(seen[0]), rtol=1e-4, atol=1e-5)
    step = policy.act(obs[0])
    new, expected = policy.evaluate(obs[0], step.actions), plain.evaluate(seen[0], step.actions)
    torch.testing.assert_close(new.log_probs, expected.log_probs, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(step.log_probs, new.log_probs, rtol=1e-4, atol=1e-4)
    # clipped at ten standard deviations
    torch.testing.assert_close(policy.mean(torch.full((1, 2), 1e6)), plain.mean(torch.full((1, 2), 10.0)))


def test_groups_seen_by_both_have_one_normaliser_and_others_their_own():
    one = ActorCritic(2, 1, normalize_obs=True)
    assert one.actor_normalizer is one.critic_normalizer
    policy = ActorCritic({"policy": 2, "critic": 3}, 1, (8,), normalize_obs=True)
    policy.observe({"policy": torch.ones(4, 5, 2), "critic": torch.full((4, 5, 3), 7.0)})
    assert policy.actor_normalizer.mean.tolist() == [1, 1] and policy.critic_normalizer.mean.tolist() == [7, 7, 7]
    one.observe(torch.ones(4, 5, 2))
    assert one.actor_normalizer.count == 20, "once, not twice"


def test_reset_steps_do_not_count():
    """Observations 1 and 3, and 1e6 or NaN in a reset step: mean 2. The returns, 5 and 7 and 0: mean 6."""
    for junk in (1e6, math.nan):
        policy = ActorCritic(1, 1, (4,), normalize_obs=True, normalize_values=True)
        buffer = RolloutBuffer(1, 3, obs=1, actions=1)
        assert buffer.valid is None
        for x, reward, valid in ((1.0, 5.0, 1), (3.0, 7.0, 1), (junk, junk, 0)):
            x, reward = torch.tensor([[x]]), torch.tensor([reward])
            zero = torch.zeros(1)
            step = {"obs": x, "actions": x, "rewards": reward, "values": zero, "log_probs": zero}
            buffer.append(**step, dones=zero, valid=torch.tensor([valid]))
        buffer.compute_gae(torch.zeros(1), gamma=0.0)
        assert buffer.valid.tolist() == [[True, True, False]]
        policy.observe(buffer)
        policy.observe_returns(buffer)
        assert policy.actor_normalizer.mean.tolist() == [2] and policy.actor_normalizer.count == 2
        assert policy.value_normalizer.mean == 6 and policy.value_normalizer.count == 2
        policy.observe(buffer.obs, valid=buffer.valid)
        policy.observe_returns(buffer.returns, buffer.valid)
        assert policy.actor_normalizer.mean.tolist() == [2] and policy.value_normalizer.mean == 6
        assert policy.actor_normalizer.m2.tolist() == [4]


class Odd(PointMass):
    """The point mass observed in units that a network cannot work with."""

    def reset(self):
        return self._odd(super().reset())

    def step(self, actions):
        result = super().step(actions)
        return result._replace(obs=self._odd(result.obs), final_obs=self._odd(result.final_obs))

    def _odd(self, obs):
        return obs * torch.tensor([0.01, 100.0]) + torch.tensor([20.0, -300.0])


LEARN = {"hidden_dims": (32, 32), "learning_rate": 3e-3, "gamma": 0.95}


def learnt(env, **ppo) -> float:
    settings = config(num_steps=20, iterations=25, seed=1, ppo={**LEARN, **ppo})
    return silent(env, settings).train().figures["reward"]


def test_learns_from_observations_in_odd_units():
    """Without control the mean reward is about -1.5; without normalisation hardly anything is learnt."""
    without, with_ = learnt(Odd(128), normalize_obs=False), learnt(Odd(128), normalize_obs=True)
    assert with_ > -0.25 and without < -0.45, (with_, without)


def test_statistics_are_there_before_the_first_iteration_and_change_between_rollouts_alone():
    trainer = silent(Odd(8), config(num_steps=20, ppo={"normalize_obs": True}))
    trainer.start()
    normalizer = trainer.policy.actor_normalizer
    assert normalizer.count == 160 and len(trainer.buffer) == 0 and (trainer.env.age >= 0).all()
    before = copy.deepcopy(normalizer.state_dict())
    last_values, bootstrap = trainer.collect()
    assert all(torch.equal(x, before[name]) for name, x in normalizer.state_dict().items()), "changed while acting"
    with torch.no_grad():
        torch.testing.assert_close(trainer.buffer["mu"], trainer.policy.mean(trainer.buffer.obs))
    trainer.buffer.compute_gae(last_values, **bootstrap)
    trainer.learner.update(trainer.buffer)
    assert normalizer.count == 320


def test_a_checkpoint_holds_the_statistics(tmp_path):
    options = {"normalize_obs": True, "normalize_values": True, "normalize_rewards": True, **LEARN}
    first = silent(Odd(8), config(iterations=3, ppo=options), tmp_path)
    path = first.train().checkpoint
    assert checkpoint.load(path)["policy"]["actor_normalizer.count"] == 8 * 4 * (1 + 3)
    second = silent(Odd(8), config(iterations=5, resume=str(path), ppo=options), tmp_path)
    for mine, theirs in ((second.policy, first.policy), (second.reward_scaler.moments, first.reward_scaler.moments)):
        assert all(torch.equal(x, theirs.state_dict()[name]) for name, x in mine.state_dict().items())
    second.iterate()
    assert second.policy.actor_normalizer.count == 8 * 4 * (1 + 4), "no rollout for statistics that are there"
    with pytest.raises(ValueError, match=r"normalize_obs: expected True, .*, got False"):
        silent(Odd(8), config(iterations=5, resume=str(path), ppo={**options, "normalize_obs": False}), tmp_path)


# ------------------------------------------------------------------------------------------------------------- values


def test_values_are_returns_outside_and_normalised_inside():
    torch.manual_seed(0)
    policy, obs = ActorCritic(2, 1, (8,), normalize_values=True), torch.randn(5, 2)
    policy.observe_returns(torch.tensor([[10.0, 30.0]]))  # mean 20, std 10
    inside = policy.critic(obs).squeeze(-1)
    torch.testing.assert_close(policy.value(obs), inside * 10 + 20)
    torch.testing.assert_close(policy.act(obs).values, inside * 10 + 20)
    torch.testing.assert_close(policy.evaluate(obs, torch.zeros(5, 1)).values, inside)
    torch.testing.assert_close(policy.normalize_values(torch.tensor([10.0, 25.0])), torch.tensor([-1.0, 0.5]))


def test_new_statistics_leave_values_where_they_were():
    torch.manual_seed(0)
    policy, obs = ActorCritic(2, 1, (8,), normalize_values=True), torch.randn(5, 2)
    before = policy.critic(obs).squeeze(-1)
    policy.observe_returns(torch.tensor([[10.0, 30.0]]))
    torch.testing.assert_close(policy.critic(obs).squeeze(-1), before)  # the first are taken as they are
    values = policy.value(obs)
    policy.observe_returns(torch.randn(4, 50) * 300 - 700)
    assert policy.value_normalizer.shift < -300
    torch.testing.assert_close(policy.value(obs), values, rtol=1e-4, atol=1e-3)


class Rich(PointMass):
    """The point mass paid in large coin."""

    def step(self, actions):
        result = super().step(actions)
        return result._replace(rewards=500 * result.rewards + 1000)


def unexplained(**ppo) -> float:
    """Mean squared error of the critic's values, over the mean square of the returns, after a few iterations."""
    trainer = silent(Rich(64), config(num_steps=20, iterations=100, seed=1, ppo={**LEARN, **ppo}))
    for _ in range(12):
        trainer.iterate()
    last_values, bootstrap = trainer.collect()
    trainer.buffer.compute_gae(last_values, 0.95, 0.95, **bootstrap)
    return (trainer.buffer.advantages.square().mean() / trainer.buffer.returns.square().mean()).item()


def test_learns_values_of_any_magnitude():
    """Values of ten thousand: a critic that starts at zero is still there after twelve iterations."""
    with_, without = unexplained(normalize_values=True), unexplained()
    assert with_ < 0.1 and without > 0.8, (with_, without)
    assert learnt(Rich(128), normalize_values=True) > 1000 - 500 * 0.35


# ------------------------------------------------------------------------------------------------------------ rewards


def test_reward_scale_by_hand():
    scaler = RewardScaler(2, gamma=0.5, scale=3.0)
    rewards = torch.tensor([[2.0, 4.0, 6.0], [1.0, float("nan"), 8.0]])
    codes = torch.tensor([[0, 1, 0], [2, 3, 0]], dtype=torch.uint8)
    given = rewards.clone()
    scaler.apply_to(rewards, codes)
    # discounted: 2, 0.5 * 2 + 4, then a new episode: 6; and 1, (none), 8
    seen = torch.tensor([2.0, 5.0, 6.0, 1.0, 8.0])
    assert scaler.moments.count == 5 and scaler.running.tolist() == [6, 8]
    factor = 3 / seen.std(correction=0)
    torch.testing.assert_close(rewards, given * factor, equal_nan=True)
    torch.testing.assert_close(scaler.undo(rewards), given, equal_nan=True)
    # the running episodes go on: 0.5 * 6 + 1, 0.5 * 8 + 1
    scaler.apply_to(torch.ones(2, 1), torch.zeros(2, 1, dtype=torch.uint8))
    assert scaler.running.tolist() == [4, 5] and scaler.moments.count == 7


def test_a_plain_factor():
    scaler, rewards = RewardScaler(1, 0.9, scale=0.1, normalize=False), torch.tensor([[10.0, -20.0]])
    scaler.apply_to(rewards, torch.zeros(1, 2, dtype=torch.uint8))
    assert rewards[0].tolist() == pytest.approx([1.0, -2.0]) and scaler.moments.count == 0


class Loud(PointMass):
    def step(self, actions):
        result = super().step(actions)
        return result._replace(rewards=1000 * result.rewards)


def test_a_factor_undoes_a_factor_and_figures_show_the_reward_as_it_was():
    runs = []
    for env, options in ((PointMass(32), {}), (Loud(32), {"reward_scale": 1e-3})):
        trainer = silent(env, config(num_steps=20, iterations=3, seed=1, ppo={**LEARN, **options}))
        runs.append([trainer.iterate() for _ in range(3)])
    for plain, scaled in zip(*runs):
        for name, factor in (("reward", 1000), ("episode_return", 1000), ("value_loss", 1), ("kl", 1)):
            assert scaled[name] == pytest.approx(factor * plain[name], rel=1e-2), name


def test_learns_from_normalised_rewards():
    """A thousand times the rewards, and the loss is one that Adam and the clip range are made for."""
    trainer = silent(Loud(128), config(num_steps=20, iterations=25, seed=1, ppo={**LEARN, "normalize_rewards": True}))
    first = trainer.iterate()
    assert first["value_loss"] < 10 and first["reward"] < -800, first
    assert trainer.train().figures["reward"] > -350


def test_settings_reach_the_policy():
    options = PPOConfig(normalize_obs=True, obs_clip=3.0, normalize_values=True, autocast=True, obs_dtype="bfloat16")
    policy = silent(PointMass(4), config(ppo=vars(options))).policy
    assert policy.obs_clip == 3.0 and policy.matmul == "bfloat16" and policy.value_normalizer is not None
    assert policy.obs_dtype is torch.bfloat16
