"""The command line: ``pydrone train`` and ``pydrone memory``. Imports of weight wait until a command needs them."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, get_type_hints

from pydrone._version import __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Runs ``pydrone COMMAND ...`` and returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="pydrone",
        description="PPO for drones: rollout storage, GAE and minibatches as kernels.",
        epilog="`pydrone COMMAND --help` lists a command's options with their defaults.\n\ncommands:\n"
        + "\n".join(f"  {name:8}{text}" for name, (_, text) in COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"pydrone {__version__}")
    parser.add_argument("command", choices=list(COMMANDS), metavar="COMMAND", help=f"{' or '.join(COMMANDS)}")
    argv = list(sys.argv[1:] if argv is None else argv)
    _calm_threads()
    # What follows the command is the command's own.
    command = parser.parse_args(argv[:1]).command
    return COMMANDS[command][0](argv[1:])


def train(argv: list[str]) -> int:
    """``pydrone train``: trains a policy until the last iteration, a target, or Ctrl-C."""
    try:
        import tyro
    except ImportError:
        return _missing("tyro")
    from pydrone.ppo.config import TrainConfig, default_num_envs

    config = tyro.cli(
        tyro.conf.OmitArgPrefixes[_described(TrainConfig)],
        args=argv,
        prog="pydrone train",
        description="Train a drone to hover with PPO. Ctrl-C ends after the iteration in hand, with a checkpoint.",
    )
    needed = {"matplotlib": True, "tensorboard": config.tensorboard, "genesis": config.env == "genesis-hover"}
    missing = [name for name, wanted in needed.items() if wanted and importlib.util.find_spec(name) is None]
    if missing:
        return _missing(*missing)

    import torch

    from pydrone import report
    from pydrone.envs import make
    from pydrone.ppo.trainer import Trainer

    device = torch.device(config.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        return _fail(f"--device {config.device}: this PyTorch finds no CUDA device")
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)  # kernels and events go to the current one
    if config.resume is not None and not Path(config.resume).is_file():
        return _fail(f"--resume {config.resume}: no such file")
    config.device, config.num_envs = str(device), config.num_envs or default_num_envs(device.type)
    run_dir = Path(config.run_dir or Path("runs", config.env, time.strftime("%Y-%m-%d_%H-%M-%S")))
    config.run_dir = str(run_dir)
    print(f"{config.env}: {config.num_envs} environments on {device}, run folder {run_dir}", flush=True)
    env = make(config.env, num_envs=config.num_envs, device=device, seed=config.seed)
    try:
        trainer = Trainer(env, config, run_dir, echo=lambda line: print(line, flush=True))
        print(trainer.buffer, flush=True)
        outcome = trainer.train()
    except FloatingPointError as error:
        return _fail(str(error))
    finally:
        env.close()
    if outcome.figures:
        print(f"Learning curve: {report.plot(run_dir)}")
    return 0


def memory(argv: list[str]) -> int:
    """``pydrone memory``: what a rollout takes, field by field."""
    from pydrone import memory

    return memory.main(argv) or 0


COMMANDS = {
    "train": (train, "train a policy"),
    "memory": (memory, "the memory that a rollout takes, field by field"),
}


def _calm_threads() -> None:
    """Has OpenMP's threads sleep soon after they run out of work; in effect if torch is not imported yet.

    By default they spin for a millisecond, in which a core shared with any other process is lost to both: an iteration
    of 1.6 s took 12 s beside one busy process. Short spins keep the speed of a quiet machine.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def _described(cls: type) -> type:
    """The configuration ``cls`` with its fields' help texts and further names as tyro wants them."""
    import tyro

    hints = get_type_hints(cls)
    fields = []
    for field in dataclasses.fields(cls):
        hint: Any = hints[field.name]
        default: Any = {"default": field.default}
        if dataclasses.is_dataclass(hint):
            hint = _described(hint)
            default = {"default_factory": hint}
        aliases = tuple(field.metadata["aliases"])
        described = tyro.conf.arg(help=field.metadata["help"], aliases=aliases or None)
        fields.append((field.name, Annotated[hint, described], dataclasses.field(**default)))
    # A subclass, so that what tyro builds is checked as any other configuration and is one.
    return dataclasses.make_dataclass(cls.__name__, fields, bases=(cls,))


def _missing(*modules: str) -> int:
    return _fail(f'{", ".join(modules)} not installed; `pip install "pydrone-rl[train]"` installs what training needs')


def _fail(message: str) -> int:
    print(f"pydrone: {message}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
