"""``pydrone export RUN``: writes the policy of a run to a file that runs without pydrone."""

from __future__ import annotations

import argparse
from pathlib import Path

from pydrone.cli.common import fail, not_installed


def main(argv: list[str]) -> int:
    """Runs ``pydrone export ARGV`` and returns the exit status."""
    from pydrone.ppo import export

    parser = argparse.ArgumentParser(
        prog="pydrone export",
        description="Write the deterministic policy of a run, with its observation normaliser and action clipping, to "
        "a file that runs without pydrone; see docs/export.md. The actions of the file are compared with those of the "
        "policy before the file is put in place.",
    )
    parser.add_argument("run", metavar="RUN", help="folder of a run (its newest checkpoint is used), or a checkpoint")
    parser.add_argument("--format", choices=list(export.FORMATS), default="onnx", help="file format (default: onnx)")
    parser.add_argument(
        "--out",
        metavar="FILE",
        help="file to write (default: policy.onnx, policy.pt or policy.safetensors beside the checkpoint)",
    )
    parser.add_argument(
        "--clip",
        nargs=2,
        type=float,
        metavar=("LOW", "HIGH"),
        help="clip actions to this range (default: what the environment made of them that the policy was trained in)",
    )
    options = parser.parse_args(argv)
    lacking = export.missing(options.format)
    if lacking:
        return fail(not_installed(*lacking, extra="export"))
    try:
        print(_export(options))
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        return fail(error)
    return 0


def _export(options: argparse.Namespace) -> str:
    """Writes the file and returns the lines to print."""
    from pydrone.envs.record import Record
    from pydrone.ppo import export
    from pydrone.ppo.trainer import read_checkpoint
    from pydrone.report.runs import checkpoint_of

    path = checkpoint_of(options.run)
    state = read_checkpoint(path)
    try:
        policy = export.policy_of(state)
        label = Record.read(state).label
        actions = None if options.clip else export.actions_of(state, policy)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    out = Path(options.out) if options.out else path.parent / f"policy{export.FORMATS[options.format]}"
    metadata = {"env": label, "iteration": state["iteration"]}
    done = export.save(policy, out, options.format, actions or tuple(options.clip), metadata)
    clipped = actions or "clipped to [{:g}, {:g}]".format(*options.clip)
    remembered = f", with a memory of {done.memory}" if done.memory else ""
    return (
        f"{done.path}: {done.num_obs} observations to {done.num_actions} actions, {clipped}{remembered}; from "
        f"iteration {state['iteration']} of {path}\n"
        f"Checked with {done.checked_with} on {done.num_inputs} inputs: actions differ from the policy's by at most "
        f"{done.difference:.1e}"
    )
