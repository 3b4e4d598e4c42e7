"""Times the operations on a GPU, for the native and the Triton backend, beside what they replace and other packages.

    python benches/gpu_bench.py --out benches/results

Correctness first, against the float64 loop of workload.py. Then, as medians: device time of one launch as a CUDA graph
repeats it, with its data in the L2 cache (hot) and with inputs rotated that are larger than it (cold), and the whole
eager call. A table, the figures to reach, and <gpu>.json with commit, versions and command, written after each part.
`make gpu-bench` runs it; `--device cpu --num-envs 64` is a trial.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))  # which Python's safe path leaves out

from gpu import iterations, machine, operations, others, targets
from gpu.clock import Clock, in_a_line
from workload import Rollout, Size, Truth

# In this order: a capture that fails, another package's or a training's, may leave the next part unable to run.
PARTS = ("operations", "iterations", "others", "trainings")


def table(rows: list[dict], copy_gb_s: float) -> str:
    lines = [f"device copy: {copy_gb_s:.0f} GB/s", ""]
    lines.append(f"{'us':24}{'backend':22}{'launches':>9}{'hot':>9}{'cold':>9}{'eager':>11}{'graph':>9}  cold GB/s")
    for row in rows:
        profiled = "*" if row.get("device_time") == "profiler" else ""
        numbers = [f"{row[key]:.2f}" if key in row else "" for key in ("hot_us", "cold_us", "eager_us", "graph_us")]
        numbers[:2] = [x and x + profiled for x in numbers[:2]]
        notes = [f"{row['cold_gb_s']:.0f} ({100 * row['of_copy']:.0f} %)"] if "cold_gb_s" in row else []
        if "host_waits" in row:
            notes.append(f"launched by the host {row['host_launches']}, waited {row['host_waits']}")
        if "of_rsl_rl" in row and row["backend"] != "rsl_rl":
            notes.append(f"{row['of_rsl_rl']:.2f} of rsl_rl's time")
        note = next((f"{key}: {row[key]}" for key in ("absent", "failed") if key in row), ", ".join(notes))
        launches = f"{row['launches']:.4g}" if row.get("launches") else ""
        lines.append(
            f"{row['what']:24}{row['backend']:22}{launches:>9}"
            f"{numbers[0]:>9}{numbers[1]:>9}{numbers[2]:>11}{numbers[3]:>9}  {note}"
        )
    if any(row.get("device_time") == "profiler" for row in rows):
        lines.append("* by the profiler, kernels alone: not captured as a graph")
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder for <gpu>.json; nothing is written without it")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to try this script out")
    parser.add_argument("--backends", nargs="+", help="default: cuda triton; on a CPU: cpu")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="some go to <gpu>-<parts>.json")
    return machine.parsed(parser)


def main() -> None:
    options, began = parse(), time.perf_counter()
    clock = Clock(options.device, options.repeats)
    torch.manual_seed(0)
    cache, copy_gb_s = machine.cache_bytes(clock), machine.copy_bandwidth(clock)
    rollout = Rollout(Size(options.num_envs, options.num_steps), options.device)
    scan = Rollout(rollout.size, options.device, everything=False)
    truth, rows = Truth(rollout), []
    backends = options.backends or (["cuda", "triton"] if clock.cuda else ["cpu"])

    def of_operations() -> list[dict]:
        return [row for backend in backends for row in operations.rows(rollout, truth, backend, clock, cache)]

    work: dict[str, Callable[[], list[dict]]] = {
        "operations": of_operations,
        "iterations": lambda: iterations.storage(rollout, truth, backends, clock),
        "others": lambda: [*others.gae(scan, truth, clock, cache), *others.storage(rollout, truth, clock)],
        "trainings": lambda: iterations.trainings(clock, *rollout.size),
    }
    suffix = "" if set(options.parts) == set(PARTS) else "-" + "-".join(options.parts)
    seconds: dict[str, float] = {}
    for part in dict.fromkeys(options.parts):
        start = time.perf_counter()
        try:
            rows += work[part]()
        except AssertionError as error:
            raise SystemExit(f"gpu_bench.py: {part}: {in_a_line(error)}; not timed") from error
        seconds[part] = round(time.perf_counter() - start, 1)
        targets.derive(rows, copy_gb_s)
        verdicts = targets.judge(rows, backends)
        if options.out is not None:
            sizes = {"num_envs": options.num_envs, "num_steps": options.num_steps, "repeats": options.repeats}
            found = {"sizes": sizes, "seconds": seconds, "copy_gb_s": copy_gb_s, "rows": rows}
            path = machine.write(options.out, suffix, found | {"targets_of": targets.GPU, "targets": verdicts})
    print(table(rows, copy_gb_s), "", targets.table(verdicts), sep="\n")
    print(f"\nThe targets are for an {targets.GPU} at 8192 x 100.", end=" ")
    print("" if clock.cuda else "A trial on the CPU: the figures mean nothing.")
    if options.out is not None:
        print(f"{path}, {time.perf_counter() - began:.0f} s: {seconds}")
    if failed := [f"{row['what']}, {row['backend']}" for row in rows if "failed" in row]:
        raise SystemExit(f"gpu_bench.py: failed: {'; '.join(failed)}")


if __name__ == "__main__":
    main()
