"""Networks of any trainer taken apart, for operations that take their parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from pydrone.ops import native, triton
from pydrone.ops.schema import ACTIVATIONS, MATMUL

# Where there are kernels for it.
DEVICES = ("cpu", "cuda")


class Moments(Protocol):
    """Running statistics: inputs become (x - shift) / std. Both [width], or [] for values; float32, contiguous."""

    shift: Tensor
    std: Tensor


class Network(NamedTuple):
    """A multilayer perceptron taken apart."""

    parameters: list[nn.Parameter]  # weight and bias of each layer in turn
    activation: str | None  # of the hidden layers, one of ACTIVATIONS; None: there are none


class Unsupported(RuntimeError):
    """The operation cannot serve these networks or this machine, for the reason given; torch can."""


def both(
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


def take_apart(network: nn.Module, name: str, device: torch.device) -> Network:
    """The parameters of a multilayer perceptron on ``device``; raises Unsupported where it is something else."""
    if not isinstance(network, nn.Module):
        raise Unsupported(f"{name}: expected a Linear layer or nn.Sequential, got {type(network).__name__}")
    if isinstance(network, nn.Sequential) and type(network).forward is not nn.Sequential.forward:
        raise Unsupported(f"{name}: expected nn.Sequential, {type(network).__name__} has a forward of its own")
    layers = _layers(network)
    parameters: list[nn.Parameter] = []
    activations = set()
    for i, layer in enumerate(layers):
        if hooked(layer) or hooked(network):
            raise Unsupported(f"{name}: place {i} has hooks, which would not be called")
        if i % 2 == 0:
            if type(layer) is not nn.Linear or layer.bias is None:
                raise Unsupported(f"{name}: expected a Linear layer with a bias in place {i}, got {layer}")
            if not all(isinstance(x, nn.Parameter) for x in (layer.weight, layer.bias)):
                raise Unsupported(f"{name}: expected parameters in place {i}, got a weight that is computed")
            for x in (layer.weight, layer.bias):
                if has_hooks(x):
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


def _layers(network: nn.Module) -> list[nn.Module]:
    """In order; one that is used twice is there twice, which ``children`` leaves out."""
    if not isinstance(network, nn.Module):
        return []
    return list(network._modules.values()) if isinstance(network, nn.Sequential) else [network]


def parts_of(*networks: nn.Module) -> list[object]:
    """Layers and parameters, to see by their identity whether one has been replaced; and those that have hooks."""
    parts: list[object] = []
    for network in networks:
        layers = _layers(network)
        parts += layers
        parameters = [x for layer in layers for x in layer._parameters.values() if x is not None]
        modules = [network, *layers] if layers else layers
        parts += [*parameters, *filter(hooked, modules), *filter(has_hooks, parameters)]
    return parts


def has_hooks(x: Tensor) -> bool:
    """Whether a backward pass would call something with the gradient."""
    return bool(x._backward_hooks or getattr(x, "_post_accumulate_grad_hooks", None))


def hooked(x: nn.Module) -> bool:
    """Whether a call of it would call something else too."""
    return bool(x._forward_hooks or x._forward_pre_hooks or x._backward_hooks or x._backward_pre_hooks)


def require(kernel: str, actor: list[nn.Parameter], critic: list[nn.Parameter], matmul: str) -> None:
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


def moments_of(*normalizers: Moments | None) -> list[Tensor | None]:
    """Shift and std of each, as the operations take them."""
    return [x for y in normalizers for x in ((None, None) if y is None else (y.shift, y.std))]


def groups_of(obs: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """Groups of observations, as the operations take them."""
    groups = [obs] if isinstance(obs, Tensor) else list(obs)
    return [x if x.is_floating_point() else x.float() for x in groups]
