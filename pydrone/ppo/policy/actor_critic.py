"""The policy: two multilayer perceptrons and a Gaussian whose standard deviation does not depend on the state.

Other policies derive from it: discrete actions (:mod:`pydrone.ppo.policy.discrete`), recurrent layers
(:mod:`pydrone.ppo.policy.recurrent`). :mod:`pydrone.ppo.policy.make` picks one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pydrone.ppo.distributed import ALONE, Ranks
from pydrone.ppo.policy import matmul as precision
from pydrone.ppo.policy.distributions import gaussian_entropy, gaussian_kl, gaussian_log_prob, log_normalizer
from pydrone.ppo.policy.normalization import RunningMoments
from pydrone.rollout.layout import Spec, parse_obs
from pydrone.rollout.views import Rollout

# The standard deviation is a plain parameter, and a gradient step could take it below zero. With less than this, the
# rounding of an action of size 1 in float32 would show in its probability.
MIN_STD = 1e-4


class PolicyStep(NamedTuple):
    """What a rollout stores of the policy, for N environments and A action dimensions or K discrete actions."""

    actions: Tensor  # [N, A], drawn; discrete: int64 [N]
    log_probs: Tensor  # [N]
    values: Tensor  # [N]
    mean: Tensor  # [N, A]; discrete: logarithms of the probabilities, [N, K]
    std: Tensor | None  # [N, A], the same row N times, without memory of its own; discrete: None


class Evaluation(NamedTuple):
    """What the loss needs of the policy, for B samples and A action dimensions or K discrete actions."""

    log_probs: Tensor  # [B], of the given actions
    values: Tensor  # [B], normalised where the policy normalises values
    mean: Tensor  # [B, A]; discrete: logarithms of the probabilities, [B, K]
    std: Tensor | None  # [A]; discrete: None


class _Tanh(nn.Module):
    """tanh in place: its derivative needs only the result, so the input's memory can be reused."""

    def forward(self, x: Tensor) -> Tensor:
        return x.tanh_()


# In place only where the derivative needs just the result; SiLU's needs the input.
ACTIVATIONS = {"tanh": _Tanh, "elu": partial(nn.ELU, inplace=True), "relu": partial(nn.ReLU, inplace=True)}
ACTIVATIONS["silu"] = nn.SiLU


def mlp(inputs: int, outputs: int, hidden_dims: Sequence[int], activation: str = "tanh") -> nn.Sequential:
    """Linear layers with activations between them, initialised as torch does, which is also what rsl_rl trains from."""
    layers: list[nn.Module] = []
    for width in hidden_dims:
        layers += [nn.Linear(inputs, width), ACTIVATIONS[activation]()]
        inputs = width
    return nn.Sequential(*layers, nn.Linear(inputs, outputs))


class ActorCritic(nn.Module):
    """Separate actor and critic; ``state_dict`` holds both, ``std_param`` [A] and the normalisers.

    Args:
        obs: as the rollout buffer's, an int, a shape, or a mapping of group names to shapes or (shape, dtype); each a
            vector.
        actions: action dimensions A.
        hidden_dims: widths of the hidden layers.
        activation: of the hidden layers, tanh, elu, relu or silu.
        init_std: initial standard deviation of every dimension; below MIN_STD it is MIN_STD.
        actor_obs, critic_obs: names of the groups that each sees, concatenated in this order. Empty: the actor sees
            "policy" and the critic "critic", or the actor's groups where there is no such group.
        normalize_obs: normalise observations by running statistics, which :meth:`observe` updates, and clip them to
            ``obs_clip``.
        normalize_values: the critic predicts returns normalised by running statistics, which :meth:`observe_returns`
            updates.
        obs_dtype: a half precision that observations are rounded to first, as in the buffer.
        matmul: what operands of matrix products are rounded to, one of MATMUL. None: the device's default
            (:func:`pydrone.ppo.policy.matmul.chosen`).
    """

    recurrent = False
    _like: Tensor

    def __init__(
        self,
        obs: object,
        actions: int,
        hidden_dims: Sequence[int] = (128, 128),
        init_std: float = 1.0,
        *,
        actor_obs: Sequence[str] = (),
        critic_obs: Sequence[str] = (),
        normalize_obs: bool = False,
        obs_clip: float = 10.0,
        normalize_values: bool = False,
        obs_dtype: torch.dtype = torch.float32,
        matmul: str | None = None,
        activation: str = "tanh",
    ) -> None:
        super().__init__()
        self.obs = obs
        self.matmul, self.obs_clip, self._activation = matmul, obs_clip, activation
        self.obs_dtype = obs_dtype
        groups, named = parse_obs(obs, torch.float32)
        self.actor_obs, self.critic_obs = _pick_groups(groups, named, tuple(actor_obs), tuple(critic_obs))
        widths = [sum(_width(groups[name]) for name in names) for names in (self.actor_obs, self.critic_obs)]
        self._build(widths, actions, hidden_dims, init_std)
        # Follows the networks' dtype and device.
        self.register_buffer("_like", torch.empty(0), persistent=False)
        self.actor_normalizer: RunningMoments | None = None
        self.critic_normalizer: RunningMoments | None = None
        self.value_normalizer: RunningMoments | None = RunningMoments() if normalize_values else None
        if normalize_obs:
            self.actor_normalizer = RunningMoments(widths[0])
            same = self.actor_obs == self.critic_obs
            self.critic_normalizer = self.actor_normalizer if same else RunningMoments(widths[1])

    def _build(self, widths: Sequence[int], actions: int, hidden_dims: Sequence[int], init_std: float) -> None:
        """Makes the networks. widths: of the actor's and the critic's inputs."""
        self.actor = mlp(widths[0], actions, hidden_dims, self._activation)
        self.critic = mlp(widths[1], 1, hidden_dims, self._activation)
        self.std_param = nn.Parameter(torch.full((actions,), float(init_std)))

    # ----------------------------------------------------------------------------------- the distribution of actions

    @property
    def std(self) -> Tensor:
        """[A], the standard deviation, at least MIN_STD; NaN for discrete actions."""
        return self.std_param.clamp_min(MIN_STD)

    @torch.no_grad()
    def bound_std(self) -> None:
        """Sets ``std_param`` to MIN_STD where it is below: there :attr:`std` has no gradient, and would never rise.

        The learner calls it before each gradient; a loop of your own should, too.
        """
        self.std_param.clamp_(min=MIN_STD)

    def fields(self) -> dict[str, int]:
        """The rollout buffer's fields that the policy's distribution is stored in."""
        return {"mu": self.std_param.numel(), "sigma": self.std_param.numel()}

    def stored(self, step: PolicyStep) -> dict[str, Any]:
        """What goes into :meth:`fields`."""
        return {"mu": step.mean, "sigma": step.std}

    def draw(self, mean: Tensor, values: Tensor) -> PolicyStep:
        """Draws actions. mean: [N, A], values: [N]."""
        std = self.std
        noise = torch.randn_like(mean)
        # (actions - mean) / std is the noise itself.
        log_probs = noise.square().sum(-1).mul_(-0.5).sub_(log_normalizer(std))
        return PolicyStep(torch.addcmul(mean, noise, std), log_probs, values, mean, std.expand_as(mean))

    def judge(self, mean: Tensor, values: Tensor, actions: Tensor) -> Evaluation:
        """Log-probabilities of ``actions`` [B, A]. mean: [B, A], values: [B]."""
        std = self.std
        return Evaluation(gaussian_log_prob(actions, mean, std), values, mean, std)

    def entropy(self, new: Evaluation) -> Tensor:
        """Scalar, in nats, mean over B."""
        return gaussian_entropy(new.std)

    def kl(self, old: Mapping[str, Tensor], new: Evaluation) -> Tensor:
        """KL(old || new), a scalar in nats, mean over B. old: fields from :meth:`stored`, [B, ...]."""
        return gaussian_kl(old["mu"], old["sigma"], new.mean, new.std)

    def likeliest(self, mean: Tensor) -> Tensor:
        """The likeliest action, given the actor's outputs."""
        return mean

    def mode(self, obs: Tensor | Mapping[str, Tensor]) -> Tensor:
        """The likeliest action, [N, A] (discrete: int64 [N]), without noise. A recurrent policy's memory moves on."""
        return self.likeliest(self.mean(obs))

    # ------------------------------------------------------------------------------------------------- the networks

    @torch.no_grad()
    def act(self, obs: Tensor | Mapping[str, Tensor]) -> PolicyStep:
        """Draws an action for each environment. obs: [N, ...]."""
        return self.draw(self.mean(obs), self.value(obs))

    def evaluate(self, obs: Tensor | Mapping[str, Tensor], actions: Tensor) -> Evaluation:
        """Log-probabilities of ``actions`` [B, A], with values, means and standard deviation, differentiable."""
        return self.judge(self.mean(obs), self.normalized_value(obs), actions)

    def mean(self, obs: Tensor | Mapping[str, Tensor]) -> Tensor:
        """[B, A]: the action without noise (discrete: the logarithms of the probabilities)."""
        return self._actor_outputs(self._actor_input(obs))

    def value(self, obs: Tensor | Mapping[str, Tensor]) -> Tensor:
        """[B]: the critic's estimate of the return."""
        return self._denormalized(self.normalized_value(obs))

    def normalized_value(self, obs: Tensor | Mapping[str, Tensor]) -> Tensor:
        """[B]: the critic's output, :meth:`value` in the unit of :meth:`evaluate`'s."""
        return self._run(self.critic, self._critic_input(obs)).squeeze(-1)

    def _actor_outputs(self, x: Tensor) -> Tensor:
        return self._run(self.actor, x)

    def _denormalized(self, values: Tensor) -> Tensor:
        return values if self.value_normalizer is None else self.value_normalizer.denormalize(values)

    def _run(self, network: nn.Module, x: Tensor) -> Tensor:
        with precision.forward(self.matmul, x.device):
            return network(x).to(x.dtype)

    def _actor_input(self, obs: Tensor | Mapping[str, Tensor]) -> Tensor:
        return self._input(obs, self.actor_obs, self.actor_normalizer)

    def _critic_input(self, obs: Tensor | Mapping[str, Tensor]) -> Tensor:
        return self._input(obs, self.critic_obs, self.critic_normalizer)

    def _input(
        self, obs: Tensor | Mapping[str, Tensor], names: Sequence[str], normalizer: RunningMoments | None
    ) -> Tensor:
        x = self._groups(obs, names)
        return x if normalizer is None else normalizer.normalize(x).clamp(-self.obs_clip, self.obs_clip)

    def _groups(self, obs: Tensor | Mapping[str, Tensor], names: Sequence[str]) -> Tensor:
        """The groups concatenated, in the networks' dtype."""
        if not isinstance(obs, Mapping):
            return self.rounded(obs)
        return self.rounded(obs[names[0]]) if len(names) == 1 else torch.cat([self.rounded(obs[x]) for x in names], -1)

    def rounded(self, obs: Tensor) -> Tensor:
        """A group of observations rounded as it is stored, in the networks' dtype."""
        if self.obs_dtype != torch.float32 and obs.is_floating_point():
            obs = obs.to(self.obs_dtype)
        return obs.to(self._like.dtype)

    forward = mean

    # --------------------------------------------------------------------------------------------- running statistics

    @property
    def untried(self) -> bool:
        """Whether any running statistics have seen no sample yet. Waits for the device."""
        normalizers = (self.actor_normalizer, self.critic_normalizer, self.value_normalizer)
        return any(x is not None and not x.count for x in normalizers)

    @torch.no_grad()
    def observe(
        self, obs: Rollout | Tensor | Mapping[str, Tensor], ranks: Ranks = ALONE, *, valid: Tensor | None = None
    ) -> None:
        """Updates the running statistics, if there are any, with every rank's observations.

        obs: a buffer, of which reset steps do not count; or [N, T, ...], of which those count that ``valid``, bool
        [N, T], marks (None: all).
        """
        if self.actor_normalizer is None:
            return
        if isinstance(obs, Rollout):
            obs, valid = obs.obs, obs.valid
        self.actor_normalizer.update(self._groups(obs, self.actor_obs), valid, ranks)
        if self.critic_normalizer is not self.actor_normalizer:
            self.critic_normalizer.update(self._groups(obs, self.critic_obs), valid, ranks)

    @torch.no_grad()
    def observe_returns(self, returns: Rollout | Tensor, valid: Tensor | None = None, ranks: Ranks = ALONE) -> None:
        """Updates the running statistics, if there are any, with every rank's returns: of a buffer, or [N, T].

        ``valid`` as in :meth:`observe`.

        The critic's last layer changes with them, so that :meth:`value` stays the same (PopArt,
        arXiv:1602.07714). Not at the first returns, whose mean is a better guess.
        """
        normalizer = self.value_normalizer
        if normalizer is None:
            return
        if isinstance(returns, Rollout):
            returns, valid = returns.returns, returns.valid
        first, shift, std = normalizer.count == 0, normalizer.shift.clone(), normalizer.std.clone()
        normalizer.update(returns, valid, ranks)
        last = self.critic[-1]
        weight, bias = last.weight * (std / normalizer.std), (last.bias * std + shift - normalizer.shift)
        last.weight.copy_(torch.where(first, last.weight, weight))
        last.bias.copy_(torch.where(first, last.bias, bias / normalizer.std))

    def normalize_values(self, values: Tensor) -> Tensor:
        """Values or returns in the unit of :meth:`evaluate`'s values."""
        return values if self.value_normalizer is None else self.value_normalizer.normalize(values)

    # ----------------------------------------------------------------------------------------------------- parameters

    def actor_parameters(self) -> list[nn.Parameter]:
        """The actor's parameters, the standard deviation among them."""
        return [*self.actor.parameters(), self.std_param]

    def critic_parameters(self) -> list[nn.Parameter]:
        """The critic's parameters."""
        return list(self.critic.parameters())


def _pick_groups(
    groups: Mapping[str, Spec], named: bool, actor: tuple[str, ...], critic: tuple[str, ...]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The names of the groups that the actor and the critic see."""
    for argument, names in (("actor_obs", actor), ("critic_obs", critic)):
        if names and not named:
            raise ValueError(f"{argument}: expected none, the observations have no groups, got {names}")
        for name in names:
            if name not in groups:
                raise ValueError(f"{argument}: expected some of {sorted(groups)}, got {name!r}")
    if not named:
        return ("obs",), ("obs",)
    if not actor and "policy" not in groups:
        raise ValueError(f"obs: expected a group named 'policy', got {sorted(groups)}")
    actor = actor or ("policy",)
    return actor, critic or (("critic",) if "critic" in groups else actor)


def _width(spec: Spec) -> int:
    shape, _ = spec
    if len(shape) != 1:
        raise ValueError(f"obs: expected a vector for the perceptrons, got shape {list(shape)}")
    return shape[0]
