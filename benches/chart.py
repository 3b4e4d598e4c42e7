"""The chart of a session: times side by side at the first size, and the sweep over N and T."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

COLUMNS = 4
OURS, THEIRS, BOUND = "#1b6ca8", "#c9a227", "#8a8a8a"


def _figures(contender: dict[str, Any]) -> dict[str, Any] | None:
    """The figures of a cold call, or else of a hot or an eager one."""
    return next((contender["cache"][x] for x in ("cold", "hot", "eager") if x in contender["cache"]), None)


def _median(contender: dict[str, Any]) -> float | None:
    figures = _figures(contender)
    return figures["median_ms"] if figures else None


def _color(name: str) -> str:
    return OURS if name.startswith("pydrone") else BOUND if name == "memcpy" else THEIRS


def draw(document: dict[str, Any], path: Path) -> None:
    """Writes a PNG of ``document``, the content of the JSON file."""
    bars: dict[str, dict[str, Any]] = {}
    swept: dict[str, list[dict[str, Any]]] = {}
    for x in document["comparisons"]:
        if x["operation"].startswith("sweep: "):
            swept.setdefault(x["operation"].removeprefix("sweep: "), []).append(x)
        else:
            bars.setdefault(x["operation"], x)
    panels = [partial(_bars, operation=name, comparison=x) for name, x in bars.items()]
    for name, comparisons in swept.items():
        panels += [partial(_lines, operation=name, comparisons=comparisons, fixed=x) for x in ("num_steps", "num_envs")]
    lines = -(-len(panels) // COLUMNS)
    figure = Figure(figsize=(5.2 * COLUMNS, 4.2 * lines), layout="constrained")
    axes = list(figure.subplots(lines, COLUMNS, squeeze=False).flat)
    for axis, panel in zip(axes, panels):
        panel(axis)
    for axis in axes[len(panels) :]:
        axis.remove()
    versions = ", ".join(f"{name} {version}" for name, version in document["packages"].items())
    title = f"{document['device']}, {document['threads']} threads, {document['date']}, commit {document['commit']}"
    figure.suptitle(f"{title}\n{versions}", fontsize=9)
    figure.savefig(path, dpi=110)


def _bars(axis: Any, operation: str, comparison: dict[str, Any]) -> None:
    found = [(c, ms) for c in comparison["contenders"] if (ms := _median(c)) is not None]
    if not found:
        return
    names, times = [c["name"] for c, _ in found], [ms for _, ms in found]
    axis.barh(names, times, color=[_color(name) for name in names])
    axis.set_xscale("log")
    axis.invert_yaxis()
    for i, (contender, ms) in enumerate(found):
        figures = _figures(contender)
        ratio = f"  x{figures['ratio']:.1f}" if figures["ratio"] else ""
        axis.text(ms, i, f" {ms:.3g}{ratio}", va="center", fontsize=7)
    axis.set_xlim(min(times) / 1.5, max(times) * 6)
    axis.tick_params(labelsize=8)
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set_title(f"{operation}, {comparison['num_envs']} x {comparison['num_steps']}: ms, cold", fontsize=9)


def _lines(axis: Any, operation: str, comparisons: list[dict[str, Any]], fixed: str) -> None:
    """Plots the sizes that share the commonest value of ``fixed``."""
    values = [x[fixed] for x in comparisons]
    common = max(set(values), key=values.count)
    other = "num_envs" if fixed == "num_steps" else "num_steps"
    chosen = sorted((x for x in comparisons if x[fixed] == common), key=lambda x: x[other])
    for name in [c["name"] for c in chosen[0]["contenders"]]:
        contenders = [(x[other], _median(c)) for x in chosen for c in x["contenders"] if c["name"] == name]
        points = [point for point in contenders if point[1] is not None]
        if points:
            axis.plot(*zip(*points), marker="o", color=_color(name), label=name)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.legend(fontsize=7)
    letter = {"num_envs": "N", "num_steps": "T"}
    axis.set_title(f"{operation} over {letter[other]}, {letter[fixed]} = {common}: ms, cold", fontsize=9)
    axis.tick_params(labelsize=8)
