"""rsl_rl 5.x on pydrone: rollout storage, GAE and minibatches. Networks, losses, RND and symmetry remain rsl_rl's.

>>> cfg["algorithm"]["class_name"] = "pydrone.integrations.rsl_rl:PPO"

or, if neither the configuration nor the code can be edited:

>>> pydrone.integrations.rsl_rl.patch()
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import Module

from pydrone.buffer import Minibatch, RolloutBuffer
from pydrone.integrations.peer import Change, Patches, require
from pydrone.ops.reference import normalization
from pydrone.rollout.minibatch import Plan
from pydrone.rollout.sequences import trajectories

require("rsl-rl-lib", (5,), (6,))  # before imports that would fail with a less helpful message

from rsl_rl.algorithms import ppo  # noqa: E402
from rsl_rl.env import VecEnv  # noqa: E402
from rsl_rl.storage import RolloutStorage as PeerStorage  # noqa: E402
from tensordict import TensorDict  # noqa: E402

__all__ = ["PPO", "RolloutStorage", "patch", "unpatch"]


class RolloutStorage(PeerStorage):
    """rsl_rl's storage for ``training_type="rl"``, in a :class:`~pydrone.buffer.RolloutBuffer`.

    The arguments are those of rsl_rl; another ``training_type`` ("distillation") constructs rsl_rl's own storage.
    Everything is allocated once, in the first :meth:`add_transition`: only then are the parameters of the action
    distribution known. From then on ``observations``, ``actions``, ``rewards``, ``dones``, ``values``,
    ``actions_log_prob``, ``distribution_params`` and ``returns`` are views of it, [T, N, ...].

    Attributes:
        shuffle: "full": a new permutation in every epoch, of samples or, for recurrent policies, of environments; each
            minibatch of samples overwrites the one before. "rsl_rl": one permutation for all epochs, drawn as rsl_rl
            draws it, and none for recurrent policies; the rollout is copied in that order once, which doubles the
            memory, and minibatches are views of the copy.
    """

    shuffle = "full"

    def __new__(cls, training_type: str = "rl", *args: object, **kwargs: object) -> PeerStorage:
        if training_type != "rl":
            return PeerStorage(training_type, *args, **kwargs)
        return super().__new__(cls)

    def __init__(
        self,
        training_type: str,
        num_envs: int,
        num_transitions_per_env: int,
        obs: TensorDict,
        actions_shape: tuple[int, ...] | list[int],
        device: str = "cpu",
    ) -> None:
        self.training_type, self.device, self.actions_shape = training_type, device, actions_shape
        self.num_envs, self.num_transitions_per_env = num_envs, num_transitions_per_env
        self.saved_hidden_state_a = self.saved_hidden_state_c = None
        self._obs_spec = {key: (tuple(x.shape[1:]), x.dtype) for key, x in obs.items()}
        self._buffer: _Buffer | None = None
        self._computed = self._normalize = False  # set by compute_returns
        self._assigned: Tensor | None = None  # advantages assigned from outside

    def _allocate(self, params: tuple[Tensor, ...]) -> None:
        self._params = [f"distribution_param_{i}" for i in range(len(params))]
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        self._buffer = buffer = _Buffer(
            self.num_envs,
            self.num_transitions_per_env,
            obs=self._obs_spec,
            actions=tuple(self.actions_shape),
            device=self.device,
            fields={name: tuple(x.shape[1:]) for name, x in zip(self._params, params, strict=True)},
            seed=torch.initial_seed(),
            rank=torch.distributed.get_rank() if distributed else 0,
            final_obs_rows=0,
        )
        shape = [self.num_transitions_per_env, self.num_envs]
        groups = {key: buffer.field(f"obs.{key}") for key in self._obs_spec}
        self.observations = TensorDict(groups, batch_size=shape, device=self.device)
        self.actions, self.actions_log_prob = buffer.field("actions"), buffer.field("log_probs").unsqueeze(-1)
        planes = ("rewards", "dones", "values", "returns")
        self.rewards, self.dones, self.values, self.returns = map(buffer.plane, planes)
        self.distribution_params = tuple(map(buffer.field, self._params))

    @property
    def step(self) -> int:
        """The number of steps stored since :meth:`clear`."""
        return 0 if self._buffer is None else len(self._buffer)

    @property
    def advantages(self) -> Tensor:
        """[T, N, 1]; normalised, in a copy, if :meth:`compute_returns` was told to. Can be assigned."""
        if self._assigned is not None:
            return self._assigned
        advantages = self._buffer.plane("advantages")
        if not self._normalize:
            return advantages
        mean, scale = normalization(self._buffer.moments())
        return (advantages - mean) * scale

    @advantages.setter
    def advantages(self, advantages: Tensor) -> None:
        self._assigned = advantages

    def add_transition(self, transition: PeerStorage.Transition) -> None:
        """Stores a step in one launch, and recurrent states separately. OverflowError: the rollout is full."""
        if self._buffer is None:
            self._allocate(transition.distribution_params)
        if self.step >= self.num_transitions_per_env:
            raise OverflowError(f"the storage holds all {self.step} transitions of a rollout: call clear() first")
        self._save_hidden_states(transition.hidden_states)
        self._buffer.append(
            obs=transition.observations,
            actions=transition.actions,
            rewards=transition.rewards,
            dones=transition.dones,
            values=transition.values,
            log_probs=transition.actions_log_prob,
            **dict(zip(self._params, transition.distribution_params, strict=True)),
        )

    @torch.inference_mode(False)  # allocates: inference tensors could not be written to outside of inference mode
    def _save_hidden_states(self, hidden_states: tuple) -> None:
        super()._save_hidden_states(hidden_states)

    def compute_returns(self, last_values: Tensor, gamma: float, lam: float, normalize: bool) -> None:
        """Advantages, returns and statistics in one launch. ``last_values``: [N, 1]; ``normalize``: the advantages."""
        self._buffer.compute_gae(last_values, gamma, lam)
        self._computed, self._normalize, self._assigned = True, bool(normalize), None

    def clear(self) -> None:
        """Starts the next rollout; views of the last one stay valid until it is overwritten."""
        if self._buffer is not None:
            self._buffer.clear()

    def mini_batch_generator(self, num_mini_batches: int, num_epochs: int = 8) -> Iterator[PeerStorage.Batch]:
        """Shuffled minibatches of equal size; the remaining N * T % num_mini_batches samples are dropped."""
        if not self._computed or self._assigned is not None:  # the algorithm has its own compute_returns
            yield from super().mini_batch_generator(num_mini_batches, num_epochs)
        elif self.shuffle == "full":
            for part in self._buffer.minibatches(
                num_mini_batches, num_epochs, normalize_advantages=self._normalize, drop_last=True, reuse=True
            ):
                yield self._batch(part, slice(None))
        else:
            size = self.num_envs * self.num_transitions_per_env // num_mini_batches
            order = torch.randperm(
                num_mini_batches * size, device=self.device
            )  # rsl_rl numbers samples t * N + n, pydrone n * T + t
            order = order % self.num_envs * self.num_transitions_per_env + order // self.num_envs
            whole = self._buffer.arranged(order, self._normalize)
            for _ in range(num_epochs):
                for i in range(num_mini_batches):
                    yield self._batch(whole, slice(i * size, (i + 1) * size))

    def _batch(self, samples: Minibatch, part: slice) -> PeerStorage.Batch:
        advantages = samples.advantages[part].unsqueeze(-1)
        obs = {key: x[part] for key, x in samples.obs.items()}
        return self.Batch(
            observations=TensorDict(obs, batch_size=advantages.shape[:1], device=self.device),
            actions=samples.actions[part],
            values=samples.values[part].unsqueeze(-1),
            advantages=advantages,
            returns=samples.returns[part].unsqueeze(-1),
            old_actions_log_prob=samples.log_probs[part].unsqueeze(-1),
            old_distribution_params=tuple(samples[name][part] for name in self._params),
        )

    def recurrent_mini_batch_generator(self, num_mini_batches: int, num_epochs: int = 8) -> Iterator[PeerStorage.Batch]:
        """Minibatches of whole environments, with observations as trajectories padded to T; one host sync each."""
        size, full = self.num_envs // num_mini_batches, self.shuffle == "full"
        advantages, parts = self.advantages, {}
        for _ in range(num_epochs):
            order = (torch.randperm if full else torch.arange)(self.num_envs, device=self.device)
            for i in range(num_mini_batches):
                part = parts.get(i) or self._trajectories(order[i * size : (i + 1) * size], advantages)
                if not full:
                    parts[i] = part
                yield self.Batch(**part)

    def _trajectories(self, envs: Tensor, advantages: Tensor) -> dict[str, object]:
        """The arguments of a Batch for the environments ``envs`` [E]: B >= E trajectories."""
        env, start, length = trajectories((self.dones[:, :, 0] != 0).t(), envs)
        offset = torch.arange(self.num_transitions_per_env, device=env.device).unsqueeze(1)
        masks = offset < length
        rows = (start + offset).clamp_(max=self.num_transitions_per_env - 1).mul_(self.num_envs).add_(env).flatten()

        def padded(x: Tensor) -> Tensor:
            x = x.flatten(0, 1).index_select(0, rows).unflatten(0, masks.shape)  # [T, B, ...]
            return x.masked_fill_(~masks.view(*masks.shape, *(1,) * (x.dim() - 2)), 0)  # the RND loss reads the padding

        def first(saved: list[Tensor] | None) -> Tensor | tuple[Tensor, ...] | None:
            if saved is None:
                return None
            states = tuple(x.transpose(1, 2)[start, env].transpose(0, 1).contiguous() for x in saved)
            return states[0] if len(states) == 1 else states

        return {
            "observations": TensorDict(
                {key: padded(x) for key, x in self.observations.items()}, batch_size=masks.shape, device=self.device
            ),
            "actions": self.actions[:, envs],
            "values": self.values[:, envs],
            "advantages": advantages[:, envs],
            "returns": self.returns[:, envs],
            "old_actions_log_prob": self.actions_log_prob[:, envs],
            "old_distribution_params": tuple(x[:, envs] for x in self.distribution_params),
            "hidden_states": (first(self.saved_hidden_state_a), first(self.saved_hidden_state_c)),
            "masks": masks,
        }


class _Buffer(RolloutBuffer):
    """A buffer of one rollout with views of all of its memory, whether filled or not."""

    def field(self, name: str) -> Tensor:
        """[T, N, ...]."""
        return self._storage.views[name]

    def plane(self, name: str) -> Tensor:
        """[T, N, 1]."""
        return self._storage.tensors[name].t().unsqueeze(-1)

    def moments(self) -> Tensor:
        """The ``statistics``, kept after the rollout is discarded."""
        return self._storage.statistics

    def arranged(self, order: Tensor, normalize: bool) -> Minibatch:
        """The samples ``order``, int64 [B] of numbers n * T + t, in one launch, always into the same tensors."""
        plan = Plan(len(order), 1, False, normalize, False, True, order)
        return self._draws.minibatch(self._draws.part(plan, 0, 0, len(order)))


_peer_compute_returns = ppo.PPO.compute_returns


def _compute_returns(self: ppo.PPO, obs: TensorDict) -> None:
    """``PPO.compute_returns``; with another storage, rsl_rl's own."""
    if not isinstance(self.storage, RolloutStorage):
        _peer_compute_returns(self, obs)
        return
    state = self.critic.get_hidden_state()
    last_values = self.critic(obs)
    self.critic.reset(hidden_state=state)  # the next rollout continues from the state before this call
    normalize = not self.normalize_advantage_per_mini_batch
    self.storage.compute_returns(last_values, self.gamma, self.lam, normalize)


class PPO(ppo.PPO):
    """rsl_rl's PPO with :class:`RolloutStorage`; ``algorithm.shuffle`` in the configuration sets its ``shuffle``."""

    def __init__(
        self,
        actor: Module,
        critic: Module,
        storage: RolloutStorage,
        *args: object,
        shuffle: str = "full",
        **kwargs: object,
    ) -> None:
        if not isinstance(storage, RolloutStorage):
            raise TypeError(f"storage: expected {__name__}.RolloutStorage, got {type(storage).__module__}'s")
        super().__init__(actor, critic, storage, *args, **kwargs)
        storage.shuffle = _checked(shuffle)

    compute_returns = _compute_returns

    @staticmethod
    def construct_algorithm(obs: TensorDict, env: VecEnv, cfg: dict, device: str) -> PPO:
        """As in rsl_rl, but with this storage in place of its own."""
        storage = Patches()
        storage.install([Change(ppo, "RolloutStorage", RolloutStorage)])
        try:
            return ppo.PPO.construct_algorithm(obs, env, cfg, device)
        finally:
            storage.remove()


class _PatchedStorage(RolloutStorage):
    """A class of its own, so that patch() sets ``shuffle`` here only."""


_patches = Patches()


def patch(shuffle: str = "full") -> None:
    """From now on every rsl_rl PPO, subclasses included, uses :class:`RolloutStorage`.

    Those constructed before keep their storage. Calling it again only changes ``shuffle``.
    """
    _PatchedStorage.shuffle = _checked(shuffle)
    changes = [Change(ppo, "RolloutStorage", _PatchedStorage), Change(ppo.PPO, "compute_returns", _compute_returns)]
    _patches.install(changes)


def unpatch() -> None:
    """Undoes :func:`patch`. Algorithms constructed in between keep their storage and use rsl_rl's GAE loop."""
    _patches.remove()


def _checked(shuffle: str) -> str:
    if shuffle not in ("full", "rsl_rl"):
        raise ValueError(f"shuffle: expected 'full' or 'rsl_rl', got {shuffle!r}")
    return shuffle
