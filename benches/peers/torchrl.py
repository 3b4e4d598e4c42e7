"""TorchRL: both GAE functions, the stack of its collector, its ReplayBuffer (no mean and std, no statistics)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import torch
from measurement import Run
from torch import Tensor
from workload import GAMMA, LAM, NUM_EPOCHS, NUM_MINIBATCHES, Rollout

from . import Lap, epoch_run, exhaust, need


def _inputs(rollout: Rollout) -> tuple[Tensor, ...]:
    """[N, T, 1], contiguous, as its collector stacks them. The next values are precomputed: its module would need a
    second pass through the critic for them."""
    values, rewards, dones = (x.t().contiguous().unsqueeze(2) for x in (rollout.values, rollout.rewards, rollout.dones))
    return values, _next_values(values, rollout), rewards, dones


def _next_values(values: Tensor, rollout: Rollout) -> Tensor:
    return torch.cat((values[:, 1:], rollout.last_values[:, None, None]), dim=1)


def _gae(name: str) -> Callable[[Rollout], Run]:
    def prepare(rollout: Rollout) -> Run:
        function = getattr(need("torchrl.objectives.value.functional"), name)
        values, following, rewards, dones = _inputs(rollout)
        out: list[Tensor] = []

        def call() -> None:
            out[:] = function(GAMMA, LAM, values, following, rewards, dones, dones)

        return Run(call, lambda: {k: x.squeeze(2).t() for k, x in zip(("advantages", "returns"), out)})

    prepare.__doc__ = f"``{name}`` on [N, T, 1]: advantages and returns."
    return prepare


def vtrace(rollout: Rollout) -> Run:
    """``vtrace_advantage_estimate`` on [N, T, 1], all ratios one. It has no lambda; the clip of c does as much here."""
    function = need("torchrl.objectives.value.functional").vtrace_advantage_estimate
    values, following, rewards, dones = _inputs(rollout)
    dones, zeros = dones.bool(), torch.zeros_like(rewards)
    out: list[Tensor] = []

    def call() -> None:
        out[:] = function(GAMMA, zeros, zeros, values, following, rewards, dones, dones, c_thresh=LAM)

    return Run(call, lambda: {"returns": out[1].squeeze(2).t()})


gae_loop = _gae("generalized_advantage_estimate")
gae_vectorised = _gae("vec_generalized_advantage_estimate")


def _steps(rollout: Rollout) -> list:
    tensordict = need("tensordict")
    return [
        tensordict.TensorDict(
            {
                "observation": rollout.obs[t],
                "action": rollout.actions[t],
                "reward": rollout.rewards[t].unsqueeze(1),
                "done": rollout.dones[t].unsqueeze(1),
                "state_value": rollout.values[t].unsqueeze(1),
                "sample_log_prob": rollout.log_probs[t],
            },
            batch_size=[rollout.num_envs],
        )
        for t in range(rollout.num_steps)
    ]


NAMES = {
    "observation": "obs",
    "action": "actions",
    "reward": "rewards",
    "done": "dones",
    "state_value": "values",
    "sample_log_prob": "log_probs",
}


def append(rollout: Rollout) -> Run:
    """``torch.stack(steps, 1, out=...)`` of T TensorDicts into the rollout's [N, T], as its collector does once."""
    steps = _steps(rollout)
    storage = torch.stack(steps, 1)
    return Run(
        lambda: torch.stack(steps, 1, out=storage),
        lambda: {ours: storage[theirs].transpose(0, 1) for theirs, ours in NAMES.items()},
    )


def _replay_buffer(rollout: Rollout):  # type: ignore[no-untyped-def]
    data, total = need("torchrl.data"), rollout.size.samples
    logging.getLogger("torchrl").setLevel(logging.WARNING)
    return data.ReplayBuffer(
        storage=data.LazyTensorStorage(total, device=rollout.device),
        sampler=need("torchrl.data.replay_buffers.samplers").SamplerWithoutReplacement(),
        batch_size=total // NUM_MINIBATCHES,
    )


# What a learner needs of a sample; the replay buffer does not get the rest of the rollout.
LEARNT = ("observation", "action", "state_value", "sample_log_prob", "advantage", "value_target")


def _estimate(storage, following: Tensor) -> None:  # type: ignore[no-untyped-def]
    """GAE by the loop, on a CPU the faster of its two functions."""
    function = need("torchrl.objectives.value.functional").generalized_advantage_estimate
    values, dones = storage["state_value"], storage["done"]
    advantages, returns = function(GAMMA, LAM, values, following, storage["reward"], dones, dones)
    storage["advantage"], storage["value_target"] = advantages, returns


def _fields(batch) -> dict[str, Tensor]:  # type: ignore[no-untyped-def]
    return {ours: batch[theirs] for theirs, ours in _BATCH.items()}


_BATCH = {name: NAMES.get(name, "") for name in LEARNT[:4]} | {"advantage": "advantages", "value_target": "returns"}


def _batches(buffer) -> Iterator:  # type: ignore[no-untyped-def]
    for _ in range(NUM_MINIBATCHES):
        yield buffer.sample()


def epoch(rollout: Rollout) -> Run:
    """Four times ``ReplayBuffer.sample`` without replacement, with its own permutation."""
    storage, buffer = torch.stack(_steps(rollout), 1), _replay_buffer(rollout)
    _estimate(storage, _next_values(storage["state_value"], rollout))
    buffer.extend(storage.select(*LEARNT).reshape(-1))
    return epoch_run(lambda: _batches(buffer), _fields)


def iteration(rollout: Rollout) -> Run:
    """The collector's stack, the estimate, ``ReplayBuffer.extend`` and all epochs of ``sample``."""
    steps, buffer, lap = _steps(rollout), _replay_buffer(rollout), Lap(rollout.device)
    storage = torch.stack(steps, 1)
    following = _next_values(storage["state_value"], rollout)
    stored = storage.select(*NAMES)

    def call() -> None:
        torch.stack(steps, 1, out=stored)
        with lap:
            _estimate(storage, following)
        buffer.extend(storage.select(*LEARNT).reshape(-1))
        for _ in range(NUM_EPOCHS):
            exhaust(_batches(buffer))

    return Run(call, epoch_run(lambda: _batches(buffer), _fields).outputs, lap.seconds)
