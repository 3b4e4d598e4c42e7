"""Recurrent policies: the memory against a plain loop, through the buffer's sequences, and a task that needs one."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from test_trainer import Scripted, config
from torch import nn

from pydrone.buffer import RolloutBuffer
from pydrone.envs.base import StepResult
from pydrone.ppo.config import PPOConfig
from pydrone.ppo.policy.make import make_policy
from pydrone.ppo.policy.recurrent import sequence_batches
from pydrone.ppo.trainer import Trainer

N, T, OBS, UNITS = 5, 9, 3, 4


def make(cell: str, actions: object = 2, discrete: int | None = None, **options):
    torch.manual_seed(0)
    return make_policy(OBS, actions, PPOConfig(recurrent=cell, rnn_dim=UNITS, hidden_dims=(6,), **options), discrete)


def plain_means(policy, obs: torch.Tensor, ended: torch.Tensor, cell: str, memory: torch.Tensor) -> torch.Tensor:
    """The actor's means [N, T] step by step with torch's single-step cells, its memory zero after each end."""
    kind = nn.GRUCell if cell == "gru" else nn.LSTMCell
    step = kind(OBS, UNITS)
    step.load_state_dict({name.removesuffix("_l0"): x for name, x in policy.actor_rnn.state_dict().items()})
    state, means = memory if cell == "gru" else memory.chunk(2, 1), []
    for t in range(obs.shape[1]):
        state = step(obs[:, t], state)
        means.append(policy.actor(state if cell == "gru" else state[0]))
        keep = (~ended[:, t, None]).float()
        state = state * keep if cell == "gru" else tuple(part * keep for part in state)
    return torch.stack(means, 1)


@pytest.mark.parametrize("discrete", [False, True])
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_acting_and_learning_are_one_function(cell, discrete):
    """Two rollouts with ends in them: what is acted on, what sequences() leads to and a plain loop are the same."""
    policy = make(cell, ((), torch.int64) if discrete else 2, 2 if discrete else None, normalize_values=True)
    policy.observe_returns(torch.tensor([[10.0, 30.0]]))
    shape = ((), torch.int64) if discrete else 2
    buffer = RolloutBuffer(N, T, obs=OBS, actions=shape, fields=policy.fields())
    ended = torch.rand(N, 2 * T) < 0.2
    everything, memory = torch.randn(N, 2 * T, OBS), policy.initial_memory(N)["actor"]
    with torch.no_grad():
        expected = plain_means(policy, everything, ended, cell, memory)
        expected = expected.log_softmax(-1) if discrete else expected
    for rollout in range(2):
        span = slice(rollout * T, (rollout + 1) * T)
        buffer.clear()
        policy.begin_rollout(N)
        for t in range(span.start, span.stop):
            step = policy.act(everything[:, t])
            buffer.append(
                obs=everything[:, t],
                actions=step.actions,
                rewards=torch.zeros(N),
                dones=ended[:, t],
                values=step.values,
                log_probs=step.log_probs,
                **policy.stored(step),
            )
            policy.reset(ended[:, t])
        acted = buffer["logs" if discrete else "mu"]
        torch.testing.assert_close(acted, expected[:, span])
        buffer.compute_gae(policy.value(torch.randn(N, OBS)))
        samples = 0
        for batch in sequence_batches(policy, buffer, PPOConfig(num_epochs=1, num_minibatches=2)):
            new = policy.evaluate(batch.obs, batch.actions)
            torch.testing.assert_close(new.mean, batch["logs" if discrete else "mu"])
            torch.testing.assert_close(new.log_probs, batch.log_probs)
            torch.testing.assert_close(new.values, policy.normalize_values(batch.values))
            samples += len(batch)
        assert samples == N * T


def test_gradients_reach_back_through_time_and_not_over_an_end():
    policy = make("gru")
    obs = torch.randn(1, 4, OBS)
    for end, reaches in ((None, True), (1, False)):
        buffer = RolloutBuffer(1, 4, obs=OBS, actions=2, fields=policy.fields())
        policy.reset()
        policy.begin_rollout(1)
        for t in range(4):
            step, done = policy.act(obs[:, t]), torch.tensor([t == end])
            values = {"values": step.values, "log_probs": step.log_probs, **policy.stored(step)}
            buffer.append(obs=obs[:, t], actions=step.actions, rewards=torch.zeros(1), dones=done, **values)
            policy.reset(done)
        buffer.compute_gae(torch.zeros(1))
        (batch,) = sequence_batches(policy, buffer, PPOConfig(num_epochs=1, num_minibatches=1))
        given = batch.obs.obs.requires_grad_()
        mean = policy.evaluate(batch.obs, batch.actions).mean
        # steps 2 and 3 are one trajectory, or its second half
        rows = batch.obs.starts[None, :] + torch.arange(given.shape[0])[:, None]
        last = (rows[batch.obs.learn] == 3).nonzero().item()
        mean[last].sum().backward()
        moved = given.grad.abs().sum(-1)
        first = moved[(rows == 0) & batch.obs.mask].item()
        assert (first > 0) == reaches


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_only_a_memory_of_an_earlier_policy_is_burnt_in(cell):
    policy, learnt = make(cell), []
    ppo = PPOConfig(num_epochs=1, num_minibatches=2, burn_in=3, recurrent=cell)
    for last in ([1, 0], [0, 0], [1, 1], [0, 0]):  # whether the episodes end with the rollout
        buffer = RolloutBuffer(2, 8, obs=OBS, actions=2, fields=policy.fields())
        policy.begin_rollout(2)
        for t in range(8):
            step, dones = policy.act(torch.randn(2, OBS)), torch.tensor(last if t == 7 else [0, 0])
            given = {"values": step.values, "log_probs": step.log_probs, **policy.stored(step)}
            buffer.append(obs=torch.randn(2, OBS), actions=step.actions, rewards=torch.zeros(2), dones=dones, **given)
            policy.reset(dones)
        buffer.compute_gae(torch.zeros(2))
        batches = sequence_batches(policy, buffer, ppo)
        learnt.append(sum(len(batch) for batch in batches))
    # Both episodes begin with the first and the last rollout; one or none begins with those between.
    assert learnt == [16, 16 - 3, 16 - 6, 16]


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_reset_mode_value_and_forward(cell):
    policy, obs = make(cell), torch.randn(2, 3, OBS)
    policy.act(obs[0])
    before = copy.deepcopy(policy.memory)
    policy.value(obs[1]), policy.mean(obs[1])
    assert all(torch.equal(x, before[name]) for name, x in policy.memory.items()), "only acting moves it on"
    out, after = policy(obs[1], before["actor"])
    torch.testing.assert_close(out, policy.mode(obs[1]))
    torch.testing.assert_close(policy.memory["actor"], after)
    policy.reset(torch.tensor([0, 1, 0]))
    assert (policy.memory["actor"][1] == 0).all() and (policy.memory["actor"][0] != 0).any()
    policy.reset()
    torch.testing.assert_close(policy.mean(obs[1]), policy(obs[1], policy.initial_memory(3)["actor"])[0])


ENDS = [[0, 0], [2, 0], [3, 1], [0, 0]]


@pytest.mark.parametrize("kind", ["final_values", "stored_value", "next_value"])
def test_time_outs_bootstrap_with_what_is_remembered(kind):
    """The value of the final observation 102 (or the next one, 2) after the episode's observations 0 and 1."""
    if kind == "next_value":
        env = Scripted(ENDS, autoreset="next_step")
    else:
        env = Scripted([[0, 0], [2, 0], [0, 1], [0, 0]], final_obs=kind == "final_values")
    ppo = {"gamma": 0.9, "lam": 0.8, "recurrent": "gru", "rnn_dim": 4, "num_minibatches": 2}
    trainer = Trainer(env, config(ppo=ppo))
    trainer.start()
    last_values, bootstrap = trainer.collect()
    assert kind in bootstrap or bootstrap["timeout_bootstrap"] == kind
    trainer.buffer.compute_gae(last_values, 0.9, 0.8, **bootstrap)

    def value(*seen: float) -> float:
        with torch.no_grad():
            x = torch.tensor(seen, dtype=torch.float32)[:, None, None].expand(-1, 1, 3)
            features, _ = trainer.policy.critic_rnn(x)
            return trainer.policy.critic(features[-1]).item()

    after = {"final_values": value(0, 1, 102), "stored_value": value(0, 1), "next_value": value(0, 1, 2)}[kind]
    assert trainer.buffer.advantages[0, 1].item() == pytest.approx(2 + 0.9 * after - value(0, 1), rel=1e-5)
    if kind == "next_value":  # the step after the reset remembers nothing
        assert trainer.buffer.values[0, 3].item() == pytest.approx(value(3), rel=1e-5)
    trainer.buffer.clear()
    assert trainer.iterate()["kl"] > -1e-6


class Recall:
    """A cue of -1 or 1 in the first step, nothing to see in the next three, then the action is to be the cue."""

    obs, max_episode_length, autoreset, device = 2, 5, "same_step", torch.device("cpu")

    def __init__(self, num_envs: int, discrete: bool = False, seed: int = 0) -> None:
        self.num_envs, self.discrete = num_envs, discrete
        self.actions = ((), torch.int64) if discrete else 1
        self.num_discrete_actions = 2 if discrete else None
        self.generator = torch.Generator().manual_seed(seed)

    def randomize_episode_lengths(self) -> None:
        pass

    def _obs(self) -> torch.Tensor:
        shown = self.cue if self.age == 0 else torch.zeros(self.num_envs)
        return torch.stack((shown, torch.full((self.num_envs,), float(self.age == 4))), 1)

    def reset(self) -> torch.Tensor:
        self.age = 0
        self.cue = torch.randint(0, 2, (self.num_envs,), generator=self.generator) * 2.0 - 1
        return self._obs()

    def step(self, actions: torch.Tensor) -> StepResult:
        last = self.age == 4
        answer = actions * 2.0 - 1 if self.discrete else actions.squeeze(1).clamp(-1, 1)
        rewards = answer * self.cue if last else torch.zeros(self.num_envs)
        ends = torch.full((self.num_envs,), last)
        self.age += 1
        obs = self.reset() if last else self._obs()
        return StepResult(obs, rewards, ends, torch.zeros_like(ends), None, None, {})


def recalled(recurrent: str, discrete: bool = False, iterations: int = 30, **options) -> float:
    """The mean reward of the last step: 0 for who guesses, towards 1 for who remembers."""
    ppo = {"recurrent": recurrent, "rnn_dim": 16, "hidden_dims": (16,), "learning_rate": 5e-3, "desired_kl": 0.02}
    ppo |= {"entropy_coef": 0.0, "num_minibatches": 2, **options}
    settings = config(num_steps=10, iterations=iterations, seed=1, ppo=ppo)
    trainer = Trainer(Recall(128, discrete), settings, echo=lambda _: None)
    returns = [trainer.iterate()["episode_return"] for _ in range(iterations)]
    return sum(returns[-5:]) / 5


@pytest.mark.parametrize(("cell", "discrete"), [("gru", False), ("lstm", True)])
def test_learns_to_remember(cell, discrete):
    assert recalled(cell, discrete) > 0.8


def test_without_a_memory_nobody_recalls():
    assert abs(recalled("none")) < 0.2


def test_learns_to_remember_over_the_border_of_two_rollouts():
    """Rollouts of seven steps, episodes of five: most cues were seen in the rollout before the question."""
    ppo = {"recurrent": "gru", "rnn_dim": 16, "hidden_dims": (16,), "learning_rate": 5e-3, "desired_kl": 0.02}
    ppo |= {"entropy_coef": 0.0, "num_minibatches": 2, "burn_in": 1, "normalize_obs": True, "normalize_values": True}
    trainer = Trainer(Recall(128), config(num_steps=7, iterations=45, seed=1, ppo=ppo), echo=lambda _: None)
    returns = [trainer.iterate()["episode_return"] for _ in range(45)]
    assert sum(returns[-5:]) / 5 > 0.7


def test_a_checkpoint_goes_on(tmp_path):
    ppo = {"recurrent": "lstm", "rnn_dim": 4}
    first = Trainer(Recall(8), config(iterations=2, ppo=ppo), tmp_path, echo=lambda _: None)
    path = first.train().checkpoint
    second = Trainer(Recall(8), config(iterations=4, resume=str(path), ppo=ppo), tmp_path, echo=lambda _: None)
    for name, x in first.policy.state_dict().items():
        assert torch.equal(x, second.policy.state_dict()[name])
    assert all(torch.equal(x, second.policy.memory[name]) for name, x in first.policy.memory.items())
    assert second.train().iterations == 4
    with pytest.raises(ValueError, match=r"recurrent: expected 'lstm', .*model_2\.pt, got 'gru'"):
        changed = {**ppo, "recurrent": "gru"}
        Trainer(Recall(8), config(iterations=4, resume=str(path), ppo=changed), echo=lambda _: None)


@pytest.mark.parametrize("discrete", [None, 2])
def test_every_parameter_is_the_actors_or_the_critics(discrete):
    policy = make("gru", ((), torch.int64) if discrete else 2, discrete)
    parts = [*policy.actor_parameters(), *policy.critic_parameters()]
    assert sorted(map(id, parts)) == sorted(map(id, policy.parameters()))


def test_more_minibatches_than_environments_are_refused():
    with pytest.raises(ValueError, match=r"num_minibatches: expected at most one per environment, 2, .* got 4"):
        Trainer(Recall(2), config(ppo={"recurrent": "gru"}))


def test_advantages_by_minibatch():
    policy, buffer = make("gru"), RolloutBuffer(N, T, obs=OBS, actions=2, fields={"mu": 2, "sigma": 2})
    policy.begin_rollout(N)
    for _ in range(T):
        step = policy.act(obs := torch.randn(N, OBS))
        values = {"values": step.values, "log_probs": step.log_probs, **policy.stored(step)}
        buffer.append(obs=obs, actions=step.actions, rewards=torch.randn(N), dones=torch.rand(N) < 0.2, **values)
    buffer.compute_gae(torch.zeros(N))
    for scope, normalised in (("minibatch", True), ("rollout", False)):
        settings = SimpleNamespace(**vars(PPOConfig(num_epochs=1, num_minibatches=2, advantage_scope=scope)))
        parts = [batch.advantages for batch in sequence_batches(policy, buffer, settings)]
        assert all((abs(x.mean()) < 1e-5) == normalised for x in parts)
        assert abs(torch.cat(parts).mean()) < 1e-5
