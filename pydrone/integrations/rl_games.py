"""rl_games 1.6 on pydrone: the advantages of all its on-policy agents in one launch.

>>> from pydrone.integrations import rl_games
>>> rl_games.patch()  # then use rl_games.torch_runner.Runner as before
"""

from __future__ import annotations

import torch
from torch import Tensor

from pydrone.estimators import gae
from pydrone.integrations.peer import Change, Patches, require

require("rl-games", (1, 6), (1, 7))

from rl_games.common.a2c_common import A2CBase  # noqa: E402


def discount_values(
    self: A2CBase,
    fdones: Tensor,
    last_extrinsic_values: Tensor,
    mb_fdones: Tensor,
    mb_extrinsic_values: Tensor,
    mb_rewards: Tensor,
) -> Tensor:
    """Advantages [T, N, V] in the rewards' dtype, not normalised, of an agent with attributes ``gamma`` and ``tau``.

    mb_rewards, mb_extrinsic_values: [T, N, V], floating, V = ``value_size``. mb_fdones: [T, N], nonzero if an episode
    *starts* with step t; fdones: [N], nonzero if one starts after the last step. last_extrinsic_values: [N, V].
    """
    return _advantages(self, fdones, last_extrinsic_values, mb_fdones, mb_extrinsic_values, mb_rewards, None)


def discount_values_masks(
    self: A2CBase,
    fdones: Tensor,
    last_extrinsic_values: Tensor,
    mb_fdones: Tensor,
    mb_extrinsic_values: Tensor,
    mb_rewards: Tensor,
    mb_masks: Tensor,
) -> Tensor:
    """:func:`discount_values` with mb_masks [T, N]: where zero, the advantage is 0 and the trace is cut."""
    return _advantages(self, fdones, last_extrinsic_values, mb_fdones, mb_extrinsic_values, mb_rewards, mb_masks)


def _advantages(agent, fdones, last_values, mb_fdones, values, rewards, masks: Tensor | None) -> Tensor:
    if rewards.dim() != 3 or values.shape != rewards.shape:
        raise ValueError(
            f"mb_rewards: expected [T, N, V], mb_extrinsic_values likewise; got {list(rewards.shape)} and "
            f"{list(values.shape)}"
        )
    # The flag at t + 1 says whether step t ended its episode; the flag of the last step is separate.
    dones = torch.cat((mb_fdones[1:], fdones.unsqueeze(0)))
    columns = [
        gae(
            rewards[:, :, v],
            values[:, :, v],
            dones,
            last_values[:, v],
            gamma=agent.gamma,
            lam=agent.tau,
            valid=masks,
            time_dim=0,
        )[0]
        for v in range(rewards.shape[2])
    ]
    advantages = columns[0].unsqueeze(2) if len(columns) == 1 else torch.stack(columns, dim=2)
    return advantages.to(rewards.dtype)


_patches = Patches()


def patch() -> None:
    """Makes every subclass of ``A2CBase`` use pydrone; :func:`unpatch` undoes it. Calling it again has no effect."""
    names = {"discount_values": discount_values, "discount_values_masks": discount_values_masks}
    _patches.install([Change(A2CBase, name, function) for name, function in names.items()])


def unpatch() -> None:
    """Restores what :func:`patch` replaced."""
    _patches.remove()
