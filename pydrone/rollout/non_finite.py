"""NaN and infinite numbers of a rollout: where they are, and what is said of them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from typing import NamedTuple

from torch import Tensor


class NonFinite(NamedTuple):
    """A field of a rollout with ``count`` numbers that are NaN or infinite: first in ``step``, and there in ``env``."""

    name: str
    count: int
    env: int
    step: int

    def __str__(self) -> str:
        values = "1 value that is" if self.count == 1 else f"{self.count} values that are"
        return f"{self.name}: {values} not finite, the first of environment {self.env} at step {self.step}"


def find(fields: Mapping[str, Tensor], sampled: Tensor) -> list[NonFinite]:
    """What is not finite in ``fields``, [N, T, ...] by name, where ``sampled``, bool [N, T]; the earliest step first.

    Of one step, fields come in their order.
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
    """Warns or raises, as ``policy`` says, where a rollout has numbers that are not finite; warns once a rollout."""

    def __init__(self, policy: str) -> None:
        if policy not in ("ignore", "warn", "raise"):
            raise ValueError(f"non_finite: expected 'ignore', 'warn' or 'raise', got {policy!r}")
        self.policy = policy
        self._last: int | None = None  # the last rollout that was found to have some

    def forget(self) -> None:
        """For a buffer that holds another rollout by the same number."""
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
        """Acts on what the launches have found of a rollout.

        Args:
            rollout: its number, of all that there ever were.
            observed: nonzero where an observation is not finite.
            advantages: a number that is not finite if an advantage is not.
            look: finds them all, called where there may be any.
            flag: int32 [], where append's launches have said it: taken back.
            level: of the warning's caller.
        """
        if not observed and math.isfinite(advantages) and self._last != rollout:
            return
        found = look()
        # It may have been said of this rollout, or of one that was begun anew.
        flag.zero_()
        if not found:  # invalid steps; finite numbers whose squares are not; gone with a captured clear()
            return
        warned, self._last = self._last == rollout, rollout
        message = f"rollout {rollout}: {'; '.join(map(str, found))}"
        if found[0].name == "advantages":
            message += ", and observations, rewards and values are finite: last_values, a final value or an overflow"
        if self.policy == "raise":
            raise FloatingPointError(message)
        if not warned:
            warnings.warn(message, RuntimeWarning, stacklevel=level + 1)
