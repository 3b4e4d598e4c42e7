"""The figures to reach on an H200 at 8192 x 100, and what a report measured for each."""

from __future__ import annotations

from typing import Any, NamedTuple

GPU, SIZE = "H200", (8192, 100)  # on another GPU the verdicts hold for that one
BACKENDS = ("", ", triton")  # of "pydrone": the default one, and Triton's


class Target(NamedTuple):
    operation: str
    """The comparison's."""
    contender: str
    name: str
    key: str
    """The figure's key in :func:`measured`."""
    limit: float
    unit: str = ""
    least: bool = False
    """Whether the limit is a lower bound."""


TARGETS = (
    Target("gae", "pydrone", "device, hot", "hot", 4.5, "us"),
    Target("gae", "pydrone", "device, cold", "cold", 5.5, "us"),
    Target("gae", "pydrone", "eager call", "eager", 15, "us"),
    Target("append", "pydrone", "launches", "launches", 1),
    Target("append", "pydrone", "device, hot", "hot", 3, "us"),
    Target("append", "pydrone", "device, cold", "cold", 3, "us"),
    Target("append", "pydrone", "eager call", "eager", 10, "us"),
    Target("append", "pydrone", "waits of the host", "host_waits", 0),
    Target("append", "pydrone begin + end", "launches", "launches", 2),
    Target("append", "pydrone begin + end", "waits of the host", "host_waits", 0),
    Target("minibatch epoch", "pydrone", "launches", "launches", 1),
    Target("minibatch epoch", "pydrone", "bandwidth over a copy's of the same bytes", "of_memcpy", 0.7, "", True),
    Target("iteration", "pydrone", "launches", "launches", 226),
    Target("iteration", "pydrone", "rsl_rl's eager time over the eager one", "rsl_rl_over_eager", 8, "x", True),
    Target("iteration", "pydrone", "rsl_rl's eager time over a CUDA graph's", "rsl_rl_over_graph", 20, "x", True),
)


def measured(comparison: dict[str, Any], row: dict[str, Any]) -> dict[str, float]:
    """The figures of a report's row that have targets: for one operation, times in microseconds.

    ``host_waits`` counts over the whole call: one wait in a rollout's appends is one too many.
    """
    per, cache = comparison["per"], row["cache"]
    found = {figure: 1e3 * x["median_ms"] / per for figure, x in cache.items()}
    for name, count in (("launches", per), ("host_waits", 1)):
        if row.get(name) is not None:
            found[name] = row[name] / count
    if cache.get("cold", {}).get("of_memcpy"):
        found["of_memcpy"] = cache["cold"]["of_memcpy"]
    theirs = next((x for x in comparison["contenders"] if x["name"] == "rsl_rl"), {"cache": {}})["cache"].get("eager")
    if theirs and "eager" in cache:
        found["rsl_rl_over_eager"] = theirs["median_ms"] / cache["eager"]["median_ms"]
    if theirs and "cold" in cache and row.get("device_time") == "graph":
        found["rsl_rl_over_graph"] = theirs["median_ms"] / cache["cold"]["median_ms"]
    return found


def judge(comparisons: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each target and backend, the figure measured at SIZE (None: none was) and the verdict."""
    rows = {
        (x["operation"], row["name"]): measured(x, row)
        for x in comparisons
        if (x["num_envs"], x["num_steps"]) == SIZE
        for row in x["contenders"]
    }
    found = []
    for target in TARGETS:
        for backend in BACKENDS:
            name = target.contender + backend
            x = rows.get((target.operation, name), {}).get(target.key)
            reached = None
            if x is not None:
                reached = x >= target.limit if target.least else x <= target.limit
            verdict = {True: "reached", False: "missed", None: "not measured"}[reached]
            found.append({**target._asdict(), "contender": name, "measured": x, "verdict": verdict})
    return found


def table(verdicts: list[dict[str, Any]]) -> list[str]:
    lines = [f"{'to reach on an ' + GPU:17}{'':28}{'':44}{'target':>12}{'measured':>12}"]
    for x in verdicts:
        limit = f"{'>=' if x['least'] else '<='} {x['limit']:g} {x['unit']}".rstrip()
        figure = "" if x["measured"] is None else f"{x['measured']:.4g} {x['unit']}".rstrip()
        lines.append(f"{x['operation']:17}{x['contender']:28}{x['name']:44}{limit:>12}{figure:>12}  {x['verdict']}")
    return lines
