"""Compares trainers on one environment, seed by seed: rsl_rl, rsl_rl on pydrone, and pydrone's own trainer,
with gradients by autograd or by one operation.

    make compare ARGS="--env quadrotor --seeds 1"

Each trains until the mean length of the episodes that ended in the last ten iterations reaches ``--target``. Lengths
are counted at the environment, in the same way for all. The settings are TrainConfig's defaults. Writes JSON, and a PNG
of learning curves and of the time of an iteration by part.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import json
import math
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
from clock import CpuClock
from machine import provenance
from peers.train import ON_PYDRONE, _runner_config
from workload import Size

import pydrone.envs

WINDOW = 10
TRAINERS = ("rsl_rl", "rsl_rl on pydrone", "pydrone, --learner torch", "pydrone")


class Probe:
    """Wraps an environment; measures its time and the lengths of the episodes that end."""

    def __init__(self, env: Any) -> None:
        self._env = env
        self.begin()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._env, name)

    def begin(self) -> None:
        self._ages = torch.zeros(self._env.num_envs, dtype=torch.long, device=self._env.device)
        self.seconds, self._steps, self._ended = 0.0, 0, 0

    def step(self, actions: torch.Tensor) -> Any:
        start = time.perf_counter()
        result = self._env.step(actions)
        self.seconds += time.perf_counter() - start
        self._ages += 1
        self._steps += int(self._ages[result.dones].sum())
        self._ended += int(result.dones.sum())
        self._ages[result.dones] = 0
        return result

    def lap(self) -> tuple[float, float]:
        """(mean length of the episodes that ended, seconds) since the last call."""
        length = self._steps / self._ended if self._ended else math.nan
        seconds, self.seconds, self._steps, self._ended = self.seconds, 0.0, 0, 0
        return length, seconds


class Clock:
    """Adds up the seconds, by name, of the calls and generators that it wraps."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    def call(self, name: str, function: Callable) -> Callable:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[name] += time.perf_counter() - start

        return timed

    def generator(self, name: str, function: Callable) -> Callable:
        def timed(*args: Any, **kwargs: Any) -> Iterator[Any]:
            items = function(*args, **kwargs)
            advance = self.call(name, lambda: next(items, None))
            while (item := advance()) is not None:
                yield item

        return timed

    def lap(self) -> dict[str, float]:
        seconds, self.seconds = dict(self.seconds), defaultdict(float)
        return seconds


def _rsl_rl(env: Probe, size: Size, seed: int, clock: Clock, class_name: str) -> Callable[[], None]:
    from rsl_rl.runners import OnPolicyRunner

    from pydrone.integrations.rsl_rl_env import VecEnvWrapper

    torch.manual_seed(seed)
    config = _runner_config(SimpleNamespace(size=size))
    config["algorithm"]["class_name"] = class_name
    with contextlib.redirect_stdout(io.StringIO()):
        runner = OnPolicyRunner(VecEnvWrapper(env), config, log_dir=None, device="cpu")
    algorithm, storage = runner.alg, runner.alg.storage
    storage.add_transition = clock.call("storage", storage.add_transition)
    storage.clear = clock.call("storage", storage.clear)
    storage.mini_batch_generator = clock.generator("minibatches", storage.mini_batch_generator)
    algorithm.compute_returns = clock.call("gae", algorithm.compute_returns)
    first = [True]

    def iterate() -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            runner.learn(1, init_at_random_ep_len=first[0])
        first[0] = False

    return iterate


def _pydrone(env: Probe, size: Size, seed: int, clock: Clock, learner: str) -> Callable[[], None]:
    from pydrone.ppo.config import PPOConfig, TrainConfig
    from pydrone.ppo.trainer import Trainer

    ppo = PPOConfig(learner=learner)
    trainer = Trainer(env, TrainConfig(num_envs=size.num_envs, num_steps=size.num_steps, seed=seed, ppo=ppo))
    trainer.buffer.minibatches = clock.generator("minibatches", trainer.buffer.minibatches)

    def iterate() -> None:
        figures = trainer.iterate()
        clock.seconds["storage"] += figures["time/storage"]
        clock.seconds["gae"] += figures["time/gae"]

    return iterate


def train(name: str, env: Probe, size: Size, seed: int, iterations: int, target: float) -> dict[str, Any]:
    """Runs one training; returns the figures of every iteration."""
    clock = Clock()
    env.reset()
    env.begin()
    if name.startswith("pydrone"):
        iterate = _pydrone(env, size, seed, clock, "torch" if name.endswith("torch") else "auto")
    else:
        iterate = _rsl_rl(env, size, seed, clock, "PPO" if name == "rsl_rl" else ON_PYDRONE)
    rows: list[dict[str, float]] = []
    for _ in range(iterations):
        start = time.perf_counter()
        iterate()
        seconds = time.perf_counter() - start
        length, stepped = env.lap()
        row = {"seconds": seconds, "env": stepped, **clock.lap(), "length": length}
        row["networks"] = seconds - sum(row[x] for x in ("env", "storage", "gae", "minibatches"))
        rows.append(row)
        lengths = [x["length"] for x in rows[-WINDOW:] if not math.isnan(x["length"])]
        if len(rows) >= WINDOW and lengths and statistics.mean(lengths) >= target:
            break
    return {"trainer": name, "seed": seed, "iterations": len(rows), "rows": rows}


def summary(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A line for each trainer: medians over all iterations except each run's first; the iterations of each seed."""
    lines = []
    for name in dict.fromkeys(run["trainer"] for run in runs):
        mine = [run for run in runs if run["trainer"] == name]
        rows = [row for run in mine for row in run["rows"][1:]]
        parts = ("seconds", "env", "storage", "gae", "minibatches", "networks")
        line = {part: statistics.median(row[part] for row in rows) for part in parts}
        lines.append({"trainer": name, "iterations": [run["iterations"] for run in mine], **line})
    return lines


def draw(document: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    curves, bars = figure.subplots(1, 2)
    colors = dict(zip(TRAINERS, ("#c9a227", "#d9b95b", "#5a9bd4", "#1b6ca8")))
    for run in document["runs"]:
        shown = run["trainer"] if run["seed"] == document["seeds"][0] else None
        curves.plot([row["length"] for row in run["rows"]], color=colors[run["trainer"]], lw=1, label=shown)
    curves.set_xlabel("iteration")
    curves.set_ylabel("mean length of ended episodes, steps")
    curves.legend()
    left = [0.0] * len(document["summary"])
    names = [line["trainer"] for line in document["summary"]]
    for part, color in zip(
        ("env", "networks", "minibatches", "gae", "storage"), ("#d0d0d0", "#8a8a8a", "#1b6ca8", "#c9a227", "#b5483a")
    ):
        width = [line[part] for line in document["summary"]]
        bars.barh(names, width, left=left, color=color, label=part)
        left = [a + b for a, b in zip(left, width)]
    bars.set_xlabel("seconds an iteration, median")
    bars.invert_yaxis()
    bars.legend(fontsize=8)
    figure.suptitle(f"{document['env']}, {document['num_envs']} x {document['num_steps']}, {document['device']}")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="genesis-hover", help="one of pydrone.envs (default: genesis-hover)")
    parser.add_argument("--num-envs", type=int, default=1024)
    parser.add_argument("--num-steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--iterations", type=int, default=150, help="at most this many (default: 150)")
    parser.add_argument("--target", type=float, default=1000.0, help="mean episode length to stop at (default: 1000)")
    parser.add_argument("--trainers", nargs="+", choices=TRAINERS, default=list(TRAINERS))
    parser.add_argument("--out", type=Path, default=Path("benches/results/hover"), help="files, without .json and .png")
    args = parser.parse_args()
    size = Size(args.num_envs, args.num_steps)
    env = Probe(pydrone.envs.make(args.env, num_envs=args.num_envs, seed=args.seeds[0]))
    document: dict[str, Any] = {
        **provenance(CpuClock()),
        "env": args.env,
        "num_envs": args.num_envs,
        "num_steps": args.num_steps,
        "seeds": args.seeds,
        "target": args.target,
        "runs": [],
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for i, seed in enumerate(args.seeds):
        # Another order for each seed: the machine may slow down over time.
        for name in args.trainers[i % len(args.trainers) :] + args.trainers[: i % len(args.trainers)]:
            document["runs"].append(train(name, env, size, seed, args.iterations, args.target))
            gc.collect()
            document["summary"] = summary(document["runs"])
            run, line = document["runs"][-1], next(x for x in document["summary"] if x["trainer"] == name)
            print(f"{name}, seed {seed}: {run['iterations']} iterations, {line['seconds']:.3f} s each", flush=True)
            args.out.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n")
    draw(document, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
