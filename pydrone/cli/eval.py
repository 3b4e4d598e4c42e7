"""``pydrone eval RUN``: flies the policy of a run without exploration noise and reports how well it does."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydrone.cli.common import aligned, device_of, fail, not_installed, quick_imports

if TYPE_CHECKING:
    from pydrone.envs import Randomization
    from pydrone.report.evaluation import Episodes
    from pydrone.report.runs import Run

# For each value of --targets: whether a target moves once it is reached.
TARGETS = {"fixed": (False,), "moving": (True,), "both": (False, True)}
FROM_PYTHON = (
    "fly it from Python by pydrone.report.evaluation.fly(env, policy.mode), with the policy of "
    "pydrone.report.runs.load_policy(runs.load(RUN), env)"
)
COLUMNS = {False: "fixed target", True: "moving targets"}


def main(argv: list[str]) -> int:
    """Runs ``pydrone eval ARGV`` and returns the exit status."""
    args = _parser().parse_args(argv)
    try:
        for line in _evaluate(args) if args.protocol is None else _protocol(args):
            print(line, flush=True)
    except BrokenPipeError:
        raise
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        return fail(error)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pydrone eval",
        description="Fly the policy of a run with deterministic actions, one episode in each environment. Print a "
        "table, and write its figures (JSON) and a picture of the flight paths to the folder of the run.",
    )
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="folder of a run (its newest checkpoint is used), or a checkpoint; several, as of several seeds, with "
        "--protocol",
    )
    parser.add_argument(
        "--protocol",
        choices=("hover",),
        help="fly the held-out episodes of this protocol, docs/evaluation.md, in place of the run's own task; of the "
        "other options it takes --env, --device and --out",
    )
    parser.add_argument(
        "--episodes",
        type=_count,
        default=64,
        metavar="N",
        help="number of episodes, flown at the same time (default: 64)",
    )
    parser.add_argument(
        "--targets",
        choices=TARGETS,
        default="both",
        help="fixed: one target per episode; moving: a new target once one is reached, as in training (default: both)",
    )
    parser.add_argument(
        "--within",
        type=_metres,
        metavar="METRES",
        help="with a fixed target, success is a final distance below this (default: twice the distance that counts as "
        "reached)",
    )
    parser.add_argument("--env", metavar="NAME", help="environment to fly in (default: that of the run)")
    parser.add_argument(
        "--randomize",
        action="store_true",
        help="apply the domain randomisation of the run, or, if it had none, of the hover protocol (default: none)",
    )
    parser.add_argument(
        "--steps",
        type=_count,
        metavar="T",
        help="stop episodes after this many steps (default: their time limit; of drones 1500, or more if trained so)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the targets (default: 0)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda if available, else cpu)")
    parser.add_argument(
        "--out",
        metavar="DIR",
        help="folder for figures and picture (default: the folder of the run; of several runs, the current folder)",
    )
    parser.add_argument(
        "--video",
        metavar="OUT.mp4",
        help="render a video of the first episode, with moving targets unless --targets is fixed, by a Genesis camera",
    )
    return parser


def _evaluate(args: argparse.Namespace) -> Any:
    """Yields the lines to print."""
    import importlib.util

    with quick_imports():
        from pydrone import envs
        from pydrone.envs.record import Record
        from pydrone.ppo.training.progress import in_words
        from pydrone.report import runs, video

    # Check what can be checked before a simulator is built, which takes its time.
    if len(args.runs) > 1:
        raise ValueError(f"RUN: expected one, got {len(args.runs)}; several are for --protocol")
    if args.video is not None:
        if not args.video.lower().endswith(".mp4"):
            raise ValueError(f"--video {args.video}: expected a file name that ends in .mp4")
        if video.missing():
            raise ImportError(f"--video: {not_installed(*video.missing())}")
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError(not_installed("matplotlib"))
    device = device_of(args.device)
    run = runs.load(args.runs[0], device)
    name = args.env or run.environment.buildable(run.checkpoint, FROM_PYTHON)
    options: dict[str, Any] = _task(run, name, args.steps)
    if args.randomize:
        options["randomization"] = _randomization(run)
    if name == run.environment.name:
        options |= run.settings.get("env_kwargs", {})
    yield f"{run.checkpoint}: iteration {run.iteration}, trained in {run.environment.label}"
    env = envs.make(name, num_envs=args.episodes, device=device, seed=args.seed, **options)
    try:
        changed = run.environment.changed(Record.of(env))
        changed.pop("max_episode_length", None)  # the table has it
        if changed:
            yield in_words(changed)
        flown = _fly(args, run, env)
    finally:
        env.close()
    yield from _report(args, run, name, flown)
    paths = flown[-1].paths
    if args.video is not None and paths is not None:
        yield f"Video: {video.render(paths, int(flown[-1].length[0]), args.video, device, args.seed)}"
    elif args.video is not None:
        raise ValueError(f"--video: {name} has no drone to film")


def _randomization(run: Run) -> Randomization:
    """The domain randomisation that the run was trained with, or else the hover protocol's."""
    from pydrone.envs import Randomization
    from pydrone.report import protocol

    ranges = Randomization(**run.settings.get("randomization", {}))
    return ranges if ranges.varies() else protocol.RANGES


def _task(run: Run, name: str, steps: int | None) -> dict[str, Any]:
    """The options of the run's task, where ``name`` is an environment that has them, with episodes of ``steps``.

    By default no shorter than those of Genesis' example: short ones are for training, to begin more of them.
    """
    from pydrone.envs import TaskOptions
    from pydrone.envs.registry import ENVIRONMENTS
    from pydrone.ppo import configfile

    if name not in ENVIRONMENTS:
        return {}
    stored = run.settings.get("task") or {}
    options = TaskOptions(**configfile.checked(TaskOptions, stored, known_only=True)).changed()
    default = TaskOptions.max_episode_length
    return options | {"max_episode_length": steps or max(default, options.get("max_episode_length", 0))}


def _protocol(args: argparse.Namespace) -> Any:
    """Flies the hover protocol; yields the lines to print."""
    with quick_imports():
        from pydrone.report import protocol, runs
        from pydrone.report import protocol_report as report

    parser, used = _parser(), ("runs", "protocol", "env", "device", "out")
    for option, value in vars(args).items():
        if option not in used and value != parser.get_default(option):
            raise ValueError(f"--{option} {value}: expected none with --protocol, which says how it flies")
    device = device_of(args.device)
    loaded = [runs.load(run, device) for run in args.runs]
    name = args.env or loaded[0].environment.buildable(loaded[0].checkpoint, FROM_PYTHON)
    flights, entries = [], []
    env = protocol.environment(name, device)
    try:
        for run in loaded:
            policy = runs.load_policy(run, env)
            memory = {"ended": policy.reset} if policy.recurrent else {}
            env.generator.manual_seed(protocol.VERSION)
            flights.append(protocol.fly(env, policy.mode, **memory))
            entries.append(report.entry(run, flights[-1]))
            yield f"{run.checkpoint}: iteration {run.iteration}, trained in {run.environment.label}"
    finally:
        env.close()
    content = report.whole(name, entries)
    title = f"Hover protocol, {name}, {protocol.EPISODES} episodes a scene"
    if len(loaded) > 1:
        title += f", {len(loaded)} runs"
    spread = ": median (lowest to highest)" if len(loaded) > 1 else ""
    yield f"{title}{spread}\n\n{aligned(report.table(content['summary']), rule=True)}\n"
    out = Path(args.out or (loaded[0].folder if len(loaded) == 1 else "."))
    out.mkdir(parents=True, exist_ok=True)
    figures = out / f"protocol_hover_{name}.json"
    figures.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    yield f"Figures: {figures}"
    yield f"Picture: {report.draw_flights(title, flights, figures.with_suffix('.png'))}"


def _fly(args: argparse.Namespace, run: Run, env: Any) -> list[Episodes]:
    from pydrone.report import evaluation, runs

    policy = runs.load_policy(run, env)
    memory = {"ended": policy.reset} if policy.recurrent else {}
    flown = []
    for resample in TARGETS[args.targets]:
        episodes = evaluation.fly(env, policy.mode, resample=resample, seed=args.seed, max_steps=args.steps, **memory)
        flown.append(episodes)
        if episodes.paths is None:
            break  # no targets: both modes would be the same
    return flown


def _report(args: argparse.Namespace, run: Run, name: str, flown: list[Episodes]) -> Any:
    from pydrone.envs.registry import file_name
    from pydrone.report import evaluation, trajectories

    found = {COLUMNS[x.resampled] if x.paths is not None else name: evaluation.summary(x, args.within) for x in flown}
    title = f"{name}, {args.episodes} episodes, deterministic actions{', randomized' if args.randomize else ''}"
    yield f"{title}\n\n{table(found)}\n"
    if flown[0].paths is not None:
        yield f"{_footnote(flown, args.within)}\n"
    out = run.folder if args.out is None else Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    figures = out / f"eval_{file_name(name)}.json"
    about = {"checkpoint": str(run.checkpoint), "iteration": run.iteration, "env": name, "seed": args.seed}
    about["randomized"] = args.randomize
    if args.randomize:
        about["randomization"] = dataclasses.asdict(_randomization(run))
    figures.write_text(json.dumps(about | {"results": found}, indent=2) + "\n", encoding="utf-8")
    yield f"Figures: {figures}"
    if all(x.paths is not None for x in flown):
        heading = f"{run.checkpoint}, iteration {run.iteration}\n{title}"
        yield f"Picture: {trajectories.draw(heading, flown, out / f'eval_{file_name(name)}.png')}"


def _footnote(flown: list[Episodes], within: float | None) -> str:
    from pydrone.report import evaluation

    paths = flown[0].paths
    assert paths is not None
    within = evaluation.success_distance(paths) if within is None else within
    success = {
        False: f"a distance below {within:g} m from a fixed target",
        True: "at least one moving target reached",
    }
    text = (
        f"Success: no crash, and {', or '.join(success[x.resampled] for x in flown)}. Reached: within "
        f"{paths.at_target:g} m. Distance: the median over all episodes, crashes included, of the median over the last "
        f"{evaluation.FINAL_SECONDS:g} s of an episode, or over the whole of a shorter one."
    )
    return textwrap.fill(text, 100)


def table(found: dict[str, dict[str, Any]]) -> str:
    """A table: a row for each figure of :func:`pydrone.report.evaluation.summary`, a column for each of ``found``."""
    flights = any("success_rate" in figures for figures in found.values())
    labels = {
        "success_rate": ("success rate", lambda x: f"{100 * x:.1f} %"),
        "final_distance": ("distance to the target, last 5 s", lambda x: f"{x:.3f} m"),
        "final_distance_quartiles": ("  its middle half", lambda x: f"{x[0]:.3f} to {x[1]:.3f} m"),
        "targets_reached": ("targets reached per episode", lambda x: f"{x:.2f}"),
        # Without paths there is no task that says what a crash is: an episode may end because it has succeeded.
        "crash_rate": ("crash rate" if flights else "ended before a time limit", lambda x: f"{100 * x:.1f} %"),
        "episode_seconds": ("episode length", lambda x: f"{x:.2f} s"),
        "episode_length": ("episode steps", lambda x: f"{x:.1f}"),
        "episode_return": ("episode reward", lambda x: f"{x:.3f}"),
    }
    rows = [["", *found]]
    for key, (label, text) in labels.items():
        if any(key in figures for figures in found.values()):
            values = [figures.get(key) for figures in found.values()]
            rows.append([label, *("-" if x is None else text(x) for x in values)])
    return aligned(rows, rule=True)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def _metres(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (0 < value < math.inf):
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return value
