"""Which policy a configuration asks for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pydrone.ppo.config import PPOConfig
from pydrone.ppo.policy.actor_critic import ActorCritic
from pydrone.ppo.policy.discrete import CategoricalActorCritic
from pydrone.ppo.policy.recurrent import RecurrentActorCritic, RecurrentCategoricalActorCritic


def make_policy(
    obs: object, actions: object, config: PPOConfig, num_discrete_actions: int | Sequence[int] | None = None
) -> ActorCritic:
    """The policy that ``config`` describes, its first weights drawn from torch's generator.

    Args:
        obs, actions: as the environment's.
        config: the settings.
        num_discrete_actions: K, where actions are ``((), torch.int64)``; (K1, ..., KD) where they are
            ``((D,), torch.int64)``.

    Raises:
        TypeError: the actions are neither a number of dimensions nor K discrete ones.
        ValueError: the observations are no vectors, or have no such groups.
    """
    discrete = num_discrete_actions is not None and not isinstance(actions, int)
    if not discrete and not isinstance(actions, int):
        raise TypeError(
            "env.actions: expected an int, for continuous actions, or ((), torch.int64) along with "
            f"env.num_discrete_actions, got {actions!r}"
        )
    names = ("actor_obs", "critic_obs", "normalize_obs", "obs_clip", "normalize_values", "matmul", "activation")
    options: dict[str, Any] = {name: getattr(config, name) for name in names}
    options["obs_dtype"] = getattr(torch, config.obs_dtype)
    kind: type[ActorCritic] = CategoricalActorCritic if discrete else ActorCritic
    if config.recurrent != "none":
        kind = RecurrentCategoricalActorCritic if discrete else RecurrentActorCritic
        options |= {"cell": config.recurrent, "rnn_dim": config.rnn_dim}
    size = num_discrete_actions if discrete else actions
    return kind(obs, size, config.hidden_dims, config.init_std, **options)
