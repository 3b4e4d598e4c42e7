"""What each number of an observation and of an action means, for those who run a policy outside of its environment.

Of the tasks that pydrone brings everything is known; of other environments what their runs record.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pydrone.envs.record import Actions, Record

AXES = "xyz"


class Channel(NamedTuple):
    """One number of an observation of the drone's tasks: ``clip(scale * value, -limit, limit)``."""

    name: str
    unit: str
    frame: str
    scale: float = 1.0
    limit: float = math.inf

    def __str__(self) -> str:
        what = [x for x in (self.unit, self.frame) if x]
        if self.scale != 1:
            what.append(f"times {self.scale:.9g}")
        if self.limit < math.inf:
            what.append(f"clipped to [{-self.limit:g}, {self.limit:g}]")
        return ": ".join([self.name, ", ".join(what)])


class Contract(NamedTuple):
    """What a user of the policy has to keep to."""

    text: str
    """Lines on the observations, the actions and the rate, in their order."""
    dt: float | None
    """Seconds from step to step; None: unknown."""


def channels(constants: Mapping[str, Any]) -> list[Channel]:
    """The observation of the hover and course tasks, as :func:`pydrone.envs.hover_task.observe` computes it.

    Args:
        constants: those of a :class:`~pydrone.envs.hover_task.HoverConfig`, by name.
    """
    return [
        *(Channel(f"target - position, {x}", "m", "world frame", constants["pos_scale"], 1.0) for x in AXES),
        *(Channel(f"attitude, quaternion {x}", "", "body to world") for x in f"w{AXES}"),
        *(Channel(f"velocity, {x}", "m/s", "body frame", constants["lin_vel_scale"], 1.0) for x in AXES),
        *(Channel(f"angular velocity, {x}", "rad/s", "body frame", constants["ang_vel_scale"], 1.0) for x in AXES),
        *(Channel(f"actions[{i}] of the call before", "", "0 at the start") for i in range(4)),
    ]


def contract(record: Record, num_obs: int, num_actions: int, actions: Actions, groups: Sequence[str] = ()) -> Contract:
    """The contract of a policy.

    Args:
        record: of the environment that it was trained in.
        num_obs, num_actions: of the policy.
        actions: what the environment makes of them.
        groups: the names of the groups of observations that the actor sees, in order.
    """
    constants = record.constants
    known = {"pos_scale", "lin_vel_scale", "ang_vel_scale", "hover_rpm", "rpm_range", "dt"} <= set(constants)
    if known and (num_obs, num_actions) == (17, 4):
        lines = [*_drone(constants), *_propellers(constants)]
    else:
        seen = f", its groups {', '.join(groups)} one after the other" if groups else ""
        lines = [
            f"Observations: {num_obs} numbers, as {record.label} returns them, in its order{seen}. What they are, the "
            "run does not record.",
            f"Actions: {num_actions}, {actions}.",
        ]
    dt = constants.get("dt")
    if dt is None:
        lines.append("Rate: one call for each step of the environment. How long that is, the run does not record.")
    else:
        lines.append(f"Rate: a call every {dt:g} s ({1 / dt:g} Hz); an action holds until the next.")
    return Contract("\n".join(lines), dt)


def _drone(constants: Mapping[str, Any]) -> list[str]:
    found = channels(constants)
    return [
        "Frames: body x forward, y left, z up; world z up. Quaternions, of length 1, turn body vectors into the world.",
        "They began as (1, 0, 0, 0) in training: of q and -q give the one with w >= 0.",
        "",
        "Observations:",
        *(f"  obs[{i}]{' ' * (i < 10)}  {channel}" for i, channel in enumerate(found)),
        "",
    ]


def _propellers(constants: Mapping[str, Any]) -> list[str]:
    from pydrone.envs.quadrotor import KF, PROPELLERS, SPIN

    lines = [
        "Actions, each clipped to [-1, 1], are speeds of the propellers of Genesis' cf2x: rpm = (1 + "
        f"{constants['rpm_range']:g} a) *",
        f"{constants['hover_rpm']:.9g}. In training a propeller's thrust was {KF:g} * rpm^2 N.",
        "",
        "Actions:",
    ]
    for i, ((x, y), spin) in enumerate(zip(PROPELLERS, SPIN)):
        # The torque on the body is against the propeller's turn.
        turns = "clockwise" if spin > 0 else "counterclockwise"
        where = f"{'front' if x > 0 else 'rear'} {'left' if y > 0 else 'right'}"
        lines.append(f"  actions[{i}]  propeller {where} (x {x:g}, y {y:g} m), turns {turns} seen from above")
    return [*lines, ""]
