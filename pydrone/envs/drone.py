"""The drone, independent of task and simulator: state, actions, rotations.

Frames: x forward, y left, z up. Quaternions are (w, x, y, z) and rotate body vectors into the world.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

ACTION_DIM = 4
ACTION_LIMITS = (-1.0, 1.0)


class DroneState(NamedTuple):
    """The state of N drones, float32."""

    pos: Tensor
    """[N, 3] world, m."""
    quat: Tensor
    """[N, 4] (w, x, y, z), body to world."""
    lin_vel: Tensor
    """[N, 3] body frame, m/s."""
    ang_vel: Tensor
    """[N, 3] body frame, rad/s."""


@dataclass(frozen=True)
class DroneConfig:
    """Constants of the control of a drone."""

    dt: float = 0.01
    """Seconds per step."""
    hover_rpm: float = 14468.429
    """Propeller speed at which the thrust equals the weight."""
    rpm_range: float = 0.8
    """Change of the propeller speed by an action of 1, as a fraction of ``hover_rpm``."""


def clip_actions(actions: Tensor) -> Tensor:
    """Actions [N, 4] clipped to [-1, 1]; NaN where they are NaN or infinite."""
    return actions.clamp(*ACTION_LIMITS).add_(actions, alpha=0)  # 0 * inf is NaN


def propeller_rpm(actions: Tensor, config: DroneConfig) -> Tensor:
    """Propeller speeds [N, 4] of clipped actions: ``(1 + rpm_range * a) * hover_rpm``."""
    return actions * (config.rpm_range * config.hover_rpm) + config.hover_rpm


def rotate_inverse(quat: Tensor, vec: Tensor) -> Tensor:
    """World vectors [N, 3] in the frame of unit quaternions [N, 4]: ``v - 2w (u x v) + 2 u x (u x v)``."""
    axis = quat[:, 1:]
    cross = torch.linalg.cross(axis, vec)
    return vec.add(torch.addcmul(torch.linalg.cross(axis, cross), quat[:, :1], cross, value=-1), alpha=2)


def rotate(quat: Tensor, vec: Tensor) -> Tensor:
    """Body vectors [N, 3] of unit quaternions [N, 4] in the world: the inverse of :func:`rotate_inverse`."""
    return rotate_inverse(quat * quat.new_tensor([1, -1, -1, -1]), vec)


def yaw(quat: Tensor) -> Tensor:
    """Yaw [N] in rad of unit quaternions [N, 4]: the last angle of rotations about the fixed axes x, y, z in order."""
    w, x, y, z = quat.unbind(-1)
    # atan2(2 (wz + xy), 1 - 2 (y^2 + z^2)), both arguments halved
    return torch.atan2(torch.addcmul(w * z, x, y), torch.addcmul(0.5 - y * y, z, z, value=-1))


def roll_pitch(quat: Tensor) -> tuple[Tensor, Tensor]:
    """Roll and pitch [N] in rad of unit quaternions [N, 4]: rotations about x and y, before :func:`yaw` about z."""
    w, x, y, z = quat.unbind(-1)
    return (
        torch.atan2(2 * (w * x + y * z), 1 - 2 * (x * x + y * y)),
        torch.asin((2 * (w * y - z * x)).clamp(-1, 1)),
    )
