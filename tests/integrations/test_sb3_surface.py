# ruff: noqa: E402 (imports that need the peer follow the check that it is installed)
"""All that users touch of Stable-Baselines3's rollout buffers: the same calls, the same outcome, for every dtype."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch

stable_baselines3 = pytest.importorskip("stable_baselines3")

from gymnasium import spaces
from stable_baselines3.common import buffers as theirs
from surface import outcome, same_outcome
from test_sb3 import ARRAYS, BOX, DICT, random_rollout

from pydrone.integrations import sb3 as ours

T, N = 3, 2


def arrays(buffer):
    """Every array that a user may read, and the counters."""
    found = {name: np.copy(getattr(buffer, name)) for name in ARRAYS}
    obs = buffer.observations
    found["observations"] = {k: np.copy(x) for k, x in obs.items()} if isinstance(obs, dict) else np.copy(obs)
    return found, buffer.pos, buffer.full, buffer.size(), buffer.generator_ready


def epoch(buffer, size=None):
    np.random.seed(5)
    return [tuple(x) for x in buffer.get(size)]


def put(buffer, steps=T, seed=0):
    """Adds steps; returns the rest of the arguments of a rollout."""
    rows, last_values, dones = random_rollout(buffer.observation_space, buffer.action_space, T, N, seed)
    for row in rows[:steps]:
        buffer.add(*row)
    return rows[steps:], last_values, dones


def whole(buffer, seed=0):
    _, last_values, dones = put(buffer, seed=seed)
    buffer.compute_returns_and_advantage(last_values, dones)
    return last_values, dones


def partly(buffer):
    rest, last_values, dones = put(buffer, 2)
    before = arrays(buffer)
    buffer.compute_returns_and_advantage(last_values, dones)
    computed = arrays(buffer)
    for row in rest:
        buffer.add(*row)
    return before, computed, arrays(buffer), epoch(buffer)


def after_a_reset(buffer):
    whole(buffer)
    buffer.reset()
    return arrays(buffer), put(buffer, 1)[0][0][2], arrays(buffer), put(buffer, 2), epoch(buffer)


def written(name, change):
    """``change``, of one array, after the advantages were computed, and before they are computed anew."""

    def call(buffer):
        again = whole(buffer)
        change(buffer, name)
        first = arrays(buffer), epoch(copy.deepcopy(buffer))
        buffer.compute_returns_and_advantage(*again)
        return first, arrays(buffer), epoch(buffer)

    return call


def in_place(buffer, name):
    getattr(buffer, name)[1:] = 1


def assigned(buffer, name):
    setattr(buffer, name, getattr(buffer, name)[::-1].copy())


def augmented(buffer, name):
    exec(f"buffer.{name} += buffer.{name}[:1]", {"buffer": buffer})


def early(buffer):
    """Arrays are written while the rollout is collected."""
    rest, last_values, dones = put(buffer, 2)
    buffer.rewards[0] = 7
    buffer.episode_starts[1] = [1, 0]
    buffer.returns = buffer.returns + 1
    for row in rest:
        buffer.add(*row)
    unscanned = arrays(buffer), epoch(copy.deepcopy(buffer))
    buffer.compute_returns_and_advantage(last_values, dones)
    return unscanned, epoch(buffer)


def copied(how):
    def call(buffer):
        put(buffer, 2)
        twin = how(buffer)
        rest, last_values, dones = put(buffer, 0)
        twin.add(*rest[2])
        twin.compute_returns_and_advantage(last_values, dones)
        twin.rewards[0] = 9
        return arrays(buffer), arrays(twin), epoch(twin)

    return call


def resized(buffer):
    whole(buffer)
    buffer.buffer_size = 5
    buffer.reset()
    shape = buffer.rewards.shape
    for seed in range(2):
        put(buffer, 2 + seed, seed)
    return shape, arrays(buffer), epoch(buffer)


def sampled(buffer):
    whole(buffer)
    drawn = epoch(buffer)
    np.random.seed(1)
    return drawn, tuple(buffer.sample(7)), tuple(buffer._get_samples(np.array([5, 0, 5])))


def retuned(buffer):
    last_values, dones = whole(buffer)
    buffer.gamma, buffer.gae_lambda = 0.5, 1.0
    buffer.compute_returns_and_advantage(last_values, dones)
    return arrays(buffer), buffer.gamma, buffer.gae_lambda


def extended(buffer):
    rows, *_ = put(buffer, 0)
    buffer.extend(*zip(*rows))
    return arrays(buffer)


def broadcast(buffer):
    """What NumPy's assignment spreads over the environments, and lists and numbers."""
    rows, *_ = put(buffer, 0)
    obs, action, _, _, value, log_prob = rows[0]
    buffer.add(obs[0], action.tolist() and action, 1, True, value[:1], log_prob[:1])
    buffer.add(obs[None], action, [1, 2], [False, True], value.flatten(), log_prob[0])
    buffer.add(obs.astype(np.float64), action, np.array([True, False]), 0, value.double(), log_prob.double())
    buffer.compute_returns_and_advantage(torch.ones(1), np.zeros(1))
    return arrays(buffer), epoch(buffer)


def stale(buffer):
    whole(buffer)
    batches = buffer.get(2)
    next(batches)
    buffer.reset()
    return next(batches)


SURFACE = {
    "fresh": arrays,
    "attributes": lambda b: (b.buffer_size, b.n_envs, b.obs_shape, b.action_dim, b.gamma, b.gae_lambda, str(b.device)),
    "fresh get": epoch,
    "fresh compute": lambda b: (b.compute_returns_and_advantage(torch.ones(N, 1), np.zeros(N)), arrays(b)),
    "partly filled": partly,
    "partly filled get": lambda b: (put(b, 2), epoch(b)),
    "get before compute": lambda b: (put(b), arrays(b), epoch(b, 4), epoch(b)),
    "after a reset": after_a_reset,
    "add beyond the end": lambda b: (put(b), put(b, 1)),
    "add of wrong shapes": lambda b: b.add(*(x[:1] for x in put(b, 0)[0][0][:3]), *put(b, 0)[0][0][3:5], torch.ones(5)),
    "written early": early,
    "resized": resized,
    "sampled": sampled,
    "retuned": retuned,
    "extended": extended,
    "broadcast": broadcast,
    "get of a batch larger than the rollout": lambda b: (whole(b), epoch(b, 100)),
    "get of half a sample": lambda b: (whole(b), epoch(b, 0.5)),
    "reset during get": stale,
    "deepcopy": copied(copy.deepcopy),
    "pickle": copied(lambda b: pickle.loads(pickle.dumps(b))),
    "to_torch": lambda b: (b.to_torch(np.arange(3)), b.swap_and_flatten(np.zeros((T, N)))),
    **{
        f"{name} {change.__name__}": written(name, change)
        for name in (*ARRAYS, "observations")
        for change in (in_place, assigned, augmented)
        if (name, change) != ("episode_starts", augmented)  # flags are 0 or 1
    },
}


@pytest.mark.parametrize("call", SURFACE.values(), ids=SURFACE)
def test_the_same_calls_have_the_same_outcome(call):
    """What Stable-Baselines3's buffer takes and gives, its arrays written by callers, or an error from both."""
    arguments = (T, BOX, spaces.Box(-1, 1, (2,), np.float32), "cpu", 0.9, 0.97, N)
    expected = outcome(call, theirs.RolloutBuffer(*arguments))
    same_outcome(expected, outcome(call, ours.RolloutBuffer(*arguments, shuffle="sb3")))


OLDER = tuple(map(int, stable_baselines3.__version__.split(".")[:3])) < (2, 7, 1)
keeps_dtypes = pytest.mark.skipif(OLDER, reason="before 2.7.1 it stored all observations and actions in float32")


@keeps_dtypes
def test_groups_that_callers_write():
    def call(buffer):
        whole(buffer)
        buffer.observations["image"] = np.full_like(buffer.observations["image"], 3)
        buffer.observations["goal"][1] = 4
        buffer.observations = {**buffer.observations, "state": buffer.observations["state"] * 2}
        return arrays(buffer), [(x.pop("state"), x.pop("image"), x.pop("goal"), *y) for x, *y in epoch(buffer)]

    arguments = (T, DICT, spaces.Discrete(3), "cpu", 0.9, 0.97, N)
    same_outcome(call(theirs.DictRolloutBuffer(*arguments)), call(ours.DictRolloutBuffer(*arguments, shuffle="sb3")))


DTYPES = [
    *(np.float16, np.float32, np.float64, np.longdouble, np.bool_, np.int8, np.int16, np.int32, np.int64, np.longlong),
    *(np.uint8, np.uint16, np.uint32, np.uint64, np.ulonglong),
]


@keeps_dtypes
@pytest.mark.parametrize("shape", [(2,), (2, 1, 3), (), (0,)], ids=str)
def test_every_dtype_comes_out_as_it_went_in(shape):
    """Of observations, alone and in a group, and of actions."""
    for dtype in DTYPES:

        def call(module, dtype=dtype):
            high = 1 if dtype == np.bool_ else 100
            box = spaces.Box(0, high, shape, np.float64 if dtype in (np.bool_, np.longdouble) else dtype)
            box.dtype = np.dtype(dtype)  # Gymnasium refuses some
            results = []
            for obs in (box, spaces.Dict({"a": box, "b": BOX})):
                kind = module.DictRolloutBuffer if isinstance(obs, spaces.Dict) else module.RolloutBuffer
                more = {"shuffle": "sb3"} if module is ours else {}
                buffer = kind(T, obs, box, "cpu", n_envs=N, **more)
                whole(buffer)
                results.append(arrays(buffer))
                results += [x if isinstance(x, dict) else {"a": x} for batch in epoch(buffer, 4) for x in batch]
            return results

        same_outcome(outcome(call, theirs), outcome(call, ours), str(np.dtype(dtype)))
