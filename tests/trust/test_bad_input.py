"""Hundreds of invalid calls (bad_input.py), and a test for each bug that they have found."""

from __future__ import annotations

import copy
import random

import bad_input
import pytest
import torch
from rollout_model import fill, memory_bytes, random_step

import pydrone.ppo
from pydrone import RolloutBuffer
from pydrone.memory import plan

CASES, GROUPS = 1500, 10
BIG, HUGE = 2**60, 10**400
X, ENVS = torch.zeros(3, 5), torch.zeros(3)

native = pytest.mark.skipif(pydrone.backends()["cpu"] is not None, reason=str(pydrone.backends()["cpu"]))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("group", range(GROUPS))
def test_wrong_calls_are_refused_by_name(group):
    """`make sanitize` runs 20,000, in a library that checks every memory access."""
    wrong = []
    for number in range(group, CASES, GROUPS):
        case = bad_input.make(number)
        problem = bad_input.problem(case)
        if problem:
            wrong.append(f"case {number}: {case.what}: {problem}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_number_always_gives_the_same_case():
    assert [bad_input.make(i).what for i in range(40)] == [bad_input.make(i).what for i in range(40)]
    kinds = {bad_input.make(i).what.partition("(")[0].partition(",")[0] for i in range(400)}
    functions = "gae vtrace retrace append begin end compute_gae minibatches sequences RolloutBuffer plan"
    assert kinds >= {*functions.split(), "load_state_dict", "advance", "to", "item"}


def test_each_kind_of_problem_is_detected():
    """Tests problem() itself: an accepted call, an unclear error, a written byte, a valid call that fails."""
    kept = torch.zeros(2)

    def verdict(wrong, right=lambda: None):
        return bad_input.problem(bad_input.Case("f(x)", wrong, right, frozenset({"x"}), (kept,)))

    def refuse(error=ValueError, message="x: no"):
        raise error(message)

    def write():
        kept.add_(1)
        refuse()

    assert verdict(refuse) is None
    assert verdict(lambda: None) == "accepted"
    assert "does not name x" in verdict(lambda: refuse(message="xs: no"))
    assert "another kind" in verdict(lambda: refuse(AttributeError))
    assert "a KeyError" in verdict(lambda: refuse(KeyError))
    assert "something was written" in verdict(write)
    assert "right arguments fails" in verdict(refuse, refuse)


# ---------------------------------------------------------------------------------------------- what was found


def make(backend: str | None = None, **options) -> RolloutBuffer:
    return RolloutBuffer(**{"num_envs": 3, "num_steps": 2, "obs": 3, "actions": 2, "backend": backend} | options)


def filled(backend: str | None = None, **options) -> RolloutBuffer:
    buf = make(backend, **options)
    fill(buf)
    buf.compute_gae(torch.zeros(3))
    return buf


@pytest.mark.parametrize("name", ["gamma", "lam"])
@pytest.mark.parametrize(
    ("value", "error", "got"),
    [
        ("0.5", TypeError, "str"),
        (b"1", TypeError, "bytes"),
        (HUGE, ValueError, "1000"),
        (torch.tensor([0.1, 0.2]), TypeError, "Tensor"),
        (torch.tensor(0.5, device="meta"), TypeError, "Tensor"),
    ],
    ids=["str", "bytes", "huge", "two", "meta"],
)
def test_discounts_that_are_not_numbers(name, value, error, got):
    for call in (lambda **x: pydrone.gae(X, X, X, ENVS, **x), lambda **x: filled().compute_gae(ENVS, **x)):
        with pytest.raises(error, match=rf"^{name}: expected a number.*{got}"):
            call(**{name: value})


@pytest.mark.parametrize(
    "call, name",
    [
        (lambda x: pydrone.gae(X, X, X, ENVS, stats=x), "stats"),
        (lambda x: filled().compute_gae(ENVS, check=x), "check"),
        (lambda x: filled().minibatches(drop_last=x), "drop_last"),
        (lambda x: filled().minibatches(reuse=x), "reuse"),
        (lambda x: filled().sequences(normalize_advantages=x), "normalize_advantages"),
    ],
    ids=["stats", "check", "drop_last", "reuse", "normalize_advantages"],
)
@pytest.mark.parametrize("value", ["false", "minibatch", None, 0.0], ids=repr)
def test_bools_are_bools(call, name, value):
    with pytest.raises(TypeError, match=rf"^{name}: expected a bool, got {type(value).__name__}$"):
        call(value)


@pytest.mark.parametrize("strides", [(1, 1), (2, 1), (1, 2), (0, 1), (4, 1)], ids=str)
def test_an_output_that_overlaps_itself(strides):
    memory = torch.zeros(20)
    with pytest.raises(ValueError, match=r"^out\[0\]: expected memory of its own for every element"):
        pydrone.gae(X, X, X, ENVS, out=(memory.as_strided((3, 5), strides), torch.zeros(3, 5)))
    for fits in ((5, 1), (1, 3), (6, 1), (1, 4)):
        pydrone.gae(X, X, X, ENVS, out=(memory.as_strided((3, 5), fits), torch.zeros(3, 5)))


def interleaved() -> list[torch.Tensor]:
    return list(torch.zeros(4, 3, 2).unbind(2))


@native
def test_operations_refuse_outputs_that_overlap():
    """Interleaved tensors share no element and are accepted."""
    arguments = bad_input.ARGUMENTS["gae"]()
    call = torch.ops.pydrone.gae.default
    for name in ("advantages", "returns"):
        for other in ("rewards", "values"):
            with pytest.raises(RuntimeError, match=f"{name}: expected memory of its own"):
                call(*(arguments | {name: arguments[other]}).values())
        with pytest.raises(RuntimeError, match=f"{name}: expected memory of its own for every element"):
            call(*(arguments | {name: torch.zeros(1, 3).expand(4, 3)}).values())
    with pytest.raises(RuntimeError, match="returns: expected memory of its own"):
        call(*(arguments | {"returns": arguments["advantages"]}).values())
    call(*(arguments | dict(zip(("advantages", "returns"), interleaved()))).values())
    arguments = bad_input.ARGUMENTS["gather"]()
    across = arguments["rows"].flatten()[8:48].view(torch.int32).view(5, 2)
    with pytest.raises(RuntimeError, match="outputs: expected memory of its own"):
        torch.ops.pydrone.gather.default(*(arguments | {"outputs": [across, arguments["outputs"][1]]}).values())


def test_the_buffers_own_outputs_as_inputs(backend):
    buf = make(backend)
    for _ in range(2):
        buf.append(**random_step(buf), truncated=torch.ones(3))
    buf.compute_gae(ENVS, timeout_bootstrap="next_value")
    before = memory_bytes(buf)
    for x in (buf.advantages, buf.returns):
        with pytest.raises(ValueError, match=r"^last_values: expected memory of its own"):
            buf.compute_gae(x[:, 1], timeout_bootstrap="next_value")
        with pytest.raises(ValueError, match=r"^final_values: expected memory of its own"):
            buf.compute_gae(ENVS, final_values=x)
    assert memory_bytes(buf) == before
    buf.compute_gae(buf.values[:, 1], timeout_bootstrap="next_value")


ODD = {
    "sparse": lambda x: x.to_sparse(),
    "mkldnn": lambda x: x.to_mkldnn(),
    "nested": lambda x: torch.nested.nested_tensor([x, x]),
    "quantized": lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.quint8),
    "meta": lambda x: x.to("meta"),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("odd", ODD)
def test_a_tensor_not_in_plain_memory_writes_nothing(odd, backend):
    """The dispatcher sent such tensors to the reference, which wrote other fields before it failed, if it failed."""
    buf = make(backend, fields={"mu": 2})
    fill(buf, 1)
    before, step = memory_bytes(buf), random_step(buf)
    late = {name: step[name] for name in ("rewards", "dones")}
    for name in ("obs", "mu", "values", "rewards", "dones"):
        wrong = step | {name: ODD[odd](step[name].float())}
        with pytest.raises((TypeError, ValueError), match=rf"^{name}: expected "):
            buf.append(**wrong)
        if name not in late:
            with pytest.raises((TypeError, ValueError), match=rf"^{name}: expected "):
                buf.begin(**{key: x for key, x in wrong.items() if key not in late})
        assert memory_bytes(buf) == before and len(buf) == 1
    with pytest.raises((TypeError, ValueError), match=r"^values: expected "):
        pydrone.gae(X, ODD[odd](X), X, ENVS, backend=backend)


@native
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("odd", [name for name in ODD if name != "meta"])
def test_operations_refuse_tensors_not_in_plain_memory(odd):
    arguments = bad_input.ARGUMENTS["gae"]()
    with pytest.raises(RuntimeError, match=r"^values: expected a strided tensor"):
        torch.ops.pydrone.gae.default(*(arguments | {"values": ODD[odd](arguments["values"])}).values())
    assert not arguments["advantages"].any()


def test_a_step_without_dones_is_refused(backend):
    """The operation accepts None for the first half of a step, and append used to count that as a whole step."""
    buf = make(backend)
    with pytest.raises(TypeError, match=r"^dones: expected a tensor, got NoneType$"):
        buf.append(**random_step(buf) | {"dones": None})
    assert len(buf) == 0


@pytest.mark.parametrize("name", ["log_probs", "values", "obs"])
def test_begin_names_the_argument(name, backend):
    buf = make(backend)
    step = {key: x for key, x in random_step(buf).items() if key not in ("rewards", "dones")}
    with pytest.raises(TypeError, match=f"^{name}: expected dtype torch.float32, got torch.int64$"):
        buf.begin(**step | {name: step[name].long()})
    buf.begin(**step)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"obs": {3}}, ValueError, "^obs: expected a positive int, a shape"),
        ({"max_episode_length": 0, "final_obs_rows": 3}, ValueError, "^max_episode_length: expected at least 1"),
        ({"obs": BIG}, RuntimeError, "^num_envs: the buffer takes [0-9]+ bytes of memory"),
        ({"capacity": BIG}, RuntimeError, "^num_envs: the buffer takes [0-9]+ bytes of memory"),
        ({"final_obs_rows": HUGE}, RuntimeError, "^num_envs: the buffer takes 1?0?"),
        ({"device": "meta"}, ValueError, "^device: expected one that holds data, got 'meta'$"),
    ],
    ids=["set", "episode", "obs", "capacity", "pool", "meta"],
)
def test_constructor(arguments, error, message):
    with pytest.raises(error, match=message):
        make(**arguments)


@pytest.mark.parametrize("device", ["meta", "mps", "xpu", "nonsense"])
def test_devices_that_cannot_hold_a_buffer(device):
    if device in ("mps", "xpu") and getattr(torch, device).is_available():
        pytest.skip(f"there is {device}")
    for call in (lambda: make(device=device), lambda: make().to(device)):
        with pytest.raises(ValueError, match=r"^device: expected"):
            call()


@pytest.mark.parametrize("value", [0, -1, 2.5, True, "3", 7], ids=repr)
def test_plan_of_a_reused_minibatch(value):
    with pytest.raises((TypeError, ValueError), match=r"^reused_minibatch: expected"):
        plan(3, 2, 3, 2, reused_minibatch=value)
    assert plan(3, 2, 3, 2, reused_minibatch=6).nbytes > plan(3, 2, 3, 2).nbytes


@pytest.mark.parametrize(
    ("hidden", "message"),
    [
        (["mu"], "^hidden: expected a mapping"),
        ({"h": "nonsense"}, r"^hidden\['h'\]: expected the name of a field, one of mu, got 'nonsense'$"),
        ({"h": torch.zeros(3, 2, device="meta")}, r"^hidden\['h'\]: expected device cpu, got meta$"),
        ({"h": torch.zeros(3, 2).to_sparse()}, r"^hidden\['h'\]: expected a strided tensor"),
    ],
    ids=["list", "name", "meta", "sparse"],
)
def test_hidden_states(hidden, message):
    with pytest.raises((TypeError, ValueError), match=message):
        filled(fields={"mu": 2}).sequences(hidden=hidden)


def changed(**changes):
    return lambda state: state | changes


STATES = {
    "no mapping": (lambda state: list(state), "expected a mapping, got list"),
    "no tensor": (lambda state: state | {"memory.rewards": None}, "memory.rewards: expected a tensor"),
    "the last one on meta": (lambda state: state | {"memory.returns": state["memory.returns"].to("meta")}, "meta"),
    "the last one sparse": (lambda state: state | {"memory.returns": state["memory.returns"].to_sparse()}, "strided"),
    "text": (changed(appended="2"), "appended: expected int, got str"),
    "a bool": (changed(epoch=True), "epoch: expected int, got bool"),
    "computed": (changed(computed=1), "computed: expected bool, got int"),
    "before its beginning": (changed(discarded=-2), "discarded: expected a multiple of 2"),
    "between rollouts": (changed(discarded=1), "discarded: expected a multiple of 2"),
    "more than it holds": (changed(appended=3), "appended: expected 0 to 2"),
    "less than nothing": (changed(discarded=4), "appended: expected 4 to 6"),
    "flags": (changed(resets=[]), "resets: expected 1 bools"),
}


@pytest.mark.parametrize("kind", STATES)
def test_a_state_is_checked_before_anything_is_written(kind, backend):
    buf, other = filled(backend), filled(backend)
    change, message = STATES[kind]
    state, before = change(other.state_dict()), memory_bytes(buf)
    with pytest.raises((TypeError, ValueError), match=rf"^state_dict: .*{message}"):
        buf.load_state_dict(state)
    assert memory_bytes(buf) == before and len(buf) == 2
    buf.load_state_dict(copy.deepcopy(other.state_dict()))
    assert torch.equal(buf.advantages, other.advantages)


def test_a_layout_without_data_is_refused():
    arguments = bad_input.ARGUMENTS["append"]()
    arguments["layout"] = arguments["layout"].to("meta")
    with pytest.raises(RuntimeError, match="layout: expected a tensor on the CPU, got one on meta"):
        torch.ops.pydrone.append(*arguments.values())


@native
def test_networks_without_data_are_refused():
    rng = random.Random(1)
    arguments = bad_input.fused_update(rng).arguments
    for name in ("actor", "critic"):
        with pytest.raises(
            RuntimeError, match=rf"{name}: expected float32 parameters on the CPU, got torch\.float32 on meta"
        ):
            pydrone.ppo.fused_update(**arguments | {name: copy.deepcopy(arguments[name]).to("meta")})
