"""rl_games 1.6: its ExperienceBuffer, the loop in its A2CBase, its PPODataset with ``permute``."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch
from measurement import Run
from torch import Tensor
from workload import GAMMA, LAM, NUM_ACTIONS, NUM_EPOCHS, NUM_MINIBATCHES, NUM_OBS, Rollout

from . import Lap, epoch_run, exhaust, need

NAMES = {
    "obses": "obs",
    "dones": "dones",
    "actions": "actions",
    "neglogpacs": "log_probs",
    "values": "values",
    "mus": "mu",
    "sigmas": "sigma",
    "rewards": "rewards",
}


def _starts(rollout: Rollout) -> Tensor:
    """rl_games' flags: whether an episode starts with step t. [T + 1, N] uint8; the last row is passed separately."""
    return torch.cat((torch.zeros_like(rollout.dones[:1]), rollout.dones)).to(torch.uint8)


def _algorithm(rollout: Rollout) -> SimpleNamespace:
    return SimpleNamespace(horizon_length=rollout.num_steps, gamma=GAMMA, tau=LAM)


def gae(rollout: Rollout) -> Run:
    """``discount_values`` and the code around it: flags to float, returns, ``returns - values``, normalisation."""
    common, algorithm = need("rl_games.common.a2c_common"), _algorithm(rollout)
    starts, last_values = _starts(rollout), rollout.last_values.unsqueeze(1)
    rewards, values, out = rollout.rewards.unsqueeze(2), rollout.values.unsqueeze(2), {}

    def call() -> None:
        ended, started = starts[-1].float(), starts[:-1].float()
        advantages = common.A2CBase.discount_values(algorithm, ended, last_values, started, values, rewards)
        out["returns"] = advantages + values
        advantages = out["returns"] - values
        out["normalized"] = (advantages - advantages.mean()) / (advantages.std() + 1e-8)

    return Run(call, lambda: out)


def _buffer(rollout: Rollout):  # type: ignore[no-untyped-def]
    box = need("gymnasium.spaces").Box
    # Its release decides between gym and gymnasium; it only looks at names, shapes and dtypes.
    return need("rl_games.common.experience").ExperienceBuffer(
        {
            "observation_space": box(-np.inf, np.inf, (NUM_OBS,), np.float32),
            "action_space": box(-1.0, 1.0, (NUM_ACTIONS,), np.float32),
        },
        {"num_actors": rollout.num_envs, "horizon_length": rollout.num_steps, "has_central_value": False},
        rollout.device,
    )


def _steps(rollout: Rollout) -> list[dict[str, Tensor]]:
    """What ``play_steps`` passes to ``update_data``, in its order. Log-probabilities are negated beforehand."""
    starts = _starts(rollout)
    steps = []
    for t in range(rollout.num_steps):
        step = {theirs: getattr(rollout, ours)[t] for theirs, ours in NAMES.items()}
        step |= {name: step[name].unsqueeze(1) for name in ("values", "rewards")}
        steps.append(step | {"dones": starts[t], "neglogpacs": -step["neglogpacs"]})
    return steps


def _add(buffer, steps: list[dict[str, Tensor]]) -> None:  # type: ignore[no-untyped-def]
    for t, step in enumerate(steps):
        for name, x in step.items():
            buffer.update_data(name, t, x)


def append(rollout: Rollout) -> Run:
    """T times eight ``update_data``."""
    buffer, steps = _buffer(rollout), _steps(rollout)

    def outputs() -> dict[str, Tensor]:
        found = {ours: buffer.tensor_dict[theirs] for theirs, ours in NAMES.items() if theirs != "dones"}
        return found | {"log_probs": -found["log_probs"]}

    return Run(lambda: _add(buffer, steps), outputs)


class _Learning:
    """The rest of ``play_steps`` after its loop, and ``prepare_dataset``: GAE, copies to [N * T, ...], the dataset."""

    def __init__(self, rollout: Rollout, buffer) -> None:  # type: ignore[no-untyped-def]
        self._common, self._buffer, self._algorithm = need("rl_games.common.a2c_common"), buffer, _algorithm(rollout)
        self._last, self._last_values = _starts(rollout)[-1], rollout.last_values.unsqueeze(1)
        total = rollout.size.samples
        dataset = need("rl_games.common.datasets").PPODataset
        self.lap = Lap(rollout.device)
        self.dataset = dataset(total, total // NUM_MINIBATCHES, False, False, rollout.device, 1, permute=True)

    def learn(self) -> None:
        tensors, flatten = self._buffer.tensor_dict, self._common.swap_and_flatten01
        values = tensors["values"]
        with self.lap:
            advantages = self._common.A2CBase.discount_values(
                self._algorithm,
                self._last.float(),
                self._last_values,
                tensors["dones"].float(),
                values,
                tensors["rewards"],
            )
            returns = advantages + values
        names = ["actions", "neglogpacs", "values", "mus", "sigmas", "obses", "dones"]
        batch = self._buffer.get_transformed_list(flatten, names)
        returns = flatten(returns)
        advantages = torch.sum(returns - batch["values"], axis=1)
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
        self.dataset.update_values_dict(
            {
                "old_values": batch["values"],
                "old_logp_actions": batch["neglogpacs"],
                "advantages": advantages,
                "returns": returns,
                "actions": batch["actions"],
                "obs": batch["obses"],
                "dones": batch["dones"],
                "mu": batch["mus"],
                "sigma": batch["sigmas"],
            }
        )

    def batches(self):  # type: ignore[no-untyped-def]
        self.dataset.apply_permutation()
        return iter(self.dataset)


def _fields(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    names = {"values": "old_values", "normalized": "advantages"}
    found = {ours: batch[names.get(ours, ours)] for ours in ("obs", "actions", "mu", "sigma", "returns")}
    found |= {ours: batch[theirs] for ours, theirs in names.items()}
    return found | {"log_probs": -batch["old_logp_actions"]}


def epoch(rollout: Rollout) -> Run:
    """``apply_permutation``, which copies the whole rollout, and four slices of the copy."""
    buffer = _buffer(rollout)
    _add(buffer, _steps(rollout))
    learning = _Learning(rollout, buffer)
    learning.learn()
    return epoch_run(learning.batches, _fields)


def iteration(rollout: Rollout) -> Run:
    """T times eight ``update_data``, GAE, the copies of ``play_steps``, all epochs of the dataset."""
    buffer, steps = _buffer(rollout), _steps(rollout)
    learning = _Learning(rollout, buffer)

    def call() -> None:
        _add(buffer, steps)
        learning.learn()
        for _ in range(NUM_EPOCHS):
            exhaust(learning.batches())

    return Run(call, epoch_run(learning.batches, _fields).outputs, learning.lap.seconds)
