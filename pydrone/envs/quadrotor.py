"""The hover task on a rigid-body quadrotor, without a simulator: the Crazyflie 2.x of the Genesis example.

Newton-Euler equations of one rigid body with four propellers, each a force ``KF * rpm^2`` along the body's z axis and a
torque ``SPIN * KM * rpm^2`` about it. Semi-implicit Euler; the attitude is advanced by the mean of the old and the new
angular velocity, as in Genesis. There is no ground, and no drag except the small angular damping that Genesis gives a
drone. A step makes no host synchronisation and no shape depends on data, so a CUDA graph can capture it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from pydrone.envs.base import Autoreset, StepResult, check_actions
from pydrone.envs.course_task import CourseTask
from pydrone.envs.drone import (
    ACTION_DIM,
    ACTION_LIMITS,
    DroneState,
    clip_actions,
    propeller_rpm,
    rotate,
    rotate_inverse,
)
from pydrone.envs.fused import Body
from pydrone.envs.hover_task import OBS_DIM, HoverTask
from pydrone.envs.randomization import Randomization
from pydrone.envs.state import restore, state_of

# Crazyflie 2.x as in the cf2x.urdf that Genesis ships (from Foerster, "System Identification of the Crazyflie 2.0 Nano
# Quadrocopter", 2015, and Landry, "Planning and control for quadrotor flight through cluttered environments", 2015)
MASS = 0.027  # kg
INERTIA = (1.4e-5, 1.4e-5, 2.17e-5)  # kg m^2, about x, y, z
KF = 3.16e-10  # N / rpm^2
KM = 7.94e-12  # N m / rpm^2
PROPELLERS = ((0.028, -0.028), (-0.028, -0.028), (-0.028, 0.028), (0.028, 0.028))  # x, y in m
SPIN = (-1.0, 1.0, -1.0, 1.0)  # sign of the torque about z
ANGULAR_DAMPING = 1e-5 * MASS  # N m s / rad
GRAVITY = 9.81  # m / s^2


def wrench_matrix() -> Tensor:
    """[4, 4] float32: ``rpm^2 [N, 4] @ wrench_matrix()`` is the propellers' acceleration along the body's z axis and
    their angular accelerations about x, y, z (m/s^2, rad/s^2)."""
    rows = [
        [KF / MASS, KF * y / INERTIA[0], -KF * x / INERTIA[1], spin * KM / INERTIA[2]]
        for (x, y), spin in zip(PROPELLERS, SPIN, strict=True)
    ]
    return torch.tensor(rows, dtype=torch.float64).to(torch.float32)


class Quadrotor:
    """N quadrotors that learn to hover: 17 observations, 4 actions, see :mod:`pydrone.envs.hover_task`.

    The attributes ``pos`` [N, 3], ``quat`` [N, 4] (w, x, y, z), ``vel`` [N, 3] (world) and ``ang_vel`` [N, 3] (body)
    are the state and may be modified.

    Args:
        num_envs: N.
        device: where the drones live.
        seed: of the targets, the initial states and the random ages.
        dt: seconds per step.
        max_episode_length: steps after which an episode is truncated.
        substeps: integration steps per step.
        randomization: the ranges that every drone draws from for each episode; None: no randomisation.
        fused: whether a kernel computes a step, physics included, in one call; None: where there is one, see
            :class:`~pydrone.envs.hover_task.HoverTask`.
        config: other constants of the task.
    """

    autoreset: Autoreset = "same_step"
    action_limits = ACTION_LIMITS
    obs = OBS_DIM
    actions = ACTION_DIM
    #: whether a CUDA graph can capture a step
    capturable = True
    task_type: ClassVar[type[HoverTask]] = HoverTask

    @torch.inference_mode(False)
    def __init__(
        self,
        num_envs: int,
        device: torch.device | str = "cpu",
        seed: int = 0,
        *,
        dt: float = 0.01,
        max_episode_length: int = 1500,
        substeps: int = 2,
        randomization: Randomization | None = None,
        fused: bool | None = None,
        **config: Any,
    ) -> None:
        if substeps < 1:
            raise ValueError(f"substeps: expected at least 1, got {substeps}")
        cfg = self.task_type.config_type(dt=dt, max_episode_length=max_episode_length, **config)
        self.task = self.task_type(num_envs, device, seed, cfg, randomization, fused)
        self.config = cfg
        self.num_envs = num_envs
        self.device = self.task.device
        self.max_episode_length: int | None = max_episode_length
        self.substeps = substeps
        self._h = dt / substeps

        def row(*values: float) -> Tensor:
            return torch.tensor(values, dtype=torch.float32, device=self.device)

        self._wrench = wrench_matrix().to(self.device)
        self._gravity = row(0.0, 0.0, -GRAVITY)
        jx, jy, jz = INERTIA
        # Euler's equations for a diagonal inertia: -J^-1 (w x J w) = gyro * (w_y w_z, w_z w_x, w_x w_y)
        self._gyro = row((jy - jz) / jx, (jz - jx) / jy, (jx - jy) / jz)
        # damping, integrated implicitly
        self._damping = row(*INERTIA).reciprocal() * (ANGULAR_DAMPING * self._h)
        self._damp = 1 / (1 + self._damping)
        self.pos = torch.zeros(num_envs, 3, device=self.device)
        self.quat = torch.zeros(num_envs, 4, device=self.device)
        self.vel = torch.zeros(num_envs, 3, device=self.device)
        self.ang_vel = torch.zeros(num_envs, 3, device=self.device)
        self._body = Body(
            wrench=tuple(wrench_matrix().flatten().tolist()),
            gyro=tuple(self._gyro.tolist()),
            damping=tuple(self._damping.tolist()),
            gravity=-GRAVITY,
            mass=MASS,
            h=self._h,
        )
        if self.task.fused is not None:
            self.task.fused.prepare(self._body)
        self._place()

    @property
    def generator(self) -> torch.Generator:
        """The source of all random numbers; a CUDA graph must register it (``CUDAGraph.register_generator_state``)."""
        return self.task.generator

    def reset(self) -> Tensor:
        """Starts new episodes and returns the observations [N, 17]."""
        obs = self.task.reset()
        self._place()
        return obs

    def step(self, actions: Tensor) -> StepResult:
        """Applies ``actions`` [N, 4], clipped to [-1, 1], for one step."""
        actions = check_actions(actions, self.num_envs, ACTION_DIM, self.device)
        task = self.task
        if isinstance(task, HoverTask) and task.fused is not None:  # else something watches the task's steps
            task.draw()
            drones = DroneState(self.pos, self.quat, self.vel, self.ang_vel)
            return task.fused(task, drones, actions, self._body, self.substeps)
        actions = clip_actions(actions)
        drawn = self.task.randomizer
        rpm = propeller_rpm(actions, self.config) if drawn is None else drawn.propeller_rpm(actions)
        accel = rpm.square() @ self._wrench
        thrust, torque, pull, damp = accel[:, :1], accel[:, 1:], self._gravity, self._damp
        if drawn is not None:
            thrust, torque = thrust / drawn.mass, torque / drawn.inertia
            pull = pull + drawn.wind / (drawn.mass * MASS)
            damp = 1 / (1 + self._damping / drawn.inertia)
        for _ in range(self.substeps):
            self._integrate(thrust, torque, pull, damp)
        state = DroneState(self.pos, self.quat, rotate_inverse(self.quat, self.vel), self.ang_vel)
        result = self.task.step(state, actions)
        ended = result.dones[:, None]
        for own, first in zip(self._drones(), self.task.initial_states().split((3, 4, 3, 3, 3), dim=1)):
            torch.where(ended, first, own, out=own)
        return result

    def place(self, state: DroneState) -> Tensor:
        """Puts the drones into ``state``, in the episodes that run, and returns the observations [N, 17]."""
        self.pos.copy_(state.pos)
        self.quat.copy_(state.quat)
        self.vel.copy_(rotate(state.quat, state.lin_vel))
        self.ang_vel.copy_(state.ang_vel)
        return self.task.place(state)

    def randomize_episode_lengths(self) -> None:
        """Sets every running episode to a random age."""
        self.task.randomize_ages()

    def state_dict(self) -> dict[str, Tensor]:
        """Drones, targets, ages, statistics and the state of the generator; tensors are not copied."""
        return state_of(self)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restores a ``state_dict``. ValueError, and no change, if it belongs to a different environment."""
        restore(self, state)

    def close(self) -> None:
        """Nothing to free."""

    def _drones(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.pos, self.quat, self.vel, self.ang_vel

    def _place(self) -> None:
        for own, first in zip(self._drones(), self.task.initial_states().split((3, 4, 3, 3, 3), dim=1)):
            own.copy_(first)

    def _integrate(self, thrust: Tensor, torque: Tensor, pull: Tensor, damp: Tensor) -> None:
        """One substep under the accelerations ``thrust`` [N, 1] along the body's z axis, ``torque`` [N, 3] about its
        axes and ``pull`` [3] or [N, 3] in the world; ``damp`` [3] or [N, 3] is the factor of the angular velocity."""
        h, quat, w = self._h, self.quat, self.ang_vel
        # half of the body's z axis in the world: the last column of the rotation matrix, halved
        qw, qx, qy, qz = quat.unbind(-1)
        up = torch.stack((qx * qz + qw * qy, qy * qz - qw * qx, 0.5 - (qx * qx + qy * qy)), dim=-1)
        self.vel.add_(torch.addcmul(pull, up, thrust, value=2), alpha=h)
        self.pos.add_(self.vel, alpha=h)

        gyro = w.roll(-1, -1) * w.roll(1, -1) * self._gyro
        mid = w.clone()
        w.add_(gyro.add_(torque), alpha=h).mul_(damp)
        mid.add_(w).mul_(0.5)
        # quat * (cos a, sin a w/|w|) with a = |w| h / 2 equals, up to its length, quat * (1, tan a w/|w|); tan a / a by
        # its series, off by 1e-5 at 100 rad/s. (MKL threads torch's cos and sin, which stalls on busy machines.)
        a2 = mid.square().sum(-1, keepdim=True) * (h * h / 4)
        rot = mid * ((a2 * (2 / 15) + 1 / 3) * a2 + 1) * (h / 2)
        axis, real = quat[:, 1:], quat[:, :1]
        turned = torch.addcmul(axis + torch.linalg.cross(axis, rot), real, rot)
        new = torch.cat((real - (axis * rot).sum(-1, keepdim=True), turned), dim=-1)
        torch.div(new, torch.linalg.vector_norm(new, dim=-1, keepdim=True), out=quat)


class QuadrotorCourse(Quadrotor):
    """N quadrotors that learn to fly a course of waypoints, see :mod:`pydrone.envs.course_task`."""

    task_type = CourseTask
