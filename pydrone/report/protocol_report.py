"""What is written of the hover protocol: a JSON file, a table, a picture of flights, and one that compares files."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from pydrone.ops.packages import needed
from pydrone.report import learning_curve, protocol
from pydrone.report.protocol import SCENES, SETTLED, Flight
from pydrone.report.runs import Run

#: figure -> (label, how a number is written)
FIGURES = {
    "survival": ("survival", lambda x: f"{100 * x:.1f} %"),
    "crash_rate": ("crash rate", lambda x: f"{100 * x:.1f} %"),
    "distance": ("distance, median, last 5 s", lambda x: f"{x:.3f} m"),
    "distance_p95": ("distance, 95th percentile", lambda x: f"{x:.3f} m"),
    "settled": (f"settled within {SETTLED:g} m", lambda x: f"{100 * x:.1f} %"),
    "settling_time": ("settling time, median", lambda x: f"{x:.2f} s"),
}


def entry(run: Run, flight: Flight) -> dict[str, Any]:
    """What the file says of one run: ``scenes`` holds :func:`pydrone.report.protocol.figures` of each."""
    seconds = None
    if (run.folder / learning_curve.PROGRESS).is_file():
        rows = [x for x in learning_curve.read(run.folder) if x["iteration"] <= run.iteration]
        seconds = rows[-1].get("time/process") if rows else None
    return {
        "checkpoint": str(run.checkpoint),
        "trained_in": run.environment.label,
        "iteration": run.iteration,
        "seed": run.settings.get("seed"),
        "seconds_from_process_start": seconds,
        "scenes": {name: protocol.figures(x, flight.dt) for name, x in flight.distance.items()},
    }


def whole(env: str, entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The file's content."""
    about = {"protocol": "hover", "version": protocol.VERSION, "env": env, "episodes": protocol.EPISODES}
    return about | {"runs": list(entries), "summary": protocol.summary([x["scenes"] for x in entries])}


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A file's content. ``path``: the file, or a folder with one such file in it.

    Raises FileNotFoundError, or ValueError for a file of something else or of another version.
    """
    given, found = Path(path), [Path(path)]
    if given.is_dir():
        found = sorted(given.glob("protocol_hover_*.json"))
        if len(found) != 1:
            names = ", ".join(x.name for x in found) or "none"
            raise FileNotFoundError(
                f"{path}: expected one file protocol_hover_ENV.json, as `pydrone eval --protocol hover` writes it, "
                f"got {names}"
            )
    try:
        content = json.loads(found[0].read_text(encoding="utf-8"))
        if content["protocol"] != "hover" or content["summary"].keys() != SCENES.keys():
            raise ValueError(content["protocol"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{found[0]}: expected the figures of the hover protocol, got something else") from error
    if content.get("version") != protocol.VERSION:
        found_version = content.get("version")
        raise ValueError(f"{found[0]}: expected version {protocol.VERSION} of the protocol, got {found_version}")
    return content


def table(summary: Mapping[str, Mapping[str, Mapping[str, float | None]]]) -> list[list[str]]:
    """The rows of a table: the median over the runs and, if it differs from them, the lowest and the highest."""
    rows = [["", *summary]]
    for name, (label, text) in FIGURES.items():
        cells = []
        for scene in summary.values():
            median, low, high = ("-" if x is None else text(x) for x in (scene[name][k] for k in _ENDS))
            cells.append(median if low == high else f"{median} ({low} to {high})")
        rows.append([label, *cells])
    return rows


_ENDS = ("median", "low", "high")


def draw_flights(title: str, flights: Sequence[Flight], path: Path) -> Path:
    """Draws each scene's distance to the target over time, of all runs' episodes together. Needs matplotlib."""
    figure, panels = _panels(2, 2, (11, 8), sharex=True, sharey=True)
    for panel, name in zip(panels, SCENES):
        distance = torch.cat([x.distance[name] for x in flights], dim=1)
        seconds = (torch.arange(len(distance)) + 1) * flights[0].dt
        low, first, median, third, high = (distance.nanquantile(q, dim=1) for q in (0.05, 0.25, 0.5, 0.75, 0.95))
        panel.fill_between(seconds, low, high, color="C0", alpha=0.15, linewidth=0, label="5th to 95th percentile")
        panel.fill_between(seconds, first, third, color="C0", alpha=0.35, linewidth=0, label="middle half")
        panel.plot(seconds, median, color="C0", linewidth=1.5, label="median")
        panel.axhline(SETTLED, color="gray", linestyle="--", linewidth=1, label=f"{SETTLED:g} m")
        crashed = distance[-1].isnan().double().mean().item()
        panel.set_title(f"{name} ({100 * crashed:.1f} % crashed)")
        panel.set_xlabel("time [s]")
        panel.set_ylabel("distance to the target [m]")
        panel.set_yscale("log")
        panel.grid(alpha=0.3, which="both")
    panels[0].legend(loc="upper right")
    return _save(figure, title, path)


def draw_comparison(named: Mapping[str, Mapping[str, Any]], path: Path) -> Path:
    """Compares files (:func:`read`) by name: a panel for each figure, bars from run to run. Needs matplotlib."""
    figure, panels = _panels(2, 2, (12, 8))
    shown = ("survival", "distance", "distance_p95", "settling_time")
    width = 0.8 / len(named)
    for panel, name in zip(panels, shown):
        for i, (label, content) in enumerate(named.items()):
            for k, scene in enumerate(SCENES):
                median, low, high = (content["summary"][scene][name][end] for end in _ENDS)
                x = k + (i + 0.5) * width - 0.4
                if median is None:
                    panel.text(x, 0, "never" if name == "settling_time" else "crash", ha="center", rotation=90, size=8)
                    continue
                panel.bar(x, median, width * 0.9, color=f"C{i}", label=label if k == 0 else None)
                if low is not None and high is not None:
                    panel.plot([x, x], [low, high], color="black", linewidth=1)
        panel.set_xticks(range(len(SCENES)), SCENES, rotation=12)
        panel.set_title(FIGURES[name][0])
        panel.set_ylabel({"survival": "share of the episodes", "settling_time": "s"}.get(name, "m"))
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3, axis="y")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center")
    return _save(figure, "Hover protocol", path)


def _panels(rows: int, columns: int, size: tuple[float, float], **shared: bool) -> tuple[Any, Any]:
    # Not through pyplot, which would look for a display.
    with needed("matplotlib", "a picture of the protocol", "matplotlib"):
        from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    return figure, list(figure.subplots(rows, columns, **shared).flat)


def _save(figure: Any, title: str, path: Path) -> Path:
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return path
