"""The report of a session: one document, as a summary in the terminal, a JSON file and a chart.

    python benches/report.py benches/results/amd-epyc.json

prints the summary of a JSON file again.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import machine
import targets
from clock import Clock
from contenders import APART, KERNELS, OPERATIONS
from measurement import Comparison, Result

FIGURES = ("hot", "cold", "eager")


def rows(comparison: Comparison) -> Iterator[dict[str, Any]]:
    """A row of figures for each contender. ``ratio``: its time over that of the pydrone it is compared with."""
    results = comparison.results
    for result in results.values():
        row: dict[str, Any] = {"name": result.name, "against": result.against, "launches": None, **result.counts}
        row |= {"useful_bytes": result.useful_bytes, "gae_share": result.share, "problem": result.problem}
        if result.device_time:
            row["device_time"] = result.device_time
        if result.stages:
            row["stages_ms"] = {name: 1e3 * x for name, x in result.stages.items()}
        row["cache"] = {
            figure: _figures(result, results[result.against], results.get("memcpy"), figure)
            for figure in FIGURES
            if result.seconds.get(figure)
        }
        yield row


def _figures(result: Result, ours: Result, memcpy: Result | None, figure: str) -> dict[str, float | int | None]:
    median, base = result.median(figure), ours.median(figure)
    assert median is not None
    speed = result.useful_bytes / median
    copied = memcpy and memcpy.median(figure)
    return {
        "median_ms": median * 1e3,
        "iqr_ms": result.spread(figure) * 1e3,
        "turns": len(result.seconds[figure]),
        "ratio": median / base if base else None,
        "gb_per_s": speed / 1e9 if result.useful_bytes else None,
        "of_memcpy": speed * copied / memcpy.useful_bytes if copied and result.useful_bytes else None,
    }


def document(comparisons: list[Comparison], clock: Clock, before: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    """The content of the JSON file: provenance, comparisons with a row for each contender, on a GPU the targets.

    ``before``: comparisons of an earlier run, as its file has them.
    """
    found = machine.provenance(clock)
    found["comparisons"] = [*before] + [
        {
            "operation": x.operation,
            "num_envs": x.num_envs,
            "num_steps": x.num_steps,
            "per": x.per,
            "cold": x.cold,
            "hot": x.hot,
            "contenders": list(rows(x)),
        }
        for x in comparisons
    ]
    if clock.kind == "cuda":
        found |= {"targets_of": targets.GPU, "targets": targets.judge(found["comparisons"])}
    return found


CPU_HEAD = """\
pydrone and its peers: median of a call, interquartile range in brackets; 'x' is its time over pydrone's (the one that
stores the same fields); GB/s of the bytes that must be read and written; launches that PyTorch dispatches (-: it
cannot see them); GAE: its share of the iteration."""
GPU_HEAD = """\
pydrone and its peers: median of one operation in us (a step's append, a minibatch), interquartile range in brackets;
'x' is its time over pydrone's; GB/s of the bytes that must be read and written. hot, cold: device time of a CUDA
graph's replays (*: the profiler's sum of the kernels, without a graph). eager: whole calls. Launches and waits of the
host are counted per call: all steps of a rollout, all minibatches of an epoch."""


def print_summary(line: Callable[[str], None], document: dict[str, Any]) -> None:
    """Prints the table: a line for every contender, with the reason if it has no figures."""
    gpu = document.get("kind") == "cuda"
    for text in [
        "",
        f"{document['device']}, commit {document['commit']}",
        *(GPU_HEAD if gpu else CPU_HEAD).split("\n"),
    ]:
        line(text)
    for comparison in document["comparisons"]:
        line("")
        line(f"{comparison['operation']}, {comparison['num_envs']} envs x {comparison['num_steps']} steps")
        for figure in ("cold", "hot"):
            if comparison.get(figure):
                line(f"  {figure}: {comparison[figure]}")
        found = [figure for figure in FIGURES if any(figure in row["cache"] for row in comparison["contenders"])]
        unit, scale = ("us", 1e3 / comparison["per"]) if gpu else ("ms", 1.0)
        head = "".join(f"{f'{figure} {unit}':>12} {'':9}{'x':>7}{'GB/s':>8}{'memcpy':>8}" for figure in found)
        line(f"  {'':28}{head}{'launches':>10}{'waits' if gpu else 'GAE':>8}")
        for row in comparison["contenders"]:
            if row["problem"] and not row["cache"]:
                line(f"  {row['name']:28}  {row['problem']}")
                continue
            profiled = row.get("device_time") == "profiler"
            cells = "".join(_cells(row["cache"].get(x), scale, profiled and x != "eager") for x in found)
            launches = "-" if row["launches"] is None else str(row["launches"])
            share = "" if row["gae_share"] is None else f"{row['gae_share']:.2%}"
            waits = str(row.get("host_waits", "-"))
            line(
                f"  {row['name']:28}{cells}{launches:>10}{waits if gpu else share:>8}  {row['problem'] or ''}".rstrip()
            )
            if gpu and row.get("stages_ms"):
                stages = ", ".join(f"{name} {ms:.2f}" for name, ms in row["stages_ms"].items() if name != "iteration")
                line(f"    by stage, ms: {stages}")
    if "targets" in document:
        for text in ["", *targets.table(document["targets"])]:
            line(text)
        if targets.GPU not in document["device"]:
            line(f"The targets are for an {targets.GPU}; this is {document['device']}.")


def _cells(figures: dict[str, Any] | None, scale: float, profiled: bool) -> str:
    if figures is None:
        return " " * 45
    ratio, speed, part = figures["ratio"], figures["gb_per_s"], figures["of_memcpy"]
    spread = f"({figures['iqr_ms'] * scale:.3g})"
    return (
        f"{figures['median_ms'] * scale:12.3f}{'*' if profiled else ' '}{spread:9}"
        + (f"{ratio:7.2f}" if ratio else f"{'':7}")
        + (f"{speed:8.1f}" if speed else f"{'':8}")
        + (f"{part:8.0%}" if part else f"{'':8}")
    )


def file_name(operations: set[str], clock: Clock) -> str:
    """MACHINE.json if all operations were measured, else MACHINE-OPERATIONS.json."""
    some = [name for name in OPERATIONS if name in operations]
    whole = [name for name in OPERATIONS if name != APART]
    if set(KERNELS) <= operations and some != whole:
        some = ["kernels", *(name for name in some if name not in KERNELS)]
    suffix = "" if some in (whole, list(OPERATIONS)) else "-" + "-".join(some).replace(" ", "-")
    return f"{machine.name(clock)}{suffix}.json"


def write(path: Path, found: dict[str, Any], chart: bool = True) -> list[Path]:
    """Writes a document to ``path``, and a chart beside it if matplotlib is installed. Returns the files."""
    machine.write(path, found)
    if not chart:
        return [path]
    try:
        from chart import draw
    except ImportError:
        return [path]
    draw(found, path.with_suffix(".png"))
    return [path, path.with_suffix(".png")]


if __name__ == "__main__":
    for path in sys.argv[1:]:
        print_summary(print, json.loads(Path(path).read_text(encoding="utf-8")))
