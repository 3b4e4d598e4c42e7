"""PPO's loss of a minibatch: cases computed by hand, and random cases against autograd in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pydrone.ops.schema import loss_workspace_size
from pydrone.ppo.learner.loss import surrogate_loss, value_loss
from pydrone.ppo.policy.distributions import gaussian_entropy, gaussian_kl, gaussian_log_prob

# log p(1.5) for the table below
LOG_PROB = -0.125 - math.log(2) - 0.5 * math.log(2 * math.pi)

# One sample and one action; the networks output mean 0.5 and value 1; std 2, so log p(a) = -z^2 / 2 - log 2 - 0.919.
HAND = [
    # ratio 1, inside the range: d/dmean = -A z / s with z = (1.5 - 0.5) / 2; d/ds = -A (z^2 - 1) / s
    ({"advantages": 3.0, "ratio": 1.0}, {"mean": -3 * 0.5 / 2, "std": -3 * (0.25 - 1) / 2, "surrogate": -3.0}),
    # ratio 1.5, A > 0: clipped to 1.2, no gradient
    ({"advantages": 2.0, "ratio": 1.5}, {"mean": 0.0, "std": 0.0, "surrogate": -2.4}),
    # ratio 1.5, A < 0: not clipped
    ({"advantages": -2.0, "ratio": 1.5}, {"mean": 3 * 0.5 / 2, "std": 3 * -0.75 / 2, "surrogate": 3.0}),
    # ratio 0.5, A < 0: clipped to 0.8
    ({"advantages": -1.0, "ratio": 0.5}, {"mean": 0.0, "std": 0.0, "surrogate": 0.8}),
    # ratio 0.5, A > 0: not clipped
    ({"advantages": 1.0, "ratio": 0.5}, {"mean": -0.5 * 0.5 / 2, "std": -0.5 * -0.75 / 2, "surrogate": -0.5}),
    # a ratio that overflows float32: clipped like any other; without an advantage nothing
    ({"advantages": 2.0, "ratio": 1e50}, {"mean": 0.0, "std": 0.0, "surrogate": -2.4}),
    ({"advantages": 0.0, "ratio": 1e50}, {"mean": 0.0, "std": 0.0, "surrogate": 0.0}),
    # value 1, old 0.9, return 3: inside the range, (1 - 3)^2
    ({"values": 0.9, "returns": 3.0}, {"value": -4.0, "value_loss": 4.0}),
    # old 0, return 3: clipped to 0.2, whose error is the larger one: no gradient
    ({"values": 0.0, "returns": 3.0}, {"value": 0.0, "value_loss": 2.8**2}),
    # old 2, return -1: clipped to 1.8, again the larger error
    ({"values": 2.0, "returns": -1.0}, {"value": 0.0, "value_loss": 2.8**2}),
    # old 0, return 0: clipped to 0.2, but the unclipped error 1 is larger
    ({"values": 0.0, "returns": 0.0}, {"value": 2.0, "value_loss": 1.0}),
    # KL(N(0.25, 1) || N(0.5, 2)) = log 2 + (1 + 0.0625) / 8 - 1/2
    ({"mu": 0.25, "sigma": 1.0}, {"kl": math.log(2) + 1.0625 / 8 - 0.5}),
]

OUTPUTS = ("mean_grad", "value_grad", "std_grad", "metrics")


def by_hand(given: dict[str, float], dtype: torch.dtype = torch.float32) -> dict[str, object]:
    """ppo_loss's arguments for a row of HAND."""
    values = {"advantages": 0.0, "returns": 1.0, "values": 1.0, "mu": 0.5, "sigma": 2.0, "ratio": 1.0} | given
    values["log_probs"] = LOG_PROB - math.log(values.pop("ratio"))
    values |= {"mean": 0.5, "std": 2.0, "actions": 1.5, "new_values": 1.0}
    tensors = {name: torch.tensor([x], dtype=dtype) for name, x in values.items()}
    tensors |= {name: tensors[name][None] for name in ("mean", "actions", "mu", "sigma")}
    return arguments(tensors, value_clip=0.2)


def random_case(size: int, actions: int, dtype: torch.dtype = torch.float32, **options: object) -> dict[str, object]:
    """Random arguments with ratios and values inside and outside their clip ranges."""
    tensors = {
        "mean": torch.randn(size, actions) * 0.3,
        "std": torch.rand(actions) + 0.5,
        "actions": torch.randn(size, actions),
        "advantages": torch.randn(size),
        "new_values": torch.randn(size) * 0.3,
        "values": torch.randn(size) * 0.3,
        "returns": torch.randn(size) * 2,
        "mu": torch.randn(size, actions) * 0.1,
        "sigma": torch.rand(size, actions) + 0.5,
    }
    old = gaussian_log_prob(tensors["actions"], tensors["mean"], tensors["std"])
    tensors["log_probs"] = old + torch.randn(size) * 0.3
    return arguments({name: x.to(dtype) for name, x in tensors.items()}, **options)


def arguments(tensors: dict[str, Tensor], **options: object) -> dict[str, object]:
    """In the schema's order, without the outputs."""
    names = ("mean", "std", "actions", "log_probs", "advantages", "new_values", "values", "returns", "mu", "sigma")
    settings = {"clip": 0.2, "value_clip": -1.0, "value_loss_coef": 1.0, "entropy_coef": 0.0}
    settings |= {"value_shift": None, "value_std": None, "num_samples": len(tensors["mean"])}
    return {name: tensors[name] for name in names} | settings | options


def run(operation: Callable[..., None], case: dict[str, object], dtype: torch.dtype = torch.float32) -> dict:
    """The outputs by name; they start as NaN. The workspace's ticket must be 0 afterwards."""
    size, actions = case["mean"].shape
    shapes = ((size, actions), (size,), (actions,), (4,))
    found = {name: torch.full(shape, math.nan, dtype=dtype) for name, shape in zip(OUTPUTS, shapes, strict=True)}
    workspace = torch.full((loss_workspace_size(size, actions),), math.nan, dtype=torch.float64)
    workspace[0] = 0
    operation(*case.values(), *found.values(), workspace)
    assert workspace[0].view(torch.int64) == 0, "the ticket must be left at 0"
    return found


def by_autograd(case: dict[str, object], dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """The expected outputs, from the formulas in pydrone/ppo and autograd."""
    x = {name: y.to(dtype) if isinstance(y, Tensor) else y for name, y in case.items()}
    mean, new, std = (x[name].detach().requires_grad_() for name in ("mean", "new_values", "std"))
    old, returns = x["values"], x["returns"]
    if x["value_shift"] is not None:
        old, returns = ((y - x["value_shift"]) / x["value_std"] for y in (old, returns))
    share = len(mean) / x["num_samples"]
    log_probs = gaussian_log_prob(x["actions"], mean, std)
    surrogate = share * surrogate_loss(log_probs, x["log_probs"], x["advantages"], x["clip"])
    value = share * value_loss(new, old, returns, x["value_clip"] if x["value_clip"] >= 0 else None)
    entropy = share * gaussian_entropy(std)
    (surrogate + x["value_loss_coef"] * value - x["entropy_coef"] * entropy).backward()
    kl = torch.full_like(value, math.nan)
    if x["mu"] is not None:
        kl = share * gaussian_kl(x["mu"], x["sigma"], mean, std)
    grads = (mean.grad, new.grad, std.grad)
    return dict(zip(OUTPUTS, (*grads, torch.stack([surrogate, value, entropy, kl]).detach())))


def check(operation: Callable[..., None], case: dict[str, object], dtype: torch.dtype = torch.float32) -> None:
    """Compares ``operation``'s outputs with float64's, to within 1e-5 of their norm."""
    found, expected, rounded = run(operation, case, dtype), by_autograd(case), by_autograd(case, torch.float32)
    for name in OUTPUTS[:-1]:
        wanted, got = expected[name], found[name].double()
        # Where summands cancel, float32 is no more accurate in any order.
        limit = max(1e-5 * wanted.norm().item() + 1e-9, 4 * (rounded[name] - wanted).norm().item())
        assert (got - wanted).norm().item() <= limit, name
    assert found["metrics"].tolist() == pytest.approx(expected["metrics"].tolist(), rel=1e-5, abs=1e-5, nan_ok=True)


def check_by_hand(operation: Callable[..., None], given: dict[str, float], expected: dict[str, float]) -> None:
    """Checks ``operation`` on a row of HAND."""
    found = run(operation, by_hand(given))
    figures = dict(zip(("surrogate", "value_loss", "entropy", "kl"), found["metrics"].tolist()))
    figures |= {"mean": found["mean_grad"].item(), "value": found["value_grad"].item()}
    figures["std"] = found["std_grad"].item()
    assert {name: figures[name] for name in expected} == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert figures["entropy"] == pytest.approx(0.5 + 0.5 * math.log(2 * math.pi) + math.log(2))
    if not given.keys() & {"mu", "sigma"}:
        assert figures["kl"] == 0.0, "equal distributions"
