"""``pydrone memory``: the memory of a rollout buffer, field by field."""

from __future__ import annotations

import argparse


def main(argv: list[str]) -> int:
    """Prints the plan of :func:`pydrone.memory.plan` and returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="pydrone memory",
        description="Print the memory of a rollout buffer, tensor by tensor and to the byte, and why it does not grow.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--num-envs", type=int, default=8192, help="number of environments")
    parser.add_argument(
        "--num-steps", "--num-steps-per-env", type=int, default=100, help="steps of each environment in a rollout"
    )
    parser.add_argument("--num-obs", type=int, default=17, help="numbers in an observation")
    parser.add_argument("--num-actions", type=int, default=4, help="numbers in an action")
    parser.add_argument(
        "--iterations",
        "--max-iterations",
        type=int,
        default=301,
        help="iterations of training, for the comparison with keeping every rollout",
    )
    parser.add_argument("--capacity", type=int, default=None, help="steps that the ring holds; None: one rollout")
    parser.add_argument(
        "--obs-dtype",
        choices=("float32", "float16", "bfloat16"),
        default="float32",
        help="dtype of the stored observations",
    )
    parser.add_argument(
        "--max-episode-length",
        type=int,
        default=None,
        help="steps after which an episode is truncated; determines the size of the pool of final observations",
    )
    parser.add_argument(
        "--field",
        action="append",
        default=[],
        metavar="NAME=WIDTH",
        help="another field to store, such as mu=4; may be repeated",
    )
    parser.add_argument(
        "--reused-minibatch",
        type=int,
        default=None,
        help="samples in a minibatch, if minibatches(reuse=True) keeps its tensors",
    )
    args = parser.parse_args(argv)
    import torch

    from pydrone.memory import plan, render

    try:
        fields = dict(map(_field, args.field))
        made = plan(
            args.num_envs,
            args.num_steps,
            args.num_obs,
            args.num_actions,
            args.iterations,
            args.reused_minibatch,
            capacity=args.capacity,
            obs_dtype=getattr(torch, args.obs_dtype),
            max_episode_length=args.max_episode_length,
            fields=fields,
        )
    except (TypeError, ValueError) as error:
        parser.error(str(error))
    print(render(made))
    return 0


def _field(text: str) -> tuple[str, int]:
    name, _, width = text.partition("=")
    if not width.isdecimal():
        raise ValueError(f"--field: expected NAME=WIDTH, like mu=4, got {text!r}")
    return name, int(width)
