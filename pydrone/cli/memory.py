"""``pydrone memory``: what a rollout takes in memory, field by field."""

from __future__ import annotations

import argparse


def main(argv: list[str]) -> int:
    """Prints the plan of :func:`pydrone.memory.plan` and returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="pydrone memory",
        description="What a rollout takes in memory, to the byte, and why it does not grow.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--num-envs", type=int, default=8192, help="environments")
    parser.add_argument("--num-steps", "--num-steps-per-env", type=int, default=100, help="steps of a rollout")
    parser.add_argument("--num-obs", type=int, default=17, help="observations of an environment")
    parser.add_argument("--num-actions", type=int, default=4, help="actions of an environment")
    parser.add_argument("--iterations", "--max-iterations", type=int, default=301, help="iterations of the training")
    parser.add_argument("--capacity", type=int, default=None, help="steps in the ring; one rollout if not given")
    parser.add_argument(
        "--obs-dtype", choices=("float32", "float16", "bfloat16"), default="float32", help="how observations are stored"
    )
    parser.add_argument(
        "--max-episode-length", type=int, default=None, help="steps; sizes the final observations' pool"
    )
    parser.add_argument("--field", action="append", default=[], metavar="NAME=WIDTH", help="a further field, like mu=4")
    parser.add_argument("--reused-minibatch", type=int, default=None, help="samples of a minibatch that is kept")
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
