"""The learning curve of one run: its figures read back from its folder, and drawn."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydrone.ops.packages import needed
from pydrone.ppo.training.run_log import CONFIG, PROGRESS

CURVE = "learning_curve.png"

#: up to this many iterations the points are marked: a single one draws no line
MARKED = 30

#: the panels of the picture: figure, label, whether the axis is logarithmic
PANELS = (
    ("episode_length", "episode length [steps]", False),
    ("episode_return", "reward of an episode", False),
    ("value_loss", "value loss", True),
    ("kl", "KL divergence [nats]", True),
    ("learning_rate", "learning rate", True),
    ("action_std", "action std", False),
)

# A layout by matplotlib measures all text twice, which takes as long again as the drawing.
MARGINS = {"left": 0.1, "right": 0.98, "bottom": 0.055, "top": 0.945, "wspace": 0.27, "hspace": 0.06}


def read(run_dir: str | os.PathLike[str]) -> list[dict[str, float]]:
    """The figures of a run, one dict per iteration; of an iteration done twice, as after a resume, the later ones."""
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


def settings_of(run_dir: str | os.PathLike[str]) -> dict[str, Any]:
    """The run's settings; empty where they are missing or unreadable."""
    try:
        settings = json.loads((Path(run_dir) / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return settings if isinstance(settings, dict) else {}


def plot(run_dir: str | os.PathLike[str]) -> Path:
    """Draws the learning curve of a run into its folder and returns the picture's path. Needs matplotlib."""
    # Not through pyplot, which would look for a display.
    with needed("matplotlib", "a learning curve", "matplotlib"):
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator

    rows, settings = read(run_dir), settings_of(run_dir)
    figure = Figure(figsize=(10, 9))
    panels = figure.subplots(math.ceil(len(PANELS) / 2), 2, sharex=True, gridspec_kw=MARGINS)
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
        panel.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    figure.suptitle(_title(settings), y=0.99)
    path = Path(run_dir) / CURVE
    figure.savefig(path, dpi=120)
    return path


def _title(settings: Mapping[str, Any]) -> str:
    num_envs, seed = settings.get("num_envs"), settings.get("seed")
    known = (
        settings.get("env"),
        None if num_envs is None else f"{num_envs} environments",
        None if seed is None else f"seed {seed}",
    )
    return ", ".join(part for part in known if part is not None)
