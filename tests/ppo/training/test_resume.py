"""Resuming: a training that was interrupted goes on as if it had not been, to the last bit."""

from __future__ import annotations

import dataclasses
import math
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from pydrone.envs import make
from pydrone.envs.quadrotor import Quadrotor
from pydrone.envs.state import restore, state_of
from pydrone.ppo.config import PPOConfig, TrainConfig
from pydrone.ppo.trainer import Trainer
from pydrone.ppo.training import checkpoint
from pydrone.report import learning_curve

N = 8


def config(**kwargs) -> TrainConfig:
    ppo = {"hidden_dims": (16, 16), "num_epochs": 2, **kwargs.pop("ppo", {})}
    sizes = {"env": "quadrotor", "num_steps": 12, "iterations": 9, "save_interval": 4, "seed": 3, "tensorboard": False}
    return TrainConfig(**{**sizes, **kwargs}, ppo=PPOConfig(**ppo))


def train(run_dir, env=None, echo=lambda _: None, **kwargs) -> Trainer:
    """A training of quadrotors that crash and time out often, so that all of their state matters."""
    env = env or make("quadrotor", num_envs=N, seed=11, max_episode_length=30, max_xy=0.6)
    trainer = Trainer(env, config(**kwargs), run_dir, echo=echo)
    trainer.train()
    return trainer


def figures(run_dir) -> list[dict[str, float]]:
    """What was logged, but for times."""
    rows = learning_curve.read(run_dir)
    return [{k: x for k, x in row.items() if not k.startswith(("time/", "steps_per_second"))} for row in rows]


def flat(x: object, path: str = "") -> dict[str, object]:
    """Leaves of nested containers by path."""
    if isinstance(x, (dict, list, tuple)):
        parts = x.items() if isinstance(x, dict) else enumerate(x)
        return {name: leaf for key, part in parts for name, leaf in flat(part, f"{path}/{key}").items()}
    return {path: x}


def differing(a: dict, b: dict) -> list[str]:
    """Paths of the leaves of two checkpoints that are not equal to the bit; the settings' own paths apart."""
    a, b = flat(a), flat(b)
    names = [name for name in a.keys() | b.keys() if not name.startswith("/config/")]

    def same(x, y) -> bool:
        if isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor):
            return x.dtype == y.dtype and torch.equal(x, y)
        return x == y or (isinstance(x, float) and isinstance(y, float) and math.isnan(x) and math.isnan(y))

    return sorted(name for name in names if name not in a or name not in b or not same(a[name], b[name]))


OPTIONS = [
    {"schedule": "adaptive"},
    {"schedule": "fixed"},
    # (Not the linear schedule, which ends where the training does: stopped at another iteration, it is another.)
    {"normalize_obs": True, "normalize_values": True, "normalize_rewards": True},
    {"recurrent": "gru", "rnn_dim": 8, "normalize_obs": True},
    {"recurrent": "lstm", "rnn_dim": 8},
    {"ema_decay": 0.9},
]


@pytest.mark.parametrize("ppo", OPTIONS, ids=str)
def test_resumed_equals_uninterrupted(ppo, tmp_path):
    """Networks, optimiser, generators, environment, meters, and every figure that was logged."""
    train(tmp_path / "whole", ppo=ppo)
    path = tmp_path / "parts" / "model_4.pt"
    train(tmp_path / "parts", iterations=4, ppo=ppo)
    torch.manual_seed(99)  # whatever the process did before
    env = make("quadrotor", num_envs=N, seed=77, max_episode_length=30, max_xy=0.6)
    env.step(torch.rand(N, 4))
    second = train(tmp_path / "parts", env, ppo=ppo, resume=str(path))
    assert second.iteration == 9
    a, b = (checkpoint.load(tmp_path / run / "model_9.pt") for run in ("whole", "parts"))
    assert differing(a, b) == []
    rows = figures(tmp_path / "whole")
    assert rows == figures(tmp_path / "parts") and [row["iteration"] for row in rows] == list(range(1, 10))
    assert rows[-1]["episodes"] > 0 and rows[-1]["env/episode/count"] > 0


@pytest.mark.parametrize("part", ["generators", "rollouts", "shuffle_seed", "env", "obs", "running_episodes"])
def test_each_part_of_the_progress_counts(part, tmp_path):
    """Without it, or with another, the continued training is another one: none of them is there for nothing."""
    train(tmp_path / "whole", iterations=6)
    path = tmp_path / "parts" / "model_4.pt"
    train(tmp_path / "parts", iterations=4)
    state = checkpoint.load(path)
    old = state["progress"][part]
    change = {
        "generators": lambda: {"cpu": torch.Generator().manual_seed(1).get_state()},
        "rollouts": lambda: old + 1,
        "shuffle_seed": lambda: old + 1,
        "env": lambda: {**old, "task.age": old["task.age"] * 0},
        "obs": lambda: old + 0.1,
        "running_episodes": lambda: {name: x + 1 for name, x in old.items()},
    }[part]
    state["progress"][part] = change()
    checkpoint.save(path, state)
    train(tmp_path / "parts", iterations=6, resume=str(path))
    assert figures(tmp_path / "whole")[:4] == figures(tmp_path / "parts")[:4]
    assert figures(tmp_path / "whole") != figures(tmp_path / "parts")


def test_the_ten_iterations_of_a_target_are_counted_on(tmp_path):
    """Eleven iterations whose lengths are known reach it; ten of the second part alone would come later."""
    lengths = {"target_episode_length": 1.0, "iterations": 50, "ppo": {"num_epochs": 1}}
    assert train(tmp_path, **{**lengths, "iterations": 6}).iteration == 6
    second = train(tmp_path, **lengths, resume=str(tmp_path / "model_6.pt"))
    assert second.iteration == 10


def test_the_state_of_a_quadrotor():
    """Two environments, one given the other's state: equal from then on; each tensor of it counts its own."""
    first, second = (Quadrotor(N, seed=seed, max_episode_length=20) for seed in (1, 2))
    first.reset(), second.reset()
    first.randomize_episode_lengths()
    actions = torch.rand(40, N, 4)
    for i in range(7):
        first.step(actions[i])
    saved = {name: x.clone() for name, x in first.state_dict().items()}
    expected = [first.step(actions[i]) for i in range(7, 40)]
    expected_obs = first.task._obs.clone()
    second.load_state_dict(saved)
    for i in range(7, 40):
        result = second.step(actions[i])
        assert torch.equal(result.dones, expected[i - 7].dones)
    assert torch.equal(second.task._obs, expected_obs)
    assert {"pos", "quat", "vel", "ang_vel", "task.target", "task.age", "task.generator"} <= saved.keys()


def test_a_state_of_another_size_changes_nothing():
    first, second = Quadrotor(N, seed=1), Quadrotor(N + 1, seed=2)
    before = {name: x.clone() for name, x in second.state_dict().items()}
    with pytest.raises(ValueError, match=r"state: \S+: expected \[9, 3\] torch.float32, got \[8, 3\] torch.float32"):
        second.load_state_dict(first.state_dict())
    with pytest.raises(ValueError, match="the state lacks"):
        second.load_state_dict({})
    after = second.state_dict()
    assert all(torch.equal(x, after[name]) for name, x in before.items())


def test_what_counts_as_state():
    @dataclasses.dataclass
    class Holder:
        tensor: torch.Tensor
        several: list
        named: dict
        constants: tuple

    held = Holder(torch.ones(2), [torch.zeros(3), 1], {"a": torch.ones(1)}, (torch.ones(4),))
    held.row = torch.ones(1).expand(5)  # cannot be written to
    held.generator = torch.Generator().manual_seed(5)
    held.itself = held
    state = {name: x.clone() for name, x in state_of(held).items()}
    assert sorted(state) == ["generator", "named.a", "several.0", "tensor"]
    drawn = torch.rand(3, generator=held.generator)
    held.several[0].fill_(7)
    restore(held, state)
    assert held.several[0].tolist() == [0, 0, 0] and torch.equal(torch.rand(3, generator=held.generator), drawn)


def lines_of_resuming(tmp_path, env, **kwargs) -> list[str]:
    train(tmp_path, iterations=2)
    lines = []
    resumed = train(tmp_path, env, lines.append, iterations=3, resume=str(tmp_path / "model_2.pt"), **kwargs)
    assert resumed.iteration == 3
    return [line for line in lines if line.startswith("Resumed")]


def test_what_cannot_be_restored_is_said(tmp_path):
    """An environment without a state, as Genesis; another number of environments; another seed."""

    class Genesis(Quadrotor):
        @property
        def load_state_dict(self):
            raise AttributeError

        state_dict = load_state_dict

    (line,) = lines_of_resuming(tmp_path / "a", Genesis(N))
    assert "cannot restore its simulator: all episodes begin anew, with other targets" in line
    assert Trainer(Genesis(N), config()).state_dict()["progress"]["env"] is None
    (line,) = lines_of_resuming(tmp_path / "b", Quadrotor(N + 1))
    assert "all episodes begin anew, as this environment is not the checkpoint's" in line and "[9, 3]" in line
    (line,) = lines_of_resuming(tmp_path / "c", Quadrotor(N), seed=4)
    assert "its seed was 3: all episodes begin anew, with other random numbers" in line
    assert lines_of_resuming(tmp_path / "d", Quadrotor(N)) == []


def test_a_checkpoint_of_a_failure_is_gone_on_from(tmp_path):
    """It has no state of an environment: that stood in the middle of a rollout."""
    failing = Quadrotor(N)
    step, steps = failing.step, []

    def fail(actions):
        steps.append(1)
        if len(steps) == 30:  # the third iteration
            raise RuntimeError("the simulator")
        return step(actions)

    failing.step = fail
    with pytest.raises(RuntimeError, match="the simulator"):
        train(tmp_path, failing)
    lines = []
    assert train(tmp_path, Quadrotor(N), lines.append, resume=str(tmp_path / "model_2.pt")).iteration == 9
    assert "saved after a failure" in lines[0]


@pytest.mark.parametrize("progress", [[], {"generators": {}}, {"episode_figures": {}, "episode_lengths": 3}])
def test_a_progress_that_is_none(progress, tmp_path):
    train(tmp_path, iterations=2)
    path = tmp_path / "model_2.pt"
    checkpoint.save(path, {**checkpoint.load(path), "progress": progress})
    with pytest.raises(ValueError, match=r"model_2\.pt: expected the progress of a training, got something else"):
        train(tmp_path, resume=str(path))


class OfNumPy(Quadrotor):
    """Keeps a number, an array and a generator's state outside of tensors; they decide the rewards."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.total, self.seen = np.float64(0), np.zeros(self.num_envs)
        self.rng = np.random.Generator(np.random.MT19937(5))

    def step(self, actions):
        result = super().step(actions)
        self.seen = self.seen.astype(np.float64) + self.rng.random(self.num_envs)
        self.total = self.total + self.seen.mean()
        return result._replace(rewards=torch.from_numpy(self.seen + self.total).float())

    def state_dict(self):
        own = {"total": self.total, "seen": self.seen, "rng": self.rng.bit_generator.state}
        return {**super().state_dict(), "own": own}

    def load_state_dict(self, state):
        own = state["own"]
        super().load_state_dict({name: x for name, x in state.items() if name != "own"})
        self.total, self.seen, self.rng.bit_generator.state = own["total"], own["seen"], own["rng"]


def test_an_environment_of_numpy_goes_on_to_the_bit(tmp_path):
    train(tmp_path / "whole", OfNumPy(N), iterations=4)
    train(tmp_path / "parts", OfNumPy(N), iterations=2)
    train(tmp_path / "parts", OfNumPy(N), iterations=4, resume=str(tmp_path / "parts" / "model_2.pt"))
    assert figures(tmp_path / "whole") == figures(tmp_path / "parts")


def test_a_state_that_no_checkpoint_can_hold_is_refused_before_the_first_iteration(tmp_path):
    class WithPath(Quadrotor):
        def state_dict(self):
            return {**super().state_dict(), "where": {"log": tmp_path}}

    lines = []
    with pytest.raises(checkpoint.NotStorable, match=r"^progress\.env\.where\.log: expected .*, got pathlib\."):
        train(tmp_path, WithPath(N), lines.append)
    assert lines == [] and not list(tmp_path.glob("model*"))
    train(None, WithPath(N), iterations=1)  # nothing is saved


def test_a_state_that_can_be_held_no_longer_costs_the_episodes_alone(tmp_path):
    env, lines = Quadrotor(N), []
    state, calls = env.state_dict, []
    env.state_dict = lambda: {**state(), "odd": calls.append(1) or (object() if len(calls) > 2 else 1)}
    assert train(tmp_path, env, lines.append, iterations=3, save_interval=1).iteration == 3
    assert sorted(x.name for x in tmp_path.glob("model*")) == ["model_1.pt", "model_2.pt", "model_3.pt"]
    said = [line for line in lines if "without the environment's state" in line]
    assert len(said) == 2 and "Checkpoint of iteration 2" in said[0] and "progress.env.odd: expected" in said[0]
    lines.clear()
    assert train(tmp_path, Quadrotor(N), lines.append, resume=str(tmp_path / "model_3.pt")).iteration == 9
    assert "or without the environment's state: all episodes begin anew" in lines[0]


def test_a_full_disk_does_not_end_a_training(tmp_path, monkeypatch):
    """The checkpoint of iteration 2 finds no room; the others are written, and none is half of one."""
    save, tried, lines = checkpoint.save, [], []

    def full(path, state):
        tried.append(state["iteration"])
        if tried[-1] == 2:
            raise OSError(28, "No space left on device")
        return save(path, state)

    monkeypatch.setattr(checkpoint, "save", full)
    train(tmp_path, echo=lines.append, save_interval=1, iterations=4)
    assert tried == [1, 2, 3, 4]
    assert sorted(entry.name for entry in tmp_path.glob("*model*")) == ["model_1.pt", "model_3.pt", "model_4.pt"]
    assert [line for line in lines if "not saved" in line] == [
        "Checkpoint of iteration 2 not saved, going on: [Errno 28] No space left on device"
    ]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_the_training_goes_on_from_there(number, tmp_path):
    train(tmp_path / "whole", iterations=4)
    env = make("quadrotor", num_envs=N, seed=11, max_episode_length=30, max_xy=0.6)
    step, steps = env.step, []

    def signalled(actions):
        steps.append(1)
        if len(steps) == 17:  # in the second iteration
            signal.raise_signal(number)
        return step(actions)

    env.step = signalled
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    assert train(tmp_path / "parts", env, iterations=4).iteration == 2
    assert handlers == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))
    train(tmp_path / "parts", iterations=4, resume=str(tmp_path / "parts" / "model_2.pt"))
    a, b = (checkpoint.load(tmp_path / run / "model_4.pt") for run in ("whole", "parts"))
    assert differing(a, b) == [] and figures(tmp_path / "whole") == figures(tmp_path / "parts")


def test_a_second_sigterm_waits_and_a_sigint_after_it_does_not(tmp_path):
    env = make("quadrotor", num_envs=N)
    step = env.step
    env.step = lambda actions: (signal.raise_signal(signal.SIGTERM), step(actions))[1]
    assert train(tmp_path, env).iteration == 1
    env.step = lambda actions: (signal.raise_signal(signal.SIGTERM), signal.raise_signal(signal.SIGINT), step(actions))
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, env)


COMMAND = ("--env", "quadrotor", "--device", "cpu", "--num-envs", "8", "--num-steps", "8", "--hidden-dims", "16", "16")
COMMAND += ("--iterations", "400", "--save-interval", "1", "--no-tensorboard", "--num-epochs", "1")


def start(*argv: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "pydrone.cli.main", "train", *argv]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="SIGKILL is POSIX's")
def test_killed_at_twenty_moments_it_ends_as_if_it_had_not_been(tmp_path):
    """Each time some checkpoint can be loaded, and what comes of it all is the uninterrupted run."""
    for module in ("tyro", "matplotlib"):
        pytest.importorskip(module)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    said, _ = start(*COMMAND, "--run-dir", str(whole)).communicate(timeout=600)
    assert (whole / "model_400.pt").exists(), said
    moments, stood = random.Random(5), 0
    for i in range(20):
        process = start(*COMMAND, "--run-dir", str(parts)) if i == 0 else start("--resume", str(parts))
        said = []
        for line in process.stdout:
            said.append(line)
            # The first may be killed only after a checkpoint; the others at any time of their iterations.
            if "/400  reward" in line and (i or line.split("/")[0].strip() == "2"):
                break
        time.sleep(moments.uniform(0, 0.4))
        process.kill()
        process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL, "".join(said)
        newest = checkpoint.newest(parts)
        assert newest is not None and checkpoint.load(newest)["iteration"] >= max(stood, 1)
        stood = checkpoint.load(newest)["iteration"]
    assert stood < 400, "it was over before the last kill"
    process = start("--resume", str(parts))
    said, _ = process.communicate(timeout=600)
    assert process.returncode == 0, said
    a, b = (checkpoint.load(run / "model_400.pt") for run in (whole, parts))
    assert differing(a, b) == []
    assert figures(whole) == figures(parts)
    assert not list(parts.glob(".*")), "what the kills left is removed"
