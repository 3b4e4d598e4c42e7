"""The learner beyond its defaults: schedule, early stop, scope of the normalisation, groups, half precision."""

from __future__ import annotations

import copy

import pytest
import torch
from test_learner import N, fill, make_buffer, make_policy, random_batch
from test_trainer import PointMass, config

from pydrone.ppo.config import PPOConfig
from pydrone.ppo.learner.learner import Learner
from pydrone.ppo.policy.actor_critic import ActorCritic
from pydrone.ppo.trainer import Trainer

LEARN = {"hidden_dims": (32, 32), "learning_rate": 3e-3, "gamma": 0.95}


def trained(env, **ppo) -> float:
    settings = config(num_steps=20, iterations=25, seed=1, ppo={**LEARN, **ppo})
    return Trainer(env, settings, echo=lambda _: None).train().figures["reward"]


# ------------------------------------------------------------------------------------------- schedule and early stop


def test_linear_schedule_by_hand():
    learner = Learner(make_policy(), PPOConfig(schedule="linear", learning_rate=1e-3))
    for fraction, rate in ((0.0, 1e-3), (0.25, 7.5e-4), (0.9, 1e-4), (1.5, 0.0)):
        learner.set_progress(fraction)
        assert learner.learning_rate.item() == pytest.approx(rate)
    learner.set_progress(0.5)
    learner.step(random_batch())
    assert learner.learning_rate.item() == pytest.approx(5e-4), "the KL divergence is none of its business"
    fixed = Learner(make_policy(), PPOConfig(schedule="fixed", learning_rate=1e-3))
    fixed.set_progress(0.5)
    assert fixed.learning_rate.item() == pytest.approx(1e-3)


def test_linear_schedule_of_a_training():
    settings = config(iterations=4, ppo={"schedule": "linear", "learning_rate": 1e-3})
    trainer = Trainer(PointMass(8), settings, echo=lambda _: None)
    rates = [trainer.iterate()["learning_rate"] for _ in range(4)]
    assert rates == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])


def test_learns_with_the_linear_schedule_and_the_early_stop():
    assert trained(PointMass(128), schedule="linear", max_kl=0.02) > -0.35


def test_a_large_kl_ends_the_rollout_before_its_step():
    policy, buffer = make_policy(), make_buffer()
    buffer.compute_gae(fill(buffer, policy))
    config_ = PPOConfig(schedule="fixed", learning_rate=0.02, num_epochs=10, num_minibatches=2)
    kls, stepped = [], Learner(copy.deepcopy(policy), config_)
    for minibatch in stepped._minibatches(buffer):
        kls.append(stepped.step(minibatch)[3].item())
    limit = 0.05
    first = next(i for i, kl in enumerate(kls) if kl > limit)
    assert 0 < first < 19, "the case is to stop in the middle"

    buffer._draws.epoch = 0  # the same permutations again
    learner = Learner(policy, PPOConfig(**{**vars(config_), "max_kl": limit}))
    figures = learner.update(buffer)
    assert {int(x["step"]) for x in learner.optimizer.state.values()} == {first} and figures["minibatches"] == first + 1
    assert figures["kl"].item() == pytest.approx(sum(kls[: first + 1]) / (first + 1), rel=1e-5)


# -------------------------------------------------------------------------------------------------------- advantages


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, True),
        ({"advantage_scope": "minibatch"}, "minibatch"),
        ({"normalize_advantages": False, "advantage_scope": "minibatch"}, False),
    ],
)
def test_scope_of_the_normalisation(options, expected):
    policy, buffer = make_policy(), make_buffer()
    buffer.compute_gae(fill(buffer, policy))
    learner, seen = Learner(policy, PPOConfig(num_epochs=1, num_minibatches=2, **options)), []
    learner.step = lambda minibatch: (seen.append(minibatch.advantages.clone()), torch.zeros(4))[1]
    learner.update(buffer)
    mean, std = buffer.advantages.mean(), buffer.advantages.std()
    both = torch.cat(seen)
    if expected == "minibatch":
        for part in seen:
            assert part.mean().abs() < 1e-5 and part.std().item() == pytest.approx(1, abs=1e-4)
    else:
        wanted = ((buffer.advantages - mean) / std if expected else buffer.advantages).flatten()
        torch.testing.assert_close(both.sort().values, wanted.sort().values, rtol=1e-4, atol=1e-5)
        assert seen[0].mean().abs() > 1e-3


def test_learns_with_advantages_normalised_by_minibatch():
    assert trained(PointMass(128), advantage_scope="minibatch") > -0.35


# ------------------------------------------------------------------------------------------------------------ groups


def test_actor_and_critic_see_the_groups_they_are_told_to():
    policy = ActorCritic(
        {"state": 2, "wind": 3, "image": (4, 4)}, 1, (8,), actor_obs=("state",), critic_obs=("wind", "state")
    )
    obs = {"state": torch.randn(6, 2), "wind": torch.randn(6, 3)}
    torch.testing.assert_close(policy.mean(obs), policy.actor(obs["state"]))
    side_by_side = torch.cat((obs["wind"], obs["state"]), 1)
    torch.testing.assert_close(policy.value(obs), policy.critic(side_by_side).squeeze(1))
    assert ActorCritic({"state": 2}, 1, actor_obs=("state",)).critic_obs == ("state",), "as the actor's by default"


@pytest.mark.parametrize(
    ("obs", "kwargs", "message"),
    [
        ({"policy": 2}, {"critic_obs": ("state",)}, r"critic_obs: expected some of \['policy'\], got 'state'"),
        ({"policy": 2}, {"actor_obs": ("state",)}, r"actor_obs: expected some of \['policy'\], got 'state'"),
        (2, {"actor_obs": ("policy",)}, r"actor_obs: expected none, the observations have no groups"),
    ],
)
def test_groups_that_are_not_there(obs, kwargs, message):
    with pytest.raises(ValueError, match=message):
        ActorCritic(obs, 1, **kwargs)


class Weighted(PointMass):
    """The point mass with rewards of a weight that is drawn for each episode and that only the critic is told."""

    obs = {"state": 2, "weight": 1}

    def _groups(self, state):
        return {"state": state, "weight": self.weight.clone()}

    def reset(self):
        self.weight = torch.rand(self.num_envs, 1, generator=self.generator) * 4
        return self._groups(super().reset())

    def step(self, actions):
        result = super().step(actions)
        final, rewards = self._groups(result.final_obs), result.rewards * self.weight.squeeze(1)
        drawn = torch.rand(self.num_envs, 1, generator=self.generator) * 4
        self.weight = torch.where(result.dones[:, None], drawn, self.weight)
        return result._replace(obs=self._groups(result.obs), final_obs=final, rewards=rewards)


def test_a_critic_that_is_told_more_knows_the_value_better():
    losses, rewards = [], []
    for critic in (("state",), ("state", "weight")):
        settings = config(
            num_steps=20, iterations=30, seed=1, ppo={**LEARN, "actor_obs": ("state",), "critic_obs": critic}
        )
        trainer = Trainer(Weighted(128), settings, echo=lambda _: None)
        history = [trainer.iterate() for _ in range(30)]
        losses.append(sum(x["value_loss"] for x in history[-5:]))
        rewards.append(history[-1]["reward"])
    assert losses[1] < 0.7 * losses[0], losses
    assert rewards[1] > -0.7, rewards  # a mean weight of two


# ---------------------------------------------------------------------------------------------------- half precision


@pytest.mark.parametrize("grouped", [False, True])
def test_observations_are_stored_in_half_precision_and_acted_on_as_stored(grouped):
    env = PointMass(8)
    if grouped:  # a dtype that an adapter states is the environment's, not the storage's
        env = Weighted(8)
        env.obs = {"state": ((2,), torch.float32), "weight": ((1,), torch.float32)}
    groups = {"actor_obs": ("state",), "critic_obs": ("weight",)} if grouped else {}
    trainer = Trainer(env, config(num_steps=20, ppo={"obs_dtype": "bfloat16", **groups}), echo=lambda _: None)
    trainer.start()
    trainer.collect()
    stored = trainer.buffer.obs if grouped else {"state": trainer.buffer.obs}
    assert all(x.dtype == torch.bfloat16 for x in stored.values())
    with torch.no_grad():  # exactly the log-probabilities that the first minibatch will find
        torch.testing.assert_close(trainer.policy.mean(trainer.buffer.obs), trainer.buffer["mu"])
        exact = torch.rand(4, 2) + 1
        given = {"state": exact, "weight": torch.ones(4, 1)} if grouped else exact
        assert torch.equal(trainer.policy.mean(given), trainer.policy.actor(exact.bfloat16().float()))


def test_learns_with_observations_in_bfloat16():
    assert trained(PointMass(128), obs_dtype="bfloat16") > -0.35


def test_autocast_computes_in_bfloat16_and_learns_in_float32():
    policy, cast = make_policy(), make_policy()
    cast.matmul = "bfloat16"
    batch = random_batch(200)
    plain, rounded = policy.mean(batch.obs), cast.mean(batch.obs)
    assert rounded.dtype == torch.float32
    difference = (plain - rounded).abs().max()
    assert 1e-5 < difference < 0.02, difference  # bfloat16 has eight bits
    Learner(policy).compute_gradients(batch)
    Learner(cast).compute_gradients(batch)
    for mine, theirs in zip(cast.parameters(), policy.parameters()):
        assert mine.dtype == mine.grad.dtype == torch.float32
        assert torch.cosine_similarity(mine.grad.flatten(), theirs.grad.flatten(), dim=0) > 0.99


def test_learns_with_autocast():
    assert trained(PointMass(128), autocast=True) > -0.35


def test_rows_of_the_rollout_are_those_of_the_options():
    """N = 16 times T = 8, two floats an observation less two bytes each."""
    buffer = Trainer(PointMass(N), config(num_steps=8, ppo={"obs_dtype": "float16"}), echo=lambda _: None).buffer
    assert buffer.layout.fields["obs.obs"].nbytes == 4
