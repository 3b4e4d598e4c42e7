"""Profiles one cold launch of each kernel with Nsight Compute: bytes moved, occupancy, why warps stall.

    python benches/gpu_profile.py

For each backend it writes build/gpu-logs/ncu-<backend>.ncu-rep, for ncu-ui, and the same as text and CSV, and prints a
short table. It does not lock the GPU's clocks (--clock-control none): compare the times of `make gpu-bench` instead.
"""

from __future__ import annotations

import argparse
import csv
import re
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # which Python's safe path leaves out

from gpu_checks import LOGS, ROOT, cuda_tool

SECTIONS = ("LaunchStats", "Occupancy", "SpeedOfLight", "MemoryWorkloadAnalysis", "WarpStateStats")
METRICS = ("gpu__time_duration.sum", "dram__bytes_read.sum", "dram__bytes_write.sum")
SECONDS = 240  # limit for one backend
# Columns of ncu's raw page, and their headings in the table.
FIGURES = {
    "gpu__time_duration.sum": "us",
    "dram__bytes_read.sum": "read MB",
    "dram__bytes_write.sum": "written MB",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "dram %",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy %",
    "launch__registers_per_thread": "registers",
    "launch__grid_size": "blocks",
}
UNITS = {"second": 1e6, "msecond": 1e3, "usecond": 1, "nsecond": 1e-3, "s": 1e6, "ms": 1e3, "us": 1, "ns": 1e-3}
UNITS |= {"byte": 1e-6, "Kbyte": 1e-3, "Mbyte": 1, "Gbyte": 1e3}
NAMESPACES = re.compile(r"^void |pydrone::|\(anonymous namespace\)::|<unnamed>::")
STALL = re.compile(r"issue_stalled_(\w+?)_per_(?:issue_active|warp_active)")


def launch(backend: str, device: str, num_envs: int, num_steps: int) -> None:
    """One launch of each operation between the profiler's start and stop, after a check of its outputs."""
    import cases
    import torch
    from clock import for_device
    from workload import Rollout, Size, Truth

    from pydrone.ops import dispatch

    clock = for_device(device)
    rollout = Rollout(Size(num_envs, num_steps), clock.device)
    truth, ops = Truth(rollout), dispatch.select(torch.device(clock.device), backend)
    for case in (
        *(cases.gae(rollout, backend, clock.cache_bytes, layout) for layout in cases.LAYOUTS),
        cases.append(rollout, backend),
        cases.gather(rollout, backend),
    ):
        operation = getattr(ops, case.operation)
        case.check(operation, truth)
        clock.wait()
        if clock.kind == "cuda":
            torch.cuda.cudart().cudaProfilerStart()
        operation(*case.hot[0])
        clock.wait()
        if clock.kind == "cuda":
            torch.cuda.cudart().cudaProfilerStop()
        print(f"{backend}: {case.operation}, {case.nbytes / 1e6:.2f} MB useful")


def in_unit(number: str, unit: str, heading: str) -> str:
    """One of ncu's numbers in the heading's unit, or with its own unit if that is unknown."""
    x = float(number.replace(",", ""))
    if heading.split()[-1] not in ("us", "MB"):
        return f"{x:.4g}"
    return f"{x * UNITS[unit]:.4g}" if unit in UNITS else f"{x:.4g} {unit}"


def summary(text: str) -> list[dict[str, str]]:
    """A row for each kernel, from the CSV of ncu's raw page, whose second line holds the units."""
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        raise ValueError(f"expected ncu's CSV, got {text[:200]!r}")
    units, *kernels = csv.DictReader(lines[start:])
    found = []
    for kernel in kernels:
        row = {"kernel": NAMESPACES.sub("", kernel["Kernel Name"])[:60]}
        for name, heading in FIGURES.items():
            if kernel.get(name):
                row[heading] = in_unit(kernel[name], units[name], heading)
        stalls: dict[str, float] = {}
        for name, x in kernel.items():
            reason = STALL.search(name or "")
            if reason and x and reason[1] != "selected" and not reason[1].endswith("_not_issued"):
                stalls[reason[1]] = float(x.replace(",", ""))
        longest = sorted(stalls.items(), key=lambda item: -item[1])[:4]
        row["stalls, cycles an instruction"] = ", ".join(f"{reason} {x:.1f}" for reason, x in longest)
        found.append(row)
    return found


def table(rows: list[dict[str, str]]) -> str:
    names = ["kernel", *FIGURES.values(), "stalls, cycles an instruction"]
    width = {name: max(len(name), *(len(row.get(name, "")) for row in rows)) for name in names}
    lines = [dict(zip(names, names)), *rows]
    return "\n".join("  ".join(f"{row.get(name, ''):{width[name]}}" for name in names).rstrip() for row in lines)


def profile(ncu: str, backend: str, arguments: list[str]) -> list[dict[str, str]]:
    report, own = LOGS / f"ncu-{backend}.ncu-rep", [sys.executable, str(Path(__file__).resolve())]
    command = [ncu, "--clock-control", "none", "--cache-control", "all", "--profile-from-start", "off"]
    command += [x for section in SECTIONS for x in ("--section", section)] + ["--metrics", ",".join(METRICS)]
    command += ["-o", str(report), *own, "--launch", backend, *arguments]
    report.unlink(missing_ok=True)
    path = LOGS / f"ncu-{backend}.log"
    try:
        with path.open("w") as log:
            done = subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, timeout=SECONDS)
        problem = f"exit status {done.returncode}"
    except subprocess.TimeoutExpired:
        problem = f"stopped after {SECONDS} s"
    if problem != "exit status 0" or not report.is_file():
        words = path.read_text().splitlines()[-8:]
        raise SystemExit("\n".join([f"gpu_profile.py: ncu, {backend}: {problem}", *words]))
    pages = {"details": [".txt", "--print-details", "all"], "raw": [".csv", "--csv"]}
    for page, (suffix, *options) in pages.items():
        command = [ncu, "--import", str(report), "--page", page, *options]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        report.with_suffix(suffix).write_text(text)
    return summary(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backends", nargs="+", choices=("cuda", "triton"), default=["cuda", "triton"])
    parser.add_argument("--launch", metavar="BACKEND", help="only make the launches; for ncu")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to try --launch out")
    parser.add_argument("--num-envs", type=int, default=8192)
    parser.add_argument("--num-steps", type=int, default=100)
    options = parser.parse_args()
    if options.launch:
        launch(options.launch, options.device, options.num_envs, options.num_steps)
        return
    ncu = cuda_tool("ncu")
    if ncu is None:
        raise SystemExit("gpu_profile.py: ncu was not found, neither on PATH nor in the CUDA toolkit: nothing profiled")
    LOGS.mkdir(parents=True, exist_ok=True)
    sizes = ["--num-envs", str(options.num_envs), "--num-steps", str(options.num_steps)]
    for backend in options.backends:
        print(table(profile(ncu, backend, sizes)), end="\n\n")
    print(f"logs: {LOGS.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
