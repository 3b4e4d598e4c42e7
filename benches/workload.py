"""The input of every benchmark: one rollout, its sizes, and the float64 truth to check outputs against."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

NUM_OBS, NUM_ACTIONS = 17, 4
GAMMA, LAM = 0.99, 0.95
NUM_MINIBATCHES, NUM_EPOCHS = 4, 5

# (N, T). README and docs quote the first. On a GPU, GAE also runs with more environments.
SIZES = [(8192, 100), (4096, 24), (1024, 100), (16384, 128), (256, 2048)]
GPU_SCAN_SIZES = [*SIZES, (65536, 100)]

# Bytes of one sample. Peers that do not store the policy's mean and std are compared with a pydrone that does not.
SCALAR = 4
POLICY_BYTES = 2 * NUM_ACTIONS * SCALAR
ROW_BYTES = (NUM_OBS + NUM_ACTIONS + 3) * SCALAR + 1  # observation, action, reward, value, log-probability, done
GAE_BYTES = 4 * SCALAR + 1  # reads reward, value, done; writes advantage, return
BATCH_BYTES = (NUM_OBS + NUM_ACTIONS + 4) * SCALAR  # observation, action, value, log-probability, advantage, return

SCAN = ("rewards", "values", "dones")
STORED = ("obs", "actions", *SCAN, "log_probs")
POLICY = ("mu", "sigma")


class Size(NamedTuple):
    num_envs: int
    num_steps: int

    @property
    def samples(self) -> int:
        return self.num_envs * self.num_steps

    def __str__(self) -> str:
        return f"{self.num_envs}x{self.num_steps}"


class Rollout:
    """Time-major tensors [T, N, ...], as simulators return them step by step; 2 % of the steps end an episode.

    All ``log_probs`` differ, to identify shuffled samples. ``dones``: bool. ``last_values``: [N].
    """

    copied = True  # contenders can get copies of it

    def __init__(self, size: Size, device: str = "cpu", everything: bool = True) -> None:
        generator = torch.Generator().manual_seed(1)
        shape = (size.num_steps, size.num_envs)

        def normal(*more: int) -> Tensor:
            return torch.randn(*shape, *more, generator=generator).to(device)

        self.size, self.device = size, device
        self.num_envs, self.num_steps = size
        self.rewards, self.values = normal(), normal()
        self.dones = (torch.rand(shape, generator=generator) < 0.02).to(device)
        self.last_values = torch.randn(size.num_envs, generator=generator).to(device)
        if everything:
            self.obs, self.actions = normal(NUM_OBS), normal(NUM_ACTIONS)
            self.mu, self.sigma = normal(NUM_ACTIONS), normal(NUM_ACTIONS).exp_()
            order = torch.randperm(size.samples, generator=generator)
            self.log_probs = (-(order + 1).float() / 2**24).view(shape).to(device)

    def clone(self) -> Rollout:
        """A copy in other memory."""
        other = object.__new__(Rollout)
        for name, value in vars(self).items():
            setattr(other, name, value.clone() if isinstance(value, Tensor) else value)
        return other

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in vars(self).values() if isinstance(x, Tensor))

    def step(self, t: int, policy: bool = True) -> dict[str, Tensor]:
        """The arguments of ``RolloutBuffer.append``, as views."""
        names = (*STORED, *POLICY) if policy else STORED
        return {name: getattr(self, name)[t] for name in names}


class Truth:
    """The right outputs: computed in float64, step by step, from the formula in docs/conventions.md."""

    def __init__(self, rollout: Rollout) -> None:
        rewards, values = rollout.rewards.double(), rollout.values.double()
        self.rollout, self.advantages = rollout, torch.empty_like(rewards)
        carry, next_values = torch.zeros_like(rewards[0]), rollout.last_values.double()
        for t in reversed(range(rollout.num_steps)):
            running = ~rollout.dones[t]
            delta = rewards[t] + torch.where(running, GAMMA * next_values, 0) - values[t]
            carry = delta + torch.where(running, GAMMA * LAM * carry, 0)
            self.advantages[t], next_values = carry, values[t]
        self.returns = self.advantages + values
        self.mean, self.std = self.advantages.mean(), self.advantages.std()
        self.normalized = (self.advantages - self.mean) / (self.std + 1e-8)
        self._where: Tensor | None = None

    def check(self, outputs: dict[str, Tensor]) -> None:
        """Raises AssertionError unless ``outputs`` are right.

        Names: advantages, normalized, returns, mean, std, or the rollout's own fields, as [T, N, ...], which must be
        bitwise equal. With "shuffled", all are [N * T, ...] in any order, each sample once; "log_probs" identifies the
        samples.
        """
        outputs = dict(outputs)
        where = None
        if outputs.pop("shuffled", False):
            where = self._permutation(outputs["log_probs"].flatten())
        assert outputs, "nothing to compare"
        for name, ours in outputs.items():
            expected = getattr(self, name, None)
            exact = expected is None
            expected = getattr(self.rollout, name) if exact else expected
            if where is not None:
                expected = expected.flatten(0, 1)[where]
            ours = ours.reshape(expected.shape)
            if exact:
                assert torch.equal(ours.to(expected.dtype), expected), f"{name} differs from what was stored"
            else:
                error, bound = (ours.double() - expected).abs().max(), 1e-5 * expected.abs().max().clamp_min(1)
                assert error <= bound, f"{name} is off by {float(error):.3g}, allowed are {float(bound):.3g}"

    def _permutation(self, log_probs: Tensor) -> Tensor:
        if self._where is None:
            self._where = self.rollout.log_probs.flatten().argsort(descending=True)
        numbers = (-log_probs.double() * 2**24).round().long() - 1
        total = self.rollout.size.samples
        assert numbers.shape == (total,), f"{numbers.numel()} samples of {total}"
        assert torch.equal(numbers.sort().values, torch.arange(total, device=numbers.device)), "not each sample once"
        return self._where[numbers]
