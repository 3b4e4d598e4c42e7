"""Autoreset: reset steps count for nothing, each truncation takes its own bootstrap, and none is too many."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from pydrone.envs.base import StepResult, autoreset_mode
from pydrone.envs.registry import _check_env
from pydrone.integrations import rsl_rl_env
from pydrone.ppo.config import PPOConfig, TrainConfig
from pydrone.ppo.trainer import NotFinite, Trainer
from pydrone.report.evaluation import fly

N, T = 4, 10


class World:
    """Points that actions push; an episode's ages end it: 3 terminates, 5 truncates, as ``ends`` says by environment.

    ``junk`` stands where NEXT_STEP leaves things undefined: in the observation after a termination, and in the reward
    of the reset step. ``final`` says of each step, by its number and whether it truncates, if it has ``final_obs``.
    """

    num_envs, obs, actions, device, max_episode_length = N, 2, 1, torch.device("cpu"), None

    def __init__(self, autoreset="next_step", junk=0.0, ends=(3, 5, 3, 4), final=lambda t, late: True, **options):
        self.autoreset, self.junk, self.final = autoreset, junk, final
        self.ends = torch.tensor(ends)
        self.draw, self.t = torch.Generator().manual_seed(3), 0
        for name, x in options.items():
            setattr(self, name, x)

    def reset(self):
        self.age, self.over = torch.zeros(N, dtype=torch.int64), torch.zeros(N, dtype=torch.bool)
        self.state = torch.rand(N, 2, generator=self.draw)
        return self.state.clone()

    def randomize_episode_lengths(self) -> None:
        pass

    def close(self) -> None:
        pass

    def step(self, actions):
        assert actions.isfinite().all(), "an action that is not finite"
        resets = self.over
        push = actions.float().reshape(N, 1).clamp(-1, 1)
        moved = 0.9 * self.state + 0.1 * push
        self.age = torch.where(resets, 0, self.age + 1)
        dones = (self.age == self.ends) & ~resets
        late = dones & (self.ends > 3)
        new = torch.rand(N, 2, generator=self.draw)
        self.t += 1
        if self.autoreset == "same_step":
            self.state, self.age = torch.where(dones[:, None], new, moved), torch.where(dones, 0, self.age)
            final = moved.clone() if self.final(self.t, bool(late.any())) else None
            return StepResult(self.state.clone(), torch.ones(N), dones, late, final, None, {})
        self.state, self.over = torch.where(resets[:, None], new, moved), dones
        obs = torch.where((dones & ~late)[:, None], self.junk, self.state)
        rewards = torch.where(resets, self.junk, 1.0)
        return StepResult(obs, rewards, dones, late, None, ~resets, {})


def trainer(env, **options) -> Trainer:
    ppo = {"hidden_dims": (8,), "rnn_dim": 4, "num_minibatches": 2, "num_epochs": 2, **options.pop("ppo", {})}
    options = {"num_steps": T, "iterations": 9, "tensorboard": False, "seed": 1, **options}
    echo = options.pop("echo", lambda line: None)
    return Trainer(env, TrainConfig(**options, ppo=PPOConfig(**ppo)), echo=echo)


def _but_times(figures: dict) -> dict:
    return {name: x for name, x in figures.items() if not name.startswith("time/") and name != "steps_per_second"}


NORMALISED = {"normalize_obs": True, "normalize_values": True, "normalize_rewards": True}
DISCRETE = {"actions": ((), torch.int64), "num_discrete_actions": 3}


@pytest.mark.parametrize(
    ("ppo", "world", "junk"),
    [
        ({}, {}, math.inf),
        (NORMALISED, {}, math.nan),
        ({"learner": "torch", "advantage_scope": "minibatch", "max_kl": 1.0}, {}, 1e30),
        (NORMALISED, DISCRETE, math.nan),
        ({"recurrent": "gru", **NORMALISED}, {}, math.nan),
        ({"recurrent": "lstm"}, {}, math.nan),
        ({"recurrent": "gru", "burn_in": 2, "advantage_scope": "minibatch"}, DISCRETE, -math.inf),
        ({"obs_dtype": "bfloat16"}, {}, math.nan),
    ],
    ids=str,
)
def test_what_stands_in_a_reset_step_changes_nothing(ppo, world, junk):
    """Two trainings, in whose reset steps there is something else, are equal to the bit, all figures included."""
    seen = []
    for content in (0.0, junk):
        trained = trainer(World(junk=content, **world), ppo=ppo)
        figures = [_but_times(trained.iterate()) for _ in range(3)]
        seen.append((figures, {name: x.clone() for name, x in trained.policy.state_dict().items()}))
    (figures, weights), (with_junk, weights_with_junk) = seen
    assert str(figures) == str(with_junk)  # action_std is NaN for discrete actions
    assert figures[-1]["reward"] == 1 and figures[-1]["episode_return"] == figures[-1]["episode_length"]
    for name, x in weights.items():
        assert x.isfinite().all() and torch.equal(x, weights_with_junk[name]), name


def test_a_final_observation_that_is_not_finite_is_named():
    """After a truncation the observation of the reset step is read: its value is the bootstrap."""

    class Broken(World):
        def step(self, actions):
            result = super().step(torch.zeros(N))
            return result._replace(obs=torch.where(result.truncated[:, None], math.nan, result.obs))

    with pytest.raises(NotFinite, match=r"the observations of the environment are not finite: obs: 2 values .* step 5"):
        trainer(Broken(ends=(3, 5, 3, 3))).iterate()


def test_evaluation_acts_on_finite_numbers():
    memory = []
    policy = trainer(World(), ppo={"recurrent": "gru"}).policy

    def act(obs):
        actions = policy.mode(obs)
        memory.append(policy.memory["actor"].clone())
        return actions

    flown = fly(World(junk=math.nan), act, max_steps=9, ended=policy.reset)
    assert flown.length.tolist() == [3, 5, 3, 4] and flown.returns.tolist() == [3, 5, 3, 4]
    assert all(x.isfinite().all() for x in memory)


def test_a_step_without_the_mask_is_no_reset():
    """Under NEXT_STEP a recurrent policy still remembers an episode whose last observation is valued next."""

    class Unmarked(World):
        def step(self, actions):
            result = super().step(actions)
            return result._replace(valid=None if result.valid.all() else result.valid)

    seen = []
    for kind in (World, Unmarked):
        trained = trainer(kind(), ppo={"recurrent": "gru"})
        trained.start()
        trained._estimate(*trained.collect())
        seen.append(trained.buffer.advantages.clone())
    assert torch.equal(*seen)


def test_same_step_clears_the_memory_whatever_the_mask():
    class Marked(World):
        def step(self, actions):
            return super().step(actions)._replace(valid=torch.ones(N, dtype=torch.bool))

    seen = []
    for kind in (World, Marked):
        trained = trainer(kind("same_step"), ppo={"recurrent": "gru"})
        trained.start()
        trained.collect()
        seen.append(trained.buffer.values.clone())
    assert torch.equal(*seen)


# -------------------------------------------------------------------------------------------------- the bootstrap


@pytest.mark.parametrize("recurrent", ["none", "gru"])
@pytest.mark.parametrize(
    ("kind", "final"),
    [
        ("always", lambda t, late: True),
        ("where one is truncated", lambda t, late: late),
        ("in the last step alone", lambda t, late: t == T),
        ("in the first steps", lambda t, late: t <= 5),
        ("never", lambda t, late: False),
    ],
)
@pytest.mark.parametrize("num_steps", [8, T])
def test_each_step_decides_on_its_own_bootstrap(kind, final, recurrent, num_steps):
    """lam = 0: A = r + gamma * V(final) - V where the final observation is known; elsewhere V takes its place."""
    trained = trainer(World("same_step", final=final), num_steps=num_steps, ppo={"recurrent": recurrent, "lam": 0.0})
    with torch.no_grad():
        for p in trained.policy.critic.parameters():
            p.mul_(30)
    finals, step = {}, trained.env.step

    def spy(actions):
        result = step(actions)
        known = result.final_obs is not None
        finals[trained.env.t - 1] = trained.policy.value(result.final_obs) if known else None
        return result

    trained.env.step = spy
    trained.start()
    last_values, bootstrap = trained.collect()
    trained._estimate(last_values, bootstrap)
    buffer, gamma, late = trained.buffer, trained.config.ppo.gamma, 0
    for n, t in buffer.truncated.nonzero().tolist():
        value = buffer.values[n, t]
        after = value if finals[t] is None else finals[t][n]
        assert buffer.advantages[n, t].item() == pytest.approx((1 + gamma * after - value).item(), rel=1e-4, abs=1e-4)
        late += 1
    assert late >= 3


class Mode:
    """As an AutoresetMode of Gymnasium."""

    def __init__(self, name: str) -> None:
        self.name, self.value = name, name.title().replace("_", "")


@pytest.mark.parametrize(
    ("given", "mode"),
    [
        ("NEXT_STEP", "next_step"),
        ("NextStep", "next_step"),
        ("Same_Step", "same_step"),
        (Mode("NEXT_STEP"), "next_step"),
        (Mode("SAME_STEP"), "same_step"),
    ],
)
def test_an_autoreset_mode_in_other_letters_is_the_same_mode(given, mode):
    assert autoreset_mode(given) == mode
    losses = [trainer(env).iterate()["value_loss"] for env in (World(mode), _Named(World(mode), given))]
    assert losses[0] == losses[1]


class _Named:
    """An environment whose mode is spelt otherwise."""

    def __init__(self, env, autoreset) -> None:
        self._env, self.autoreset = env, autoreset

    def __getattr__(self, name):
        return getattr(self._env, name)


@pytest.mark.parametrize("mode", ["disabled", Mode("DISABLED"), None, 3, "next", ""])
def test_an_unknown_autoreset_mode_is_refused_wherever_an_environment_is_taken(mode):
    message = r"autoreset: expected 'same_step' or 'next_step', got "
    with pytest.raises(ValueError, match=r"^env\." + message):
        trainer(_Named(World(), mode))
    with pytest.raises(ValueError, match=r"^env\." + message):
        fly(_Named(World(), mode), lambda obs: torch.zeros(N), max_steps=1)
    with pytest.raises(ValueError, match=r"^env 'mine': " + message):
        _check_env(_Named(World(), mode), "mine", SimpleNamespace(value="mine", dist=None), N)
    with pytest.raises(ValueError, match=r"^env\." + message):
        rsl_rl_env.VecEnvWrapper(_Named(World(), mode))


# ------------------------------------------------------------------------------------------------ too many truncations


def weights_of(trained: Trainer) -> list[torch.Tensor]:
    return [x.clone() for x in trained.policy.state_dict().values()]


@pytest.mark.parametrize("ppo", [{}, {"learner": "torch"}, {"recurrent": "gru"}, {"obs_dtype": "bfloat16"}], ids=str)
def test_more_truncations_than_the_limit_lets_expect_are_valued_as_any_other(ppo):
    """8 time-outs in each rollout of T = 10, where a limit of 1000 steps says at most 4."""
    seen, lines = [], []
    for limit in (None, 1000):
        world = World("same_step", ends=(4, 5, 4, 4), max_episode_length=limit)
        trained = trainer(world, ppo=ppo, echo=lines.append)
        losses = [trained.iterate()["value_loss"] for _ in range(3)]
        seen.append((losses, [x.clone() for x in trained.policy.state_dict().values()]))
        assert trained.planned_nbytes == trained.buffer.nbytes
    assert seen[0][0] == seen[1][0] and all(map(torch.equal, seen[0][1], seen[1][1]))
    expected = ["8 truncations in a rollout, expected at most 4: room for 14 final observations now."]
    assert lines == ([] if "recurrent" in ppo else expected)


def test_gymnasiums_own_time_limits_may_be_unknown():
    """TimeLimit wrappers of single environments do not show in the vector environment's spec."""
    gym = pytest.importorskip("gymnasium")
    from gymnasium.vector import AutoresetMode
    from gymnasium.wrappers import TimeLimit

    from pydrone.envs.adapters import GymnasiumEnv

    losses = []
    for hint in ({}, {"max_episode_length": 10}):
        mode = {"autoreset_mode": AutoresetMode.SAME_STEP}
        wrappers = [lambda env: TimeLimit(env, 10)]
        venv = gym.make_vec("Pendulum-v1", 4, "sync", wrappers=wrappers, vector_kwargs=mode)
        trained = trainer(GymnasiumEnv(venv, seed=1, **hint), num_steps=32)
        losses.append([trained.iterate()["value_loss"] for _ in range(2)])
    assert losses[0] == losses[1]


def test_where_the_host_does_not_count_one_rollout_is_approximated_and_the_user_is_told(monkeypatch):
    """As on a GPU: those without room take their stored value, and the next rollout has room."""
    monkeypatch.setattr(Trainer, "_make_room", lambda *_: None)
    lines, forgotten = [], []
    world = World("same_step", ends=(4, 5, 4, 4), max_episode_length=1000)
    trained = trainer(world, ppo={"lam": 0.0}, echo=lines.append)
    trained.start()
    trained._estimate(*trained.collect())
    buffer, gamma = trained.buffer, trained.config.ppo.gamma
    stored = 1 + gamma * buffer.values - buffer.values
    near = (buffer.advantages - stored).abs() < 1e-6
    assert (buffer.truncated & near).sum() == 4 and buffer.truncated.sum() == 8
    buffer.clear()
    trained._graph = SimpleNamespace(compute=trained.compute, clear=trained.clear, forget=lambda: forgotten.append(1))
    for _ in range(2):
        used = int(trained.iterate()["episodes"])
    assert forgotten == [1] and used > 4 and buffer.layout.final_obs_rows >= used
    (line,) = lines
    assert line.startswith("11 truncations in a rollout, expected at most 4: room for 22 final observations now; 7 ")
    assert line.endswith("bootstrapped with the value before them (stored_value).")
