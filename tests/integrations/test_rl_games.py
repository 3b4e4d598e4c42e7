# ruff: noqa: E402 (imports that need the peer follow the check that it is installed)
"""pydrone under rl_games: against values by hand, against rl_games' own functions, and in its real Runner."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import tensor

pytest.importorskip("rl_games")
gym = pytest.importorskip("gymnasium")

from gymnasium import spaces
from rl_games.common import env_configurations, vecenv
from rl_games.common.a2c_common import A2CBase, ContinuousA2CBase, DiscreteA2CBase
from rl_games.common.ivecenv import IVecEnv
from rl_games.torch_runner import Runner

from pydrone.envs.adapters import GymnasiumEnv
from pydrone.envs.quadrotor import Quadrotor
from pydrone.integrations import rl_games as ours

THEIRS = {name: vars(A2CBase)[name] for name in ("discount_values", "discount_values_masks")}


@pytest.fixture(autouse=True)
def _restored():
    """Restores the matmul precision, which the Runner sets, and removes patches even if a test fails."""
    precision = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(precision)
    ours.unpatch()


def close(got, expected):
    """Equal to 1e-5 of the largest value."""
    assert got.shape == expected.shape and got.dtype == expected.dtype
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


# gamma = tau = 1/2, rewards 1 2 3, values 2 4 6, last value 10. Without an end: d0 = 1 + 4/2 - 2 = 1,
# d1 = 2 + 6/2 - 4 = 1, d2 = 3 + 10/2 - 6 = 2; at an end d1 = 2 - 4 = -2 and d2 = 3 - 6 = -3. A_t = d_t + A_{t+1} / 4.
# A flag marks the first step of the next episode; the very first flag does not concern this rollout.
TABLE = {
    "running": ([0, 0, 0], 0, None, [11 / 8, 3 / 2, 2]),
    "begun with the rollout": ([1, 0, 0], 0, None, [11 / 8, 3 / 2, 2]),
    "ended at 1": ([0, 0, 1], 0, None, [1 / 2, -2, 2]),
    "ended at 2": ([0, 0, 0], 1, None, [17 / 16, 1 / 4, -3]),
    "ended at 1 and 2": ([1, 0, 1], 1, None, [1 / 2, -2, -3]),
    "all counts": ([0, 0, 1], 0, [1, 1, 1], [1 / 2, -2, 2]),
    "1 does not count": ([0, 0, 0], 0, [1, 0, 1], [1, 0, 2]),
    "2 does not count": ([0, 0, 0], 0, [1, 1, 0], [5 / 4, 1, 0]),
}


@pytest.mark.parametrize("case", TABLE)
def test_by_hand(case):
    begins, last, masks, expected = TABLE[case]
    agent = SimpleNamespace(horizon_length=3, gamma=0.5, tau=0.5)
    values = tensor([2.0, 4, 6]).view(3, 1, 1)
    arguments = [tensor([float(last)]), tensor([[10.0]]), tensor(begins).float().view(3, 1), values]
    arguments.append(tensor([1.0, 2, 3]).view(3, 1, 1))
    name = "discount_values" if masks is None else "discount_values_masks"
    arguments += [] if masks is None else [tensor(masks).float().view(3, 1)]
    for function in (THEIRS[name], getattr(ours, name)):
        assert function(agent, *arguments).flatten().tolist() == expected


@pytest.mark.parametrize("steps, envs, columns", [(1, 1, 1), (7, 5, 1), (32, 6, 1), (9, 4, 3)])
def test_against_its_own(steps, envs, columns):
    agent = SimpleNamespace(horizon_length=steps, gamma=0.97, tau=0.9)
    begins = (torch.rand(steps + 1, envs) < 0.3).float()
    values, rewards = torch.randn(2, steps, envs, columns)
    arguments = [begins[-1], torch.randn(envs, columns), begins[:-1], values, rewards]
    masks = (torch.rand(steps, envs) > 0.2).float()
    before = [x.clone() for x in arguments]
    close(ours.discount_values(agent, *arguments), THEIRS["discount_values"](agent, *arguments))
    close(
        ours.discount_values_masks(agent, *arguments, masks), THEIRS["discount_values_masks"](agent, *arguments, masks)
    )
    assert all(torch.equal(x, y) for x, y in zip(arguments, before))


FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("flags", [torch.uint8, torch.int64, *FLOATS], ids=str)
def test_every_dtype_comes_out_as_it_went_in(flags):
    """Advantages have the rewards' dtype, whatever flags, values and masks have."""
    agent = SimpleNamespace(horizon_length=7, gamma=0.97, tau=0.9)
    begins = torch.rand(8, 5) < 0.3
    for rewards in FLOATS:
        for values in FLOATS:
            given = [x.to(values) for x in (torch.randn(5, 2), torch.randn(7, 5, 2))]
            arguments = (
                begins[-1].to(flags),
                given[0],
                begins[:-1].to(flags),
                given[1],
                torch.randn(7, 5, 2).to(rewards),
            )
            masks = (torch.rand(7, 5) > 0.2).to(flags)
            for name, more in (("discount_values", []), ("discount_values_masks", [masks])):
                expected = THEIRS[name](agent, *arguments, *more)
                got = getattr(ours, name)(agent, *arguments, *more)
                assert got.dtype == expected.dtype == rewards and got.shape == expected.shape
                # rl_games rounds gamma * tau to the flags' dtype
                worst = max(torch.finfo(x).eps for x in (rewards, values, flags) if x.is_floating_point)
                assert (got - expected).abs().max() <= max(16 * worst, 1e-5) * expected.abs().max()


def test_errors_name_the_argument():
    agent, flat = SimpleNamespace(gamma=0.97, tau=0.9), torch.zeros(4, 2)
    with pytest.raises(
        ValueError, match=r"mb_rewards: expected \[T, N, V\], mb_extrinsic_values likewise; got \[4, 2\]"
    ):
        ours.discount_values(agent, flat[0], torch.zeros(2, 1), flat, flat, flat)


def test_patch_and_unpatch():
    for _ in range(2):
        ours.patch()
        assert A2CBase.discount_values is ours.discount_values
        assert ContinuousA2CBase.discount_values_masks is ours.discount_values_masks
    for _ in range(2):
        ours.unpatch()
        assert all(vars(A2CBase)[name] is function for name, function in THEIRS.items())


def test_versions(monkeypatch):
    monkeypatch.delitem(sys.modules, "pydrone.integrations.rl_games")
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.0.0")
    supported = r"pydrone supports rl-games from 1\.6 to before 1\.7$"
    with pytest.raises(ImportError, match=r"^rl-games 2\.0\.0 is installed; " + supported):
        importlib.import_module("pydrone.integrations.rl_games")

    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(ImportError, match="^rl-games is not installed; " + supported):
        importlib.import_module("pydrone.integrations.rl_games")


def test_nothing_is_imported_before():
    code = "import sys, pydrone.integrations.peer; assert 'rl_games' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


class Vectorised(IVecEnv):
    """Any pydrone environment for rl_games, which takes the reset steps of NEXT_STEP as ordinary steps."""

    def __init__(self, env, obs_space, action_space, columns) -> None:
        self.env, self.columns = env, columns
        self.info = {"observation_space": obs_space, "action_space": action_space, "value_size": columns}
        self.ends = {"terminated": 0, "truncated": 0}

    def reset(self):
        return {"obs": self.env.reset().clone()}

    def step(self, actions):
        result = self.env.step(actions)
        self.ends["truncated"] += int(result.truncated.sum())
        self.ends["terminated"] += int((result.dones & ~result.truncated).sum())
        rewards = result.rewards.clone()
        if self.columns > 1:
            rewards = torch.stack([rewards * (v + 1) - v for v in range(self.columns)], 1)
        time_outs = {"time_outs": result.truncated.clone()}
        return {"obs": result.obs.clone()}, rewards, result.dones.clone(), time_outs

    def get_env_info(self):
        return self.info


def vectorised(name, columns=1):
    if name == "quadrotor":
        env = Quadrotor(4, seed=1, max_episode_length=7, max_tilt=15.0)
        env.randomize_episode_lengths()
        obs_space, action_space = (spaces.Box(-np.inf, np.inf, (17,), np.float32), spaces.Box(-1, 1, (4,), np.float32))
        return Vectorised(env, obs_space, action_space, columns)
    venv = gym.make_vec(
        "CartPole-v1",
        4,
        vectorization_mode="sync",
        max_episode_steps=16,
        vector_kwargs={"autoreset_mode": gym.vector.AutoresetMode(name)},
    )
    return Vectorised(GymnasiumEnv(venv, seed=1), venv.single_observation_space, venv.single_action_space, columns)


def train(name, directory, monkeypatch, rnn=False, columns=1):
    """Runs its Runner; returns (advantages and returns by rollout, losses by update, ends, agent)."""
    made, rollouts, losses = [], [], []

    def create(config_name, num_actors, **kwargs):
        made.append(vectorised(name, columns))
        return made[-1]

    monkeypatch.setitem(vecenv.vecenv_config, "PYDRONE_TEST", create)
    monkeypatch.setitem(env_configurations.configurations, "test", {"vecenv_type": "PYDRONE_TEST"})
    discrete, backward = name != "quadrotor", torch.Tensor.backward
    base = DiscreteA2CBase if discrete else ContinuousA2CBase
    prepare = base.prepare_dataset

    def prepared(self, batch):
        rollouts.append((batch["returns"] - batch["values"], batch["returns"].clone()))
        return prepare(self, batch)

    def recorded(loss, *args, **kwargs):
        losses.append(loss.item())
        return backward(loss, *args, **kwargs)

    monkeypatch.setattr(base, "prepare_dataset", prepared)
    monkeypatch.setattr(torch.Tensor, "backward", recorded)
    space = {
        "mu_activation": "None",
        "sigma_activation": "None",
        "mu_init": {"name": "default"},
        "sigma_init": {"name": "const_initializer", "val": 0},
        "fixed_sigma": True,
    }
    layers = {"units": [16], "activation": "elu", "initializer": {"name": "default"}}
    network = {"name": "actor_critic", "separate": False, "mlp": layers}
    network["space"] = {"discrete": None} if discrete else {"continuous": space}
    if rnn:
        network["rnn"] = {"name": "gru", "units": 8, "layers": 1, "before_mlp": False}
    config = {
        **{"name": "test", "env_name": "test", "reward_shaper": {"scale_value": 0.1}, "device": "cpu"},
        **{"train_dir": str(directory), "torch_compile": False, "print_stats": False, "max_epochs": 3},
        **{"gamma": 0.97, "tau": 0.9, "e_clip": 0.2, "clip_value": True, "critic_coef": 1.0, "entropy_coef": 0.01},
        **{"learning_rate": 1e-3, "lr_schedule": None, "grad_norm": 1.0, "truncate_grads": True},
        **{"normalize_advantage": True, "normalize_input": True, "normalize_value": True, "bounds_loss_coef": 1e-4},
        **{"num_actors": 4, "horizon_length": 32, "minibatch_size": 64, "mini_epochs": 2, "seq_length": 4},
    }
    model = {"name": "discrete_a2c" if discrete else "continuous_a2c_logstd"}
    algo = {"name": "a2c_discrete" if discrete else "a2c_continuous"}
    runner = Runner()
    runner.load(
        {
            "params": {
                **{"seed": 3, "torch_threads": 0},
                "algo": algo,
                "model": model,
                "network": network,
                "config": config,
            }
        }
    )
    runner.run({"train": True})
    return rollouts, losses, made[0].ends


@pytest.mark.parametrize(
    "name, options",
    [
        ("SameStep", {}),
        ("NextStep", {}),
        ("quadrotor", {}),
        ("quadrotor", {"rnn": True}),
        ("quadrotor", {"columns": 2}),
    ],
    ids=["same step", "next step", "quadrotor", "recurrent", "two values"],
)
def test_runner_with_and_without(name, options, tmp_path, monkeypatch):
    runs, estimates, gae = [], [], ours.gae
    monkeypatch.setattr(ours, "gae", lambda *args, **kwargs: estimates.append(1) or gae(*args, **kwargs))
    for patched in (False, True):
        with monkeypatch.context() as patch:
            if patched:
                ours.patch()
            runs.append(train(name, tmp_path / str(patched), patch, **options))
            ours.unpatch()
        assert len(estimates) == patched * 3 * options.get("columns", 1)
    (rollouts, losses, ends), (our_rollouts, our_losses, our_ends) = runs
    assert ends == our_ends and min(ends.values()) > 2, ends
    assert len(rollouts) == len(our_rollouts) == 3
    for expected, got in zip(rollouts, our_rollouts):
        for x, y in zip(expected, got):
            assert torch.isfinite(x).all()
            close(y, x)
    assert len(losses) == len(our_losses) >= 10
    for x, y in zip(losses[:10], our_losses):
        assert abs(x - y) <= 1e-4 * (1 + abs(x))
