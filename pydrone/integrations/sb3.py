"""Stable-Baselines3: its PPO on the fused learner, and its rollout buffers on pydrone's memory and kernels.

>>> from pydrone.integrations.sb3 import PPO
>>> model = PPO("MlpPolicy", "Pendulum-v1").learn(100_000)

docs/integrations.md lists the differences.
"""

from __future__ import annotations

from pydrone.integrations.peer import require

require("stable-baselines3", (2, 4), (3,))

from pydrone.integrations.sb3_buffers import DictRolloutBuffer, RolloutBuffer  # noqa: E402 (after the check)
from pydrone.integrations.sb3_ppo import PPO  # noqa: E402

__all__ = ["PPO", "DictRolloutBuffer", "RolloutBuffer"]
