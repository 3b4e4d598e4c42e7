"""What a training left in its folder: the newest checkpoint, its settings, its policy."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pydrone.envs import Env
from pydrone.ppo.policy import ActorCritic
from pydrone.ppo.trainer import read_checkpoint

_CHECKPOINT = re.compile(r"model_(\d+)\.pt")


class Run(NamedTuple):
    """A run as it is loaded."""

    folder: Path
    checkpoint: Path
    iteration: int
    settings: Mapping[str, Any]
    """The training's configuration, nested mappings of plain values."""
    state: Mapping[str, Any]
    """The checkpoint, see :meth:`pydrone.ppo.trainer.Trainer.state_dict`."""


def newest_checkpoint(folder: str | os.PathLike[str]) -> Path:
    """The checkpoint ``model_ITERATION.pt`` of the latest iteration; FileNotFoundError where there is none."""
    found = [(int(match[1]), path) for path in Path(folder).iterdir() if (match := _CHECKPOINT.fullmatch(path.name))]
    if not found:
        raise FileNotFoundError(f"{folder}: no checkpoint model_ITERATION.pt in this folder")
    return max(found)[1]


def load(run: str | os.PathLike[str], device: torch.device | str = "cpu") -> Run:
    """Loads a run.

    Args:
        run: its folder, of which the newest checkpoint is taken, or a checkpoint.
        device: where tensors go.

    Raises:
        OSError: there is no such folder or file, or no checkpoint in it.
        ValueError: the checkpoint is none of a training.
    """
    path = Path(run)
    if not path.exists():
        raise FileNotFoundError(f"{run}: no such run folder or checkpoint")
    path = newest_checkpoint(path) if path.is_dir() else path
    state = read_checkpoint(path, device)
    settings = state["config"]
    if not (isinstance(settings, Mapping) and isinstance(settings.get("env"), str) and "ppo" in settings):
        raise ValueError(f"{path}: config: expected the settings of a training, got {type(settings).__name__}")
    return Run(path.parent, path, state["iteration"], settings, state)


def load_policy(run: Run, env: Env) -> ActorCritic:
    """The run's policy on ``env``'s device, to fly ``env``.

    Raises:
        ValueError: the environment's observations or actions are not those the policy was trained with.
    """
    if not isinstance(env.actions, int):
        raise ValueError(f"env.actions: expected an int, for continuous actions, got {env.actions!r}")
    ppo = run.settings["ppo"]
    policy = ActorCritic(env.obs, env.actions, ppo["hidden_dims"], ppo["init_std"]).to(env.device)
    try:
        policy.load_state_dict(run.state["policy"])
    except (AttributeError, TypeError, RuntimeError) as error:
        raise ValueError(
            f"{run.checkpoint}: a policy trained in {run.settings['env']} does not fit an environment with "
            f"observations {env.obs} and {env.actions} actions: {error}"
        ) from error
    return policy.eval()
