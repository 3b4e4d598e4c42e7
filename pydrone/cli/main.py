"""The command line: ``pydrone COMMAND``. Imports of weight wait until a command needs them."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import importlib.util
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

from pydrone._version import __version__

if TYPE_CHECKING:
    import torch

    from pydrone.envs import Env
    from pydrone.ppo.config import TrainConfig


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
    try:
        status = COMMANDS[command][0](argv[1:])
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("pydrone: interrupted", file=sys.stderr)
        return 130  # 128 + SIGINT, as shells count
    except BrokenPipeError:
        # Whoever read along has gone. Python flushes once more at its exit, which must find something to write to.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # 128 + SIGPIPE
    return status


def train(argv: list[str]) -> int:
    """``pydrone train``: trains a policy until the last iteration, a target, or Ctrl-C."""
    with contextlib.ExitStack() as stack:
        if "WORLD_SIZE" in os.environ and os.environ.get("RANK", "0") != "0":
            # Of several processes the first says what happens; what fails, each says on stderr.
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
        return _train(argv)


def _train(argv: list[str]) -> int:
    try:
        import tyro
    except ImportError:
        return _missing("tyro")
    from pydrone.ppo.config import TrainConfig, default_num_envs

    try:
        base = _base(argv)
        config = tyro.cli(
            tyro.conf.OmitArgPrefixes[_described(TrainConfig, base)],
            args=argv,
            prog="pydrone train",
            description="Train a drone to hover with PPO. --config FILE takes settings from a TOML file, as each run's "
            "folder has one; the command line wins. Ctrl-C ends after the iteration in hand, with a checkpoint.",
        )
    except ModuleNotFoundError as error:
        return _missing(error.name or str(error))
    except BrokenPipeError:
        raise
    except (ValueError, OSError) as error:
        return _fail(error)
    needed = {"matplotlib": True, "tensorboard": config.tensorboard, "genesis": config.env.startswith("genesis-")}
    missing = [name for name, wanted in needed.items() if wanted and importlib.util.find_spec(name) is None]
    if missing:
        return _missing(*missing)
    if config.wandb and importlib.util.find_spec("wandb") is None:
        return _missing("wandb", extra="wandb")

    from pydrone.ppo import distributed
    from pydrone.ppo.trainer import Trainer, nothing_to_do, read_checkpoint
    from pydrone.report import learning_curve, live

    env = None
    try:
        # All that can be told before a simulator is built, which takes its time, and before a folder is made.
        try:
            launch = distributed.Launch()
            several = launch.world_size > 1
            device = _device(config.device, launch.local_rank if several else None)
            backend = _backend(device)
            # Replaced as a whole, so that the sizes are checked with each other.
            config = dataclasses.replace(
                config,
                device=device.type if several else str(device),  # each process has its own number
                num_envs=config.num_envs or default_num_envs(device.type),
                run_dir=config.run_dir or str(Path("runs", config.env, time.strftime("%Y-%m-%d_%H-%M-%S"))),
            )
            iteration = 0 if config.resume is None else read_checkpoint(config.resume)["iteration"]
            if iteration >= config.iterations:
                print(nothing_to_do(iteration, config.iterations))
                return 0
            ranks = distributed.join(launch, device)
            run_dir = _make_run_dir(config.run_dir) if ranks.rank == 0 else None
            where = f"{config.num_envs} environments on {device}"
            if several:
                where = f"{launch.world_size} processes of {config.num_envs} environments on {device.type}"
            print(f"{config.env}: {where}, run folder {run_dir}", flush=True)
            if backend is not None:
                print(backend, flush=True)
            # A resumed run meets other targets than the first one did.
            env = _make_env(config, device, ranks.seed(config.seed + iteration))
            view = None
            if config.live and ranks.rank == 0 and live.possible(sys.stdout):
                view = live.LiveView(f"{config.env}, {where}, {run_dir}")
            echo = view.echo if view else lambda line: print(line, flush=True)
            trainer = Trainer(env, config, run_dir, echo, view.show if view else None, ranks)
            print(trainer.buffer)
            print(f"Memory of the rollout and its minibatches: {trainer.planned_nbytes / 1e6:.1f} MB", flush=True)
        except BrokenPipeError:
            raise
        except (ValueError, OSError, RuntimeError, ImportError) as error:
            return _fail(error)
        try:
            with view or contextlib.nullcontext():
                outcome = trainer.train()
            distributed.leave(ranks)
        except BrokenPipeError:
            raise
        except FloatingPointError as error:
            return _fail(error) if ranks.rank == 0 else 1  # raised on all of them
        except (OSError, distributed.PeerLost) as error:
            return _fail(error)
    finally:
        if env is not None:
            env.close()
    if outcome.figures and ranks.rank == 0:
        print(f"Learning curve: {learning_curve.plot(run_dir)}")
    return 0


def _base(argv: list[str]) -> dict[str, Any]:
    """What stands in for the defaults: settings of the checkpoint that is resumed, over them those of ``--config``.

    Takes ``--config FILE`` out of ``argv`` and writes the checkpoint meant by ``--resume RUN_OR_FILE`` into it.
    """
    from pydrone.ppo import configfile
    from pydrone.ppo.config import TrainConfig

    options = argparse.ArgumentParser(prog="pydrone train", add_help=False, allow_abbrev=False)
    options.add_argument("--config")
    options.add_argument("--resume")
    given, argv[:] = options.parse_known_args(argv)
    try:
        base = {} if given.config is None else configfile.read(given.config)
    except OSError as error:
        raise OSError(f"--config {given.config}: cannot be read: {error.strerror}") from error
    resume = given.resume or base.get("resume")
    if resume in (None, "None"):
        return base
    from pydrone.ppo.trainer import read_checkpoint

    path = _checkpoint(Path(resume))
    argv += ["--resume", str(path)]
    saved = read_checkpoint(path)["config"]
    try:
        saved = configfile.checked(TrainConfig, saved, known_only=True)
    except ValueError as error:
        raise ValueError(f"{path}: config: {error}") from None
    # The first run's folder is gone on in where the folder was named.
    saved |= {"run_dir": str(path.parent) if Path(resume).is_dir() else None, "resume": None}
    return configfile.merged(saved, base)


def _checkpoint(path: Path) -> Path:
    """The checkpoint that ``--resume`` means: a file, or a folder's newest that can be loaded."""
    from pydrone.ppo.trainer import CHECKPOINT_KEYS
    from pydrone.ppo.training import checkpoint

    if not path.is_dir():
        if not path.is_file():
            raise ValueError(f"--resume {path}: no such file or folder")
        return path
    said = lambda why: print(f"Passed over: {why}", flush=True)  # noqa: E731
    newest = checkpoint.newest(path, CHECKPOINT_KEYS, said)
    if newest is None:
        raise ValueError(f"--resume {path}: expected a run's folder with a checkpoint model_ITERATION.pt, found none")
    print(f"Resuming from {newest}", flush=True)
    return newest


def _device(name: str | None, local_rank: int | None = None) -> torch.device:
    """The device asked for, there to be used; ``local_rank``: among several processes on this machine."""
    import torch

    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise ValueError(f"--device {name}: expected cpu, cuda, cuda:1, ...") from None
    if local_rank is not None and device.type == "cuda":
        if device.index is not None:
            raise ValueError(f"--device {name}: expected cuda, each of several processes takes that of its LOCAL_RANK")
        device, name = torch.device("cuda", local_rank), f"cuda:{local_rank}, of LOCAL_RANK"
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {name}: this PyTorch finds no CUDA device")
    if device.type == "cuda" and device.index is not None:
        if device.index >= torch.cuda.device_count():
            raise ValueError(f"--device {name}: expected one of {torch.cuda.device_count()} CUDA devices, from cuda:0")
        torch.cuda.set_device(device)  # kernels and events go to the current one
    return device


def _backend(device: torch.device) -> str | None:
    """A line on why the slow backend runs without having been asked for; None where it does not."""
    import pydrone
    from pydrone.ops.dispatch import select

    slow = select(device).name == "reference" and not os.environ.get("PYDRONE_BACKEND")
    reason = pydrone.backends()["cpu"] if device.type == "cpu" else f"there is none for {device.type}"
    return f"Backend reference, plain PyTorch and slower, for want of the native library: {reason}" if slow else None


def _make_run_dir(path: str) -> Path:
    run_dir = Path(path)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"--run-dir {path}: cannot be made: {error.strerror}") from error
    if not os.access(run_dir, os.W_OK):
        raise OSError(f"--run-dir {path}: cannot be written to")
    return run_dir


def _make_env(config: TrainConfig, device: torch.device, seed: int) -> Env:
    from pydrone.envs import make

    options = config.task.changed()
    if config.randomization.varies():
        options["randomization"] = config.randomization
    return make(config.env, num_envs=config.num_envs, device=device, seed=seed, **options)


def memory(argv: list[str]) -> int:
    """``pydrone memory``: what a rollout takes, field by field."""
    from pydrone import memory

    return memory.main(argv) or 0


def _command(name: str) -> Callable[[list[str]], int]:
    """``main`` of ``pydrone.cli.NAME``, imported once it is called."""
    return lambda argv: importlib.import_module(f"pydrone.cli.{name}").main(argv)


COMMANDS = {
    "train": (train, "train a policy"),
    "eval": (_command("eval"), "fly the policy of a run: a table, a picture, a video"),
    "plot": (_command("plot"), "learning curves of runs, with their spread over seeds"),
    "memory": (memory, "the memory that a rollout takes, field by field"),
    "doctor": (_command("doctor"), "check this installation: versions, backends, kernels, speed"),
    "export": (_command("export"), "a trained policy as ONNX, TorchScript or safetensors"),
}


def _calm_threads() -> None:
    """Has OpenMP's threads sleep soon after they run out of work; in effect if torch is not imported yet.

    By default they spin for a millisecond, in which a core shared with any other process is lost to both: an iteration
    of 1.6 s took 12 s beside one busy process. Short spins keep the speed of a quiet machine.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def _described(cls: type, values: Mapping[str, Any] = {}) -> type:
    """The configuration ``cls`` with its fields' help texts and further names as tyro wants them.

    ``values``, nested as it is, stand in for defaults.
    """
    import tyro

    hints = get_type_hints(cls)
    fields = []
    for field in dataclasses.fields(cls):
        hint: Any = hints[field.name]
        default: Any = {"default": values.get(field.name, field.default)}
        if dataclasses.is_dataclass(hint):
            hint = _described(hint, values.get(field.name, {}))
            default = {"default_factory": hint}
        aliases = tuple(field.metadata["aliases"])
        described = tyro.conf.arg(help=field.metadata["help"], aliases=aliases or None)
        fields.append((field.name, Annotated[hint, described], dataclasses.field(**default, metadata=field.metadata)))
    # A subclass, so that what tyro builds is checked as any other configuration and is one.
    frozen = cls.__dataclass_params__.frozen  # type: ignore[attr-defined]
    return dataclasses.make_dataclass(cls.__name__, fields, bases=(cls,), frozen=frozen)


def _missing(*modules: str, extra: str = "train") -> int:
    use = "what training needs" if extra == "train" else "it"
    return _fail(f'{", ".join(modules)} not installed; `pip install "pydrone-rl[{extra}]"` installs {use}')


def _fail(error: Exception | str) -> int:
    """One line on stderr, whatever line breaks the message has."""
    message = " ".join(str(error).split()) or type(error).__name__
    print(f"pydrone: {message}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
