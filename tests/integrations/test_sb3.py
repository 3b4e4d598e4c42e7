# ruff: noqa: E402 (imports that need the peer follow the check that it is installed)
"""pydrone's rollout buffers for Stable-Baselines3: by hand, against its own buffers, and in its real trainers."""

from __future__ import annotations

import importlib
import importlib.metadata
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch

stable_baselines3 = pytest.importorskip("stable_baselines3")
gym = pytest.importorskip("gymnasium")

from gymnasium import spaces
from stable_baselines3 import A2C, PPO
from stable_baselines3.common import buffers as theirs
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from pydrone.envs.adapters import GymnasiumEnv
from pydrone.envs.quadrotor import Quadrotor
from pydrone.integrations import sb3 as ours

pytestmark = pytest.mark.filterwarnings("ignore:You have specified a mini-batch size")

BOX = spaces.Box(-np.inf, np.inf, (3,), np.float32)
DICT = spaces.Dict({"state": BOX, "image": spaces.Box(0, 255, (2, 2), np.uint8), "goal": spaces.Discrete(5)})
ARRAYS = ("actions", "rewards", "values", "log_probs", "advantages", "returns", "episode_starts")


def same_dtype(x, y, name):
    """Before 2.7.1 Stable-Baselines3 stored observations and actions in float32, for any space."""
    older = tuple(map(int, stable_baselines3.__version__.split(".")[:3])) < (2, 7, 1)
    return x.dtype == y.dtype or (older and name in ("observations", "actions"))


def close(got, expected):
    """Equal to 1e-5 of the largest value."""
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def fill(buffer, steps, last_values, dones):
    buffer.reset()
    for step in steps:
        buffer.add(*step)
    buffer.compute_returns_and_advantage(torch.as_tensor(last_values), np.asarray(dones))


def random_rollout(obs_space, action_space, steps, envs, seed=0):
    """Arguments as ``collect_rollouts`` passes them; a third of the steps end an episode."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    obs_space.seed(seed)
    action_space.seed(seed)

    def batch(space):
        if isinstance(space, spaces.Dict):
            return {key: batch(part) for key, part in space.items()}
        return np.stack([np.asarray(space.sample()) for _ in range(envs)])

    ends = rng.random((steps + 1, envs)) < 0.3
    rows = []
    for t in range(steps):
        actions = batch(action_space)
        if isinstance(action_space, spaces.Discrete):
            actions = actions.reshape(-1, 1)
        reward = rng.normal(size=envs).astype(np.float32)
        rows.append((batch(obs_space), actions, reward, ends[t], torch.randn(envs, 1), torch.randn(envs)))
    return rows, torch.randn(envs, 1), ends[steps]


def test_by_hand():
    # gamma = lambda = 1/2; in environment 0 an episode starts at step 2, so step 1 ended one; the last step of
    # environment 1 ended one, so its last value 100 is not used.
    buffer = ours.RolloutBuffer(3, spaces.Discrete(9), spaces.Discrete(2), "cpu", gae_lambda=0.5, gamma=0.5, n_envs=2)
    steps = [
        (np.array([3, 6]), np.array([[1], [0]]), np.array([1.0, 2.0]), starts, torch.tensor([[1.0], [2.0]]), log_probs)
        for starts, log_probs in [
            (np.array([True, True]), torch.tensor([0.1, 0.2])),
            (np.array([False, False]), torch.tensor([0.3, 0.4])),
            (np.array([True, False]), torch.tensor([0.5, 0.6])),
        ]
    ]
    fill(buffer, steps, [[8.0], [100.0]], [False, True])
    # environment 0: A2 = 1 + 8/2 - 1 = 4 (no end); A1 = 1 + 0 - 1 = 0 (an end); A0 = 1 + 1/2 - 1 + 0/4 = 1/2
    # environment 1: A2 = 2 + 0 - 2 = 0 (an end); A1 = 2 + 2/2 - 2 + 0/4 = 1; A0 = 1 + 1/4 = 5/4
    assert buffer.advantages.tolist() == [[0.5, 1.25], [0.0, 1.0], [4.0, 0.0]]
    assert buffer.returns.tolist() == [[1.5, 3.25], [1.0, 3.0], [5.0, 2.0]]
    assert buffer.episode_starts.tolist() == [[1, 1], [0, 0], [1, 0]]
    (batch,) = buffer.get()
    at = {(a.item(), o.item()) for a, o in zip(batch.advantages, batch.observations)}
    assert at == {(0.5, 3), (0.0, 3), (4.0, 3), (1.25, 6), (1.0, 6), (0.0, 6)}


SPACES = [
    (BOX, spaces.Box(-1, 1, (2,), np.float32)),
    (spaces.Box(-1, 1, (2,), np.float64), spaces.Box(-1, 1, (1, 2), np.float64)),
    (spaces.Box(0, 255, (3, 4, 4), np.uint8), spaces.Discrete(4)),
    (spaces.Discrete(7), spaces.MultiDiscrete([3, 4])),
    (spaces.MultiDiscrete([3, 4]), spaces.MultiBinary(3)),
    (spaces.MultiBinary(4), spaces.Discrete(2)),
    (DICT, spaces.Discrete(3)),
]


@pytest.mark.parametrize("obs_space, action_space", SPACES, ids=lambda space: type(space).__name__)
@pytest.mark.parametrize("steps, envs", [(1, 1), (7, 5), (16, 4)])
def test_against_its_own_buffer(obs_space, action_space, steps, envs):
    """Two rollouts in the same memory: every array, and every minibatch under numpy's permutation."""
    kind = "DictRolloutBuffer" if obs_space is DICT else "RolloutBuffer"
    arguments = (steps, obs_space, action_space, "cpu", 0.9, 0.97, envs)
    expected, got = getattr(theirs, kind)(*arguments), getattr(ours, kind)(*arguments, shuffle="sb3")
    assert isinstance(got, getattr(theirs, kind))
    for seed in range(2):
        rollout = random_rollout(obs_space, action_space, steps, envs, seed)
        for buffer in (expected, got):
            fill(buffer, *rollout)
            assert buffer.full and buffer.pos == steps and buffer.size() == steps
        for name in ARRAYS:
            x, y = getattr(expected, name), getattr(got, name)
            assert same_dtype(x, y, name) and x.shape == y.shape, name
            close(y, x)
        first, second = expected.observations, got.observations
        pairs = [(first[k], second[k]) for k in first] if isinstance(first, dict) else [(first, second)]
        for x, y in pairs:
            assert same_dtype(x, y, "observations")
            np.testing.assert_array_equal(x, y.astype(x.dtype))
        for size in (None, 1, 3, steps * envs, steps * envs + 5):
            epochs = []
            for buffer in (expected, got):
                np.random.seed(seed)
                epochs.append(list(buffer.get(size)))
            assert len(epochs[0]) == len(epochs[1])
            for x, y in zip(*epochs):
                same_samples(x, y)


def same_samples(x, y):
    assert type(x) is type(y)
    for name, one, other in zip(x._fields, x, y):
        if name == "observations" and isinstance(one, dict):
            assert one.keys() == other.keys()
        parts = [(one[k], other[k]) for k in one] if isinstance(one, dict) else [(one, other)]
        for a, b in parts:
            assert same_dtype(a, b, name) and a.shape == b.shape, name
            close(b.numpy(), a.numpy())


def test_what_the_collector_writes_over_is_kept():
    """Environments may return the same arrays in every step."""
    rollout, last_values, dones = random_rollout(BOX, spaces.Discrete(2), 5, 3)
    arguments = (5, BOX, spaces.Discrete(2), "cpu", 0.9, 0.97, 3)
    expected, got = theirs.RolloutBuffer(*arguments), ours.RolloutBuffer(*arguments)
    fill(expected, rollout, last_values, dones)
    kept = [np.empty_like(x) for x in rollout[0][:4]]
    for step in rollout:
        for array, x in zip(kept, step):
            array[...] = x
        got.add(*kept, *step[4:])
    got.compute_returns_and_advantage(last_values, dones)
    for name in ARRAYS:
        close(getattr(got, name), getattr(expected, name))


def test_arrays_that_pytorch_does_not_take():
    buffer = ours.RolloutBuffer(1, BOX, spaces.Discrete(2), "cpu", n_envs=2)
    obs = np.arange(6, dtype=np.float32).reshape(2, 3)
    obs.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        buffer.add(obs[:, ::-1], np.array([0, 1]), np.ones(2), np.ones(2), torch.ones(2, 1), torch.ones(2))
    assert buffer.observations[0].tolist() == [[2, 1, 0], [5, 4, 3]]


def test_full_shuffle():
    """Every sample once, in a different order each epoch and rollout; numpy's seed reproduces it."""

    def orders(seed):
        np.random.seed(seed)
        buffer, found = ours.RolloutBuffer(8, BOX, spaces.Discrete(2), "cpu", n_envs=4), []
        for _ in range(2):
            for t in range(8):
                number = np.arange(4, dtype=np.float32) * 8 + t
                obs = np.repeat(number[:, None], 3, 1)
                buffer.add(obs, np.zeros((4, 1), int), number, np.zeros(4), torch.zeros(4, 1), torch.zeros(4))
            buffer.compute_returns_and_advantage(torch.zeros(4, 1), np.zeros(4))
            for _ in range(2):
                batches = list(buffer.get(5))
                assert [len(x.returns) for x in batches] == [5] * 6 + [2]
                found.append(torch.cat([x.observations[:, 0] for x in batches]).long())
            buffer.reset()
        return found

    one, again, other = orders(3), orders(3), orders(4)
    for order in one:
        assert sorted(order.tolist()) == list(range(32))
    assert len({tuple(order.tolist()) for order in [*one, *other]}) == 8
    assert all(torch.equal(x, y) for x, y in zip(one, again))


def test_rewards_may_be_changed_before_the_advantages_are_computed_anew():
    rollout = random_rollout(BOX, spaces.Discrete(2), 6, 3)
    arguments = (6, BOX, spaces.Discrete(2), "cpu", 0.9, 0.97, 3)
    expected, got = theirs.RolloutBuffer(*arguments), ours.RolloutBuffer(*arguments)
    for buffer in (expected, got):
        fill(buffer, *rollout)
        buffer.rewards += 1.0
        buffer.rewards = buffer.rewards * 2
        buffer.compute_returns_and_advantage(*rollout[1:])
    close(got.advantages, expected.advantages)


def test_memory_stays():
    buffer = ours.RolloutBuffer(6, BOX, spaces.Discrete(2), "cpu", n_envs=3)
    places = set()
    for seed in range(3):
        fill(buffer, *random_rollout(BOX, spaces.Discrete(2), 6, 3, seed))
        places.add((buffer.values.ctypes.data, buffer.observations.ctypes.data, buffer.advantages.ctypes.data))
    assert len(places) == 1


def test_errors_name_the_argument():
    make = ours.RolloutBuffer
    with pytest.raises(ValueError, match="shuffle: expected 'full' or 'sb3', got 'none'"):
        make(4, BOX, spaces.Discrete(2), "cpu", shuffle="none")
    with pytest.raises(ValueError, match="observation_space: expected DictRolloutBuffer for a Dict space"):
        make(4, DICT, spaces.Discrete(2), "cpu")
    with pytest.raises(ValueError, match="observation_space: expected RolloutBuffer for a Box space"):
        ours.DictRolloutBuffer(4, BOX, spaces.Discrete(2), "cpu")
    buffer = make(2, BOX, spaces.Discrete(2), "cpu")
    step = random_rollout(BOX, spaces.Discrete(2), 1, 1)[0][0]
    buffer.add(*step)
    with pytest.raises(RuntimeError, match=r"^get: expected a full buffer, 1 of 2 steps are stored$"):
        next(buffer.get(1))
    with pytest.raises(ValueError, match=r"^returns: expected shape \[2, 1\], got \[2\]$"):
        buffer.returns = np.zeros(2)
    with pytest.raises(ValueError, match=r"^obs: expected shape \[1, 3\], got \[1, 4\]$"):
        buffer.add(np.zeros((1, 4)), *step[1:])
    buffer.add(*step)
    with pytest.raises(RuntimeError, match="holds 2 that are not discarded"):
        buffer.add(*step)
    buffer.compute_returns_and_advantage(torch.zeros(1, 1), np.zeros(1))
    with pytest.raises(ValueError, match="batch_size: expected at least 1, got 0"):
        next(buffer.get(0))
    batches = buffer.get(1)
    next(batches)
    buffer.reset()
    with pytest.raises(RuntimeError, match="has discarded the rollout"):
        next(batches)


def test_versions(monkeypatch):
    supported = r"pydrone supports stable-baselines3 from 2\.4 to before 3$"
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.8.0")
    with pytest.raises(ImportError, match=r"^stable-baselines3 1\.8\.0 is installed; " + supported):
        importlib.reload(ours)

    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(ImportError, match="^stable-baselines3 is not installed; " + supported):
        importlib.reload(ours)


def test_nothing_is_imported_before():
    code = "import sys, pydrone.integrations.peer; assert not {'stable_baselines3', 'gymnasium'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", code], check=True)


class Vectorised(VecEnv):
    """Any pydrone environment for Stable-Baselines3, which takes the reset steps of NEXT_STEP as ordinary steps."""

    def __init__(self, env, obs_space, action_space) -> None:
        super().__init__(env.num_envs, obs_space, action_space)
        self.env, self.discrete = env, isinstance(action_space, spaces.Discrete)
        self.ends = {"terminated": 0, "truncated": 0}

    def reset(self):
        return self.env.reset().numpy().copy()

    def step_async(self, actions) -> None:
        self.actions = torch.from_numpy(np.array(actions))

    def step_wait(self):
        result = self.env.step(self.actions)
        obs, dones, truncated = (x.numpy().copy() for x in (result.obs, result.dones, result.truncated))
        final = obs if result.final_obs is None else result.final_obs.numpy()
        infos = [{} for _ in range(self.num_envs)]
        for i in np.flatnonzero(dones):
            infos[i] = {"terminal_observation": final[i].copy(), "TimeLimit.truncated": bool(truncated[i])}
        self.ends["truncated"] += int(truncated.sum())
        self.ends["terminated"] += int((dones & ~truncated).sum())
        return obs, result.rewards.numpy().copy(), dones, infos

    def close(self) -> None:
        self.env.close()

    def get_attr(self, name, indices=None):
        return [None] * self.num_envs

    def set_attr(self, name, value, indices=None) -> None:
        raise NotImplementedError

    def env_method(self, name, *args, indices=None, **kwargs):
        raise NotImplementedError

    def env_is_wrapped(self, wrapper, indices=None):
        return [False] * self.num_envs


def vectorised(name):
    if name == "quadrotor":
        env = Quadrotor(4, seed=1, max_episode_length=7, max_tilt=15.0)
        env.randomize_episode_lengths()
        return Vectorised(env, spaces.Box(-np.inf, np.inf, (17,), np.float32), spaces.Box(-1, 1, (4,), np.float32))
    mode = gym.vector.AutoresetMode(name)
    venv = gym.make_vec(
        "CartPole-v1", 4, vectorization_mode="sync", max_episode_steps=16, vector_kwargs={"autoreset_mode": mode}
    )
    return Vectorised(GymnasiumEnv(venv, seed=1), venv.single_observation_space, venv.single_action_space)


class Recorder:
    """Records what the trainer computes: advantages and returns of whole rollouts, the loss of each update."""

    def __init__(self, monkeypatch) -> None:
        self.rollouts, self.losses = [], []
        backward = torch.Tensor.backward

        def recorded(loss, *args, **kwargs):
            self.losses.append(loss.item())
            return backward(loss, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, "backward", recorded)

    def of(self, buffer_class):
        recorder = self

        class Recording(buffer_class):
            def compute_returns_and_advantage(self, last_values, dones):
                super().compute_returns_and_advantage(last_values, dones)
                recorder.rollouts.append((self.advantages.copy(), self.returns.copy()))

        return Recording


@pytest.mark.parametrize("name", ["SameStep", "NextStep", "quadrotor"])
def test_ppo_with_and_without(name, monkeypatch):
    runs = []
    for buffers, kwargs in ((theirs, {}), (ours, {"shuffle": "sb3"})):
        with monkeypatch.context() as patch:
            recorder, env = Recorder(patch), vectorised(name)
            PPO(
                "MlpPolicy",
                env,
                n_steps=32,
                batch_size=48,  # 128 samples: 48, 48, 32
                n_epochs=2,
                seed=3,
                device="cpu",
                rollout_buffer_class=recorder.of(buffers.RolloutBuffer),
                rollout_buffer_kwargs=kwargs,
                policy_kwargs={"net_arch": [16]},
            ).learn(2 * 128)
        assert min(env.ends.values()) > 2, env.ends
        runs.append(recorder)
    agree(*runs)


def agree(expected, got):
    assert len(expected.rollouts) == len(got.rollouts) >= 2
    for x, y in zip(expected.rollouts, got.rollouts):
        for a, b in zip(x, y):
            close(b, a)
    assert len(expected.losses) == len(got.losses) >= 10
    for a, b in zip(expected.losses[:10], got.losses):
        assert abs(a - b) <= 1e-4 * (1 + abs(a))


class Grouped(gym.Env):
    """Dict observations, with terminations and truncations."""

    observation_space, action_space = DICT, spaces.Discrete(3)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self.observe(), {}

    def observe(self):
        state = self.np_random.normal(size=3).astype(np.float32)
        return {"state": state, "image": self.np_random.integers(0, 255, (2, 2), np.uint8), "goal": self.steps % 5}

    def step(self, action):
        self.steps += 1
        return self.observe(), float(action), self.np_random.random() < 0.1, self.steps == 9, {}


def test_dict_observations_and_a2c(monkeypatch):
    runs = []
    for buffers, kwargs in ((theirs, {}), (ours, {"shuffle": "sb3"})):
        with monkeypatch.context() as patch:
            recorder = Recorder(patch)
            A2C(
                "MultiInputPolicy",
                DummyVecEnv([Grouped] * 3),
                n_steps=8,
                seed=3,
                device="cpu",
                rollout_buffer_class=recorder.of(buffers.DictRolloutBuffer),
                rollout_buffer_kwargs=kwargs,
            ).learn(12 * 24)
        runs.append(recorder)
    agree(*runs)


def test_default_shuffle_trains_saves_and_loads(tmp_path):
    env = gym.make("CartPole-v1", max_episode_steps=16)
    model = PPO(
        "MlpPolicy", env, n_steps=64, batch_size=48, seed=0, device="cpu", rollout_buffer_class=ours.RolloutBuffer
    )
    model.learn(128)
    model.save(tmp_path / "model.zip")
    loaded = PPO.load(tmp_path / "model.zip", env=env, device="cpu")
    assert type(loaded.rollout_buffer) is ours.RolloutBuffer
    loaded.learn(64)
    assert loaded.rollout_buffer.full
