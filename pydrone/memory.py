"""What a rollout takes, to the byte: the task's four fields, everything resident, and what each option saves.

MB = 10^6 bytes, MiB = 2^20. The explanation stands in docs/memory.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from pydrone.ops.arguments import positive
from pydrone.rollout.layout import Allocation, Layout

__all__ = ["MemoryPlan", "plan", "render"]


@dataclass(frozen=True)
class MemoryPlan:
    """The plan of one buffer.

    rollout: the four fields of one rollout as a trainer would keep them, flags as int32. resident: every tensor that
    the buffer holds. iterations: of a training, for ``kept``. savings: (option, bytes it saves of ``resident``).
    """

    rollout: tuple[Allocation, ...]
    resident: tuple[Allocation, ...]
    iterations: int
    savings: tuple[tuple[str, int], ...] = ()

    @property
    def rollout_nbytes(self) -> int:
        return sum(x.nbytes for x in self.rollout)

    @property
    def nbytes(self) -> int:
        """Bytes resident, equal to ``RolloutBuffer.nbytes``, however many iterations there are."""
        return sum(x.nbytes for x in self.resident)

    @property
    def kept_nbytes(self) -> int:
        """Bytes if the rollouts of all iterations were kept."""
        return self.iterations * self.rollout_nbytes


def plan(
    num_envs: int = 8192,
    num_steps: int = 100,
    obs: object = 17,
    actions: object = 4,
    iterations: int = 301,
    reused_minibatch: int | None = None,
    **options: object,
) -> MemoryPlan:
    """The memory of a :class:`~pydrone.buffer.RolloutBuffer` with these arguments.

    Args:
        num_envs, num_steps, obs, actions: as the buffer's.
        iterations: of the training.
        reused_minibatch: samples of a minibatch, where ``minibatches(reuse=True)`` keeps its tensors.
        **options: the buffer's capacity, obs_dtype, fields, max_episode_length and final_obs_rows.
    """
    positive("iterations", iterations)
    layout = Layout(num_envs, num_steps, obs, actions, **options)
    if reused_minibatch is not None and positive("reused_minibatch", reused_minibatch) > num_envs * num_steps:
        samples = num_envs * num_steps
        raise ValueError(f"reused_minibatch: expected at most the rollout's {samples} samples, got {reused_minibatch}")

    def resident(layout: Layout) -> tuple[Allocation, ...]:
        reused = layout.minibatch(reused_minibatch) if reused_minibatch else []
        return (*layout.allocations(), *(x._replace(purpose="minibatch, reused") for x in reused))

    made = MemoryPlan(_rollout(layout), resident(layout), iterations)

    def saved(**changes: object) -> int:
        other = Layout(num_envs, num_steps, obs, actions, **{**options, **changes})
        return made.nbytes - sum(x.nbytes for x in resident(other))

    flags = Allocation("dones", (num_envs, layout.capacity), torch.int32, "")
    savings = [("done flags as uint8 instead of int32 (always)", flags.nbytes - flags.nbytes // 4)]
    if options.get("obs_dtype", torch.float32) == torch.float32:
        savings.append(("bfloat16 observations (obs_dtype=torch.bfloat16)", saved(obs_dtype=torch.bfloat16)))
    if layout.final_obs_rows:
        savings.append(("no pool of final observations (final_obs_rows=0)", saved(final_obs_rows=0)))
    if layout.capacity > num_steps:
        savings.append(("a ring of one rollout (capacity=num_steps)", saved(capacity=None)))
    return replace(made, savings=tuple(savings))


def _rollout(layout: Layout) -> tuple[Allocation, ...]:
    n, t = layout.num_envs, layout.num_steps
    made = []
    for group, (shape, _) in layout.obs.items():
        name = f"observations.{group}" if layout.obs_is_mapping else "observations"
        made.append(Allocation(name, (n, t, *shape), torch.float32, ""))
    actions = layout.fields["actions"]
    made.append(Allocation("actions", (n, t, *actions.shape), actions.dtype, ""))
    made.append(Allocation("rewards", (n, t), torch.float32, ""))
    made.append(Allocation("done flags", (n, t), torch.int32, ""))
    return tuple(made)


def render(made: MemoryPlan) -> str:
    """The plan as text."""
    lines = ["One rollout, the task's four fields:", "", *_table(made.rollout, made.rollout_nbytes), ""]
    lines += [
        f"Kept over {made.iterations} iterations that would be {_size(made.kept_nbytes)}. It is not kept: PPO is",
        "on-policy. A rollout tells of the policy that collected it; once the policy has been updated, the data",
        "follows another distribution than the one the next gradient is of. So: collect - learn for a few epochs -",
        "discard, and the next rollout overwrites this one. Memory does not depend on the number of iterations.",
        "",
        "Everything resident in the buffer (equals RolloutBuffer.nbytes):",
        "",
        *_table(made.resident, made.nbytes, purpose=True),
        "",
        "What options save:",
        "",
    ]
    width = max(len(name) for name, _ in made.savings)
    lines += [
        f"  {name:<{width}}  {bytes_ / 1e6:>8.1f} MB  {bytes_ / 2**20:>8.1f} MiB" for name, bytes_ in made.savings
    ]
    return "\n".join(lines)


def _table(rows: Sequence[Allocation], total: int, purpose: bool = False) -> list[str]:
    cells = [("field", "shape", "dtype", "bytes", "MB", "MiB", "what it is")]
    for x in rows:
        shape, dtype = " x ".join(map(str, x.shape)), str(x.dtype).removeprefix("torch.")
        cells.append((x.name, shape, dtype, *_numbers(x.nbytes), x.purpose))
    cells.append(("total", "", "", *_numbers(total), ""))
    cells = cells if purpose else [row[:-1] for row in cells]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    right = (3, 4, 5)
    lines = [
        "  ".join(f"{x:>{w}}" if i in right else f"{x:<{w}}" for i, (x, w) in enumerate(zip(row, widths, strict=True)))
        for row in cells
    ]
    rule = "  ".join("-" * w for w in widths)
    return [line.rstrip() for line in (lines[0], rule, *lines[1:-1], rule, lines[-1])]


def _numbers(nbytes: int) -> tuple[str, str, str]:
    return f"{nbytes:,}", f"{nbytes / 1e6:.1f}", f"{nbytes / 2**20:.1f}"


def _size(nbytes: int) -> str:
    return f"{nbytes:,} bytes = {nbytes / 1e9:.1f} GB ({nbytes / 2**30:.1f} GiB)"


def _field(text: str) -> tuple[str, int]:
    name, _, width = text.partition("=")
    if not width.isdecimal():
        raise ValueError(f"--field: expected NAME=WIDTH, like mu=4, got {text!r}")
    return name, int(width)


def main(argv: Sequence[str] | None = None) -> int:
    """``pydrone memory``."""
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
