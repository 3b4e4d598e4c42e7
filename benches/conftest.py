"""Shared by the benchmarks: thread settings, one rollout's data, and rsl_rl's own storage and loop on it.

`pytest benches/ --benchmark-only` compares the two sides of each group on the same inputs, after their outputs have
been compared. Figures of different machines, or of different runs, do not compare: read the ratios within a group.
"""

from __future__ import annotations

import os

# Before torch is imported: OpenMP threads that spin after their work take the cores from whatever is timed next.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from types import SimpleNamespace

import pytest
import torch

NUM_OBS, NUM_ACTIONS = 17, 4
GAMMA, LAM = 0.99, 0.95
SIZES = [(8192, 100), (1024, 100)]


def pytest_make_parametrize_id(config, val, argname):
    return f"{val[0]}x{val[1]}" if argname == "size" else None


class Data:
    """A rollout's steps in rsl_rl's time-major layout, [T, N, ...]; 2 % of the steps end an episode."""

    def __init__(self, num_envs: int, num_steps: int) -> None:
        generator = torch.Generator().manual_seed(1)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(num_steps, num_envs, *shape, generator=generator)

        self.num_envs, self.num_steps = num_envs, num_steps
        self.obs, self.actions = normal(NUM_OBS), normal(NUM_ACTIONS)
        self.mu, self.sigma = normal(NUM_ACTIONS), normal(NUM_ACTIONS).exp()
        self.rewards, self.values, self.log_probs = normal(), normal(), normal()
        self.dones = torch.rand(num_steps, num_envs, generator=generator) < 0.02
        self.last_values = torch.randn(num_envs, generator=generator)

    def step(self, t: int) -> dict[str, torch.Tensor]:
        """The arguments of ``RolloutBuffer.append``."""
        names = ("obs", "actions", "rewards", "dones", "values", "log_probs", "mu", "sigma")
        return {name: getattr(self, name)[t] for name in names}


@pytest.fixture(scope="module", params=SIZES)
def size(request) -> tuple[int, int]:
    return request.param


@pytest.fixture(scope="module")
def data(size) -> Data:
    return Data(*size)


@pytest.fixture
def buffer(data):
    """pydrone's buffer with the fields that rsl_rl stores."""
    from pydrone.buffer import RolloutBuffer

    fields = {"mu": NUM_ACTIONS, "sigma": NUM_ACTIONS}
    return RolloutBuffer(
        data.num_envs, data.num_steps, obs=NUM_OBS, actions=NUM_ACTIONS, fields=fields, final_obs_rows=0
    )


@pytest.fixture
def filled(buffer, data):
    """The buffer with a rollout in it and its advantages computed."""
    for t in range(data.num_steps):
        buffer.append(**data.step(t))
    buffer.compute_gae(data.last_values, GAMMA, LAM)
    return buffer


@pytest.fixture
def rsl_rl_storage(data):
    """(storage, transitions): rsl_rl's own, and its input for every step."""
    pytest.importorskip("rsl_rl", reason="rsl-rl-lib is not installed")
    from rsl_rl.storage import RolloutStorage
    from tensordict import TensorDict

    example = TensorDict({"policy": data.obs[0]}, batch_size=[data.num_envs])
    storage = RolloutStorage("rl", data.num_envs, data.num_steps, example, (NUM_ACTIONS,))
    transitions = []
    for t in range(data.num_steps):
        transition = RolloutStorage.Transition()
        transition.observations = TensorDict({"policy": data.obs[t]}, batch_size=[data.num_envs])
        transition.actions, transition.rewards, transition.dones = data.actions[t], data.rewards[t], data.dones[t]
        transition.values = data.values[t].unsqueeze(1)
        transition.actions_log_prob = data.log_probs[t]
        transition.distribution_params = (data.mu[t], data.sigma[t])
        transitions.append(transition)
    return storage, transitions


@pytest.fixture
def rsl_rl_filled(rsl_rl_storage):
    storage, transitions = rsl_rl_storage
    for transition in transitions:
        storage.add_transition(transition)
    return storage


def rsl_rl_returns(storage, last_values: torch.Tensor) -> None:
    """rsl_rl's own PPO.compute_returns, normalisation included, on a storage alone."""
    from rsl_rl.algorithms import PPO

    class Critic:
        get_hidden_state = staticmethod(lambda: None)
        reset = staticmethod(lambda hidden_state: None)

        def __call__(self, obs: object) -> torch.Tensor:
            return last_values.unsqueeze(1)

    algorithm = SimpleNamespace(
        storage=storage, critic=Critic(), gamma=GAMMA, lam=LAM, normalize_advantage_per_mini_batch=False
    )
    PPO.compute_returns(algorithm, None)


def close(ours: torch.Tensor, theirs: torch.Tensor, bound: float = 1e-5) -> bool:
    """Whether the largest difference is within ``bound`` of the largest value."""
    return bool((ours - theirs).abs().max() <= bound * theirs.abs().max())
