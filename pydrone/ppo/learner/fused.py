"""PPO's gradients in one pass over a minibatch: one operation instead of some sixty of autograd's.

On the CPU, tiles of 128 samples go through both networks, the loss and back, and stay in the second-level cache; on
CUDA a Triton kernel does the same. See ``ppo_gradients`` in :mod:`pydrone.ops.schema`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from pydrone.ops import native, triton
from pydrone.ops.arguments import check_tensor
from pydrone.ops.schema import ACTIVATIONS, MATMUL
from pydrone.ppo.policy import matmul as precision
from pydrone.ppo.policy.actor_critic import ActorCritic, PolicyStep
from pydrone.rollout.minibatch import Drawn, Minibatch

if TYPE_CHECKING:
    from pydrone.ppo.config import PPOConfig
    from pydrone.ppo.policy.normalization import RunningMoments

# Where there are kernels for it.
DEVICES = ("cpu", "cuda")


class Network(NamedTuple):
    """A multilayer perceptron taken apart."""

    parameters: list[nn.Parameter]  # weight and bias of each layer in turn
    activation: str | None  # of the hidden layers, one of ACTIVATIONS; None: there are none


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Unsupported(RuntimeError):
    """The operation cannot serve these networks or this machine, for the reason given; torch can."""


def fused_update(
    actor: nn.Module,
    critic: nn.Module,
    std: Tensor,
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
    clip: float = 0.2,
    value_clip: float | None = None,
    value_loss_coef: float = 1.0,
    entropy_coef: float = 0.0,
    obs_normalizer: RunningMoments | None = None,
    critic_normalizer: RunningMoments | None = None,
    obs_clip: float = 10.0,
    value_normalizer: RunningMoments | None = None,
    autocast: bool = False,
    matmul: str | None = None,
) -> Tensor:
    """As ``loss.backward()`` on PPO's loss of a minibatch: adds its gradients to the parameters' ``.grad``.

    Any optimiser, clipping and all-reduce go on from there. The loss is
    surrogate + value_loss_coef * value loss - entropy_coef * entropy, see :mod:`pydrone.ppo.learner.loss` and
    :mod:`pydrone.ppo.policy.distributions`; B = samples, A = action dimensions. float32, on the CPU or on CUDA, all on
    one device; half-precision inputs are widened.

    Args:
        actor, critic: ``nn.Sequential`` of ``nn.Linear`` with tanh, ELU, ReLU or SiLU between them.
        std: [A], the standard deviation, above 0: a parameter, or a function of one (``log_std.exp()``). On CUDA its
            numbers are not looked at, which would wait for the device: one below 0 makes the results NaN.
        obs: [B, width], or several such, concatenated to the actor's input.
        actions: [B, A].
        log_probs: [B], of the policy that acted.
        advantages, returns, values: [B]; values as they were when the policy acted.
        critic_obs: as obs, for the critic. None: the actor's.
        mu, sigma: [B, A], the distribution that actions were drawn from. None: the KL divergence is NaN.
        clip: half-width of the probability ratio's range.
        value_clip: half-width of the value's range around the old value. None: the plain squared error.
        value_loss_coef, entropy_coef: weights in the loss.
        obs_normalizer, critic_normalizer, value_normalizer: running statistics (their ``shift`` and ``std``) that
            inputs, and values and returns, are normalised by; inputs are clipped to ``obs_clip``.
        matmul: what the factors of the networks' products (activations, weights, derivatives) are rounded to:
            "float32" (None), "tf32", which a CPU computes in float32, or "bfloat16", on a CPU with AVX512_BF16: to
            nearest, denormals to zero. Sums, biases, activation functions and everything else stay in float32.
        autocast: True: ``matmul="bfloat16"``.

    Returns:
        [4] float32: surrogate, value loss, entropy, KL(old || new). Means over B, nats.

    Raises:
        Unsupported: a RuntimeError; the operation cannot serve these networks, or this machine.
        TypeError, ValueError, RuntimeError: an argument does not fit; nothing was written.
    """
    check_tensor("std", std.detach() if isinstance(std, Tensor) else std, None, True)
    device = std.device
    if device.type not in DEVICES:
        raise ValueError(f"std: expected device cpu or cuda, got {device}")
    if device.type == "cpu" and (std <= 0).any():
        raise ValueError(f"std: expected numbers above 0, got {std.min().item():g}")
    tensors = {"actions": actions, "log_probs": log_probs, "advantages": advantages, "returns": returns}
    tensors |= {"values": values, **({} if mu is None else {"mu": mu}), **({} if sigma is None else {"sigma": sigma})}
    for name, x in tensors.items():
        check_tensor(name, x, device, True, "the policy's gradients do")
    for name, x in (("clip", clip), ("value_clip", 0.0 if value_clip is None else value_clip)):
        _check_number(name, x, 0.0)
    for name, x in (("value_loss_coef", value_loss_coef), ("entropy_coef", entropy_coef)):
        _check_number(name, x, -math.inf)
    moments = {"obs_normalizer": obs_normalizer, "critic_normalizer": critic_normalizer}
    for name, x in {**moments, "value_normalizer": value_normalizer}.items():
        if x is not None and not all(isinstance(getattr(x, y, None), Tensor) for y in ("shift", "std")):
            raise TypeError(f"{name}: expected running statistics with shift and std, got {type(x).__name__}")
    if not isinstance(autocast, bool):
        raise TypeError(f"autocast: expected a bool, got {type(autocast).__name__}")
    if matmul is not None and matmul not in MATMUL:
        raise ValueError(f"matmul: expected None or one of {', '.join(MATMUL)}, got {matmul!r}")
    if autocast and matmul not in (None, "bfloat16"):
        raise ValueError(f"autocast: expected False with matmul {matmul!r}, got True")
    if obs_clip != math.inf:  # which clips nothing
        _check_number("obs_clip", obs_clip, 0.0)
    for name, x in (("obs", obs), ("critic_obs", () if critic_obs is None else critic_obs)):
        if not isinstance(x, (Tensor, list, tuple)):
            raise TypeError(f"{name}: expected a tensor or several, got {type(x).__name__}")
        for y in [x] if isinstance(x, Tensor) else x:
            check_tensor(name, y, device, None, "the policy's gradients do")
    groups = _groups(obs), [] if critic_obs is None else _groups(critic_obs)
    return _gradients(
        actor,
        critic,
        std,
        (*groups, actions, log_probs, advantages, returns, values, mu, sigma),
        (),
        clip=clip,
        value_clip=value_clip,
        value_loss_coef=value_loss_coef,
        entropy_coef=entropy_coef,
        obs_normalizer=obs_normalizer,
        critic_normalizer=critic_normalizer,
        obs_clip=obs_clip,
        value_normalizer=value_normalizer,
        matmul="bfloat16" if autocast else matmul or "float32",
    )


def _gradients(
    actor: nn.Module,
    critic: nn.Module,
    std: Tensor,
    samples: tuple,
    drawn: tuple,
    *,
    clip: float,
    value_clip: float | None,
    value_loss_coef: float,
    entropy_coef: float,
    obs_normalizer: RunningMoments | None,
    critic_normalizer: RunningMoments | None,
    obs_clip: float,
    value_normalizer: RunningMoments | None,
    matmul: str,
) -> Tensor:
    """``ppo_gradients`` of what it takes first, ``samples``, and last, ``drawn``; the rest as :func:`fused_update`."""
    ours, theirs, activation = _both(actor, critic, std.device)
    _require("ppo_gradients", ours, theirs, matmul)
    parameters = [*ours, *theirs]
    with torch.no_grad():
        grads = [torch.empty_like(x) for x in parameters]
        std_grad = torch.empty(std.shape, device=std.device)
        metrics = torch.empty(4, device=std.device)
        torch.ops.pydrone.ppo_gradients(
            *samples,
            [x.detach() for x in ours],
            [x.detach() for x in theirs],
            std.detach().contiguous(),
            activation,
            MATMUL.index(matmul),
            clip,
            -1.0 if value_clip is None else value_clip,
            value_loss_coef,
            entropy_coef,
            *_moments(obs_normalizer, critic_normalizer),
            obs_clip,
            *_moments(value_normalizer),
            [*grads, std_grad],
            metrics,
            *drawn,
        )
        for parameter, grad in zip(parameters, grads):
            _add(parameter, grad)
    _through_std(std, std_grad)
    return metrics


def _add(parameter: Tensor, grad: Tensor) -> None:
    if not parameter.requires_grad:
        return
    if parameter.grad is not None:
        parameter.grad.add_(grad)
    else:
        parameter.grad = grad


def _through_std(std: Tensor, grad: Tensor) -> None:
    """Propagates ``grad`` to what ``std`` was computed from. Autograd would copy a parameter's."""
    if not std.is_leaf or std._backward_hooks or getattr(std, "_post_accumulate_grad_hooks", None):
        torch.autograd.backward([std], [grad])
    else:
        _add(std, grad)


def _both(
    actor: nn.Module, critic: nn.Module, device: torch.device
) -> tuple[list[nn.Parameter], list[nn.Parameter], int]:
    """The parameters of each, and the number of their activation."""
    if device.type == "cpu" and native.CPU_MISSING is not None:
        raise Unsupported(f"the native CPU library is missing: {native.CPU_MISSING}")
    networks = take_apart(actor, "actor", device), take_apart(critic, "critic", device)
    # Without hidden layers any will do.
    kinds = {x.activation for x in networks} - {None} or {ACTIVATIONS[0]}
    if len(kinds) > 1:
        raise Unsupported(f"critic: expected the actor's activation, got {' and '.join(sorted(kinds))}")
    return networks[0].parameters, networks[1].parameters, ACTIVATIONS.index(kinds.pop())


def _check_number(name: str, x: float, least: float) -> None:
    if isinstance(x, bool) or not isinstance(x, (int, float)):
        raise TypeError(f"{name}: expected a number, got {type(x).__name__}")
    if not math.isfinite(x) or x < least:
        raise ValueError(f"{name}: expected a finite number{f' of at least {least:g}' * (least == 0)}, got {x}")


def _require(kernel: str, actor: list[nn.Parameter], critic: list[nn.Parameter], matmul: str) -> None:
    """Raises Unsupported where the device's kernel cannot serve these networks in this precision."""
    if triton.serves(actor[0].device):
        reason = triton.why_not(kernel, actor, critic, MATMUL.index(matmul))
        if reason is not None:
            raise Unsupported(reason)
    elif matmul == "bfloat16" and not torch.ops.pydrone.has_bf16():
        raise Unsupported("matmul is 'bfloat16', and the processor has no AVX512_BF16, or PYDRONE_ISA leaves it out")


def lacks_bf16() -> bool:
    """Whether this CPU has no AVX512_BF16, so that torch's autocast may emulate products in bfloat16."""
    ours = native.CPU_MISSING is None and torch.ops.pydrone.has_bf16()  # PYDRONE_ISA may leave them out
    return not (ours or getattr(torch.cpu, "_is_avx512_bf16_supported", bool)())


def _moments(*normalizers: RunningMoments | None) -> list[Tensor | None]:
    return [x for y in normalizers for x in ((None, None) if y is None else (y.shift, y.std))]


def take_apart(network: nn.Module, name: str, device: torch.device) -> Network:
    """The parameters of a multilayer perceptron on ``device``; raises Unsupported where it is something else."""
    if not isinstance(network, nn.Module):
        raise Unsupported(f"{name}: expected a Linear layer or nn.Sequential, got {type(network).__name__}")
    layers = list(network.children()) if isinstance(network, nn.Sequential) else [network]
    parameters: list[nn.Parameter] = []
    activations = set()
    for i, layer in enumerate(layers):
        if any(getattr(x, hooks) for x in (layer, network) for hooks in _HOOKS):
            raise Unsupported(f"{name}: place {i} has hooks, which would not be called")
        if i % 2 == 0:
            if type(layer) is not nn.Linear or layer.bias is None:
                raise Unsupported(f"{name}: expected a Linear layer with a bias in place {i}, got {layer}")
            if not all(isinstance(x, nn.Parameter) for x in (layer.weight, layer.bias)):
                raise Unsupported(f"{name}: expected parameters in place {i}, got a weight that is computed")
            for x in (layer.weight, layer.bias):
                if x._backward_hooks or getattr(x, "_post_accumulate_grad_hooks", None):
                    raise Unsupported(f"{name}: a parameter in place {i} has hooks, which would not be called")
                if x.device != device or x.dtype != torch.float32:
                    where = "the CPU" if device.type == "cpu" else device
                    raise Unsupported(f"{name}: expected float32 parameters on {where}, got {x.dtype} on {x.device}")
            parameters += [layer.weight, layer.bias]
            continue
        kind = type(layer).__name__.lstrip("_").lower()
        if kind not in ACTIVATIONS or getattr(layer, "alpha", 1.0) != 1.0:
            raise Unsupported(f"{name}: expected {', '.join(ACTIVATIONS)} in place {i}, got {layer}")
        activations.add(kind)
    if len(layers) % 2 == 0:
        raise Unsupported(f"{name}: expected a Linear layer at its end, got {layers[-1] if layers else 'no layer'}")
    if len(activations) > 1:
        raise Unsupported(f"{name}: expected one activation in all layers, got {' and '.join(sorted(activations))}")
    return Network(parameters, next(iter(activations), None))


def _groups(obs: Tensor | Sequence[Tensor]) -> list[Tensor]:
    groups = [obs] if isinstance(obs, Tensor) else list(obs)
    return [x if x.is_floating_point() else x.float() for x in groups]


# ------------------------------------------------------------------------------------------------------ the learner's


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
            _require(kernel, actor, critic, _matmul(policy))
    except Unsupported as error:
        return str(error)
    return None


def _matmul(policy: ActorCritic) -> str:
    return precision.chosen(policy.matmul, policy.std_param.device)


def of_policy(policy: ActorCritic, minibatch: Minibatch, config: PPOConfig) -> Tensor:
    """:func:`fused_update` of a policy and a minibatch of its rollout buffer, read in the ring where it can be.

    Call ``policy.bound_std()`` before: ``std_param`` is then the standard deviation, and needs no launch.
    """
    samples, drawn = _in_ring(policy, minibatch) if isinstance(minibatch, Drawn) else (None, ())
    if samples is None:
        advantages = minibatch.advantages, minibatch.returns
        samples = _samples(policy, minibatch.obs, minibatch, advantages)
    return _gradients(
        policy.actor,
        policy.critic,
        policy.std_param,
        samples,
        drawn,
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
    if not readable(place.obs):
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
    return _both(policy.actor, policy.critic, policy.std_param.device)


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
    moments = _moments(policy.actor_normalizer, policy.critic_normalizer)
    of_values = _moments(policy.value_normalizer)
    options = networks[2], MATMUL.index(_matmul(policy)), *moments, policy.obs_clip, *of_values, packed
    return *seen, noise, *networks[:2], std, *options, *outputs


def _inputs(policy: ActorCritic, obs: Tensor | Mapping[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The groups that the actor sees and those of the critic; none for the critic where they are the same."""
    if not isinstance(obs, Mapping) and not hasattr(obs, "keys"):
        return _groups(obs), []
    apart = policy.critic_obs != policy.actor_obs
    return tuple(_groups([obs[x] for x in names]) for names in (policy.actor_obs, policy.critic_obs if apart else ()))
