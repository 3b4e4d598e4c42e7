"""``pydrone train``: trains a policy until the last iteration, a target, or Ctrl-C."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import os
import sys
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

from pydrone.cli.common import device_of, fail, not_installed, quick_imports
from pydrone.ops.packages import needed

if TYPE_CHECKING:
    import torch

    from pydrone.envs import Env
    from pydrone.ppo.config import TrainConfig


FROM_PYTHON = "resume it from Python by pydrone.ppo.trainer.Trainer(env, TrainConfig(resume=...)).train()"


def main(argv: list[str]) -> int:
    """Runs ``pydrone train ARGV`` and returns the exit status."""
    with contextlib.ExitStack() as stack:
        if "WORLD_SIZE" in os.environ and os.environ.get("RANK", "0") != "0":
            # Only rank 0 reports progress; every rank prints its errors to stderr.
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
        try:
            config = _parse(argv)
        except ImportError as error:
            return fail(error)
        except BrokenPipeError:
            raise
        except (ValueError, OSError) as error:
            return fail(error)
        lacking = _lacking(config)
        return fail(lacking) if lacking else _train(config)


def _parse(argv: list[str]) -> TrainConfig:
    """The configuration of the command line, of ``--config`` and of the checkpoint that is resumed."""
    with needed("tyro", "pydrone train", '"pydrone-rl[train]"'):
        import tyro

    from pydrone.ppo import presets
    from pydrone.ppo.config import TrainConfig

    base = _base(argv)
    return tyro.cli(
        tyro.conf.OmitArgPrefixes[for_tyro(TrainConfig, base)],
        args=argv,
        prog="pydrone train",
        description="Train a drone with PPO. --config FILE reads settings from a TOML file, such as the config.toml in "
        "the folder of a run; options on the command line override it. --preset NAME starts from other defaults "
        "(with --config only if it is named): "
        f"{'; '.join(f'{name}: {preset.help}' for name, preset in presets.PRESETS.items())}. Ctrl-C stops after the "
        "current iteration and saves a checkpoint.",
    )


def _lacking(config: TrainConfig) -> str | None:
    """The message about packages that this configuration needs and that are not installed; None if there are none."""
    needed = {"matplotlib": True, "tensorboard": config.tensorboard, "genesis": config.env.startswith("genesis-")}
    missing = [name for name, wanted in needed.items() if wanted and importlib.util.find_spec(name) is None]
    if missing:
        return not_installed(*missing)
    if config.wandb and importlib.util.find_spec("wandb") is None:
        return not_installed("wandb", extra="wandb")
    return None


def _train(config: TrainConfig) -> int:
    with quick_imports():
        from pydrone.envs.registry import check, file_name
        from pydrone.ppo import distributed
        from pydrone.ppo.config import default_num_envs
        from pydrone.ppo.trainer import Trainer, nothing_to_do, read_checkpoint
        from pydrone.ppo.training import checkpoint, progress
        from pydrone.report import learning_curve, live

    with contextlib.ExitStack() as stack:
        try:
            # Check what can be checked before a folder is made and a simulator is built, which takes its time.
            launch = distributed.Launch()
            several = launch.world_size > 1
            device = device_of(config.device, launch.local_rank if several else None)
            backend = _backend(device)
            # All at once: the sizes are checked against each other.
            config = dataclasses.replace(
                config,
                device=device.type if several else str(device),  # each process has its own index
                num_envs=config.num_envs or default_num_envs(device.type, config.env),
                run_dir=config.run_dir or str(Path("runs", file_name(config.env), time.strftime("%Y-%m-%d_%H-%M-%S"))),
            )
            iteration = 0
            if config.resume is not None:
                state = read_checkpoint(config.resume)
                iteration = state["iteration"]
                if iteration >= config.iterations:
                    print(nothing_to_do(iteration, config.iterations))
                    return 0
                progress.changes(state["config"], config, config.resume)
            obs = check(config.env, **_env_options(config))
            if isinstance(obs, Mapping) and "policy" not in obs and not config.ppo.actor_obs:
                # A Dict's parts have names of their own.
                config.ppo = dataclasses.replace(config.ppo, actor_obs=tuple(obs))
            ranks = distributed.join(launch, device)
            run_dir = _make_run_dir(config.run_dir) if ranks.rank == 0 else None
            where = f"{config.num_envs} environments on {device}"
            if several:
                where = f"{launch.world_size} processes of {config.num_envs} environments on {device.type}"
            print(f"{config.env}: {where}, run folder {run_dir}", flush=True)
            if backend is not None:
                print(backend, flush=True)
            # The seed depends on the iteration, so that a resumed run draws other targets than the first one did.
            env = _make_env(config, device, ranks.seed(config.seed + iteration))
            stack.callback(env.close)
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
            return fail(error)
        try:
            with view or contextlib.nullcontext():
                outcome = trainer.train()
            distributed.leave(ranks)
        except BrokenPipeError:
            raise
        except FloatingPointError as error:
            return fail(error) if ranks.rank == 0 else 1  # every rank raises it
        except (OSError, distributed.PeerLost, checkpoint.NotStorable) as error:
            return fail(error)
    if outcome.figures and ranks.rank == 0:
        try:
            print(f"Learning curve: {learning_curve.plot(run_dir)}")
        except ImportError as error:
            return fail(error)
    return 0


def _base(argv: list[str]) -> dict[str, Any]:
    """The settings that replace the defaults: those of the resumed checkpoint, or else of the preset, overridden by
    those of ``--config``. With ``--config`` there is no preset unless it is named.

    Removes ``--config FILE`` and ``--preset NAME`` from ``argv`` and replaces the folder in ``--resume FOLDER`` by its
    newest checkpoint.
    """
    from pydrone.envs import check_name
    from pydrone.ppo import configfile, presets
    from pydrone.ppo.config import TrainConfig

    options = argparse.ArgumentParser(prog="pydrone train", add_help=False, allow_abbrev=False)
    options.add_argument("--config")
    options.add_argument("--preset")
    options.add_argument("--resume")
    options.add_argument("--env")
    # Further ways to write a setting of three values.
    options.add_argument("--capture", nargs="?", const="True")
    options.add_argument("--no-capture", dest="capture", action="store_const", const="False")
    given, argv[:] = options.parse_known_args(argv)
    try:
        base = {} if given.config is None else configfile.read(given.config)
    except OSError as error:
        raise OSError(f"--config {given.config}: cannot be read: {error.strerror}") from error
    if given.capture is not None:
        argv += ["--capture", given.capture]
    if given.env is not None:
        argv += ["--env", given.env]
    elif "env" in base:
        check_name(base["env"], f"--config {given.config}: env")
    resume = given.resume or base.get("resume")
    if resume in (None, "None"):
        if given.preset is None and given.config is not None:
            return base  # a file means the same as before there were presets, a run's own among them
        return configfile.merged(presets.settings(given.preset, given.env), base)
    if given.preset is not None:
        raise ValueError(f"--preset {given.preset}: expected none with --resume, the settings are the checkpoint's")
    from pydrone.envs.record import Record
    from pydrone.ppo.trainer import read_checkpoint

    path = _checkpoint(Path(resume))
    argv += ["--resume", str(path)]
    state = read_checkpoint(path)
    saved = state["config"]
    try:
        if given.env is None and "env" not in base:
            Record.read(state).buildable(path, FROM_PYTHON)
    except ValueError as error:
        raise ValueError(f"--resume {resume}: {error}") from None
    try:
        saved = configfile.checked(TrainConfig, saved, known_only=True)
    except ValueError as error:
        raise ValueError(f"{path}: config: {error}") from None
    # A run resumed by its folder continues in that folder; one resumed by a checkpoint gets a new one.
    saved |= {"run_dir": str(path.parent) if Path(resume).is_dir() else None, "resume": None}
    return configfile.merged(saved, base)


def _checkpoint(path: Path) -> Path:
    """The checkpoint that ``--resume`` names: the file itself, or the newest one in a folder that can be loaded."""
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


def _backend(device: torch.device) -> str | None:
    """A line that explains why the slow backend runs although nobody asked for it; None if it does not run."""
    import pydrone
    from pydrone.ops.dispatch import select

    slow = select(device).name == "reference" and not os.environ.get("PYDRONE_BACKEND")
    reason = pydrone.backends()["cpu"] if device.type == "cpu" else f"there is none for {device.type}"
    return f"Backend reference, plain PyTorch and slower: no native library ({reason})" if slow else None


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

    return make(config.env, num_envs=config.num_envs, device=device, seed=seed, **_env_options(config))


def _env_options(config: TrainConfig) -> dict[str, Any]:
    options = config.task.changed() | config.env_kwargs
    if config.randomization.varies():
        options["randomization"] = config.randomization
    return options


def for_tyro(cls: type, values: Mapping[str, Any] = {}) -> type:
    """A subclass of the configuration ``cls`` whose annotations give tyro the help texts and aliases of its fields.

    ``values``, nested like ``cls``, replace defaults.
    """
    import tyro

    hints = get_type_hints(cls)
    fields = []
    for field in dataclasses.fields(cls):
        hint: Any = hints[field.name]
        if field.default_factory is not dataclasses.MISSING and not dataclasses.is_dataclass(hint):
            default: Any = {"default_factory": partial(values.get, field.name, field.default_factory())}
        else:
            default = {"default": values.get(field.name, field.default)}
        if dataclasses.is_dataclass(hint):
            hint = for_tyro(hint, values.get(field.name, {}))
            default = {"default_factory": hint}
        aliases = tuple(field.metadata["aliases"])
        described = tyro.conf.arg(help=field.metadata["help"], aliases=aliases or None)
        fields.append((field.name, Annotated[hint, described], dataclasses.field(**default, metadata=field.metadata)))
    # As a subclass, what tyro builds is an instance of cls and is validated like any other.
    frozen = cls.__dataclass_params__.frozen  # type: ignore[attr-defined]
    return dataclasses.make_dataclass(cls.__name__, fields, bases=(cls,), frozen=frozen)
