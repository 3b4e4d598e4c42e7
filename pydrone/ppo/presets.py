"""Settings by name for ``pydrone train``: what replaces the defaults of :class:`pydrone.ppo.config.TrainConfig`."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple

from pydrone.ppo.config import TrainConfig


class Preset(NamedTuple):
    """Settings, nested as in :class:`~pydrone.ppo.config.TrainConfig`."""

    help: str
    settings: Mapping[str, Any]


#: environments with the hover task, which are trained by the preset "hover" unless another is asked for
HOVER = ("genesis-hover", "quadrotor")

_STILL = {
    "hold": 1.0,
    "weight_smooth": -0.1,
    "weight_yaw": 1.0,
    "yaw_decay": 2.0,
    "weight_angular": -0.1,
    "weight_crash": -100.0,
    "weight_near": 3.0,
    "near_decay": 4.0,
    # Short episodes, so that there are many beginnings to learn from.
    "max_episode_length": 400,
    "init_tilt": 60.0,
    "init_velocity": 1.5,
    "init_angular_velocity": 3.0,
}

PRESETS = {
    "hover": Preset(
        f"centimetres from a target, upright and calm (the default of {' and '.join(HOVER)})",
        {
            "num_steps": 32,
            "iterations": 180,
            "task": _STILL,
            "ppo": {"entropy_coef": 0.0, "init_std": 0.4, "gamma": 0.98, "ema_decay": 0.93},
        },
    ),
    "seconds": Preset(
        "a quadrotor that hovers after seconds, within 0.2 m",
        {
            "env": "quadrotor",
            "num_envs": 512,
            "num_steps": 32,
            "iterations": 64,
            "tensorboard": False,
            "task": _STILL | {"weight_near": 5.0},
            "ppo": {
                "entropy_coef": 0.0,
                "init_std": 0.5,
                "gamma": 0.98,
                "ema_decay": 0.9,
                "num_epochs": 4,
                "clip": 0.15,
                "hidden_dims": (64, 64),
            },
        },
    ),
    "genesis-example": Preset("the reward and the settings of Genesis' drone example", {}),
}


def settings(name: str | None, env: str | None) -> dict[str, Any]:
    """The settings of a preset, by default of that for the environment ``env`` (None: the default one).

    Raises ValueError, with the known names, for an unknown name.
    """
    if name is None:
        name = "hover" if (env or TrainConfig.env) in HOVER else "genesis-example"
    if name not in PRESETS:
        raise ValueError(f"--preset: expected one of {', '.join(PRESETS)}, got {name!r}")
    return copy.deepcopy(dict(PRESETS[name].settings))
