"""Draws from the ranges of :class:`pydrone.envs.randomization.Randomization` and applies what needs no simulator.

Motors, latency and sensors are the same in every simulator and are applied here; mass, inertia and wind are drawn here
and applied by the simulator. Nothing synchronises with the host, and no shape depends on data.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pydrone.envs.drone import ACTION_DIM, DroneConfig, DroneState, propeller_rpm
from pydrone.envs.randomization import Randomization

NOISES = ("pos_noise", "att_noise", "vel_noise", "gyro_noise")
#: how many numbers each drone draws from each range
COLUMNS = {"mass": 1, "inertia": 1, "thrust": ACTION_DIM, "motor_lag": 1, "latency": 1, "wind": 1} | dict.fromkeys(
    NOISES, 1
)


class Randomizer:
    """The draws of N drones. Effects that are off are not computed.

    Attributes:
        mass, inertia: [N, 1] factors.
        thrust: [N, 4] factors, one for each propeller.
        motor_lag: [N, 1] seconds.
        latency: [N, 1] whole steps, as float32.
        wind: [N, 3] force in the world, N.
        noise: [N, 4] standard deviations, in the order of ``NOISES``.

    All are views of fixed memory and may be modified; the next episode of a drone overwrites its row.

    Args:
        num_envs: N.
        ranges: the ranges to draw from.
        generator: the source of random numbers, on the device where everything lives.
        config: the constants of the drone.
    """

    def __init__(self, num_envs: int, ranges: Randomization, generator: torch.Generator, config: DroneConfig) -> None:
        self.ranges, self.generator, self.config = ranges, generator, config
        device = generator.device

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, device=device)

        low, high = (
            [float(getattr(ranges, name)[end]) for name, n in COLUMNS.items() for _ in range(n)] for end in (0, 1)
        )
        self._low, self._high = torch.tensor(low, device=device), torch.tensor(high, device=device)
        self._span = self._high - self._low
        self._drawn = zeros(num_envs, len(low))
        parts = dict(zip(COLUMNS, self._drawn.split(list(COLUMNS.values()), dim=1)))
        self.mass, self.inertia, self.thrust = parts["mass"], parts["inertia"], parts["thrust"]
        self.motor_lag, self.latency, self._wind_force = parts["motor_lag"], parts["latency"], parts["wind"]
        # the latency is the floor of a number below high + 1, so that both ends are drawn
        column = list(COLUMNS).index("latency") + ACTION_DIM - 1
        self._span[column] += 1
        self._whole = slice(column, column + 1)
        self.noise = self._drawn[:, -len(NOISES) :]
        self.wind = zeros(num_envs, 3)
        self._late = ranges.varies("latency")
        self._lags = ranges.varies("motor_lag")
        self.blows = ranges.varies("wind")
        self.senses = ranges.varies(*NOISES)
        #: how many numbers a step takes for each drone: from a uniform and from a normal distribution
        self.uniforms, self.normals = len(low), 24 * self.senses + 2 * self.blows
        self._history = zeros(int(ranges.latency[1]) + 1 if self._late else 0, num_envs, ACTION_DIM)
        self._rpm = zeros(num_envs, ACTION_DIM)
        self.restart(torch.ones(num_envs, dtype=torch.bool, device=device))

    def restart(self, ended: Tensor, uniform: Tensor | None = None, normal: Tensor | None = None) -> None:
        """Draws anew for the drones of ``ended`` [N] bool; their motors run at hover speed and no action is pending.

        From ``uniform`` [N, 13] and the last two columns of ``normal`` [N, n]; by default from numbers of its own.
        """
        rows = ended[:, None]
        if uniform is None:
            uniform = torch.rand(self._drawn.shape, generator=self.generator, device=self._drawn.device)
        draw = (uniform * self._span).add_(self._low)
        draw[:, self._whole].floor_()
        torch.minimum(draw, self._high, out=draw)  # a product may round up
        torch.where(rows, draw, self._drawn, out=self._drawn)
        if self.blows:
            if normal is None:
                normal = torch.randn(len(draw), 2, generator=self.generator, device=draw.device)
            way = normal[:, -2:]
            way = way / torch.linalg.vector_norm(way, dim=1, keepdim=True).clamp_(min=1e-6)
            self.wind[:, :2] = torch.where(rows, way * self._wind_force, self.wind[:, :2])
        self._history.masked_fill_(rows, 0)
        self._rpm.masked_fill_(rows, self.config.hover_rpm)

    def make_nominal(self, drones: Tensor) -> None:
        """Makes the drones of ``drones`` [N] bool those without randomisation, until their next episode."""
        rows, nominal = drones[:, None], Randomization()
        least = [float(getattr(nominal, name)[0]) for name, n in COLUMNS.items() for _ in range(n)]
        torch.where(rows, self._drawn.new_tensor(least), self._drawn, out=self._drawn)
        self.wind.masked_fill_(rows, 0)

    def propeller_rpm(self, actions: Tensor) -> Tensor:
        """The propeller speeds [N, 4] of clipped actions [N, 4], after latency and motor lag. Call it once per step.

        The thrust factors are included: with the nominal coefficient, these speeds give the drone's actual thrust.
        """
        if self._late:
            self._history.copy_(torch.cat((actions[None], self._history[:-1])))
            actions = self._history.gather(0, self.latency.long().expand(1, -1, ACTION_DIM))[0]
        rpm = propeller_rpm(actions, self.config)
        if self._lags:
            # the fraction of a difference left after a step; without lag 2^-inf = 0
            left = torch.exp2((-self.config.dt / math.log(2)) / self.motor_lag)
            rpm = self._rpm.copy_(rpm + (self._rpm - rpm) * left)
        return rpm * self.thrust.sqrt()

    def sense(self, state: DroneState, normal: Tensor | None = None) -> DroneState:
        """``state`` with sensor noise from ``normal`` [N, 12], by default drawn at each call."""
        if not self.senses:
            return state
        if normal is None:
            normal = torch.randn(len(state.pos), 12, generator=self.generator, device=state.pos.device)
        noise = normal.unflatten(1, (4, 3)) * self.noise[:, :, None]
        pos, turn, lin_vel, ang_vel = noise.unbind(1)
        real, axis, turn = state.quat[:, :1], state.quat[:, 1:], turn * 0.5
        # rotated by a small angle about the body's axes
        quat = torch.cat(
            (
                real - (axis * turn).sum(-1, keepdim=True),
                axis + real * turn + torch.linalg.cross(axis, turn),
            ),
            dim=-1,
        )
        quat = quat / torch.linalg.vector_norm(quat, dim=-1, keepdim=True)
        return DroneState(state.pos + pos, quat, state.lin_vel + lin_vel, state.ang_vel + ang_vel)
