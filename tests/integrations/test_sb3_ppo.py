# ruff: noqa: E402 (imports that need the peer follow the check that it is installed)
"""pydrone's PPO for Stable-Baselines3 against its own: the same actions, updates, figures and files."""

from __future__ import annotations

import copy
import logging
import pickle
import zipfile

import numpy as np
import pytest
import torch

stable_baselines3 = pytest.importorskip("stable_baselines3")
gym = pytest.importorskip("gymnasium")

from gymnasium import spaces
from stable_baselines3.common import buffers as theirs
from stable_baselines3.common import callbacks
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from torch import nn

from pydrone.integrations import sb3, sb3_ppo
from pydrone.ops import native

pytestmark = [
    pytest.mark.filterwarnings("ignore:You have specified a mini-batch size"),
    pytest.mark.skipif(native.CPU_MISSING is not None, reason=f"no native library: {native.CPU_MISSING}"),
]

PEER = stable_baselines3.PPO
FIGURES = {"entropy_loss", "policy_gradient_loss", "value_loss", "approx_kl", "clip_fraction", "loss"}
ARRAYS = ("actions", "values", "log_probs", "advantages")
BOX = spaces.Box(-1, 1, (3,), np.float32)
GROUPS = spaces.Dict({"a": BOX, "pixels": spaces.Box(0, 255, (2, 2), np.uint8), "goal": spaces.Discrete(5)})


class Toy(gym.Env):
    """Random observations of any space, rewards that depend on the action, terminations and time-outs."""

    def __init__(self, observation_space=BOX, action_space=None, reward=None):
        self.observation_space = observation_space
        self.action_space = BOX if action_space is None else action_space
        self.reward = reward

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        self.steps = 0
        return self.observation_space.sample(), {}

    def step(self, action):
        self.steps += 1
        reward = float(np.mean(action)) + self.np_random.normal() if self.reward is None else self.reward
        return self.observation_space.sample(), reward, self.np_random.random() < 0.1, self.steps == 9, {}


def toys(obs=BOX, actions=None, count=2, **options):
    return make_vec_env(lambda: Toy(copy.deepcopy(obs), copy.deepcopy(actions), **options), count, seed=5)


class Run:
    """Ten updates after a rollout of 80 samples, in minibatches of 48 and 32."""

    def __init__(self, kind, env, monkeypatch, *, policy="MlpPolicy", callback=None, rollouts=1, **options):
        if isinstance(env, str):
            env = make_vec_env(env, 1, seed=5)
        elif callable(env):
            env = env()
        if kind is not PEER:
            options.setdefault("rollout_buffer_kwargs", {"shuffle": "sb3"})
        options = {"n_steps": 80 // env.num_envs, "batch_size": 48, "n_epochs": 5, "seed": 3, "device": "cpu"} | options
        self.model = model = kind(policy, env, **options)
        self.rollouts, self.losses, self.fused = [], [], 0
        backward, run = torch.Tensor.backward, sb3_ppo.FusedUpdate.run

        def recorded(loss, *args, **kwargs):
            self.losses.append(loss.item())
            return backward(loss, *args, **kwargs)

        def fused(*args):
            self.fused += 1
            metrics = run(*args)
            surrogate, value, entropy = metrics.tolist()[:3]
            self.losses.append(surrogate - model.ent_coef * entropy + model.vf_coef * value)
            return metrics

        def train():
            self.rollouts.append({name: getattr(model.rollout_buffer, name).copy() for name in ARRAYS})
            kind.train(model)

        model.train = train
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "backward", recorded)
            patch.setattr(sb3_ppo.FusedUpdate, "run", fused)
            model.learn(80 * rollouts, callback)
        self.figures = {
            name.removeprefix("train/"): x for name, x in model.logger.name_to_value.items() if "train/" in name
        }
        self.parameters = torch.cat([x.detach().flatten() for x in model.policy.parameters()])


def agree(peer, ours):
    for one, other in zip(peer.rollouts, ours.rollouts, strict=True):
        for name, x in one.items():
            limit = (1e-5 if one is peer.rollouts[0] else 1e-3) * max(1, np.abs(x).max())
            np.testing.assert_allclose(other[name], x, rtol=0, atol=limit, err_msg=name)
    least = len(peer.losses)
    assert 0 < least <= len(ours.losses) <= least + 1  # the peer has no backward where it stops early
    for x, y in zip(peer.losses[:10], ours.losses):
        assert abs(x - y) <= 1e-4 * (1 + abs(x))
    assert (peer.parameters - ours.parameters).norm() <= 1e-4 * peer.parameters.norm()
    assert peer.figures.keys() == ours.figures.keys() >= FIGURES
    for name, x in peer.figures.items():
        assert ours.figures[name] == pytest.approx(x, rel=1e-3, abs=1e-4), name
        assert isinstance(ours.figures[name], float) == isinstance(x, float) or name == "approx_kl"
    assert peer.model._n_updates == ours.model._n_updates


CASES = {
    "pendulum": ("Pendulum-v1", {}),
    "cartpole": ("CartPole-v1", {"ent_coef": 0.01}),
    "four": (lambda: toys(count=4), {"clip_range_vf": 0.1, "vf_coef": 0.9}),
    "discrete": (lambda: toys(BOX, spaces.Discrete(5)), {"clip_range_vf": 0.1, "ent_coef": 0.02}),
    "several": (lambda: toys(BOX, spaces.MultiDiscrete([3, 2, 4])), {"ent_coef": 0.02}),
    "groups": (lambda: toys(GROUPS), {"policy": "MultiInputPolicy"}),
    "groups, not shared": (
        lambda: toys(GROUPS, spaces.MultiDiscrete([2, 2])),
        {"policy": "MultiInputPolicy", "policy_kwargs": {"share_features_extractor": False}},
    ),
    "not shared": (lambda: toys(), {"policy_kwargs": {"share_features_extractor": False, "log_std_init": -1.0}}),
    "shaped": (lambda: toys(spaces.Box(-1, 1, (2, 3), np.float64), spaces.Box(-1, 1, (1, 2), np.float64)), {}),
    "image": (lambda: toys(spaces.Box(0, 255, (3, 4, 4), np.uint8)), {}),
    "flags": (lambda: toys(spaces.MultiBinary(4)), {}),
    "numbers": (lambda: toys(spaces.Discrete(7)), {}),
    "not normalised": (lambda: toys(), {"normalize_advantage": False}),
    "three minibatches": (lambda: toys(), {"batch_size": 32, "n_epochs": 4}),
    "one is left": (lambda: toys(), {"batch_size": 79}),
    "all at once": (lambda: toys(), {"batch_size": 200, "n_epochs": 10}),
    "stops early": (lambda: toys(), {"target_kl": 0.002, "learning_rate": 3e-3, "verbose": 1}),
    "schedules": (
        lambda: toys(),
        {name: lambda left: 0.003 + left for name in ("learning_rate", "clip_range", "clip_range_vf")},
    ),
    "other networks": (
        lambda: toys(),
        {"policy_kwargs": {"net_arch": {"pi": [16], "vf": [8, 24]}, "activation_fn": nn.ReLU}},
    ),
    "linear": (lambda: toys(), {"policy_kwargs": {"net_arch": []}}),
    "elu": (lambda: toys(), {"policy_kwargs": {"net_arch": [12, 12, 12], "activation_fn": nn.ELU}}),
    "sgd": (lambda: toys(), {"policy_kwargs": {"optimizer_class": torch.optim.SGD}}),
    "weight decay": (lambda: toys(), {"policy_kwargs": {"optimizer_kwargs": {"weight_decay": 0.1}}}),
    "clipped hard": (lambda: toys(), {"max_grad_norm": 0.01}),
    "its own buffer": (lambda: toys(), {"rollout_buffer_class": type("Own", (theirs.RolloutBuffer,), {})}),
}


@pytest.mark.parametrize("name", CASES)
def test_as_its_own(name, monkeypatch, caplog, capsys):
    env, options = CASES[name]
    sb3_ppo._tell.cache_clear()
    buffer = options.get("rollout_buffer_class")
    if buffer is not None:
        monkeypatch.setitem(sb3_ppo._OURS, buffer, buffer)
        options = options | {"rollout_buffer_kwargs": {}}
    peer = Run(PEER, env, monkeypatch, **options)
    printed = [x for x in capsys.readouterr().out.splitlines() if "stopping" in x]
    ours = Run(sb3.PPO, env, monkeypatch, **options)
    agree(peer, ours)
    assert ours.fused == len(ours.losses) and not caplog.records
    assert printed == [x for x in capsys.readouterr().out.splitlines() if "stopping" in x]
    assert (name == "stops early") == (len(peer.losses) < 10) == bool(printed)


class EachStep(callbacks.BaseCallback):
    def __init__(self, call):
        super().__init__()
        self.call = call

    def _on_step(self):
        return self.call(self) is not False


SHAPES = (BOX, spaces.Box(-1, 1, (1, 2), np.float32), spaces.Discrete(4), spaces.MultiDiscrete([3, 2]))


@pytest.mark.parametrize("actions", SHAPES, ids=str)
def test_two_rollouts_and_the_shapes_of_actions(actions, monkeypatch):
    runs, seen = [], []

    def look(callback):
        seen.append([(np.shape(x), x.dtype) for x in (callback.locals[y] for y in ("actions", "values", "log_probs"))])

    for kind in (PEER, sb3.PPO):
        runs.append(Run(kind, lambda: toys(BOX, actions, 4), monkeypatch, callback=EachStep(look), rollouts=2))
    assert len(seen) == 80 and seen[:40] == seen[40:]
    agree(*runs)


class Extractor(FlattenExtractor):
    pass


class Policy(ActorCriticPolicy):
    def evaluate_actions(self, obs, actions):
        values, log_prob, entropy = super().evaluate_actions(obs, actions)
        return values, log_prob, 2 * entropy


class Buffer(theirs.RolloutBuffer):
    pass


def hook(model):
    model.policy.value_net.register_forward_hook(lambda module, args, output: output + 1)


def replace_a_method(model):
    policy, forward = model.policy, model.policy.mlp_extractor.forward_actor
    policy.mlp_extractor.forward_actor = lambda features: 0.5 * forward(features)


def add_a_parameter(model):
    model.policy.more = nn.Parameter(torch.zeros(2))


def hook_log_std(model):
    model.policy.log_std.register_hook(lambda grad: 2 * grad)


UNSUPPORTED = {
    "got StateDependentNoise": (lambda: toys(), {"use_sde": True}),
    "got Bernoulli": (lambda: toys(BOX, spaces.MultiBinary(3)), {}),
    "got Extractor": (lambda: toys(), {"policy_kwargs": {"features_extractor_class": Extractor}}),
    "got ActorCriticCnnPolicy": (
        lambda: toys(spaces.Box(0, 255, (3, 36, 36), np.uint8), count=1),
        {"policy": "CnnPolicy", "n_epochs": 1, "n_steps": 8},
    ),
    "got CombinedExtractor": (
        lambda: toys(spaces.Dict({"image": spaces.Box(0, 255, (3, 36, 36), np.uint8)}), count=1),
        {"policy": "MultiInputPolicy", "n_epochs": 1, "n_steps": 8},
    ),
    "got Policy": (lambda: toys(), {"policy": Policy}),
    "got GELU": (lambda: toys(), {"policy_kwargs": {"activation_fn": nn.GELU}}),
    "got another Buffer": (lambda: toys(), {"rollout_buffer_class": Buffer}),
    "hooks": (lambda: toys(), {"change": hook}),
    "replaced methods": (lambda: toys(), {"change": replace_a_method}),
    "parameters of its own": (lambda: toys(), {"change": add_a_parameter}),
    "log_std in float32, without hooks": (lambda: toys(), {"change": hook_log_std}),
    "value_loss_coef": (lambda: toys(), {"vf_coef": np.float32(0.5)}),
}


class Change(callbacks.BaseCallback):
    """Changes the model before the first rollout."""

    def __init__(self, change):
        super().__init__()
        self.change = change

    def _on_training_start(self):
        self.change(self.model)

    def _on_step(self):
        return True


@pytest.mark.parametrize("reason", UNSUPPORTED)
def test_what_is_not_known_goes_its_way(reason, monkeypatch, caplog):
    env, options = UNSUPPORTED[reason]
    options = options | {"rollout_buffer_kwargs": {} if "Buffer" in reason else {"shuffle": "sb3"}}
    options.setdefault("rollout_buffer_class", sb3.RolloutBuffer if "Combined" not in reason else sb3.DictRolloutBuffer)
    change = options.pop("change", lambda model: None)
    sb3_ppo._tell.cache_clear()
    runs = [Run(kind, env, monkeypatch, callback=Change(change), **options) for kind in (PEER, sb3.PPO)]
    assert not runs[1].fused and len(runs[0].losses) > 1
    assert torch.equal(runs[0].parameters, runs[1].parameters) or reason in ("got another Buffer", "value_loss_coef")
    agree(*runs)
    (record,) = caplog.records
    assert record.name == "pydrone.integrations.sb3" and record.levelno == logging.WARNING
    assert reason in record.getMessage()


def test_autocast_goes_its_way(monkeypatch, caplog):
    sb3_ppo._tell.cache_clear()
    with torch.autocast("cpu", torch.bfloat16):
        assert not Run(sb3.PPO, toys, monkeypatch).fused
    assert "autocast is on" in caplog.text


@pytest.mark.parametrize("actions", [BOX, spaces.MultiDiscrete([3, 2])])
def test_copies_of_the_policy_in_a_callback(monkeypatch, actions):
    """They act by their own weights, as Stable-Baselines3's do, and leave the model's draws as they were."""
    count = 0

    def check(callback):
        nonlocal count
        count += 1
        if count % 10:
            return
        policy, obs, state = callback.model.policy, torch.ones(2, 3), torch.get_rng_state()
        for other in (copy.deepcopy(policy), pickle.loads(pickle.dumps(policy))):
            with torch.no_grad():
                other.action_net.bias.add_(100.0)
                torch.manual_seed(7)
                got = other(obs)
                torch.manual_seed(7)
                wanted = type(policy).forward(other, obs)
                assert all(map(torch.equal, got, wanted))
                assert torch.equal(policy(obs, deterministic=True)[0], type(policy).forward(policy, obs, True)[0])
                assert actions is not BOX or (got[0] > 50).all()
        assert count < 80 or policy(obs)[1].requires_grad
        torch.set_rng_state(state)

    runs = [Run(kind, lambda: toys(BOX, actions), monkeypatch, callback=EachStep(check)) for kind in (PEER, sb3.PPO)]
    assert count == 80
    agree(*runs)
    assert "forward" not in vars(runs[1].model.policy) and not sb3_ppo._acting


def test_a_layer_that_a_callback_replaces(monkeypatch):
    def replace(callback):
        if callback.n_calls == 7:
            net = nn.Linear(64, 3)
            nn.init.constant_(net.weight, 0.1)
            nn.init.constant_(net.bias, 3.0)
            policy = callback.model.policy
            policy.action_net = net
            policy.optimizer = type(policy.optimizer)(policy.parameters(), lr=1e-3, eps=1e-5)

    agree(*(Run(kind, toys, monkeypatch, callback=EachStep(replace)) for kind in (PEER, sb3.PPO)))


def test_an_error_in_the_rollout_restores_the_policy(monkeypatch):
    def fail(callback):
        raise KeyError("mine")

    model = sb3.PPO("MlpPolicy", toys(), n_steps=8, device="cpu")
    with pytest.raises(KeyError, match="mine"):
        model.learn(16, EachStep(fail))
    assert "forward" not in vars(model.policy) and not sb3_ppo._acting


@pytest.mark.parametrize("actions", [BOX, spaces.Discrete(3)])
@pytest.mark.parametrize("kind", [PEER, sb3.PPO])
def test_nan_is_an_error(kind, actions, monkeypatch):
    # torch's default, which rsl_rl turns off for the whole process.
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", True)
    model = kind("MlpPolicy", toys(BOX, actions, reward=float("nan")), n_steps=8, batch_size=8, seed=1, device="cpu")
    with pytest.raises(ValueError, match="to satisfy the constraint"):
        model.learn(64)
    assert all(x.isnan().all() for x in model.policy.parameters())
    with pytest.raises(ValueError, match="to satisfy the constraint"):  # this time while it acts
        model.learn(64)


@pytest.mark.parametrize("first, second", [(PEER, sb3.PPO), (sb3.PPO, PEER), (sb3.PPO, sb3.PPO)])
def test_files(first, second, tmp_path, monkeypatch):
    env = toys()
    model = first("MlpPolicy", env, n_steps=16, batch_size=16, n_epochs=2, seed=1, device="cpu", clip_range_vf=0.2)
    model.learn(64).save(tmp_path / "model.zip")
    with zipfile.ZipFile(tmp_path / "model.zip") as file:
        assert b"pydrone" not in file.read("data")
    loaded = second.load(tmp_path / "model.zip", env=env, device="cpu")
    obs = env.reset()
    np.testing.assert_array_equal(model.predict(obs, deterministic=True)[0], loaded.predict(obs, deterministic=True)[0])
    assert type(loaded.rollout_buffer) is (theirs.RolloutBuffer if second is PEER else sb3.RolloutBuffer)
    for x, y in zip(
        model.get_parameters()["policy.optimizer"]["state"].values(), loaded.policy.optimizer.state.values()
    ):
        assert all(torch.equal(x[name], y[name]) for name in ("step", "exp_avg", "exp_avg_sq"))
    loaded.set_parameters(model.get_parameters())
    assert loaded.learn(64, reset_num_timesteps=False).num_timesteps == 128
    assert loaded._n_updates == 8


def test_files_with_options_of_the_buffer(tmp_path):
    model = sb3.PPO("MlpPolicy", toys(), n_steps=16, device="cpu", rollout_buffer_kwargs={"seed": 3})
    model.save(tmp_path / "model.zip")
    assert type(PEER.load(tmp_path / "model.zip", env=toys(), device="cpu").rollout_buffer) is sb3.RolloutBuffer


def test_callbacks_and_vec_normalize(tmp_path, monkeypatch):
    runs = []
    for kind in (PEER, sb3.PPO):
        found = callbacks.CallbackList(
            [
                callbacks.EvalCallback(
                    VecNormalize(toys(count=1), training=False), eval_freq=16, n_eval_episodes=1, verbose=0
                ),
                callbacks.CheckpointCallback(20, str(tmp_path / kind.__module__)),
            ]
        )
        runs.append(Run(kind, lambda: VecNormalize(toys()), monkeypatch, callback=found))
        assert len([*(tmp_path / kind.__module__).iterdir()]) == 2
        loaded = PEER.load(next((tmp_path / kind.__module__).iterdir()), device="cpu")
        assert loaded.policy.action_net.weight.shape == (3, 64)
    agree(*runs)
    stop = callbacks.StopTrainingOnRewardThreshold(reward_threshold=-1e9, verbose=0)
    evaluate = callbacks.EvalCallback(
        toys(count=1), callback_on_new_best=stop, eval_freq=5, n_eval_episodes=1, verbose=0
    )
    model = sb3.PPO("MlpPolicy", toys(), n_steps=16, device="cpu").learn(200, evaluate)
    assert model.num_timesteps == 10 and "forward" not in vars(model.policy)


def test_parameters_frozen_after_a_rollout(monkeypatch):
    """Their gradients of the first update do not move them in the second."""

    def freeze(callback):
        if callback.n_calls == 60:
            for x in (*callback.model.policy.value_net.parameters(), callback.model.policy.log_std):
                x.requires_grad_(False)

    runs = [Run(kind, toys, monkeypatch, callback=EachStep(freeze), rollouts=2) for kind in (PEER, sb3.PPO)]
    agree(*runs)
    assert all(x.grad is None for x in runs[1].model.policy.value_net.parameters())


def test_default_shuffle_learns():
    env = DummyVecEnv([lambda: Toy(BOX, spaces.Discrete(2))] * 4)
    model = sb3.PPO("MlpPolicy", env, n_steps=64, batch_size=64, learning_rate=3e-3, seed=0, device="cpu").learn(3000)
    assert type(model.rollout_buffer) is sb3.RolloutBuffer
    obs = torch.rand(100, 3) * 2 - 1
    assert model.policy.get_distribution(obs).distribution.probs[:, 1].mean() > 0.8  # which is rewarded
