"""Stable-Baselines3: its rollout buffers on pydrone's memory and kernels. docs/integrations.md lists the differences.

>>> from pydrone.integrations.sb3 import RolloutBuffer
>>> model = PPO("MlpPolicy", venv, rollout_buffer_class=RolloutBuffer)
"""

from __future__ import annotations

import operator
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from pydrone.buffer import Minibatch
from pydrone.buffer import RolloutBuffer as Ring
from pydrone.integrations.peer import require
from pydrone.ops.arguments import positive
from pydrone.rollout.minibatch import Plan

require("stable-baselines3", (2, 4), (3,))

from gymnasium import spaces  # noqa: E402 (after the check of the version)
from stable_baselines3.common import buffers  # noqa: E402
from stable_baselines3.common.type_aliases import DictRolloutBufferSamples, RolloutBufferSamples  # noqa: E402

__all__ = ["DictRolloutBuffer", "RolloutBuffer"]


class _Ring(Ring):
    """Adds ends that become known a step later, and minibatches given by their size, not their number."""

    def end_last_step(self, ended: Tensor) -> None:
        """Sets the ends of the last appended step, bool [N]. They become code 1, without a bootstrap: the collector has
        added gamma * V(final observation) to the reward."""
        self._storage.codes[:, (self._ring.appended - 1) % self.capacity].copy_(ended)

    def batches(self, batch_size: int, order: Tensor | None = None) -> Iterator[Minibatch]:
        """The rollout in minibatches of ``batch_size``, the last with the rest: shuffled, or in the order of ``order``,
        int64 sample numbers n * T + t."""
        self._scan.require("get")
        samples = self.num_envs * self.num_steps if order is None else len(order)
        plan = Plan(samples, -(-samples // batch_size), order is None, False, False, False, order)
        rollout, epoch = self._ring.rollout, self._draws.next_epoch()
        for first in range(0, samples, batch_size):
            if rollout != self._ring.rollout or not self._scan.computed:
                raise RuntimeError("get: reset() has discarded the rollout while it was being read")
            yield self._draws.minibatch(self._draws.part(plan, epoch, first, min(batch_size, samples - first)))


def _array(name: str, doc: str) -> property:
    """A property [T, N] as a NumPy array, as callers of Stable-Baselines3 expect; on a CPU, a read-only view."""

    def read(self: _Rollout) -> np.ndarray:
        return _numpy(getattr(self._ring, name).t())

    return property(read, doc=doc)


class _Rollout:
    """Shared by the two buffers: Stable-Baselines3's methods on a ring of one rollout, allocated once."""

    def __init__(
        self,
        buffer_size: int,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        device: torch.device | str = "auto",
        gae_lambda: float = 1,
        gamma: float = 0.99,
        n_envs: int = 1,
        shuffle: str = "full",
        seed: int | None = None,
    ) -> None:
        """As in Stable-Baselines3, with two more arguments, for ``rollout_buffer_kwargs=``.

        Args:
            buffer_size: T, the steps of a rollout.
            observation_space, action_space: Gymnasium's.
            device: where the rollout is stored; "auto": a GPU if there is one.
            gae_lambda, gamma: in [0, 1].
            n_envs: N.
            shuffle: "full": pydrone's permutation, a new one for each epoch; "sb3": that of ``np.random.permutation``,
                for the same minibatches as Stable-Baselines3 with the same seed.
            seed: of the "full" permutations; None draws one from NumPy, which Stable-Baselines3 has seeded.

        Raises:
            ValueError, TypeError: an argument is invalid, or a space has a dtype that pydrone does not store.
        """
        if shuffle not in ("full", "sb3"):
            raise ValueError(f"shuffle: expected 'full' or 'sb3', got {shuffle!r}")
        grouped = isinstance(observation_space, spaces.Dict)
        if grouped != isinstance(self, buffers.DictRolloutBuffer):
            wanted = "DictRolloutBuffer" if grouped else "RolloutBuffer"
            raise ValueError(f"observation_space: expected {wanted} for a {type(observation_space).__name__} space")
        # Bypasses the constructor of RolloutBuffer, which allocates.
        buffers.BaseBuffer.__init__(self, buffer_size, observation_space, action_space, device, n_envs=n_envs)
        self.gae_lambda, self.gamma, self._shuffle = gae_lambda, gamma, shuffle
        if seed is None:
            seed = 0 if shuffle == "sb3" else int(np.random.randint(2**31 - 1))
        if grouped:
            obs = {key: (shape, _dtype(observation_space[key])) for key, shape in self.obs_shape.items()}
        else:
            obs = (self.obs_shape, _dtype(observation_space))
        self._ring = _Ring(
            num_envs=n_envs,
            num_steps=buffer_size,
            obs=obs,
            actions=((self.action_dim,), _dtype(action_space)),
            device=self.device,
            seed=seed,
            final_obs_rows=0,
        )
        self._running = torch.zeros(n_envs, dtype=torch.bool, device=self.device)
        self._first_starts = np.zeros(n_envs, np.float32)
        self.reset()

    values = _array("values", "[T, N] float32.")
    log_probs = _array("log_probs", "[T, N] float32.")
    advantages = _array("advantages", "[T, N] float32, once they are computed.")
    returns = _array("returns", "[T, N] float32, once they are computed.")
    actions = property(lambda self: _numpy(self._ring.actions.transpose(0, 1)), doc="[T, N, action_dim].")

    @property
    def rewards(self) -> np.ndarray:
        """[T, N] float32. An assignment or, on a CPU, a write into it takes effect in the next call of
        compute_returns_and_advantage."""
        return _numpy(self._ring.rewards.t(), writable=self.device.type == "cpu")

    @rewards.setter
    def rewards(self, rewards: np.ndarray) -> None:
        self._ring.rewards.copy_(self._tensor(rewards, np.float32).t())

    @property
    def observations(self) -> np.ndarray | dict[str, np.ndarray]:
        """[T, N, ...], or a dict of them."""
        obs = self._ring.obs
        if isinstance(obs, dict):
            return {key: _numpy(x.transpose(0, 1)) for key, x in obs.items()}
        return _numpy(obs.transpose(0, 1))

    @property
    def episode_starts(self) -> np.ndarray:
        """[T, N] float32: whether an episode starts with observation t, that is, one ended with step t - 1."""
        starts = np.empty((len(self._ring), self.n_envs), np.float32)
        if len(starts):
            starts[0], starts[1:] = self._first_starts, _numpy(self._ring.dones.t())[:-1] != 0
        return starts

    def reset(self) -> None:
        """Discards the rollout and keeps the memory."""
        self._ring.clear()
        self.pos, self.full = 0, False

    def add(
        self,
        obs: np.ndarray | dict[str, np.ndarray],
        action: np.ndarray,
        reward: np.ndarray,
        episode_start: np.ndarray,
        value: Tensor,
        log_prob: Tensor,
    ) -> None:
        """Stores step t. ``episode_start``: whether an episode starts with ``obs``, that is, step t - 1 ended one."""
        if self.pos == 0:
            self._first_starts[:] = episode_start
        else:
            self._ring.end_last_step(self._tensor(episode_start, bool))
        space = self.observation_space
        if isinstance(space, spaces.Dict):
            obs = {key: self._obs(obs[key], space[key], shape) for key, shape in self.obs_shape.items()}
        else:
            obs = self._obs(obs, space, self.obs_shape)
        self._ring.append(
            obs=obs,
            actions=self._tensor(action, self.action_space.dtype).reshape(self.n_envs, self.action_dim),
            rewards=self._tensor(reward, np.float32),
            dones=self._running,  # not known yet
            values=value.to(self.device),
            log_probs=log_prob.reshape(-1).to(self.device),
        )
        self.pos += 1
        self.full = self.pos == self.buffer_size

    def compute_returns_and_advantage(self, last_values: Tensor, dones: np.ndarray) -> None:
        """Computes advantages and returns. ``last_values`` [N, 1]: V after the last step; ``dones`` [N]: its ends."""
        if self.pos:
            self._ring.end_last_step(self._tensor(dones, bool))
        self._ring.compute_gae(last_values.to(self.device), self.gamma, self.gae_lambda)

    def get(self, batch_size: int | None = None) -> Iterator[RolloutBufferSamples | DictRolloutBufferSamples]:
        """An epoch in minibatches of ``batch_size``, the last with the rest; None: everything in one."""
        total = self.buffer_size * self.n_envs
        size = total if batch_size is None else positive("batch_size", operator.index(batch_size))
        order = self._order(np.random.permutation(total)) if self._shuffle == "sb3" else None
        for mb in self._ring.batches(size, order):
            yield self._samples(mb)

    def _get_samples(self, batch_inds: np.ndarray, env: object = None) -> RolloutBufferSamples:
        """The samples with these numbers, n * T + t. ``env`` is unused, as in Stable-Baselines3."""
        return self._samples(next(self._ring.batches(len(batch_inds), self._order(batch_inds))))

    def _samples(self, mb: Minibatch) -> RolloutBufferSamples | DictRolloutBufferSamples:
        samples = DictRolloutBufferSamples if isinstance(mb.obs, dict) else RolloutBufferSamples
        return samples(mb.obs, mb.actions.float(), mb.values, mb.log_probs, mb.advantages, mb.returns)

    def _obs(self, obs: np.ndarray, space: spaces.Space, shape: tuple[int, ...]) -> Tensor:
        x = self._tensor(obs, space.dtype)
        return x.reshape(self.n_envs, *shape) if isinstance(space, spaces.Discrete) else x

    def _order(self, indices: np.ndarray) -> Tensor:
        return self._tensor(indices, np.int64)

    def _tensor(self, x: np.ndarray, dtype: np.dtype | type) -> Tensor:
        # PyTorch rejects arrays with negative strides, and warns about read-only ones.
        return torch.from_numpy(np.require(x, dtype, ("C", "W"))).to(self.device)


class RolloutBuffer(_Rollout, buffers.RolloutBuffer):
    """For ``rollout_buffer_class=`` of PPO and A2C, with observations that are not a Dict."""


class DictRolloutBuffer(_Rollout, buffers.DictRolloutBuffer):
    """For ``rollout_buffer_class=`` of PPO and A2C, with Dict observations."""


def _dtype(space: spaces.Space) -> torch.dtype:
    return torch.from_numpy(np.empty(0, space.dtype)).dtype


def _numpy(x: Tensor, writable: bool = False) -> np.ndarray:
    array = x.cpu().numpy()
    if not writable:
        array.flags.writeable = False
    return array
