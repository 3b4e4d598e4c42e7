"""What a rollout takes, to the byte: the task's four fields, everything resident, and what each option saves.

MB = 10^6 bytes, MiB = 2^20. Explained in docs/memory.md.
"""

from __future__ import annotations

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
    the buffer holds. iterations: of a training, for ``kept_nbytes``. savings: (option, bytes of ``resident`` it saves).
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
        """Resident bytes, equal to ``RolloutBuffer.nbytes``, for any number of iterations."""
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
        reused_minibatch: samples of a minibatch whose tensors ``minibatches(reuse=True)`` keeps; None: none are kept.
        **options: the buffer's capacity, obs_dtype, fields, max_episode_length, final_obs_rows and verbatim.
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
        "on-policy. A rollout samples the policy that collected it; after the policy's update, the next gradient",
        "needs samples of the new policy. So: collect, learn for a few epochs, discard; the next rollout overwrites",
        "this one. Memory does not depend on the number of iterations.",
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
