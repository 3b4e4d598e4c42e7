"""activate and activate_backward on the CPU, which runs the reference. For Triton, see triton_cases.py."""

from __future__ import annotations

import inspect

import layer_cases
import pytest
import torch

from pydrone.ops import native, reference  # noqa: F401  native registers them
from pydrone.ops.schema import ACTIVATIONS, layer_workspace_size

ACTIVATE, BACKWARD = torch.ops.pydrone.activate.default, torch.ops.pydrone.activate_backward.default


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
@pytest.mark.parametrize("shape", [(0, 3), (1, 1), (17, 5), (33, 130)], ids=str)
def test_random(shape, activation):
    layer_cases.check(ACTIVATE, BACKWARD, *shape, activation)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan(activation):
    layer_cases.check_nan(ACTIVATE, BACKWARD, activation)


def test_schema_and_tracing():
    x, bias = torch.randn(6, 2), torch.randn(2)
    torch.library.opcheck(ACTIVATE, (x, bias, 3, torch.empty_like(x)))
    workspace = torch.zeros(layer_workspace_size(6, 2), dtype=torch.float64)
    torch.library.opcheck(BACKWARD, (x, x.clone(), 0, torch.empty_like(x), bias, workspace))
    for op, plain in ((ACTIVATE, reference.activate), (BACKWARD, reference.activate_backward)):
        assert [a.name for a in op._schema.arguments] == list(inspect.signature(plain).parameters)
