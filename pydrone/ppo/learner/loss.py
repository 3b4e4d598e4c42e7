"""PPO's two losses, each written once. B = samples; all means are over B.

The log-probabilities in them are those of :mod:`pydrone.ppo.policy.distributions`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def surrogate_loss(log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """The clipped surrogate, negated so that it is to be minimised: equation 7 of arXiv:1707.06347. All [B]."""
    log_ratio = log_probs - old_log_probs
    # Far above the clip a ratio matters only to a negative advantage. To others it is held at a number, as it may
    # overflow: minimum() leaves that product out, but with the gradient inf * 0.
    most = math.log1p(clip) + 1
    ratio = log_ratio.masked_fill((advantages >= 0) & (log_ratio > most), most).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages).mean()


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float | None) -> Tensor:
    """Mean of the larger of two squared errors: of the value, and of the value held within ``clip`` of the old one.

    As in OpenAI's baselines and rsl_rl, without the factor 1/2. ``clip`` None: the plain squared error. All [B].
    """
    error = values - returns
    if clip is None:
        return error.square().mean()
    clipped_error = (values - old_values).clamp(-clip, clip) + (old_values - returns)
    return torch.maximum(error.square(), clipped_error.square()).mean()
