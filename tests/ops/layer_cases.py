"""A layer's bias and activation, and their gradients: against autograd in float64."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional

from pydrone.ops.schema import ACTIVATIONS, layer_workspace_size


def check(
    activate: Callable[..., None],
    backward: Callable[..., None],
    rows: int,
    width: int,
    name: str | None,
    programs: int = 0,
) -> None:
    """Outputs within float32's rounding of torch's in float64, twice the same to the bit."""
    torch.manual_seed(rows * 1000 + width)
    number = -1 if name is None else ACTIVATIONS.index(name)
    product, bias, grad = torch.randn(rows, width) * 3, torch.randn(width), torch.randn(rows, width)
    wide_product, wide_bias = product.double().requires_grad_(), bias.double().requires_grad_()
    expected = wide_product + wide_bias
    expected = expected if name is None else getattr(functional, name)(expected)
    by_product, by_bias = torch.autograd.grad(expected, (wide_product, wide_bias), grad.double())
    found = []
    workspace = torch.zeros(layer_workspace_size(rows, width) + programs * width, dtype=torch.float64)
    for _ in range(2):
        x, y = product.clone(), torch.full_like(product, torch.nan) if name == "silu" else None
        activate(x, bias, number, y)
        out = None if name is None else torch.full_like(grad, torch.nan)
        bias_grad = torch.full_like(bias, torch.nan)
        backward(grad, None if name is None else x, number, out, bias_grad, workspace)
        found.append((x if y is None else y, grad if out is None else out, bias_grad))
    for x, y in zip(*found, strict=True):
        assert torch.equal(x, y)
    output, by_input, sums = found[0]
    torch.testing.assert_close(output.double(), expected.detach(), rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(by_input.double(), by_product, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(sums.double(), by_bias, rtol=1e-5, atol=1e-5 * max(rows, 1) ** 0.5)


def check_nan(activate: Callable[..., None], backward: Callable[..., None], name: str) -> None:
    """A NaN shows where it is, and in its column's sum."""
    number, x = ACTIVATIONS.index(name), torch.randn(20, 3)
    x[7, 1] = torch.nan
    y = torch.empty_like(x) if name == "silu" else None
    activate(x, torch.zeros(3), number, y)
    assert (x if y is None else y).isnan().nonzero().tolist() == [[7, 1]]
    grad, bias_grad = torch.ones(20, 3), torch.empty(3)
    grad[4, 2] = torch.nan
    workspace = torch.zeros(layer_workspace_size(20, 3), dtype=torch.float64)
    backward(grad, x, number, torch.empty_like(grad), bias_grad, workspace)
    # ReLU's derivative is 0 or 1, at a NaN too, as torch's.
    assert bias_grad.isnan().tolist() == [False, name != "relu", True]
