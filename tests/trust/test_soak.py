"""Long runs: resident memory stays flat, and the buffer takes exactly the planned bytes. A few iterations here; `make
soak` runs them all."""

from __future__ import annotations

import gc
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pydrone import memory
from pydrone.buffer import RolloutBuffer
from pydrone.envs import make
from pydrone.ppo.config import PPOConfig, TrainConfig
from pydrone.ppo.trainer import Trainer

STATM = Path("/proc/self/statm")
# Bytes by which a process may grow after warm-up: allocators and interpreters round up. A rollout leaked in each of the
# 20 iterations of the short run below would be 12 MB. In the long runs the limit is 20 kB per iteration (of 301) and
# 400 bytes per rollout (of 10,000).
GROWTH = 4e6

pytestmark = pytest.mark.skipif(not STATM.exists(), reason="resident memory is read from /proc")


def resident() -> int:
    """Resident bytes of this process."""
    return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Watch:
    """Records resident memory after each of ``rounds``; the first third, at most 100, are warm-up."""

    def __init__(self, rounds: int) -> None:
        gc.collect()
        self.warm, self.seen = min(rounds // 3, 100), []

    def look(self) -> None:
        self.seen.append(resident())

    @property
    def grown(self) -> int:
        return max(self.seen[self.warm :]) - self.seen[self.warm]


def train(iterations: int, run_dir: Path | str, keep=lambda trainer: None) -> Watch:
    """Trains on quadrotors that crash and time out, with checkpoints and a log."""
    ppo = PPOConfig(hidden_dims=(32, 32), num_epochs=2, num_minibatches=3)  # 256 * 24 / 3 = 2048 samples
    settings = {"env": "quadrotor", "num_steps": 24, "save_interval": 50, "tensorboard": False, "seed": 1}
    config = TrainConfig(**settings, iterations=iterations, ppo=ppo)
    env = make("quadrotor", num_envs=256, seed=1, max_episode_length=100)
    watch, bytes_of_the_buffer = Watch(iterations), set()

    def show(figures, total, seconds_left) -> None:
        assert math.isfinite(figures["surrogate_loss"]) and math.isfinite(figures["value_loss"])
        keep(trainer)
        bytes_of_the_buffer.add(trainer.buffer.nbytes)
        watch.look()

    trainer = Trainer(env, config, run_dir, echo=lambda line: None, show=show)
    assert trainer.train().iterations == len(watch.seen) == iterations
    assert bytes_of_the_buffer == {trainer.planned_nbytes}
    return watch


def alone(call: str) -> int:
    """Growth in bytes of a process that only runs ``call`` of this file: other tests would leave memory to reuse."""
    script = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_soak; print(test_soak.{call})"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    *_, grown = done.stdout.split()
    print(f"{call}: grew by {int(grown):,} bytes after warm-up")
    return int(grown)


@pytest.mark.parametrize("iterations", [30, pytest.param(301, marks=pytest.mark.slow)])
def test_training_does_not_grow(iterations, tmp_path):
    assert alone(f"train({iterations}, {str(tmp_path)!r}).grown") < GROWTH


def test_a_leaked_rollout_is_detected(tmp_path):
    assert alone(f"train(30, {str(tmp_path)!r}, keep=test_soak.hoard).grown") > GROWTH


@pytest.mark.parametrize("rollouts", [1000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_the_ring_alone(rollouts):
    assert alone(f"ring({rollouts}).grown") < GROWTH


KEPT: list[torch.Tensor] = []


def hoard(trainer: Trainer) -> None:
    KEPT.append(trainer.buffer._storage.rows.clone())


def ring(rollouts: int) -> Watch:
    """A ring that wraps, with pools, reused and fresh minibatches; every rollout must equal the steps appended last."""
    sizes = {"num_envs": 8, "num_steps": 4, "obs": 3, "actions": 2, "capacity": 6, "max_episode_length": 2}
    buffer, watch, parts = RolloutBuffer(**sizes), Watch(rollouts), 2
    planned = memory.plan(**sizes, reused_minibatch=8 * 4 // parts).nbytes
    steps = 8 * torch.arange(4).view(1, 4) + torch.arange(8).view(8, 1)
    for rollout in range(rollouts):
        first = 32.0 * (rollout % 1000)  # exact in float32
        for t in range(4):
            number = first + 8 * t + torch.arange(8.0)
            ends = torch.arange(8) % 4 == t
            final = (number + 0.5).unsqueeze(1).expand(8, 3)
            scalars = {"rewards": number, "values": -number, "log_probs": number, "dones": ends, "truncated": ends}
            obs = number.unsqueeze(1).expand(8, 3)
            buffer.append(obs=obs, actions=obs[:, :2], **scalars, final_obs=final)
        # gamma 1, lambda 0: A = r + V' - V, where V' is -(number + 0.5) at a time-out, -7 after the last step, and
        # otherwise the next step's value.
        buffer.compute_gae(torch.full((8,), -7.0), 1.0, 0.0, value_fn=lambda obs: -obs[:, 0])
        number = first + steps
        following = torch.where(torch.arange(4) == 3, -7.0, -(number + 8))
        following = torch.where(torch.arange(8).view(8, 1) % 4 == torch.arange(4), -(number + 0.5), following)
        expected = (2 * number + following).flatten()
        seen = []
        for minibatch in buffer.minibatches(parts, normalize_advantages=False, reuse=rollout % 2 == 0):
            i = minibatch.indices
            assert torch.equal(minibatch.obs[:, 2], number.flatten()[i])
            assert torch.equal(minibatch.advantages, expected[i])
            seen.append(i)
        assert torch.equal(torch.cat(seen).sort().values, torch.arange(32))
        buffer.clear()
        assert buffer.nbytes == planned
        watch.look()
    return watch
