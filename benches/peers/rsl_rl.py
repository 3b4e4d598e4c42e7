"""rsl_rl 5: its RolloutStorage and the loop in its PPO."""

from __future__ import annotations

from types import SimpleNamespace

from measurement import Run
from torch import Tensor
from workload import GAMMA, LAM, NUM_ACTIONS, NUM_EPOCHS, NUM_MINIBATCHES, Rollout

from . import Lap, epoch_run, exhaust, need


def _storage(rollout: Rollout, obs: Tensor, num_actions: int = NUM_ACTIONS):  # type: ignore[no-untyped-def]
    storage, tensordict = need("rsl_rl.storage"), need("tensordict")
    example = tensordict.TensorDict({"policy": obs[0]}, batch_size=[rollout.num_envs])
    return storage.RolloutStorage(
        "rl", rollout.num_envs, rollout.num_steps, example, (num_actions,), device=rollout.device
    )


def _transitions(rollout: Rollout) -> list:
    """What its PPO passes to ``add_transition``, step by step."""
    storage, tensordict = need("rsl_rl.storage"), need("tensordict")
    transitions = []
    for t in range(rollout.num_steps):
        x = storage.RolloutStorage.Transition()
        x.observations = tensordict.TensorDict({"policy": rollout.obs[t]}, batch_size=[rollout.num_envs])
        x.actions, x.rewards, x.dones = rollout.actions[t], rollout.rewards[t], rollout.dones[t]
        x.values, x.actions_log_prob = rollout.values[t].unsqueeze(1), rollout.log_probs[t]
        x.distribution_params = (rollout.mu[t], rollout.sigma[t])
        transitions.append(x)
    return transitions


def _algorithm(storage, rollout: Rollout) -> SimpleNamespace:  # type: ignore[no-untyped-def]
    """The part of its PPO that ``PPO.compute_returns`` reads, with a critic that returns stored values."""

    class Critic:
        last_values = rollout.last_values.unsqueeze(1)

        def get_hidden_state(self) -> None: ...
        def reset(self, hidden_state: None) -> None: ...
        def __call__(self, obs: object) -> Tensor:
            return self.last_values

    return SimpleNamespace(
        storage=storage, critic=Critic(), gamma=GAMMA, lam=LAM, normalize_advantage_per_mini_batch=False
    )


def gae(rollout: Rollout) -> Run:
    """``PPO.compute_returns``: the loop over its storage, and the normalisation over the rollout."""
    ppo = need("rsl_rl.algorithms").PPO
    storage = _storage(rollout, rollout.values.unsqueeze(2), 1)
    for name in ("rewards", "values", "dones"):
        getattr(storage, name).copy_(getattr(rollout, name).unsqueeze(2))
    algorithm = _algorithm(storage, rollout)
    return Run(
        lambda: ppo.compute_returns(algorithm, None),
        lambda: {"normalized": storage.advantages, "returns": storage.returns},
    )


def append(rollout: Rollout) -> Run:
    """``clear`` and T times ``add_transition``."""
    storage, transitions = _storage(rollout, rollout.obs), _transitions(rollout)

    def call() -> None:
        storage.clear()
        for transition in transitions:
            storage.add_transition(transition)

    def outputs() -> dict[str, Tensor]:
        names = ("actions", "rewards", "dones", "values")
        mu, sigma = storage.distribution_params
        found = {"obs": storage.observations["policy"], "log_probs": storage.actions_log_prob, "mu": mu, "sigma": sigma}
        return found | {name: getattr(storage, name) for name in names}

    return Run(call, outputs)


def _fields(batch) -> dict[str, Tensor]:  # type: ignore[no-untyped-def]
    found = {name: getattr(batch, name) for name in ("actions", "values", "returns")}
    found |= {"obs": batch.observations["policy"], "normalized": batch.advantages}
    mu, sigma = batch.old_distribution_params
    return found | {"log_probs": batch.old_actions_log_prob, "mu": mu, "sigma": sigma}


def epoch(rollout: Rollout) -> Run:
    """``mini_batch_generator(4, 1)``. (In training, one permutation serves all epochs; here it serves one.)"""
    storage = _storage(rollout, rollout.obs)
    for transition in _transitions(rollout):
        storage.add_transition(transition)
    need("rsl_rl.algorithms").PPO.compute_returns(_algorithm(storage, rollout), None)
    return epoch_run(lambda: storage.mini_batch_generator(NUM_MINIBATCHES, 1), _fields)


def iteration(rollout: Rollout) -> Run:
    """T times ``add_transition``, ``compute_returns``, ``mini_batch_generator``: all epochs share its one randperm."""
    ppo = need("rsl_rl.algorithms").PPO
    storage, transitions = _storage(rollout, rollout.obs), _transitions(rollout)
    algorithm, lap = _algorithm(storage, rollout), Lap(rollout.device)

    def call() -> None:
        storage.clear()
        for transition in transitions:
            storage.add_transition(transition)
        with lap:
            ppo.compute_returns(algorithm, None)
        exhaust(storage.mini_batch_generator(NUM_MINIBATCHES, NUM_EPOCHS))

    last = epoch_run(lambda: storage.mini_batch_generator(NUM_MINIBATCHES, 1), _fields)
    return Run(call, last.outputs, lap.seconds)
