"""GAE alone: PufferLib 3 and rl-triton, if they can be imported (the package index has neither for a CPU)."""

from __future__ import annotations

import torch
from measurement import Absent, Run
from torch import Tensor
from workload import GAMMA, LAM, Rollout

from . import need


def gae_pufferlib(rollout: Rollout) -> Run:
    """``torch.ops.pufferlib.compute_puff_advantage`` with importance weights of one: advantages.

    Its rewards and flags are shifted by one against ours, and its last column is not an output: it gets T + 1 columns.
    """
    need("pufferlib")
    need("pufferlib._C")
    first = torch.zeros_like(rollout.last_values)[None]
    values = torch.cat((rollout.values, rollout.last_values[None])).t().contiguous()
    rewards = torch.cat((first, rollout.rewards)).t().contiguous()
    dones = torch.cat((first, rollout.dones.float())).t().contiguous()
    ratio, out = torch.ones_like(values), torch.zeros_like(values)
    return Run(
        lambda: torch.ops.pufferlib.compute_puff_advantage(values, rewards, dones, ratio, out, GAMMA, LAM, 1.0, 1.0),
        lambda: {"advantages": out[:, :-1].t()},
    )


def gae_rl_triton(rollout: Rollout) -> Run:
    """``rl_triton.compute_gae`` with ``last_value``, on [N, T] with float32 flags, as it requires: advantages."""
    if torch.device(rollout.device).type != "cuda":
        raise Absent("runs on CUDA only")
    compute_gae = need("rl_triton").compute_gae
    rewards, values, dones = (x.t().contiguous().float() for x in (rollout.rewards, rollout.values, rollout.dones))
    out: list[Tensor] = []

    def call() -> None:
        out[:] = [compute_gae(rewards, values, dones, gamma=GAMMA, lambda_=LAM, last_value=rollout.last_values)]

    return Run(call, lambda: {"advantages": out[0].t()})
