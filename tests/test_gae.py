"""pydrone.gae against tables derived by hand, a float64 loop, and properties that need no second implementation."""

from __future__ import annotations

import math

import pytest
import torch
from rollout_model import TERMINAL, assert_close, gae_loop, in_float64, rollout, terminal
from torch import tensor

from pydrone import gae
from pydrone.ops.dispatch import select

# gamma = lam = 1/2, so gamma * lam = 1/4 and every number below is exact in float32.
# rewards 1 2 3, values 2 4 6, last value 10, value of the true final observation 20 (where the bootstrap needs it).
#
# TD errors of steps that do not end:  d0 = 1 + 4/2 - 2 = 1   d1 = 2 + 6/2 - 4 = 1   d2 = 3 + 10/2 - 6 = 2
# Ended at 1: terminated d1 = 2 - 4 = -2; final value d1 = 2 + 20/2 - 4 = 8; stored value d1 = 2 + 4/2 - 4 = 0;
#             next value d1 = 2 + 6/2 - 4 = 1.      A1 = d1, A0 = 1 + A1 / 4, A2 = 2.
# Ended at 2: terminated d2 = 3 - 6 = -3; final value d2 = 3 + 20/2 - 6 = 7; stored value d2 = 3 + 6/2 - 6 = 0;
#             next value (here the last value) d2 = 2.  A2 = d2, A1 = 1 + A2 / 4, A0 = 1 + A1 / 4.
FINAL, STORED, NEXT = {"final": 20.0}, {"timeout_bootstrap": "stored_value"}, {"timeout_bootstrap": "next_value"}
TABLE = {
    "running": ([0, 0, 0], None, {}, [11 / 8, 3 / 2, 2]),
    "terminated": ([0, 1, 0], None, {}, [1 / 2, -2, 2]),
    "terminated, flags with it": ([0, 1, 0], [0, 0, 0], FINAL, [1 / 2, -2, 2]),
    "truncated, final value": ([0, 1, 0], [0, 1, 0], FINAL, [3, 8, 2]),
    "truncated, stored value": ([0, 1, 0], [0, 1, 0], STORED, [1, 0, 2]),
    "truncated, next value": ([0, 1, 0], [0, 1, 0], NEXT, [5 / 4, 1, 2]),
    "truncated without done": ([0, 0, 0], [0, 1, 0], FINAL, [3, 8, 2]),
    "terminated at the last step": ([0, 0, 1], None, {}, [17 / 16, 1 / 4, -3]),
    "truncated at the last step, final value": ([0, 0, 1], [0, 0, 1], FINAL, [27 / 16, 11 / 4, 7]),
    "truncated at the last step, stored value": ([0, 0, 1], [0, 0, 1], STORED, [5 / 4, 1, 0]),
    "truncated at the last step, next value": ([0, 0, 1], [0, 0, 1], NEXT, [11 / 8, 3 / 2, 2]),
    # A2 = 7, then A1 = -2, then d0 = 1 + 20/2 - 2 = 9, independent of what follows.
    "an end at every step": ([1, 1, 1], [1, 0, 1], FINAL, [9, -2, 7]),
}


@pytest.mark.parametrize("case", TABLE)
def test_table(case, backend):
    dones, truncated, how, expected = TABLE[case]
    how = dict(how)
    if "final" in how:
        how["final_values"] = torch.full((1, 3), how.pop("final"))
    values = tensor([[2.0, 4, 6]])
    truncated = None if truncated is None else tensor([truncated])
    advantages, returns = gae(
        tensor([[1.0, 2, 3]]),
        values,
        tensor([dones]),
        tensor([10.0]),
        gamma=0.5,
        lam=0.5,
        truncated=truncated,
        backend=backend,
        **how,
    )
    assert advantages.tolist() == [expected]
    assert torch.equal(returns, advantages + values)
    assert advantages.dtype == returns.dtype == torch.float32


@pytest.mark.parametrize("flags", [(0, 0), (1, 0), (1, 1)], ids=["running", "done", "both"])
def test_invalid_step_counts_for_nothing(flags, backend):
    # NEXT_STEP: step 1 is truncated, step 2 has the final observation and is not a transition.
    # d3 = 5 + 10/2 - 8 = 2;  A2 = 0 with any flags;  d1 = 2 + 6/2 - 4 = 1, trace cut;  A0 = 1 + 1/4.
    dones, truncated = tensor([[0, 1, flags[0], 0]]), tensor([[0, 1, flags[1], 0]])
    advantages, returns, stats = gae(
        tensor([[1.0, 2, math.nan, 5]]),
        tensor([[2.0, 4, 6, 8]]),
        dones,
        tensor([10.0]),
        gamma=0.5,
        lam=0.5,
        truncated=truncated,
        timeout_bootstrap="next_value",
        valid=tensor([[1, 1, 0, 1]]),
        stats=True,
        backend=backend,
    )
    assert advantages.tolist() == [[5 / 4, 1, 0, 2]]
    assert returns.tolist() == [[13 / 4, 5, 6, 10]]
    # Valid samples 5/4, 1, 2: mean 17/12, M2 = 1/36 + 25/144 + 49/144 = 13/24.
    assert stats.tolist() == pytest.approx([3, 17 / 12, 13 / 24], rel=1e-6)


def test_invalid_step_cuts_the_trace_of_a_running_one(backend):
    # Step 1 does not end: d1 = 2 + 6/2 - 4 = 1, and A1 = d1 although A3 = 2 follows the invalid step.
    zeros = torch.zeros(1, 4)
    valid = tensor([[True, True, False, True]])
    values, rewards = tensor([[2.0, 4, 6, 8]]), tensor([[1.0, 2, 9, 5]])
    advantages, _ = gae(rewards, values, zeros, tensor([10.0]), 0.5, 0.5, valid=valid, backend=backend)
    assert advantages.tolist() == [[5 / 4, 1, 0, 2]]


def test_last_values_enter_once(backend):
    # last_values 10 -> 14 raise d1 by gamma * 4 = 2: A1 by 2, A0 by gamma * lam * 2 = 1/2. If they entered the carry
    # too, A1 would rise by 2 + 4/4.
    def run(last: float) -> list[float]:
        one = torch.ones(1, 2)
        return gae(one, one, torch.zeros(1, 2), tensor([last]), 0.5, 0.5, backend=backend)[0][0].tolist()

    low, high = run(10.0), run(14.0)
    assert [b - a for a, b in zip(low, high)] == [0.5, 2.0]
    assert gae(tensor([[1.0]]), tensor([[4.0]]), tensor([[0]]), tensor([10.0]), 0.5, backend=backend)[0].item() == 2.0


# ---------------------------------------------------------------------------------------------- against a loop

SHAPES = [(1, 1), (1, 7), (5, 1), (3, 5), (63, 17), (64, 16), (65, 33), (129, 16), (128, 31), (257, 3), (1025, 2)]
BOOTSTRAPS = ["none", "final_values", "stored_value", "next_value"]


def assert_same(actual: tuple, expected: tuple) -> None:
    """Advantages and returns, and statistics where they are asked for."""
    for x, y in zip(actual[:2], expected[:2], strict=True):
        assert_close(x, y)
    for x, y in zip(actual[2:], expected[2:], strict=True):
        assert x.tolist() == pytest.approx(y.tolist(), rel=1e-5)


def with_bootstrap(data: dict, bootstrap: str) -> dict:
    """``data`` reduced to the arguments that this bootstrap takes."""
    data = dict(data)
    final = data.pop("final_values")
    if bootstrap == "none":
        data.pop("truncated")
    elif bootstrap == "final_values":
        data["final_values"] = final
    else:
        data["timeout_bootstrap"] = bootstrap
    return data


@pytest.mark.parametrize("bootstrap", BOOTSTRAPS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_matches_the_loop(shape, bootstrap, backend):
    data = with_bootstrap(rollout(*shape, seed=shape[0]), bootstrap)
    expected = gae_loop(gamma=0.97, lam=0.9, **data)
    actual = gae(gamma=0.97, lam=0.9, backend=backend, **data)
    for x, y in zip(actual, expected, strict=True):
        assert_close(x, y)
    del data["valid"]
    assert_close(gae(gamma=0.97, lam=0.9, backend=backend, **data)[0], gae_loop(gamma=0.97, lam=0.9, **data)[0])


@pytest.mark.parametrize("num_steps", [256, 257, 512])
@pytest.mark.parametrize("columns", [False, True])
def test_what_comes_hundreds_of_steps_later_reaches_the_first(columns, num_steps, backend):
    """No ends, several kernel tiles; only the last reward is nonzero, so the result is known in closed form."""
    rewards = torch.zeros(num_steps, 3).t() if columns else torch.zeros(3, num_steps)
    rewards[:, -1] = tensor([1.0, 2.0, -4.0])
    zeros = torch.zeros_like(rewards)
    advantages, _ = gae(rewards, zeros, zeros, torch.zeros(3), gamma=0.999, lam=0.998, backend=backend)
    decays = (0.999 * 0.998) ** torch.arange(num_steps - 1, -1, -1, dtype=torch.float64)
    assert_close(advantages, (rewards[:, -1:] * decays).float())


@pytest.mark.parametrize("start", [0, 3, 4, 8])
def test_a_ring_of_odd_size_in_aligned_rows(start, backend):
    """Ten slots in rows of twelve: four steps can begin aligned in a row and yet cross the end of the ring."""
    num_envs, num_steps, capacity = 5, 8, 10
    slots = (torch.arange(num_steps) + start) % capacity
    data = rollout(num_envs, num_steps, seed=start)
    rewards, values = (torch.full((num_envs, 12), math.nan)[:, :capacity] for _ in range(2))
    codes = torch.full((num_envs, 12), 3, dtype=torch.uint8)[:, :capacity]
    rewards[:, slots], values[:, slots], codes[:, slots] = data["rewards"], data["values"], data["dones"].byte()
    advantages, returns = torch.full((2, num_envs, num_steps), math.nan)
    select(advantages.device, backend).gae(
        *(rewards, values, codes, None, None, data["last_values"], None, None, 0.97, 0.9, start, True, 0, None),
        *(advantages, returns, None, None),
    )
    loop = gae_loop(data["rewards"], data["values"], data["dones"], data["last_values"], 0.97, 0.9)
    assert_close(advantages, loop[0])
    assert_close(returns, loop[1])


@pytest.mark.parametrize("gamma, lam", [(0, 0), (1, 1), (0, 1), (1, 0), (0.999, 0.5)])
def test_any_discount(gamma, lam, backend):
    data = with_bootstrap(rollout(33, 40), "final_values")
    actual = gae(gamma=gamma, lam=lam, backend=backend, **data)
    for x, y in zip(actual, gae_loop(gamma=gamma, lam=lam, **data), strict=True):
        assert_close(x, y)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
@pytest.mark.parametrize("time_dim", [0, 1])
def test_nothing_to_do(shape, time_dim, backend):
    x = torch.zeros(shape)
    adv, ret, stats = gae(x, x, x, torch.zeros(shape[1 - time_dim]), time_dim=time_dim, stats=True, backend=backend)
    assert adv.shape == ret.shape == shape and stats.tolist() == [0, 0, 0]


def expanded(x: torch.Tensor) -> torch.Tensor:
    return x[:, :1].expand(-1, x.shape[1])


LAYOUTS = {
    "rows": lambda x: x.contiguous(),
    "columns": lambda x: x.t().contiguous().t(),
    "strided rows": lambda x: torch.stack([x, x.roll(1, 0)], 2).flatten(1)[:, ::2],
    "strided columns": lambda x: x.t().repeat_interleave(3, 1)[:, 1::3].t(),
    "both strided": lambda x: x.repeat_interleave(2, 0).repeat_interleave(3, 1)[::2, 2::3],
    "offset": lambda x: torch.cat([x[:2], x, x[:1]])[2 : 2 + len(x)],
    "expanded": expanded,
    "expanded columns": lambda x: x[:1].expand(len(x), -1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(70, 19), (3, 35), (21, 21)], ids=["70x19", "3x35", "21x21"])
def test_any_layout(layout, shape, backend):
    arrange = LAYOUTS[layout]
    data = with_bootstrap(rollout(*shape), "final_values")
    last = data.pop("last_values")
    data = {name: arrange(x) for name, x in data.items()}
    advantages, returns = gae_loop(gamma=0.9, lam=0.8, last_values=last, **data)
    expected = {1: (advantages, returns), 0: (advantages.T, returns.T)}
    before = {name: x.clone() for name, x in data.items()}
    last_column = torch.stack([last, -last], 1)[:, :1]
    for time_dim in (0, 1):
        flipped = {name: x if time_dim else x.t() for name, x in data.items()}
        for x in (flipped, {name: y.unsqueeze(2) for name, y in flipped.items()}):
            actual = gae(last_values=last_column, gamma=0.9, lam=0.8, time_dim=time_dim, backend=backend, **x)
            for a, e in zip(actual, expected[time_dim], strict=True):
                assert a.shape == x["rewards"].shape
                assert_close(a.reshape(e.shape), e)
    assert all(torch.equal(x, data[name]) for name, x in before.items())


# Nonzero; the wide integers have a low byte, half or word of zeros.
NONZERO = {
    torch.bool: [True],
    torch.uint8: [1, 2, 255, 128],
    torch.int8: [1, 2, -1, -128],
    torch.int16: [1, -1, 256, -32768],
    torch.int32: [1, -1, 256, 65536, -(2**31)],
    torch.int64: [1, -1, 2**32, 2**40, -(2**63)],
    torch.float16: [1, -1, 0.5, 2, 6e-8],
    torch.bfloat16: [1, -1, 0.5, 2, 1e-30],
    torch.float32: [1, -1, 0.5, 2, 1e-30, math.inf],
    torch.float64: [1, -1, 0.5, 2, 1e-300, math.inf],
}


@pytest.mark.parametrize("dtype", NONZERO, ids=str)
@pytest.mark.parametrize("columns", [False, True])
def test_any_flag_dtype(dtype, columns, backend):
    data = with_bootstrap(rollout(37, 21, ends=0.4), "final_values")
    expected = gae_loop(gamma=0.9, lam=0.8, **data)[0]
    choice = tensor(NONZERO[dtype], dtype=dtype)[torch.randint(len(NONZERO[dtype]), (37, 21))]
    zero = tensor(-0.0 if dtype.is_floating_point else 0, dtype=dtype)
    for name in ("dones", "truncated", "valid"):
        data[name] = torch.where(data[name], choice, zero)
        data[name] = data[name].t().contiguous().t() if columns else data[name]
    assert_close(gae(gamma=0.9, lam=0.8, backend=backend, **data)[0], expected)


FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("rewards", FLOATS, ids=str)
@pytest.mark.parametrize("values", FLOATS, ids=str)
@pytest.mark.parametrize("others", FLOATS, ids=str)
def test_any_float_dtype(rewards, values, others, backend):
    data = with_bootstrap(rollout(19, 18), "final_values")
    dtypes = {"rewards": rewards, "values": values, "last_values": others, "final_values": others}
    data |= {name: data[name].to(dtype) for name, dtype in dtypes.items()}
    wide = torch.float64 in dtypes.values()
    for x, y in zip(gae(backend=backend, **data), gae_loop(gamma=0.99, lam=0.95, **data), strict=True):
        assert x.dtype == (torch.float64 if wide else torch.float32)
        assert_close(x, y, 1e-13 if wide else 1e-6)  # computed in the wide dtype, from inputs of any precision


@pytest.mark.parametrize("time_dim", [0, 1])
@pytest.mark.parametrize("layout", ["dense", "gaps", "columns"])
def test_out(layout, time_dim, backend):
    data = with_bootstrap(rollout(70, 35), "stored_value")
    expected = gae_loop(gamma=0.99, lam=0.95, **data)
    flipped = {
        name: x if time_dim or name == "last_values" or isinstance(x, str) else x.t() for name, x in data.items()
    }
    memory = torch.full((4, 141, 71), math.nan)
    shape = (70, 35) if time_dim else (35, 70)
    if layout == "gaps":
        out = tuple(memory[i, : 2 * shape[0] : 2, 1 : shape[1] + 1] for i in (1, 3))
    elif layout == "columns":
        out = tuple(memory[i, : shape[1], : shape[0]].t() for i in (1, 3))
    else:
        out = tuple(torch.full(shape, math.nan) for _ in range(2))
    result = gae(out=out, time_dim=time_dim, backend=backend, **flipped)
    for given, got, y in zip(out, result, expected, strict=True):
        assert got is given
        assert_close(got, y if time_dim else y.T)
    written = 0 if layout == "dense" else 2 * 70 * 35
    assert memory.isfinite().sum() == written  # nothing else was written


# ---------------------------------------------------------------------------------------------- properties


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("bootstrap", BOOTSTRAPS)
@pytest.mark.parametrize("invalid", [[], [3, 69]], ids=["all valid", "some invalid"])
def test_nothing_leaks_over_an_end(bad, bootstrap, invalid, backend):
    shape, end = (70, 24), 15
    clean = with_bootstrap(rollout(*shape, ends=0), bootstrap)
    clean["valid"] = torch.ones(shape, dtype=torch.bool)
    clean["valid"][invalid] = False
    clean["dones"][:, end] = True
    if bootstrap != "none":
        clean["truncated"][:, end] = True
    expected = gae_loop(gamma=0.99, lam=0.95, **clean)[0][:, : end + 1]
    dirty = {name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in clean.items()}
    first_unread = end + 2 if bootstrap == "next_value" else end + 1
    dirty["rewards"][:, end + 1 :] = bad
    dirty["values"][:, first_unread:] = bad
    dirty["last_values"][:] = bad
    if bootstrap == "final_values":
        dirty["final_values"][:, :end] = bad
        dirty["final_values"][:, end + 1 :] = bad
    assert_close(gae(backend=backend, **dirty)[0][:, : end + 1], expected)
    # An environment with bad numbers affects no other.
    dirty = {name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in clean.items()}
    for name in ("rewards", "values", "last_values"):
        dirty[name][33] = bad
    actual = gae(backend=backend, **dirty)[0]
    kept = [n for n in range(70) if n != 33]
    assert torch.equal(actual[kept], gae(backend=backend, **clean)[0][kept])


def test_what_follows_an_end_never_changes_what_precedes(backend):
    data = with_bootstrap(rollout(70, 24, ends=0.1), "final_values")
    before, _ = gae(backend=backend, **data)
    end = 11
    data["dones"][:, end] = True
    before, _ = gae(backend=backend, **data)
    for name in ("rewards", "values", "final_values"):
        data[name][:, end + 1 :] = torch.randn(70, 12) * 1e6
    data["dones"][:, end + 1 :] = ~data["dones"][:, end + 1 :]
    after, _ = gae(backend=backend, **data | {"last_values": torch.randn(70) * 1e6})
    assert torch.equal(before[:, : end + 1], after[:, : end + 1])
    assert not torch.equal(before[:, end + 1 :], after[:, end + 1 :])


@pytest.mark.parametrize("bootstrap", BOOTSTRAPS)
def test_lambda_one_is_monte_carlo(bootstrap, backend):
    data = with_bootstrap(rollout(6, 13, ends=0.25), bootstrap)
    del data["valid"]
    gamma = 0.9
    r, v, last = (data[name].double() for name in ("rewards", "values", "last_values"))
    truncated = data.get("truncated", torch.zeros(6, 13))
    monte_carlo = torch.zeros(6, 13, dtype=torch.float64)
    for n in range(6):
        for t in range(13):
            total, k = 0.0, t
            while k < 12 and not data["dones"][n, k]:
                total, k = total + gamma ** (k - t) * r[n, k], k + 1
            after = last[n] if k == 12 else v[n, k + 1]
            ways = {"stored_value": v[n, k], "next_value": after, "final_values": data.get("final_values", v)[n, k]}
            value = ways[bootstrap] if truncated[n, k] else (0.0 if data["dones"][n, k] else after)
            monte_carlo[n, t] = total + gamma ** (k - t) * (r[n, k] + gamma * value)
    advantages, returns = gae(gamma=gamma, lam=1.0, backend=backend, **data)
    assert_close(returns, monte_carlo)
    assert_close(advantages, monte_carlo - v)


@pytest.mark.parametrize("cut", [1, 9, 16, 29])
def test_two_rollouts_join(cut, backend):
    gamma, lam = 0.97, 0.9
    data = with_bootstrap(rollout(70, 30), "final_values")
    last = data.pop("last_values")
    whole, _ = gae(last_values=last, gamma=gamma, lam=lam, backend=backend, **data)
    early, late = ({k: x[:, s] for k, x in data.items()} for s in (slice(None, cut), slice(cut, None)))
    tail, _ = gae(last_values=last, gamma=gamma, lam=lam, backend=backend, **late)
    # An invalid step carries nothing over: its lam * A is zero, and so is its trace.
    joint = late["values"][:, 0] + lam * tail[:, 0]
    head, _ = gae(last_values=joint, gamma=gamma, lam=lam, backend=backend, **early)
    assert_close(torch.cat([head, tail], 1), whole)


@pytest.mark.parametrize("which", TERMINAL)
@pytest.mark.parametrize(("num_envs", "stats"), [(5252, False), (5255, True)])
def test_outputs_that_bypass_the_cache(num_envs, which, stats, backend):
    """From 2 MiB on, the CPU kernel uses streaming stores: also for the tail of a row and for unaligned rows."""
    data = terminal(with_bootstrap(rollout(num_envs, 100), "final_values"), which)
    columns = {name: x if x.dim() == 1 else x.t().contiguous().t() for name, x in data.items()}
    out = tuple(torch.full((100, num_envs), math.nan).t() for _ in range(2))
    actual = gae(backend=backend, stats=stats, out=out, **columns)
    assert_same(actual, gae(backend="reference", stats=stats, **in_float64(data)))


@pytest.mark.parametrize("bootstrap", ["final_values", "stored_value", "next_value"])
@pytest.mark.parametrize("which", TERMINAL)
def test_rows_that_only_terminate(which, bootstrap, backend):
    data = terminal(with_bootstrap(rollout(70, 31), bootstrap), which)
    assert data["truncated"].any() == (which != "every row")
    expected = gae(backend="reference", stats=True, **in_float64(data))
    assert_same(gae(backend=backend, stats=True, **data), expected)


def test_bit_equal_from_run_to_run(backend):
    """Where pydrone computes the sums, for any number of threads too."""
    data = with_bootstrap(rollout(1000, 80), "final_values")
    data["stats"] = True
    first = gae(backend=backend, **data)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3) if backend == "cpu" else (threads,) * 3:
            torch.set_num_threads(count)
            again = gae(backend=backend, **data)
            assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    finally:
        torch.set_num_threads(threads)
