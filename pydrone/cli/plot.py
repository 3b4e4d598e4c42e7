"""``pydrone plot RUN...``: learning curves of one or several runs, with their spread over seeds."""

from __future__ import annotations

import argparse
import importlib.util
from typing import Any

from pydrone.cli.common import aligned, fail, not_installed

NAME = "learning_curves.png"


def main(argv: list[str]) -> int:
    """Runs ``pydrone plot ARGV`` and returns the exit status."""
    from pathlib import Path

    args = _parser().parse_args(argv)
    if args.protocol is not None:
        return _protocols(args)

    from pydrone.report import curves

    if importlib.util.find_spec("matplotlib") is None:
        return fail(not_installed("matplotlib"))
    try:
        folders = curves.find(args.runs)
        groups = curves.group([curves.read(folder) for folder in folders])
        out = args.out or (folders[0] / NAME if len(folders) == 1 else Path(NAME))
        drawn = curves.draw(groups, out, args.x, args.figure)
    except BrokenPipeError:
        raise
    except (ValueError, OSError, ImportError) as error:
        return fail(error)
    print(table(curves.results(groups)))
    print(f"Learning curves: {drawn}")
    return 0


def _protocols(args: argparse.Namespace) -> int:
    """Compares files of ``pydrone eval --protocol hover``."""
    from pathlib import Path

    from pydrone.report import protocol_report as report

    if args.x != "iteration" or args.figure:
        return fail("--x, --figure: expected none with --protocol, which has figures of its own")
    try:
        named = {Path(x).name: report.read(x) for x in args.runs}
        if len(named) < len(args.runs):
            named = {str(x): report.read(x) for x in args.runs}
        drawn = report.draw_comparison(named, Path(args.out or "protocol_hover.png"))
    except (ValueError, OSError, ImportError) as error:
        return fail(error)
    for name, content in named.items():
        rows = aligned(report.table(content["summary"]), rule=True)
        print(f"{name}: {content['env']}, runs: {len(content['runs'])}\n\n{rows}\n")
    print(f"Comparison: {drawn}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pydrone plot",
        description="Plot the learning curves of runs. Runs that differ only in the seed are drawn as their mean, with "
        "a band from their minimum to their maximum.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run, or a folder that contains runs")
    parser.add_argument(
        "--protocol",
        choices=("hover",),
        help="compare the figures that `pydrone eval --protocol` wrote instead: each RUN is a folder with such a file, "
        "or the file",
    )
    parser.add_argument(
        "--x",
        choices=("iteration", "steps", "time"),
        default="iteration",
        help="horizontal axis: iterations, steps of all environments, or minutes in iterations (default: iteration)",
    )
    parser.add_argument(
        "--figure",
        nargs="+",
        metavar="NAME",
        help="figures to plot, named as in progress.jsonl: env/distance, reward, ... (default: the six of a run's own "
        "learning curve)",
    )
    parser.add_argument(
        "--out", metavar="PNG", help=f"file to write (default: {NAME}, in the folder of the run if there is only one)"
    )
    return parser


def table(rows: list[dict[str, Any]]) -> str:
    """The results of :func:`pydrone.report.curves.results` as a table."""
    head = ["", "runs", "iterations", "episode length at the end", "reward at the end"]
    lines = [head]
    for row in rows:
        ends = [(row["episode_length"], 1), (row["episode_return"], 3)]
        lines.append([row["label"], str(row["runs"]), str(row["iterations"]), *(_end(x, n) for x, n in ends)])
    return aligned(lines)


def _end(x: tuple[float, float, float] | None, digits: int) -> str:
    if x is None:
        return "-"
    mean, low, high = (f"{value:.{digits}f}" for value in x)
    return mean if low == high else f"{mean} ({low} to {high})"
