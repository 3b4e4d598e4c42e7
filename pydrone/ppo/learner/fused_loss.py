"""The loss and its gradients by one operation, between torch's networks: what the learner does on a GPU.

Torch runs the policy's networks forward, layer by layer (:mod:`pydrone.ppo.learner.layers`) where they are plain
perceptrons; ``ppo_loss`` (:mod:`pydrone.ops.schema`) computes the loss's derivatives with respect to their outputs, and
autograd propagates these back through the networks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pydrone.ops import triton
from pydrone.ops.schema import loss_workspace_size
from pydrone.ppo.learner import networks
from pydrone.ppo.learner.layers import Layers
from pydrone.ppo.policy import matmul as precision
from pydrone.ppo.policy.actor_critic import ActorCritic

if TYPE_CHECKING:
    from pydrone.ppo.config import PPOConfig


def why_not(policy: ActorCritic) -> str | None:
    """Why autograd has to compute this policy's loss, or None where :class:`FusedLoss` can."""
    device = next(policy.parameters()).device
    if not triton.serves(device):
        return f"its kernel runs on CUDA, the policy is on {device.type}"
    if triton.missing() is not None:
        return triton.missing()
    if policy.recurrent:
        return "the policy is recurrent"
    if not hasattr(policy, "std_param"):
        return "actions are discrete"
    return None


class FusedLoss:
    """Gradients of a minibatch, or a part of one, by ``torch.ops.pydrone.ppo_loss``."""

    #: what it reads of a minibatch besides the observations
    SAMPLES = ("actions", "log_probs", "advantages", "values", "returns", "mu", "sigma")

    def __init__(self, policy: ActorCritic) -> None:
        self._workspace: Tensor | None = None  # its ticket is zero between launches
        plain = type(policy) is ActorCritic and policy.std_param.dtype == torch.float32
        try:
            for network in (policy.actor, policy.critic) if plain else ():
                networks.take_apart(network, "network", policy.std_param.device)
        except networks.Unsupported:
            plain = False
        self._layers = Layers(precision.chosen(policy.matmul, policy.std_param.device)) if plain else None

    def backward(
        self,
        policy: ActorCritic,
        obs: Tensor | Mapping[str, Tensor],
        samples: Mapping[str, Tensor],
        num_samples: int,
        config: PPOConfig,
    ) -> Tensor:
        """As ``loss.backward()``: adds to the parameters' ``.grad``; returns the METRICS of the learner, [4].

        samples: SAMPLES of a part of a minibatch of ``num_samples``, [B] and [B, A]. Gradients and metrics are the
        part's share.
        """
        if self._layers is None:
            mean, values = policy.mean(obs), policy.normalized_value(obs)
        else:
            mean, values = policy.outputs(obs, self._layers)
        std = policy.std
        size, actions = mean.shape
        needed = loss_workspace_size(size, actions)
        if self._workspace is None or self._workspace.numel() < needed:
            self._workspace = torch.zeros(needed, dtype=torch.float64, device=mean.device)
        metrics = mean.new_empty(4)
        grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (mean, values, std)]
        moments = policy.value_normalizer
        torch.ops.pydrone.ppo_loss(
            mean.detach(),
            std.detach(),
            *(samples[name] for name in ("actions", "log_probs", "advantages")),
            values.detach(),
            *(samples[name] for name in ("values", "returns", "mu", "sigma")),
            config.clip,
            config.clip if config.clipped_value_loss else -1.0,
            config.value_loss_coef,
            config.entropy_coef,
            *((None, None) if moments is None else (moments.shift, moments.std)),
            num_samples,
            *grads,
            metrics,
            self._workspace,
        )
        differentiable = [(x, grad) for x, grad in zip((mean, values, std), grads) if x.requires_grad]
        torch.autograd.backward(*zip(*differentiable))
        return metrics
