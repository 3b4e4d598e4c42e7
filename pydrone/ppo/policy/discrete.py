"""The policy with discrete actions: the actor's outputs are the logarithms of K probabilities, or of several such."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pydrone.ppo.policy.actor_critic import ActorCritic, Evaluation, PolicyStep, mlp
from pydrone.ppo.policy.distributions import categorical_entropy, categorical_kl, categorical_log_prob


class CategoricalActorCritic(ActorCritic):
    """:class:`ActorCritic` with K discrete actions, int64 [N], stored in the field "logs".

    ``mean``, and with it ``forward``, is [N, K]: the logarithms of the probabilities. ``init_std`` is not read.

    With ``actions`` = (K1, ..., KD), an action is D independent choices, int64 [N, D], the i-th of Ki; K is their sum,
    and the logarithms of all are side by side. Their log-probabilities, entropies and divergences add up. The buffer
    ``choice_counts`` keeps (K1, ..., KD) in the ``state_dict``.
    """

    def _build(
        self, widths: Sequence[int], actions: int | Sequence[int], hidden_dims: Sequence[int], init_std: float
    ) -> None:
        self.choices = None if isinstance(actions, int) else tuple(map(int, actions))
        if self.choices is not None:
            counts = torch.tensor(self.choices)
            self.register_buffer("choice_counts", counts)
            self.register_buffer("_first", counts.cumsum(0) - counts, persistent=False)
            actions = sum(self.choices)
        self.actor = mlp(widths[0], actions, hidden_dims, self._activation)
        self.critic = mlp(widths[1], 1, hidden_dims, self._activation)
        # At first all actions are about equally likely, whatever the observation.
        with torch.no_grad():
            self.actor[-1].weight.mul_(0.01)
            self.actor[-1].bias.zero_()

    @property
    def std(self) -> Tensor:
        return self.actor[-1].bias.new_full((), math.nan)

    def bound_std(self) -> None:
        """Does nothing: there is none."""

    def fields(self) -> dict[str, int]:
        return {"logs": self.actor[-1].out_features}

    def stored(self, step: PolicyStep) -> dict[str, Any]:
        return {"logs": step.mean}

    def draw(self, mean: Tensor, values: Tensor) -> PolicyStep:
        # Gumbel's trick: the largest of logarithms plus -log(Exp(1)) is a sample.
        # torch.multinomial would wait for the device to check the sum of the probabilities.
        actions = self.likeliest(mean - torch.empty_like(mean).exponential_().log_())
        return PolicyStep(actions, self._log_prob(actions, mean), values, mean, None)

    def judge(self, mean: Tensor, values: Tensor, actions: Tensor) -> Evaluation:
        return Evaluation(self._log_prob(actions, mean), values, mean, None)

    def _log_prob(self, actions: Tensor, logs: Tensor) -> Tensor:
        if self.choices is None:
            return categorical_log_prob(actions, logs)
        return logs.gather(-1, actions + self._first).sum(-1)

    def entropy(self, new: Evaluation) -> Tensor:
        return categorical_entropy(new.mean)

    def kl(self, old: Mapping[str, Tensor], new: Evaluation) -> Tensor:
        return categorical_kl(old["logs"], new.mean)

    def likeliest(self, mean: Tensor) -> Tensor:
        if self.choices is None:
            return mean.argmax(-1)
        return torch.stack([logs.argmax(-1) for logs in mean.split(self.choices, -1)], -1)

    def _actor_outputs(self, x: Tensor) -> Tensor:
        logits = super()._actor_outputs(x)
        if self.choices is None:
            return logits.log_softmax(-1)
        return torch.cat([part.log_softmax(-1) for part in logits.split(self.choices, -1)], -1)

    def _load_from_state_dict(self, state: Mapping[str, Any], prefix: str, *args: Any) -> None:
        counts = state.get(f"{prefix}choice_counts")
        if self.choices is not None and counts is not None and tuple(counts.tolist()) != self.choices:
            # Others of the same sum would fit the networks.
            args[-1].append(f"choice_counts: expected {self.choices}, got {tuple(counts.tolist())}")
        super()._load_from_state_dict(state, prefix, *args)

    def actor_parameters(self) -> list[nn.Parameter]:
        return list(self.actor.parameters())
