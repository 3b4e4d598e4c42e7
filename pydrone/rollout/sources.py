"""Checks a step's arguments before they are stored, with errors that name them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from pydrone.ops.arguments import check_real, check_strided
from pydrone.ops.schema import FLOATS
from pydrone.rollout.layout import Field, Layout


class Ends(NamedTuple):
    """How a step ended: the arguments of :meth:`pydrone.buffer.RolloutBuffer.end`."""

    rewards: Tensor
    dones: Tensor
    truncated: Tensor | None = None
    final_obs: Tensor | Mapping[str, Tensor] | None = None
    valid: Tensor | None = None


Row = tuple[object, object, object, object, Mapping[str, object]]
"""A step's row as it was given: obs, actions, values, log_probs and the constructor's fields."""


class Sources:
    """Checks the tensors of one step against a layout. Kernels can read those that pass as they are.

    A step has two parts, its row and how it ended, and each has two checks. ``quick_row`` and ``quick_final`` come
    first. Python is much of a small step's time: they check only what an operation that checks its own arguments cannot
    see, and return None for anything unusual. ``row`` and ``ends`` check everything, and raise errors that name the
    argument. ``quick_row`` is two: ``listed``, and ``fit``, which a step like one already checked need not pass.
    """

    def __init__(self, layout: Layout, device: torch.device) -> None:
        self.layout, self.device, self.num_envs = layout, device, layout.num_envs
        self._deep, self._final_deep = (_deep(layout, x.values()) for x in (layout.stored, layout.pool_fields))

    def quick_row(self, row: Row) -> tuple[Tensor, ...] | None:
        """The sources of a row in the layout's order, or None."""
        sources = self.listed(row)
        return sources if sources is not None and self.fit(sources) else None

    def listed(self, row: Row) -> tuple[object, ...] | None:
        """What was given for a row, in the layout's order; None if these are not its fields."""
        obs, actions, values, log_probs, fields = row
        layout = self.layout
        if len(fields) != len(layout.extra):
            return None
        try:
            groups = self.groups("obs", obs).values() if layout.obs_is_mapping else (obs,)
            sources = (*groups, actions, log_probs, values)  # layout.stored's order
            if fields:
                sources += tuple([fields[x] for x in layout.extra])
        except (KeyError, AttributeError, RuntimeError):
            return None
        return sources

    def fit(self, sources: tuple[object, ...]) -> bool:
        """Whether an operation that checks its own arguments may take these sources of a row."""
        try:
            for i, shape in self._deep:
                if sources[i].shape != shape:
                    return False
            if torch.is_grad_enabled():
                for x in sources:
                    if x.requires_grad:
                        return False
            return True
        except (AttributeError, RuntimeError):  # RuntimeError: a nested tensor has no shape
            return False

    def quick_final(self, ends: Ends) -> list[object] | None:
        """The final observations of a step ([]: it has none), or None."""
        _, dones, truncated, final_obs, _ = ends
        if dones is None:  # without them the operation would store half a step
            return None
        if final_obs is None:
            return []
        if truncated is None or not self.layout.final_obs_rows:
            return None
        final = list(self.groups("final_obs", final_obs).values())
        try:
            for i, shape in self._final_deep:
                if final[i].shape != shape:
                    return None
        except (AttributeError, RuntimeError):
            return None
        return final

    def row(self, row: Row) -> tuple[Tensor, ...]:
        """As :meth:`quick_row`, with all checks."""
        obs, actions, values, log_probs, fields = row
        named = {**self.groups("obs", obs), "actions": actions, "values": values, "log_probs": log_probs, **fields}
        stored = self.layout.stored
        if named.keys() != stored.keys():
            for name in self.layout.extra:
                if name not in named:
                    raise TypeError(f"{name}: expected a tensor for this field, got none")
            name = next(name for name in named if name not in stored)
            raise TypeError(f"{name}: not a field of this buffer; it has {', '.join(self.layout.extra) or 'none'}")
        return tuple(self.field(field, named[field.name], field.name) for field in stored.values())

    def ends(self, ends: Ends) -> tuple[Ends, list[Tensor]]:
        """(``ends`` as a kernel can read them, the final observations of the step)."""
        rewards, dones = self.scalar("rewards", ends.rewards, True), self.scalar("dones", ends.dones, False)
        truncated = None if ends.truncated is None else self.scalar("truncated", ends.truncated, False)
        valid = None if ends.valid is None else self.scalar("valid", ends.valid, False)
        final = []
        if ends.final_obs is not None:
            if truncated is None:
                raise ValueError("final_obs: expected truncated with it, got None")
            if not self.layout.final_obs_rows:
                raise ValueError("final_obs: this buffer has no pool for them; construct it with final_obs_rows > 0")
            groups = self.groups("final_obs", ends.final_obs)
            final = [self.field(x, groups[x.name], "final_" + x.name) for x in self.layout.pool_fields.values()]
        return Ends(rewards, dones, truncated, ends.final_obs, valid), final

    def groups(self, name: str, obs: object) -> dict[str, object]:
        """``obs`` by the names of the layout's fields."""
        if not self.layout.obs_is_mapping:
            return {"obs.obs": obs}
        # A TensorDict is a mapping in all but its class.
        if not hasattr(obs, "keys") or isinstance(obs, Tensor):
            raise TypeError(f"{name}: expected a mapping of {', '.join(self.layout.obs)}, got {type(obs).__name__}")
        if set(obs.keys()) != set(self.layout.obs):
            raise ValueError(f"{name}: expected the groups {sorted(self.layout.obs)}, got {sorted(obs.keys())}")
        return {f"obs.{group}": obs[group] for group in self.layout.obs}

    def field(self, field: Field, x: object, name: str) -> Tensor:
        """``x`` as the source of ``field``: [N, *shape], or [N, 1] for a scalar; floating or of the field's dtype."""
        name = name.removesuffix(".obs") if not self.layout.obs_is_mapping else name
        self.check(name, x)
        if field.shape == ():
            fits = x.shape in ((self.num_envs,), (self.num_envs, 1))
        else:
            fits = x.shape == (self.num_envs, *field.shape)
        if not fits:
            raise ValueError(f"{name}: expected shape {[self.num_envs, *field.shape]}, got {list(x.shape)}")
        if x.dtype != field.dtype and not (x.dtype in FLOATS and field.dtype in FLOATS):
            raise TypeError(f"{name}: expected dtype {field.dtype}, got {x.dtype}")
        return x.detach() if x.requires_grad else x

    def check(self, name: str, x: object) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
        if x.device != self.device:
            raise ValueError(f"{name}: expected device {self.device}, got {x.device}")
        check_strided(name, x)

    def scalar(self, name: str, x: object, floating: bool) -> Tensor:
        """``x`` [N] or [N, 1], of any real dtype or of a floating one."""
        self.check(name, x)
        if x.shape[:1] != (self.num_envs,) or x.numel() != self.num_envs:
            raise ValueError(f"{name}: expected shape [{self.num_envs}] or [{self.num_envs}, 1], got {list(x.shape)}")
        check_real(name, x, floating)
        return x.detach() if x.requires_grad else x


def _deep(layout: Layout, fields: Iterable[Field]) -> list[tuple[int, tuple[int, ...]]]:
    """(index, shape) of each field of several dimensions: an operation checks only its number of elements."""
    return [(i, (layout.num_envs, *field.shape)) for i, field in enumerate(fields) if len(field.shape) > 1]
