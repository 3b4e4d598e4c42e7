"""The fused learner for the networks of any trainer: PPO's gradients of a minibatch, and acting.

:class:`FusedUpdate` and :class:`FusedAct` check networks and options once and are called many times.
:func:`fused_update` does so for one call.
"""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from pydrone.ops.arguments import boolean, check_tensor
from pydrone.ops.schema import MATMUL, NUM_METRICS, packed_size
from pydrone.ppo.learner.networks import DEVICES, Moments, both, groups_of, has_hooks, moments_of, parts_of, require

#: what :class:`FusedUpdate` returns, in this order
METRICS = ("surrogate_loss", "value_loss", "entropy", "kl", "approx_kl", "clip_fraction")


class Acted(NamedTuple):
    """What :class:`FusedAct` returns, float32, without gradients."""

    actions: Tensor
    """[N, A]; of discrete actions the numbers of the choices."""
    log_probs: Tensor
    """[N]."""
    values: Tensor
    """[N]."""
    mean: Tensor
    """[N, A]; of discrete actions the logits, [N, sum of categories]."""


class _Networks:
    """Actor and critic taken apart, anew where a layer or a parameter has been replaced; and how they are applied."""

    def __init__(self, kernel: str, actor: nn.Module, critic: nn.Module, options: dict[str, Any]) -> None:
        self._kernel, self._modules, self._parts = kernel, (actor, critic), [object()]
        matmul, categories, clip = options["matmul"], options["categories"], options["obs_clip"]
        if matmul is not None and matmul not in MATMUL:
            raise ValueError(f"matmul: expected None or one of {', '.join(MATMUL)}, got {matmul!r}")
        if clip != math.inf:  # which clips nothing
            check_number("obs_clip", clip, 0.0)
        if not all(isinstance(x, int) and not isinstance(x, bool) and x > 0 for x in categories):
            raise ValueError(f"categories: expected positive ints, the choices of each action, got {categories!r}")
        self.categories, self.obs_clip = list(categories), float(clip)
        self.precision = matmul or "float32"
        self.matmul = MATMUL.index(self.precision)
        for name in ("obs_normalizer", "critic_normalizer", "value_normalizer"):
            x = options[name]
            if x is not None and not all(isinstance(getattr(x, y, None), Tensor) for y in ("shift", "std")):
                raise TypeError(f"{name}: expected running statistics with shift and std, got {type(x).__name__}")
        self._normalizers = tuple(options[f"{x}_normalizer"] for x in ("obs", "critic", "value"))
        self.take()

    def take(self) -> bool:
        """Whether they were taken apart anew."""
        parts = parts_of(*self._modules)
        if len(parts) == len(self._parts) and all(map(operator.is_, parts, self._parts)):
            return False
        parameter = next((x for x in parts if isinstance(x, Tensor)), None)
        there = parameter is not None and parameter.device.type in DEVICES
        self.device = parameter.device if there else torch.device("cpu")  # from where the others are refused
        self.actor, self.critic, self.activation = both(*self._modules, self.device)
        require(self._kernel, self.actor, self.critic, self.precision)
        self.parameters, self._parts = [*self.actor, *self.critic], parts
        return True

    def moments(self) -> tuple:
        """The arguments obs_shift to value_std of the operations."""
        obs, critic, value = self._normalizers
        return *moments_of(obs, critic), self.obs_clip, *moments_of(value)

    def check(self, name: str, x: object, floating: bool | None = True) -> None:
        """Raises unless ``x`` is a tensor as the operations take it; of the usual ones it tells so quickly."""
        plain = type(x) is Tensor and x.dtype is torch.float32 and x.layout is torch.strided and not x.is_nested
        if plain and x.device == self.device and not x.requires_grad and forward_ad._current_level < 0:
            return
        check_tensor(name, x, self.device, floating, "the policy's gradients do")

    def groups(self, name: str, obs: Tensor | Sequence[Tensor]) -> list[Tensor]:
        """Observations as the operations take them."""
        if not isinstance(obs, (Tensor, list, tuple)):
            raise TypeError(f"{name}: expected a tensor or several, got {type(obs).__name__}")
        for x in [obs] if isinstance(obs, Tensor) else obs:
            self.check(name, x, None)
        return groups_of(obs)

    def check_inputs(self, seen: Sequence[list[Tensor]], size: int) -> None:
        """Raises ValueError unless groups of the actor, and of the critic (none: the actor's), are the networks'."""
        for name, groups, (weight, *_) in zip(("obs", "critic_obs"), seen, (self.actor, self.critic)):
            for x in groups:
                if x.dim() != 2 or len(x) != size:
                    raise ValueError(f"{name}: expected shape [{size}, width], got {list(x.shape)}")
            width = sum(x.shape[1] for x in groups or seen[0])
            if width != weight.shape[1]:
                raise ValueError(f"{name}: expected {weight.shape[1]} numbers a sample, got {width}")


class FusedUpdate:
    """As ``loss.backward()`` on PPO's loss of a minibatch: adds its gradients to the parameters' ``.grad``.

    Any optimiser, clipping and all-reduce go on from there. The loss is
    surrogate + value_loss_coef * value loss - entropy_coef * entropy, see :mod:`pydrone.ppo.learner.loss` and
    :mod:`pydrone.ppo.policy.distributions`; B = samples, A = actions. float32, on the CPU or on CUDA, all on one
    device; half-precision inputs are widened.

    >>> update = FusedUpdate(actor, critic, entropy_coef=0.01)
    >>> metrics = update(std, obs=obs, actions=actions, ...)

    Layers and parameters may be replaced between calls. Hooks make it raise :class:`Unsupported`.

    Args:
        actor, critic: ``nn.Sequential`` of ``nn.Linear`` with tanh, ELU, ReLU or SiLU between them.
        clip: half-width of the probability ratio's range.
        value_clip: half-width of the value's range around the old value. None: the plain squared error.
        value_max: with ``value_clip``, whether the value loss is the greater of the clipped and the plain squared
            error, as in OpenAI's baselines, rsl_rl and CleanRL, or the clipped one alone, as in Stable-Baselines3 and
            skrl.
        value_loss_coef, entropy_coef: weights in the loss.
        obs_normalizer, critic_normalizer, value_normalizer: running statistics (their ``shift`` and ``std``) that
            inputs, and values and returns, are normalised by; inputs are clipped to ``obs_clip``.
        matmul: what the factors of the networks' products (activations, weights, derivatives) are rounded to:
            "float32" (None), "tf32", which a CPU computes in float32, or "bfloat16", on a CPU with AVX512_BF16: to
            nearest, denormals to zero. Sums, biases, activation functions and everything else stay in float32.
        categories: the number of choices of each discrete action: the actor's outputs are their logits, one action
            after the other. (): actions are Gaussian.
        log_std: whether calls get the logarithm of the standard deviation.
        reuse: whether gradients are written, not added, into tensors that the next call overwrites, which become the
            parameters' ``.grad``. This saves the allocations, and ``zero_grad``. What a ``std`` was computed from is
            added to nevertheless.

    Raises:
        Unsupported: a RuntimeError; the operation cannot serve these networks, or this machine.
        TypeError, ValueError: an argument does not fit.
    """

    def __init__(
        self,
        actor: nn.Module,
        critic: nn.Module,
        *,
        clip: float = 0.2,
        value_clip: float | None = None,
        value_max: bool = True,
        value_loss_coef: float = 1.0,
        entropy_coef: float = 0.0,
        obs_normalizer: Moments | None = None,
        critic_normalizer: Moments | None = None,
        obs_clip: float = 10.0,
        value_normalizer: Moments | None = None,
        matmul: str | None = None,
        categories: Sequence[int] = (),
        log_std: bool = False,
        reuse: bool = False,
    ) -> None:
        for name, x in (("clip", clip), ("value_clip", 0.0 if value_clip is None else value_clip)):
            check_number(name, x, 0.0)
        for name, x in (("value_loss_coef", value_loss_coef), ("entropy_coef", entropy_coef)):
            check_number(name, x, -math.inf)
        self._value_max, self._reuse = boolean("value_max", value_max), boolean("reuse", reuse)
        self._log_std, self._grads = boolean("log_std", log_std), []
        self._numbers = clip, -1.0 if value_clip is None else value_clip, value_loss_coef, entropy_coef
        moments = {"obs_normalizer": obs_normalizer, "critic_normalizer": critic_normalizer}
        moments["value_normalizer"] = value_normalizer
        options = {"matmul": matmul, "categories": categories, "obs_clip": obs_clip, **moments}
        self._networks = _Networks("ppo_gradients", actor, critic, options)

    def __call__(
        self,
        std: Tensor | None,
        *,
        obs: Tensor | Sequence[Tensor],
        actions: Tensor,
        log_probs: Tensor,
        advantages: Tensor,
        returns: Tensor,
        values: Tensor,
        critic_obs: Tensor | Sequence[Tensor] | None = None,
        mu: Tensor | None = None,
        sigma: Tensor | None = None,
    ) -> Tensor:
        """Adds the gradients of one minibatch.

        Args:
            std: [A], the standard deviation, above 0: a parameter, or a function of one. On CUDA its numbers are not
                looked at, which would wait for the device: one below 0 makes the results NaN. With ``log_std``, its
                logarithm. None: actions are discrete.
            obs: [B, width], or several such, concatenated to the actor's input.
            actions: [B, A]; discrete ones are the numbers of the choices, of any dtype, and one that is no choice makes
                the results NaN.
            log_probs: [B], of the policy that acted.
            advantages, returns, values: [B]; values as they were when the policy acted.
            critic_obs: as obs, for the critic. None: the actor's.
            mu, sigma: [B, A], the distribution that actions were drawn from. None: the KL divergence is NaN.

        Returns:
            [6] float32, the METRICS: surrogate, value loss, entropy, KL(old || new), its estimate mean(r - 1 - log r)
            from the ratios r of new to old probabilities, and the share of the samples with abs(r - 1) > clip. Means
            over B, nats.

        Raises:
            TypeError, ValueError, RuntimeError: an argument does not fit; nothing was written.
        """
        networks = self._networks
        networks.take()
        check_std(std, networks)
        networks.check("actions", actions, None if networks.categories else True)
        if not actions.is_floating_point():
            actions = actions.float()
        for name, x in (("log_probs", log_probs), ("advantages", advantages), ("returns", returns), ("values", values)):
            networks.check(name, x)
        for name, x in (("mu", mu), ("sigma", sigma)):
            if x is not None:
                networks.check(name, x)
        seen = networks.groups("obs", obs), [] if critic_obs is None else networks.groups("critic_obs", critic_obs)
        if networks.device.type == "cuda":  # where a kernel would read beyond the end
            width, size = len(networks.categories) or networks.actor[-1].numel(), actions.shape[0]
            rows = {"actions": actions, "mu": mu, "sigma": sigma}
            scalars = {"log_probs": log_probs, "advantages": advantages, "returns": returns, "values": values}
            wanted = [(name, x, [size, width]) for name, x in rows.items() if x is not None]
            wanted += [] if std is None else [("std", std, [width])]
            check_shapes([*wanted, *((name, x, [size]) for name, x in scalars.items())])
            networks.check_inputs(seen, size)
        return self.run(std, (*seen, actions, log_probs, advantages, returns, values, mu, sigma))

    def run(self, std: Tensor | None, samples: tuple, drawn: tuple = (), measured: int = NUM_METRICS) -> Tensor:
        """As a call, unchecked: ``samples`` and ``drawn`` are what ``ppo_gradients`` takes first and last, see
        :mod:`pydrone.ops.schema`. Returns the first ``measured`` METRICS, 4 or all."""
        networks = self._networks
        # Autograd goes on from a function of a parameter, and calls a parameter's hooks.
        by_autograd = std is not None and std.requires_grad and (not std.is_leaf or has_hooks(std))
        parameters = networks.parameters if std is None else [*networks.parameters, std]
        with torch.no_grad():
            grads = self._grads
            if not (self._reuse and len(grads) == len(parameters) and all(map(_same_shape, grads, parameters))):
                with torch.inference_mode(False):
                    grads = self._grads = [torch.empty(x.shape, device=networks.device) for x in parameters]
            deviation = std
            if std is not None:
                deviation = std.exp() if self._log_std else std.contiguous()
            metrics = torch.empty(measured, device=networks.device)
            torch.ops.pydrone.ppo_gradients.default(
                *samples,
                networks.actor,
                networks.critic,
                deviation,
                networks.activation,
                networks.matmul,
                *self._numbers,
                *networks.moments(),
                grads,
                metrics,
                *(drawn or ([], None, None, None)),
                networks.categories,
                self._value_max,
            )
            if self._log_std:
                grads[-1].mul_(deviation)
            for parameter, grad in zip(parameters[: len(parameters) - by_autograd], grads):
                if not parameter.requires_grad:
                    continue
                if self._reuse or parameter.grad is None:
                    parameter.grad = grad
                else:
                    parameter.grad.add_(grad)
        if by_autograd:
            torch.autograd.backward([std], [grads[-1]])
        return metrics


class FusedAct:
    """Acts for N environments in one operation: both networks, the drawn actions and their log-probabilities.

    Weights are packed once, where the processor wants them packed; changes of them take effect at the next call.

    >>> act = FusedAct(actor, critic)
    >>> actions, log_probs, values, mean = act(std, obs)

    Args:
        as of :class:`FusedUpdate`.
    """

    def __init__(
        self,
        actor: nn.Module,
        critic: nn.Module,
        *,
        obs_normalizer: Moments | None = None,
        critic_normalizer: Moments | None = None,
        obs_clip: float = 10.0,
        value_normalizer: Moments | None = None,
        matmul: str | None = None,
        categories: Sequence[int] = (),
        log_std: bool = False,
    ) -> None:
        self._log_std = boolean("log_std", log_std)
        moments = {"obs_normalizer": obs_normalizer, "critic_normalizer": critic_normalizer}
        moments["value_normalizer"] = value_normalizer
        options = {"matmul": matmul, "categories": categories, "obs_clip": obs_clip, **moments}
        self._networks, self._packed = _Networks("ppo_act", actor, critic, options), None

    @torch.no_grad()
    def __call__(
        self,
        std: Tensor | None,
        obs: Tensor | Sequence[Tensor],
        critic_obs: Tensor | Sequence[Tensor] | None = None,
    ) -> Acted:
        """Draws actions with torch's global generator, as ``torch.distributions`` would: the same numbers in the same
        order.

        Args:
            std: [A], above 0; None: actions are discrete.
            obs: [N, width], or several such, concatenated to the actor's input.
            critic_obs: as obs, for the critic. None: the actor's.

        Raises:
            TypeError, ValueError, RuntimeError: an argument does not fit.
        """
        networks = self._networks
        if networks.take() or self._packed is None:
            with torch.inference_mode(False):
                size = packed_size(networks.actor) + packed_size(networks.critic)
                self._packed = torch.zeros(size, device=networks.device)
        seen = networks.groups("obs", obs), [] if critic_obs is None else networks.groups("critic_obs", critic_obs)
        num_envs, options = len(seen[0][0]), {"device": networks.device}
        check_std(std, networks)
        if networks.device.type == "cuda":
            networks.check_inputs(seen, num_envs)
            outputs = networks.actor[-1].numel()
            check_shapes([] if std is None else [("std", std, [outputs])])
        deviation = std
        if std is not None:
            deviation, num_actions = std.exp() if self._log_std else std.contiguous(), len(std)
            noise = torch.randn(num_envs, num_actions, **options)
        else:
            num_actions = len(networks.categories)
            times = [torch.empty(num_envs, x, **options).exponential_() for x in networks.categories]
            noise = times[0] if len(times) == 1 else torch.cat(times, 1)
        actions, mean = torch.empty(num_envs, num_actions, **options), torch.empty_like(noise)
        log_probs, values = torch.empty(num_envs, **options), torch.empty(num_envs, **options)
        torch.ops.pydrone.ppo_act.default(
            *seen,
            noise,
            networks.actor,
            networks.critic,
            deviation,
            networks.activation,
            networks.matmul,
            *networks.moments(),
            self._packed,
            actions,
            log_probs,
            values,
            mean,
            networks.categories,
        )
        return Acted(actions, log_probs, values, mean)


def fused_update(
    actor: nn.Module, critic: nn.Module, std: Tensor | None, *, autocast: bool = False, **arguments: Any
) -> Tensor:
    """:class:`FusedUpdate` for one call: takes the arguments of its constructor and of its call, and returns METRICS.

    Args:
        actor, critic, std: as there.
        autocast: True: ``matmul="bfloat16"``.
        arguments: the others, by name.

    Raises:
        Unsupported, TypeError, ValueError, RuntimeError: as there; nothing was written.
    """
    matmul = arguments.get("matmul")
    if not isinstance(autocast, bool):
        raise TypeError(f"autocast: expected a bool, got {type(autocast).__name__}")
    if autocast and matmul not in (None, "bfloat16"):
        raise ValueError(f"autocast: expected False with matmul {matmul!r}, got True")
    if autocast:
        arguments["matmul"] = "bfloat16"
    options = {name: arguments.pop(name) for name in _OPTIONS & arguments.keys()}
    return FusedUpdate(actor, critic, **options)(std, **arguments)


_options, _call = (inspect.signature(x).parameters for x in (FusedUpdate, FusedUpdate.__call__))
_OPTIONS = _options.keys() - {"actor", "critic"}
_signature = inspect.signature(fused_update)
_own, _samples, _settings = _signature.parameters, [*_call.values()][2:], [*_options.values()][2:]
_named = [*(_own[name] for name in ("actor", "critic", "std")), *_samples, *_settings, _own["autocast"]]
fused_update.__signature__ = _signature.replace(parameters=_named)  # type: ignore[attr-defined]


def check_std(std: object, networks: _Networks) -> None:
    """Raises unless ``std`` is a tensor, which may require grad; or None, for discrete actions."""
    if not networks.categories:
        check_tensor("std", std.detach() if isinstance(std, Tensor) else std, networks.device, True)
    elif std is not None:
        raise TypeError(f"std: expected None, actions are discrete, got {type(std).__name__}")


def check_number(name: str, x: object, least: float) -> None:
    """Raises unless ``x`` is a finite number of at least ``least``."""
    if isinstance(x, bool) or not isinstance(x, (int, float)):
        raise TypeError(f"{name}: expected a number, got {type(x).__name__}")
    if not math.isfinite(x) or x < least:
        raise ValueError(f"{name}: expected a finite number{f' of at least {least:g}' * (least == 0)}, got {x}")


def check_shapes(wanted: Iterable[tuple[str, Tensor, list[int]]]) -> None:
    """Raises ValueError unless the tensors, by name, have these shapes, with at least one sample."""
    for name, x, shape in wanted:
        if list(x.shape) != shape or shape[0] == 0:
            expected = f"shape {shape}" if shape[0] else "at least one sample"
            raise ValueError(f"{name}: expected {expected}, got {list(x.shape)}")


def _same_shape(x: Tensor, y: Tensor) -> bool:
    return x.shape == y.shape and x.device == y.device
