"""The course task: fly laps through waypoints, in order, until the time limit or a crash.

Everything but the targets is as in the hover task: the same 17 observations (the target is the next waypoint), 4
actions, rewards and ends, so that training can continue here with a policy that has learnt to hover. A waypoint is
passed within ``at_target`` of it; ``episode/targets`` in the log counts the waypoints passed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pydrone.envs.hover_task import HoverConfig, HoverTask

# a figure of eight around the start, 8.1 m per lap
FIGURE_OF_EIGHT = (
    (0.7, -0.7, 1.0),
    (1.4, 0.0, 1.2),
    (0.7, 0.7, 1.4),
    (-0.7, -0.7, 1.0),
    (-1.4, 0.0, 1.2),
    (-0.7, 0.7, 1.4),
)


@dataclass(frozen=True)
class CourseConfig(HoverConfig):
    """Constants of the task. Whenever a waypoint becomes the next one, it is shifted by a random offset between
    ``target_low`` and ``target_high`` (m).

    Raises:
        ValueError: there are fewer than two waypoints, or two consecutive ones are so far apart that the distance would
            count as a crash.
    """

    target_low: tuple[float, float, float] = (-0.1, -0.1, -0.1)
    target_high: tuple[float, float, float] = (0.1, 0.1, 0.1)
    at_target: float = 0.3
    waypoints: tuple[tuple[float, float, float], ...] = FIGURE_OF_EIGHT

    def __post_init__(self) -> None:
        super().__post_init__()
        points = self.waypoints
        if len(points) < 2 or any(len(point) != 3 for point in points):
            raise ValueError(f"waypoints: expected two or more of (x, y, z), got {points!r}")
        shifts = [max(abs(low), abs(high)) for low, high in zip(self.target_low, self.target_high)]
        limits = (self.max_xy, self.max_xy, self.max_z)
        # a waypoint is shifted, and passed up to at_target away from it
        passing = [self.at_target + shift for shift in shifts]
        legs = [
            (self.init_pos, points[0], [0.0] * 3),
            *((a, b, passing) for a, b in zip(points, points[1:] + points[:1])),
        ]
        for a, b, off in legs:
            for p, q, *slack, limit in zip(a, b, off, shifts, limits):
                if abs(p - q) + sum(slack) > limit:
                    raise ValueError(
                        f"waypoints: expected steps within {self.max_xy} m along x and y and {self.max_z} m along z, "
                        f"at_target and shifts included, got {a} to {b}"
                    )


class CourseTask(HoverTask):
    """The state of N course tasks, see :class:`HoverTask`; ``leg`` [N] int64 is the index of the next waypoint."""

    config_type = CourseConfig
    sums = ("return", "targets")
    config: CourseConfig

    def _prepare(self) -> None:
        self._waypoints = torch.tensor(self.config.waypoints, dtype=torch.float32, device=self.device)
        self.leg = torch.zeros(self.num_envs, dtype=torch.int64, device=self.device)

    def _next_targets(self, draw: Tensor, reached: Tensor) -> Tensor:
        self.leg.add_(reached).remainder_(len(self._waypoints))
        return self._waypoints.index_select(0, self.leg).add_(draw)

    def _first_targets(self, draw: Tensor, ended: Tensor) -> Tensor:
        self.leg.masked_fill_(ended, 0)
        return self._waypoints[0] + draw
