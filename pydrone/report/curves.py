"""Learning curves of several runs in one picture. Runs that differ only in the seed form one curve with its spread."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydrone.ops.packages import needed
from pydrone.ppo.training.run_log import PROGRESS
from pydrone.report import learning_curve

X = {"iteration": "iteration", "steps": "environment steps", "time": "time in iterations [min]"}

#: settings in which repetitions of the same run may differ
REPETITION = ("seed", "run_dir", "resume", "save_interval", "tensorboard")

# The result of a run is its mean over this many last iterations.
LAST = 10


class Curve(NamedTuple):
    """The figures of a run."""

    name: str
    settings: Mapping[str, Any]
    """Flat: ``{"ppo.gamma": 0.99, ...}``; empty if unknown."""
    rows: Sequence[Mapping[str, float]]
    """The figures of each iteration."""


class Group(NamedTuple):
    """Runs that differ only in ``REPETITION``."""

    label: str
    curves: Sequence[Curve]


def find(paths: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """The run folders among ``paths``, and those inside a folder that is not a run itself; each once, in order.

    Raises:
        FileNotFoundError: a path is not a run folder and contains none.
    """
    found: dict[Path, None] = {}
    for path in map(Path, paths):
        if (path / PROGRESS).is_file():
            inside = [path]
        else:
            inside = sorted(x.parent for x in path.glob(f"*/{PROGRESS}"))
        if not inside:
            raise FileNotFoundError(f"{path}: no run folder, and none in it: expected a file {PROGRESS}")
        found |= dict.fromkeys(inside)
    return list(found)


def read(run_dir: Path) -> Curve:
    """Reads a run; ValueError if it has no iterations yet."""
    rows = learning_curve.read(run_dir)
    if not rows:
        raise ValueError(f"{run_dir / PROGRESS}: expected a line per iteration, got none")
    return Curve(str(run_dir), _flat(learning_curve.settings_of(run_dir)), rows)


def group(curves: Sequence[Curve]) -> list[Group]:
    """Groups runs by their settings, in the order of their first runs. A run of unknown settings is its own group.

    A label names the settings in which the groups differ, or the folder of a run whose settings are unknown.
    """
    groups: dict[Any, list[Curve]] = {}
    for curve in curves:
        kept = {name: repr(x) for name, x in curve.settings.items() if name not in REPETITION}
        groups.setdefault(frozenset(kept.items()) or curve.name, []).append(curve)
    known = [members[0].settings for members in groups.values() if members[0].settings]
    names = dict.fromkeys(name for settings in known for name in settings if name not in REPETITION)
    differ = [name for name in names if len({repr(settings.get(name)) for settings in known}) > 1]

    def label(first: Curve) -> str:
        if not first.settings:
            return first.name
        said = [f"{name.removeprefix('ppo.')} {_text(first.settings.get(name))}" for name in differ]
        return ", ".join(said) or str(first.settings.get("env", first.name))

    return [Group(f"{label(members[0])}{_runs(members)}", members) for members in groups.values()]


def points(curve: Curve, figure: str, x: str) -> tuple[list[float], list[float]]:
    """The ``figure`` of a run over ``x``, a key of ``X``; iterations without it are left out."""
    xs, ys, steps, minutes = [], [], 0.0, 0.0
    for i, row in enumerate(curve.rows):
        samples = row["steps_per_second"] * row["time/iteration"] if x != "iteration" else 0.0
        if i == 0:  # a run resumed into another folder lacks the earlier iterations
            steps = samples * (row["iteration"] - 1)
        steps += samples
        minutes += row["time/iteration"] / 60 if x == "time" else 0.0
        if figure in row:
            xs.append({"iteration": row["iteration"], "steps": round(steps), "time": minutes}[x])
            ys.append(row[figure])
    return xs, ys


def spread(lines: Sequence[tuple[Sequence[float], Sequence[float]]]) -> tuple[Any, Any, Any, Any]:
    """x where all ``lines`` (x, y) are defined, and the minimum, mean and maximum of y there, as NumPy arrays.

    Lines are interpolated linearly between their points. The arrays are empty if the lines do not overlap.
    """
    import numpy as np

    low, high = max(xs[0] for xs, _ in lines), min(xs[-1] for xs, _ in lines)
    grid = np.unique(np.concatenate([np.asarray(xs, float) for xs, _ in lines]))
    grid = grid[(grid >= low) & (grid <= high)]
    ys = np.stack([np.interp(grid, xs, ys) for xs, ys in lines])
    return grid, ys.min(axis=0), ys.mean(axis=0), ys.max(axis=0)


def draw(
    groups: Sequence[Group],
    path: str | os.PathLike[str],
    x: str = "iteration",
    figures: Sequence[str] | None = None,
) -> Path:
    """Writes the picture and returns its path. Needs matplotlib.

    Args:
        groups: from :func:`group`.
        path: the file; its suffix selects the format.
        x: a key of ``X``.
        figures: names of figures, one panel each; None: those of the learning curve of a single run.

    Raises:
        ValueError: no run has such a figure, or ``x`` needs the time of iterations and it is missing.
    """
    # Not through pyplot, which would look for a display.
    with needed("matplotlib", "a learning curve", "matplotlib"):
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator

    panels = _panels(groups, figures)
    if x != "iteration":
        for curve in (curve for members in groups for curve in members.curves):
            if any("steps_per_second" not in row or "time/iteration" not in row for row in curve.rows):
                raise ValueError(f"{curve.name}: expected the time of each iteration for x = {x!r}, got none")
    columns = min(2, len(panels))
    height = -(-len(panels) // columns)
    figure = Figure(figsize=(6.2 * columns, 1.2 + 3 * height), layout="constrained")
    axes = figure.subplots(height, columns, sharex=True, squeeze=False)
    for axis, (key, label, logarithmic) in zip(axes.flat, panels):
        for i, members in enumerate(groups):
            _draw_group(axis, members, key, x, f"C{i % 10}")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
        if logarithmic and any(y > 0 for line in axis.lines for y in line.get_ydata()):
            axis.set_yscale("log")
        if x == "iteration":
            axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for i in range(columns):
        lowest = axes.flat[[j for j in range(len(panels)) if j % columns == i][-1]]
        lowest.set_xlabel(X[x])
        lowest.tick_params(labelbottom=True)
    handles = axes.flat[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper center", ncols=1 if len(groups) > 4 else len(groups))
    if any(len(members.curves) > 1 for members in groups):
        figure.supxlabel("Line: mean of the runs. Band: minimum to maximum. Thin lines: single runs.", fontsize="small")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path


def results(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """For each group its label, number of runs and iterations, and the final episode length and return.

    These are (mean, minimum, maximum) over the runs of the mean over the last ten iterations of a run; None if no
    episode ended in them."""
    rows = []
    for members in groups:
        row: dict[str, Any] = {"label": members.label, "runs": len(members.curves)}
        row["iterations"] = min(int(curve.rows[-1]["iteration"]) for curve in members.curves)
        for figure in ("episode_length", "episode_return"):
            ends = [[r[figure] for r in curve.rows[-LAST:] if figure in r] for curve in members.curves]
            means = [sum(end) / len(end) for end in ends if end]
            row[figure] = (sum(means) / len(means), min(means), max(means)) if means else None
        rows.append(row)
    return rows


def _draw_group(axis: Any, members: Group, key: str, x: str, color: str) -> None:
    lines = [line for line in (points(curve, key, x) for curve in members.curves) if line[0]]
    marker = "." if all(len(xs) <= learning_curve.MARKED for xs, _ in lines) else None
    if len(lines) == 1:
        axis.plot(*lines[0], color=color, linewidth=1.2, marker=marker, label=members.label)
        return
    if lines:
        for line in lines:
            axis.plot(*line, color=color, linewidth=0.6, alpha=0.4)
        grid, low, mean, high = spread(lines)
        axis.fill_between(grid, low, high, color=color, alpha=0.2, linewidth=0)
        axis.plot(grid, mean, color=color, linewidth=1.6, marker=marker, label=members.label)
    else:
        axis.plot([], [], color=color, label=members.label)


def _panels(groups: Sequence[Group], figures: Sequence[str] | None) -> list[tuple[str, str, bool]]:
    there = {name for members in groups for curve in members.curves for row in curve.rows for name in row}
    known = {panel[0]: panel for panel in learning_curve.PANELS}
    if figures is None:
        return [panel for panel in learning_curve.PANELS if panel[0] in there] or list(learning_curve.PANELS)
    missing = [name for name in figures if name not in there]
    if missing:
        raise ValueError(f"figure: expected some of {', '.join(sorted(there))}; got {', '.join(missing)}")
    return [known.get(name, (name, name, False)) for name in figures]


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, x in settings.items():
        flat |= _flat(x, f"{prefix}{name}.") if isinstance(x, Mapping) else {f"{prefix}{name}": x}
    return flat


def _text(x: Any) -> str:
    return " x ".join(map(str, x)) if isinstance(x, list) else f"{x:g}" if isinstance(x, float) else str(x)


def _runs(members: Sequence[Curve]) -> str:
    if len(members) == 1:
        return ""
    seeds = {curve.settings.get("seed") for curve in members}
    return f" ({len(members)} {'seeds' if len(seeds) == len(members) else 'runs'})"
