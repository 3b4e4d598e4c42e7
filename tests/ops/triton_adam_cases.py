"""Cases for the Triton kernels of clipped_adam, against torch's Adam in float64 and the CPU's operation; test_triton.py
runs them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from triton_cases import DEVICE, NAN

from pydrone._triton import clipped_adam as adam_module
from pydrone.ops import native
from pydrone.ppo.learner.learner import LEARNING_RATE_BOUNDS, LEARNING_RATE_FACTOR, ZERO_KL, Learner

SHAPES = [(4,), (3, 17), (), (512,), (513,), (40, 26), (1,), (0, 5), (9, 1)]
GROUPS = [0, 1, 1, 0, 1, 1, 1, 1, 2]
SCHEDULE = [0.01, ZERO_KL, LEARNING_RATE_FACTOR, *LEARNING_RATE_BOUNDS]


OPERATIONS = [adam_module.clipped_adam]
if DEVICE == "cpu" and native.CPU_MISSING is None:
    OPERATIONS.append(torch.ops.pydrone.clipped_adam)


def state(shapes=SHAPES, scale=1.0, seed=0) -> dict[str, list]:
    generator = torch.Generator().manual_seed(seed)

    def like() -> list:
        return [torch.randn(shape, generator=generator).to(DEVICE) for shape in shapes]

    return {
        "parameters": like(),
        "grads": [scale * x for x in like()],
        "exp_avgs": [0.1 * x for x in like()],
        "exp_avg_sqs": [x.square() for x in like()],
        "steps": [torch.tensor(float(i), device=DEVICE) for i in range(len(shapes))],
    }


def copied(given: dict[str, list]) -> dict[str, list]:
    return {name: [x.clone() for x in tensors] for name, tensors in given.items()}


def run(operation, given, groups=GROUPS, max_norm=1.0, rate=0.01, betas=(0.9, 0.999), epsilon=1e-8, kl=None):
    rate = torch.tensor(rate, device=DEVICE)
    norms = torch.full((max(groups) + 1,), NAN, device=DEVICE)
    adaptation = () if kl is None else (torch.tensor(kl, device=DEVICE), SCHEDULE)
    operation(*given.values(), groups, max_norm, rate, *betas, epsilon, norms, *adaptation)
    return [*given["parameters"], *given["exp_avgs"], *given["exp_avg_sqs"], *given["steps"], norms, rate]


def by_torch(given, groups=GROUPS, max_norm=1.0, rate=0.01, betas=(0.9, 0.999), epsilon=1e-8):
    """torch.optim.Adam in float64, neither fused nor foreach."""
    parameters = [nn.Parameter(x.double()) for x in given["parameters"]]
    optimizer = torch.optim.Adam(parameters, lr=rate, betas=betas, eps=epsilon, foreach=False)
    for i, x in enumerate(parameters):
        x.grad = given["grads"][i].double()
        moments = {name: given[f"{name}s"][i].double() for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[x] = {"step": given["steps"][i].clone(), **moments}
    norms = []
    for group in range(max(groups) + 1):
        members = [x for x, own in zip(parameters, groups, strict=True) if own == group]
        norms.append(nn.utils.get_total_norm([x.grad for x in members]).to(DEVICE))
        if max_norm != math.inf:
            nn.utils.clip_grads_with_norm_(members, max_norm, norms[-1])
    optimizer.step()
    states = [optimizer.state[x] for x in parameters]
    found = [x.detach() for x in parameters]
    for name in ("exp_avg", "exp_avg_sq", "step"):
        found += [x[name] for x in states]
    return [*found, torch.stack(norms), torch.tensor(rate, device=DEVICE)]


def check(given, tolerance=2e-7, **options):
    wanted, found = by_torch(given, **options), run(adam_module.clipped_adam, copied(given), **options)
    for x, y in zip(wanted, found, strict=True):
        torch.testing.assert_close(y.double(), x.double(), rtol=2e-6, atol=tolerance, equal_nan=True)
    again = run(adam_module.clipped_adam, copied(given), **options)
    assert all(x.view(torch.int32).equal(y.view(torch.int32)) for x, y in zip(found, again, strict=True))
    for operation in OPERATIONS[1:]:
        for x, y in zip(run(operation, copied(given), **options), found, strict=True):
            torch.testing.assert_close(y, x, rtol=1e-6, atol=tolerance, equal_nan=True)


def test_adam_by_hand():
    # g = (3, 4), norm 5, clipped to 1: (0.6, 0.8). m = 0.1 g, v = 0.001 g^2, unbiased g and g^2: a step of the rate.
    given = {"parameters": [torch.tensor([1.0, 2.0])], "grads": [torch.tensor([3.0, 4.0])]}
    given |= {"exp_avgs": [torch.zeros(2)], "exp_avg_sqs": [torch.zeros(2)], "steps": [torch.tensor(0.0)]}
    given = {name: [x.to(DEVICE) for x in tensors] for name, tensors in given.items()}
    parameter, first, second, step, norms, _ = run(adam_module.clipped_adam, given, [0], rate=0.1)
    for found, wanted in (
        (parameter, [0.9, 1.9]),
        (first, [0.06, 0.08]),
        (second, [0.00036, 0.00064]),
        (norms, [5.0]),
    ):
        torch.testing.assert_close(found.cpu(), torch.tensor(wanted))
    assert step == 1 and given["grads"][0].tolist() == [3.0, 4.0]


@pytest.mark.parametrize("max_norm", [0.5, 1e6, math.inf])
@pytest.mark.parametrize("options", [{}, {"betas": (0.0, 0.9), "epsilon": 1e-3}, {"rate": 3.0}], ids=str)
def test_adam_as_torch(max_norm, options):
    check(state(scale=0.1), max_norm=max_norm, tolerance=2e-7 * max(1, options.get("rate", 0) * 100), **options)


def test_adam_of_one_parameter():
    check(state([(7, 3)]), groups=[0])
    check(state([()]), groups=[1])  # group 0 has none


@pytest.mark.parametrize(("programs", "partials"), [(1, 1024), (256, 2)])
def test_adam_more_elements_than_programs_and_more_programs_than_sums(monkeypatch, programs, partials):
    monkeypatch.setattr(adam_module, "PROGRAMS", programs)
    monkeypatch.setattr(adam_module, "PARTIALS", partials)
    adam_module._layout.cache_clear()
    check(state([(70, 71), (33,), (3, 5)]), groups=[0, 0, 1])
    adam_module._layout.cache_clear()


def test_adam_of_slices():
    """Gradients in one buffer, of which none but the first is aligned to 16 bytes."""
    given = state([(600,), (513,), (5,)])
    first, second, third = given["grads"]
    buffer = torch.cat([first, first.new_zeros(1), second, third])
    given["grads"] = [buffer[:600], buffer[601:1114], buffer[1114:]]
    check(given, groups=[0, 0, 1])


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_adam_norms_beyond_float32(scale):
    """Squares that overflow or vanish in float32; second moments then do as well."""
    given = state(scale=scale)
    norms = run(adam_module.clipped_adam, copied(given))[-2]
    torch.testing.assert_close(norms, by_torch(given)[-2].float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("max_norm", [1.0, math.inf])
@pytest.mark.parametrize("poison", [NAN, math.inf])
def test_adam_what_is_not_finite_shows(poison, max_norm):
    given = state()
    given["grads"][4][512] = poison
    check(given, max_norm=max_norm)
    found = run(adam_module.clipped_adam, copied(given), max_norm=max_norm)
    spoilt = [bool(x.isnan().any()) for x in found[: len(SHAPES)]]
    # With clipping a NaN spoils its group, group 1; an infinity only its own element.
    whole = max_norm == 1.0 and math.isnan(poison)
    wanted = [whole and group == 1 and math.prod(shape) > 0 for group, shape in zip(GROUPS, SHAPES)]
    wanted[4] = True
    assert spoilt == wanted


KLS = [0.0, ZERO_KL / 2, 1e-5, 0.00499, 0.00501, 0.01, 0.0199, 0.0201, 3.0, NAN, math.inf]


@pytest.mark.parametrize("rate", [1e-6, 1.2e-5, 1e-3, 0.009, 0.5])
def test_adam_adapts_the_learning_rate_before_the_step(rate):
    """The rate is bit-equal to the learner's, and the step is taken with it."""
    learner = _Rate(rate)
    for kl in KLS:
        learner.learning_rate.fill_(rate)
        Learner.adapt_learning_rate(learner, torch.tensor(kl, device=DEVICE))
        wanted = learner.learning_rate.item()
        for operation in OPERATIONS:
            *_, found = run(operation, state([(3,)]), [0], rate=rate, kl=kl)
            assert found.item() == wanted, (operation, kl)
    moved = run(adam_module.clipped_adam, state([(3,)]), [0], rate=1e-3, kl=3.0)[0]
    assert moved.equal(run(adam_module.clipped_adam, state([(3,)]), [0], rate=1e-3 / LEARNING_RATE_FACTOR)[0])


class _Rate:
    """What Learner.adapt_learning_rate needs of a learner."""

    class config:
        desired_kl = 0.01

    def __init__(self, rate: float) -> None:
        self.learning_rate = torch.tensor(rate, device=DEVICE)
