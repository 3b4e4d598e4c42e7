"""pydrone: PPO's rollout (storage, GAE, minibatches) as fused kernels, and a PPO trainer on them that flies drones.

>>> import pydrone
>>> advantages, returns = pydrone.gae(rewards, values, dones, last_values, gamma=0.99, lam=0.95)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from pydrone._version import __version__

if TYPE_CHECKING:
    from pydrone.buffer import BufferFull, Minibatch, RolloutBuffer
    from pydrone.estimators import gae, retrace, vtrace
    from pydrone.ops.dispatch import backends

__all__ = ["BufferFull", "Minibatch", "RolloutBuffer", "__version__", "backends", "gae", "retrace", "vtrace"]

_HOMES = {
    "BufferFull": "buffer",
    "Minibatch": "buffer",
    "RolloutBuffer": "buffer",
    "backends": "ops.dispatch",
    "gae": "estimators",
    "retrace": "estimators",
    "vtrace": "estimators",
}


def __getattr__(name: str) -> object:
    # Imported at first use: the command line sets up the threads before torch is imported.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(import_module(f".{_HOMES[name]}", __name__), name)  # the next time no call
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
