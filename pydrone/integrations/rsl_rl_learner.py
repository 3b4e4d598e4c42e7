"""rsl_rl's ``PPO.act`` and ``PPO.update`` on the fused operations; whatever they would not compute alike is rsl_rl's.

Served: ``MLPModel`` as actor and critic, with a Gaussian of state-independent standard deviation. Normalisers,
schedule, clipping, gradients over several GPUs, the optimiser's state and checkpoints remain rsl_rl's.
"""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from pydrone.integrations.peer import require
from pydrone.ppo.learner import adam
from pydrone.ppo.learner.networks import Unsupported, hooked
from pydrone.ppo.learner.prepared import FusedAct, FusedUpdate

VERSION = require("rsl-rl-lib", (5,), (6,))

from rsl_rl.algorithms import ppo  # noqa: E402 (after the check of the version)
from rsl_rl.models import MLPModel  # noqa: E402
from rsl_rl.modules import MLP, EmpiricalNormalization  # noqa: E402
from rsl_rl.modules.distribution import GaussianDistribution  # noqa: E402
from tensordict import TensorDict  # noqa: E402

# More than rounding makes of the divergence of two equal policies, which rsl_rl computes as exactly 0.
SMALL_KL = 1e-6

_minor = int(VERSION.split(".")[1])
_logger = logging.getLogger("pydrone.integrations.rsl_rl")
_told: set[str] = set()
_peer_act, _peer_update = ppo.PPO.act, ppo.PPO.update


class _Moments:
    """The statistics of rsl_rl's normaliser, which replaces its tensors, as the operations take them."""

    def __init__(self, normalizer: EmpiricalNormalization) -> None:
        self._normalizer = normalizer

    @property
    def shift(self) -> Tensor:
        return self._normalizer._mean[0]

    @property
    def std(self) -> Tensor:
        return self._normalizer._std[0] + self._normalizer.eps


def _supported(algorithm: ppo.PPO, obs: TensorDict) -> None:
    """Raises Unsupported unless rsl_rl would compute what the operations do."""
    if _minor > 5:
        raise Unsupported(f"rsl-rl-lib is {VERSION}, and the update that is known is that of 5.0 to 5.5")
    for name in ("rnd", "symmetry"):
        if getattr(algorithm, name) is not None:
            raise Unsupported(f"{name} is on")
    if getattr(algorithm, "use_mixed_precision", False) or torch.is_autocast_enabled(
        torch.device(algorithm.device).type
    ):
        raise Unsupported("mixed precision is on")
    if algorithm.storage.num_envs * algorithm.storage.num_transitions_per_env < algorithm.num_mini_batches:
        raise Unsupported("minibatches are empty")
    if _has_any_global_hook():
        raise Unsupported("torch has hooks for all modules, which would not be called")
    parameters: list[Tensor] = []
    for name, model in (("actor", algorithm.actor), ("critic", algorithm.critic)):
        if type(model) is not MLPModel:
            raise Unsupported(f"{name} is {type(model).__name__}, not MLPModel itself")
        if type(model.mlp) is not MLP:
            raise Unsupported(f"{name}.mlp is {type(model.mlp).__name__}, not rsl_rl's MLP")
        if type(model.obs_normalizer) not in (EmpiricalNormalization, nn.Identity):
            raise Unsupported(f"{name}.obs_normalizer is {type(model.obs_normalizer).__name__}")
        for x in model.modules():
            if hooked(x) or any(map(callable, vars(x).values())):
                raise Unsupported(f"{name} has hooks or functions of its own in its {type(x).__name__}")
        parameters += model.mlp.parameters()
        wrong = [x.dtype for x in (*model.parameters(), *_inputs(model, obs)) if x.dtype != torch.float32]
        if wrong:
            raise Unsupported(f"{name} has parameters or observations of {wrong[0]}, not of float32")
    if len({id(x) for x in parameters}) < len(parameters):
        raise Unsupported("actor and critic share parameters")
    found = algorithm.actor.distribution, algorithm.critic.distribution
    if type(found[0]) is not GaussianDistribution or found[1] is not None:
        raise Unsupported(f"distributions are {', '.join(type(x).__name__ for x in found)}, not GaussianDistribution")


def _inputs(model: MLPModel, obs: TensorDict) -> list[Tensor]:
    groups = [obs[name] for name in model.obs_groups]
    return [x.detach() for x in groups if x.shape[-1] > 0]


def _observed(algorithm: ppo.PPO, obs: TensorDict) -> tuple[list[Tensor], list[Tensor] | None]:
    """The inputs of actor and critic, None where they are the same."""
    actor, critic = algorithm.actor, algorithm.critic
    same = actor.obs_groups == critic.obs_groups
    return _inputs(actor, obs), None if same else _inputs(critic, obs)


def _prepared(algorithm: ppo.PPO, obs: TensorDict, operation: type, **options: Any) -> Any:
    """A FusedAct or FusedUpdate for this algorithm; None, and why once in the log, where rsl_rl has to compute it."""
    if getattr(algorithm.storage, "learner", "rsl_rl") == "rsl_rl":
        return None
    try:
        _supported(algorithm, obs)
        models = algorithm.actor, algorithm.critic
        networks = [nn.Sequential(*x.mlp._modules.values()) for x in models]
        normalizers = [x.obs_normalizer for x in models]
        moments = [None if type(x) is nn.Identity else _Moments(x) for x in normalizers]
        tf32 = torch.device(algorithm.device).type == "cuda" and torch.backends.cuda.matmul.fp32_precision == "tf32"
        options |= {"obs_clip": math.inf, "matmul": "tf32" if tf32 else "float32"}
        return operation(*networks, obs_normalizer=moments[0], critic_normalizer=moments[1], **options)
    except Unsupported as reason:
        if str(reason) not in _told:
            _told.add(str(reason))
            _logger.warning("PPO acts and learns by rsl_rl's own code: %s.", reason)
        return None


def act(self: ppo.PPO, obs: TensorDict) -> Tensor:
    """``PPO.act`` in one operation, which draws the numbers that rsl_rl would."""
    if self.storage.step == 0 or not hasattr(self, "_fused_act"):  # models may have changed between rollouts
        self._fused_act = _prepared(self, obs, FusedAct)
    if self._fused_act is None:
        return _peer_act(self, obs)
    distribution, transition = self.actor.distribution, self.transition
    with torch.no_grad():
        distribution.update(torch.zeros(distribution.output_dim, device=self.device))
        acted = self._fused_act(distribution.std, *_observed(self, obs))
        distribution.update(acted.mean)
    transition.hidden_states = (None, None)
    transition.actions, transition.values = acted.actions, acted.values.unsqueeze(1)
    transition.actions_log_prob = acted.log_probs
    transition.distribution_params = self.actor.output_distribution_params
    transition.observations = obs
    return acted.actions


def update(self: ppo.PPO) -> dict[str, float]:
    """``PPO.update``. ``actor.output_std`` is then rsl_rl's; ``actor.output_mean`` that of the policy that acted."""
    gradients = _prepared(
        self,
        self.storage.observations,
        FusedUpdate,
        clip=self.clip_param,
        value_clip=self.clip_param if self.use_clipped_value_loss else None,
        value_loss_coef=self.value_loss_coef,
        entropy_coef=self.entropy_coef,
        reuse=True,
    )
    if gradients is None:
        return _peer_update(self)
    groups = [[*self.actor.parameters()], [*self.critic.parameters()]]
    fused_step = bool(self.max_grad_norm) and adam.why_not(self.optimizer, groups) is None
    found = []
    for batch in self.storage.mini_batch_generator(self.num_mini_batches, self.num_learning_epochs):
        self.optimizer.zero_grad()  # std is a function of its parameter: autograd adds to that one's gradient
        metrics = _gradients(self, batch, gradients)
        found.append(metrics[:3])
        if self.desired_kl is not None and self.schedule == "adaptive":
            _adapt_learning_rate(self, batch, metrics[3])
        if self.is_multi_gpu:
            self.reduce_parameters()
        if fused_step:
            adam.step(self.optimizer, groups, self.max_grad_norm)
        else:
            for parameters in groups:
                nn.utils.clip_grad_norm_(parameters, self.max_grad_norm)
            self.optimizer.step()
    if _minor >= 5:  # before, they were updated with each step
        obs = self.storage.observations.flatten(0, 1)
        self.actor.update_normalization(obs)
        self.critic.update_normalization(obs)
    surrogate, value, entropy = torch.stack(found).double().mean(0).tolist()
    self.storage.clear()
    return {"value": value, "surrogate": surrogate, "entropy": entropy}


def _gradients(algorithm: ppo.PPO, batch: Any, gradients: FusedUpdate) -> Tensor:
    """Sets the gradients of a minibatch. Returns the METRICS of FusedUpdate."""
    advantages = batch.advantages
    if algorithm.normalize_advantage_per_mini_batch:
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    distribution, (mu, sigma) = algorithm.actor.distribution, batch.old_distribution_params
    distribution.update(mu)  # for its standard deviation, with the gradient that rsl_rl has for it
    if algorithm.storage.shuffle == "rsl_rl":
        distribution.sample()  # as rsl_rl does here: the next rollout then draws what it draws
    obs, critic_obs = _observed(algorithm, batch.observations)
    return gradients(
        distribution.std[0],
        obs=obs,
        critic_obs=critic_obs,
        actions=batch.actions,
        log_probs=batch.old_actions_log_prob.reshape(-1),
        advantages=advantages.reshape(-1),
        returns=batch.returns.reshape(-1),
        values=batch.values.reshape(-1),
        mu=mu,
        sigma=sigma,
    )


@torch.no_grad()
def _adapt_learning_rate(algorithm: ppo.PPO, batch: Any, kl: Tensor) -> None:
    """rsl_rl's schedule. Waits for the device once."""
    actor, several = algorithm.actor, algorithm.is_multi_gpu
    divergence = kl.item()
    small = 0.0 < divergence < SMALL_KL  # rsl_rl raises the rate where its own formula does not round to 0
    if small:
        mean = actor.mlp(actor.get_latent(batch.observations))
        new = mean, actor.distribution.std
        kl = actor.get_kl_divergence(batch.old_distribution_params, new).mean()
    if several:
        torch.distributed.all_reduce(kl)
        kl /= algorithm.gpu_world_size
    if small or several:
        divergence = kl.item()
    rate, desired = algorithm.learning_rate, algorithm.desired_kl
    if algorithm.gpu_global_rank == 0:
        if divergence > desired * 2.0:
            rate = max(1e-5, rate / 1.5)
        elif 0.0 < divergence < desired / 2.0:
            rate = min(1e-2, rate * 1.5)
    if several:
        shared = torch.tensor(rate, device=algorithm.device)
        torch.distributed.broadcast(shared, src=0)
        rate = shared.item()
    algorithm.learning_rate = rate
    for group in algorithm.optimizer.param_groups:
        group["lr"] = rate
