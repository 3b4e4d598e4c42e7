"""Finds the NaN and infinite numbers of a rollout, and reports them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from pydrone.ops.schema import INVALID, TERMINATED
from pydrone.rollout.views import Rollout


class NonFinite(NamedTuple):
    """A field of a rollout with ``count`` NaN or infinite numbers, the first in environment ``env`` at ``step``."""

    name: str
    count: int
    env: int
    step: int

    def __str__(self) -> str:
        values = "1 value that is" if self.count == 1 else f"{self.count} values that are"
        return f"{self.name}: {values} not finite, the first of environment {self.env} at step {self.step}"


def find(fields: Mapping[str, Tensor], sampled: Tensor) -> list[NonFinite]:
    """The NaN and infinite numbers of ``fields``, [N, T, ...] by name, where ``sampled``, bool [N, T].

    Earliest step first; within a step, in the order of ``fields``.
    """
    found = [x for name, field in fields.items() if (x := _look(name, field, sampled)) is not None]
    return sorted(found, key=lambda x: x.step)


def _look(name: str, x: Tensor, sampled: Tensor) -> NonFinite | None:
    if not x.is_floating_point():
        return None
    bad = ~x.isfinite().flatten(2) & sampled[..., None] if x.dim() > 2 else (~x.isfinite() & sampled)[..., None]
    count = int(bad.sum())
    if not count:
        return None
    step, env = bad.any(2).t().nonzero()[0].tolist()
    return NonFinite(name, count, env, step)


class Report:
    """Warns (once a rollout) or raises, as ``policy`` says, if a rollout has NaN or infinite numbers."""

    def __init__(self, policy: str) -> None:
        if policy not in ("ignore", "warn", "raise"):
            raise ValueError(f"non_finite: expected 'ignore', 'warn' or 'raise', got {policy!r}")
        self.policy = policy
        self._last: int | None = None  # the last rollout in which some were found

    def forget(self) -> None:
        """Forgets the last rollout: in a loaded state its number may be another rollout's."""
        self._last = None

    def __call__(
        self,
        rollout: int,
        observed: float,
        advantages: float,
        look: Callable[[], list[NonFinite]],
        flag: Tensor,
        level: int,
    ) -> None:
        """Acts on what the launches found in a rollout.

        Args:
            rollout: its number, counted from the first ever.
            observed: nonzero if an observation is NaN or infinite.
            advantages: a number that is NaN or infinite if an advantage is.
            look: finds all of them; called only if there may be any.
            flag: int32 [], set by append's launches; reset here.
            level: of the warning's caller.
        """
        if not observed and math.isfinite(advantages) and self._last != rollout:
            return
        found = look()
        # Set in this rollout, or in one that was rewound.
        flag.zero_()
        if not found:  # invalid steps; finite numbers with infinite squares; discarded by a captured clear()
            return
        warned, self._last = self._last == rollout, rollout
        message = f"rollout {rollout}: {'; '.join(map(str, found))}"
        if found[0].name == "advantages":
            message += ", and observations, rewards and values are finite: "
            message += "last_values, a final value, a log-ratio or an overflow"
        if self.policy == "raise":
            raise FloatingPointError(message)
        if not warned:
            warnings.warn(message, RuntimeWarning, stacklevel=level + 1)


def of_rollout(rollout: Rollout) -> list[NonFinite]:
    """As :meth:`pydrone.buffer.RolloutBuffer.non_finite`."""
    groups = rollout.obs if rollout.layout.obs_is_mapping else {"": rollout.obs}
    # In this order a step computes them: of one step the first is the cause.
    fields = {f"obs[{name!r}]" if name else "obs": x for name, x in groups.items()}
    fields |= {"actions": rollout.actions, "values": rollout.values, "rewards": rollout.rewards}
    valid = rollout.valid
    sampled = torch.ones_like(rollout.dones, dtype=torch.bool) if valid is None else valid
    found = find(fields, sampled)
    if not found and rollout._scan.computed:
        found = find({"advantages": rollout._storage.advantages}, sampled)
        if found and valid is not None:
            before = rollout.dones[:, :-1]
            final = torch.zeros_like(valid)
            final[:, 1:] = ~valid[:, 1:] & (before != TERMINATED) & (before != INVALID)
            del fields["actions"], fields["rewards"]
            found = find(fields, final) or found
    return found
