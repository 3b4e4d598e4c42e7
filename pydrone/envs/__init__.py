"""Vectorised environments. Importing this package imports neither a simulator nor Gymnasium.

``make`` builds an environment by name; :mod:`pydrone.envs.base` states what an environment has to offer, and
:mod:`pydrone.envs.adapters` wraps ``gymnasium.vector`` and rsl_rl environments into it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .base import Env, EpisodeStats, LogMeter, StepResult

if TYPE_CHECKING:
    import torch

__all__ = ["ENVIRONMENTS", "Env", "EpisodeStats", "LogMeter", "StepResult", "make"]

# name -> (module, class), imported on first use
ENVIRONMENTS: dict[str, tuple[str, str]] = {
    "genesis-hover": ("pydrone.envs.genesis_hover", "GenesisHover"),
    "quadrotor": ("pydrone.envs.quadrotor", "Quadrotor"),
}


def make(name: str, num_envs: int, device: torch.device | str = "cpu", seed: int = 0, **kwargs: Any) -> Env:
    """Builds the environment ``name`` with ``num_envs`` copies on ``device``.

    Args:
        name: one of ``ENVIRONMENTS``: ``"genesis-hover"`` (needs genesis-world) or ``"quadrotor"`` (torch only).
        num_envs: number of environments stepped together.
        device: where observations, rewards and actions live.
        seed: seeds everything the environment draws.
        **kwargs: the environment's own options.

    Raises:
        ValueError: ``name`` is unknown.
    """
    if name not in ENVIRONMENTS:
        raise ValueError(f"name: expected one of {sorted(ENVIRONMENTS)}, got {name!r}")
    module, cls = ENVIRONMENTS[name]
    return getattr(importlib.import_module(module), cls)(num_envs=num_envs, device=device, seed=seed, **kwargs)
