"""ppo_loss on the CPU, which runs the reference: by hand, against autograd, schema and tracing. For Triton, see
triton_cases.py."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from loss_cases import HAND, OUTPUTS, by_autograd, check, check_by_hand, random_case, run

from pydrone.ops import native, reference  # noqa: F401  native registers it
from pydrone.ops.schema import loss_workspace_size

OP = torch.ops.pydrone.ppo_loss.default


@pytest.mark.parametrize(("given", "expected"), HAND)
def test_by_hand(given, expected):
    check_by_hand(OP, given, expected)


@pytest.mark.parametrize("value_clip", [-1.0, 0.0, 0.2])
@pytest.mark.parametrize(("size", "actions"), [(1, 1), (1, 17), (5, 3), (513, 4)])
def test_random(size, actions, value_clip):
    check(OP, random_case(size, actions, value_clip=value_clip, value_loss_coef=0.7, entropy_coef=0.01))


def test_normalised_values_no_kl_and_a_chunk_of_a_minibatch():
    moments = {"value_shift": torch.tensor(0.7), "value_std": torch.tensor(1.9)}
    check(OP, random_case(60, 4, **moments, value_clip=0.2, num_samples=100, entropy_coef=0.02))
    case = random_case(60, 4, value_clip=0.2) | {"mu": None, "sigma": None}
    check(OP, case)
    assert run(OP, case)["metrics"][3].isnan()


def test_chunks_add_up():
    case = random_case(50, 3, value_clip=0.2, entropy_coef=0.1, value_loss_coef=0.5)
    whole, parts = run(OP, case), []
    for rows in (slice(0, 17), slice(17, 50)):
        part = {name: x[rows] if isinstance(x, torch.Tensor) and name != "std" else x for name, x in case.items()}
        parts.append(run(OP, part))
    for name in ("std_grad", "metrics"):
        torch.testing.assert_close(parts[0][name] + parts[1][name], whole[name])
    for name in ("mean_grad", "value_grad"):
        torch.testing.assert_close(torch.cat([parts[0][name], parts[1][name]]), whole[name])


def test_what_is_not_a_number_shows():
    for name, figure in (("values", 1), ("returns", 1), ("new_values", 1), ("log_probs", 0), ("advantages", 0)):
        case = random_case(40, 2, value_clip=0.2)
        case[name][3] = math.nan
        metrics = run(OP, case)["metrics"]
        assert metrics[figure].isnan() and not metrics[1 - figure].isnan(), name


def test_in_float64_it_equals_autograd():
    case = random_case(100, 4, torch.float64, value_clip=0.2, entropy_coef=0.1)
    found, expected = run(OP, case, torch.float64), by_autograd(case)
    for name in OUTPUTS:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-12, atol=1e-12)


def test_schema_and_tracing():
    case = random_case(6, 2)
    size, actions = case["mean"].shape
    outputs = (torch.zeros(size, actions), torch.zeros(size), torch.zeros(actions), torch.zeros(4))
    workspace = torch.zeros(loss_workspace_size(size, actions), dtype=torch.float64)
    torch.library.opcheck(OP, (*case.values(), *outputs, workspace))
    names = [a.name for a in OP._schema.arguments]
    assert names == list(inspect.signature(reference.ppo_loss).parameters) == [*case, *OUTPUTS, "workspace"]
    assert [a.name for a in OP._schema.arguments if a.is_write] == [*OUTPUTS, "workspace"]
