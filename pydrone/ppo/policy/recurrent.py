"""Recurrent policies: a GRU or an LSTM before the perceptrons of the actor, and another before those of the critic.

While acting, the policy keeps its memory: :meth:`Recurrent.act` updates it and :meth:`Recurrent.reset` clears it where
an episode has ended. Learning needs only the memory before a rollout's first step, since every later trajectory starts
from zeros: ``rollout_memory``, which :meth:`Recurrent.begin_rollout` keeps.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pydrone.ppo.policy import matmul as precision
from pydrone.ppo.policy.actor_critic import ActorCritic, Evaluation, PolicyStep
from pydrone.ppo.policy.discrete import CategoricalActorCritic
from pydrone.rollout.sequences import Sequences

if TYPE_CHECKING:
    from pydrone.buffer import RolloutBuffer

Memory = dict[str, Tensor]  # "actor", "critic": [N, rnn_dim], an LSTM's [N, 2 * rnn_dim], output and cell side by side


class Recurrent:
    """A mixin that makes an :class:`ActorCritic` recurrent.

    ``memory``: the recurrent state of the running episodes, None before the first step. It belongs to the environments,
    not to the weights, and is not in ``state_dict``.
    """

    recurrent = True
    memory: Memory | None
    rollout_memory: Memory | None

    def __init__(self, *args: Any, cell: str = "gru", rnn_dim: int = 64, **options: Any) -> None:
        self._cell, self._rnn_dim = cell, rnn_dim
        super().__init__(*args, **options)
        self.memory = self.rollout_memory = None

    def _build(self, widths: Sequence[int], actions: int, hidden_dims: Sequence[int], init_std: float) -> None:
        super()._build([self._rnn_dim] * 2, actions, hidden_dims, init_std)
        kind = nn.GRU if self._cell == "gru" else nn.LSTM
        self.actor_rnn, self.critic_rnn = kind(widths[0], self._rnn_dim), kind(widths[1], self._rnn_dim)

    # ---------------------------------------------------------------------------------------------------------- acting

    def initial_memory(self, num_envs: int) -> Memory:
        """The memory at the start of an episode: zeros."""
        width = self._rnn_dim * (2 if self._cell == "lstm" else 1)
        zeros = self.actor_rnn.weight_hh_l0.new_zeros(num_envs, width)
        return {"actor": zeros, "critic": zeros}

    def begin_rollout(self, num_envs: int) -> None:
        """Keeps the memory before a rollout's first step, for :func:`sequence_batches`."""
        self.rollout_memory = self.memory or self.initial_memory(num_envs)

    @torch.no_grad()
    def reset(self, ended: Tensor | None = None) -> None:
        """Clears the memory where ``ended`` [N] is nonzero; None: everywhere."""
        if ended is None:
            self.memory = None
        elif self.memory is not None:
            ended = (ended != 0).unsqueeze(1)
            self.memory = {name: torch.where(ended, 0, state) for name, state in self.memory.items()}

    @torch.no_grad()
    def act(self, obs: Tensor | Mapping[str, Tensor]) -> PolicyStep:
        """As in the base class; updates the memory by one step."""
        mean, actor = self._remember("actor", obs)
        values, critic = self._remember("critic", obs)
        self.memory = {"actor": actor, "critic": critic}
        return self.draw(mean, self._denormalized(values.squeeze(-1)))

    @torch.no_grad()
    def mode(self, obs: Tensor | Mapping[str, Tensor]) -> Tensor:
        """As in the base class; updates the actor's memory by one step."""
        mean, actor = self._remember("actor", obs)
        self.memory = {**(self.memory or self.initial_memory(len(mean))), "actor": actor}
        return self.likeliest(mean)

    def mean(self, obs: Tensor | Mapping[str, Tensor]) -> Tensor:
        """As in the base class, given the memory, which stays the same."""
        return self._remember("actor", obs)[0]

    def normalized_value(self, obs: Tensor | Mapping[str, Tensor]) -> Tensor:
        """As in the base class, given the memory, which stays the same."""
        return self._remember("critic", obs)[0].squeeze(-1)

    def forward(self, obs: Tensor | Mapping[str, Tensor], memory: Tensor) -> tuple[Tensor, Tensor]:
        """The actor's outputs [N, A] and its next memory, of ``obs`` and its memory [N, S]; keeps nothing."""
        return self._step("actor", obs, memory)

    def _remember(self, name: str, obs: Tensor | Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        memory = self.memory or self.initial_memory(_length(obs))
        return self._step(name, obs, memory[name])

    def _step(self, name: str, obs: Tensor | Mapping[str, Tensor], memory: Tensor) -> tuple[Tensor, Tensor]:
        x = self._actor_input(obs) if name == "actor" else self._critic_input(obs)
        features, memory = self._unroll(name, x.unsqueeze(0), memory)
        return self._outputs(name, features.squeeze(0)), memory

    def _outputs(self, name: str, features: Tensor) -> Tensor:
        return self._actor_outputs(features) if name == "actor" else self._run(self.critic, features)

    def _unroll(self, name: str, x: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Features [L, B, rnn_dim] and the last memory [B, S] of inputs [L, B, ...] and the first memory [B, S]."""
        rnn, first = getattr(self, f"{name}_rnn"), memory.unsqueeze(0)
        state = first.contiguous() if self._cell == "gru" else tuple(part.contiguous() for part in first.chunk(2, -1))
        with precision.forward(self.matmul, x.device):
            features, state = rnn(x, state)
        state = state if self._cell == "gru" else torch.cat(state, -1)
        return features.to(x.dtype), state.squeeze(0).to(x.dtype)

    # -------------------------------------------------------------------------------------------------------- learning

    def evaluate(self, obs: Sequences, actions: Tensor) -> Evaluation:
        """As in the base class, for the M steps of ``obs`` that are learnt from; actions: [M, A]."""
        outputs = {}
        for name, x in (("actor", self._actor_input(obs.obs)), ("critic", self._critic_input(obs.obs))):
            features, _ = self._unroll(name, x, obs.hidden[name])
            outputs[name] = self._outputs(name, features[obs.learn])
        return self.judge(outputs["actor"], outputs["critic"].squeeze(-1), actions)

    def actor_parameters(self) -> list[nn.Parameter]:
        """The actor's parameters, its recurrent layer's among them."""
        return [*super().actor_parameters(), *self.actor_rnn.parameters()]

    def critic_parameters(self) -> list[nn.Parameter]:
        """The critic's parameters, its recurrent layer's among them."""
        return [*super().critic_parameters(), *self.critic_rnn.parameters()]


class SequenceBatch:
    """A minibatch of the M steps of padded trajectories that are learnt from; ``obs`` are the trajectories."""

    def __init__(self, sequences: Sequences, normalize: bool = False) -> None:
        self.obs = sequences
        self._fields = {name: x[sequences.learn] for name, x in sequences.fields.items()}
        if normalize:
            advantages = self.advantages
            std = advantages.std() if len(self) > 1 else 0.0
            self._fields["advantages"] = (advantages - advantages.mean()) / (std + 1e-8)

    def __getitem__(self, name: str) -> Tensor:
        return self._fields[name]

    def __getattr__(self, name: str) -> Tensor:
        try:
            return self.__dict__["_fields"][name]
        except KeyError:
            raise AttributeError(name) from None

    def __len__(self) -> int:
        return self.actions.shape[0]


def sequence_batches(
    policy: Recurrent, buffer: RolloutBuffer, config: Any, empty: bool = False
) -> Iterator[SequenceBatch]:
    """The buffer's rollout as minibatches for ``policy``; ``config``: a :class:`~pydrone.ppo.config.PPOConfig`.

    ``empty``: also yield minibatches without a step to learn from, instead of skipping them.
    """
    # Only a trajectory that starts with the rollout has a memory: a view of it serves all steps.
    hidden = {
        name: state.unsqueeze(1).expand(-1, buffer.num_steps, -1) for name, state in policy.rollout_memory.items()
    }
    # An episode that begins with the rollout has an empty memory: there is nothing of an earlier policy to renew.
    continued = torch.stack([state.any(1) for state in policy.rollout_memory.values()]).any(0)
    over_rollout = config.normalize_advantages and config.advantage_scope != "minibatch"
    for sequences in buffer.sequences(
        hidden, config.burn_in * continued, config.num_minibatches, config.num_epochs, normalize_advantages=over_rollout
    ):
        new = (sequences.starts > 0).unsqueeze(1)
        begun = {name: torch.where(new, 0, state) for name, state in sequences.hidden.items()}
        batch = SequenceBatch(sequences._replace(hidden=begun), config.normalize_advantages and not over_rollout)
        if empty or len(batch):
            yield batch


class RecurrentActorCritic(Recurrent, ActorCritic):
    """:class:`ActorCritic` with recurrent layers: ``cell`` "gru" or "lstm", ``rnn_dim`` units."""


class RecurrentCategoricalActorCritic(Recurrent, CategoricalActorCritic):
    """:class:`CategoricalActorCritic` likewise."""


def _length(obs: Tensor | Mapping[str, Tensor]) -> int:
    return len(next(iter(obs.values()))) if isinstance(obs, Mapping) else len(obs)
