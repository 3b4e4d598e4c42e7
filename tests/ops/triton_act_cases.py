"""Cases for the Triton kernel of ppo_act and ppo_step: against float64, the CPU's operation, and the calls that a step
stands for; test_triton.py runs them. Outputs start as NaN."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor
from triton_cases import DEVICE, NAN, _on_device  # noqa: F401, a fixture

from pydrone._triton import ppo_act as act_module
from pydrone.buffer import RolloutBuffer
from pydrone.ops import native
from pydrone.ops.schema import ACTIVATIONS, MATMUL

FUNCTIONS = {"tanh": torch.tanh, "elu": torch.nn.functional.elu, "relu": torch.relu, "silu": torch.nn.functional.silu}


def network(*widths: int) -> list[Tensor]:
    return [x for i, o in itertools.pairwise(widths) for x in (torch.randn(o, i) / i**0.5, torch.randn(o) * 0.3)]


def case(
    num_envs, obs, hidden=(33, 16), actions=3, critic_obs=None, activation="tanh", matmul="float32", moments=False,
    categories=(),
):  # fmt: skip
    """Arguments of ppo_act without the outputs; ``obs``: widths of the groups."""
    actions = sum(categories) or actions

    def moments_of(width):
        return [torch.randn(width), torch.rand(width) + 0.5] if moments else [None, None]

    inputs, critic_inputs = sum(obs), sum(critic_obs or obs)
    given = {
        "obs": [torch.randn(num_envs, width) for width in obs],
        "critic_obs": [torch.randn(num_envs, width) for width in critic_obs or ()],
        "noise": torch.empty(num_envs, actions).exponential_() if categories else torch.randn(num_envs, actions),
        "actor": network(inputs, *hidden, actions),
        "critic": network(critic_inputs, *hidden, 1),
        "std": None if categories else torch.rand(actions) + 0.5,
        "activation": ACTIVATIONS.index(activation),
        "matmul": MATMUL.index(matmul),
    }
    given |= dict(zip(("obs_shift", "obs_std"), moments_of([inputs])))
    given |= dict(zip(("critic_shift", "critic_std"), moments_of([critic_inputs])))
    given["obs_clip"] = 1.5
    return given | dict(zip(("value_shift", "value_std"), moments_of([]))) | {"packed": None}


def outputs(num_envs: int, actions: int, spread: bool = False) -> list[Tensor]:
    """``actions``: also the width of the mean."""
    if spread:
        wide, tall = torch.full((2, num_envs, 2 * actions), NAN), torch.full((2, 3 * num_envs), NAN)
        return [wide[0, :, ::2], tall[0, ::3], tall[1, 1::3], wide[1].view(2 * actions, num_envs).t()[:, ::2]]
    wide, tall = torch.full((2, num_envs, actions), NAN), torch.full((2, num_envs), NAN)
    return [wide[0], tall[0], tall[1], wide[1]]


def run(operation, given: dict, spread: bool = False, categories=()) -> list[Tensor]:
    found = outputs(*given["noise"].shape, spread)
    if categories:
        found[0] = found[0][:, : len(categories)]
    operation(*given.values(), *found, list(categories))
    return found


def in_float64(given: dict, categories=()) -> list[Tensor]:
    """Actions, log-probabilities, values and means, from the formulas."""

    def outputs_of(obs, parameters, shift, std):
        x = torch.cat([group.double() for group in obs], 1)
        if shift is not None:
            x = ((x - shift.double()) / std.double()).clamp(-given["obs_clip"], given["obs_clip"])
        for i in range(0, len(parameters), 2):
            x = x @ parameters[i].double().t() + parameters[i + 1].double()
            x = FUNCTIONS[ACTIVATIONS[given["activation"]]](x) if i + 2 < len(parameters) else x
        return x

    noise = given["noise"].double()
    mean = outputs_of(given["obs"], given["actor"], given["obs_shift"], given["obs_std"])
    seen = given["critic_obs"] or given["obs"]
    values = outputs_of(seen, given["critic"], given["critic_shift"], given["critic_std"])[:, 0]
    if given["value_shift"] is not None:
        values = values * given["value_std"].double() + given["value_shift"].double()
    if categories:
        heads = [torch.distributions.Categorical(logits=x) for x in mean.split(list(categories), 1)]
        choices = [(x.probs / y).argmax(1) for x, y in zip(heads, noise.split(list(categories), 1))]
        log_probs = sum(x.log_prob(y) for x, y in zip(heads, choices))
        return [torch.stack(choices, 1).double(), log_probs, values, mean]
    std = given["std"].double()
    log_probs = torch.distributions.Normal(mean, std).log_prob(mean + noise * std).sum(1)
    return [mean + noise * std, log_probs, values, mean]


def check(given: dict, tolerance: float = 5e-6, spread: bool = False, categories=()) -> None:
    found, again = (run(act_module.ppo_act, given, spread, categories) for _ in range(2))
    compared = [in_float64(given, categories)]
    if DEVICE == "cpu" and native.CPU_MISSING is None and given["matmul"] == 0:
        compared.append(run(torch.ops.pydrone.ppo_act, given, categories=categories))
    for wanted in compared:
        for x, y in zip(wanted, found, strict=True):
            torch.testing.assert_close(y.double(), x.double(), rtol=tolerance, atol=tolerance, equal_nan=True)
    assert all(torch.equal(x, y) for x, y in zip(found, again, strict=True))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("num_envs", [1, 17, 70])
def test_act_sizes(num_envs, activation):
    check(case(num_envs, [5], activation=activation))
    check(case(num_envs, [7], hidden=(), actions=1))
    check(case(num_envs, [3, 1], hidden=(20,), actions=17, activation=activation))


@pytest.mark.parametrize("chunk", [32, 64])
@pytest.mark.parametrize("hidden", [(128, 128), (65, 100, 40)], ids=str)
def test_act_blocks(monkeypatch, hidden, chunk):
    """Layers of several blocks, full and in part, and inputs wider than a block."""
    monkeypatch.setattr(act_module, "FEWEST", chunk)
    check(case(19, [17], hidden))
    check(case(3, [128], hidden))


@pytest.mark.parametrize("spread", [False, True])
def test_act_groups_strides_and_moments(spread):
    given = case(21, [5, 2], critic_obs=[5, 8, 1], moments=True)
    check(given, spread=spread)
    given["obs"] = [given["obs"][0].double(), torch.randn(4, 21).t()[:, ::2].half()]
    given["critic_obs"][1] = torch.randn(21, 16).bfloat16()[:, ::2]
    given["noise"] = torch.randn(6, 42).t()[::2, ::2]
    check(given, spread=spread)
    check(case(21, [5], moments=True) | {"obs_clip": math.inf}, spread=spread)


@pytest.mark.parametrize(("matmul", "least", "most"), [("tf32", 1e-5, 3e-3), ("bfloat16", 1e-4, 3e-2)])
def test_act_rounds_operands(matmul, least, most):
    given = case(40, [17], (128, 128), matmul=matmul)
    exact, found = in_float64(given), run(act_module.ppo_act, given)
    assert torch.allclose(exact[1].float(), found[1], atol=1e-5), "of the noise alone"
    for i in (0, 2, 3):
        assert least < (exact[i] - found[i]).abs().max().item() < most


@pytest.mark.parametrize("matmul", MATMUL)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_act_what_is_not_a_number_shows(activation, matmul):
    given = case(9, [5], activation=activation, matmul=matmul, moments=True)
    given["obs"][0][4, 2] = NAN
    actions, log_probs, values, mean = run(act_module.ppo_act, given)
    for x in (actions, mean):
        assert x.isnan().all(1).nonzero().tolist() == [[4]] == x.isnan().any(1).nonzero().tolist()
    assert values.isnan().nonzero().tolist() == [[4]] and not log_probs.isnan().any()
    given = case(9, [5], activation=activation, matmul=matmul)
    given["actor"][2][1, 1] = given["std"][1] = NAN
    actions, log_probs, values, mean = run(act_module.ppo_act, given)
    assert actions.isnan().all() and log_probs.isnan().all() and mean.isnan().all() and not values.isnan().any()


@pytest.mark.parametrize(
    ("num_envs", "categories"), [(1, (2,)), (17, (3, 2, 7)), (70, (1,)), (70, (2,)), (3, (30, 2))], ids=str
)
def test_act_discrete(num_envs, categories):
    check(case(num_envs, [5], (5,), categories=categories), spread=num_envs == 17, categories=categories)


def test_act_discrete_takes_the_first_of_equals():
    """Also where all of an action's other choices have probability 0, and where a clock is not a number."""
    given = case(3, [5], (), categories=(2, 3))
    given["actor"][0].zero_()
    given["actor"][1].zero_()
    given["noise"].fill_(2.0)
    given["noise"][1, 3] = 1.0
    given["noise"][2, 2:4] = NAN
    actions, log_probs, *_ = run(act_module.ppo_act, given, categories=(2, 3))
    assert actions.tolist() == [[0, 0], [0, 1], [0, 2]]
    torch.testing.assert_close(log_probs, torch.full((3,), -math.log(6)))
    given["actor"][1][2:] = torch.tensor([-1e4, 0.0, -1e4])
    assert run(act_module.ppo_act, given, categories=(2, 3))[0][:2, 1].tolist() == [1, 1]


def test_act_discrete_what_is_not_a_number_shows():
    given = case(9, [5], (5,), categories=(3, 2))
    given["obs"][0][4, 2] = NAN
    actions, log_probs, _, mean = run(act_module.ppo_act, given, categories=(3, 2))
    assert mean.isnan().any(1).nonzero().tolist() == [[4]] == log_probs.isnan().nonzero().tolist()
    assert actions[4].tolist() == [0, 0], "a choice nevertheless"
    given["actor"][-1][4] = NAN
    assert run(act_module.ppo_act, given, categories=(3, 2))[1].isnan().all()


def test_act_nothing():
    run(act_module.ppo_act, case(0, [5]))


def test_act_names_what_it_cannot_serve():
    with pytest.raises(RuntimeError, match="critic: expected at most 128 inputs and units in a layer, got 129"):
        run(act_module.ppo_act, case(3, [5], critic_obs=[129]))
    with pytest.raises(RuntimeError, match="actor: expected at most 32 outputs, got 33"):
        run(act_module.ppo_act, case(3, [5], actions=33))
    with pytest.raises(RuntimeError, match=r"^categories: expected 5 choices in all, got 4$"):
        run(act_module.ppo_act, case(3, [5], categories=(3, 2)), categories=(2, 2))


# ------------------------------------------------------------------------------------------------------------- ppo_step

ACTIONS, NUM_STEPS = 3, 4


class Steps:
    """A policy that acts for random environments and stores its steps in a buffer."""

    def __init__(self, num_envs: int, obs: dict[str, int], capacity: int, final: bool = True, look: str = "ignore"):
        self.generator = torch.Generator(DEVICE).manual_seed(1)
        self.num_envs, self.obs, self.final = num_envs, obs, final
        torch.manual_seed(0)
        self.given = case(num_envs, [obs["policy"]], critic_obs=[*obs.values()], moments=True)
        self.buffer = RolloutBuffer(
            num_envs, NUM_STEPS, obs=obs, actions=ACTIONS, capacity=capacity, device=DEVICE,
            fields={"mu": ACTIONS, "sigma": ACTIONS}, final_obs_rows=2 * num_envs, non_finite=look, backend="reference",
        )  # fmt: skip
        for name, x in self.buffer._storage.tensors.items():
            if name in ("rows", "rewards", "values", "dones", "final_obs"):
                x.view(torch.uint8).fill_(0xFF) if x.dtype == torch.uint8 else x.fill_(NAN)
        self.sigma = self.given["std"].expand(num_envs, ACTIONS)
        self.seen: list[list[Tensor]] = []

    def draw(self) -> dict[str, Tensor]:
        return {
            name: torch.randn(self.num_envs, width, generator=self.generator, device=DEVICE)
            for name, width in self.obs.items()
        }

    def row(self, obs: dict[str, Tensor]) -> tuple[list[Tensor], dict]:
        self.given["obs"], self.given["critic_obs"] = [obs["policy"]], [*obs.values()]
        shape = (self.num_envs, ACTIONS)
        self.given["noise"] = torch.randn(shape, generator=self.generator, device=DEVICE)
        found = outputs(*shape)
        self.seen.append(found)
        actions, log_probs, values, mean = found
        row = {"obs": obs, "actions": actions, "values": values, "log_probs": log_probs}
        return found, row | {"mu": mean, "sigma": self.sigma}

    def ends(self) -> dict[str, Tensor]:
        chance = torch.rand(self.num_envs, generator=self.generator, device=DEVICE)
        rewards = torch.randn(self.num_envs, generator=self.generator, device=DEVICE)
        return {"rewards": rewards, "dones": chance < 0.5, "truncated": chance < 0.3} | (
            {"final_obs": self.draw()} if self.final else {}
        )

    def rollout(self, operation=None, cursor: Tensor | None = None) -> None:
        """NUM_STEPS steps, by ``operation``, a ppo_step, or by the calls that it stands for."""
        ends = None
        for _ in range(NUM_STEPS):
            found, row = self.row(self.draw())
            if operation is not None:

                def step(end: tuple, begin: tuple, found=found) -> None:
                    *begin, slot, pool_slot, _ = begin
                    if cursor is not None:  # which says where
                        end, slot, pool_slot = (*end[:-2], 0, 0), 0, 0
                    operation(*end, *self.given.values(), *found, self.sigma, *begin, slot, pool_slot, cursor)

                assert self.buffer.turn(step, row, ends)
            else:
                if ends is not None:
                    self.buffer.end(**ends)
                act_module.ppo_act(*self.given.values(), *found)
                self.buffer.begin(**row)
            ends = self.ends()
        self.buffer.end(**ends)
        if cursor is not None:
            cursor[0] += 1

    def memory(self) -> dict[str, Tensor]:
        tensors = self.buffer._storage.tensors
        return {name: x for name, x in tensors.items() if name != "cursor"} | {
            f"seen {i}": torch.stack([x[i] for x in self.seen]) for i in range(4)
        }


@pytest.mark.parametrize("by_cursor", [False, True])
@pytest.mark.parametrize(
    ("num_envs", "obs", "capacity", "options"),
    [
        (1, {"policy": 5, "critic": 2}, 4, {}),
        (37, {"policy": 5, "critic": 2}, 6, {}),
        (70, {"policy": 5, "critic": 90}, 8, {"look": "raise"}),
        (9, {"policy": 17}, 8, {"final": False}),
    ],
    ids=["one", "wraps", "wide", "no final observations"],
)
def test_step_is_what_it_stands_for(num_envs, obs, capacity, options, by_cursor):
    def collected(operation=None, by_cursor=False) -> dict[str, Tensor]:
        steps = Steps(num_envs, obs, capacity, **options)
        cursor = torch.tensor([0, 0, 0, 0, NUM_STEPS]) if by_cursor else None
        for _ in range(3):
            steps.rollout(operation, cursor)
            if len(steps.buffer) + NUM_STEPS > capacity:
                steps.buffer.clear()
                if cursor is not None:
                    cursor[1] += NUM_STEPS
        if cursor is not None:
            assert cursor.tolist() == [12, 12 if capacity < 8 else 8, 0, 0, NUM_STEPS]
        return steps.memory()

    wanted, found = collected(), collected(act_module.ppo_step, by_cursor)
    assert wanted.keys() == found.keys()
    for name, x in wanted.items():
        y = found[name]
        if name in ("final_obs", "final_rows") and num_envs > 64:
            continue  # several programs: their order in the pool is free
        assert torch.equal(bits(x), bits(y)), name
    if by_cursor and DEVICE == "cpu" and native.CPU_MISSING is None:  # the CPU's, by either kind of counter
        theirs = [collected(torch.ops.pydrone.ppo_step, by_cursor) for by_cursor in (False, True)]
        assert all(torch.equal(bits(x), bits(theirs[1][name])) for name, x in theirs[0].items())


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


def test_step_that_finds_no_room_writes_nothing_but_its_outputs():
    """By the device's counters: a full ring, and one in which only the end has room."""
    for appended, kept in ((4, True), (3, False)):
        steps = Steps(5, {"policy": 5}, NUM_STEPS)
        steps.rollout(act_module.ppo_step)
        steps.buffer.clear()
        memory = {name: x.clone() for name, x in steps.memory().items()}
        cursor = torch.tensor([appended, 0, 0, 0, NUM_STEPS])
        found, row = steps.row(steps.draw())
        steps.buffer.begin(**steps.row(steps.draw())[1])
        before = steps.buffer._storage.rows.clone()

        def step(end: tuple, begin: tuple, found=found, cursor=cursor, steps=steps) -> None:
            act_module.ppo_step(*end, *steps.given.values(), *found, steps.sigma, *begin[:-1], cursor)

        assert steps.buffer.turn(step, row, steps.ends())
        assert cursor.tolist() == [4, 0, 1, 0, NUM_STEPS]
        assert not any(x.isnan().any() for x in found)
        assert torch.equal(steps.buffer._storage.rows[..., :64], before[..., :64])  # then come pool indices
        now = steps.memory()
        assert (
            torch.equal(now["dones"], memory["dones"]) == kept
            and torch.equal(now["rewards"], memory["rewards"]) == kept
        )


def test_step_looks_for_what_is_not_finite():
    steps = Steps(5, {"policy": 5, "critic": 2}, NUM_STEPS, look="warn")
    found, row = steps.row(steps.draw())
    row["obs"]["critic"][3, 1] = math.inf
    arguments = steps.given.values()
    assert steps.buffer.turn(
        lambda end, begin: act_module.ppo_step(*end, *arguments, *found, steps.sigma, *begin), row, None
    )
    assert steps.buffer._storage.not_finite.tolist() == [1]
