"""Times each kernel with other launch parameters, and in the other layout, on a GPU.

    python benches/gpu_sweep.py --out benches/results

Each variant's outputs are checked before any is timed; then a kernel's variants are timed in turn, round after round.
The row of a variant that is wrong or does not compile says so. The table lists the fastest first; <gpu>-sweep.json has
every figure. `make gpu-sweep` runs it. `--device stand-in --num-envs 5 --num-steps 8` is a trial without a GPU:
Triton's variants are interpreted, CUDA's compiled and not run.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))  # which Python's safe path leaves out

import cases
import clock as clocks
import gpu_variants as variants
import machine
from cases import Case
from clock import Turn
from clock_cuda import CudaClock
from gpu_variants import KERNELS, Variant
from measurement import Absent, Call, Graphed, Kernels, in_a_line
from peers import kernels
from peers.kernels import Agreement
from peers.train import Setting
from workload import Rollout, Size, Truth

FOLDER = machine.ROOT / "build" / "gpu-sweep"


class Ready(NamedTuple):
    """A variant's row, and its launches as graphs if its outputs are right."""

    row: dict
    hot: Turn | None = None
    cold: Turn | None = None


class Row:
    """In place of a Case: a row of bench_ppo.py, prepared anew for each variant, since its memory may depend on it."""

    PREPARE = {
        "ppo_gradients tf32": partial(kernels.gradients, matmul="tf32"),
        "ppo_gradients bfloat16": partial(kernels.gradients, matmul="bfloat16"),
        "clipped_adam": kernels.clipped_adam,
        "ppo_act": kernels.act,
        "quadrotor": kernels.environment,
        "layers": kernels.layer_backward,
    }

    def __init__(self, kernel: str, setting: Setting) -> None:
        self._prepare, self._setting = self.PREPARE[kernel], setting

    def check(self, operation: None, truth: Agreement) -> None:
        self._run = self._prepare(self._setting)
        self._run.call()
        truth.check(self._run.outputs())

    def kernels(self, operation: None) -> Kernels:
        graph = self._run.graph or Graphed(self._run.call)
        return Kernels([graph.call], [graph.call], lambda truth: None, graph.generators)


class Bench(NamedTuple):
    """A kernel's launches, the truth to check their outputs against, and the clock to time them with."""

    case: Case | Row
    truth: Truth | Agreement
    clock: CudaClock
    repeats: int

    def prepare(self, variant: Variant, library: Future | None) -> Ready:
        """Checks the variant and captures its launches. If it fails or cannot run, the row says so."""
        row = {"kernel": variant.kernel, "backend": variant.backend, **variants.constants(variant)}
        row["default"] = not variant.parameters
        try:
            if variant.backend == "triton":
                with variants.launched_with(variant) as operation:
                    return self._captured(row, operation)
            path = library.result()
            if self.clock.on.real:
                return self._captured(row, variants.loaded(variant, path.stem, path))
            row["compiled"] = True
        except Absent as reason:
            row["absent"] = str(reason)
        except Exception as error:  # wrong, not to be compiled, or not to be launched
            row["failed"] = in_a_line(error)
        return Ready(row)

    def _captured(self, row: dict, operation: cases.Operation) -> Ready:
        self.case.check(operation, self.truth)
        self.clock.wait()
        kernels, least = self.case.kernels(operation), self.clock.on.in_a_graph

        def turn(launches: list[Call]) -> Turn:
            times = max(1, least // len(launches))
            return self.clock.replayed(launches, 1, times, generators=kernels.generators)

        hot = turn(kernels.hot)
        return Ready(row, hot, hot if kernels.cold == kernels.hot else turn(kernels.cold))

    def time_in_turn(self, ready: list[Ready]) -> None:
        """Writes medians over the rounds into the rows. A round ends with the default again, to show the spread."""
        runnable = [x for x in ready if x.hot is not None]
        order = [(x, "") for x in runnable] + [(x, "_again") for x in runnable if x.row["default"]]
        for name in ("hot", "cold"):
            seconds: list[list[float]] = [[] for _ in order]
            for turn in range(self.repeats):
                for (x, _), kept in zip(order, seconds, strict=True):
                    kept.append(getattr(x, name)(turn))
            for (x, again), kept in zip(order, seconds, strict=True):
                x.row[f"{name}{again}_us"] = 1e6 * statistics.median(kept)


def table(rows: list[dict]) -> str:
    lines = [f"{'us':32}{'hot':>9}{'cold':>9}"]
    for _, group in itertools.groupby(rows, lambda row: (row["kernel"], row["backend"])):
        for row in sorted(group, key=lambda row: row.get("cold_us", math.inf)):
            constants = [*KERNELS[row["kernel"]][row["backend"] == "triton"], "rows of a warp"]
            notes = [", ".join(f"{name} {row[name]}" for name in constants if name in row)]
            if row["default"]:
                notes.append("the default")
            if "hot_again_us" in row:
                notes.append(f"again {row['hot_again_us']:.2f} and {row['cold_again_us']:.2f}")
            notes += [row.get("failed") or row.get("absent") or "compiled"] if "hot_us" not in row else []
            figures = [f"{row[x]:.2f}" if x in row else "" for x in ("hot_us", "cold_us")]
            lines.append(f"{row['kernel']:24}{row['backend']:8}{figures[0]:>9}{figures[1]:>9}  {'; '.join(notes)}")
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder for <gpu>-sweep.json; nothing is written without it")
    parser.add_argument("--device", choices=("cuda", "stand-in"), default="cuda", help="stand-in: a CPU, to try it out")
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=list(KERNELS))
    parser.add_argument("--backends", nargs="+", choices=("cuda", "triton"), default=["cuda", "triton"])
    parser.add_argument("--variants", type=int, help="at most so many of each kernel, the default first; default: all")
    parser.add_argument("--num-envs", type=int, default=8192)
    parser.add_argument("--num-steps", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--resume", action="store_true", help="leave out the kernels that the file of this commit has")
    parser.add_argument("--limit", type=float, default=420.0, help="begin no kernel after so many seconds")
    options = parser.parse_args()
    refuse(parser, options)
    return options


def refuse(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Ends the command if its options make no sense."""
    for name in ("num_envs", "num_steps", "repeats", "variants"):
        x = getattr(options, name, None)
        if x is not None and x < 1:
            parser.error(f"--{name.replace('_', '-')}: expected at least 1, got {x}")
    if options.out is not None and options.device != "cuda":
        raise SystemExit(f"{parser.prog}: --out: a stand-in's figures are no GPU's; leave --out out")


def chosen(options: argparse.Namespace) -> dict[tuple[str, str], list[Variant]]:
    """The variants to time, by kernel and backend. Triton's come first: meanwhile nvcc compiles the others."""
    found: dict[tuple[str, str], list[Variant]] = {}
    for every in (variants.triton(), variants.cuda()):
        for x in every:
            if x.kernel in options.kernels and x.backend in options.backends:
                found.setdefault((x.kernel, x.backend), []).append(x)
    return {key: group[: options.variants] for key, group in found.items()}


def own_size(text: str, size: Size, real: bool) -> Size:
    """A kernel's own size; without a GPU the sweep's, if that is less."""
    found = Size(*map(int, text.split("x")))
    return found if real else Size(min(found.num_envs, size.num_envs), min(found.num_steps, size.num_steps))


def sweep(
    options: argparse.Namespace, clock: CudaClock, keep: Callable[[list[dict]], None], known: Sequence[dict] = ()
) -> list[dict]:
    """A row for each variant; ``keep`` gets them after each kernel. Graphs are timed: nvcc does not delay these.

    ``known``: rows of an earlier run, whose kernels are left out. No kernel begins after ``options.limit`` seconds.
    """
    size, rows, until = Size(options.num_envs, options.num_steps), list(known), time.monotonic() + options.limit
    real = clock.on.real
    rollout_of = functools.lru_cache(1)(lambda size: Rollout(size, clock.device))
    architecture = "{}{}".format(*torch.cuda.get_device_capability()) if real else "90"
    backend = None if real else "reference"
    done = {(row["kernel"], row["backend"]) for row in known}
    groups = {key: group for key, group in chosen(options).items() if key not in done}
    make = {"gae": cases.gae, "append": cases.append, "gather": cases.gather}
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 2) - 1)) as pool:
        libraries = {
            key: [
                pool.submit(variants.compiled, x, f"pydrone_{key[0]}_{i}".replace(" ", "_"), FOLDER, architecture, real)
                for i, x in enumerate(group)
            ]
            for key, group in groups.items()
            if key[1] == "cuda"
        }
        for key, group in groups.items():
            if time.monotonic() > until:
                print(f"{key[0]}, {key[1]}: not begun within {options.limit:g} s; --resume does it")
                for library in libraries.get(key, ()):
                    library.cancel()
                continue
            if key[0] in variants.ROWS:
                bench = Bench(Row(key[0], Setting(size, clock.device)), Agreement(), clock, options.repeats)
            else:
                operation, *layout = key[0].split()
                rollout = rollout_of(own_size(layout.pop(), size, real) if key[0] in variants.SIZED else size)
                case = make[operation](rollout, backend, clock.cache_bytes, *layout)
                bench = Bench(case, Truth(rollout), clock, options.repeats)
            ready = [bench.prepare(x, library) for x, library in zip(group, libraries.get(key, [None] * len(group)))]
            bench.time_in_turn(ready)
            rows += [x.row for x in ready]
            keep(rows)
    return rows


def main() -> None:
    options, began = parse(), time.perf_counter()
    if options.device == "stand-in":
        os.environ["TRITON_INTERPRET"] = "1"  # read as the kernels are imported
    try:
        clock = clocks.for_device(options.device)
    except ValueError as error:
        raise SystemExit(f"gpu_sweep.py: {error}: nothing was timed") from error
    torch.manual_seed(0)
    path = options.out and options.out / f"{machine.name(clock)}-sweep.json"
    sizes = {"num_envs": options.num_envs, "num_steps": options.num_steps, "repeats": options.repeats}

    def keep(rows: list[dict]) -> None:
        if path:
            machine.write(path, machine.provenance(clock) | {"sizes": sizes, "rows": rows})

    kept = machine.kept(path, machine.provenance(clock), sizes) if options.resume and path else None
    known = kept["rows"] if kept else []
    rows = sweep(options, clock, keep, known)
    print(table(rows))
    trial = "" if clock.on.real else "A trial on the CPU: the figures mean nothing."
    print(f"\n{time.perf_counter() - began:.0f} s", trial)
    if failed := sum("failed" in row for row in rows):
        raise SystemExit(f"gpu_sweep.py: {failed} of {len(rows)} variants failed, see the table")


if __name__ == "__main__":
    main()
