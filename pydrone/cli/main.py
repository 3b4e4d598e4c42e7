"""The command line: ``pydrone COMMAND``. The module of a command is imported when the command is called."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import sys
from collections.abc import Sequence

from pydrone._version import __version__

# Each is `main(argv)` in the module of that name.
COMMANDS = {
    "train": "train a policy",
    "eval": "fly a run's policy: success rate, flight paths, video",
    "plot": "plot learning curves of one or several runs, with their spread over seeds",
    "memory": "memory of a rollout buffer, field by field",
    "doctor": "check this installation: versions, devices, kernels, speed",
    "export": "export a policy as ONNX, TorchScript or safetensors",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs ``pydrone COMMAND ...`` and returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="pydrone",
        description="PPO for drones: rollout storage, GAE and minibatches as kernels.",
        epilog="commands:\n"
        + "\n".join(f"  {name:8}{text}" for name, text in COMMANDS.items())
        + "\n\n`pydrone COMMAND --help` lists the options of a command with their defaults.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"pydrone {__version__}")
    parser.add_argument("command", choices=list(COMMANDS), metavar="COMMAND", help="one of the commands below")
    argv = list(sys.argv[1:] if argv is None else argv)
    _calm_threads()
    # The arguments after the command are for the command to parse.
    command = parser.parse_args(argv[:1]).command
    try:
        status = importlib.import_module(f"pydrone.cli.{command}").main(argv[1:])
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("pydrone: interrupted", file=sys.stderr)
        return 130  # 128 + SIGINT, as shells count
    except BrokenPipeError:
        # The reader of our output has gone. Python flushes stdout again at exit, which must not fail.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # 128 + SIGPIPE
    return status


def _calm_threads() -> None:
    """Lets idle OpenMP threads sleep sooner. Must run before torch is imported.

    By default they spin for a millisecond, and a core shared with another process is lost to both for that time: an
    iteration of 1.6 s took 12 s beside one busy process. Short spins cost nothing on a quiet machine.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")


if __name__ == "__main__":
    sys.exit(main())
