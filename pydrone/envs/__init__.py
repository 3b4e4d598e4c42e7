"""Vectorised environments. Importing this package imports neither torch, nor a simulator, nor Gymnasium.

``make`` builds an environment by name, and ``known`` lists the names (:mod:`pydrone.envs.registry` says how a package
adds one). :class:`Randomization` holds the ranges of domain randomisation, :class:`TaskOptions` the options of the
tasks. :mod:`pydrone.envs.base` defines the protocol of an environment, and :mod:`pydrone.envs.adapters` wraps
``gymnasium.vector`` and rsl_rl environments into it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from pydrone.envs.randomization import Randomization
from pydrone.envs.registry import ENVIRONMENTS, check_name, known, make
from pydrone.envs.task_options import TaskOptions

if TYPE_CHECKING:
    from pydrone.envs.base import Env, EpisodeStats, LogMeter, StepResult

__all__ = [
    "ENVIRONMENTS",
    "Env",
    "EpisodeStats",
    "LogMeter",
    "Randomization",
    "StepResult",
    "TaskOptions",
    "check_name",
    "known",
    "make",
]


def __getattr__(name: str) -> object:
    # Imported on first use: they need torch.
    if name not in ("Env", "EpisodeStats", "LogMeter", "StepResult"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(".base", __name__), name)
