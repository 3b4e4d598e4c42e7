"""Gymnasium's environments by id: what becomes of spaces, arguments and seeds, and what is refused."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

from pydrone.envs import make
from pydrone.envs.record import Record, settings_of
from pydrone.envs.registry import check, check_name
from pydrone.ppo.config import TrainConfig

gym = pytest.importorskip("gymnasium", reason="gymnasium is not installed")
np = pytest.importorskip("numpy")
spaces = gym.spaces


class Told(gym.Env):
    """Each episode lasts 2 steps; keeps the actions it got. Observations are ``shown``."""

    def __init__(self, obs: Any, action: Any, shown: Any) -> None:
        self.observation_space, self.action_space, self.shown, self.got = obs, action, shown, []

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple:
        super().reset(seed=seed)
        self.seed = seed
        return self.shown, {}

    def step(self, action: Any) -> tuple:
        self.got.append(action)
        return self.shown, 1.0, False, False, {}


BOX = spaces.Box(-1, 1, (1,), np.float32)


@pytest.fixture
def told():
    """Builds ``gymnasium:Told-v0`` with the given spaces; two environments."""
    gym.register("Told-v0", entry_point=Told, max_episode_steps=2)
    zero = np.zeros(1, np.float32)
    yield lambda obs=BOX, action=BOX, shown=zero: make("gymnasium:Told-v0", 2, obs=obs, action=action, shown=shown)
    del gym.registry["Told-v0"]


@pytest.mark.parametrize(
    ("space", "shown", "expected"),
    [
        (spaces.Box(-9, 9, (3,), np.float64), np.array([1.0, 2, 3]), [1, 2, 3]),
        (spaces.Box(0, 255, (2, 2), np.uint8), np.array([[1, 2], [3, 255]], np.uint8), [1, 2, 3, 255]),
        (spaces.Discrete(4), 2, [0, 0, 1, 0]),
        (spaces.Discrete(3, start=5), 5, [1, 0, 0]),
        (spaces.MultiDiscrete([2, 3]), np.array([1, 2]), [0, 1, 0, 0, 1]),
        (spaces.MultiBinary(3), np.array([1, 0, 1], np.int8), [1, 0, 1]),
    ],
    ids=str,
)
def test_observations_become_vectors(space, shown, expected, told):
    env = told(space, shown=shown)
    assert env.obs == (len(expected),)
    obs = env.reset()
    assert obs.dtype == torch.float32 and obs.tolist() == [expected] * 2
    env.step(torch.zeros(2, 1))
    result = env.step(torch.zeros(2, 1))
    assert result.truncated.all() and result.final_obs.tolist() == [expected] * 2
    parts = told(spaces.Dict(a=space, b=BOX), shown={"a": shown, "b": np.ones(1, np.float32)})
    assert {key: x.tolist() for key, x in parts.reset().items()} == {"a": [expected] * 2, "b": [[1]] * 2}


@pytest.mark.parametrize(
    ("space", "given", "got"),
    [
        (spaces.Box(np.float32([-2, 0]), np.float32([2, 6])), [[0.0, 0.0], [2.0, -0.5]], [[0, 3], [2, 1.5]]),
        (spaces.Box(-np.inf, np.inf, (2,)), [[0.0, -9.0], [99.0, 2.0]], [[0, -9], [99, 2]]),
        (spaces.Box(-1, np.inf, (2,)), [[0.0, -9.0], [99.0, 2.0]], [[0, -1], [99, 2]]),
        (spaces.Discrete(3, start=-1), [0, 2], [-1, 1]),
        (spaces.MultiDiscrete([3, 4], start=[1, 1]), [[0, 3], [2, 0]], [[1, 4], [3, 1]]),
        (spaces.MultiDiscrete([[3], [4]]), [[0, 3], [2, 0]], [[[0], [3]], [[2], [0]]]),
    ],
    ids=str,
)
def test_what_becomes_of_actions(space, given, got, told):
    env = told(action=space)
    env.reset()
    env.step(torch.tensor(given))
    actions = [x.unwrapped.got[0] for x in env.venv.envs]
    assert [np.asarray(x).tolist() for x in actions] == got
    assert all(space.contains(x) or isinstance(space, spaces.Box) for x in actions)


TEXT, TUPLE = spaces.Text(3), spaces.Tuple((BOX,))


@pytest.mark.parametrize(
    ("obs", "action", "message"),
    [
        (TEXT, BOX, r"observations: expected a Box, Discrete, .* got Text"),
        (TUPLE, BOX, r"observations: expected a Box, Discrete, .* got Tuple"),
        (spaces.Sequence(BOX), BOX, r"observations: expected a Box, Discrete, .* got Sequence"),
        (spaces.Graph(BOX, None), BOX, r"observations: expected a Box, Discrete, .* got Graph"),
        (spaces.Dict(a=BOX, b=TEXT), BOX, r"observations 'b': expected .* got Text"),
        (BOX, spaces.MultiBinary(2), r"expected a Box or Discrete action space, or a MultiDiscrete one, got MultiB"),
        (BOX, TUPLE, r"expected a Box or Discrete action space, .* got Tuple"),
        (BOX, spaces.MultiDiscrete([2, 2], start=[0, 1]), "expected choices that all start at the same number"),
    ],
)
def test_other_spaces_are_refused_by_name(obs, action, message, told):
    with pytest.raises(ValueError, match=f"^env 'gymnasium:Told-v0': .*{message}"):
        told(obs, action)


@pytest.mark.parametrize(
    ("name", "kwargs", "error", "message"),
    [
        ("Nope-v0", {}, ValueError, "env 'gymnasium:Nope-v0': cannot be made: .*Nope.* doesn't exist"),
        ("no_such_module:X-v0", {}, ImportError, "env 'gymnasium:no_such_module:X-v0': No module named 'no_such_mod"),
        ("Pendulum-v1", {"h": 3}, ValueError, r"env 'gymnasium:Pendulum-v1' with h=3: .* argument 'h'"),
    ],
)
def test_what_gymnasium_cannot_make(name, kwargs, error, message):
    for build in (lambda: make(f"gymnasium:{name}", 2, **kwargs), lambda: check(f"gymnasium:{name}", **kwargs)):
        with pytest.raises(error, match=message):
            build()


def test_without_gymnasium(monkeypatch):
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    with pytest.raises(ImportError, match=r"env 'gymnasium:CartPole-v1' needs gymnasium"):
        make("gymnasium:CartPole-v1", 2)


def test_arguments_and_name_are_recorded():
    env = make("gymnasium:Pendulum-v1", 2, g=5.0)
    assert all(x.unwrapped.g == 5 for x in env.venv.envs)
    record = Record.of(env)
    assert record.name == record.label == "gymnasium:Pendulum-v1"
    assert record.actions.limits == ((-1,), (1,)) and record.actions.onto == ((-2,), (2,))
    assert settings_of(env, record)["env_kwargs"] == {"g": 5.0}
    assert TrainConfig(env=record.name, env_kwargs={"g": 5.0}).env_kwargs == {"g": 5.0}


@pytest.mark.parametrize(
    ("env", "kwargs", "message"),
    [
        ("quadrotor", {"g": 5}, "expected none for quadrotor, whose options are those of"),
        ("gymnasium:Pendulum-v1", {"num_envs": 5}, "expected arguments of the environment itself, got 'num_envs'"),
        ("gymnasium:Pendulum-v1", {"g": [5]}, "expected names with a number, a bool or a string each"),
        ("gymnasium:Pendulum-v1", 5, "expected names with a number, a bool or a string each"),
    ],
)
def test_arguments_that_are_refused(env, kwargs, message):
    with pytest.raises(ValueError, match=f"^env_kwargs: {message}"):
        TrainConfig(env=env, env_kwargs=kwargs)


def test_a_prefix_alone_is_no_name():
    for name in ("gymnasium:", "gymnasium", "Pendulum-v1"):
        with pytest.raises(ValueError, match=rf"env: expected one of .*, got '{name}' \(or gymnasium:ID\)"):
            check_name(name)


def test_seeds_that_lie_close_together_share_no_environment():
    """Ranks and resumed trainings have neighbouring seeds; environment i must not be another's environment i - 1."""
    starts = [make("gymnasium:Pendulum-v1", 4, seed=seed).reset() for seed in (1, 2, 1, -1)]
    assert torch.equal(starts[0], starts[2])
    assert len({tuple(row) for x in (starts[0], starts[1], starts[3]) for row in x.tolist()}) == 12
