"""Running statistics of observations, of returns, and of the discounted reward that rewards are scaled by.

They are updated with whole rollouts, never while acting: the policy is the same function from the first step of a
rollout to the last minibatch learnt from it, and in evaluations and exports.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pydrone.ops.schema import INVALID, RUNNING
from pydrone.ppo.distributed import ALONE, Ranks

# Added to variances, so that a constant is not divided by zero.
EPSILON = 1e-8

# Elements converted to float64 at a time.
CHUNK = 1 << 22


class RunningMoments(nn.Module):
    """Mean and variance of all samples seen, by Chan, Golub and LeVeque's merge (1979) in float64.

    Before the first sample they are 0 and 1. Its buffers are part of a checkpoint: ``count`` scalar, ``mean``
    and ``m2`` (the sum of squared differences from the mean) of ``shape``, float64; ``shift`` and ``std``, which are
    applied, float32.

    Args:
        shape: of a sample.
    """

    count: Tensor
    mean: Tensor
    m2: Tensor
    shift: Tensor
    std: Tensor

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("m2", torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("shift", torch.zeros(shape))
        self.register_buffer("std", torch.ones(shape))

    @torch.no_grad()
    def update(self, x: Tensor, valid: Tensor | None = None, ranks: Ranks = ALONE) -> None:
        """Adds samples ``x`` [N, T, *shape] of every rank; ``valid``: bool [N, T], those that count (None: all)."""
        into = RunningMoments(*self.mean.shape).to(self.mean.device) if ranks.several else self
        rows = max(1, CHUNK // max(1, x[0].numel()))
        masks = [None] * -(-len(x) // rows) if valid is None else valid.split(rows)
        for part, mask in zip(x.split(rows), masks):
            into._merge(part.double(), mask)
        if into is not self:
            self._take(*ranks.moments(into.count, into.mean, into.m2))
        self.shift.copy_(self.mean)
        variance = self.m2 / self.count.clamp_min(1)
        self.std.copy_(torch.where(self.count > 0, (variance + EPSILON).sqrt(), 1.0))

    def _merge(self, x: Tensor, valid: Tensor | None) -> None:
        if valid is None:
            count = torch.full_like(self.count, x.shape[0] * x.shape[1])
            mean = x.mean((0, 1))
            m2 = (x - mean).square().sum((0, 1))
        else:
            mask = valid.reshape(*valid.shape, *[1] * self.mean.dim())
            count = valid.sum().double()
            mean = torch.where(mask, x, 0).sum((0, 1)) / count.clamp_min(1)
            m2 = torch.where(mask, x - mean, 0).square().sum((0, 1))
        self._take(count, mean, m2)

    def _take(self, count: Tensor, mean: Tensor, m2: Tensor) -> None:
        total = self.count + count
        share = count / total.clamp_min(1)
        delta = mean - self.mean
        self.mean.add_(delta * share)
        self.m2.add_(m2 + delta.square() * self.count * share)
        self.count.copy_(total)

    def normalize(self, x: Tensor) -> Tensor:
        """(x - mean) / std; x: [..., *shape] float32."""
        return (x - self.shift) / self.std

    def denormalize(self, x: Tensor) -> Tensor:
        """The inverse of :meth:`normalize`."""
        return x * self.std + self.shift


class RewardScaler(nn.Module):
    """Multiplies a rollout's rewards by ``scale``, after dividing them by the running std of the discounted reward.

    The discounted reward is R_t = gamma * R_{t-1} + r_t, from 0 in each episode, as in OpenAI's baselines. The mean is
    not subtracted, which would reward or punish longer episodes. One factor holds for a whole rollout; its samples
    include that rollout.

    Args:
        num_envs: N.
        gamma: discount per step.
        scale: an additional factor.
        normalize: False: only ``scale`` is applied.
    """

    factor: Tensor
    running: Tensor

    def __init__(self, num_envs: int, gamma: float, scale: float = 1.0, normalize: bool = True) -> None:
        super().__init__()
        self.gamma, self.scale, self.normalize = gamma, scale, normalize
        self.moments = RunningMoments()
        self.register_buffer("factor", torch.tensor(float(scale)))
        self.register_buffer("running", torch.zeros(num_envs, dtype=torch.float64))  # R of the running episodes

    @torch.no_grad()
    def apply_to(self, rewards: Tensor, codes: Tensor, ranks: Ranks = ALONE) -> None:
        """Scales ``rewards`` [N, T] float32 in place, once per rollout; ``codes``: uint8 [N, T], the buffer's.

        The factor is computed from every rank's rewards.
        """
        if self.normalize:
            counts, running = codes != INVALID, self.running
            # Reset steps do not count, whatever their reward.
            given = torch.where(counts, rewards, 0).double()
            discounted = torch.empty_like(given)
            for t in range(rewards.shape[1]):
                running = self.gamma * running + given[:, t]
                discounted[:, t] = running
                running = torch.where(codes[:, t] == RUNNING, running, 0)
            self.running.copy_(running)
            self.moments.update(discounted, counts, ranks)
            self.factor.copy_(self.scale / self.moments.std)
        rewards.mul_(self.factor)

    def undo(self, rewards: Tensor) -> Tensor:
        """A copy of scaled ``rewards`` as the environment gave them."""
        return rewards / self.factor

    def restore(self, state: dict[str, Any]) -> None:
        """Loads a ``state_dict``; the running episodes start at 0 where the number of environments differs."""
        if state["running"].shape != self.running.shape:
            state = {**state, "running": torch.zeros_like(self.running)}
        self.load_state_dict(state)
        if not self.normalize:
            self.factor.fill_(self.scale)  # which may not be the one that was saved
