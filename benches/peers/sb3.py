"""Stable-Baselines3: its RolloutBuffer, in NumPy on the host (no mean and std, no statistics)."""

from __future__ import annotations

import numpy as np
import torch
from measurement import Run
from torch import Tensor
from workload import GAMMA, LAM, NUM_ACTIONS, NUM_EPOCHS, NUM_MINIBATCHES, NUM_OBS, Rollout

from . import Lap, epoch_run, need


def _buffer(rollout: Rollout, obs: int = NUM_OBS, actions: int = NUM_ACTIONS):  # type: ignore[no-untyped-def]
    buffers, spaces = need("stable_baselines3.common.buffers"), need("gymnasium.spaces")
    return buffers.RolloutBuffer(
        rollout.num_steps,
        spaces.Box(-np.inf, np.inf, (obs,), np.float32),
        spaces.Box(-1.0, 1.0, (actions,), np.float32),
        device=rollout.device,
        gae_lambda=LAM,
        gamma=GAMMA,
        n_envs=rollout.num_envs,
    )


def _starts(rollout: Rollout) -> tuple[np.ndarray, np.ndarray]:
    """SB3's flags: whether an episode starts with step t; and separately, whether one ended with the last step."""
    dones = rollout.dones.cpu().numpy()
    return np.concatenate((np.zeros_like(dones[:1]), dones[:-1])), dones[-1]


def _steps(rollout: Rollout) -> list[tuple]:
    """What ``collect_rollouts`` passes to ``add``: NumPy from the environment, tensors from the policy."""
    obs, actions, rewards = (x.cpu().numpy() for x in (rollout.obs, rollout.actions, rollout.rewards))
    starts, _ = _starts(rollout)
    return [
        (obs[t], actions[t], rewards[t], starts[t], rollout.values[t].unsqueeze(1), rollout.log_probs[t])
        for t in range(rollout.num_steps)
    ]


def gae(rollout: Rollout) -> Run:
    """``compute_returns_and_advantage``. Nothing is normalised here: SB3 does that for each minibatch."""
    buffer = _buffer(rollout, 1, 1)
    starts, last = _starts(rollout)
    buffer.rewards[:], buffer.values[:] = rollout.rewards.cpu(), rollout.values.cpu()
    buffer.episode_starts[:] = starts
    return Run(
        lambda: buffer.compute_returns_and_advantage(rollout.last_values, last),
        lambda: {name: torch.as_tensor(getattr(buffer, name)) for name in ("advantages", "returns")},
        launches=lambda: None,
    )


def append(rollout: Rollout) -> Run:
    """``reset``, which SB3 calls before every rollout and which reallocates, and T times ``add``."""
    buffer, steps = _buffer(rollout), _steps(rollout)

    def call() -> None:
        buffer.reset()
        for step in steps:
            buffer.add(*step)

    def outputs() -> dict[str, Tensor]:
        names = {"obs": "observations", **{name: name for name in ("actions", "rewards", "values", "log_probs")}}
        return {ours: torch.as_tensor(getattr(buffer, theirs)) for ours, theirs in names.items()}

    return Run(call, outputs, launches=lambda: None)


def _fields(batch) -> dict[str, Tensor]:  # type: ignore[no-untyped-def]
    theirs = ("observations", "actions", "old_values", "old_log_prob", "advantages", "returns")
    ours = ("obs", "actions", "values", "log_probs", "advantages", "returns")
    return {name: getattr(batch, other) for name, other in zip(ours, theirs)}


def _fill(buffer, steps: list[tuple], last_values: Tensor, last: np.ndarray) -> None:  # type: ignore[no-untyped-def]
    buffer.reset()
    for step in steps:
        buffer.add(*step)
    buffer.compute_returns_and_advantage(last_values, last)


def epoch(rollout: Rollout) -> Run:
    """``get(N * T / 4)``, with its own permutation; without the flattening copies of a rollout's first epoch."""
    buffer = _buffer(rollout)
    _fill(buffer, _steps(rollout), rollout.last_values, _starts(rollout)[1])
    size = rollout.size.samples // NUM_MINIBATCHES
    run = epoch_run(lambda: buffer.get(size), _fields)
    return run._replace(launches=lambda: None)


def iteration(rollout: Rollout) -> Run:
    """``reset``, T times ``add``, ``compute_returns_and_advantage``, all epochs of ``get``."""
    buffer, steps, lap = _buffer(rollout), _steps(rollout), Lap(rollout.device)
    last, size = _starts(rollout)[1], rollout.size.samples // NUM_MINIBATCHES

    def call() -> None:
        buffer.reset()
        for step in steps:
            buffer.add(*step)
        with lap:
            buffer.compute_returns_and_advantage(rollout.last_values, last)
        for _ in range(NUM_EPOCHS):
            for _ in buffer.get(size):
                pass

    return Run(call, epoch_run(lambda: buffer.get(size), _fields).outputs, lap.seconds, lambda: None)
