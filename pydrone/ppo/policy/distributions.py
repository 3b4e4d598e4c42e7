"""The distributions of actions: log-probability, entropy and KL divergence, each written once.

B = samples, A = action dimensions, K = discrete actions; all means are over B. The diagonal Gaussian is spelled out
instead of taken from torch.distributions: its standard deviation does not depend on the state, so the logarithm and the
entropy are computed over A numbers, not over B * A.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


def gaussian_log_prob(actions: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Log-density [B] of ``actions`` [B, A] under a normal distribution of ``mean`` [B, A] and ``std`` [A]."""
    z = (actions - mean) / std
    return -0.5 * z.square().sum(-1) - log_normalizer(std)


def log_normalizer(std: Tensor) -> Tensor:
    """Scalar, what a Gaussian's log-density lacks at its mean: sum over A of log(std) + log(2 pi) / 2."""
    return std.log().sum() + HALF_LOG_2PI * std.numel()


def gaussian_entropy(std: Tensor) -> Tensor:
    """Scalar, in nats: sum over A of 1/2 + log(2 pi) / 2 + log(std)."""
    return log_normalizer(std) + 0.5 * std.numel()


def gaussian_kl(old_mean: Tensor, old_std: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """KL(old || new), mean over B, a scalar in nats.

    sum over A of log(s / s_old) + (s_old^2 + (m_old - m)^2) / (2 s^2) - 1/2. old_mean, mean: [B, A]; old_std: [B, A]
    or [A]; std: [A].
    """
    second_moment = ((old_mean - mean).square() + old_std.square()).mean(0)
    old_log = old_std.log().mean(0) if old_std.dim() > 1 else old_std.log()
    return (std.log() - old_log + second_moment / (2 * std.square())).sum() - 0.5 * std.numel()


def categorical_log_prob(actions: Tensor, logs: Tensor) -> Tensor:
    """Log-probability [B] of ``actions`` int64 [B]; ``logs``: logarithms of the probabilities, [B, K]."""
    return logs.gather(-1, actions.unsqueeze(-1)).squeeze(-1)


def categorical_entropy(logs: Tensor) -> Tensor:
    """Scalar, in nats, mean over B. ``logs``: logarithms of the probabilities, [B, K]."""
    finite = logs.clamp_min(torch.finfo(logs.dtype).min)  # 0 log 0 is 0, and so is its gradient
    return -(logs.exp() * finite).sum(-1).mean()


def categorical_kl(old_logs: Tensor, logs: Tensor) -> Tensor:
    """KL(old || new), mean over B, a scalar in nats. Both [B, K], logarithms of the probabilities."""
    old = old_logs.exp()
    return torch.where(old == 0, 0, old * (old_logs - logs)).sum(-1).mean()
