"""The trainer: the data it collects, the figures it reports, how it stops, and that it learns."""

from __future__ import annotations

import json
import math
import os
import signal

import pytest
import torch

from pydrone.envs import ENVIRONMENTS, make
from pydrone.envs.base import StepResult
from pydrone.ppo.config import PPOConfig, TrainConfig
from pydrone.ppo.trainer import Trainer, progress_line
from pydrone.ppo.training import checkpoint
from pydrone.ppo.training.meters import EpisodeMeter


class PointMass:
    """A point accelerated by the action: obs (position, velocity), reward -position^2, time-out after 20 steps."""

    obs, actions, max_episode_length, autoreset = 2, 1, 20, "same_step"

    def __init__(self, num_envs: int, seed: int = 0) -> None:
        self.num_envs, self.device = num_envs, torch.device("cpu")
        self.generator = torch.Generator().manual_seed(seed)
        self.age = torch.zeros(num_envs, dtype=torch.int64)
        self.closed = False

    def _draw(self) -> torch.Tensor:
        return torch.rand(self.num_envs, 2, generator=self.generator) * 2 - 1

    def reset(self):
        self.state = self._draw()
        self.age.zero_()
        return self.state

    def randomize_episode_lengths(self) -> None:
        self.age = torch.randint(0, 20, (self.num_envs,), generator=self.generator)

    def step(self, actions):
        position, velocity = self.state.unbind(1)
        velocity = velocity + 0.2 * actions.squeeze(1).clamp(-2, 2)
        position = position + 0.2 * velocity
        self.age += 1
        truncated = self.age >= 20
        final = torch.stack((position, velocity), 1)
        self.age[truncated] = 0
        self.state = torch.where(truncated[:, None], self._draw(), final)
        return StepResult(
            self.state, -(position**2), truncated, truncated, final, None, {"speed": velocity.abs().mean()}
        )

    def close(self) -> None:
        self.closed = True


class Scripted:
    """Two environments, rewards 1, 2, 3, ...; ``ends[t][n]`` is 0, 1 (terminated), 2 (truncated) or 3 (reset step)."""

    num_envs, obs, actions, max_episode_length = 2, 3, 1, None
    device = torch.device("cpu")

    def __init__(self, ends, autoreset="same_step", final_obs=True) -> None:
        self.ends, self.autoreset, self.final = ends, autoreset, final_obs
        self.t = 0
        self.held = torch.zeros(2, 3)  # overwritten in every step

    def reset(self):
        return self.held

    def randomize_episode_lengths(self) -> None:
        pass

    def step(self, actions):
        code = torch.tensor(self.ends[self.t % len(self.ends)])
        self.t += 1
        self.held.fill_(self.t)
        return StepResult(
            obs=self.held,
            rewards=torch.full((2,), float(self.t)),
            dones=(code == 1) | (code == 2),
            truncated=code == 2,
            final_obs=torch.full((2, 3), 100.0 + self.t) if self.final else None,
            valid=None if self.autoreset == "same_step" else code != 3,
            log={},
        )

    def close(self) -> None:
        pass


def config(**kwargs) -> TrainConfig:
    ppo = kwargs.pop("ppo", {})
    defaults = {"num_steps": 4, "iterations": 3, "tensorboard": False}
    return TrainConfig(**{**defaults, **kwargs}, ppo=PPOConfig(**{"hidden_dims": (16, 16), **ppo}))


def test_episode_meter_by_hand():
    meter = EpisodeMeter(num_envs=3, num_steps=4, device=torch.device("cpu"))
    rewards = torch.tensor([[1.0, 2, 3, 4], [10, 20, 30, 40], [5, 5, 5, 5]])
    # env 0 ends at step 1 (length 2, reward 3); env 1 at 0 and 2, (1, 10) and (2, 50); env 2 continues
    codes = torch.tensor([[0, 1, 0, 0], [1, 0, 2, 0], [0, 0, 0, 0]], dtype=torch.uint8)
    assert meter.update(rewards, codes).tolist() == [3, 5, 63]
    # env 0 ends at step 0 after two earlier steps with 7: (3, 8); earlier, env 1 has 1 step with 40, env 2 four with 20
    codes = torch.tensor([[2, 0, 0, 0], [0, 0, 0, 1], [0, 0, 1, 1]], dtype=torch.uint8)
    count, length, reward = meter.update(rewards, codes).tolist()
    assert count == 4 and length == 3 + 5 + 7 + 1 and reward == 8 + 140 + 35 + 5


def test_episode_meter_leaves_reset_steps_out():
    meter = EpisodeMeter(num_envs=1, num_steps=4, device=torch.device("cpu"))
    # ends at step 1, resets in step 2 (its reward is ignored), one step of the next episode
    codes = torch.tensor([[0, 2, 3, 0]], dtype=torch.uint8)
    assert meter.update(torch.tensor([[1.0, 2, math.nan, 8]]), codes).tolist() == [1, 2, 3]
    assert meter.update(torch.tensor([[1.0, 0, 0, 0]]), torch.tensor([[1, 3, 0, 0]], dtype=torch.uint8)).tolist() == [
        1,
        2,
        9,
    ]


class Fresh(Scripted):
    """Returns a new tensor in every step."""

    def reset(self):
        return self.held.clone()

    def step(self, actions):
        return super().step(actions)._replace(obs=self.held.clone())


@pytest.mark.parametrize("env", [Scripted, Fresh])
def test_collect_stores_what_was_acted_on_and_not_what_came_of_it(env):
    trainer = Trainer(env([[0, 0]] * 4), config())
    trainer.start()
    last_values, _ = trainer.collect()
    # The value of the observation after the last step, not acted on yet.
    assert torch.equal(last_values, trainer.policy.value(torch.full((2, 3), 4.0)))
    assert trainer.buffer.obs[:, :, 0].tolist() == [[0, 1, 2, 3]] * 2
    assert trainer.buffer.rewards.tolist() == [[1, 2, 3, 4]] * 2
    with torch.no_grad():
        torch.testing.assert_close(trainer.buffer.values, trainer.policy.value(trainer.buffer.obs))
        torch.testing.assert_close(trainer.buffer["mu"], trainer.policy.mean(trainer.buffer.obs))
    assert (trainer.buffer["sigma"] == 1).all()


ENDS = [[0, 0], [2, 0], [3, 1], [0, 0]]


@pytest.mark.parametrize("kind", ["value_fn", "stored_value", "next_value"])
def test_time_outs_bootstrap_as_the_environment_allows(kind):
    """The advantage at a truncation is r + gamma * V(...) - V, with V of the right observation."""
    if kind == "next_value":
        env = Scripted(ENDS, autoreset="next_step")
    else:
        env = Scripted([[0, 0], [2, 0], [0, 1], [0, 0]], final_obs=kind == "value_fn")
    trainer = Trainer(env, config(ppo={"gamma": 0.9, "lam": 0.8}))
    trainer.start()
    last_values, bootstrap = trainer.collect()
    trainer.buffer.compute_gae(last_values, 0.9, 0.8, **bootstrap)

    def value(x: float) -> float:
        with torch.no_grad():
            return trainer.policy.value(torch.full((1, 3), x)).item()

    # The second step is truncated: it acts on obs 1 and has reward 2, final observation 102 or next observation 2.
    after = {"value_fn": value(102.0), "stored_value": value(1.0), "next_value": value(2.0)}[kind]
    advantage = 2 + 0.9 * after - value(1.0)
    assert trainer.buffer.advantages[0, 1].item() == pytest.approx(advantage, rel=1e-5)
    # the step before it carries that back
    before = 1 + 0.9 * value(1.0) - value(0.0) + 0.9 * 0.8 * advantage
    assert trainer.buffer.advantages[0, 0].item() == pytest.approx(before, rel=1e-5)
    # a termination has no bootstrap
    assert trainer.buffer.advantages[1, 2].item() == pytest.approx(3 - value(2.0), rel=1e-5)


def test_figures_of_an_iteration():
    trainer = Trainer(Scripted([[0, 0], [2, 0], [0, 1], [0, 0]]), config())
    figures = trainer.iterate()
    # episodes (2 steps, 1 + 2) and (3 steps, 1 + 2 + 3)
    assert figures["episodes"] == 2 and figures["episode_length"] == 2.5 and figures["episode_return"] == 4.5
    assert figures["reward"] == 2.5 and figures["action_std"] == pytest.approx(1.0, abs=0.1)
    stages = [figures[f"time/{stage}"] for stage in ("env", "policy", "storage", "gae", "update")]
    assert all(seconds > 0 for seconds in stages)
    assert sum(stages) <= figures["time/iteration"]
    assert figures["steps_per_second"] == pytest.approx(8 / figures["time/iteration"])
    assert len(trainer.buffer) == 0, "the rollout is discarded"


def test_an_iteration_without_an_end_goes_on_showing_the_last_one():
    trainer = Trainer(Scripted([[0, 1], *[[0, 0]] * 7]), config())
    assert trainer.iterate()["episode_length"] == 1
    figures = trainer.iterate()
    assert figures["episodes"] == 0 and figures["episode_length"] == 1


def test_two_runs_are_equal_and_another_seed_is_not():
    states = []
    for seed in (3, 3, 4):
        trainer = Trainer(PointMass(8), config(seed=seed))
        trainer.train()
        states.append(torch.cat([x.flatten() for x in trainer.policy.state_dict().values()]))
    assert torch.equal(states[0], states[1]) and not torch.equal(states[0], states[2])


def test_memory_is_constant_over_iterations():
    trainer = Trainer(PointMass(8), config())
    trainer.iterate()
    pointers = [x.data_ptr() for x in (trainer.buffer.rewards, trainer.buffer.obs, trainer.buffer.values)]
    nbytes = trainer.buffer.nbytes
    for _ in range(5):
        trainer.iterate()
    assert nbytes == trainer.buffer.nbytes
    assert pointers == [x.data_ptr() for x in (trainer.buffer.rewards, trainer.buffer.obs, trainer.buffer.values)]


def test_run_folder(tmp_path):
    lines = []
    trainer = Trainer(PointMass(8), config(iterations=4, save_interval=2, num_steps=20), tmp_path, echo=lines.append)
    outcome = trainer.train()
    assert outcome.iterations == 4 and outcome.checkpoint == tmp_path / "model_4.pt"
    names = {entry.name for entry in tmp_path.iterdir()}
    assert names == {"config.json", "config.toml", "progress.jsonl", "model_2.pt", "model_4.pt"}
    rows = [json.loads(line) for line in (tmp_path / "progress.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in rows] == [1, 2, 3, 4]
    assert rows[-1]["episode_length"] <= 20 and "env/speed" in rows[-1]
    assert json.loads((tmp_path / "config.json").read_text())["ppo"]["gamma"] == 0.99
    assert lines[0].startswith("1/4  reward") and str(outcome.checkpoint) in lines[-1]


def test_resume_goes_on_where_the_checkpoint_stands(tmp_path):
    first = Trainer(PointMass(8), config(iterations=3), tmp_path, echo=lambda _: None)
    path = first.train().checkpoint
    second = Trainer(PointMass(8), config(iterations=5, resume=str(path)), tmp_path, echo=lambda _: None)
    assert second.iteration == 3
    for name, x in first.policy.state_dict().items():
        assert torch.equal(x, second.policy.state_dict()[name])
    assert torch.equal(first.learner.learning_rate, second.learner.learning_rate)
    assert second.train().iterations == 5
    assert checkpoint.load(tmp_path / "model_5.pt")["iteration"] == 5


def test_stops_at_the_target_and_not_before_ten_iterations():
    trainer = Trainer(PointMass(8), config(iterations=50, num_steps=20, target_episode_length=1.0), echo=lambda _: None)
    outcome = trainer.train()
    assert outcome.iterations == 10 and "reached 1 steps" in outcome.reason
    trainer = Trainer(
        PointMass(8), config(iterations=12, num_steps=20, target_episode_length=21.0), echo=lambda _: None
    )
    assert trainer.train().iterations == 12


def test_interrupt_saves_and_says_where(tmp_path):
    lines = []

    class Interrupted(PointMass):
        def step(self, actions):
            if not lines:  # in the middle of the first iteration
                signal.raise_signal(signal.SIGINT)
                lines.append("signal")
            return super().step(actions)

    before = signal.getsignal(signal.SIGINT)
    outcome = Trainer(Interrupted(8), config(iterations=50), tmp_path, echo=lines.append).train()
    assert outcome.reason == "interrupted" and outcome.iterations == 1
    assert outcome.checkpoint.exists() and str(outcome.checkpoint) in lines[-1]
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_interrupt_does_not_wait(tmp_path):
    class Interrupted(PointMass):
        def step(self, actions):
            os.kill(os.getpid(), signal.SIGINT)
            return super().step(actions)

    with pytest.raises(KeyboardInterrupt):
        Trainer(Interrupted(8), config(iterations=50), tmp_path, echo=lambda _: None).train()


def test_a_loss_that_is_not_finite_is_an_error():
    class Broken(PointMass):
        def step(self, actions):
            return super().step(actions)._replace(rewards=torch.full((8,), math.nan))

    with pytest.raises(FloatingPointError, match=r"iteration 1: the loss is not finite .*: the rewards of the env"):
        Trainer(Broken(8), config()).iterate()


def test_discrete_actions_are_refused_by_name():
    env = PointMass(8)
    env.actions = ((), torch.int64)
    with pytest.raises(TypeError, match=r"env\.actions: expected an int"):
        Trainer(env, config())


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_steps": 0}, "num_steps: expected an int of at least 1, got 0"),
        ({"num_steps": 4.0}, "num_steps: expected an int of at least 1, got 4.0"),
        ({"iterations": True}, "iterations: expected an int of at least 1, got True"),
        ({"num_envs": 0}, "num_envs: expected an int of at least 1, got 0"),
        ({"num_envs": 1, "ppo": {"num_minibatches": 5}}, "num_minibatches: expected at most .* 4 samples, got 5"),
        ({"env": "hover"}, r"env: expected one of genesis-course, .*quadrotor-course, got 'hover'"),
        ({"seed": 1.5}, "seed: expected an int, got 1.5"),
        ({"target_episode_length": 0.0}, "target_episode_length: expected a number above 0, got 0.0"),
        ({"ppo": {"gamma": 1.5}}, "gamma: expected a number from 0 to 1, got 1.5"),
        ({"ppo": {"lam": -0.1}}, "lam: expected a number from 0 to 1, got -0.1"),
        ({"ppo": {"schedule": "cosine"}}, "schedule: expected 'adaptive', 'fixed' or 'linear', got 'cosine'"),
        (
            {"ppo": {"advantage_scope": "epoch"}},
            "advantage_scope: expected 'rollout', 'rank' or 'minibatch', got 'epoch'",
        ),
        ({"ppo": {"obs_dtype": "int8"}}, "obs_dtype: expected 'float32', 'float16' or 'bfloat16', got 'int8'"),
        ({"ppo": {"recurrent": True}}, "recurrent: expected 'none', 'gru' or 'lstm', got True"),
        ({"ppo": {"rnn_dim": 0}}, "rnn_dim: expected an int of at least 1, got 0"),
        ({"ppo": {"max_kl": 0.0}}, "max_kl: expected a number above 0, got 0.0"),
        ({"ppo": {"reward_scale": 0.0}}, "reward_scale: expected a number above 0, got 0.0"),
        ({"ppo": {"obs_clip": math.nan}}, "obs_clip: expected a number above 0, got nan"),
        ({"ppo": {"actor_obs": "policy"}}, "actor_obs: expected a tuple of names, got 'policy'"),
        ({"ppo": {"critic_obs": (1,)}}, r"critic_obs: expected a tuple of names, got \(1,\)"),
        ({"ppo": {"burn_in": -1}}, "burn_in: expected an int of at least 0, got -1"),
        ({"ppo": {"burn_in": 2}}, "burn_in: expected 0 without a recurrent layer, got 2"),
        ({"ppo": {"burn_in": 4, "recurrent": "gru"}}, "burn_in: expected less than num_steps, 4, got 4"),
        ({"ppo": {"learning_rate": 0.0}}, "learning_rate: expected a number above 0, got 0.0"),
        ({"ppo": {"learning_rate": math.inf}}, "learning_rate: expected a number above 0, got inf"),
        ({"ppo": {"desired_kl": math.nan}}, "desired_kl: expected a number above 0, got nan"),
        ({"ppo": {"clip": -0.2}}, "clip: expected a number above 0, got -0.2"),
        ({"ppo": {"max_grad_norm": 0}}, "max_grad_norm: expected a number above 0, got 0"),
        ({"ppo": {"init_std": "1"}}, "init_std: expected a number above 0, got '1'"),
        ({"ppo": {"entropy_coef": -1}}, "entropy_coef: expected a number of at least 0, got -1"),
        ({"ppo": {"value_loss_coef": -1.0}}, "value_loss_coef: expected a number of at least 0, got -1.0"),
        ({"ppo": {"num_epochs": 0}}, "num_epochs: expected an int of at least 1, got 0"),
        ({"ppo": {"hidden_dims": (64, 0)}}, r"hidden_dims\[1\]: expected an int of at least 1, got 0"),
        ({"ppo": {"hidden_dims": 64}}, "hidden_dims: expected a tuple of ints, got 64"),
    ],
)
def test_settings_that_cannot_be(kwargs, message):
    with pytest.raises(ValueError, match=message):
        config(**kwargs)


def test_the_known_environments():
    assert TrainConfig().env in ENVIRONMENTS
    for name in ENVIRONMENTS:
        assert config(env=name).env == name


def test_more_minibatches_than_samples_are_refused_before_anything_is_built():
    with pytest.raises(ValueError, match=r"num_minibatches: expected at most .* 8 samples, got 9"):
        Trainer(Scripted([[0, 0]]), config(ppo={"num_minibatches": 9}))


def test_progress_line():
    figures = {"iteration": 12, "episode_return": -1.25, "episode_length": 86.2, "steps_per_second": 35412.4}
    figures |= {f"time/{name}": 0.5 for name in ("env", "policy", "storage", "gae", "update")}
    line = progress_line(figures, 301, 3725.0)
    assert line == (
        " 12/301  reward   -1.250  length    86.2      35,412 steps/s  "
        "env 0.50 policy 0.50 storage 0.50 gae 0.50 update 0.50 s  left 1:02:05"
    )


def test_progress_line_before_the_first_episode_has_ended():
    figures = {"iteration": 1, "episode_return": math.nan, "episode_length": math.nan, "steps_per_second": 1.0}
    figures |= {f"time/{name}": 0.5 for name in ("env", "policy", "storage", "gae", "update")}
    line = progress_line(figures, 3, 0.0)
    assert "reward        -  length       -  " in line and "nan" not in line


def test_learns_to_drive_a_point_mass_to_the_origin():
    """Without control, -position^2 averages about -1.5 per step over an episode; a good controller has -0.12."""
    settings = config(
        num_steps=20, iterations=40, seed=1, ppo={"hidden_dims": (32, 32), "learning_rate": 3e-3, "gamma": 0.95}
    )
    trainer = Trainer(PointMass(256), settings, echo=lambda _: None)
    first = trainer.iterate()["reward"]
    last = trainer.train().figures["reward"]
    assert first < -0.8 and last > -0.3, (first, last)
    # The policy is a controller: it pushes against position and velocity.
    with torch.no_grad():
        push = trainer.policy.mean(torch.tensor([[0.8, 0.0], [-0.8, 0.0], [0.0, 0.8], [0.0, -0.8]])).squeeze(1)
    assert push[0] < 0 < push[1] and push[2] < 0 < push[3]


@pytest.mark.slow
def test_learns_to_hover():
    """The quadrotor learns to stay in the air: from 60 steps to hundreds within a hundred iterations."""
    settings = TrainConfig(env="quadrotor", iterations=120, seed=1, target_episode_length=1000.0, tensorboard=False)
    trainer = Trainer(make("quadrotor", num_envs=1024, seed=1), settings, echo=lambda _: None)
    outcome = trainer.train()
    assert "reached 1000" in outcome.reason, outcome.figures["episode_length"]
