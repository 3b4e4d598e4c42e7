"""A picture of evaluated episodes: 3-D flight paths, and the distance to the target over time."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from pydrone.ops.packages import needed
from pydrone.report.evaluation import Episodes, Paths

# Number of paths drawn with a fixed target, and with moving targets, where paths are longer and overlap.
PATHS, TANGLED = 6, 2


def draw(title: str, evaluated: Sequence[Episodes], path: str | os.PathLike[str]) -> Path:
    """Writes the picture, with a column for each of ``evaluated``, which must have ``paths``. Needs matplotlib."""
    # Not through pyplot, which would look for a display.
    with needed("matplotlib", "a picture of flights", "matplotlib"):
        from matplotlib.figure import Figure

    figure = Figure(figsize=(7 * len(evaluated), 9.5), layout="constrained")
    grid = figure.add_gridspec(2, len(evaluated), height_ratios=(2.2, 1))
    for column, episodes in enumerate(evaluated):
        assert episodes.paths is not None
        space = figure.add_subplot(grid[0, column], projection="3d")
        shown = _draw_paths(space, episodes, episodes.paths)
        name = "moving targets" if episodes.resampled else "one target per episode"
        space.set_title(f"{name} ({shown} of {len(episodes.length)} episodes)")
        panel = figure.add_subplot(grid[1, column])
        _draw_distances(panel, episodes.paths, shown)
    figure.suptitle(title)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return path


def _draw_paths(space: Any, episodes: Episodes, paths: Paths) -> int:
    """Returns the number of paths drawn."""
    shown = min(paths.pos.shape[1], TANGLED if episodes.resampled else PATHS)
    start = paths.pos[0, :shown].nanmean(dim=0).tolist()
    space.scatter(*([x] for x in start), color="black", s=25, label="start")
    crashes: list[torch.Tensor] = []
    for k in range(shown):
        flown = paths.pos[: int(episodes.length[k]), k]
        flown = flown[flown.isfinite().all(dim=-1)]  # a crash may leave a state of NaN
        if episodes.crashed[k]:
            crashes.extend(flown[-1:])
        space.plot(*flown.T.tolist(), color=f"C{k}", linewidth=1)
        each = max(1, round(1 / paths.dt))
        seconds = flown[each - 1 :: each]
        said = {"label": "every second"} if k == 0 else {}
        space.scatter(*seconds.T.tolist(), color=f"C{k}", s=8, depthshade=False, **said)
        targets = paths.target[: int(episodes.length[k]), k].unique(dim=0)
        label = {"label": "targets"} if k == 0 else {}
        space.scatter(*targets.T.tolist(), color=f"C{k}", marker="*", s=90, depthshade=False, **label)
    if crashes:
        space.scatter(*torch.stack(crashes).T.tolist(), color="red", marker="x", s=60, depthshade=False, label="crash")
    # The same scale on all axes, and at least 1 m, so that a hover of millimetres does not fill the picture.
    points = torch.cat((paths.pos[:, :shown], paths.target[:, :shown])).flatten(0, 1)
    points = points[points.isfinite().all(dim=-1)]
    low, high = points.amin(dim=0), points.amax(dim=0)
    middle, half = (low + high) / 2, (high - low).clamp(min=1.0) / 2 * 1.05
    for axis, m, h in zip("xyz", middle.tolist(), half.tolist()):
        getattr(space, f"set_{axis}lim")(m - h, m + h)
        getattr(space, f"set_{axis}label")(f"{axis} [m]")
    space.set_box_aspect(half.tolist(), zoom=0.88)  # room for the labels
    space.legend(loc="upper left")
    return shown


def _draw_distances(panel: Any, paths: Paths, shown: int) -> None:
    """The distances of single paths, and the median and quartiles of all episodes still in flight."""
    seconds = (torch.arange(len(paths.distance)) + 1) * paths.dt
    for k in range(shown):
        panel.plot(seconds, paths.distance[:, k], color=f"C{k}", linewidth=0.7, alpha=0.6)
    first, median, third = (paths.distance.nanquantile(q, dim=1) for q in (0.25, 0.5, 0.75))
    panel.fill_between(seconds, first, third, color="black", alpha=0.15, linewidth=0, label="middle half")
    panel.plot(seconds, median, color="black", linewidth=1.5, label="median of all in flight")
    panel.axhline(paths.at_target, color="gray", linestyle="--", linewidth=1, label="at the target")
    panel.set_xlabel("time [s]")
    panel.set_ylabel("distance to the target [m]")
    panel.set_ylim(bottom=0)
    panel.grid(alpha=0.3)
    panel.legend(loc="upper right")
