"""skrl 2.1: its RandomMemory and ``compute_gae``, with the tensors that its PPO keeps (no mean and std)."""

from __future__ import annotations

from measurement import Absent, Run
from torch import Tensor
from workload import GAMMA, LAM, NUM_ACTIONS, NUM_EPOCHS, NUM_MINIBATCHES, NUM_OBS, Rollout

from . import Lap, epoch_run, need

# The tensors that PPO.init creates, and those that its update samples.
SIZES = {"observations": NUM_OBS, "actions": NUM_ACTIONS}
SCALARS = ("rewards", "log_prob", "values", "returns", "advantages")
SAMPLED = ["observations", "actions", "log_prob", "values", "returns", "advantages"]


def _compute_gae():  # type: ignore[no-untyped-def]
    try:
        return need("skrl.agents.torch.ppo.ppo").compute_gae
    except AttributeError:
        raise Absent("has no compute_gae: expected skrl 2.1") from None


def _gae(rewards: Tensor, terminated: Tensor, values: Tensor, last_values: Tensor) -> tuple[Tensor, Tensor]:
    return _compute_gae()(
        rewards=rewards,
        terminated=terminated,
        truncated=terminated.new_zeros(()).expand_as(terminated),
        values=values,
        last_values=last_values,
        discount_factor=GAMMA,
        lambda_coefficient=LAM,
    )


def gae(rollout: Rollout) -> Run:
    """``compute_gae`` on its memory's [T, N, 1] tensors: normalised advantages, and returns."""
    _compute_gae()
    inputs = [getattr(rollout, name).unsqueeze(2) for name in ("rewards", "dones", "values")]
    last_values, out = rollout.last_values.unsqueeze(1), []
    return Run(
        lambda: out.__setitem__(slice(None), _gae(*inputs, last_values)),
        lambda: {"returns": out[0], "normalized": out[1]},
    )


def _memory(rollout: Rollout):  # type: ignore[no-untyped-def]
    memory = need("skrl.memories.torch").RandomMemory(
        memory_size=rollout.num_steps, num_envs=rollout.num_envs, device=rollout.device
    )
    for name, width in SIZES.items():
        memory.create_tensor(name=name, size=width, dtype=rollout.obs.dtype)
    for name in SCALARS:
        memory.create_tensor(name=name, size=1, dtype=rollout.obs.dtype)
    for name in ("terminated", "truncated"):
        memory.create_tensor(name=name, size=1, dtype=rollout.dones.dtype)
    return memory


def _samples(rollout: Rollout) -> list[dict[str, Tensor]]:
    """What ``record_transition`` passes to ``add_samples``."""
    truncated = rollout.dones.new_zeros(rollout.num_envs, 1)
    return [
        {
            "observations": rollout.obs[t],
            "actions": rollout.actions[t],
            "rewards": rollout.rewards[t].unsqueeze(1),
            "terminated": rollout.dones[t].unsqueeze(1),
            "truncated": truncated,
            "log_prob": rollout.log_probs[t].unsqueeze(1),
            "values": rollout.values[t].unsqueeze(1),
        }
        for t in range(rollout.num_steps)
    ]


def append(rollout: Rollout) -> Run:
    """T times ``add_samples``."""
    memory, samples = _memory(rollout), _samples(rollout)
    names = {"obs": "observations", "dones": "terminated", "log_probs": "log_prob"}
    names |= {name: name for name in ("actions", "rewards", "values")}

    def call() -> None:
        for sample in samples:
            memory.add_samples(**sample)

    return Run(call, lambda: {ours: memory.get_tensor_by_name(theirs) for ours, theirs in names.items()})


def _learn(memory, last_values: Tensor) -> None:  # type: ignore[no-untyped-def]
    returns, advantages = _gae(
        *(memory.get_tensor_by_name(name) for name in ("rewards", "terminated", "values")), last_values
    )
    memory.set_tensor_by_name("returns", returns)
    memory.set_tensor_by_name("advantages", advantages)


def _fields(batch: list[Tensor]) -> dict[str, Tensor]:
    return dict(zip(("obs", "actions", "log_probs", "values", "returns", "normalized"), batch))


def _batches(memory):  # type: ignore[no-untyped-def]
    return memory.sample(SAMPLED, batch_size=len(memory), mini_batches=NUM_MINIBATCHES)


def epoch(rollout: Rollout) -> Run:
    """``sample(names, batch_size=N * T, mini_batches=4)``: all four minibatches at once, with its own randperm."""
    memory = _memory(rollout)
    for sample in _samples(rollout):
        memory.add_samples(**sample)
    _learn(memory, rollout.last_values.unsqueeze(1))
    return epoch_run(lambda: _batches(memory), _fields)


def iteration(rollout: Rollout) -> Run:
    """T times ``add_samples``, ``compute_gae`` and its copies into the memory, all epochs of ``sample``."""
    memory, samples, lap = _memory(rollout), _samples(rollout), Lap(rollout.device)
    last_values = rollout.last_values.unsqueeze(1)

    def call() -> None:
        for sample in samples:
            memory.add_samples(**sample)
        with lap:
            _learn(memory, last_values)
        for _ in range(NUM_EPOCHS):
            _batches(memory)

    return Run(call, epoch_run(lambda: _batches(memory), _fields).outputs, lap.seconds)
