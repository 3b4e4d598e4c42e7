"""The ranges of domain randomisation, in plain Python. :mod:`pydrone.envs.randomizer` draws from them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any


def _range(low: float, high: float, least: float, help: str) -> Any:
    """A range with its help text and the least value allowed in it: above 0 for factors."""
    return field(default=(low, high), metadata={"help": help, "aliases": (), "least": least})


@dataclass
class Randomization:
    """Ranges (low, high) from which every drone draws uniformly at the start of each episode. All off by default.

    Raises:
        ValueError: a range is not two finite numbers in order, or contains a value that is not allowed.
    """

    mass: tuple[float, float] = _range(1.0, 1.0, math.ulp(0.0), "Factor of the mass.")
    inertia: tuple[float, float] = _range(1.0, 1.0, math.ulp(0.0), "Factor of the inertia about all three axes.")
    thrust: tuple[float, float] = _range(
        1.0, 1.0, math.ulp(0.0), "Factor of thrust and torque, drawn for each propeller."
    )
    motor_lag: tuple[float, float] = _range(0.0, 0.0, 0.0, "Time constant of the propeller speeds, s.")
    latency: tuple[int, int] = _range(0, 0, 0, "Delay of the actions, in whole steps, both ends included.")
    wind: tuple[float, float] = _range(
        0.0, 0.0, 0.0, "Force of the wind in a random horizontal direction, N; the drone weighs 0.265 N."
    )
    pos_noise: tuple[float, float] = _range(0.0, 0.0, 0.0, "Standard deviation of the observed position, m.")
    att_noise: tuple[float, float] = _range(
        0.0, 0.0, 0.0, "Standard deviation of the observed attitude, rad about each axis."
    )
    vel_noise: tuple[float, float] = _range(0.0, 0.0, 0.0, "Standard deviation of the observed velocity, m/s.")
    gyro_noise: tuple[float, float] = _range(
        0.0, 0.0, 0.0, "Standard deviation of the observed angular velocity, rad/s."
    )

    def __post_init__(self) -> None:
        for f in fields(Randomization):
            given, least, name = getattr(self, f.name), f.metadata["least"], f.name
            kinds = (int,) if name == "latency" else (int, float)
            what = "whole steps" if name == "latency" else "finite numbers"
            if (
                not isinstance(given, (tuple, list))
                or len(given) != 2
                or not all(isinstance(x, kinds) and not isinstance(x, bool) and math.isfinite(x) for x in given)
            ):
                raise ValueError(f"{name}: expected two {what} (low, high), got {given!r}")
            low, high = given
            if low > high:
                raise ValueError(f"{name}: expected low <= high, got {given!r}")
            if low < least:
                raise ValueError(
                    f"{name}: expected {'a low end above' if least else 'no number below'} 0, got {given!r}"
                )
            setattr(self, name, (low, high))

    def varies(self, *names: str) -> bool:
        """Whether any of these ranges (any at all if none is named) differs from its default."""
        return any(getattr(self, f.name) != f.default for f in fields(Randomization) if not names or f.name in names)
