"""The fused learner's minibatches where they lie, in the ring: to the bit what gathering them first would give."""

from __future__ import annotations

import copy
import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from pydrone.buffer import RolloutBuffer
from pydrone.ops import native
from pydrone.ppo.config import PPOConfig
from pydrone.ppo.learner import fused
from pydrone.ppo.learner.learner import Learner
from pydrone.ppo.policy.actor_critic import ActorCritic
from pydrone.ppo.policy.make import make_policy
from pydrone.rollout.minibatch import Drawn

pytestmark = pytest.mark.skipif(native.CPU_MISSING is not None, reason=f"no native library: {native.CPU_MISSING}")

GROUPS = {"policy": 5, "critic": 8, "other": 2}


def observe(obs: int | dict[str, int], num_envs: int) -> Tensor | dict[str, Tensor]:
    if isinstance(obs, dict):
        return {name: torch.randn(num_envs, width) for name, width in obs.items()}
    return torch.randn(num_envs, obs)


def rollout(
    policy: ActorCritic, num_envs: int = 64, num_steps: int = 9, discard: int = 0, reset: float = 0.0, **options
) -> RolloutBuffer:
    """The rollout after ``discard`` others; ``reset``: the share of steps that count for nothing."""
    torch.manual_seed(1)
    buffer = RolloutBuffer(num_envs, num_steps, obs=policy.obs, actions=3, fields=policy.fields(), seed=5, **options)
    for i in range(discard + 1):
        if i:
            buffer.clear()
        for _ in range(num_steps):
            obs = observe(policy.obs, num_envs)
            step = policy.act(obs)
            buffer.append(
                obs=obs,
                actions=step.actions,
                rewards=torch.randn(num_envs),
                dones=torch.rand(num_envs) < 0.05,
                values=step.values,
                log_probs=step.log_probs,
                valid=torch.rand(num_envs) >= reset if reset else None,
                **policy.stored(step),
            )
    buffer.compute_gae(policy.value(observe(policy.obs, num_envs)))
    return buffer


def gradients(policy: ActorCritic, buffer: RolloutBuffer, lazy: bool, **options) -> list[list[Tensor]]:
    """Of every minibatch of two epochs, with the figures."""
    found = []
    for minibatch in buffer.minibatches(num_epochs=2, reuse=True, lazy=lazy, **options):
        policy.zero_grad(set_to_none=True)
        figures = fused.of_policy(policy, minibatch, PPOConfig())
        assert isinstance(minibatch, Drawn) == lazy
        assert not lazy or minibatch._gathered is None
        found.append([*(x.grad.clone() for x in policy.parameters()), figures])
    return found


def equal(ours: list[list[Tensor]], theirs: list[list[Tensor]]) -> bool:
    return len(ours) == len(theirs) and all(
        torch.equal(x, y) for a, b in zip(ours, theirs) for x, y in zip(a, b, strict=True)
    )


WRAPS = {"capacity": 13, "discard": 2}  # the third rollout begins at slot 5 and ends at 0
CASES = {
    "plain": (7, {}, {}),
    "one row narrower than a vector": (1, {}, {}),
    "wraps": (7, WRAPS, {}),
    "reset steps": (7, {"reset": 0.2}, {}),
    "reset steps, wraps": (7, WRAPS | {"reset": 0.2}, {"shuffle": "none"}),
    "in order": (7, {}, {"shuffle": "none"}),
    "not normalised": (7, {}, {"normalize_advantages": False}),
    "drop_last": (7, {"num_envs": 53}, {"drop_last": True, "num_minibatches": 5}),
    "one step": (7, {"num_envs": 5, "num_steps": 1}, {"num_minibatches": 2}),
    "one sample": (7, {"num_envs": 1, "num_steps": 3}, {"num_minibatches": 3}),
    "tiles and one more": (7, {"num_envs": 43}, {"num_minibatches": 3}),
    "tiles": (7, {"num_envs": 128}, {"num_minibatches": 3}),
    "less than the fetch is ahead": (7, {"num_envs": 18}, {"num_minibatches": 1}),
    "bfloat16": (7, {"obs_dtype": torch.bfloat16} | WRAPS, {}),
    "float16": (GROUPS, {"obs_dtype": torch.float16}, {}),
    "groups": (GROUPS, WRAPS | {"reset": 0.2}, {}),
    "no pool": (GROUPS, {"final_obs_rows": 0}, {}),
}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("obs", "options", "how"), CASES.values(), ids=CASES)
def test_gradients_are_those_of_gathered_minibatches(obs, options, how, threads):
    torch.manual_seed(0)
    policy = make_policy(obs, 3, PPOConfig(hidden_dims=(33, 16)))
    buffer, before = rollout(policy, **options), torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        expected = gradients(policy, copy.deepcopy(buffer), False, **how)
        found = gradients(policy, buffer, True, **how)
    finally:
        torch.set_num_threads(before)
    assert equal(found, expected)
    assert all(not torch.equal(x[0], y[0]) for x, y in pairwise(found))


SETTINGS = [
    {},
    {"normalize_obs": True, "normalize_values": True, "activation": "elu"},
    {"advantage_scope": "minibatch"},
    {"normalize_advantages": False, "max_kl": 0.002},
    {"critic_obs": ("critic", "policy"), "actor_obs": ("other",)},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=[", ".join(x) for x in SETTINGS])
def test_an_update_is_the_same(settings, monkeypatch):
    results = []
    gather = RolloutBuffer.minibatches
    for lazy in (True, False):
        if not lazy:
            monkeypatch.setattr(RolloutBuffer, "minibatches", lambda self, **x: gather(self, **x | {"lazy": False}))
        torch.manual_seed(0)
        config = PPOConfig(hidden_dims=(16,), learner="fused", **settings)
        policy = make_policy(GROUPS, 3, config)
        learner, buffer = Learner(policy, config), rollout(policy, **WRAPS)
        size = buffer.nbytes
        figures = [learner.update(buffer) for _ in range(2)]
        if lazy and settings.get("advantage_scope") != "minibatch":
            assert buffer.nbytes == size, "a minibatch was gathered"
        else:
            assert buffer.nbytes > size
        results.append((figures, policy.state_dict()))
    assert results[0][0] == results[1][0]
    assert all(torch.equal(x, y) for x, y in zip(results[0][1].values(), results[1][1].values(), strict=True))


def test_targets_of_vtrace_are_those_that_minibatches_have():
    """They are no sums of advantages and values, which the operation would form."""
    policy = make_policy(7, 3, PPOConfig(hidden_dims=(33, 16)))
    buffer = rollout(policy, **WRAPS)
    last, log_rhos = torch.zeros(64), torch.randn(64, 9)
    buffer.compute_vtrace(last, log_rhos)
    expected = gradients(policy, copy.deepcopy(buffer), False)
    found = []
    for minibatch in buffer.minibatches(num_epochs=2, reuse=True, lazy=True):
        policy.zero_grad(set_to_none=True)
        figures = fused.of_policy(policy, minibatch, PPOConfig())
        found.append([*(x.grad.clone() for x in policy.parameters()), figures])
    assert equal(found, expected)
    buffer.compute_gae(last)  # reads the ring again
    gradients(policy, buffer, True)


def test_a_drawn_minibatch_is_gathered_when_it_is_asked():
    policy = make_policy(GROUPS, 3, PPOConfig(hidden_dims=(4,)))
    buffer = rollout(policy, reset=0.2, **WRAPS)
    plain = copy.deepcopy(buffer).minibatches(3)
    for ours, theirs in zip(buffer.minibatches(3, lazy=True), plain, strict=True):
        assert len(ours) == len(theirs) and ours._gathered is None
        assert torch.equal(ours.indices, theirs.indices) and repr(ours) == repr(theirs)
        for name in ("actions", "log_probs", "values", "advantages", "returns"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
        assert torch.equal(ours["sigma"], theirs["sigma"])
        assert all(torch.equal(x, theirs.obs[name]) for name, x in ours.obs.items())


def test_what_the_operation_does_not_read_is_gathered():
    """Whole numbers, and minibatches normalised on their own."""
    policy = make_policy({"policy": 2, "b": 3}, 3, PPOConfig(hidden_dims=(4,), critic_obs=("b",)))
    buffer = RolloutBuffer(8, 4, {"policy": 2, "b": ((3,), torch.int64)}, 3, fields=policy.fields())
    for _ in range(4):
        obs = {"policy": torch.randn(8, 2), "b": torch.randint(5, (8, 3))}
        step = policy.act(obs | {"b": obs["b"].float()})
        one = torch.ones(8)
        buffer.append(
            obs=obs, actions=step.actions, rewards=one, dones=one, values=step.values, log_probs=step.log_probs,
            **policy.stored(step),
        )  # fmt: skip
    buffer.compute_gae(one)
    (minibatch,) = buffer.minibatches(1, lazy=True)
    assert fused.of_policy(policy, minibatch, PPOConfig()).isfinite().all() and minibatch._gathered is not None
    assert not isinstance(next(buffer.minibatches(1, normalize_advantages="minibatch", lazy=True)), Drawn)
    with pytest.raises(TypeError, match="lazy: expected a bool"):
        buffer.minibatches(1, lazy="no")


def test_a_discarded_rollout_is_not_learnt_from():
    policy = make_policy(7, 3, PPOConfig(hidden_dims=(4,)))
    buffer = rollout(policy)
    reading = buffer.minibatches(2, lazy=True)
    first, second = next(reading), next(reading)
    first.obs  # noqa: B018
    numbers = second.indices
    buffer.clear()
    assert torch.equal(second.indices, numbers)  # as of every minibatch, whatever has become of the rollout
    for use in (lambda: second.obs, lambda: copy.deepcopy(second), lambda: fused.of_policy(policy, first, PPOConfig())):
        with pytest.raises(RuntimeError, match="the rollout was discarded"):
            use()
    assert len(second) == 288


# ---------------------------------------------------------------------------------------------------- the operation

N, T, C = 6, 4, 5


def arguments(**change) -> tuple:
    """Rows of 3 observations, 2 actions, the log-probability, the value, mu and sigma; outputs are not numbers."""
    torch.manual_seed(0)
    rows = torch.rand(C, N, 12)
    fields = {"obs": rows[..., :3], "actions": rows[..., 3:5], "log_probs": rows[..., 5], "values": rows[..., 6]}
    fields |= {"mu": rows[..., 7:9], "sigma": rows[..., 9:11], "advantages": torch.rand(N, T), "returns": None}
    fields |= {"drawn": [T, 3, N * T, 1, 2, 0, 1, 5, 17], "stats": torch.tensor([9.0, 0.5, 2.0]).double()}
    x = fields | {"subset": None} | change
    networks = [torch.randn(2, 3), torch.zeros(2)], [torch.randn(1, 3), torch.zeros(1)]
    std = torch.ones(2)
    grads = [torch.full_like(y, math.nan) for y in (*networks[0], *networks[1], std)]
    given = (
        [x["obs"]],
        [],
        x["actions"],
        x["log_probs"],
        x["advantages"],
        x["returns"],
        x["values"],
        x["mu"],
        x["sigma"],
    )
    settings = (*networks, std, 0, False, 0.2, 0.2, 1.0, 0.01, None, None, None, None, 10.0, None, None)
    return *given, *settings, grads, torch.full((6,), math.nan), x["drawn"], x["stats"], x["subset"]


def test_opcheck():
    # Ahead-of-time dispatch would make copies of views that share memory, each with rows of its own.
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    assert torch.library.opcheck(torch.ops.pydrone.ppo_gradients.default, arguments(), test_utils=tests)
    run = arguments(subset=torch.arange(N * T))
    torch.ops.pydrone.ppo_gradients(*run)
    assert all(x.isfinite().all() for x in (*run[25], run[26]))


def numbers(i: int, x: int) -> list[int]:
    return [x if i == j else y for j, y in enumerate([T, 3, N * T, 1, 2, 0, 1, 5, 17])]


WRONG = [
    ({"drawn": [1, 2]}, "drawn: expected nine numbers or none, got 2"),
    ({"drawn": numbers(0, C + 1)}, "num_steps: expected"),
    ({"drawn": numbers(0, -1)}, "num_steps: expected"),
    ({"drawn": numbers(0, 0)}, "advantages: expected shape"),
    ({"drawn": numbers(1, C)}, "start: expected"),
    ({"drawn": numbers(1, -1)}, "start: expected"),
    ({"drawn": numbers(2, N * T - 1)}, "num_samples: expected 24, got 23"),
    ({"drawn": numbers(7, 8)}, r"first: expected first \+ 17 <= 24, got 8"),
    ({"drawn": numbers(7, -1)}, "first: expected"),
    ({"drawn": numbers(8, 2**62)}, "first: expected"),
    ({"drawn": numbers(8, 0)}, "at least one sample"),
    ({"drawn": numbers(8, -5)}, "at least one sample"),
    ({"subset": torch.arange(3)}, "subset: expected shape"),
    ({"subset": torch.zeros(N * T)}, "subset: expected dtype"),
    ({"stats": torch.zeros(2).double()}, "stats: expected shape"),
    ({"returns": torch.rand(17)}, "returns: expected None"),
    ({"drawn": []}, "actions: expected shape"),
    ({"advantages": torch.rand(17)}, "advantages: expected shape"),
    ({"actions": torch.rand(17, 2)}, "actions: expected shape"),
    ({"obs": torch.rand(C, N)}, "obs: expected shape"),
    ({"obs": torch.rand(C, N, 3)}, "obs: expected a field of the same rows"),
    ({"values": torch.rand(C, N, 12)[..., :1]}, "values: expected shape"),
    ({"values": torch.rand(C, N, 6).double()[..., 0]}, "values: expected dtype Float"),
    ({"mu": torch.rand(C, N, 12)[:, :5, :2]}, "mu: expected shape"),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_wrong_arguments_are_named(change, message):
    given = arguments(**change)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.pydrone.ppo_gradients(*given)
    assert all(x.isnan().all() for x in (*given[25], given[26]))


def test_samples_that_do_not_exist_lead_nowhere():
    """As gather has it: clamped to the rollout's."""
    wild, tame = torch.full((N * T,), 2**60), torch.full((N * T,), N * T - 1)
    runs = [arguments(subset=x) for x in (wild, tame)]
    for run in runs:
        torch.ops.pydrone.ppo_gradients(*run)
    assert all(torch.equal(x, y) for x, y in zip(runs[0][25], runs[1][25]))
