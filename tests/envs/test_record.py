"""What a run records of its environment: its name, and what becomes of actions in it."""

from __future__ import annotations

import types

import numpy as np
import pytest
import torch

from pydrone.envs import make, registry
from pydrone.envs.quadrotor import Quadrotor, QuadrotorCourse
from pydrone.envs.record import Actions, Record
from pydrone.ppo.training import checkpoint

INF = float("inf")


class Own:
    num_envs, obs, actions, device, max_episode_length, autoreset = 2, 3, 2, torch.device("cpu"), None, "same_step"

    def reset(self): ...
    def step(self, actions): ...
    def randomize_episode_lengths(self): ...
    def close(self): ...


class Derived(Quadrotor):
    pass


class Wrapped:
    def __init__(self, env) -> None:
        self.env = env

    def __getattr__(self, name):
        return getattr(self.env, name)


class Point:
    """An entry point."""

    dist = None

    def __init__(self, name: str, value: object) -> None:
        self.name, self.value, self._loaded = name, f"{__name__}:{getattr(value, '__qualname__', value)}", value

    def load(self):
        return self._loaded


@pytest.fixture
def offered(monkeypatch):
    def offer(*points: Point) -> None:
        def entry_points(group, name=None):
            return [x for x in points if name in (None, x.name)]

        monkeypatch.setattr(registry, "entry_points", entry_points)

    return offer


def test_the_name_is_that_of_what_builds_it_and_of_nothing_else(offered):
    class Offered(Own):
        def __init__(self, num_envs, device, seed):
            pass

    def factory(num_envs, device, seed):
        return Own()

    offered(Point("offered", Offered), Point("made", factory), Point("quadrotor", Own))
    assert Record.of(Quadrotor(2, hold=1.0)).name == Record.of(make("quadrotor", 2)).name == "quadrotor"
    assert Record.of(QuadrotorCourse(2)).name == "quadrotor-course"
    assert Record.of(make("offered", 2)).name == Record.of(Offered(2, "cpu", 0)).name == "offered"
    assert Record.of(make("made", 2)).name == "made"
    objects = {
        Own(): "Own",  # pydrone's own names cannot be taken
        Derived(2): "Derived",
        Wrapped(Quadrotor(2)): "Wrapped",
        Wrapped(make("made", 2)): "Wrapped",
    }
    for env, label in objects.items():
        assert Record.of(env)[:2] == (None, f"{__name__}:{label}")


# What an environment says: what becomes of the actions [1.555, -3].
SAID = {
    "nothing": ({}, [1.555, -3]),
    "none": ({"action_limits": None}, [1.555, -3]),
    "numbers": ({"action_limits": (-1, 1)}, [1, -1]),
    "tensors": ({"action_limits": (torch.tensor([-2.0, -1.0]), torch.tensor([1.5, 1.0]))}, [1.5, -1]),
    "arrays": ({"action_limits": (np.array([-2.0, -1.0]), np.array([1.5, 1.0]))}, [1.5, -1]),
    "one-sided": ({"action_limits": ([-INF, 0], [INF, INF])}, [1.555, 0]),
    "no bounds": ({"action_limits": ([-INF, -INF], [INF, INF])}, [1.555, -3]),
    "no room": ({"action_limits": ([0.5, -4], [0.5, INF])}, [0.5, -3]),
    "mapped": ({"action_limits": (-2, 2), "action_range": ([0, -8], [10, 8])}, [8.8875, -8]),
    "integers": ({"action_integers": True}, [1, -3]),
}


@pytest.mark.parametrize("kind", SAID)
def test_what_becomes_of_actions_is_recorded_and_read_again(kind, tmp_path):
    said, expected = SAID[kind]
    env = Own()
    vars(env).update(said)
    record = Record.of(env)
    assert record.actions.said == bool(said)
    state = {"environment": record.stored(), "config": {"env": "quadrotor"}}
    read = Record.read(checkpoint.load(checkpoint.save(tmp_path / "model.pt", state)))
    assert read == record
    assert read.actions.applied(torch.tensor([[1.555, -3]])).tolist() == [pytest.approx(expected)]


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"action_limits": (1, -1)}, r"env\.action_limits: expected lower bounds and upper ones .* got \(1, -1\)"),
        ({"action_limits": 1}, r"env\.action_limits: .*, 2 of each or one for all, got 1"),
        ({"action_limits": ([0, 0, 0], [1, 1, 1])}, r"env\.action_limits: expected"),
        ({"action_limits": (float("nan"), 1)}, r"env\.action_limits: expected"),
        ({"action_limits": ("low", "high")}, r"env\.action_limits: expected"),
        ({"action_range": (0, 1)}, r"env\.action_range: expected finite bounds, .* got .* and None"),
        ({"action_range": (0, 1), "action_limits": (0, INF)}, r"env\.action_range: expected finite bounds"),
        ({"action_range": (0, 1), "action_limits": ([0, 0], [1, 0])}, r"env\.action_range: .* with room between them"),
    ],
)
def test_bounds_that_are_none_are_named(said, message):
    env = Own()
    vars(env).update(said)
    with pytest.raises(ValueError, match=message):
        Actions.of(env)


@pytest.mark.parametrize("stored", [3, {}, {"name": None, "label": "a", "actions": {}, "constants": {}}])
def test_something_else_in_place_of_a_record(stored):
    with pytest.raises(ValueError, match="environment: expected the record of one, got something else"):
        Record.read({"environment": stored, "config": {"env": "quadrotor"}})


def test_a_task_without_randomisation_of_an_own_environment():
    """An environment may borrow a task's constants without having the task."""
    from pydrone.envs.record import settings_of

    env = types.SimpleNamespace(config=Quadrotor(1).config, num_envs=3, actions=4)
    assert settings_of(env, Record.of(env))["task"].hold == 0
