"""The command line: ``pydrone COMMAND``. A command's module is imported when the command is called."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import sys
from collections.abc import Sequence

from pydrone._version import __version__

# A command is ``main(argv)`` of the module of its name in this package.
COMMANDS = {
    "train": "train a policy",
    "eval": "fly a run's policy: success rate, flight paths, video",
    "plot": "plot learning curves of one or several runs, with their spread over seeds",
    "memory": "the memory that a rollout takes, field by field",
    "doctor": "check this installation: versions, devices, kernels, speed",
    "export": "export a policy as ONNX, TorchScript or safetensors",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs ``pydrone COMMAND ...`` and returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="pydrone",
        description="PPO for drones: rollout storage, GAE and minibatches as kernels.",
        epilog="`pydrone COMMAND --help` lists a command's options with their defaults.\n\ncommands:\n"
        + "\n".join(f"  {name:8}{text}" for name, text in COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"pydrone {__version__}")
    parser.add_argument("command", choices=list(COMMANDS), metavar="COMMAND", help=f"{' or '.join(COMMANDS)}")
    argv = list(sys.argv[1:] if argv is None else argv)
    _calm_threads()
    # What follows the command is the command's own.
    command = parser.parse_args(argv[:1]).command
    try:
        status = importlib.import_module(f"pydrone.cli.{command}").main(argv[1:])
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


def _calm_threads() -> None:
    """Has OpenMP's threads sleep soon after they run out of work; in effect if torch is not imported yet.

    By default they spin for a millisecond, in which a core shared with any other process is lost to both: an iteration
    of 1.6 s took 12 s beside one busy process. Short spins keep the speed of a quiet machine.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")


if __name__ == "__main__":
    sys.exit(main())
