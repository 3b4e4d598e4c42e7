"""The fused learner for pydrone's policies: what :mod:`pydrone.ppo.learner.prepared` does, read in the rollout's ring.

On the CPU, tiles of 128 samples go through both networks, the loss and back, and stay in the second-level cache; on
CUDA a Triton kernel does the same. See ``ppo_gradients`` in :mod:`pydrone.ops.schema`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pydrone.ops.schema import MATMUL
from pydrone.ppo.learner.networks import DEVICES, Unsupported, both, groups_of, moments_of, require
from pydrone.ppo.learner.prepared import FusedUpdate
from pydrone.ppo.policy import matmul as precision
from pydrone.ppo.policy.actor_critic import ActorCritic, PolicyStep
from pydrone.rollout.minibatch import Drawn, Minibatch

if TYPE_CHECKING:
    from pydrone.ppo.config import PPOConfig


def why_not(policy: ActorCritic) -> str | None:
    """Why torch has to compute this policy's gradients, or None where :func:`of_policy` can."""
    parameter = next(policy.parameters())
    if parameter.device.type not in DEVICES:
        return f"it runs on the CPU and on CUDA, the policy is on {parameter.device.type}"
    if policy.recurrent:
        return "the policy is recurrent"
    if not hasattr(policy, "std_param"):
        return "actions are discrete"
    if type(policy) is not ActorCritic:
        return f"the policy is a {type(policy).__name__}, which may compute something else"
    if parameter.dtype != torch.float32:
        return f"the policy is {str(parameter.dtype).removeprefix('torch.')}"
    try:
        actor, critic, _ = parameters_of(policy)
        for kernel in ("ppo_gradients", "ppo_act"):
            require(kernel, actor, critic, _matmul(policy))
    except Unsupported as error:
        return str(error)
    return None


def _matmul(policy: ActorCritic) -> str:
    return precision.chosen(policy.matmul, policy.std_param.device)


def of_policy(policy: ActorCritic, minibatch: Minibatch, config: PPOConfig) -> Tensor:
    """:class:`FusedUpdate` of a policy and a minibatch of its rollout buffer, read in the ring where it can be.

    Returns the first four METRICS. Call ``policy.bound_std()`` before: ``std_param`` is then the standard deviation,
    and needs no launch.
    """
    samples, drawn = _in_ring(policy, minibatch) if isinstance(minibatch, Drawn) else (None, ())
    if samples is None:
        advantages = minibatch.advantages, minibatch.returns
        samples = _samples(policy, minibatch.obs, minibatch, advantages)
    update = FusedUpdate(
        policy.actor,
        policy.critic,
        clip=config.clip,
        value_clip=config.clip if config.clipped_value_loss else None,
        value_loss_coef=config.value_loss_coef,
        entropy_coef=config.entropy_coef,
        obs_normalizer=policy.actor_normalizer,
        critic_normalizer=policy.critic_normalizer,
        obs_clip=policy.obs_clip,
        value_normalizer=policy.value_normalizer,
        matmul=_matmul(policy),
    )
    return update.run(policy.std_param, samples, drawn, measured=4)


def _samples(policy: ActorCritic, obs: Tensor | Mapping[str, Tensor], fields: Any, advantages: tuple) -> tuple:
    """What ``ppo_gradients`` takes of a minibatch; ``advantages``, and returns."""
    actions, log_probs, values, mu, sigma = (fields[x] for x in ("actions", "log_probs", "values", "mu", "sigma"))
    return *_inputs(policy, obs), actions, log_probs, *advantages, values, mu, sigma


def readable(obs: Tensor | Mapping[str, Tensor]) -> bool:
    """Whether the operation can read stored observations in the ring: floats, [.., .., width]."""
    groups = [obs] if isinstance(obs, Tensor) else [*obs.values()]
    return all(x.is_floating_point() and x.dim() == 3 for x in groups)


def _in_ring(policy: ActorCritic, minibatch: Drawn) -> tuple[tuple | None, tuple]:
    """As :func:`_samples`, of the ring, and the arguments that draw the minibatch; None: it has to be gathered."""
    place = minibatch.place()
    if place.returns is not None or not readable(place.obs):
        return None, ()
    samples = _samples(policy, place.obs, place.fields, (place.advantages, None))
    return samples, (place.numbers, place.statistics, place.subset, place.cursor)


@torch.no_grad()
def act(policy: ActorCritic, obs: Tensor | Mapping[str, Tensor]) -> PolicyStep:
    """``policy.act(obs)`` in one operation: both networks, the drawn actions and their log-probabilities."""
    networks, std = parameters_of(policy), policy.std
    group = obs if isinstance(obs, Tensor) else obs[policy.actor_obs[0]]
    num_envs = group.shape[0]
    mean, actions = std.new_empty(2, num_envs, len(std)).unbind()
    log_probs, values = std.new_empty(2, num_envs).unbind()
    outputs = actions, log_probs, values, mean
    torch.ops.pydrone.ppo_act(*act_arguments(policy, obs, networks, std, torch.randn_like(mean), None, outputs))
    return PolicyStep(actions, log_probs, values, mean, std.expand_as(mean))


def parameters_of(policy: ActorCritic) -> tuple[list[nn.Parameter], list[nn.Parameter], int]:
    """The actor's, the critic's, and the number of their activation."""
    return both(policy.actor, policy.critic, policy.std_param.device)


def act_arguments(
    policy: ActorCritic,
    obs: Tensor | Mapping[str, Tensor],
    networks: tuple[Sequence[Tensor], Sequence[Tensor], int],
    std: Tensor,
    noise: Tensor,
    packed: Tensor | None,
    outputs: Sequence[Tensor],
) -> tuple:
    """The arguments of ``ppo_act``; ``networks``: :func:`parameters_of`."""
    seen = _inputs(policy, obs)
    if policy.obs_dtype != torch.float32:  # as stored, so that acting and learning agree
        seen = tuple([policy.rounded(x) for x in groups] for groups in seen)
    moments = moments_of(policy.actor_normalizer, policy.critic_normalizer)
    of_values = moments_of(policy.value_normalizer)
    options = networks[2], MATMUL.index(_matmul(policy)), *moments, policy.obs_clip, *of_values, packed
    return *seen, noise, *networks[:2], std, *options, *outputs


def _inputs(policy: ActorCritic, obs: Tensor | Mapping[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The groups that the actor sees and those of the critic; none for the critic where they are the same."""
    if not isinstance(obs, Mapping) and not hasattr(obs, "keys"):
        return groups_of(obs), []
    apart = policy.critic_obs != policy.actor_obs
    return tuple(groups_of([obs[x] for x in names]) for names in (policy.actor_obs, policy.critic_obs if apart else ()))
