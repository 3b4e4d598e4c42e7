"""The emulated roundings of benches/precision.py, and what they cost a gradient."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

BENCHES = Path(__file__).parents[2] / "benches"
pytestmark = pytest.mark.skipif(not BENCHES.is_dir(), reason="benches is not in this source tree")


@pytest.fixture
def precision(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHES))
    import precision

    return precision


def test_rounding(precision):
    x = torch.cat([torch.randn(1000), torch.tensor([0.0, -0.0, 1 + 2**-11, 1 + 3 * 2**-11, torch.inf])])
    assert precision.rounded(x, "float32") is x
    assert torch.equal(precision.rounded(x, "bfloat16"), x.bfloat16().float())
    tf32 = precision.rounded(x, "tf32")
    assert tf32[-3:].tolist() == [1, 1 + 2**-9, torch.inf]  # ties to even, of ten bits
    assert ((tf32 - x).abs()[:-1] <= 2**-11 * x.abs()[:-1]).all()
    assert precision.rounded(x.double(), "tf32").dtype == torch.float64


def test_what_it_costs_a_gradient(precision):
    """docs/learner.md has the figures of the default size."""
    errors = precision.gradient_errors(1, num_envs=8, hidden_dims=(32, 32))
    assert errors["float32"] < 3e-6 < 1e-4 < errors["tf32"] < 1.5e-3 < errors["bfloat16"] < 0.1, errors
