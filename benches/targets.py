"""The figures to reach on an H200, at 8192 x 100 unless a target says otherwise, and what a report has of each."""

from __future__ import annotations

from typing import Any, NamedTuple

from workload import GPU_SCAN_SIZES

HOVER = "training to hover"  # of gpu_train.py
GPU, SIZE = "H200", (8192, 100)  # on another GPU the verdicts hold for that one
BACKENDS = ("", ", triton")  # of "pydrone": the default one, and Triton's
CACHES = ("hot", "cold")
CAPTURED = "pydrone, --capture"


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
    both: bool = True
    """Whether it is to be reached by each of BACKENDS."""
    size: tuple[int, int] = SIZE


def _alone(operation: str, contender: str, name: str, key: str, *limits: float, unit: str = "ms") -> list[Target]:
    """Targets of a contender without a second backend: what is to be reached now, and then."""
    names = (name, f"{name}, then")
    return [Target(operation, contender, n, key, limit, unit, both=False) for n, limit in zip(names, limits)]


def _calls() -> list[Target]:
    limits = {"": 2.5, ".gae(out=)": 2.5, " append": 2.5, " begin + end": 5, " minibatch": 2.5}
    name, key = "a call over a small copy_", "eager_over_memcpy"
    return [Target("calls", f"pydrone{x}", name, key, limit, "x", size=(256, 16)) for x, limit in limits.items()]


def _scans(size: tuple[int, int]) -> list[Target]:
    at = {"unit": "x", "size": size}
    found = [Target("gae", "pydrone", f"{x}, over rl-triton's", f"{x}_over_rl-triton", 1.0, **at) for x in CACHES]
    return found + [Target("gae", "pydrone", f"{x}, over a copy's", f"{x}_over_memcpy", 1.3, **at) for x in CACHES]


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
    Target("iteration", "pydrone", "as a CUDA graph", "graph", 1.0, "ms"),
    *(target for size in GPU_SCAN_SIZES for target in _scans(size)),
    Target("gae", "pydrone", "eager call over a copy_'s", "eager_over_memcpy", 2.5, "x"),
    Target("append", "pydrone", "eager call over a copy_'s", "eager_over_memcpy", 2.5, "x"),
    Target("append", "pydrone begin + end", "eager calls over a copy_'s", "eager_over_memcpy", 5, "x"),
    *_calls(),
    *_alone("ppo gradients", "pydrone", "device", "cold", 0.79),
    *_alone("ppo gradients", "pydrone, bfloat16", "device", "cold", 0.60),
    *_alone("ppo minibatch", "pydrone", "launches", "launches", 5, unit=""),
    *_alone("act and store", "pydrone", "launches of a step", "launches", 2, unit=""),
    *_alone("environment step", "pydrone", "launches", "launches", 3, unit=""),
    *_alone("update", "pydrone, captured", "PPO's update", "eager", 13, 8),
    *_alone("training", CAPTURED, "an iteration, quadrotor", "eager", 20, 10),
    *_alone("training on Genesis", CAPTURED, "an iteration, Genesis", "eager", 80, 50),
    Target("training", "rsl_rl on pydrone", "rsl_rl's time over it", "rsl_rl_over_eager", 2.5, "x", True, False),
    Target("training", "rsl_rl on pydrone", "the same, then", "rsl_rl_over_eager", 4, "x", True, False),
    *_alone(HOVER, "pydrone train", "process start to hover", "eager", 6, 3, unit="s"),
)


def _microseconds(unit: str) -> float:
    """How many times are in ``unit`` what :func:`measured` has in microseconds."""
    return {"ms": 1e3, "s": 1e6}.get(unit, 1.0)


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
    if "cold" in cache and row.get("device_time") == "graph":
        found["graph"] = found["cold"]
    for other in ("memcpy", "rl-triton"):
        beside = next((x["cache"] for x in comparison["contenders"] if x["name"] == other), {})
        for figure in cache.keys() & beside.keys():
            found[f"{figure}_over_{other}"] = cache[figure]["median_ms"] / beside[figure]["median_ms"]
    if theirs and "cold" in cache and row.get("device_time") == "graph":
        found["rsl_rl_over_graph"] = theirs["median_ms"] / cache["cold"]["median_ms"]
    return found


def judge(comparisons: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each target and backend, the figure measured at its size (None: none was) and the verdict."""
    rows = {
        (x["operation"], row["name"], (x["num_envs"], x["num_steps"])): measured(x, row)
        for x in comparisons
        for row in x["contenders"]
    }
    found = []
    for target in TARGETS:
        for backend in BACKENDS if target.both else BACKENDS[:1]:
            name = target.contender + backend
            x = rows.get((target.operation, name, target.size), {}).get(target.key)
            reached = None
            if x is not None:
                x /= _microseconds(target.unit)
                reached = x >= target.limit if target.least else x <= target.limit
            verdict = {True: "reached", False: "missed", None: "not measured"}[reached]
            found.append({**target._asdict(), "contender": name, "measured": x, "verdict": verdict})
    return found


def table(verdicts: list[dict[str, Any]]) -> list[str]:
    lines = [f"{'to reach on an ' + GPU:20}{'':28}{'':44}{'target':>12}{'measured':>12}"]
    for x in verdicts:
        limit = f"{'>=' if x['least'] else '<='} {x['limit']:g} {x['unit']}".rstrip()
        figure = "" if x["measured"] is None else f"{x['measured']:.4g} {x['unit']}".rstrip()
        num_envs, num_steps = x.get("size", SIZE)  # earlier files have none
        name = x["name"] + (f", {num_envs}x{num_steps}" if (num_envs, num_steps) != SIZE else "")
        lines.append(f"{x['operation']:20}{x['contender']:28}{name:44}{limit:>12}{figure:>12}  {x['verdict']}")
    return lines
