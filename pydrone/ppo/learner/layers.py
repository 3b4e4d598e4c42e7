"""Multilayer perceptrons of any width on a GPU: torch's matrix products, and between them one launch a layer.

Torch takes two launches a layer forward and four back; here it is two (a product; bias and activation) and three (the
activation's derivative with the bias gradient; two products). See ``activate`` in :mod:`pydrone.ops.schema`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pydrone.ops.schema import ACTIVATIONS, layer_workspace_size
from pydrone.ppo.learner.networks import take_apart

SILU = ACTIVATIONS.index("silu")


class Layers:
    """Runs networks; the gradients reach their parameters as from torch's own layers."""

    def __init__(self, matmul: str) -> None:
        self.bfloat16 = matmul == "bfloat16"
        self._workspace: Tensor | None = None  # its tickets are zero between launches

    def __call__(self, network: nn.Module, x: Tensor) -> Tensor:
        """[B, out] of x [B, in], float32. Raises Unsupported for other networks than ``fused_update`` serves."""
        parameters, activation = take_apart(network, "network", x.device)
        hidden = -1 if activation is None else ACTIVATIONS.index(activation)
        for i in range(0, len(parameters), 2):
            x = _Layer.apply(x, *parameters[i : i + 2], hidden if i + 2 < len(parameters) else -1, self)
        return x

    def workspace(self, like: Tensor) -> Tensor:
        needed = layer_workspace_size(*like.shape)
        if self._workspace is None or self._workspace.numel() < needed:
            self._workspace = torch.zeros(needed, dtype=torch.float64, device=like.device)
        return self._workspace

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        if not self.bfloat16:
            return a @ b
        a, b = a.bfloat16(), b.bfloat16()
        return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, activation: int, layers: Layers) -> Tensor:
        kept = layers.product(x, weight.t())
        out = torch.empty_like(kept) if activation == SILU else None
        torch.ops.pydrone.activate(kept, bias, activation, out)
        ctx.activation, ctx.layers = activation, layers
        ctx.save_for_backward(x, weight, kept if activation >= 0 else None)
        return kept if out is None else out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, kept = ctx.saved_tensors
        grad, layers = grad.contiguous(), ctx.layers
        out = torch.empty_like(grad) if ctx.activation >= 0 else None
        bias_grad = grad.new_empty(grad.shape[1])
        torch.ops.pydrone.activate_backward(grad, kept, ctx.activation, out, bias_grad, layers.workspace(grad))
        grad = grad if out is None else out
        wanted = ctx.needs_input_grad
        return (
            layers.product(grad, weight) if wanted[0] else None,
            layers.product(grad.t(), x) if wanted[1] else None,
            bias_grad if wanted[2] else None,
            None,
            None,
        )
