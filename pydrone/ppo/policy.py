"""The policy: two multilayer perceptrons and a Gaussian whose standard deviation does not depend on the state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pydrone.layout import Spec, parse_obs
from pydrone.ppo.loss import gaussian_log_prob, log_normalizer

# rsl_rl's lower bound: the standard deviation is a plain parameter, and a gradient step could take it below zero.
MIN_STD = 1e-6


class PolicyStep(NamedTuple):
    """What a rollout stores of the policy, for N environments and A action dimensions."""

    actions: Tensor  # [N, A], drawn
    log_probs: Tensor  # [N]
    values: Tensor  # [N]
    mean: Tensor  # [N, A]
    std: Tensor  # [N, A], the same row N times, without memory of its own


class Evaluation(NamedTuple):
    """What the loss needs of the policy, for B samples and A action dimensions."""

    log_probs: Tensor  # [B], of the given actions
    values: Tensor  # [B]
    mean: Tensor  # [B, A]
    std: Tensor  # [A]


class _Tanh(nn.Module):
    """tanh in place: the derivative needs the result alone, so a layer's input need not outlive it."""

    def forward(self, x: Tensor) -> Tensor:
        return x.tanh_()


def mlp(inputs: int, outputs: int, hidden_dims: Sequence[int]) -> nn.Sequential:
    """Linear layers with tanh between them, initialised as torch does, which is also what rsl_rl trains from."""
    layers: list[nn.Module] = []
    for width in hidden_dims:
        layers += [nn.Linear(inputs, width), _Tanh()]
        inputs = width
    return nn.Sequential(*layers, nn.Linear(inputs, outputs))


class ActorCritic(nn.Module):
    """Actor and critic, apart from each other; ``state_dict`` is theirs and ``std_param`` [A].

    Args:
        obs: as the rollout buffer's, an int, a shape, or a mapping of group names to shapes or (shape, dtype); each a
            vector. Of groups the actor sees "policy" and the critic "critic", or "policy" too where there is none.
        actions: action dimensions A.
        hidden_dims: widths of the hidden layers.
        init_std: first standard deviation, of every dimension.
    """

    def __init__(
        self,
        obs: object,
        actions: int,
        hidden_dims: Sequence[int] = (128, 128),
        init_std: float = 1.0,
    ) -> None:
        super().__init__()
        self.obs = obs
        groups, named = parse_obs(obs, torch.float32)
        if not named:
            groups = {"policy": groups["obs"]}
        if "policy" not in groups:
            raise ValueError(f"obs: expected a group named 'policy', got {sorted(groups)}")
        self.actor = mlp(_width(groups["policy"]), actions, hidden_dims)
        self.critic = mlp(_width(groups.get("critic", groups["policy"])), 1, hidden_dims)
        self.std_param = nn.Parameter(torch.full((actions,), float(init_std)))

    @property
    def std(self) -> Tensor:
        """[A], the standard deviation."""
        return self.std_param.clamp_min(MIN_STD)

    @torch.no_grad()
    def act(self, obs: Tensor | Mapping[str, Tensor]) -> PolicyStep:
        """Draws an action for each environment. obs: [N, ...]."""
        mean = self.mean(obs)
        std = self.std
        noise = torch.randn_like(mean)
        # (actions - mean) / std is the noise itself.
        log_probs = noise.square().sum(-1).mul_(-0.5).sub_(log_normalizer(std))
        return PolicyStep(torch.addcmul(mean, noise, std), log_probs, self.value(obs), mean, std.expand_as(mean))

    def evaluate(self, obs: Tensor | Mapping[str, Tensor], actions: Tensor) -> Evaluation:
        """Log-probabilities of ``actions`` [B, A], with values, means and standard deviation, differentiable."""
        mean, std = self.mean(obs), self.std
        return Evaluation(gaussian_log_prob(actions, mean, std), self.value(obs), mean, std)

    def mean(self, obs: Tensor | Mapping[str, Tensor]) -> Tensor:
        """[B, A]: the action without noise."""
        return self.actor(self._input(obs["policy"] if isinstance(obs, Mapping) else obs))

    def value(self, obs: Tensor | Mapping[str, Tensor]) -> Tensor:
        """[B]: the critic's estimate of the return."""
        if isinstance(obs, Mapping):
            obs = obs["critic"] if "critic" in obs else obs["policy"]
        return self.critic(self._input(obs)).squeeze(-1)

    def _input(self, obs: Tensor) -> Tensor:
        """Observations of half precision, or of bytes, as the networks' dtype; others as they are."""
        return obs.to(self.std_param.dtype)

    forward = mean

    def actor_parameters(self) -> list[nn.Parameter]:
        """The actor's parameters, the standard deviation among them."""
        return [*self.actor.parameters(), self.std_param]

    def critic_parameters(self) -> list[nn.Parameter]:
        """The critic's parameters."""
        return list(self.critic.parameters())


def _width(spec: Spec) -> int:
    shape, _ = spec
    if len(shape) != 1:
        raise ValueError(f"obs: expected a vector for the perceptrons, got shape {list(shape)}")
    return shape[0]
