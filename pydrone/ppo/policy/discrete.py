"""The policy with discrete actions: the actor's outputs are the logarithms of K probabilities."""

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
    """

    def _build(self, widths: Sequence[int], actions: int, hidden_dims: Sequence[int], init_std: float) -> None:
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
        actions = (mean - torch.empty_like(mean).exponential_().log_()).argmax(-1)
        return PolicyStep(actions, categorical_log_prob(actions, mean), values, mean, None)

    def judge(self, mean: Tensor, values: Tensor, actions: Tensor) -> Evaluation:
        return Evaluation(categorical_log_prob(actions, mean), values, mean, None)

    def entropy(self, new: Evaluation) -> Tensor:
        return categorical_entropy(new.mean)

    def kl(self, old: Mapping[str, Tensor], new: Evaluation) -> Tensor:
        return categorical_kl(old["logs"], new.mean)

    def likeliest(self, mean: Tensor) -> Tensor:
        return mean.argmax(-1)

    def _actor_outputs(self, x: Tensor) -> Tensor:
        return super()._actor_outputs(x).log_softmax(-1)

    def actor_parameters(self) -> list[nn.Parameter]:
        return list(self.actor.parameters())
