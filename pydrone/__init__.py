"""pydrone: the rollout of PPO (storage, GAE, minibatches) as fused kernels, and a PPO loop on them that flies drones.

>>> import pydrone
>>> advantages, returns = pydrone.gae(rewards, values, dones, last_values, gamma=0.99, lam=0.95)
"""

from __future__ import annotations

from ._version import __version__
from .buffer import BufferFull, Minibatch, RolloutBuffer
from .estimators import gae
from .ops.dispatch import backends

__all__ = ["BufferFull", "Minibatch", "RolloutBuffer", "__version__", "backends", "gae"]
