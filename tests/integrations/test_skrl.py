# ruff: noqa: E402 (imports that need the peer follow the check that it is installed)
"""pydrone under skrl: against values by hand, against skrl's own functions and memory, and in its real trainer."""

from __future__ import annotations

import copy
import importlib.metadata
import inspect
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn, tensor

pytest.importorskip("skrl")
gym = pytest.importorskip("gymnasium")

import skrl
from gymnasium import spaces
from skrl.agents.torch.a2c import A2C, A2C_CFG
from skrl.agents.torch.ppo import PPO, PPO_CFG, PPO_RNN
from skrl.envs.wrappers.torch import Wrapper, wrap_env
from skrl.memories import torch as memories
from skrl.models.torch import CategoricalMixin, DeterministicMixin, GaussianMixin, Model
from skrl.resources.preprocessors.torch import RunningStandardScaler
from skrl.trainers.torch import SequentialTrainer
from skrl.utils import set_seed
from skrl.utils.runner.torch import Runner

from pydrone.envs.quadrotor import Quadrotor
from pydrone.integrations import skrl as ours
from pydrone.integrations import skrl_learner

MODULES = {**dict.fromkeys(ours.FEEDFORWARD, ours.compute_gae), **dict.fromkeys(ours.RECURRENT, ours.compute_gae_rnn)}
THEIRS = {name: importlib.import_module(f"skrl.{name}").compute_gae for name in MODULES}
Original = memories.RandomMemory


@pytest.fixture(autouse=True)
def _unpatched():
    yield
    ours.unpatch()


def close(got, expected):
    """Equal to 1e-5 of the largest value."""
    assert got.shape == expected.shape and got.dtype == expected.dtype
    assert torch.isfinite(expected).all()
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


# gamma = lambda = 1/2, rewards 1 2 3, values 2 4 6, last value 10, one environment that ends at step 1. Without
# an end d0 = 1 + 4/2 - 2 = 1, d1 = 2 + 6/2 - 4 = 1, d2 = 3 + 10/2 - 6 = 2 and A_t = d_t + A_{t+1} / 4; at the end A1 =
# d1 = 2 - 4 = -2. Returns are A + V, advantages are normalised. skrl's rewards already include the bootstrap.
@pytest.mark.parametrize(
    "terminated, truncated, bootstrap, expected",
    [
        (0, 0, False, [27 / 8, 11 / 2, 8]),
        (1, 0, False, [5 / 2, 2, 8]),
        (1, 1, True, [5 / 2, 2, 8]),
        (0, 1, True, [5 / 2, 2, 8]),
        (0, 1, False, [27 / 8, 11 / 2, 8]),
    ],
    ids=["running", "terminated", "both", "truncated", "truncated, not asked for"],
)
def test_by_hand(terminated, truncated, bootstrap, expected):
    arguments = {
        "rewards": tensor([1.0, 2, 3]).view(3, 1, 1),
        "terminated": tensor([0, terminated, 0]).bool().view(3, 1, 1),
        "values": tensor([2.0, 4, 6]).view(3, 1, 1),
        "discount_factor": 0.5,
        "lambda_coefficient": 0.5,
    }
    flags = {"truncated": tensor([0, truncated, 0]).bool().view(3, 1, 1), "time_limit_bootstrap": bootstrap}
    found = [ours.compute_gae(**arguments, **flags, last_values=tensor([[10.0]]))]
    if not bootstrap:
        found.append(ours.compute_gae_rnn(**arguments, next_values=tensor([[10.0]])))
    for returns, advantages in found:
        assert returns.flatten().tolist() == expected
        raw = tensor(expected) - tensor([2.0, 4, 6])
        close(advantages.flatten(), (raw - raw.mean()) / (raw.std() + 1e-8))


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("bootstrap", [False, True])
def test_against_its_own(name, bootstrap):
    """The GAE function of every agent, with terminations, time-outs and both at once."""
    function, theirs = MODULES[name], THEIRS[name]
    assert inspect.signature(function).parameters.keys() == inspect.signature(theirs).parameters.keys()
    for key, parameter in inspect.signature(function).parameters.items():
        like = inspect.signature(theirs).parameters[key]
        assert (parameter.kind, parameter.default) == (like.kind, like.default)
    for steps, envs in ((2, 1), (7, 5), (32, 6)):
        rewards, values = torch.randn(2, steps, envs, 1)
        flags = torch.rand(2, steps, envs, 1) < 0.2
        arguments = {"rewards": rewards, "terminated": flags[0], "values": values}
        arguments |= {"discount_factor": 0.97, "lambda_coefficient": 0.9}
        if name in ours.RECURRENT:
            arguments["next_values"] = torch.randn(envs, 1)
        else:
            arguments |= {"last_values": torch.randn(envs, 1), "truncated": flags[1], "time_limit_bootstrap": bootstrap}
        before = copy.deepcopy(arguments)
        for x, y in zip(function(**arguments), theirs(**arguments)):
            close(x, y)
        assert all(torch.equal(torch.as_tensor(before[key]), torch.as_tensor(x)) for key, x in arguments.items())


def test_every_agent_is_known():
    root = Path(skrl.__file__).parent
    found = {
        ".".join(path.relative_to(root).with_suffix("").parts)
        for path in root.rglob("*.py")
        if "def compute_gae(" in path.read_text() and "torch" in path.parts
    }
    assert found == set(MODULES)


def test_patch_and_unpatch():
    for _ in range(2):
        ours.patch()
        for name, function in MODULES.items():
            assert importlib.import_module(f"skrl.{name}").compute_gae is function
        assert memories.RandomMemory is ours.RandomMemory
    for _ in range(2):
        ours.unpatch()
        for name, function in THEIRS.items():
            assert importlib.import_module(f"skrl.{name}").compute_gae is function
        assert memories.RandomMemory is Original
    ours.patch()
    assert object.__new__(Runner)._component("RandomMemory") is ours.RandomMemory
    ours.unpatch()
    ours.patch(shuffle="skrl")
    assert issubclass(memories.RandomMemory, ours.RandomMemory)
    assert memories.RandomMemory(memory_size=2)._shuffle == "skrl"
    with pytest.raises(ValueError, match="shuffle: expected 'full' or 'skrl', got 'none'"):
        ours.patch(shuffle="none")


def test_versions(monkeypatch):
    monkeypatch.delitem(sys.modules, "pydrone.integrations.skrl")
    supported = r"pydrone supports skrl from 2\.1 to before 2\.2$"
    for version in ("1.4.3", "2.0.0"):
        monkeypatch.setattr(importlib.metadata, "version", lambda name, version=version: version)
        with pytest.raises(ImportError, match=f"^skrl {version} is installed; " + supported):
            importlib.import_module("pydrone.integrations.skrl")

    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(ImportError, match="^skrl is not installed; " + supported):
        importlib.import_module("pydrone.integrations.skrl")


def test_nothing_is_imported_before():
    code = "import sys, pydrone.integrations.peer; assert not {'skrl', 'gymnasium'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", code], check=True)


# Memory. Name: (size, dtype, keep_dimensions); the tensors of an on-policy agent, and rare kinds.
TENSORS = {
    "observations": (5, torch.float32, False),
    "states": (None, torch.float32, False),
    "actions": (spaces.Box(-1, 1, (2,)), torch.float32, False),
    "rewards": (1, None, False),
    "terminated": (1, torch.bool, False),
    "precise": (2, torch.float64, False),
    "half": (3, torch.float16, False),
    "count": (1, torch.int64, False),
    "rnn_policy_0": ((2, 3), torch.float32, True),
    "returns": (1, torch.float32, False),
    "complex": (1, torch.complex64, False),
}
ADDED = [name for name in TENSORS if name not in ("returns", "states")]


def both(steps, envs, **arguments):
    """skrl's memory and pydrone's with skrl's sample order."""
    made = (
        Original(memory_size=steps, num_envs=envs, device="cpu", **arguments),
        ours.RandomMemory(memory_size=steps, num_envs=envs, device="cpu", shuffle="skrl", **arguments),
    )
    for memory in made:
        for name, (size, dtype, keep) in TENSORS.items():
            created = memory.create_tensor(name=name, size=size, dtype=dtype, keep_dimensions=keep)
            assert created == (size is not None)
    return made


def random_samples(memory, rows, names):
    samples = {}
    for name in names:
        x = memory.tensors[name]
        samples[name] = (torch.randn(rows, *x.shape[2:]) * 10).to(x.dtype)
    return samples


def same(x, y):
    assert (x is None) == (y is None)
    if x is not None:
        assert x.shape == y.shape and x.dtype == y.dtype
        assert torch.equal(x.nan_to_num(99), y.nan_to_num(99))


def same_memory(expected, got):
    assert expected.get_tensor_names() == got.get_tensor_names()
    for name in expected.get_tensor_names():
        same(expected.get_tensor_by_name(name), got.get_tensor_by_name(name))
        same(expected.tensors_view[name], got.tensors_view[name])
        assert getattr(got, f"_tensor_{name}") is got.tensors[name]
    assert len(expected) == len(got)
    for name in ("filled", "memory_index", "env_index"):
        assert getattr(expected, name) == getattr(got, name)


def same_batches(expected, got):
    assert len(expected) == len(got)
    for x, y in zip(expected, got):
        assert len(x) == len(y)
        for a, b in zip(x, y):
            same(a, b)


@pytest.mark.parametrize("steps, envs", [(1, 1), (6, 1), (5, 4), (16, 6)])
@pytest.mark.parametrize("touch", [False, True], ids=["", "read first"])
def test_memory_against_its_own(steps, envs, touch):
    """Adds whole steps, parts and many at once, one and a half times around; compares all reads, and writes by name."""
    expected, got = both(steps, envs)
    if touch:
        same_memory(expected, got)
    g = torch.Generator().manual_seed(1)

    def add(**samples):
        for memory in (expected, got):
            memory.add_samples(**samples, states=None, unknown=torch.zeros(1))
        same_memory(expected, got)

    for i in range(3 * steps // 2 + 1):
        names = ADDED if i % 4 else ADDED[:3]  # some steps do not write all tensors
        add(**random_samples(expected, envs, names))
    one = {name: x[0] for name, x in random_samples(expected, 1, ADDED[:3]).items()}  # [D]: one environment's sample
    add(**one)
    if envs > 1:
        for _ in range(envs - 1):
            add(**random_samples(expected, 1, ADDED))  # fewer than all environments
    elif steps > 1:
        # More than one step, across the end. skrl advances its index with every tensor here, so only one tensor works.
        add(**random_samples(expected, steps, ADDED[:1]))
    add(**random_samples(expected, envs, ADDED))
    whole = torch.randn(steps, envs, 1, generator=g)
    for memory in (expected, got):
        memory.set_tensor_by_name("returns", whole)
        memory.set_tensor_by_name("rewards", whole + 1)
    same_memory(expected, got)

    plain = [name for name in TENSORS if name != "complex"]
    for names in (plain, ["states", "returns", "missing", "returns"], list(TENSORS), ["complex"], ["states"], []):
        for parts in (1, 3):
            for length in (1, 2):
                same_batches(
                    *(m.sample_all(names, mini_batches=parts, sequence_length=length) for m in (expected, got))
                )
                for size in (1, 7, steps * envs):
                    if len(expected) < envs * length:
                        continue
                    batches = []
                    for memory in (expected, got):
                        torch.manual_seed(size)
                        batches.append(
                            memory.sample(names, batch_size=size, mini_batches=parts, sequence_length=length)
                        )
                    same_batches(*batches)
                    assert torch.equal(expected.get_sampling_indexes(), got.get_sampling_indexes())
            indexes = np.arange(steps * envs)[::-1]
            for kind in (list, np.ascontiguousarray, torch.as_tensor):
                given = kind(indexes.copy())
                same_batches(*(m.sample_by_index(names, indexes=given, mini_batches=parts) for m in (expected, got)))


def test_sampling_with_replacement_is_skrls():
    batches = []
    for memory in both(5, 3, replacement=True):
        torch.manual_seed(1)
        for _ in range(3):
            memory.add_samples(**random_samples(memory, 3, ADDED))
        batches.append(memory.sample(ADDED, batch_size=50, mini_batches=4))
    same_batches(*batches)


@pytest.mark.parametrize("shuffle", ["full", "skrl"])
def test_nothing_to_sample(shuffle):
    pair = both(5, 3)
    pair[1]._shuffle = shuffle
    for names in (["rewards", "rnn_policy_0"], ["rewards", "complex"]):
        same_batches(*(memory.sample(names, batch_size=4, mini_batches=2) for memory in pair))
        same_batches(*(memory.sample_by_index(names, indexes=[]) for memory in pair))


def numbered(steps, envs, filled, **arguments):
    memory = ours.RandomMemory(memory_size=steps, num_envs=envs, device="cpu", **arguments)
    memory.create_tensor(name="observations", size=2, dtype=torch.float32)
    for t in range(filled):
        memory.add_samples(observations=(torch.arange(envs) + t * envs).float().unsqueeze(1).expand(envs, 2))
    return memory


def test_full_shuffle():
    """Every stored sample once, in a different order each time; torch's seed reproduces it."""
    for filled in (8, 5):
        memory, orders = numbered(8, 4, filled), []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            for _ in range(2):
                batches = memory.sample(["observations"], batch_size=10**9, mini_batches=3)
                assert [len(x) for (x,) in batches] == [len(x) for x in np.array_split(np.arange(4 * filled), 3)]
                order = torch.cat([x[:, 0] for (x,) in batches]).long()
                assert torch.equal(memory.get_sampling_indexes(), order)
                assert sorted(order.tolist()) == list(range(4 * filled))
                orders.append(tuple(order.tolist()))
        assert orders[:2] == orders[2:4] and len(set(orders)) == 4


def test_full_shuffle_of_sequences_and_of_a_few():
    memory = numbered(8, 4, 6)
    ((batch,),) = memory.sample(["observations"], batch_size=6, sequence_length=3)
    starts = batch[:, 0].view(-1, 3)
    assert torch.equal(starts - starts[:, :1], tensor([0.0, 4, 8]).expand_as(starts)) and starts.max() < 24
    assert len(set(starts[:, 0].tolist())) == 6
    seen = {x for _ in range(60) for x in memory.sample(["observations"], batch_size=3)[0][0][:, 0].tolist()}
    assert seen == set(range(24))
    with pytest.raises(ValueError, match="sequence_length: expected at most the steps stored, got 8"):
        memory.sample(["observations"], batch_size=2, sequence_length=8)


def test_launches(monkeypatch):
    """One launch per step, and one per row for all minibatches; skrl copies nothing."""
    calls, left, select, add_samples = [], [], ours.select, Original.add_samples

    def counted(device):
        found = select(device)
        append = lambda *args: calls.append("append") or found.append(*args)  # noqa: E731
        gather = lambda *args: calls.append("gather") or found.gather(*args)  # noqa: E731
        return found._replace(append=append, gather=gather)

    monkeypatch.setattr(ours, "select", counted)
    monkeypatch.setattr(Original, "add_samples", lambda self, **x: left.append(set(x)) or add_samples(self, **x))
    memory = ours.RandomMemory(memory_size=2, num_envs=3, device="cpu")
    names = ["observations", "actions", "log_prob", "returns", "advantages"]
    for name in names:
        memory.create_tensor(name=name, size=1, dtype=torch.float32)
    step = {"observations": torch.randn(1, 3).t().double(), "actions": torch.arange(3).view(3, 1)}
    for _ in range(3):
        memory.add_samples(**step, log_prob=torch.zeros(3, 1, requires_grad=True))
    assert calls == ["append"] * 3 and left == [{""}] * 3
    assert memory.get_tensor_by_name("actions")[0, :, 0].tolist() == [0, 1, 2]
    assert not memory.get_tensor_by_name("log_prob").requires_grad
    calls.clear()
    memory.sample(names, batch_size=6, mini_batches=2)
    assert calls == ["gather"] * (1 + 2)  # the permutation, and the two rows of all minibatches
    calls.clear()
    memory.sample_all(names[:3], mini_batches=2, sequence_length=2)
    assert calls == ["gather"]


def test_many_tensors():
    memory = ours.RandomMemory(memory_size=2, num_envs=3, device="cpu")
    samples = {f"x{i}": torch.full((3, 1), float(i)) for i in range(70)}
    for name in samples:
        memory.create_tensor(name=name, size=1, dtype=torch.float32)
    memory.add_samples(**samples)
    (batch,) = memory.sample(list(samples), batch_size=2)
    assert [x.tolist() for x in batch] == [[[float(i)]] * 2 for i in range(70)]


def test_memory_is_allocated_once_and_copies():
    memory = numbered(8, 4, 8)
    place = memory.get_tensor_by_name("observations").data_ptr()
    again = copy.deepcopy(memory)
    for t in range(8):
        memory.add_samples(observations=torch.full((4, 2), -1.0 - t))
    assert memory.get_tensor_by_name("observations").data_ptr() == place
    assert again.tensors["observations"][:, 0, 0].tolist() == list(range(0, 32, 4))
    again.add_samples(observations=torch.full((4, 2), 50.0))
    assert again.sample_by_index(["observations"], indexes=[0, 4])[0][0][:, 0].tolist() == [50, 4]


def test_export_and_shared_memory(tmp_path):
    memory = numbered(2, 3, 0, export=True, export_directory=str(tmp_path))
    memory.share_memory()
    for t in range(2):
        memory.add_samples(observations=torch.full((3, 2), float(t)))
    assert memory.tensors["observations"].is_shared()
    (file,) = (tmp_path / "memories").iterdir()
    assert torch.load(file)["observations"][:, :, 0].tolist() == [[0, 0, 0], [1, 1, 1]]


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match="shuffle: expected 'full' or 'skrl', got 'none'"):
        ours.RandomMemory(memory_size=2, shuffle="none")
    memory = numbered(4, 2, 4)
    for bad in ([0, 8], [-1, 3]):
        with pytest.raises(IndexError, match="indexes: expected 0 to 7, got"):
            memory.sample_by_index(["observations"], indexes=bad)
    for bad in ([0.5], [True], [[1, 2]]):
        with pytest.raises(TypeError, match="indexes: expected a list of integers"):
            memory.sample_by_index(["observations"], indexes=bad)
    with pytest.raises(ValueError, match="Expected shape"):
        memory.add_samples(observations=torch.zeros(3, 2))
    with pytest.raises(ValueError, match="There are no samples"):
        memory.add_samples()
    with pytest.raises(KeyError):
        memory.get_tensor_by_name("missing")


# Trainers.


class Drone(Wrapper):
    """pydrone's quadrotor for skrl, which assumes that next observations belong to the same episode."""

    observation_space = spaces.Box(-np.inf, np.inf, (17,), np.float32)
    action_space = spaces.Box(-1, 1, (4,), np.float32)

    def reset(self):
        return self._env.reset().clone(), {}

    def step(self, actions):
        result = self._env.step(actions)
        columns = (result.rewards, result.dones & ~result.truncated, result.truncated)
        return result.obs.clone(), *(x.clone().unsqueeze(1) for x in columns), {}

    def state(self):
        return None

    def render(self):
        return None

    def close(self):
        self._env.close()


def vectorised(name):
    if name == "quadrotor":
        env = Quadrotor(4, seed=1, max_episode_length=7, max_tilt=15.0)
        env.randomize_episode_lengths()
        return Drone(env)
    mode = gym.vector.AutoresetMode(name)
    venv = gym.make_vec(
        "CartPole-v1", 4, vectorization_mode="sync", max_episode_steps=20, vector_kwargs={"autoreset_mode": mode}
    )
    return wrap_env(venv, verbose=False)


class Network(Model):
    """A GRU (or a layer) and a head. Within a sequence, an episode's end zeroes the state."""

    def __init__(self, outputs, rnn, spaces_and_device, **mixin):
        Model.__init__(self, **spaces_and_device)
        self.rnn = nn.GRU(self.num_observations, 8, batch_first=True) if rnn else None
        self.body = nn.Identity() if rnn else nn.Sequential(nn.Linear(self.num_observations, 8), nn.Tanh())
        self.head = nn.Linear(8, outputs)
        self.log_std = nn.Parameter(torch.full((outputs,), -0.5))

    def get_specification(self):
        sizes = {"sequence_length": 4, "sizes": [(1, 4, 8)]}
        return {"rnn": sizes} if self.rnn is not None else {}

    def features(self, inputs):
        x = inputs["observations"]
        if self.rnn is None:
            return self.body(x), {}
        state = inputs["rnn"][0]
        if "terminated" not in inputs:  # collecting: one step
            y, state = self.rnn(x.unsqueeze(1), state.contiguous())
            return y.squeeze(1), {"rnn": [state]}
        ended = (inputs["terminated"] | inputs["truncated"]).view(-1, 4)
        x, state, found = x.view(-1, 4, x.shape[-1]), state.view(1, -1, 4, 8)[:, :, 0].contiguous(), []
        for t in range(4):
            y, state = self.rnn(x[:, t : t + 1], state)
            state = torch.where(ended[:, t].view(1, -1, 1), 0, state)
            found.append(y)
        return torch.cat(found, 1).flatten(0, 1), {"rnn": [state]}


class Gaussian(GaussianMixin, Network):
    def __init__(self, rnn, given):
        Network.__init__(self, 4, rnn, given)
        GaussianMixin.__init__(self)

    def compute(self, inputs, role=""):
        features, outputs = self.features(inputs)
        return self.head(features), {"log_std": self.log_std, **outputs}


class Categorical(CategoricalMixin, Network):
    def __init__(self, rnn, given):
        Network.__init__(self, 2, rnn, given)
        CategoricalMixin.__init__(self)

    def compute(self, inputs, role=""):
        features, outputs = self.features(inputs)
        return self.head(features), outputs


class Value(DeterministicMixin, Network):
    def __init__(self, rnn, given):
        Network.__init__(self, 1, rnn, given)
        DeterministicMixin.__init__(self)

    def compute(self, inputs, role=""):
        features, outputs = self.features(inputs)
        return self.head(features), outputs


def train(agent_class, name, memory_class, directory, monkeypatch, bootstrap, rollouts=3, **memory_arguments):
    """Runs its trainer; returns (returns and advantages by rollout, losses by update, ends, memory)."""
    set_seed(3)
    env, rnn = vectorised(name), agent_class.__name__.endswith("RNN")
    memory = memory_class(memory_size=16, num_envs=4, device="cpu", **memory_arguments)
    arguments = {"observation_space": env.observation_space, "action_space": env.action_space, "device": "cpu"}
    policy = Gaussian if name == "quadrotor" else Categorical
    config = {
        **{"rollouts": 16, "mini_batches": 2 if rnn else 3, "discount_factor": 0.97, "learning_rate": 1e-2},
        **{"time_limit_bootstrap": bootstrap, "entropy_loss_scale": 0.01},
        **{"value_preprocessor": RunningStandardScaler, "value_preprocessor_kwargs": {"size": 1}},
        **{"observation_preprocessor": RunningStandardScaler},
        **{"observation_preprocessor_kwargs": {"size": env.observation_space}},
        "experiment": {"directory": str(directory), "write_interval": 0, "checkpoint_interval": 0},
    }
    if agent_class is A2C:
        config = A2C_CFG(**config)
    else:
        config = PPO_CFG(**config, gae_lambda=0.9, learning_epochs=2)
    models = {"policy": policy(rnn, arguments), "value": Value(rnn, arguments)}
    agent = agent_class(models=models, memory=memory, cfg=config, **arguments)
    found, losses, ends, backward = [], [], {"terminated": 0, "truncated": 0}, torch.Tensor.backward

    def recorded(loss, *args, **kwargs):
        losses.append(loss.item())
        return backward(loss, *args, **kwargs)

    fused = skrl_learner.FusedUpdate.__call__

    def recorded_fused(update, *args, **kwargs):
        metrics = fused(update, *args, **kwargs)
        losses.append((metrics[0] + config.value_loss_scale * metrics[1] - 0.01 * metrics[2]).item())
        return metrics

    monkeypatch.setattr(skrl_learner.FusedUpdate, "__call__", recorded_fused)
    module = sys.modules[agent_class.__module__]
    compute_gae = module.compute_gae

    def estimated(**kwargs):
        returns, advantages = compute_gae(**kwargs)
        found.append((returns.clone(), advantages.clone()))
        ends["terminated"] += int(kwargs["terminated"].sum())
        ends["truncated"] += int(memory.get_tensor_by_name("truncated").sum())
        return returns, advantages

    monkeypatch.setattr(torch.Tensor, "backward", recorded)
    monkeypatch.setattr(module, "compute_gae", estimated)
    trainer = SequentialTrainer(
        env=env,
        agents=agent,
        cfg={
            "timesteps": 16 * rollouts,
            "headless": True,
            "disable_progressbar": True,
            "close_environment_at_exit": False,
        },
    )
    trainer.train()
    env.close()
    return found, losses, ends, memory


@pytest.mark.parametrize("agent_class", [PPO, PPO_RNN, A2C])
@pytest.mark.parametrize("name", ["SameStep", "NextStep", "quadrotor"])
@pytest.mark.parametrize("bootstrap", [False, True], ids=["", "bootstrap"])
def test_trainer_with_and_without(agent_class, name, bootstrap, tmp_path, monkeypatch):
    rollouts = 11 if agent_class is A2C else 4
    runs, launches, gae = [], [], ours.gae
    monkeypatch.setattr(ours, "gae", lambda *args, **kwargs: launches.append(1) or gae(*args, **kwargs))
    for patched in (False, True):
        if patched:
            ours.patch(shuffle="skrl")
        with monkeypatch.context() as patch:
            run = train(agent_class, name, memories.RandomMemory, tmp_path, patch, bootstrap, rollouts)
        ours.unpatch()
        assert isinstance(run[-1], ours.RandomMemory) == patched and len(launches) == patched * rollouts
        runs.append(run)
    (found, losses, ends, _), (our_found, our_losses, our_ends, _) = runs
    assert ends == our_ends and min(ends.values()) > 2, ends
    assert len(found) == len(our_found) == rollouts
    for expected, got in zip(found, our_found):
        for x, y in zip(expected, got):
            close(y, x)
    assert len(losses) == len(our_losses) >= 10
    for x, y in zip(losses[:10], our_losses):
        assert abs(x - y) <= 1e-4 * (1 + abs(x))


def test_trainer_with_its_own_order_of_samples(tmp_path, monkeypatch):
    """Only the memory, passed explicitly without patches; the default permutation trains too."""
    losses = []
    for arguments in ({"shuffle": "skrl"}, {}, {}):
        with monkeypatch.context() as patch:
            losses.append(train(PPO, "quadrotor", ours.RandomMemory, tmp_path, patch, True, **arguments)[1])
    assert np.isfinite(losses).all() and losses[1] == losses[2] != losses[0]
