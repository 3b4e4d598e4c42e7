# ruff: noqa: E402 (imports that need Gymnasium follow the check that it is installed)
"""The single-file PPO of docs/integrations.md has the same advantages and losses with and without pydrone."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

import numpy as np
import pytest
import torch

gym = pytest.importorskip("gymnasium")

import cleanrl_after
import cleanrl_before

from pydrone.buffer import RolloutBuffer
from pydrone.envs.quadrotor import Quadrotor

HERE = Path(__file__).parent
DOCUMENT = HERE.parents[1] / "docs" / "integrations.md"
ARGS = {"num_envs": 4, "num_steps": 32, "num_iterations": 2, "num_minibatches": 4, "update_epochs": 2}


class Quadrotors(gym.vector.VectorEnv):
    """pydrone's quadrotor as a Gymnasium environment with five actions: hover, or one propeller faster."""

    def __init__(self) -> None:
        self.env = Quadrotor(4, seed=1, max_episode_length=7, max_tilt=15.0)
        self.env.randomize_episode_lengths()
        self.num_envs = 4
        self.single_observation_space = gym.spaces.Box(-np.inf, np.inf, (17,), np.float32)
        self.single_action_space = gym.spaces.Discrete(5)
        self.propellers = torch.cat((torch.zeros(1, 4), torch.eye(4)))

    def reset(self, *, seed=None, options=None):
        return self.env.reset().numpy().copy(), {}

    def step(self, actions):
        result = self.env.step(self.propellers[torch.from_numpy(actions)])
        obs, rewards, dones, truncated = (x.numpy().copy() for x in result[:4])
        return obs, rewards, dones & ~truncated, truncated, {}


class Counting(gym.vector.VectorWrapper):
    """Counts terminations and time-outs."""

    def __init__(self, env) -> None:
        super().__init__(env)
        self.ends = np.zeros(2, int)

    def step(self, actions):
        result = self.env.step(actions)
        self.ends += result[2].sum(), result[3].sum()
        return result


def make(name):
    if name == "quadrotor":
        return Counting(Quadrotors())
    mode = {"autoreset_mode": gym.vector.AutoresetMode(name)}
    return Counting(gym.make_vec("CartPole-v1", 4, vectorization_mode="sync", max_episode_steps=16, vector_kwargs=mode))


@pytest.mark.parametrize("name", ["SameStep", "NextStep", "quadrotor"])
def test_before_and_after(name, monkeypatch):
    orders, envs = [], make(name)

    class Recording(RolloutBuffer):
        def minibatches(self, *args, **kwargs):
            for mb in super().minibatches(*args, **kwargs):
                orders.append(mb.indices)
                yield mb

    monkeypatch.setattr(cleanrl_after, "RolloutBuffer", Recording)
    after = run(cleanrl_after, envs)
    assert min(envs.ends) > 2, envs.ends

    # pydrone's permutations, n * T + t, as indices into samples [T, N]
    samples = torch.cat(orders)
    epochs = iter((samples % 32 * 4 + samples // 32).view(-1, 128))
    monkeypatch.setattr(torch, "randperm", lambda size, device: next(epochs))
    before = run(cleanrl_before, make(name))

    for key in ("advantages", "returns"):
        assert len(before[key]) == len(after[key]) == 2
        for x, y in zip(before[key], after[key]):
            torch.testing.assert_close(y, x, rtol=0, atol=1e-5 * float(x.abs().max()))
    assert len(before["loss"]) == len(after["loss"]) == 16
    for x, y in zip(before["loss"][:10], after["loss"]):
        assert abs(x - y) <= 1e-4 * (1 + abs(x))
    for x, y in zip(before["parameters"], after["parameters"], strict=True):
        assert (x - y).norm() <= 1e-4 * x.norm()


def run(script, envs):
    """What it logs, and the parameters after its 16 updates."""
    log, agents = {}, []
    with pytest.MonkeyPatch.context() as patch:
        made = script.Agent
        patch.setattr(script, "Agent", lambda *args: agents.append(made(*args)) or agents[0])
        script.train(script.Args(**ARGS), envs, lambda key, value: log.setdefault(key, []).append(value.clone()))
    return log | {"parameters": [x.detach() for x in agents[0].parameters()]}


def test_it_learns_under_a_permutation_of_its_own():
    args = ARGS | {"num_steps": 64, "num_iterations": 12, "update_epochs": 4}
    envs = gym.wrappers.vector.RecordEpisodeStatistics(gym.make_vec("CartPole-v1", 4, vectorization_mode="sync"))
    cleanrl_after.train(cleanrl_after.Args(**args), envs, lambda key, value: None)
    lengths = list(envs.length_queue)
    assert np.mean(lengths[-8:]) > 2 * np.mean(lengths[:8])


def changed_lines() -> list[str]:
    """The diff between the two scripts, ignoring indentation: - and + lines, ... for the rest."""
    before, after = (
        (HERE / f"cleanrl_{name}.py").read_text(encoding="utf-8").splitlines() for name in ("before", "after")
    )
    matcher = difflib.SequenceMatcher(None, [x.strip() for x in before], [x.strip() for x in after], autojunk=False)
    found: list[str] = []
    for tag, i0, i1, j0, j1 in matcher.get_opcodes():
        if tag == "equal":
            found += [" ..."] if found[-1:] != [" ..."] else []
            continue
        found += [f"-{x}" for x in before[i0:i1] if x.strip()] + [f"+{x}" for x in after[j0:j1] if x.strip()]
    return found


def test_the_document_shows_and_counts_the_changed_lines():
    text = DOCUMENT.read_text(encoding="utf-8")
    (shown,) = re.findall(r"```diff\n(.*?)```", text, flags=re.DOTALL)
    lines = changed_lines()
    assert shown.splitlines() == lines
    removed, added = (sum(x.startswith(sign) for x in lines) for sign in "-+")
    assert f"{removed} lines go, {added} come" in text
