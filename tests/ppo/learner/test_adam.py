"""Clipping and Adam in one operation, against torch's own and against numbers worked out by hand."""

import copy
import functools
import math
import subprocess
import sys

import pytest
import torch
from torch import nn

from pydrone.ops import native
from pydrone.ppo import clipped_step
from pydrone.ppo.config import PPOConfig
from pydrone.ppo.learner import adam
from pydrone.ppo.learner.learner import Learner
from pydrone.ppo.policy.make import make_policy

pytestmark = pytest.mark.skipif(native.CPU_MISSING is not None, reason=f"the native CPU library: {native.CPU_MISSING}")


def pair(shapes, **options):
    """Two copies of parameters in two groups, the first and the others, each with an optimiser."""
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = copy.deepcopy(ours)
    options = {"lr": torch.tensor(1e-2), "fused": True, **options}
    return [(x, [x[:1], x[1:]], torch.optim.Adam(x, **options)) for x in (ours, theirs)]


def set_grads(ours, theirs, scale=1.0):
    for x, y in zip(ours, theirs):
        x.grad = scale * torch.randn_like(x)
        y.grad = x.grad.clone()


def test_by_hand():
    # g = (3, 4), norm 5, clipped to 1: (0.6, 0.8). m = 0.1 g, v = 0.001 g^2, unbiased g and g^2: a step of lr.
    x = nn.Parameter(torch.tensor([1.0, 2.0]))
    x.grad = torch.tensor([3.0, 4.0])
    optimizer = torch.optim.Adam([x], lr=0.1)
    norms = clipped_step(optimizer, [[x]], 1.0)
    assert norms.tolist() == [5.0]
    torch.testing.assert_close(x.detach(), torch.tensor([0.9, 1.9]))
    state = optimizer.state[x]
    torch.testing.assert_close(state["exp_avg"], torch.tensor([0.06, 0.08]))
    torch.testing.assert_close(state["exp_avg_sq"], torch.tensor([0.00036, 0.00064]))
    assert state["step"] == 1 and x.grad.tolist() == [3.0, 4.0]
    # With another gradient m and v are no longer its own: g = (0, -0.5), which is not clipped.
    x.grad = torch.tensor([0.0, -0.5])
    assert clipped_step(optimizer, [[x]], 1.0).tolist() == [0.5]
    m = [0.9 * 0.06, 0.9 * 0.08 - 0.1 * 0.5]
    v = [0.999 * 0.00036, 0.999 * 0.00064 + 0.001 * 0.25]
    step = [0.1 * a / (1 - 0.9**2) / (math.sqrt(b / (1 - 0.999**2)) + 1e-8) for a, b in zip(m, v)]
    torch.testing.assert_close(x.detach(), torch.tensor([0.9 - step[0], 1.9 - step[1]]))


@pytest.fixture(params=[1, 2], ids="{} threads".format)
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("options", [{}, {"betas": (0.5, 0.9), "eps": 1e-3}, {"lr": 3e-3, "fused": None}], ids=str)
@pytest.mark.parametrize("max_norm", [0.5, None])
@pytest.mark.usefixtures("threads")
def test_as_torch(options, max_norm):
    # Pieces of 8192 elements, eight of which make a thread's share: more than that, one more than that, and few.
    shapes = [(4,), (3, 17), (), (8192,), (8193,), (300, 301), (1,), (0, 5), (9, 1)]
    (ours, groups, optimizer), (theirs, their_groups, reference) = pair(shapes, **options)
    for step in range(7):
        set_grads(ours, theirs, 10.0 ** (step % 3 - 2))
        norms = clipped_step(optimizer, groups, max_norm)
        wanted = [nn.utils.clip_grad_norm_(x, max_norm or math.inf) for x in their_groups]
        reference.step()
        torch.testing.assert_close(norms, torch.stack(wanted))
        for x, y in zip(ours, theirs):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=2e-7)
            for name in ("exp_avg", "exp_avg_sq", "step"):
                torch.testing.assert_close(optimizer.state[x][name], reference.state[y][name], rtol=1e-5, atol=3e-8)
    # torch goes on from there, and from what it was before.
    set_grads(ours, theirs)
    optimizer.step()
    reference.step()
    optimizer.load_state_dict(copy.deepcopy(reference.state_dict()))
    set_grads(ours, theirs)
    clipped_step(optimizer, groups, max_norm)
    [nn.utils.clip_grad_norm_(x, max_norm or math.inf) for x in their_groups]
    reference.step()
    for x, y in zip(ours, theirs):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


def test_parameters_without_a_gradient_are_left_out():
    (ours, groups, optimizer), _ = pair([(2,), (3,), (4,)])
    before = [x.detach().clone() for x in ours]
    ours[1].grad = torch.ones(3)
    assert clipped_step(optimizer, groups).tolist() == [0.0, pytest.approx(math.sqrt(3))]
    assert ours[0].equal(before[0]) and ours[2].equal(before[2]) and not ours[1].equal(before[1])
    assert set(optimizer.state) == {ours[1]}
    optimizer.zero_grad()
    assert clipped_step(optimizer, groups).tolist() == [0.0, 0.0]


def test_what_is_not_finite_spoils_its_group_alone():
    (ours, groups, optimizer), _ = pair([(2,), (3,), (20,)])
    for x in ours:
        x.grad = torch.ones_like(x)
    ours[2].grad[17] = math.nan
    norms = clipped_step(optimizer, groups, 1.0)
    assert norms[0] == pytest.approx(math.sqrt(2)) and norms[1].isnan()
    assert ours[0].isfinite().all() and ours[1].isnan().all() and ours[2].isnan().all()


def test_nothing_is_clipped_without_a_norm():
    (ours, groups, optimizer), (theirs, _, reference) = pair([(1,), (3,), (2,)])
    for x, y in zip(ours, theirs):
        x.grad, y.grad = torch.ones_like(x), torch.ones_like(y)
        x.grad[-1] = y.grad[-1] = math.inf
    assert clipped_step(optimizer, groups).isinf().all()
    reference.step()
    for x, y in zip(ours, theirs):
        torch.testing.assert_close(x, y, equal_nan=True)
    assert ours[1][:2].isfinite().all() and ours[1][2].isnan()


@pytest.mark.parametrize("rate", [1, 0.5, torch.tensor(0.5, dtype=torch.float64), torch.tensor([0.5])], ids=str)
def test_learning_rates_of_any_kind(rate):
    x = nn.Parameter(torch.ones(3))
    x.grad = torch.ones(3)
    clipped_step(torch.optim.Adam([x], lr=0.1), [[x]])
    before, optimizer = x.detach().clone(), torch.optim.Adam([x], lr=0.1)
    optimizer.param_groups[0]["lr"] = rate
    clipped_step(optimizer, [[x]])
    torch.testing.assert_close(before - x.detach(), torch.full((3,), float(rate)))


def test_other_defaults_of_torch():
    x = nn.Parameter(torch.ones(3))
    x.grad = torch.ones(3)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            assert clipped_step(torch.optim.Adam([x], lr=0.1), [[x]]).tolist() == [pytest.approx(math.sqrt(3))]
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(x.detach(), torch.full((3,), 0.9))


def learner(policy):
    return Learner(policy, PPOConfig(learner="fused", schedule="fixed"))


def test_a_layer_of_both_networks_goes_the_torch_way():
    policy = make_policy(3, 2, PPOConfig(hidden_dims=(4,)))
    policy.critic[0] = policy.actor[0]
    plain = adam.why_not(torch.optim.Adam(policy.parameters()), (policy.actor_parameters(), policy.critic_parameters()))
    assert plain == "a parameter is in two of the groups"


def test_a_parameter_outside_both_networks_does_no_harm():
    policy = make_policy(3, 2, PPOConfig(hidden_dims=(4,)))
    policy.aux = nn.Linear(2, 2)
    ours = learner(policy)
    for x in (*policy.actor_parameters(), *policy.critic_parameters()):
        x.grad = torch.ones_like(x)
    assert adam.why_not(ours.optimizer, (policy.actor_parameters(), policy.critic_parameters())) is None
    clipped_step(ours.optimizer, (policy.actor_parameters(), policy.critic_parameters()), 1.0)
    assert policy.aux.weight not in ours.optimizer.state


def test_autograd_notices():
    (ours, groups, optimizer), _ = pair([(2,), (3,)])
    loss = sum((x**2).sum() for x in ours)  # keeps the parameters for its backward
    for x in ours:
        x.grad = torch.ones_like(x)
    clipped_step(optimizer, groups)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.filterwarnings("error")
def test_a_scheduler_goes_on():
    x = nn.Parameter(torch.ones(3))
    x.grad = torch.ones(3)
    optimizer = torch.optim.Adam([x], lr=0.1)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    moved = []
    for _ in range(3):
        before = x.detach().clone()
        clipped_step(optimizer, [[x]])
        moved.append(float((before - x.detach())[0]))
        scheduler.step()
    assert moved == pytest.approx([0.1, 0.05, 0.025], rel=1e-4)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda x: torch.optim.SGD([x]), r"torch\.optim\.Adam, this is SGD"),
        (lambda x: torch.optim.AdamW([x]), r"torch\.optim\.Adam, this is AdamW"),
        (lambda x: type("Adam2", (torch.optim.Adam,), {})([x]), r"torch\.optim\.Adam, this is Adam2"),
        (lambda x: torch.optim.Adam([x], weight_decay=0.1), "weight_decay: expected 0, got 0.1"),
        (lambda x: torch.optim.Adam([x], amsgrad=True), "amsgrad: expected False, got True"),
        (lambda x: torch.optim.Adam([x], maximize=True), "maximize: expected False, got True"),
        (lambda x: torch.optim.Adam([{"params": [x]}, {"params": []}]), "one group of parameters, got 2"),
    ],
)
def test_other_optimizers_are_refused(make, message):
    x = nn.Parameter(torch.ones(3))
    x.grad = torch.ones(3)
    with pytest.raises(RuntimeError, match=message):
        clipped_step(make(x), [[x]], 1.0)
    assert x.eq(1).all()


def test_other_arguments_are_refused():
    x, y = (nn.Parameter(torch.ones(3)) for _ in range(2))
    x.grad = torch.ones(3)
    optimizer = torch.optim.Adam([x])
    for groups in ([[y]], [[x, y]], [[x, x]], [[x], [x]]):
        with pytest.raises(ValueError, match="groups: expected parameters of the optimiser, each once"):
            clipped_step(optimizer, groups)
    with pytest.raises(ValueError, match="groups: expected each of the optimiser's parameters that has a gradient"):
        clipped_step(optimizer, [])
    for max_norm in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="max_norm: expected a number above 0"):
            clipped_step(optimizer, [[x]], max_norm)
    with pytest.raises(TypeError, match="max_norm: expected a number above 0 or None, got str"):
        clipped_step(optimizer, [[x]], "1")
    optimizer.register_step_post_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match="hooks"):
        clipped_step(optimizer, [[x]])
    double = nn.Parameter(torch.ones(3, dtype=torch.float64))
    with pytest.raises(RuntimeError, match=r"float32 parameters on the CPU, got torch\.float64"):
        clipped_step(torch.optim.Adam([double]), [[double]])
    assert x.eq(1).all()


TWO_STEPS = """
x = torch.nn.Parameter(torch.ones(3))
optimizer = Adam([x], lr=torch.tensor(0.1), fused=True)
for _ in range(2):
    x.grad = torch.tensor([1.0, -2.0, 3.0])
    clipped_step(optimizer, [[x]], 1.0)
    optimizer.zero_grad()
assert x.grad is None
optimizer.load_state_dict(optimizer.state_dict())
optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))]})
"""


def test_the_learners_adam_is_torchs_without_the_compiler(tmp_path):
    # In a process of its own: other tests import torch._dynamo.
    code = (
        "import sys, torch\nfrom pydrone.ppo.learner.adam import Adam, clipped_step\n"
        f"{TWO_STEPS}\nassert 'torch._dynamo' not in sys.modules\n"
        "torch.save((x, optimizer.state_dict()), sys.argv[1])"
    )
    path = tmp_path / "state.pt"
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    theirs = {"torch": torch, "Adam": torch.optim.Adam, "clipped_step": clipped_step}
    exec(TWO_STEPS, theirs)
    x, state = torch.load(path)
    assert torch.equal(x, theirs["x"])
    torch.testing.assert_close(state, theirs["optimizer"].state_dict(), rtol=0, atol=0)


def test_adam_keeps_torchs_wrappers_where_the_compiler_is(monkeypatch):
    called = []

    def plain(self):
        called.append("plain")

    @functools.wraps(plain)
    def wrapped(self):
        called.append("wrapped")

    monkeypatch.setattr(torch.optim.Adam, "zero_grad", wrapped)
    method = adam._uncompiled("zero_grad")
    monkeypatch.delitem(sys.modules, "torch._dynamo", raising=False)
    method(None)
    monkeypatch.setitem(sys.modules, "torch._dynamo", torch)
    method(None)
    assert called == ["plain", "wrapped"]


def call(**changed):
    vectors = {name: [torch.ones(3)] for name in ("parameters", "grads", "exp_avgs", "exp_avg_sqs")}
    arguments = {**vectors, "steps": [torch.zeros(())], "groups": [0], "max_norm": 1.0}
    arguments |= {"learning_rate": torch.tensor(0.1), "beta1": 0.9, "beta2": 0.99, "epsilon": 1e-8}
    return {**arguments, "norms": torch.zeros(1), **changed}


def test_opcheck():
    torch.library.opcheck(torch.ops.pydrone.clipped_adam.default, (), call())


def test_the_operation_refuses_what_does_not_fit():
    arguments = call()
    torch.ops.pydrone.clipped_adam(**arguments)
    assert not arguments["parameters"][0].eq(1).any()
    same = torch.ones(3)
    for changed, message in [
        ({"parameters": []}, "parameters: expected at least one"),
        ({"grads": []}, "grads: expected one for each of 1 parameters, got 0"),
        ({"groups": []}, "groups: expected one for each of 1 parameters, got 0"),
        ({"groups": [1]}, "groups: expected 0 <= groups < 1, got 1"),
        ({"groups": [-1]}, "groups: expected 0 <= groups < 1, got -1"),
        ({"grads": [torch.ones(4)]}, r"grads: expected shape \[3\], got \[4\]"),
        ({"grads": [torch.ones(3).double()]}, "grads: expected dtype Float, got Double"),
        ({"exp_avgs": [torch.ones(6)[::2]]}, "exp_avgs: expected a contiguous tensor"),
        ({"exp_avgs": [same], "exp_avg_sqs": [same]}, "exp_avg_?s?q?s: expected memory of its own"),
        ({"parameters": [same], "grads": [same]}, "(grads|parameters): expected memory of its own"),
        ({"parameters": [same], "norms": same[:1]}, "(norms|parameters): expected memory of its own"),
        ({"exp_avgs": [same], "steps": [same[2]]}, "(exp_avgs|steps): expected memory of its own"),
        ({"steps": [torch.zeros(1)]}, r"steps: expected shape \[\], got \[1\]"),
        ({"learning_rate": torch.zeros((), dtype=torch.float64)}, "learning_rate: expected dtype Float, got Double"),
        ({"beta1": 1.0}, "beta1: expected 0 <= beta1 < 1, got 1"),
        ({"beta1": -0.25}, r"^beta1: expected 0 <= beta1 < 1, got -0\.25$"),
        ({"beta1": 1e300}, r"^beta1: expected 0 <= beta1 < 1, got 1e\+300$"),
        ({"beta2": math.nan}, "beta2: expected 0 <= beta2 < 1, got nan"),
        ({"epsilon": -1.0}, "epsilon: expected a number of at least 0, got -1"),
        ({"norms": torch.zeros(1, 1)}, r"norms: expected shape \[-1\], got \[1, 1\]"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            torch.ops.pydrone.clipped_adam(**call(**changed))
