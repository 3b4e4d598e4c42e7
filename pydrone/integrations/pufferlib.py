"""PufferLib 3 on pydrone: its advantages, V-trace between GAE and one-step returns, in one launch.

>>> from pydrone.integrations import pufferlib
>>> pufferlib.patch()  # then use pufferlib.pufferl.PuffeRL as before
"""

from __future__ import annotations

import torch
from torch import Tensor

from pydrone.estimators import vtrace
from pydrone.integrations.peer import Change, Patches, require

require("pufferlib", (3,), (4,))

from pufferlib import pufferl  # noqa: E402


@torch.no_grad()
def compute_puff_advantage(
    values: Tensor,
    rewards: Tensor,
    terminals: Tensor,
    ratio: Tensor,
    advantages: Tensor,
    gamma: float,
    gae_lambda: float,
    vtrace_rho_clip: float,
    vtrace_c_clip: float,
) -> Tensor:
    """Writes x_t = vs_t - V_t of :func:`pydrone.vtrace` into ``advantages``, and returns it.

    All tensors: [N, T], float32. rewards, terminals: shifted by one, those of step t at t + 1, so that of T steps T - 1
    have an advantage; the last one is left as it is. ratio: new over old probabilities, not its logarithm; a NaN makes
    its step NaN, where PufferLib takes the bound.
    """
    if values.shape[1] < 2:
        return advantages
    before = values[:, :-1].detach()
    steps = rewards[:, 1:], before, terminals[:, 1:], values[:, -1], ratio[:, :-1].log()
    vs, _ = vtrace(*(x.detach() for x in steps), gamma, gae_lambda, vtrace_rho_clip, vtrace_c_clip)
    advantages[:, :-1] = vs - before
    return advantages


_patches = Patches()


def patch() -> None:
    """Makes PufferLib's trainer use pydrone; :func:`unpatch` undoes it. Calling it again has no effect."""
    _patches.install([Change(pufferl, "compute_puff_advantage", compute_puff_advantage)])


def unpatch() -> None:
    """Restores what :func:`patch` replaced."""
    _patches.remove()
