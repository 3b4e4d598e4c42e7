"""What a run leaves behind: a line of JSON an iteration, TensorBoard events, a picture of the learning curve."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PROGRESS = "progress.jsonl"
CURVE = "learning_curve.png"
CONFIG = "config.json"
WANDB_ID = "wandb_id.txt"

# A run of so few iterations has its points marked: a single one draws no line.
MARKED = 30

# What the picture shows, top to bottom: key, label, logarithmic axis.
PANELS = (
    ("episode_length", "episode length [steps]", False),
    ("episode_return", "reward of an episode", False),
    ("value_loss", "value loss", True),
    ("kl", "KL divergence [nats]", True),
    ("learning_rate", "learning rate", True),
    ("action_std", "action std", False),
)


class RunLog:
    """Writes the figures of each iteration into a run's folder.

    Args:
        run_dir: the folder, made if need be. Lines are added to a log that is there already.
        tensorboard: write event files too; needs tensorboard.
        after: the iteration that a resumed run stands at.
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
            from torch.utils.tensorboard import SummaryWriter

            # What a killed run has written beyond its checkpoint is done again.
            self._events = SummaryWriter(str(self.run_dir), purge_step=after + 1 if after else None)
        self._wandb = None if wandb_project is None else _wandb_run(self.run_dir, wandb_project, settings)
        self._lines = open(self.run_dir / PROGRESS, "a", encoding="utf-8")  # noqa: SIM115
        if self._lines.tell() and not (self.run_dir / PROGRESS).read_bytes().endswith(b"\n"):
            self._lines.write("\n")  # a process that was killed while it wrote

    def write(self, figures: Mapping[str, float]) -> None:
        """One iteration's figures; ``iteration`` among them numbers it. What is not finite is left out."""
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


def _wandb_run(run_dir: Path, project: str, settings: Mapping[str, Any] | None) -> Any:
    """The run at Weights & Biases that belongs to this folder: the one it had before, or a new one."""
    import wandb

    known = run_dir / WANDB_ID
    number = known.read_text(encoding="utf-8").strip() if known.exists() else None
    run = wandb.init(
        project=project, name=run_dir.name, dir=str(run_dir), config=dict(settings or {}), id=number, resume="allow"
    )
    known.write_text(f"{run.id}\n", encoding="utf-8")
    # Not W&B's own counter, which takes no iteration twice, as after a resume.
    run.define_metric("train/iteration")
    run.define_metric("*", step_metric="train/iteration")
    return run


def read(run_dir: str | os.PathLike[str]) -> list[dict[str, float]]:
    """The figures of a run, iteration by iteration; of one that was done twice, as after a resume, the later."""
    lines = (Path(run_dir) / PROGRESS).read_text(encoding="utf-8", errors="replace").splitlines()
    rows = {}
    for line in lines:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue  # a process that was killed while it wrote
        if isinstance(row, dict) and type(row.get("iteration")) is int:
            rows[row["iteration"]] = row
    return [rows[iteration] for iteration in sorted(rows)]


def plot(run_dir: str | os.PathLike[str]) -> Path:
    """Draws the learning curve of a run into its folder and returns the picture's path. Needs matplotlib."""
    # Not through pyplot, which would look for a display.
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    rows, settings = read(run_dir), _settings(run_dir)
    figure = Figure(figsize=(10, 9), layout="constrained")
    panels = figure.subplots(math.ceil(len(PANELS) / 2), 2, sharex=True)
    for panel, (key, label, logarithmic) in zip(panels.flat, PANELS):
        points = [(row["iteration"], row[key]) for row in rows if key in row]
        marker = "." if len(points) <= MARKED else None
        panel.plot([x for x, _ in points], [y for _, y in points], linewidth=1.2, marker=marker)
        panel.set_ylabel(label)
        panel.grid(alpha=0.3)
        if logarithmic and any(y > 0 for _, y in points):
            panel.set_yscale("log")
        if key == "episode_length" and settings.get("target_episode_length"):
            panel.axhline(settings["target_episode_length"], linestyle="--", linewidth=1, color="gray", label="target")
            panel.legend()
    for panel in panels[-1]:
        panel.set_xlabel("iteration")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.suptitle(_title(settings))
    path = Path(run_dir) / CURVE
    figure.savefig(path, dpi=120)
    return path


def _settings(run_dir: str | os.PathLike[str]) -> dict[str, Any]:
    """The run's settings as far as they are known."""
    try:
        settings = json.loads((Path(run_dir) / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return settings if isinstance(settings, dict) else {}


def _title(settings: Mapping[str, Any]) -> str:
    num_envs, seed = settings.get("num_envs"), settings.get("seed")
    known = (
        settings.get("env"),
        None if num_envs is None else f"{num_envs} environments",
        None if seed is None else f"seed {seed}",
    )
    return ", ".join(part for part in known if part is not None)
