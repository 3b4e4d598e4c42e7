"""Times each operation on both GPU backends, eager and as a graph, at several sizes: is each size's default the faster?

    python benches/gpu_backends.py --out benches/results

Eager: whole calls of a buffer in a row, each backend in turn. Graph: device time of the launches. `make gpu-sweep` runs
it; `--device stand-in` is a trial without a GPU.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))  # which Python's safe path leaves out

import cases
import clock as clocks
import machine
from clock import Turn
from clock_cuda import CudaClock
from contenders import PER
from measurement import Result
from peers import ours
from workload import Rollout, Size

SIZES = [(256, 24), (4096, 24), (8192, 100), (65536, 24)]
# What `pydrone.ops.dispatch` takes by itself.
DEFAULT = {"eager": "cuda", "graph": "triton"}
OPERATIONS = {
    "gae": (ours.gae, cases.gae),
    "append": (ours.append, cases.append),
    "gather": (ours.epoch, cases.gather),
}
CALLS = {"gather": "minibatch epoch"}
NOISE = 1.05


def turns(operation: str, rollout: Rollout, backend: str, clock: CudaClock) -> dict[str, tuple[Turn, int]]:
    """Of an eager call and of a launch in a graph: what to time, and how many operations it does."""
    prepare, make = OPERATIONS[operation]
    reference = backend if clock.on.real else "reference"
    run = cases.timed(prepare, make, clock.cache_bytes, reference)(rollout)
    run.call()
    per = PER.get(CALLS.get(operation, operation), lambda size: 1)(rollout.size)
    result = Result(operation, operation, 0)
    return {
        "eager": (clock.turn(None, [run], "eager", per, result), per),
        "graph": (clock.replayed(run.kernels.hot, 1, clock.on.in_a_graph), 1),
    }


def compare(clock: CudaClock, sizes: list[tuple[int, int]], repeats: int) -> list[dict]:
    """A row for each size, operation and kind of call, with microseconds of an operation by backend."""
    rows = []
    for size in sizes:
        rollout = Rollout(Size(*size), clock.device)
        for operation in OPERATIONS:
            ready = {backend: turns(operation, rollout, backend, clock) for backend in ("cuda", "triton")}
            for kind in DEFAULT:
                seconds: dict[str, list[float]] = {backend: [] for backend in ready}
                for turn in range(repeats):
                    for backend, found in ready.items():
                        measure, per = found[kind]
                        seconds[backend].append(measure(turn) / per)
                us = {f"{backend}_us": 1e6 * statistics.median(x) for backend, x in seconds.items()}
                rows.append({"num_envs": size[0], "num_steps": size[1], "operation": operation, "kind": kind, **us})
    return rows


def slower(row: dict) -> bool:
    """Whether the default is slower than the other backend, by more than noise."""
    default = DEFAULT[row["kind"]]
    other = "triton" if default == "cuda" else "cuda"
    return row[f"{default}_us"] > NOISE * row[f"{other}_us"]


def table(rows: list[dict]) -> str:
    lines = [f"{'us':28}{'cuda':>10}{'triton':>10}"]
    for row in rows:
        name = f"{row['num_envs']}x{row['num_steps']} {row['operation']}, {row['kind']}"
        note = f"  the default, {DEFAULT[row['kind']]}, is slower" if slower(row) else ""
        lines.append(f"{name:28}{row['cuda_us']:10.2f}{row['triton_us']:10.2f}{note}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder for <gpu>-backends.json; nothing is written without it")
    parser.add_argument("--device", choices=("cuda", "stand-in"), default="cuda", help="stand-in: a CPU, to try it out")
    parser.add_argument("--repeats", type=int, default=30)
    options = parser.parse_args()
    if options.device == "stand-in":
        os.environ["TRITON_INTERPRET"] = "1"  # read as the kernels are imported
    try:
        clock = clocks.for_device(options.device)
    except ValueError as error:
        raise SystemExit(f"gpu_backends.py: {error}: nothing was timed") from error
    torch.manual_seed(0)
    rows = compare(clock, SIZES if clock.on.real else [(3, 8)], options.repeats)
    print(table(rows))
    if options.out and clock.on.real:
        machine.write(options.out / f"{machine.name(clock)}-backends.json", machine.provenance(clock) | {"rows": rows})
    if not clock.on.real:
        print("A trial on the CPU: the figures mean nothing.")


if __name__ == "__main__":
    main()
