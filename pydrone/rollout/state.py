"""Checks a buffer's ``state_dict`` before any of it is loaded."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from pydrone.ops.arguments import check_strided

COUNTERS = ("appended", "discarded", "computed", "epoch", "seed")
METHODS = ("compute_gae", "compute_vtrace")
# Rebuilt by the next launch, or by advance().
TRANSIENT = ("workspace", "cursor", "not_finite")


def check(state: Mapping[str, object], own: Mapping[str, object], num_steps: int, capacity: int) -> None:
    """Raises ValueError or TypeError unless a buffer whose state is ``own`` could load ``state``."""
    if not isinstance(state, Mapping):
        raise TypeError(f"state_dict: expected a mapping, got {type(state).__name__}")
    if state.keys() | {"method"} != own.keys():  # a state without it is of an earlier version: GAE's
        raise ValueError(f"state_dict: expected the keys {sorted(own)}, got {sorted(map(str, state))}")
    if state["layout"] != own["layout"]:
        raise ValueError(f"state_dict: expected the fields {own['layout']}, got {state['layout']}")
    for name, x in own.items():
        if isinstance(x, Tensor):
            _check_tensor(name, state[name], x)
    for name, kind in {**dict.fromkeys(COUNTERS, int), "computed": bool, "method": str}.items():
        if name in state and type(state[name]) is not kind:
            raise TypeError(f"state_dict: {name}: expected {kind.__name__}, got {type(state[name]).__name__}")
    if state.get("method", METHODS[0]) not in METHODS:
        raise ValueError(f"state_dict: method: expected one of {', '.join(METHODS)}, got {state['method']!r}")
    appended, discarded = state["appended"], state["discarded"]
    if discarded < 0 or discarded % num_steps or state["epoch"] < 0:
        raise ValueError(
            f"state_dict: discarded: expected a multiple of {num_steps}, and an epoch of at least 0, "
            f"got {discarded} and {state['epoch']}"
        )
    if not 0 <= appended - discarded <= capacity:
        raise ValueError(
            f"state_dict: appended: expected {discarded} to {discarded + capacity}, "
            f"what a ring of {capacity} steps can hold, got {appended}"
        )
    for name in ("truncations", "resets"):
        flags = state[name]
        whole = isinstance(flags, (list, tuple)) and len(flags) == len(own[name])
        if not whole or not all(isinstance(x, bool) for x in flags):
            raise ValueError(f"state_dict: {name}: expected {len(own[name])} bools, got {flags!r}")


def _check_tensor(name: str, given: object, own: Tensor) -> None:
    if not isinstance(given, Tensor):
        raise TypeError(f"state_dict: {name}: expected a tensor, got {type(given).__name__}")
    if given.device.type == "meta":
        raise ValueError(f"state_dict: {name}: expected a tensor that holds data, got one on 'meta'")
    check_strided(f"state_dict: {name}", given)
    if given.shape != own.shape or given.dtype != own.dtype:
        raise ValueError(
            f"state_dict: {name}: expected {list(own.shape)} {own.dtype}, got {list(given.shape)} {given.dtype}"
        )
