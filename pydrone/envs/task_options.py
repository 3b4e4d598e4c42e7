"""The options of the tasks, in plain Python. :mod:`pydrone.envs.hover_task` implements them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help, "aliases": ()})


@dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """Options of the hover and course tasks. With the defaults, the tasks are those of Genesis' drone example.

    Weights are rewards per second, see :func:`pydrone.envs.hover_task.reward_terms`.

    Raises:
        ValueError: a weight is not finite; ``hold``, ``weight_near`` or one of the initial state's ranges is below 0 or
            not finite, ``init_tilt`` above 180; ``near_decay`` or ``yaw_decay`` is not above 0 and finite;
            ``max_episode_length`` is below 1.
    """

    max_episode_length: int = _option(1500, "Steps after which an episode is truncated.")
    init_tilt: float = _option(
        0.0, "Largest tilt that an episode begins with, about a horizontal axis of any direction, degrees."
    )
    init_velocity: float = _option(
        0.0, "Largest velocity that an episode begins with, along each axis of the body, m/s."
    )
    init_angular_velocity: float = _option(
        0.0, "Largest angular velocity that an episode begins with, about each axis of the body, rad/s."
    )
    resample_targets: bool = _option(
        True, "Whether a target moves once it is reached; else it stays until the episode ends."
    )
    hold: float = _option(0.0, "How long a drone has to stay at a target, without a break, to reach it, s.")
    weight_target: float = _option(10.0, "Reward for progress: times the squared distance gained in a step, m^2.")
    weight_smooth: float = _option(-1e-4, "Times the squared change of the actions, summed over the four.")
    weight_yaw: float = _option(0.01, "Reward for a heading along x; falls with the angle, by yaw-decay.")
    yaw_decay: float = _option(10.0, "The reward for the heading is weight-yaw * exp(-yaw-decay * |yaw|), 1/rad.")
    weight_angular: float = _option(-2e-4, "Times the angular speed, in half turns per second.")
    weight_crash: float = _option(-10.0, "Times 1 in the step of a crash.")
    weight_near: float = _option(
        0.0, "Reward per second at the target; falls with the distance, by near-decay. 0: only progress is rewarded."
    )
    near_decay: float = _option(
        10.0, "The reward per second near the target is weight-near * exp(-near-decay * distance), 1/m."
    )

    def __post_init__(self) -> None:
        if self.max_episode_length < 1:
            raise ValueError(f"max_episode_length: expected at least 1 step, got {self.max_episode_length}")
        if self.init_tilt > 180:
            raise ValueError(f"init_tilt: expected at most 180 degrees, got {self.init_tilt!r}")
        for name in ("hold", "weight_near", "init_tilt", "init_velocity", "init_angular_velocity"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}: expected a finite number of at least 0, got {getattr(self, name)!r}")
        for name in ("near_decay", "yaw_decay"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}: expected a finite number above 0, got {getattr(self, name)!r}")
        for name in ("weight_target", "weight_smooth", "weight_yaw", "weight_angular", "weight_crash"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name}: expected a finite number, got {getattr(self, name)!r}")

    def changed(self) -> dict[str, Any]:
        """The options that differ from their defaults, by name, to construct an environment with."""
        return {f.name: getattr(self, f.name) for f in fields(TaskOptions) if getattr(self, f.name) != f.default}
