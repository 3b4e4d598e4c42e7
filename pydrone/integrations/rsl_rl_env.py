"""pydrone's environments for rsl_rl's runners.

>>> runner = OnPolicyRunner(VecEnvWrapper(pydrone.envs.make("quadrotor", num_envs=1024)), cfg)
"""

from __future__ import annotations

import torch
from torch import Tensor

from pydrone.envs.base import Env, autoreset_mode, log_scalars
from pydrone.integrations.rsl_rl import TensorDict, VecEnv  # checks the version

__all__ = ["VecEnvWrapper"]


class VecEnvWrapper(VecEnv):
    """A :class:`pydrone.envs.base.Env` as an rsl_rl ``VecEnv``; a single observation becomes the group "policy".

    Args:
        env: with "same_step" autoreset, the only kind that rsl_rl supports, and continuous actions.
        step_dt: seconds per step, by which rsl_rl scales the weight of RND; None: ``env.config.dt``, or 1.

    Attributes:
        max_episode_length: the environment's, or the largest int64 where it has none: the runner draws ages below it.

    Raises:
        ValueError, TypeError: rsl_rl cannot train on this environment.
    """

    def __init__(self, env: Env, step_dt: float | None = None) -> None:
        if autoreset_mode(env.autoreset) != "same_step":
            raise ValueError(
                f"env: expected autoreset 'same_step', got {env.autoreset!r}: rsl_rl would learn from resets"
            )
        if not isinstance(env.actions, int):
            raise TypeError(f"env: expected a number of continuous actions, got {env.actions!r}")
        self.env, self.cfg = env, getattr(env, "config", {})
        self.num_envs, self.num_actions, self.device = env.num_envs, env.actions, env.device
        limit = env.max_episode_length
        self.max_episode_length = torch.iinfo(torch.int64).max if limit is None else limit
        self.step_dt = getattr(self.cfg, "dt", 1.0) if step_dt is None else step_dt
        self._lengths = torch.zeros(env.num_envs, dtype=torch.long, device=env.device)
        self._keep(env.reset())

    @property
    def unwrapped(self) -> VecEnvWrapper:
        return self

    @property
    def episode_length_buf(self) -> Tensor:
        """[N] int64: the age of each running episode, in steps."""
        return self._lengths

    @episode_length_buf.setter
    def episode_length_buf(self, lengths: Tensor) -> None:
        # The runner assigns random ages; the environment draws its own.
        self.env.randomize_episode_lengths()

    def get_observations(self) -> TensorDict:
        return self._obs

    def step(self, actions: Tensor) -> tuple[TensorDict, Tensor, Tensor, dict]:
        result = self.env.step(actions)
        self._lengths.add_(1).masked_fill_(result.dones, 0)
        self._keep(result.obs)
        # Sums over ended episodes are left out: rsl_rl averages the log, and counts episodes itself.
        log = {key: x.clone() for key, x in log_scalars(result.log).items() if not key.startswith("episode/")}
        return self._obs, result.rewards, result.dones, {"time_outs": result.truncated, "log": log}

    def _keep(self, obs: Tensor | dict[str, Tensor]) -> None:
        # A copy: rsl_rl stores an observation after the next step, when the environment may have overwritten it.
        groups = obs if isinstance(obs, dict) else {"policy": obs}
        groups = {key: x.clone() for key, x in groups.items()}
        self._obs = TensorDict(groups, batch_size=[self.num_envs], device=self.device)
