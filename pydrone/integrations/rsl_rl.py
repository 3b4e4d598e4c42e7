"""rsl_rl 5.x on pydrone: rollout storage, GAE and minibatches; acting and learning where ``rsl_rl_learner`` serves.

>>> cfg["algorithm"]["class_name"] = "pydrone.integrations.rsl_rl:PPO"

or, if neither the configuration nor the code can be edited:

>>> pydrone.integrations.rsl_rl.patch()
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import Module

from pydrone.buffer import Minibatch
from pydrone.integrations.peer import Arrays, Change, Patches, require
from pydrone.ops.reference import normalization
from pydrone.rollout.minibatch import Plan
from pydrone.rollout.sequences import trajectories

require("rsl-rl-lib", (5,), (6,))  # before imports that would fail with a less helpful message

from rsl_rl.algorithms import ppo  # noqa: E402
from rsl_rl.env import VecEnv  # noqa: E402
from rsl_rl.storage import RolloutStorage as PeerStorage  # noqa: E402
from tensordict import TensorDict  # noqa: E402

from pydrone.integrations import rsl_rl_learner  # noqa: E402

__all__ = ["PPO", "RolloutStorage", "patch", "unpatch"]


def _array(name: str, *, scalar: bool = True) -> property:
    """A property [T, N, ...]: an array of the storage's buffer, or zeros before there is one."""

    def read(self: RolloutStorage) -> Tensor:
        if self._buffer is None:
            width = (1,) if scalar else tuple(self.actions_shape)
            dtype = torch.uint8 if name == "dones" else None
            return torch.zeros(self.num_transitions_per_env, self.num_envs, *width, dtype=dtype, device=self.device)
        self._exposed |= name in ("values", "returns")
        array = self._buffer.array(name)
        return array.unsqueeze(-1) if scalar else array

    def write(self: RolloutStorage, x: Tensor) -> None:
        read(self).copy_(x)

    return property(read, write)


class RolloutStorage(PeerStorage):
    """rsl_rl's storage for ``training_type="rl"``, in a :class:`~pydrone.buffer.RolloutBuffer`.

    The arguments are those of rsl_rl; another ``training_type`` ("distillation") constructs rsl_rl's own storage.
    Everything is allocated once, in the first :meth:`add_transition`: only then are the parameters of the action
    distribution known. From then on ``observations``, ``actions``, ``rewards``, ``dones``, ``values``,
    ``actions_log_prob``, ``distribution_params`` and ``returns`` are views of it, [T, N, ...], to be read and written;
    a tensor assigned to one is copied into it.

    Attributes:
        shuffle: "full": a new permutation in every epoch, of samples or, for recurrent policies, of environments; each
            minibatch of samples overwrites the one before. "rsl_rl": one permutation for all epochs, drawn as rsl_rl
            draws it, and none for recurrent policies; the rollout is copied in that order once, which doubles the
            memory, and minibatches are views of the copy.
        learner: what an algorithm with this storage acts and learns by. "fused": the fused operations where they
            compute what rsl_rl would, see :mod:`pydrone.integrations.rsl_rl_learner`. "rsl_rl": its own code.
    """

    shuffle, learner = "full", "fused"

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
        self._advantages: Tensor | None = None  # as they were last read or assigned
        self._exposed = False  # whether anyone may have written into values, returns or advantages

    def _allocate(self, params: tuple[Tensor, ...]) -> None:
        self._params = [f"distribution_param_{i}" for i in range(len(params))]
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        dtype = torch.get_default_dtype()  # as rsl_rl
        self._buffer = _Buffer(
            self.num_envs,
            self.num_transitions_per_env,
            obs=self._obs_spec,
            actions=(tuple(self.actions_shape), dtype),
            device=self.device,
            fields={name: (tuple(x.shape[1:]), dtype) for name, x in zip(self._params, params, strict=True)},
            seed=torch.initial_seed(),
            rank=torch.distributed.get_rank() if distributed else 0,
            final_obs_rows=0,
            verbatim=True,
        )

    actions = _array("actions", scalar=False)
    rewards, dones, values = _array("rewards"), _array("dones"), _array("values")
    actions_log_prob, returns = _array("log_probs"), _array("returns")

    @property
    def observations(self) -> TensorDict:
        """The groups, [T, N, ...]."""
        shape = [self.num_transitions_per_env, self.num_envs]
        if self._buffer is None:
            groups = {
                key: torch.zeros(*shape, *size, dtype=dtype, device=self.device)
                for key, (size, dtype) in self._obs_spec.items()
            }
        else:
            groups = {key: self._buffer.array(f"obs.{key}") for key in self._obs_spec}
        return TensorDict(groups, batch_size=shape, device=self.device)

    @observations.setter
    def observations(self, observations: TensorDict) -> None:
        self.observations.copy_(observations)

    @property
    def distribution_params(self) -> tuple[Tensor, ...] | None:
        """[T, N, ...] each; None before the first transition."""
        return None if self._buffer is None else tuple(map(self._buffer.array, self._params))

    @property
    def step(self) -> int:
        """The number of steps stored since :meth:`clear`."""
        return 0 if self._buffer is None else len(self._buffer)

    @property
    def advantages(self) -> Tensor:
        """[T, N, 1]; normalised, in a copy, if :meth:`compute_returns` was told to. Can be written and assigned."""
        if self._advantages is None:
            self._advantages = self._own_advantages()
        self._exposed = True
        return self._advantages

    @advantages.setter
    def advantages(self, advantages: Tensor) -> None:
        self._advantages, self._exposed = advantages, True

    def _own_advantages(self) -> Tensor:
        if self._buffer is None:
            return torch.zeros(self.num_transitions_per_env, self.num_envs, 1, device=self.device)
        advantages = self._buffer.array("advantages").unsqueeze(-1)
        if not self._normalize:
            return advantages
        mean, scale = normalization(self._buffer.moments())
        return (advantages - mean) * scale

    def _edited(self) -> bool:
        """Whether a caller has written into values, returns or advantages, which minibatches compute or have apart.
        One host sync if any of them was ever read."""
        if not self._exposed:
            return False
        values, returns, advantages = (self._buffer.array(name) for name in ("values", "returns", "advantages"))
        same = torch.equal(returns, advantages + values) and torch.equal(values, self._buffer.stored_values())
        return not same or not (self._advantages is None or torch.equal(self._advantages, self._own_advantages()))

    def add_transition(self, transition: PeerStorage.Transition) -> None:
        """Stores a step in one launch, and recurrent states separately. OverflowError: the rollout is full."""
        if self._buffer is None:
            self._allocate(transition.distribution_params)
        if self.step >= self.num_transitions_per_env:
            raise OverflowError(f"the storage holds all {self.step} transitions of a rollout: call clear() first")
        self._save_hidden_states(transition.hidden_states)
        fields, obs = self._buffer.layout.fields, transition.observations
        params = zip(self._params, transition.distribution_params, strict=True)
        self._buffer.append(
            obs={key: _fit(x, self._obs_spec[key][1]) if key in self._obs_spec else x for key, x in obs.items()},
            actions=_fit(transition.actions, fields["actions"].dtype),
            rewards=_fit(transition.rewards, torch.float32).reshape(-1),
            dones=transition.dones.reshape(-1),
            values=_fit(transition.values, torch.float32),
            log_probs=_fit(transition.actions_log_prob, torch.float32).reshape(-1),
            **{name: _fit(x, fields[name].dtype) for name, x in params},
        )

    @torch.inference_mode(False)  # allocates: inference tensors could not be written to outside of inference mode
    def _save_hidden_states(self, hidden_states: tuple) -> None:
        super()._save_hidden_states(hidden_states)

    def compute_returns(self, last_values: Tensor, gamma: float, lam: float, normalize: bool) -> None:
        """Advantages, returns and statistics in one launch. ``last_values``: [N, 1]; ``normalize``: the advantages."""
        self._buffer.compute_gae(last_values, gamma, lam)
        self._computed, self._normalize, self._advantages = True, bool(normalize), None

    def clear(self) -> None:
        """Starts the next rollout; views of the last one stay valid until it is overwritten."""
        self._computed = False
        if self._buffer is not None:
            self._buffer.clear()

    def mini_batch_generator(self, num_mini_batches: int, num_epochs: int = 8) -> Iterator[PeerStorage.Batch]:
        """Shuffled minibatches of equal size; the remaining N * T % num_mini_batches samples are dropped."""
        if not self._computed:  # the algorithm has its own compute_returns
            yield from super().mini_batch_generator(num_mini_batches, num_epochs)
            return
        edited = self._edited()
        if self.shuffle == "full":
            for part in self._buffer.minibatches(
                num_mini_batches, num_epochs, normalize_advantages=self._normalize, drop_last=True, reuse=True
            ):
                yield self._batch(part, slice(None), edited)
        else:
            size = self.num_envs * self.num_transitions_per_env // num_mini_batches
            order = torch.randperm(
                num_mini_batches * size, device=self.device
            )  # rsl_rl numbers samples t * N + n, pydrone n * T + t
            order = order % self.num_envs * self.num_transitions_per_env + order // self.num_envs
            whole = self._buffer.arranged(order, self._normalize)
            for _ in range(num_epochs):
                for i in range(num_mini_batches):
                    yield self._batch(whole, slice(i * size, (i + 1) * size), edited)

    def _batch(self, samples: Minibatch, part: slice, edited: bool) -> PeerStorage.Batch:
        scalars = samples.values, samples.advantages, samples.returns
        if edited:
            planes = self.values, self.advantages, self.returns
            scalars = (self._buffer.taken(x, samples).squeeze(-1) for x in planes)
        values, advantages, returns = (x[part].unsqueeze(-1) for x in scalars)
        obs = {key: x[part] for key, x in samples.obs.items()}
        return self.Batch(
            observations=TensorDict(obs, batch_size=advantages.shape[:1], device=self.device),
            actions=samples.actions[part],
            values=values,
            advantages=advantages,
            returns=returns,
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
            x = x.unsqueeze(-1).flatten(0, 1).index_select(0, rows).squeeze(-1).unflatten(0, masks.shape)  # [T, B, ...]
            mask = masks.view(*masks.shape, *(1,) * (x.dim() - 2))
            return torch.where(mask, x, x.new_zeros(()))  # the RND loss reads the padding; masked_fill takes no uint16

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


class _Buffer(Arrays):
    """Adds what rsl_rl's normalisation and order of samples need."""

    def stored_values(self) -> Tensor:
        """[T, N]: the values that minibatches gather."""
        return self._storage.views["values"]

    def moments(self) -> Tensor:
        """The ``statistics``, kept after the rollout is discarded."""
        return self._storage.statistics

    def arranged(self, order: Tensor, normalize: bool) -> Minibatch:
        """The samples ``order``, int64 [B] of numbers n * T + t, in one launch, always into the same tensors."""
        plan = Plan(len(order), 1, False, normalize, False, True, order)
        return self._draws.minibatch(self._draws.part(plan, 0, 0, len(order)))


def _fit(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` as the buffer takes it: it converts between floating dtypes itself, and no others; rsl_rl converts any."""
    return x if x.dtype == dtype or (x.is_floating_point() and dtype.is_floating_point) else x.to(dtype)


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
    """rsl_rl's PPO with :class:`RolloutStorage`, whose ``shuffle`` and ``learner`` the configuration of the algorithm
    may set."""

    def __init__(
        self,
        actor: Module,
        critic: Module,
        storage: RolloutStorage,
        *args: object,
        shuffle: str = "full",
        learner: str = "fused",
        **kwargs: object,
    ) -> None:
        if not isinstance(storage, RolloutStorage):
            raise TypeError(f"storage: expected {__name__}.RolloutStorage, got {type(storage).__module__}'s")
        super().__init__(actor, critic, storage, *args, **kwargs)
        storage.shuffle, storage.learner = _checked(shuffle, learner)

    act, update, compute_returns = rsl_rl_learner.act, rsl_rl_learner.update, _compute_returns

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
    """A class of its own, so that patch() sets ``shuffle`` and ``learner`` here only."""


_patches = Patches()


def patch(shuffle: str = "full", learner: str = "fused") -> None:
    """From now on every rsl_rl PPO, subclasses included, uses :class:`RolloutStorage`.

    Those constructed before keep their storage. Calling it again only changes ``shuffle`` and ``learner``.
    """
    _PatchedStorage.shuffle, _PatchedStorage.learner = _checked(shuffle, learner)
    changes = [Change(ppo, "RolloutStorage", _PatchedStorage), Change(ppo.PPO, "compute_returns", _compute_returns)]
    changes += [Change(ppo.PPO, "act", rsl_rl_learner.act), Change(ppo.PPO, "update", rsl_rl_learner.update)]
    _patches.install(changes)


def unpatch() -> None:
    """Undoes :func:`patch`. Algorithms constructed in between keep their storage; all else is rsl_rl's again."""
    _patches.remove()


def _checked(shuffle: str, learner: str) -> tuple[str, str]:
    for name, x, known in (("shuffle", shuffle, ("full", "rsl_rl")), ("learner", learner, ("fused", "rsl_rl"))):
        if x not in known:
            raise ValueError(f"{name}: expected {' or '.join(map(repr, known))}, got {x!r}")
    return shuffle, learner
