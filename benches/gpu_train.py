"""Whole trainings of the quadrotor on a GPU: constant memory, learning curves beside autograd's, the time to hover.

    python benches/gpu_train.py --out benches/results

Its parts, in this order: ``memory`` compares what is allocated after the fourth and after the last of 301 iterations;
``hover`` times the command from process start until the drones hover, four times, as the first may compile kernels;
``curves`` trains three seeds with pydrone's kernels and with ``--learner torch``. <gpu>-train.json is written after
each part. A second run with ``--resume`` does only what is not in it; no part begins after ``--limit`` seconds. The
exit status is 1 if memory grew or a part failed. `make gpu-train` runs it. ``--device cpu`` tries it out.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))  # which Python's safe path leaves out

import clock as clocks
import machine
import targets
from measurement import in_a_line

from pydrone.envs.quadrotor import Quadrotor
from pydrone.ppo.config import PPOConfig, TrainConfig
from pydrone.ppo.trainer import Trainer
from pydrone.ppo.training.figures import WINDOW

SEEDS, LEARNERS = (1, 2, 3), ("auto", "torch")
EARLY = 4  # iterations after which memory must not grow
HOVERS = 4
SECONDS = 240  # limit for one run of the command


def trainer(options: argparse.Namespace, seed: int, learner: str, iterations: int) -> Trainer:
    env = Quadrotor(options.num_envs, options.device, seed=seed)
    config = TrainConfig(num_steps=options.num_steps, seed=seed, iterations=iterations, ppo=PPOConfig(learner=learner))
    return Trainer(env, config, echo=lambda line: None)


def allocated(device: str) -> dict[str, int]:
    if device == "cpu":
        return {}
    torch.cuda.synchronize()
    names = ("memory_allocated", "memory_reserved")
    return {name: getattr(torch.cuda, name)() for name in names} | {"free": torch.cuda.mem_get_info()[0]}


def memory(options: argparse.Namespace) -> dict[str, Any]:
    """Bytes after EARLY iterations and after the last one; ``grew``: whether what torch has allocated differs."""
    made, seen = trainer(options, 1, "auto", options.memory_iterations), []
    for i in range(1, options.memory_iterations + 1):
        made.iterate()
        if i in (EARLY, options.memory_iterations):
            seen.append({"iteration": i, **allocated(options.device)})
    grew = seen[0].get("memory_allocated") != seen[-1].get("memory_allocated")
    planned = {"buffer": made.buffer.nbytes, "planned": made.planned_nbytes}
    return {"after": seen, "grew": grew, "captured": made._graph is not None, **planned}


def curve(options: argparse.Namespace, seed: int, learner: str) -> dict[str, Any]:
    """Mean episode length and seconds of each iteration, until the mean of the last ones reaches the target."""
    made, lengths, seconds = trainer(options, seed, learner, options.iterations), [], []
    while len(lengths) < options.iterations:
        figures = made.iterate()
        lengths.append(figures["episode_length"])
        seconds.append(figures["time/iteration"])
        if len(lengths) >= WINDOW and statistics.mean(lengths[-WINDOW:]) >= options.target:
            break
    found = {"seed": seed, "learner": learner, "captured": made._graph is not None, "iterations": len(lengths)}
    return found | {"not_fused": made.learner.not_fused, "lengths": lengths, "seconds": seconds}


def hover(options: argparse.Namespace) -> dict[str, Any]:
    """Wall seconds of ``pydrone train`` until it hovers, start and captures included; the last line that it printed."""
    with tempfile.TemporaryDirectory() as folder:
        settings = {"--env": "quadrotor", "--device": options.device, "--num-envs": options.num_envs}
        settings |= {"--num-steps": options.num_steps, "--iterations": options.iterations, "--run-dir": folder}
        settings |= {"--target-episode-length": options.target, "--preset": "genesis-example"}
        command = [sys.executable, "-m", "pydrone", "train", *(str(x) for item in settings.items() for x in item)]
        began = time.perf_counter()
        command += ["--no-live", "--no-tensorboard"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, cwd=folder)
        seconds = time.perf_counter() - began
    if done.returncode:
        raise RuntimeError(f"exit status {done.returncode}: {done.stderr.strip()[-300:]}")
    reached = [line for line in done.stdout.splitlines() if "reached" in line]
    if not reached and options.device != "cpu":
        raise RuntimeError(f"the drones do not hover after {options.iterations} iterations")
    return {"seconds": seconds, "said": reached[-1:]}


def parts(options: argparse.Namespace) -> dict[str, Callable[[], dict[str, Any]]]:
    """What there is to do, by name."""
    found: dict[str, Callable[[], dict[str, Any]]] = {"memory": lambda: memory(options)}
    found |= {f"hover {i}": lambda: hover(options) for i in range(1, HOVERS + 1)}
    for seed in SEEDS:
        for learner in LEARNERS:
            name = f"curves, seed {seed}, --learner {learner}"
            found[name] = lambda seed=seed, learner=learner: curve(options, seed, learner)
    return {name: part for name, part in found.items() if name.split()[0].rstrip(",") in options.parts}


def judged(found: dict[str, Any], options: argparse.Namespace) -> list[dict[str, Any]]:
    """The targets of the time to hover: the median without the first run, which may compile kernels."""
    seconds = [x["seconds"] for name, x in found.items() if name.startswith("hover") and "seconds" in x]
    cache = {"eager": {"median_ms": 1e3 * statistics.median(seconds[1:])}} if len(seconds) > 1 else {}
    row = {"name": "pydrone train", "cache": cache}
    sizes = {"num_envs": options.num_envs, "num_steps": options.num_steps, "per": 1}
    verdicts = targets.judge([{"operation": targets.HOVER, **sizes, "contenders": [row]}])
    return [x for x in verdicts if x["operation"] == targets.HOVER]


def in_words(name: str, part: dict[str, Any]) -> str:
    if "failed" in part:
        return f"{name}: FAILED: {part['failed']}"
    if name == "memory":
        first, last = part["after"][0], part["after"][-1]
        verdict = "GREW" if part["grew"] else "constant"
        return f"memory: {verdict}, after iterations {first['iteration']} and {last['iteration']}: {first}, {last}"
    if name.startswith("hover"):
        return f"{name}: {part['seconds']:.1f} s; {' '.join(part['said'])}"
    median = statistics.median(part["seconds"])
    how = "captured" if part["captured"] else "eager"
    return f"{name}: {part['iterations']} iterations of {1e3 * median:.1f} ms, {how}"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder for <gpu>-train.json; nothing is written without it")
    parser.add_argument("--resume", action="store_true", help="do only what is not in that file, of this commit")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to try it out")
    parser.add_argument(
        "--parts", nargs="+", choices=("memory", "hover", "curves"), default=["memory", "hover", "curves"]
    )
    parser.add_argument("--limit", type=float, default=420.0, help="begin no part after so many seconds")
    parser.add_argument("--num-envs", type=int, default=8192)
    parser.add_argument("--num-steps", type=int, default=100)
    parser.add_argument("--iterations", type=int, default=150, help="of a training that does not reach the target")
    parser.add_argument("--memory-iterations", type=int, default=301)
    parser.add_argument("--target", type=float, default=1000.0, help="mean episode length")
    options = parser.parse_args()
    if options.out is not None and options.device == "cpu":
        raise SystemExit(f"{parser.prog}: --out: a trial's figures are no GPU's; leave --out out")
    return options


def main() -> None:
    options, began = parse(), time.perf_counter()
    try:
        clock = clocks.for_device(options.device)
    except ValueError as error:
        raise SystemExit(f"gpu_train.py: {error}: nothing was trained") from error
    names = ("num_envs", "num_steps", "target", "iterations", "memory_iterations")
    settings = {name: getattr(options, name) for name in names}
    path = options.out and options.out / f"{machine.name(clock)}-train.json"
    known = machine.kept(path, machine.provenance(clock), settings) if options.resume and path else None
    found = {name: x for name, x in (known or {}).get("parts", {}).items() if "failed" not in x}
    left = []
    for name, part in parts(options).items():
        if name in found:
            print(f"{name}: done before")
            continue
        if time.perf_counter() - began > options.limit:
            left.append(name)
            continue
        try:
            found[name] = part()
        except Exception as error:  # the other parts go on
            found[name] = {"failed": in_a_line(error)}
        print(in_words(name, found[name]), flush=True)
        if path:
            document = machine.provenance(clock) | {"sizes": settings, "parts": found}
            machine.write(path, document | {"targets_of": targets.GPU, "targets": judged(found, options)})
    print(*targets.table(judged(found, options)), sep="\n")
    if left:
        print(f"not begun within {options.limit:g} s: {', '.join(left)}; --resume does them")
    if any("failed" in x or x.get("grew") for x in found.values()):
        raise SystemExit("gpu_train.py: memory grew or a part failed, see above")


if __name__ == "__main__":
    main()
