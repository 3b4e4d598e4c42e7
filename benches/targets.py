"""The figures to reach on an H200 at 8192 x 100, and what a run has for each."""

from __future__ import annotations

from typing import NamedTuple

GPU = "H200"  # on another one the verdicts are about that one


class Target(NamedTuple):
    what: str
    """The row's."""
    name: str
    key: str
    """The figure in the row."""
    limit: float
    unit: str = ""
    least: bool = False
    """Whether the limit is a lower one."""


TARGETS = (
    Target("gae", "device, hot", "hot_us", 4.5, "us"),
    Target("gae", "device, cold", "cold_us", 5.5, "us"),
    Target("gae", "eager call", "eager_us", 15, "us"),
    Target("append", "launches", "launches", 1),
    Target("append", "device, hot", "hot_us", 3, "us"),
    Target("append", "device, cold", "cold_us", 3, "us"),
    Target("append", "eager call", "eager_us", 10, "us"),
    Target("append", "waits of the host", "host_waits", 0),
    Target("begin + end", "launches", "launches", 2),
    Target("begin + end", "waits of the host", "host_waits", 0),
    Target("minibatch", "launches", "launches", 1),
    Target("minibatch", "useful bytes, of a copy's bandwidth", "of_copy", 0.7, least=True),
    Target("iteration", "launches", "launches", 226),
    Target("iteration", "rsl_rl's eager time over the eager one", "rsl_rl_over_eager", 8, "x", least=True),
    Target("iteration", "rsl_rl's eager time over a CUDA graph's", "rsl_rl_over_graph", 20, "x", least=True),
)


def derive(rows: list[dict], copy_gb_s: float) -> None:
    """Adds the ratios that targets are about: to a copy's bandwidth, and to rsl_rl's iteration."""
    theirs = [row for row in rows if row["what"] == "iteration" and row["backend"] == "rsl_rl" and "eager_us" in row]
    for row in rows:
        if "cold_gb_s" in row:
            row["of_copy"] = row["cold_gb_s"] / copy_gb_s
        for key in ("eager", "graph"):
            if row["what"] == "iteration" and theirs and f"{key}_us" in row:
                row[f"rsl_rl_over_{key}"] = theirs[0]["eager_us"] / row[f"{key}_us"]


def judge(rows: list[dict], backends: list[str]) -> list[dict]:
    """For each target and backend what was measured, and whether that reaches it; None where nothing was."""
    found = []
    for target in TARGETS:
        for backend in backends:
            row = next((x for x in rows if x["what"] == target.what and x["backend"] == backend), {})
            measured = row.get(target.key)
            reached = None
            if measured is not None:
                reached = measured >= target.limit if target.least else measured <= target.limit
            verdict = {True: "reached", False: "missed", None: "not measured"}[reached]
            found.append({**target._asdict(), "backend": backend, "measured": measured, "verdict": verdict})
    return found


def table(verdicts: list[dict]) -> str:
    lines = [f"{'to reach':14}{'':42}{'backend':10}{'target':>12}{'measured':>12}"]
    for x in verdicts:
        limit = f"{'>=' if x['least'] else '<='} {x['limit']:g} {x['unit']}".rstrip()
        measured = "" if x["measured"] is None else f"{x['measured']:.4g} {x['unit']}".rstrip()
        lines.append(f"{x['what']:14}{x['name']:42}{x['backend']:10}{limit:>12}{measured:>12}  {x['verdict']}")
    return "\n".join(lines)
