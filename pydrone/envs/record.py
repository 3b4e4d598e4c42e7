"""What a run records of its environment: a name to build it by, if it has one, and what becomes of actions in it."""

from __future__ import annotations

import dataclasses
import inspect
import math
import operator
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pydrone.envs.registry import name_of
from pydrone.envs.task_options import TaskOptions

Bounds = tuple[tuple[float, ...], tuple[float, ...]]


class Actions(NamedTuple):
    """What an environment makes of a policy's actions: clips them, maps them onto a range, drops their fractions.

    Bounds are (low, high), each of A numbers, or of one for all actions; infinite where there is none.
    """

    limits: Bounds | None = None
    """Actions are clipped to them. None: they are not."""
    onto: Bounds | None = None
    """What ``limits``, finite then, are mapped onto linearly. None: they are not."""
    integers: bool = False
    """Whether fractions are dropped."""
    start: int = 0
    """The first of discrete actions."""
    said: bool = True
    """False: the environment does not say."""

    @classmethod
    def of(cls, env: Any) -> Actions:
        """Reads ``action_limits``, ``action_range``, ``action_integers`` and ``action_start`` of an environment.

        Raises ValueError, with the name, for bounds that are none.
        """
        # Without __getattr__: a wrapper that passes on the attributes of what it wraps may change the actions.
        own = {name: getattr(env, f"action_{name}") for name in _ATTRIBUTES if _has(env, f"action_{name}")}
        size = env.actions if isinstance(env.actions, int) else 0
        limits, onto = (
            None if own.get(name) is None else bounds(own[name], f"env.action_{name}", size)
            for name in ("limits", "range")
        )
        if onto is not None and (limits is None or not _finite(limits, onto) or any(map(operator.eq, *limits))):
            raise ValueError(
                "env.action_range: expected finite bounds, and finite action_limits with room between them, got "
                f"{onto} and {limits}"
            )
        if limits is not None and all(map(math.isinf, (*limits[0], *limits[1]))):
            limits = None
        return cls(limits, onto, bool(own.get("integers", False)), int(own.get("start", 0)), bool(own) or size == 0)

    @classmethod
    def read(cls, stored: Mapping[str, Any]) -> Actions:
        """The inverse of ``_asdict``; ValueError where it cannot be."""
        limits, onto = (
            None if stored[name] is None else bounds(stored[name], f"actions: {name}") for name in ("limits", "onto")
        )
        return cls(limits, onto, bool(stored["integers"]), int(stored["start"]), bool(stored["said"]))

    def applied(self, actions: Tensor) -> Tensor:
        """What the environment makes of continuous ``actions`` [N, A]."""
        if self.limits is None:
            return actions.trunc() if self.integers else actions
        low, high = (actions.new_tensor(bound) for bound in self.limits)
        actions = torch.minimum(torch.maximum(actions, low), high)
        if self.onto is not None:
            first, last = (actions.new_tensor(bound) for bound in self.onto)
            actions = first + (actions - low) / (high - low) * (last - first)
            actions = torch.minimum(torch.maximum(actions, first), last)
        return actions.trunc() if self.integers else actions

    def __str__(self) -> str:
        if not self.said:
            return "not clipped (the environment has no action_limits that say whether it clips them)"
        if self.start:
            return f"discrete from {self.start}"
        if self.limits is None:
            text = "not clipped"
        else:
            text = f"clipped to {_text(self.limits)}"
            if self.onto is not None:
                text += f" and mapped onto {_text(self.onto)}"
        return f"{text}, without fractions" if self.integers else text


_ATTRIBUTES = ("limits", "range", "integers", "start")


class Record(NamedTuple):
    """What a checkpoint says of the environment."""

    name: str | None
    """As :func:`pydrone.envs.make` takes it. None: it was built otherwise, and cannot be built by name."""
    label: str
    """The name, or what the object is, for people."""
    actions: Actions | None
    """None: unknown, in checkpoints of before there was a record."""
    constants: Mapping[str, Any]
    """Of a task that pydrone brings, such as the seconds per step; else empty."""

    @classmethod
    def of(cls, env: Any) -> Record:
        """Raises ValueError for bounds of actions that are none."""
        name, config = name_of(env), getattr(env, "config", None)
        constants = dataclasses.asdict(config) if isinstance(config, TaskOptions) else {}
        return cls(name, name or _label(env), Actions.of(env), constants)

    @classmethod
    def read(cls, state: Mapping[str, Any]) -> Record:
        """The record in a checkpoint; ValueError where there is something else."""
        stored = state.get("environment")
        if stored is None:
            return cls(state["config"]["env"], state["config"]["env"], None, {})
        try:
            actions = Actions.read(stored["actions"])
            return cls(stored["name"], str(stored["label"]), actions, dict(stored["constants"]))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"environment: expected the record of one, got something else: {error}") from error

    def changed(self, now: Record) -> dict[str, tuple[Any, Any]]:
        """What differs in ``now`` besides the name, where both know it: the old and the new value."""
        found = {name: (x, now.constants[name]) for name, x in self.constants.items() if name in now.constants}
        if self.actions is not None and now.actions is not None:
            found["actions"] = self.actions, now.actions
        return {name: (old, new) for name, (old, new) in found.items() if old != new}

    def stored(self) -> dict[str, Any]:
        """The inverse of :meth:`read`, of plain values."""
        return {**self._asdict(), "actions": self.actions._asdict(), "constants": dict(self.constants)}

    def buildable(self, path: Any, otherwise: str) -> str:
        """``name``. Raises ValueError where there is none, which names ``path`` and says what to do ``otherwise``."""
        if self.name is None:
            raise ValueError(
                f"{path}: trained in an environment object, {self.label}, which no registered name builds: "
                f"{otherwise}, or name an environment that fits by --env"
            )
        return self.name


def settings_of(env: Any, record: Record) -> dict[str, Any]:
    """The settings of a training that its environment decides, by the names that they have there."""
    settings = {"env": record.label, "num_envs": env.num_envs}
    if "env_kwargs" in getattr(env, "__dict__", {}):  # not those of what a wrapper wraps
        settings["env_kwargs"] = env.env_kwargs
    if record.constants:
        settings["task"] = TaskOptions(**{f.name: record.constants[f.name] for f in dataclasses.fields(TaskOptions)})
        randomizer = getattr(getattr(env, "task", None), "randomizer", None)
        if randomizer is not None:
            settings["randomization"] = randomizer.ranges
    return settings


def bounds(given: Any, name: str, size: int | None = None) -> Bounds:
    """A lower and an upper bound, each a number for all actions, or one for each of ``size``; ValueError otherwise."""
    try:
        low, high = (tuple(torch.as_tensor(bound, dtype=torch.float64).reshape(-1).tolist()) for bound in given)
        fits = len(low) == len(high) and len(low) in (1, size or len(low)) and all(a <= b for a, b in zip(low, high))
    except (TypeError, ValueError, RuntimeError):
        fits = False
    if not fits:
        each = "" if size is None else f", {size} of each or one for all"
        raise ValueError(f"{name}: expected lower bounds and upper ones not below them{each}, got {given!r}")
    return low, high


def _has(env: Any, name: str) -> bool:
    try:
        inspect.getattr_static(env, name)
    except AttributeError:
        return False
    return True


def _finite(*limits: Bounds) -> bool:
    return all(math.isfinite(x) for pair in limits for bound in pair for x in bound)


def _text(limits: Bounds) -> str:
    each = [f"[{low:g}, {high:g}]" for low, high in zip(*limits)]
    return each[0] if len(set(each)) == 1 else " ".join(each)


def _label(env: Any) -> str:
    known = getattr(getattr(getattr(env, "venv", None), "spec", None), "id", None)
    kind = type(env)
    return f"{kind.__module__}:{kind.__qualname__}" if known is None else f"{kind.__qualname__}:{known}"
