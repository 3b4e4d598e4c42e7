"""Stable-Baselines3's PPO on the fused learner: both of its calls of the policy, acting and learning."""

from __future__ import annotations

import functools
import logging
import math
import types
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from pydrone.integrations.sb3_buffers import DictRolloutBuffer, RolloutBuffer  # checks the version
from pydrone.ppo.learner import adam
from pydrone.ppo.learner.networks import Unsupported, hooked
from pydrone.ppo.learner.prepared import METRICS, FusedAct, FusedUpdate

# isort: split
import stable_baselines3
from gymnasium import spaces
from stable_baselines3.common import buffers, distributions, torch_layers
from stable_baselines3.common.policies import ActorCriticPolicy, MultiInputActorCriticPolicy
from stable_baselines3.common.type_aliases import PyTorchObs
from stable_baselines3.common.utils import explained_variance

__all__ = ["PPO"]

_APPROX_KL = METRICS.index("approx_kl")
_logger = logging.getLogger("pydrone.integrations.sb3")

# Theirs stand for the default, as Stable-Baselines3 saves it.
_OURS = {buffers.RolloutBuffer: RolloutBuffer, buffers.DictRolloutBuffer: DictRolloutBuffer}


@functools.cache
def _tell(reason: str) -> None:
    """Once per reason."""
    _logger.warning("the policy goes Stable-Baselines3's own way, not pydrone's fused one: %s", reason)


class PPO(stable_baselines3.PPO):
    """Stable-Baselines3's PPO with its arguments, attributes, logged figures and files.

    The rollout's policy calls and ``train`` run on the fused learner for MlpPolicy and MultiInputPolicy without images,
    custom networks, extractors and hooks, and for Box, Discrete and MultiDiscrete actions without gSDE. Everything else
    goes Stable-Baselines3's way, with a warning that says why. ``rollout_buffer_class=None`` is pydrone's buffer.
    """

    def _setup_model(self) -> None:
        given = self.rollout_buffer_class
        if given is None:
            grouped = isinstance(self.observation_space, spaces.Dict)
            given = buffers.DictRolloutBuffer if grouped else buffers.RolloutBuffer
        self.rollout_buffer_class = _OURS.get(given, given)
        super()._setup_model()
        if not self.rollout_buffer_kwargs:  # so that a file can be loaded where there is no pydrone
            self.rollout_buffer_class = given

    def collect_rollouts(self, *arguments: Any, **named: Any) -> bool:
        policy = self.policy
        try:
            acting = _Acting.of(policy)
        except (Unsupported, TypeError, ValueError) as error:
            _tell(str(error))
            return super().collect_rollouts(*arguments, **named)
        _acting[policy], policy.forward = acting, types.MethodType(forward, policy)
        try:
            return super().collect_rollouts(*arguments, **named)
        finally:
            del _acting[policy]
            if getattr(vars(policy).get("forward"), "__func__", None) is forward:
                del policy.forward

    def train(self) -> None:
        policy, value_clip = self.policy, None
        clip = self.clip_range(self._current_progress_remaining)
        if self.clip_range_vf is not None:
            value_clip = self.clip_range_vf(self._current_progress_remaining)
        try:
            update = self._update(clip, value_clip)
        except (Unsupported, TypeError, ValueError) as error:
            _tell(str(error))
            return super().train()
        policy.set_training_mode(True)
        self._update_learning_rate(policy.optimizer)
        policy.optimizer.zero_grad()
        step, log_std = self._step(), _log_std(policy)
        metrics: list[Tensor] = []
        stopped = False
        for epoch in range(self.n_epochs):
            before = len(metrics)
            for samples in self._minibatches():
                metrics.append(update.run(log_std, samples))
                if self.target_kl is not None:
                    divergence = metrics[-1][_APPROX_KL].item()
                    if divergence > 1.5 * self.target_kl:
                        stopped = True
                        if self.verbose >= 1:
                            print(f"Early stopping at step {epoch} due to reaching max kl: {divergence:.2f}")
                        break
                step()
            self._n_updates += 1
            if stopped:
                break

        figures = torch.stack(metrics).double().cpu().numpy()
        if not np.isfinite(figures[:-1, :2]).all():
            # Weights are NaN since then: torch's distributions raise, as in Stable-Baselines3.
            policy._get_action_dist_from_latent(policy.mlp_extractor.forward_actor(*samples[0]))
        self._record(figures, figures[before:], clip, value_clip)

    def _record(self, figures: np.ndarray, last_epoch: np.ndarray, clip: float, value_clip: float | None) -> None:
        """Logs the METRICS of all minibatches under Stable-Baselines3's names."""
        record, buffer, log_std = self.logger.record, self.rollout_buffer, _log_std(self.policy)
        surrogate, value_loss, entropy, _, _, clipped = figures.T
        record("train/entropy_loss", -entropy.mean())
        record("train/policy_gradient_loss", surrogate.mean())
        record("train/value_loss", value_loss.mean())
        record("train/approx_kl", last_epoch[:, _APPROX_KL].mean())
        record("train/clip_fraction", clipped.mean())
        record("train/loss", float(surrogate[-1] - self.ent_coef * entropy[-1] + self.vf_coef * value_loss[-1]))
        record("train/explained_variance", explained_variance(buffer.values.flatten(), buffer.returns.flatten()))
        if log_std is not None:
            record("train/std", log_std.detach().exp().mean().item())
        record("train/n_updates", self._n_updates, exclude="tensorboard")
        record("train/clip_range", clip)
        if value_clip is not None:
            record("train/clip_range_vf", value_clip)

    def _update(self, clip: float, value_clip: float | None) -> FusedUpdate:
        """Raises where Stable-Baselines3 has to compute the gradients."""
        buffer = self.rollout_buffer
        if type(buffer) not in (*_OURS, *_OURS.values()) or _altered(buffer):
            raise Unsupported(f"expected pydrone's rollout buffer as it is, got another {type(buffer).__name__}")
        if self.n_epochs < 1:
            raise Unsupported(f"n_epochs is {self.n_epochs}")
        actor, critic, options = _taken_apart(self.policy)
        return FusedUpdate(
            actor,
            critic,
            clip=clip,
            value_clip=value_clip,
            value_max=False,
            value_loss_coef=self.vf_coef,
            entropy_coef=self.ent_coef,
            reuse=True,
            **options,
        )

    def _step(self) -> Callable[[], object]:
        """Clips the gradients and takes the optimiser's step."""
        optimizer, parameters, most = self.policy.optimizer, [*self.policy.parameters()], self.max_grad_norm
        same = {*map(id, parameters)} == {id(x) for group in optimizer.param_groups for x in group["params"]}
        # An optimiser whose ``step`` has been replaced, as a scheduler of the learning rate does, is asked itself.
        if same and most > 0 and "step" not in vars(optimizer) and adam.why_not(optimizer, [parameters]) is None:
            return functools.partial(adam.step, optimizer, [parameters], most)

        def step() -> None:
            nn.utils.clip_grad_norm_(parameters, most)
            optimizer.step()

        return step

    def _minibatches(self) -> Iterator[tuple]:
        """An epoch's, as :meth:`FusedUpdate.run` takes them."""
        size = self.batch_size
        # All samples as one minibatch: the order is that of get(size), and one launch gathers them.
        for epoch in self.rollout_buffer.get():
            obs, actions, values, log_probs, advantages, returns = epoch[:6]
            if self.normalize_advantage:
                advantages = _normalized(advantages, size)
            columns = (x.split(size) for x in (actions, log_probs, advantages, returns, values))
            for seen, *others in zip(_split(obs, size), *columns, strict=True):
                yield ([_features(self.policy, seen)], [], *others, None, None)


def forward(policy: ActorCriticPolicy, obs: PyTorchObs, deterministic: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """As ``ActorCriticPolicy.forward``, by FusedAct for the policy that is collecting a rollout.

    On a copy of it, made meanwhile, this is Stable-Baselines3's. (Its name is that of the method that a pickle names.)
    """
    acting = _acting.get(policy)
    if acting is not None and not deterministic and not torch.is_grad_enabled() and acting.parts == _parts(policy):
        actions, log_probs, values, mean = acting.act(_log_std(policy), _features(policy, obs))
        if not math.isnan(mean.sum()):  # else torch's distributions raise
            if acting.discrete:
                actions = actions.long()
            return actions.reshape(-1, *policy.action_space.shape), values[:, None], log_probs
    return type(policy).forward(policy, obs, deterministic)


class _Acting(NamedTuple):
    """How a policy acts, as long as these are its parts."""

    act: FusedAct
    discrete: bool
    parts: list[object]

    @classmethod
    def of(cls, policy: ActorCriticPolicy) -> _Acting:
        """Raises where Stable-Baselines3 has to act."""
        actor, critic, options = _taken_apart(policy)
        return cls(FusedAct(actor, critic, **options), "categories" in options, _parts(policy))


# By policy, not in it: copies and files of a policy have nothing of this.
_acting: weakref.WeakKeyDictionary[ActorCriticPolicy, _Acting] = weakref.WeakKeyDictionary()


def _taken_apart(policy: ActorCriticPolicy) -> tuple[nn.Sequential, nn.Sequential, dict[str, Any]]:
    """Actor, critic, and what FusedUpdate and FusedAct have to know of the actions; raises Unsupported where they are
    not exactly as known."""
    if type(policy) not in (ActorCriticPolicy, MultiInputActorCriticPolicy):
        raise Unsupported(f"expected ActorCriticPolicy or MultiInputActorCriticPolicy, got {type(policy).__name__}")
    for extractor in (policy.features_extractor, policy.pi_features_extractor, policy.vf_features_extractor):
        # Neither has parameters.
        flat = type(extractor) is torch_layers.FlattenExtractor or (
            type(extractor) is torch_layers.CombinedExtractor
            and all(type(x) is nn.Flatten for x in extractor.extractors.values())
        )
        if not flat:
            raise Unsupported(f"expected observations that are only flattened, got {type(extractor).__name__}")
    if type(policy.mlp_extractor) is not torch_layers.MlpExtractor:
        raise Unsupported(f"expected an MlpExtractor, got {type(policy.mlp_extractor).__name__}")
    if _has_any_global_hook() or any((x is not policy and hooked(x)) or _altered(x) for x in policy.modules()):
        raise Unsupported("a module has hooks or replaced methods, which would not be called")
    if torch.is_autocast_enabled(policy.device.type):
        raise Unsupported("autocast is on")
    kind, log_std = type(policy.action_dist), _log_std(policy)
    if kind is distributions.DiagGaussianDistribution:
        options = {"log_std": True}
    elif kind is distributions.CategoricalDistribution:
        options = {"categories": [int(policy.action_dist.action_dim)]}
    elif kind is distributions.MultiCategoricalDistribution:
        options = {"categories": [int(x) for x in policy.action_dist.action_dims]}
    else:
        raise Unsupported(f"expected Gaussian or categorical actions, got {kind.__name__}")
    nets = policy.mlp_extractor
    actor = nn.Sequential(*nets.policy_net._modules.values(), policy.action_net)
    critic = nn.Sequential(*nets.value_net._modules.values(), policy.value_net)
    own = [*actor.parameters(), *critic.parameters()]
    if "log_std" in options:
        if log_std.dtype is not torch.float32 or log_std._backward_hooks or log_std._post_accumulate_grad_hooks:
            raise Unsupported("expected a log_std in float32, without hooks")
        own.append(log_std)
    if {*map(id, own)} != {*map(id, policy.parameters())}:
        raise Unsupported("the policy has parameters of its own")
    return actor, critic, options


def _altered(x: object) -> bool:
    """Whether an attribute hides a method of the class."""
    methods = ((getattr(type(x), name, None), value) for name, value in vars(x).items())
    return any(callable(y) and getattr(value, "__func__", None) is not y for y, value in methods)


def _parts(policy: ActorCriticPolicy) -> list[object]:
    """What :func:`_taken_apart` looks at, to see whether it has been replaced."""
    modules = policy._modules
    layers = (layer for net in modules["mlp_extractor"]._modules.values() for layer in net._modules.values())
    return [policy.action_dist, *modules.values(), *layers]


def _log_std(policy: ActorCriticPolicy) -> nn.Parameter | None:
    return policy._parameters.get("log_std")


def _features(policy: ActorCriticPolicy, obs: PyTorchObs) -> Tensor:
    """[N, features], the same for actor and critic."""
    flat = isinstance(obs, Tensor) and obs.dtype is torch.float32 and obs.dim() == 2  # so it is no image
    if flat and type(policy.observation_space) is spaces.Box:
        return obs
    with torch.no_grad():
        features = policy.extract_features(obs)
    return features if isinstance(features, Tensor) else features[0]


def _split(obs: PyTorchObs, size: int) -> Iterable[PyTorchObs]:
    if isinstance(obs, Tensor):
        return obs.split(size)
    return (dict(zip(obs, parts, strict=True)) for parts in zip(*(x.split(size) for x in obs.values()), strict=True))


def _normalized(advantages: Tensor, size: int) -> Tensor:
    """Each ``size`` of them by itself; a single one stays as it is."""
    whole = len(advantages) // size * size
    blocks = [advantages[:whole].view(-1, size), advantages[whole:].view(1, -1)]
    for i, x in enumerate(blocks):
        if len(x) and x.shape[1] > 1:
            blocks[i] = (x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + 1e-8)
    return torch.cat([x.flatten() for x in blocks])
