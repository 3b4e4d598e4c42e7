"""Stable-Baselines3's rollout buffers on pydrone's memory and kernels.

>>> from pydrone.integrations.sb3 import RolloutBuffer
>>> model = stable_baselines3.PPO("MlpPolicy", venv, rollout_buffer_class=RolloutBuffer)
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from pydrone.buffer import Minibatch
from pydrone.integrations.peer import Arrays, require
from pydrone.ops.arguments import positive
from pydrone.rollout.minibatch import Plan

require("stable-baselines3", (2, 4), (3,))

from gymnasium import spaces  # noqa: E402 (after the check of the version)
from stable_baselines3.common import buffers  # noqa: E402
from stable_baselines3.common.type_aliases import DictRolloutBufferSamples, RolloutBufferSamples  # noqa: E402

__all__ = ["DictRolloutBuffer", "RolloutBuffer"]


class _Ring(Arrays):
    """Adds ends that become known a step later, and minibatches given by their size, not their number."""

    def zero(self, first: int) -> None:
        """Makes the steps from ``first`` on zero, and the advantages and returns of a rollout that has none."""
        for name in ("rewards", "values", "dones"):
            self.array(name)[first:] = 0
        self._storage.rows[first:] = 0
        if not self._scan.computed:
            self._storage.advantages.zero_(), self._storage.returns.zero_()

    def scan(self, starts: Tensor, dones: Tensor, last_values: Tensor, gamma: float, lam: float) -> None:
        """Advantages and returns of all T steps, stored or not. starts: bool [T, N], whether an episode starts with
        observation t; dones: bool [N], whether one ended with the last step. Ends become code 1, without a bootstrap:
        the collector has added gamma * V(final observation) to the reward."""
        self._storage.codes[:, :-1], self._storage.codes[:, -1] = starts[1:].t(), dones
        ring, stored = self._ring, self._ring.appended
        ring.appended = ring.discarded + self.num_steps
        try:
            self.compute_gae(last_values, gamma, lam)
        finally:
            ring.appended = stored

    def batches(self, batch_size: int, order: Tensor | None = None) -> Iterator[Minibatch]:
        """The rollout in minibatches of ``batch_size``, the last with the rest: shuffled, or in the order of ``order``,
        int64 sample numbers n * T + t."""
        samples = self.num_envs * self.num_steps if order is None else len(order)
        plan = Plan(samples, -(-samples // batch_size), order is None, False, False, False, order)
        discards, epoch = self._ring.discards, self._draws.next_epoch()
        for first in range(0, samples, batch_size):
            if discards != self._ring.discards:
                raise RuntimeError("get: reset() has discarded the rollout while it was being read")
            yield self._draws.minibatch(self._draws.part(plan, epoch, first, min(batch_size, samples - first)))


def _array(name: str, doc: str) -> property:
    """A property [T, N, ...] as a NumPy array, as callers of Stable-Baselines3 expect; on a CPU, a view."""
    return property(lambda self: self._read(name), lambda self, x: self._write(name, x), doc=doc)


class _Groups(dict):
    """Observations by group. An array assigned to a key is written into the buffer."""

    def __init__(self, buffer: _Rollout, keys: Iterable[str]) -> None:
        super().__init__({key: buffer._read(f"obs.{key}") for key in keys})
        self._buffer = buffer

    def __setitem__(self, key: str, x: np.ndarray) -> None:
        self._buffer._write(f"obs.{key}", x)


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
        self._seed = seed
        self._allocate()

    def _allocate(self) -> None:
        space = self.observation_space
        if isinstance(space, spaces.Dict):
            obs = {key: (shape, _dtype(space[key])) for key, shape in self.obs_shape.items()}
        else:
            obs = (self.obs_shape, _dtype(space))
        self._ring = _Ring(
            num_envs=self.n_envs,
            num_steps=self.buffer_size,
            obs=obs,
            actions=((self.action_dim,), _dtype(self.action_space)),
            device=self.device,
            seed=self._seed,
            final_obs_rows=0,
            verbatim=True,
        )
        self._columns = (self.n_envs,), (self.n_envs, 1)
        self._running = torch.zeros(self.n_envs, dtype=torch.bool, device=self.device)
        self.reset()

    actions = _array("actions", "[T, N, action_dim].")
    rewards = _array("rewards", "[T, N] float32.")
    values = _array("values", "[T, N] float32.")
    log_probs = _array("log_probs", "[T, N] float32.")
    advantages = _array("advantages", "[T, N] float32; zero until they are computed.")
    returns = _array("returns", "[T, N] float32; zero until they are computed.")

    @property
    def observations(self) -> np.ndarray | dict[str, np.ndarray]:
        """[T, N, ...], or a dict of them."""
        return _Groups(self, self.obs_shape) if isinstance(self.obs_shape, dict) else self._read("obs.obs")

    @observations.setter
    def observations(self, observations: np.ndarray | dict[str, np.ndarray]) -> None:
        groups = observations if isinstance(self.obs_shape, dict) else {"obs": observations}
        for key, x in groups.items():
            self._write(f"obs.{key}", x)

    def _read(self, name: str) -> np.ndarray:
        self._complete()
        self._exposed = True
        return self._ring.array(name).cpu().numpy()

    def _write(self, name: str, x: np.ndarray) -> None:
        array = self._read(name)
        if np.shape(x) != array.shape:
            raise ValueError(f"{name}: expected shape {list(array.shape)}, got {list(np.shape(x))}")
        self._ring.array(name).copy_(self._tensor(name, x, array.dtype, array.shape))

    def _complete(self) -> None:
        """Zeros for what this rollout does not have, as after Stable-Baselines3's reset."""
        if not self._completed:
            self._ring.zero(self.pos)
            self._completed = self._exposed = True

    def reset(self) -> None:
        """Discards the rollout and keeps the memory, unless ``buffer_size`` or ``n_envs`` has been changed."""
        if (self.buffer_size, self.n_envs) != (self._ring.num_steps, self._ring.num_envs):
            return self._allocate()
        self._ring.clear()
        #: [T, N] float32: whether an episode starts with observation t, that is, one ended with step t - 1
        self.episode_starts = np.zeros((self.buffer_size, self.n_envs), np.float32)
        self.pos, self.full, self.generator_ready = 0, False, False
        self._completed = False  # zeros after the steps stored, and in place of advantages
        self._exposed = False  # whether anyone may have written into the arrays: then returns are not A + V

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
        space, n = self.observation_space, self.n_envs
        if isinstance(space, spaces.Dict):
            obs = {key: self._obs(obs[key], space[key], shape) for key, shape in self.obs_shape.items()}
        else:
            obs = self._obs(obs, space, self.obs_shape)
        self.episode_starts[self.pos : self.pos + 1] = episode_start
        self._ring.append(
            obs=obs,
            actions=self._tensor(
                "action", np.reshape(action, (n, self.action_dim)), self.action_space.dtype, (n, self.action_dim)
            ),
            rewards=self._tensor("reward", reward, np.float32, (n,)),
            dones=self._running,  # not known yet
            values=self._floats(value),
            log_probs=self._floats(log_prob),
        )
        self.pos += 1
        self.full = self.pos == self.buffer_size

    def compute_returns_and_advantage(self, last_values: Tensor, dones: np.ndarray) -> None:
        """Computes advantages and returns. ``last_values`` [N, 1]: V after the last step; ``dones`` [N]: its ends.

        All T steps count, as in Stable-Baselines3: those that are not stored have zeros.
        """
        if not self.full:
            self._complete()
        starts = self._tensor("episode_starts", self.episode_starts, bool, (self.buffer_size, self.n_envs))
        dones = self._tensor("dones", dones, bool, (self.n_envs,))
        self._ring.scan(starts, dones, self._floats(last_values), self.gamma, self.gae_lambda)
        self._completed = True

    def get(self, batch_size: int | None = None) -> Iterator[RolloutBufferSamples | DictRolloutBufferSamples]:
        """An epoch in minibatches of ``batch_size``, the last with the rest; None: everything in one."""
        if not self.full:
            raise RuntimeError(f"get: expected a full buffer, {self.pos} of {self.buffer_size} steps are stored")
        total = self.buffer_size * self.n_envs
        size = total if batch_size is None else positive("batch_size", operator.index(batch_size))
        order = self._order(np.random.permutation(total)) if self._shuffle == "sb3" else None
        self.generator_ready = True
        yield from self._drawn(size, order)

    def _get_samples(self, batch_inds: np.ndarray, env: object = None) -> RolloutBufferSamples:
        """The samples with these numbers, n * T + t. ``env`` is unused, as in Stable-Baselines3."""
        return next(self._drawn(len(batch_inds), self._order(batch_inds)))

    def _drawn(self, size: int, order: Tensor | None) -> Iterator[RolloutBufferSamples | DictRolloutBufferSamples]:
        self._complete()  # in case no advantages were computed
        for mb in self._ring.batches(size, order):
            values, returns = mb.values, mb.returns
            if self._exposed:
                values, returns = (self._ring.taken(self._ring.array(x), mb) for x in ("values", "returns"))
            obs, kind = mb.obs, RolloutBufferSamples
            if isinstance(obs, dict):
                obs, kind = {key: _at_least_2d(x) for key, x in obs.items()}, DictRolloutBufferSamples
            else:
                obs = _at_least_2d(obs)
            yield kind(obs, mb.actions.float(), values, mb.log_probs, mb.advantages, returns)

    def _obs(self, obs: np.ndarray, space: spaces.Space, shape: tuple[int, ...]) -> Tensor:
        if isinstance(space, spaces.Discrete):
            obs = np.reshape(obs, (self.n_envs, *shape))
        return self._tensor("obs", obs, space.dtype, (self.n_envs, *shape))

    def _order(self, indices: np.ndarray) -> Tensor:
        return self._tensor("batch_inds", indices, np.int64, (len(indices),))

    def _floats(self, x: Tensor) -> Tensor:
        """[N] or [N, 1], on the buffer's device."""
        if x.dtype is torch.float32 and not x.requires_grad and x.device == self.device and x.shape in self._columns:
            return x
        x = x.detach().to(self.device).flatten()
        x = x if x.is_floating_point() else x.float()
        return x.expand(self.n_envs) if x.numel() == 1 else x

    def _tensor(self, name: str, x: np.ndarray, dtype: np.dtype | type, shape: tuple[int, ...]) -> Tensor:
        if type(x) is np.ndarray and x.dtype == dtype and x.shape == shape and x.flags.carray:  # the usual, at once
            return torch.from_numpy(x) if self.device.type == "cpu" else torch.from_numpy(x).to(self.device)
        array = np.require(x, dtype, ("C", "W"))  # PyTorch rejects negative strides, and warns about read-only arrays
        if array.shape != shape:
            given, array = array, np.empty(shape, dtype)
            try:
                array[...] = given
            except ValueError:
                raise ValueError(f"{name}: expected shape {list(shape)}, got {list(given.shape)}") from None
        return torch.from_numpy(array).to(self.device)


class RolloutBuffer(_Rollout, buffers.RolloutBuffer):
    """For ``rollout_buffer_class=`` of PPO and A2C, with observations that are not a Dict."""


class DictRolloutBuffer(_Rollout, buffers.DictRolloutBuffer):
    """For ``rollout_buffer_class=`` of PPO and A2C, with Dict observations."""


def _dtype(space: spaces.Space) -> torch.dtype:
    return torch.from_numpy(np.empty(0, space.dtype)).dtype


def _at_least_2d(x: Tensor) -> Tensor:
    return x.unsqueeze(1) if x.dim() == 1 else x  # as Stable-Baselines3's swap_and_flatten
