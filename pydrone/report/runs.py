"""The results of a training, loaded from its folder: newest checkpoint, settings, policy."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pydrone.envs import Env
from pydrone.envs.record import Record
from pydrone.ppo.config import PPOConfig
from pydrone.ppo.policy.actor_critic import ActorCritic
from pydrone.ppo.policy.make import make_policy
from pydrone.ppo.trainer import read_checkpoint
from pydrone.ppo.training import checkpoint
from pydrone.ppo.training.average import deployed


class Run(NamedTuple):
    """A loaded run."""

    folder: Path
    checkpoint: Path
    iteration: int
    settings: Mapping[str, Any]
    """The configuration of the training: nested mappings of plain values."""
    state: Mapping[str, Any]
    """The checkpoint, see :meth:`pydrone.ppo.trainer.Trainer.state_dict`."""

    @property
    def environment(self) -> Record:
        """What the run knows of its environment; ValueError where the checkpoint has something else in its place."""
        try:
            return Record.read(self.state)
        except ValueError as error:
            raise ValueError(f"{self.checkpoint}: {error}") from error


def checkpoint_of(run: str | os.PathLike[str]) -> Path:
    """``run`` itself if it is a file, else the newest checkpoint in that folder that can be loaded.

    Raises FileNotFoundError if there is none.
    """
    path = Path(run)
    if not path.exists():
        raise FileNotFoundError(f"{run}: no such run folder or checkpoint")
    found = checkpoint.newest(path) if path.is_dir() else path
    if found is None:
        raise FileNotFoundError(f"{run}: no checkpoint model_ITERATION.pt in this folder that can be loaded")
    return found


def load(run: str | os.PathLike[str], device: torch.device | str = "cpu") -> Run:
    """Loads a run.

    Args:
        run: its folder (the newest checkpoint is used), or a checkpoint.
        device: where the tensors live.

    Raises:
        OSError: there is no such folder or file, or no checkpoint in it.
        ValueError: the file is not a checkpoint of a training.
    """
    path = checkpoint_of(run)
    state = read_checkpoint(path, device)
    return Run(path.parent, path, state["iteration"], state["config"], state)


def load_policy(run: Run, env: Env) -> ActorCritic:
    """The policy of the run, with the averaged weights where there are any, on the device of ``env``.

    Raises:
        ValueError: the environment has other observations or actions than the policy was trained with, or the run has
            no valid policy.
    """
    try:
        settings = PPOConfig(**run.settings["ppo"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{run.checkpoint}: config: expected the settings of a policy, got others: {error}") from error
    try:
        policy = make_policy(env.obs, env.actions, settings, getattr(env, "num_discrete_actions", None)).to(env.device)
        policy.load_state_dict(deployed(run.state))
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{run.checkpoint}: a policy trained in {run.environment.label} does not fit an environment with "
            f"observations {env.obs} and {env.actions} actions: {error}"
        ) from error
    return policy.eval()
