"""The log of a run: one line of JSON per iteration, and TensorBoard or Weights & Biases where asked for."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydrone.ops.packages import needed
from pydrone.ppo import configfile
from pydrone.ppo.config import TrainConfig

PROGRESS = "progress.jsonl"
CONFIG = "config.json"
WANDB_ID = "wandb_id.txt"


class RunLog:
    """Writes the figures of each iteration into a run's folder.

    Args:
        run_dir: the folder, made where needed. Lines are appended to an existing log.
        tensorboard: write event files too; needs tensorboard.
        after: iterations done before, by a run that is resumed.
        wandb_project: log to this project of Weights & Biases too; needs wandb. None: do not.
        settings: the run's, for Weights & Biases.
    """

    def __init__(
        self,
        run_dir: str | os.PathLike[str],
        tensorboard: bool = True,
        after: int = 0,
        wandb_project: str | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.run_dir = Path(run_dir)
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self._events: Any = None
        if tensorboard:
            with needed("tensorboard", "a run's log", "tensorboard"):
                from torch.utils.tensorboard import SummaryWriter

            # Iterations that a killed run logged after its last checkpoint are done again.
            self._events = SummaryWriter(str(self.run_dir), purge_step=after + 1 if after else None)
        self._wandb = None if wandb_project is None else _wandb_run(self.run_dir, wandb_project, settings)
        self._lines = open(self.run_dir / PROGRESS, "a", encoding="utf-8")  # noqa: SIM115
        if self._lines.tell() and not (self.run_dir / PROGRESS).read_bytes().endswith(b"\n"):
            self._lines.write("\n")  # after a process that was killed while writing

    def write(self, figures: Mapping[str, float]) -> None:
        """Logs one iteration's figures, numbered by ``iteration`` among them. Non-finite values are left out."""
        finite = {name: value for name, value in figures.items() if math.isfinite(value)}
        self._lines.write(json.dumps(finite) + "\n")
        self._lines.flush()
        if self._events is not None:
            for name, value in finite.items():
                if name != "iteration":
                    self._events.add_scalar(name if "/" in name else f"train/{name}", value, int(figures["iteration"]))
        if self._wandb is not None:
            self._wandb.log({name if "/" in name else f"train/{name}": value for name, value in finite.items()})

    def close(self) -> None:
        """Closes the files."""
        self._lines.close()
        if self._wandb is not None:
            self._wandb.finish()
        if self._events is not None:
            self._events.close()


def open_run(run_dir: Path, config: TrainConfig, after: int) -> RunLog:
    """Makes the run's folder where needed, writes the settings into it, and opens its log at iteration ``after``."""
    from pydrone.ppo.training import checkpoint  # which imports torch; who reads a log needs none

    settings = dataclasses.asdict(config)
    run_dir.mkdir(parents=True, exist_ok=True)
    checkpoint.remove_leftovers(run_dir)
    log = RunLog(run_dir, config.tensorboard, after, config.wandb_project if config.wandb else None, settings)
    (run_dir / CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    configfile.write(run_dir, config)
    return log


def _wandb_run(run_dir: Path, project: str, settings: Mapping[str, Any] | None) -> Any:
    """This folder's run at Weights & Biases: the one it had before, or a new one."""
    with needed("wandb", "a run's log", "wandb"):
        import wandb

    known = run_dir / WANDB_ID
    number = known.read_text(encoding="utf-8").strip() if known.exists() else None
    run = wandb.init(
        project=project, name=run_dir.name, dir=str(run_dir), config=dict(settings or {}), id=number, resume="allow"
    )
    known.write_text(f"{run.id}\n", encoding="utf-8")
    # W&B's own counter would drop iterations that are done twice, as after a resume.
    run.define_metric("train/iteration")
    run.define_metric("*", step_metric="train/iteration")
    return run
