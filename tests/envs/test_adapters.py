from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from pydrone.envs import Env
from pydrone.envs.adapters import GymnasiumEnv, RslRlEnv

gym = pytest.importorskip("gymnasium")
vector = pytest.importorskip("gymnasium.vector")
Mode = vector.AutoresetMode


class Counting(gym.Env):
    """Observes (steps in this episode, 100 * episode + number); ends after ``length`` steps; ``end`` says how."""

    def __init__(self, number: int, length: int, end: str, as_dict: bool = False, action_space: Any = None) -> None:
        box = gym.spaces.Box(-np.inf, np.inf, (2,), np.float64)
        image = gym.spaces.Box(0, 255, (2, 2), np.uint8)
        self.as_dict = as_dict
        self.observation_space = gym.spaces.Dict({"image": image, "state": box}) if as_dict else box
        self.action_space = action_space or gym.spaces.Box(-2, np.array([2, 4], np.float32), (2,), np.float32)
        self.number, self.length, self.end = number, length, end
        self.episode, self.count = -1, 0
        self.got: list[Any] = []

    def _observe(self) -> Any:
        state = np.array([self.count, 100 * self.episode + self.number], np.float64)
        return {"image": np.full((2, 2), self.count, np.uint8), "state": state} if self.as_dict else state

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        self.episode, self.count = self.episode + 1, 0
        return self._observe(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        self.got.append(action)
        self.count += 1
        over = self.count == self.length
        return self._observe(), float(self.count), over and self.end != "trunc", over and self.end != "term", {}


ENDS = ((0, 2, "trunc"), (1, 3, "term"), (2, 3, "both"))


def make(mode: Any, asynchronous: bool = False, **kwargs: Any) -> Any:
    fns = [lambda args=args: Counting(*args, **kwargs) for args in ENDS]
    return (vector.AsyncVectorEnv if asynchronous else vector.SyncVectorEnv)(fns, autoreset_mode=mode)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_same_step(asynchronous: bool) -> None:
    env = GymnasiumEnv(make(Mode.SAME_STEP, asynchronous), max_episode_length=3)
    assert isinstance(env, Env)
    assert (env.num_envs, env.obs, env.actions, env.autoreset, env.max_episode_length) == (3, (2,), 2, "same_step", 3)
    obs = env.reset()
    assert obs.dtype == torch.float32
    assert obs.tolist() == [[0, 0], [0, 1], [0, 2]]
    #        observations                       dones      truncated
    table = [
        ([[1, 0], [1, 1], [1, 2]], (0, 0, 0), (0, 0, 0)),
        ([[0, 100], [2, 1], [2, 2]], (1, 0, 0), (1, 0, 0)),
        ([[1, 100], [0, 101], [0, 102]], (0, 1, 1), (0, 0, 0)),
        ([[0, 200], [1, 101], [1, 102]], (1, 0, 0), (1, 0, 0)),
    ]
    finals = {1: [2, 0], 3: [2, 100]}
    for t, (expected, dones, truncated) in enumerate(table):
        result = env.step(torch.zeros(3, 2))
        assert result.obs.tolist() == expected
        assert tuple(result.dones.int().tolist()) == dones
        assert tuple(result.truncated.int().tolist()) == truncated
        assert result.valid is None
        assert result.rewards.dtype == torch.float32
        assert result.final_obs is not None
        if t in finals:
            assert result.final_obs[0].tolist() == finals[t]
        if t == 2:
            assert result.rewards.tolist() == [1, 3, 3]
            assert [value.item() for value in result.log.values()] == [2, 6, 12]  # episodes, steps, returns 1 + 2 + 3
    env.close()


def test_next_step() -> None:
    env = GymnasiumEnv(make(Mode.NEXT_STEP))
    assert env.autoreset == "next_step"
    env.reset()
    #        observations                      rewards    dones      truncated  valid
    table = [
        ([[1, 0], [1, 1], [1, 2]], (1, 1, 1), (0, 0, 0), (0, 0, 0), (1, 1, 1)),
        ([[2, 0], [2, 1], [2, 2]], (2, 2, 2), (1, 0, 0), (1, 0, 0), (1, 1, 1)),
        ([[0, 100], [3, 1], [3, 2]], (0, 3, 3), (0, 1, 1), (0, 0, 0), (0, 1, 1)),
        ([[1, 100], [0, 101], [0, 102]], (1, 0, 0), (0, 0, 0), (0, 0, 0), (1, 0, 0)),
        ([[2, 100], [1, 101], [1, 102]], (2, 1, 1), (1, 0, 0), (1, 0, 0), (1, 1, 1)),
    ]
    for expected, rewards, dones, truncated, valid in table:
        result = env.step(torch.zeros(3, 2))
        assert result.obs.tolist() == expected  # at a truncation this is the final observation
        assert result.final_obs is None
        assert tuple(result.rewards.tolist()) == rewards
        assert tuple(result.dones.int().tolist()) == dones
        assert tuple(result.truncated.int().tolist()) == truncated
        assert tuple(result.valid.int().tolist()) == valid
    assert [value.item() for value in result.log.values()] == [1, 2, 3]  # the reset step belongs to no episode
    env.reset()
    assert env.step(torch.zeros(3, 2)).valid.all()  # reset() clears the pending resets


def test_dict_observations() -> None:
    env = GymnasiumEnv(make(Mode.SAME_STEP, as_dict=True))
    assert env.obs == {"image": ((2, 2), torch.uint8), "state": ((2,), torch.float32)}
    obs = env.reset()
    assert obs["image"].dtype == torch.uint8
    env.step(torch.zeros(3, 2))
    result = env.step(torch.zeros(3, 2))
    assert result.obs["state"].tolist() == [[0, 100], [2, 1], [2, 2]]
    assert result.final_obs["state"].tolist() == [[2, 0], [2, 1], [2, 2]]
    assert result.final_obs["image"][:, 0, 0].tolist() == [2, 2, 2]
    assert result.obs["image"][:, 0, 0].tolist() == [0, 2, 2]


class Batched:
    """A vector environment that returns batched final observations, as simulators do."""

    num_envs = 2
    metadata: dict = {"autoreset_mode": Mode.SAME_STEP}
    single_observation_space = gym.spaces.Box(-1, 1, (3,), np.float32)
    single_action_space = gym.spaces.Box(-1, 1, (1,), np.float32)

    def __init__(self, info: dict) -> None:
        self.info = info

    def step(self, actions: Any) -> tuple:
        flags = np.array([False, True])
        return np.zeros((2, 3), np.float32), np.ones(2), ~flags & False, flags, self.info


def test_batched_final_observations() -> None:
    final = np.array([[9, 9, 9], [1, 2, 3]], np.float64)
    result = GymnasiumEnv(Batched({"final_obs": final})).step(torch.zeros(2, 1))
    assert result.final_obs.tolist() == [[0, 0, 0], [1, 2, 3]]
    assert result.obs.tolist() == [[0, 0, 0]] * 2


def test_truncation_without_final_observation_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="info has no 'final_obs'"):
        GymnasiumEnv(Batched({})).step(torch.zeros(2, 1))


def test_disabled_autoreset_is_refused() -> None:
    with pytest.raises(ValueError, match=r"venv: autoreset mode DISABLED .* expected SAME_STEP or NEXT_STEP"):
        GymnasiumEnv(make(Mode.DISABLED))


def test_unstated_autoreset_is_refused() -> None:
    venv = Batched({})
    venv.metadata = {}
    with pytest.raises(ValueError, match=r"expected metadata\['autoreset_mode'\] .* got None"):
        GymnasiumEnv(venv)


@pytest.mark.parametrize(
    ("mode", "action", "expected"),
    [
        ("clip", (-3, 9), (-2, 4)),
        ("clip", (0.5, 3), (0.5, 3)),
        ("none", (-3, 9), (-3, 9)),
        ("rescale", (0, 0), (0, 1)),  # the centres of [-2, 2] and [-2, 4]
        ("rescale", (-1, 0.5), (-2, 2.5)),
        ("rescale", (5, -5), (2, -2)),
    ],
)
def test_bounded_actions(mode: Any, action: tuple, expected: tuple) -> None:
    env = GymnasiumEnv(make(Mode.SAME_STEP), bounded_actions=mode)
    assert env.action_low.tolist() == [-2, -2]
    assert env.action_high.tolist() == [2, 4]
    env.reset()
    env.step(torch.tensor([action] * 3, dtype=torch.float32))
    got = env.venv.envs[1].got[0]
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected)


def test_rescale_needs_bounds() -> None:
    space = gym.spaces.Box(-np.inf, 1, (2,), np.float32)
    with pytest.raises(ValueError, match="bounded_actions: 'rescale' needs finite bounds"):
        GymnasiumEnv(make(Mode.SAME_STEP, action_space=space), bounded_actions="rescale")


def test_action_shapes() -> None:
    env = GymnasiumEnv(make(Mode.SAME_STEP, action_space=gym.spaces.Box(-1, 1, (2, 3), np.float64)))
    assert env.actions == 6
    env.reset()
    env.step(torch.arange(18).reshape(3, 6) / 20)
    np.testing.assert_allclose(env.venv.envs[1].got[0], np.array([[6, 7, 8], [9, 10, 11]]) / 20, rtol=1e-6)
    with pytest.raises(ValueError, match=r"actions: expected shape \[3, 6\], got \[3, 2\]"):
        env.step(torch.zeros(3, 2))


def test_discrete_actions() -> None:
    env = GymnasiumEnv(make(Mode.SAME_STEP, action_space=gym.spaces.Discrete(4, start=10)))
    assert env.actions == ((), torch.int64)
    assert env.num_discrete_actions == 4
    assert env.action_low is None
    env.reset()
    env.step(torch.tensor([0, 2, 3]))
    assert [e.got[0] for e in env.venv.envs] == [10, 12, 13]
    with pytest.raises(TypeError, match="actions: expected integers"):
        env.step(torch.zeros(3))


@pytest.mark.parametrize("space", [gym.spaces.MultiBinary(3), gym.spaces.Dict({"a": gym.spaces.Discrete(2)})])
def test_other_spaces_are_refused(space: Any) -> None:
    venv = Batched({})
    venv.single_observation_space = space
    with pytest.raises(TypeError, match="venv: expected an observation space Box or Dict of Box"):
        GymnasiumEnv(venv)
    venv = Batched({})
    venv.single_action_space = space
    with pytest.raises(TypeError, match="venv: expected a Box or Discrete action space"):
        GymnasiumEnv(venv)


def make_rsl_rl() -> Any:
    tensordict = pytest.importorskip("tensordict")
    base = pytest.importorskip("rsl_rl.env").VecEnv

    class Counter(base):
        num_envs, num_actions, max_episode_length, device, cfg = 3, 2, 4, "cpu", {}

        def __init__(self) -> None:
            self.episode_length_buf = torch.zeros(3, dtype=torch.long)

        def get_observations(self) -> Any:
            age = self.episode_length_buf.double()[:, None]
            groups = {"policy": age, "critic": torch.cat((age, -age), 1)}
            return tensordict.TensorDict(groups, batch_size=[3])

        def step(self, actions: torch.Tensor) -> tuple:
            self.episode_length_buf += 1
            time_outs = self.episode_length_buf >= 4
            dones = time_outs | (actions[:, 0] > 0)
            self.episode_length_buf[dones] = 0
            extras = {"time_outs": time_outs, "log": {"/speed": torch.tensor([1.0, 3.0]), "/n": 2, "text": "x"}}
            extras["log"] |= {"numpy": np.float64(3), "table": np.ones((2, 3)), "none ended": torch.zeros(0)}
            return self.get_observations(), torch.ones(3, 1), dones.long(), extras

    return Counter()


def test_rsl_rl() -> None:
    env = RslRlEnv(make_rsl_rl())
    assert isinstance(env, Env)
    assert (env.num_envs, env.actions, env.max_episode_length, env.autoreset) == (3, 2, 4, "same_step")
    assert env.obs == {"policy": ((1,), torch.float32), "critic": ((2,), torch.float32)}
    assert env.reset()["policy"].tolist() == [[0]] * 3
    actions = torch.zeros(3, 2)
    actions[1, 0] = 1
    result = env.step(actions)
    assert result.dones.tolist() == [False, True, False]
    assert result.truncated.tolist() == [False] * 3
    for _ in range(3):
        result = env.step(torch.zeros(3, 2))
    assert result.dones.tolist() == [True, False, True]
    assert result.truncated.tolist() == [True, False, True]
    assert result.rewards.tolist() == [1, 1, 1]
    assert result.obs["critic"].tolist() == [[0, 0], [3, -3], [0, 0]]
    assert result.obs["critic"].dtype == torch.float32
    assert result.final_obs is None
    assert result.valid is None
    log = {key: value.item() for key, value in result.log.items()}
    assert (log.pop("numpy"), log.pop("table")) == (3, 1)
    assert log == {"/speed": 2, "/n": 2, "episode/count": 2, "episode/length": 8, "episode/return": 8}


@pytest.mark.parametrize("kind", ["dict", "TensorDict", "tensor"])
@pytest.mark.parametrize("groups", [None, ["critic"], "critic", "policy"], ids=str)
def test_rsl_rl_final_observations(groups: Any, kind: str) -> None:
    """As Isaac Lab publishes them: a mapping of groups, in the steps that reset something."""
    venv = make_rsl_rl()
    step = venv.step

    def with_final(actions: torch.Tensor) -> tuple:
        ages = venv.episode_length_buf.double()[:, None] + 1
        obs, rewards, dones, extras = step(actions)
        if dones.any():
            final = {"policy": ages, "critic": torch.cat((ages, -ages), 1), "other": ages}
            if kind == "TensorDict":
                final = type(obs)(final, batch_size=[3])
            extras["final_obs"] = final[groups] if kind == "tensor" else final
        return obs, rewards, dones, extras

    venv.step = with_final
    if kind == "tensor" and not isinstance(groups, str):
        groups = "policy"
    env = RslRlEnv(venv, groups)
    assert [env.step(torch.zeros(3, 2)).final_obs for _ in range(3)] == [None] * 3
    final = env.step(torch.zeros(3, 2)).final_obs
    expected = {"policy": [[4.0]] * 3, "critic": [[4.0, -4.0]] * 3}
    found = final if isinstance(final, dict) else {groups: final}
    assert found.keys() == set([groups] if isinstance(groups, str) else groups or ["policy", "critic"])
    assert all(x.tolist() == expected[name] and x.dtype == torch.float32 for name, x in found.items())


@pytest.mark.parametrize("final", [{"policy": torch.zeros(3, 1)}, torch.zeros(3, 1), [None] * 3, 3], ids=str)
def test_rsl_rl_final_observations_of_other_groups_are_refused(final: Any) -> None:
    venv = make_rsl_rl()
    step = venv.step
    venv.step = lambda actions: (*step(actions)[:3], {"final_obs": final})
    with pytest.raises(
        ValueError, match=r"^extras\['final_obs'\]: expected a mapping of the groups \['policy', 'critic'\]"
    ):
        RslRlEnv(venv).step(torch.ones(3, 2))


def test_rsl_rl_groups() -> None:
    env = RslRlEnv(make_rsl_rl(), groups="critic")
    assert env.obs == (2,)
    assert env.reset().shape == (3, 2)
    assert set(RslRlEnv(make_rsl_rl(), groups=["policy"]).reset()) == {"policy"}
    with pytest.raises(KeyError, match=r"groups: expected some of \['policy', 'critic'\], got 'actor'"):
        RslRlEnv(make_rsl_rl(), groups=["actor"])


def test_rsl_rl_random_ages() -> None:
    env = RslRlEnv(make_rsl_rl(), groups="policy")
    torch.manual_seed(0)
    seen = set()
    for _ in range(20):
        env.randomize_episode_lengths()
        seen |= set(env.venv.episode_length_buf.tolist())
    assert seen == {0, 1, 2, 3}


def test_rsl_rl_without_time_outs() -> None:
    venv = make_rsl_rl()
    step = venv.step
    venv.step = lambda actions: (*step(actions)[:3], {})
    result = RslRlEnv(venv).step(torch.ones(3, 2))
    assert result.dones.all()
    assert not result.truncated.any()
