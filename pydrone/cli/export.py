"""``pydrone export RUN``: writes the policy of a run to a file that runs without pydrone."""

from __future__ import annotations

import argparse
from pathlib import Path

from pydrone.cli.common import fail, not_installed


def main(argv: list[str]) -> int:
    """Runs ``pydrone export ARGV`` and returns the exit status."""
    from pydrone.ppo.exporting import FORMATS, missing

    parser = argparse.ArgumentParser(
        prog="pydrone export",
        description="Write the deterministic policy of a run, with its observation normaliser and action clipping, to "
        "a file that runs without pydrone; see docs/export.md. The actions of the file are compared with those of the "
        "policy before the file is put in place.",
    )
    parser.add_argument("run", metavar="RUN", help="folder of a run (its newest checkpoint is used), or a checkpoint")
    parser.add_argument("--format", choices=list(FORMATS), default="onnx", help="file format (default: onnx)")
    parser.add_argument(
        "--out",
        metavar="FILE",
        help="file to write (default: policy.onnx, policy.pt, policy.safetensors or policy.h beside the checkpoint)",
    )
    parser.add_argument(
        "--clip",
        nargs=2,
        type=float,
        metavar=("LOW", "HIGH"),
        help="clip actions to this range (default: what the environment made of them that the policy was trained in)",
    )
    parser.add_argument(
        "--weights",
        choices=["float32", "float16"],
        default="float32",
        help="what a C header stores the networks' matrices as; it computes in float32 (default: float32)",
    )
    parser.add_argument(
        "--prefix", metavar="NAME", help="what the names in a C header begin with (default: pydrone, as in pydrone_act)"
    )
    options = parser.parse_args(argv)
    if options.format != "c" and (options.prefix is not None or options.weights != "float32"):
        return fail("--prefix and --weights float16: expected with --format c, got " + options.format)
    lacking = missing(options.format)
    if lacking:
        return fail(not_installed(*lacking, extra="export"))
    try:
        print(_export(options))
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        return fail(error)
    return 0


def _export(options: argparse.Namespace) -> str:
    """Writes the file and returns the lines to print."""
    from pydrone.envs.contract import contract
    from pydrone.envs.record import Actions, Record, bounds
    from pydrone.ppo import export
    from pydrone.ppo.trainer import read_checkpoint
    from pydrone.report.runs import checkpoint_of

    path = checkpoint_of(options.run)
    state = read_checkpoint(path)
    try:
        policy = export.policy_of(state)
        record = Record.read(state)
        actions = None if options.clip else export.actions_of(state, policy)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    out = Path(options.out) if options.out else path.parent / f"policy{export.FORMATS[options.format]}"
    metadata = {"env": record.label, "iteration": state["iteration"]}
    sizes = export.sizes(policy)
    groups = state["config"]["ppo"].get("actor_obs", ())
    done = export.save(
        policy,
        out,
        options.format,
        actions or tuple(options.clip),
        metadata,
        contract=contract(record, *sizes, actions or Actions(bounds(options.clip, "--clip")), groups),
        weights=options.weights,
        prefix=options.prefix or "pydrone",
    )
    clipped = actions or "clipped to [{:g}, {:g}]".format(*options.clip)
    remembered = f", with a memory of {done.memory}" if done.memory else ""
    if done.checked_with:
        own = "the policy's with these weights" if done.rounding else "the policy's"
        checked = (
            f"Checked with {done.checked_with} on {done.num_inputs} inputs: actions differ from {own} by at most "
            f"{done.difference:.1e}"
        )
    else:
        checked = "Not checked: there is no C compiler (cc, gcc or clang; CC names another) to run it with"
    return (
        f"{done.path}: {done.num_obs} observations to {done.num_actions} actions, {clipped}{remembered}; from "
        f"iteration {state['iteration']} of {path}\n"
        f"{checked}" + (f"\n{done.rounding}" if done.rounding else "")
    )
