"""What a session leaves behind: the summary at the end of the terminal's output, a JSON file, a chart."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from harness import Comparison, Result, cache_bytes

PACKAGES = [
    "torch",
    "pydrone-rl",
    "rsl-rl-lib",
    "skrl",
    "torchrl",
    "tensordict",
    "stable-baselines3",
    "rl-games",
    "pufferlib",
    "rl-triton",
    "numpy",
    "triton",
]


def rows(comparison: Comparison) -> Iterator[dict[str, Any]]:
    """A contender's figures. ``ratio``: its time over that of the pydrone it is set against (above 1: slower)."""
    results = comparison.results
    for result in results.values():
        row: dict[str, Any] = {"name": result.name, "against": result.against, "launches": result.launches}
        row |= {"useful_bytes": result.useful_bytes, "gae_share": result.share}
        row["problem"] = f"WRONG: {result.wrong}" if result.wrong else result.absent and f"absent: {result.absent}"
        row["cache"] = {
            cache: _figures(result, results[result.against], results.get("memcpy"), cache) for cache in result.seconds
        }
        yield row


def _figures(result: Result, ours: Result, memcpy: Result | None, cache: str) -> dict[str, float | int | None]:
    median, base = result.median(cache), ours.median(cache)
    assert median is not None
    speed = result.useful_bytes / median
    copied = memcpy and memcpy.median(cache)
    return {
        "median_ms": median * 1e3,
        "iqr_ms": result.spread(cache) * 1e3,
        "turns": len(result.seconds[cache]),
        "ratio": median / base if base else None,
        "gb_per_s": speed / 1e9 if result.useful_bytes else None,
        "of_memcpy": speed * copied / memcpy.useful_bytes if copied else None,  # type: ignore[union-attr]
    }


def print_summary(line: Callable[[str], None], comparisons: list[Comparison]) -> None:
    """The table. Every contender has its line, with the reason where it has no figures."""
    line("")
    line("pydrone and its peers: median of a call, interquartile range in brackets; 'x' is its time over pydrone's")
    line("(of that pydrone which stores the same fields); GB/s of the bytes that must be read and written; launches")
    line("as dispatched by PyTorch (-: not seen by it); GAE: its share of the iteration.")
    for comparison in comparisons:
        line("")
        line(f"{comparison.operation}, {comparison.num_envs} envs x {comparison.num_steps} steps")
        if comparison.cold:
            line(f"  cold: {comparison.cold}")
        if comparison.hot:
            line(f"  hot: {comparison.hot}")
        caches = sorted({cache for result in comparison.results.values() for cache in result.seconds})
        head = "".join(f"{cache + ' ms':>12} {'':9}{'x':>7}{'GB/s':>8}{'memcpy':>8}" for cache in caches)
        line(f"  {'':24}{head}{'launches':>10}{'GAE':>8}")
        for row in rows(comparison):
            if row["problem"]:
                line(f"  {row['name']:24}  {row['problem']}")
                continue
            cells = "".join(_cells(row["cache"][cache]) for cache in caches)
            launches = "-" if row["launches"] is None else str(row["launches"])
            share = "" if row["gae_share"] is None else f"{row['gae_share']:.2%}"
            line(f"  {row['name']:24}{cells}{launches:>10}{share:>8}")


def _cells(figures: dict[str, Any]) -> str:
    ratio, speed, part = figures["ratio"], figures["gb_per_s"], figures["of_memcpy"]
    spread = f"({figures['iqr_ms']:.3g})"
    return (
        f"{figures['median_ms']:12.3f} {spread:9}"
        + (f"{ratio:7.2f}" if ratio else f"{'':7}")
        + (f"{speed:8.1f}" if speed else f"{'':8}")
        + (f"{part:8.0%}" if part else f"{'':8}")
    )


def machine_name(device: str) -> str:
    """The processor's or the GPU's name, as a file's name."""
    name = torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else cpu_name()
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def provenance(device: str) -> dict[str, Any]:
    """What a figure was measured with: command, commit, machine, versions."""
    return {
        "command": " ".join([_program(), *sys.argv[1:]]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "device": torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "cache_bytes": cache_bytes(torch.device(device)),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
    }


def write(folder: Path, comparisons: list[Comparison], device: str) -> list[Path]:
    """MACHINE.json and MACHINE.png in ``folder``; the chart only where matplotlib is."""
    folder.mkdir(parents=True, exist_ok=True)
    document = {
        **provenance(device),
        "comparisons": [
            {
                "operation": x.operation,
                "num_envs": x.num_envs,
                "num_steps": x.num_steps,
                "cold": x.cold,
                "contenders": list(rows(x)),
            }
            for x in comparisons
        ],
    }
    path = folder / f"{machine_name(device)}.json"
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    written = [path]
    try:
        from chart import draw
    except ImportError:
        return written
    draw(document, path.with_suffix(".png"))
    return [*written, path.with_suffix(".png")]


def _program() -> str:
    name = Path(sys.argv[0]).name
    return "pytest" if name in ("__main__.py", "pytest", "py.test") else f"python benches/{name}"


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Of the working tree, with a + where it has changes; None without git."""
    here = Path(__file__).parent
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True)
        dirty = subprocess.run(["git", "status", "--porcelain"], cwd=here, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.stdout.strip() + ("+" if dirty.stdout.strip() else "")
