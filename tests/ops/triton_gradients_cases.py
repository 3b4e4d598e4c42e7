"""Cases for the Triton kernel of ``ppo_gradients``; test_triton.py runs them. Outputs start as NaN."""

from __future__ import annotations

import copy
import itertools
import math
import os

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical

from pydrone.buffer import RolloutBuffer
from pydrone.ops import native
from pydrone.ops.schema import ACTIVATIONS, MATMUL, NUM_METRICS
from pydrone.ppo.learner.loss import surrogate_loss, value_loss
from pydrone.ppo.policy.distributions import gaussian_entropy, gaussian_kl, gaussian_log_prob

if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    raise RuntimeError("no CUDA device: set TRITON_INTERPRET=1")

from pydrone._triton import ppo_gradients as module

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
NAN = float("nan")
FUNCTIONS = {"tanh": torch.tanh, "elu": torch.nn.functional.elu, "relu": torch.relu, "silu": torch.nn.functional.silu}
LAST = {"drawn": [], "stats": None, "subset": None, "cursor": None, "categories": [], "value_max": True}
NAMES = (
    "obs", "critic_obs", "actions", "log_probs", "advantages", "returns", "values", "mu", "sigma", "actor", "critic",
    "std", "activation", "matmul", "clip", "value_clip", "value_loss_coef", "entropy_coef", "obs_shift", "obs_std",
    "critic_shift", "critic_std", "obs_clip", "value_shift", "value_std",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _on_device():
    with torch.device(DEVICE):
        yield


def network(*widths: int) -> list[Tensor]:
    """Weights and biases; biases large enough to matter."""
    parameters = []
    for inputs, outputs in itertools.pairwise(widths):
        parameters += [torch.randn(outputs, inputs) / math.sqrt(inputs), torch.randn(outputs) * 0.3]
    return parameters


def case(size: int, obs=(7,), critic_obs=(), actions=3, hidden=(16, 16), critic_hidden=None, **options) -> dict:
    """Random arguments by name, with ratios and values inside and outside their clip ranges."""
    torch.manual_seed(size)
    if categories := options.get("categories"):
        chances = torch.tensor([1.0 / x for x in categories])
        options = {
            "actions": torch.stack([torch.randint(0, x, (size,)) for x in categories], 1).float(),
            "log_probs": chances.log().sum() + torch.randn(size) * 0.3,
            "std": None, "mu": None, "sigma": None,
        } | options  # fmt: skip
        actions = sum(categories)
    made = dict.fromkeys(NAMES) | {
        "obs": [torch.randn(size, width) for width in obs],
        "critic_obs": [torch.randn(size, width) for width in critic_obs],
        "actions": torch.randn(size, actions),
        "log_probs": torch.randn(size) * 0.3 - 1.4 * actions,
        "advantages": torch.randn(size),
        "returns": torch.randn(size) * 2,
        "values": torch.randn(size) * 0.3,
        "mu": torch.randn(size, actions) * 0.1,
        "sigma": torch.rand(size, actions) + 0.5,
        "actor": network(sum(obs), *hidden, actions),
        "critic": network(sum(critic_obs or obs), *(hidden if critic_hidden is None else critic_hidden), 1),
        "std": torch.rand(actions) + 0.5,
        "activation": "tanh",
        "matmul": "float32",
        "clip": 0.2,
        "value_clip": 0.2,
        "value_loss_coef": 0.7,
        "entropy_coef": 0.03,
        "obs_clip": 10.0,
    }
    assert options.keys() <= {*made, *LAST}
    return made | options


def run(given: dict, operation=None, measured: int = NUM_METRICS) -> list[Tensor]:
    """The gradients, then the metrics."""
    given = given | {"activation": ACTIVATIONS.index(given["activation"]), "matmul": MATMUL.index(given["matmul"])}
    parameters = [*given["actor"], *given["critic"], *([] if given["std"] is None else [given["std"]])]
    grads, metrics = [torch.full_like(x, NAN) for x in parameters], torch.full((measured,), NAN)
    last = [given.get(name, default) for name, default in LAST.items()]
    (operation or module.ppo_gradients)(*(given[name] for name in NAMES), grads, metrics, *last)
    return [*grads, metrics]


def by_autograd(given: dict, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """The expected outputs, from the formulas of pydrone/ppo and autograd."""
    x = {name: y.to(dtype) if isinstance(y, Tensor) else y for name, y in given.items()}
    networks = [[y.detach().to(dtype).requires_grad_() for y in x[name]] for name in ("actor", "critic")]
    std = [] if x["std"] is None else [x["std"].detach().requires_grad_()]
    inputs = [torch.cat([y.to(dtype) for y in groups], 1) for groups in (x["obs"], x["critic_obs"] or x["obs"])]
    outputs = []
    for parameters, y, name in zip(networks, inputs, ("obs", "critic"), strict=True):
        if x[f"{name}_shift"] is not None:
            y = ((y - x[f"{name}_shift"]) / x[f"{name}_std"]).clamp(-x["obs_clip"], x["obs_clip"])
        for i in range(0, len(parameters), 2):
            y = FUNCTIONS[x["activation"]](y) if i else y
            y = y @ parameters[i].t() + parameters[i + 1]
        outputs.append(y)
    mean, new = outputs[0], outputs[1][:, 0]
    old, returns = x["values"], x["returns"]
    if x["value_shift"] is not None:
        old, returns = ((y - x["value_shift"]) / x["value_std"] for y in (old, returns))
    if std:
        log_probs, entropy = gaussian_log_prob(x["actions"], mean, *std), gaussian_entropy(*std)
    else:
        heads = [Categorical(logits=y) for y in mean.split(list(x["categories"]), 1)]
        log_probs = sum(y.log_prob(x["actions"][:, i]) for i, y in enumerate(heads))
        entropy = sum(y.entropy() for y in heads).mean()
    surrogate = surrogate_loss(log_probs, x["log_probs"], x["advantages"], x["clip"])
    value = value_loss(new, old, returns, x["value_clip"] if x["value_clip"] >= 0 else None)
    if not x.get("value_max", True) and x["value_clip"] >= 0:
        value = (old + (new - old).clamp(-x["value_clip"], x["value_clip"]) - returns).square().mean()
    (surrogate + x["value_loss_coef"] * value - x["entropy_coef"] * entropy).backward()
    kl = torch.full_like(value, NAN) if x["mu"] is None else gaussian_kl(x["mu"], x["sigma"], mean, *std)
    log_ratio = log_probs - x["log_probs"]
    moved = log_ratio.exp() - 1
    of_ratio = (moved - log_ratio).mean(), (moved.abs() > x["clip"]).to(dtype).mean()
    metrics = torch.stack([surrogate, value, entropy, kl, *of_ratio]).detach()
    return [*(y.grad for y in (*networks[0], *networks[1], *std)), metrics]


def check(given: dict, tolerance: float = 1e-5) -> None:
    """Compares with float64, to within ``tolerance`` of each gradient's norm."""
    found, expected, rounded = run(given), by_autograd(given), by_autograd(given, torch.float32)
    for i, (got, wanted) in enumerate(zip(found[:-1], expected[:-1], strict=True)):
        # Where summands cancel, float32 is no more accurate in any order.
        limit = max(tolerance * wanted.norm().item() + 1e-8, 4 * (rounded[i] - wanted).norm().item())
        assert (got.double() - wanted).norm().item() <= limit, (i, tuple(got.shape))
    assert found[-1].tolist() == pytest.approx(expected[-1].tolist(), rel=tolerance, abs=tolerance, nan_ok=True)
    if given["matmul"] == "float32" and native.CPU_MISSING is None and DEVICE == "cpu":
        same(found, run(given, torch.ops.pydrone.ppo_gradients), 2 * tolerance)


def same(found: list[Tensor], expected: list[Tensor], tolerance: float = 2e-5) -> None:
    """Equal to within float32's rounding."""
    for i, (got, wanted) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(got.isnan(), wanted.isnan()), i
        apart, scale = (got - wanted).nan_to_num().norm(), wanted.nan_to_num().norm()
        assert apart <= tolerance * scale + 1e-7, (i, apart.item(), scale.item())


# size, observations of actor and critic, actions, hidden layers
SIZES = [
    (1, (3,), (), 1, (16,)),
    (17, (1,), (2,), 1, (1, 1)),
    (33, (17,), (17,), 4, (33, 20)),
    (49, (5, 8, 2), (30,), 17, (24, 16, 5)),
    (35, (45,), (), 32, (128, 128)),
    (19, (7,), (9,), 2, ()),
]


@pytest.mark.parametrize(
    ("size", "obs", "critic_obs", "actions", "hidden", "activation"),
    [
        pytest.param(*case, activation, marks=() if i % 4 == j else pytest.mark.slow)
        for i, case in enumerate(SIZES)
        for j, activation in enumerate(ACTIVATIONS)
    ],
)
def test_gradients_sizes(size, obs, critic_obs, actions, hidden, activation):
    check(case(size, obs, critic_obs, actions, hidden, activation=activation))


def test_gradients_networks_that_differ():
    check(case(20, (7,), (9, 3), hidden=(20,), critic_hidden=(33, 16, 8)))
    check(case(20, hidden=(33, 16, 8), critic_hidden=()))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_of_large_sums(activation):
    """Where exponentials overflow. In tanh's derivative, 1 - y^2, digits cancel."""
    given = case(17, activation=activation)
    given["obs"] = [x * 200 for x in given["obs"]]
    check(given, 1e-4)


def test_gradients_options():
    check(case(20, value_clip=-1.0))
    check(case(20, value_clip=0.0))
    check(case(20, mu=None, sigma=None))
    check(case(20, clip=0.0))
    check(case(20, value_max=False))
    moments = {"value_shift": torch.tensor(0.7), "value_std": torch.tensor(1.9)}
    moments |= {"obs_shift": torch.randn(7), "obs_std": torch.rand(7) + 0.5}
    check(case(20, obs_clip=0.8, **moments))  # the critic sees the same, not normalised
    moments |= {"critic_shift": torch.randn(9), "critic_std": torch.rand(9) + 0.5}
    check(case(20, (3, 4), (9,), obs_clip=math.inf, **moments))


def test_gradients_any_strides_and_types():
    given = case(37, (7, 2), (5,))
    for name in ("actions", "log_probs", "advantages", "returns", "values", "mu", "sigma"):
        x = given[name]
        spread = torch.full([2 * n for n in x.shape], NAN)
        given[name] = (spread[1::2, ::2] if x.dim() == 2 else spread[::2]).copy_(x)
    given["obs"] = [given["obs"][0].t().contiguous().t().half(), given["obs"][1].bfloat16()]
    given["critic_obs"] = [given["critic_obs"][0].double()[:, [4, 3, 2, 1, 0]].flip(1)]
    check(given)


@pytest.mark.parametrize(("matmul", "tolerance"), [("tf32", 3e-3), ("bfloat16", 3e-2)])
def test_gradients_precisions(matmul, tolerance):
    given = case(40, matmul=matmul, value_clip=-1.0, clip=100.0, hidden=(40, 40))
    check(given, tolerance)
    exact = run(given | {"matmul": "float32"})
    apart = max(((x - y).norm() / y.norm()).item() for x, y in zip(run(given)[:-1], exact))
    assert apart > tolerance / 300, "nothing was rounded"


def test_gradients_of_many_programs(monkeypatch):
    monkeypatch.setattr(module, "ROWS", 2)
    monkeypatch.setattr(module, "_programs", lambda *_: 5)
    check(case(100))  # some see two tiles


def test_gradients_without_the_estimates():
    """As the learner takes them: the same bits, two figures less."""
    given = case(50)
    found, fewer = run(given), run(given, measured=4)
    assert all(torch.equal(x, y) for x, y in zip(fewer[:-1], found[:-1], strict=True))
    assert torch.equal(fewer[-1], found[-1][:4])


def test_gradients_are_the_same_bits_every_time():
    given = case(50)
    first, second = run(given), run(given)
    assert all(torch.equal(x, y) for x, y in zip(first, second))


@pytest.mark.parametrize("name", ["obs", "actions", "log_probs", "advantages", "returns", "values", "mu", "sigma"])
def test_gradients_show_what_is_not_a_number(name):
    given = case(18, critic_obs=(4,))
    x = given[name][0] if name == "obs" else given[name]
    x.view(-1)[-1] = NAN
    found = run(given)
    of_actor, of_critic = found[: len(given["actor"])], found[len(given["actor"]) : -2]
    actor = name not in ("returns", "values", "mu", "sigma")
    assert all(x.isnan().any() == actor for x in (*of_actor, found[-2]))
    assert all(x.isnan().any() == (name in ("returns", "values") and name != "") for x in of_critic) or name == "values"
    wrong = {"returns": [1], "values": [1], "mu": [3], "sigma": [3], "obs": [0, 3, 4], "advantages": [0]}.get(
        name, [0, 4]
    )
    assert found[-1].isnan().nonzero().flatten().tolist() == wrong


@pytest.mark.parametrize("matmul", MATMUL)
def test_gradients_show_every_kind_of_nan(matmul):
    """Rounding must not carry the bits of one into its sign: the GPU's own NaN is 0x7FFFFFFF."""
    given = case(3, matmul=matmul)
    given["obs"][0].view(torch.int32)[1, 2] = 0x7FFFFFFF
    assert all(x.isnan().any() for x in run(given)[:-1])


@pytest.mark.parametrize("place", ["weight", "bias"])
def test_gradients_show_a_weight_that_is_not_a_number(place):
    given = case(20)
    given["critic"][place == "bias"].view(-1)[0] = NAN
    found = run(given)
    assert found[-1].isnan().nonzero().flatten().tolist() == [1]
    assert not any(x.isnan().any() for x in (*found[: len(given["actor"])], found[-2]))
    assert all(x.isnan().any() for x in found[len(given["actor"]) : -2])


def drawn_case(dtype=torch.float32, shuffle="full", num_envs=13, num_steps=5, capacity=8, epoch=0, **options):
    """A minibatch to draw from a ring that wraps, and the same one gathered."""
    torch.manual_seed(3)
    fields = {"mu": 3, "sigma": 3}
    buffer = RolloutBuffer(num_envs, num_steps, obs=7, actions=3, fields=fields, capacity=capacity, obs_dtype=dtype,
                           device=DEVICE, seed=5)  # fmt: skip
    for i in range(2 * num_steps):
        if i == num_steps:
            buffer.clear()
        buffer.append(
            obs=torch.randn(num_envs, 7), actions=torch.randn(num_envs, 3), rewards=torch.randn(num_envs),
            dones=torch.rand(num_envs) < 0.1, values=torch.randn(num_envs), log_probs=torch.randn(num_envs) * 0.3 - 4,
            valid=torch.rand(num_envs) >= 0.2 if options.get("subset") else None,
            mu=torch.randn(num_envs, 3) * 0.1, sigma=torch.rand(num_envs, 3) + 0.5,
        )  # fmt: skip
    buffer.compute_gae(torch.randn(num_envs))
    how = {"num_minibatches": 2, "num_epochs": 2, "shuffle": shuffle}
    how["normalize_advantages"] = options.get("stats", True)
    copied = copy.deepcopy(buffer)  # each call of minibatches begins new epochs
    drawn, gathered = (list(x.minibatches(**how, lazy=x is buffer))[2 * epoch + 1] for x in (buffer, copied))
    place = drawn.place()
    given = case(num_envs)
    ring = {name: place.fields[name] for name in ("actions", "log_probs", "values", "mu", "sigma")}
    ring |= {"obs": [place.obs], "advantages": place.advantages, "returns": None, "drawn": place.numbers}
    ring |= {"stats": place.statistics, "subset": place.subset}
    plain = {name: gathered[name] for name in ("actions", "log_probs", "values", "mu", "sigma")}
    plain |= {"obs": [gathered.obs], "advantages": gathered.advantages, "returns": gathered.returns}
    return given | ring, given | plain


@pytest.mark.parametrize(
    "options",
    [{"epoch": 1}, {"shuffle": "none", "stats": False}, {"dtype": torch.float16, "capacity": 10},
     {"dtype": torch.bfloat16, "subset": True}, {"num_envs": 1, "num_steps": 3}],
    ids=str,
)  # fmt: skip
def test_gradients_drawn_are_those_of_gathered_minibatches(options):
    ring, plain = drawn_case(**options)
    assert (ring["stats"] is None) == (options.get("stats") is False)
    assert (ring["subset"] is None) == ("subset" not in options)
    found, expected = run(ring), run(plain)
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
    check(plain)
    if native.CPU_MISSING is None and DEVICE == "cpu":
        same(found, run(ring, torch.ops.pydrone.ppo_gradients))


def test_gradients_follow_the_cursor():
    ring, _ = drawn_case()
    num_steps, start, _, _, rollout, *_ = ring["drawn"]
    by_host = run(ring)
    ring["drawn"] = [num_steps, 0, *ring["drawn"][2:4], 0, *ring["drawn"][5:]]
    discarded = rollout * num_steps
    cursor = torch.tensor([discarded + num_steps, discarded, 0, 0, num_steps])
    assert discarded % ring["actions"].shape[0] == start != 0
    found = run(ring | {"cursor": cursor})
    assert all(torch.equal(x, y) for x, y in zip(found, by_host, strict=True))


# ----------------------------------------------------------------------------------------------------- discrete actions


@pytest.mark.parametrize(
    ("size", "categories", "value_max"), [(1, (2,), True), (17, (1,), False), (17, (3, 2, 7), True), (35, (2,), False)]
)
def test_gradients_discrete(size, categories, value_max):
    given = case(size, hidden=(5,), categories=categories, value_max=value_max)
    check(given)
    assert all(torch.equal(x.nan_to_num(7.0), y.nan_to_num(7.0)) for x, y in zip(run(given), run(given)))


def test_gradients_discrete_many():
    """The widest actor, without the entropy; logits so far apart that probabilities underflow."""
    check(case(20, hidden=(), categories=(5,) * 6 + (2,), entropy_coef=0.0, value_clip=-1.0))
    given = case(20, hidden=(), categories=(4, 3))
    given["actor"][-2] *= 300
    check(given, 1e-4)


def test_gradients_estimate_of_a_ratio_beyond_what_the_surrogate_holds():
    given = case(20, hidden=(), categories=(2, 3))
    given["log_probs"] = given["log_probs"] - 9
    given["advantages"] = given["advantages"].abs()
    check(given)
    assert by_autograd(given)[-1][4] > 1000


@pytest.mark.parametrize("wrong", [2.0, -1.0, 0.5, NAN])
def test_gradients_show_an_action_that_is_no_choice(wrong):
    given = case(20, hidden=(4,), categories=(3, 2))
    given["actions"][17, 1] = wrong
    found = run(given)
    assert found[-1].isnan().nonzero().flatten().tolist() == [0, 3, 4]
    assert [x.isnan().any().item() for x in found[:-1]] == [True] * len(given["actor"]) + [False] * len(given["critic"])


def test_gradients_discrete_show_what_is_not_a_number():
    given = case(20, hidden=(4,), categories=(3, 2))
    given["actor"][-1][4] = NAN
    found = run(given)
    assert found[-1].isnan().nonzero().flatten().tolist() == [0, 2, 3, 4]
    assert all(x.isnan().any() for x in found[: len(given["actor"])])


def test_gradients_discrete_drawn_are_those_of_gathered_minibatches():
    discrete = case(3, hidden=(), categories=(2, 2, 2))
    ring, plain = (x | {name: discrete[name] for name in ("actor", "std", "mu", "sigma", "categories")}
                   for x in drawn_case())  # fmt: skip
    for x in (ring, plain):
        x["actions"].copy_(x["actions"] > 0)
    found, expected = run(ring), run(plain)
    assert all(torch.equal(x, y) for x, y in zip(found[:-1], expected[:-1], strict=True))


def test_gradients_refuse_what_does_not_fit():
    float32 = MATMUL.index("float32")
    assert module.why_not(network(17, 128, 128, 4), network(128, 1), float32) is None
    for wide, reason in (
        (network(17, 129, 4), "128 inputs and units in a layer, got 129"),
        (network(129, 1), "128 inputs and units in a layer, got 129"),
        (network(1, 2, 2, 2, 2, 1), "3 hidden layers, got 4"),
        (network(4, 33), "32 outputs, got 33"),
    ):
        assert f"actor: expected at most {reason}" == module.why_not(wide, network(3, 1), float32)
        assert f"critic: expected at most {reason}" == module.why_not(network(3, 1), wide, float32)
    large, small = (network(17, *hidden, 4) for hidden in ((128, 128), (64, 64)))
    h100, rtx4090 = 227 * 1024, 99 * 1024
    tf32, bfloat16 = MATMUL.index("tf32"), MATMUL.index("bfloat16")
    assert module.config_of(large, large, tf32, h100) == module.Config(32, 8, 1, "tf32")
    assert module.config_of(large, large, bfloat16, rtx4090) == module.Config(16, 8, 1, "bfloat16")
    assert module.config_of(small, small, tf32, rtx4090) == module.Config(32, 8, 1, "tf32")
    reason = module.config_of(large, small, tf32, rtx4090)
    assert reason == "tf32: the networks need 191488 bytes of shared memory, this GPU has 101376"
    reason = module.config_of(small, large, float32, h100)
    assert (
        reason == "float32: expected networks of at most 8192 weights, each width padded to a power of two, got 22528"
    )
    with pytest.raises(RuntimeError, match="actor: expected at most 128 inputs"):
        run(case(3, hidden=(200,)))
    given = case(3, categories=(3, 2))
    with pytest.raises(RuntimeError, match=r"^categories: expected 5 choices in all, got 4$"):
        run(given | {"categories": [2, 2]})
    with pytest.raises(RuntimeError, match=r"^categories: expected 2 numbers, one for each action, got 1$"):
        run(given | {"categories": [5]})
    with pytest.raises(RuntimeError, match=r"actions: expected at least one sample, got shape \[0, 3\]"):
        run(case(0))
