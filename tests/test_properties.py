"""Properties of GAE, the ring and the minibatches that hold for every backend. Hypothesis draws sizes, strides,
layouts, dtypes, gamma, lambda, ends, truncations, autoreset modes, heads and capacities.

The bound
---------
Results are equal up to rounding; the tolerance is derived, not chosen. Let u = 2^-24 (float32; float64: 2^-53) be the
unit roundoff, g = gamma and d = gamma * lambda, each rounded once. With the names of docs/conventions.md, a kernel
computes

    delta_t = ((r_t + g * next_t) - V_t)        A_t = delta_t + d * A_{t+1}

Each operation, and the rounding of g and of d, contributes one factor 1 + e with |e| <= u. A number that enters at step
s (r_s, g * next_s or V_s) collects at most c = 5 such factors on its way into A_s (the rounding of g, the product,
three sums), and 3 more for each step on its way to A_t, t < s (the rounding of d, the product, the sum). A product of k
such factors differs from 1 by at most k u / (1 - k u) (Higham, Accuracy and Stability of Numerical Algorithms, 2nd
edition, lemma 3.1). So, with m_s = |r_s| + gamma |next_s| + |V_s| and the sum over s from t to the step that cuts the
trace,

    |error of A_t|  <=  1.01 u * sum_s (c + 3 (s - t)) d^(s - t) m_s        and u |A_t + V_t| more for the return.

If no input exceeds S in magnitude, that is at most 3.1 u S (c T + 3 T (T - 1) / 2), or 3.1 u S (c / (1 - d) +
3 d / (1 - d)^2) for any T. The bound is per element: magnitudes before t or beyond a cut do not enter it. A tree scan
(Triton, CUDA) needs no more products, but each level adds a sum: at most 4 within a thread, 5 across a warp, and 3 to
join the runs; so c = 20 covers every backend's order of operations. Underflow to zero adds an absolute error: (c + 3 T)
times the smallest normal number, times the largest m.
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rollout_model import array, gae_loop
from test_gae import LAYOUTS, NONZERO
from test_minibatches import position_and_neighbour
from torch import Tensor

from pydrone import RolloutBuffer, gae
from pydrone.ops.dispatch import select
from pydrone.ops.schema import BOOTSTRAP, workspace_size

SEQUENTIAL, TREE = 5, 20  # the constant c of the bound
ROUNDOFF = {torch.float32: 2.0**-24, torch.float64: 2.0**-53}


def most_samples(backend: str) -> int:
    """The most samples a rollout may have: without a GPU the Triton kernels are interpreted."""
    return 300 if backend == "triton" and not torch.cuda.is_available() else 3000


# ---------------------------------------------------------------------------------------------- what is drawn

UNIT = st.one_of(
    st.sampled_from([0.0, 1.0, 0.5, 0.95, 0.99, 0.999, 1e-3, 1e-6]), st.floats(0, 1, allow_subnormal=False)
)
# Sizes near the widths of vectors, blocks and tiles, and any others.
ENVS = st.one_of(st.sampled_from([1, 2, 7, 8, 15, 16, 17, 63, 64, 65, 128, 129]), st.integers(1, 300))
STEPS = st.one_of(st.sampled_from([1, 2, 3, 15, 16, 17, 31, 32, 33, 127, 128, 129]), st.integers(1, 140))
FLOAT32 = st.just(torch.float32)
FLOATS = st.sampled_from([*[torch.float32] * 4, torch.float16, torch.bfloat16, torch.float64])
MODES = ("running", "terminated", "final_values", "stored_value", "next_value", "next_step")


class Case(NamedTuple):
    """Arguments of gae, [N, T] and dense, with discounts; ``codes`` as the buffer stores them."""

    data: dict
    codes: np.ndarray
    gamma: float
    lam: float

    def expected(self) -> tuple[np.ndarray, np.ndarray]:
        return gae_loop(gamma=self.gamma, lam=self.lam, **self.data)


def flags_of(codes: np.ndarray, data: dict) -> dict:
    """``data`` with the flags that ``codes`` encode."""
    data["dones"] = torch.as_tensor((codes == 1) | (codes == 2))
    if (codes == 2).any() or "final_values" in data or "timeout_bootstrap" in data:
        data["truncated"] = torch.as_tensor(codes == 2)
    if (codes == 3).any():
        data["valid"] = torch.as_tensor(codes != 3)
    return data


@st.composite
def rollouts(draw, backend: str, floats=FLOAT32, modes=MODES, whole: bool = False) -> Case:
    """``whole``: small multiples of 1/8, so that sums of a few of them are exact in float32."""
    num_steps = draw(STEPS, label="T")
    num_envs = min(draw(ENVS, label="N"), max(1, most_samples(backend) // num_steps))
    shape = (num_envs, num_steps)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1), label="seed"))
    mode = draw(st.sampled_from(modes), label="mode")

    def numbers(size, name: str) -> Tensor:
        dtype = draw(floats, label=f"dtype of {name}")
        if whole:
            return torch.as_tensor(rng.integers(-512, 513, size) / 8).to(dtype)
        x = rng.standard_normal(size) * 10.0 ** draw(st.integers(-3, 4), label=f"magnitude of {name}")
        if len(size) == 2:  # magnitudes that fall or rise along the rollout
            x *= 10.0 ** np.linspace(draw(st.sampled_from([0, 0, 6, -6])), 0, size[1])
        return torch.as_tensor(np.clip(x, -6e4, 6e4) if dtype == torch.float16 else x).to(dtype)

    data = {"rewards": numbers(shape, "rewards"), "values": numbers(shape, "values")}
    data["last_values"] = numbers((num_envs,), "last_values")
    share = draw(st.sampled_from([0.0, 0.03, 0.2, 0.7, 1.0]), label="ends")
    codes = np.zeros(shape, dtype=np.int64)
    if mode != "running":
        codes = np.where(rng.random(shape) < share, 1, 0)
    if mode not in ("running", "terminated"):
        codes = np.where((codes == 1) & (rng.random(shape) < 0.5), 2, codes)
        if mode == "final_values":
            data["final_values"] = numbers(shape, "final_values")
        else:
            data["timeout_bootstrap"] = "next_value" if mode == "next_step" else mode
    if draw(st.booleans(), label="end at the last step") and mode != "running":
        codes[:, -1] = np.where(rng.random(num_envs) < 0.5, 1, codes[:, -1])
    if mode == "next_step":  # the step after an end resets
        for t in range(1, num_steps):
            codes[:, t] = np.where(np.isin(codes[:, t - 1], (1, 2)), 3, codes[:, t])
    elif draw(st.booleans(), label="invalid steps"):
        codes = np.where(rng.random(shape) < 0.1, 3, codes)
    return Case(flags_of(codes, data), codes, draw(UNIT, label="gamma"), draw(UNIT, label="lambda"))


def error_bound(case: Case, dtype: torch.dtype = torch.float32, c: int = TREE) -> np.ndarray:
    """[N, T], for the advantages: the module docstring's bound, plus the same bound on the float64 loop's own error."""
    r, v, last = (np.abs(array(case.data[name])) for name in ("rewards", "values", "last_values"))
    final = np.abs(array(case.data.get("final_values", case.data["values"])))
    decay = case.gamma * case.lam
    total, spread, most = np.zeros_like(last), np.zeros_like(last), 0.0
    result = np.zeros_like(r)
    for t in reversed(range(r.shape[1])):
        code, after = case.codes[:, t], last if t == r.shape[1] - 1 else v[:, t + 1]
        ways = {"stored_value": v[:, t], "next_value": after, None: final[:, t]}
        following = np.where(code == 1, 0, np.where(code == 2, ways[case.data.get("timeout_bootstrap")], after))
        m = np.where(code == 3, 0, r[:, t] + case.gamma * following + v[:, t])
        kept = np.where(code == 0, decay, 0)
        # sum of (c + 3 (s - t)) d^(s - t) m_s, and sum of d^(s - t) m_s
        total, spread = c * m + kept * (total + 3 * spread), m + kept * spread
        result[:, t], most = total, max(most, m.max())
    tiny = (c + 3 * r.shape[1]) * torch.finfo(dtype).tiny * (1 + most)
    return 1.01 * (ROUNDOFF[dtype] + ROUNDOFF[torch.float64]) * result + tiny


def within(actual: Tensor, expected: np.ndarray, bound: np.ndarray) -> None:
    off = np.abs(array(actual) - expected)
    assert (off <= bound).all(), f"off by {off.max()}, {(off / np.maximum(bound, 1e-300)).max()} times the bound"


def run(backend: str, case: Case, **options) -> tuple[Tensor, ...]:
    return gae(gamma=case.gamma, lam=case.lam, backend=backend, **case.data, **options)


def order_of(backend: str) -> int:
    return SEQUENTIAL if backend in ("reference", "cpu") else TREE


# ---------------------------------------------------------------------------------------------- GAE


@given(draw=st.data())
def test_equals_the_float64_loop_within_the_bound(backend, draw):
    case = draw.draw(rollouts(backend, FLOATS))
    planes = {}
    for name, x in case.data.items():
        if isinstance(x, Tensor) and x.dim() == 2:
            if not x.is_floating_point():
                dtype = draw.draw(st.sampled_from(list(NONZERO)), label=f"dtype of {name}")
                some = torch.tensor(NONZERO[dtype], dtype=dtype)
                x = torch.where(
                    x, some[torch.arange(x.numel()).reshape(x.shape) % len(some)], torch.zeros_like(some[0])
                )
            x = LAYOUTS[draw.draw(st.sampled_from(["rows", "columns", *LAYOUTS]), label=f"layout of {name}")](x)
        planes[name] = x
    # An expanded layout changes the numbers: the expected values are of the result.
    codes = np.where(array(planes["dones"]) != 0, 1, 0)
    codes = np.where(array(planes["truncated"]) != 0, 2, codes) if "truncated" in planes else codes
    codes = np.where(array(planes["valid"]) != 0, codes, 3) if "valid" in planes else codes
    case = Case(planes, codes, case.gamma, case.lam)
    wide = any(isinstance(x, Tensor) and x.dtype == torch.float64 and n in REALS for n, x in planes.items())
    dtype = torch.float64 if wide else torch.float32
    time_dim = draw.draw(st.sampled_from([0, 1]), label="time_dim")
    given_ = {n: x.t() if not time_dim and isinstance(x, Tensor) and x.dim() == 2 else x for n, x in planes.items()}
    advantages, returns = gae(gamma=case.gamma, lam=case.lam, time_dim=time_dim, backend=backend, **given_)
    assert advantages.dtype == returns.dtype == dtype
    if not time_dim:
        advantages, returns = advantages.t(), returns.t()
    (expected, totals), bound = case.expected(), error_bound(case, dtype, order_of(backend))
    within(advantages, expected, bound)
    within(returns, totals, bound + 1.01 * ROUNDOFF[dtype] * (np.abs(totals) + bound) + ROUNDOFF[torch.float64])


REALS = ("rewards", "values", "last_values", "final_values")


@given(draw=st.data())
def test_lambda_one_is_monte_carlo(backend, draw):
    """Without a recurrence: each return is a dot product of discounts and rewards up to the cut, plus the bootstrap."""
    case = draw.draw(rollouts(backend))._replace(lam=1.0)
    r, v, last = (array(case.data[name]) for name in ("rewards", "values", "last_values"))
    (num_envs, num_steps), codes = r.shape, case.codes
    after = np.concatenate([v[:, 1:], last[:, None]], 1)
    ways = {"stored_value": v, "next_value": after, None: array(case.data.get("final_values", case.data["values"]))}
    bootstrap = np.where(codes == 1, 0, np.where(codes == 2, ways[case.data.get("timeout_bootstrap")], after))
    # A trace ends at an end, at the rollout's last step, and before an invalid step.
    cut = codes != 0
    cut[:, :-1] |= codes[:, 1:] == 3
    cut[:, -1] = True
    discounts = case.gamma ** np.arange(num_steps + 1)
    expected = np.zeros_like(r)
    for n in range(num_envs):
        ends = np.flatnonzero(cut[n])
        for t in range(num_steps):
            if codes[n, t] != 3:
                end = ends[np.searchsorted(ends, t)]
                steps = end + 1 - t
                expected[n, t] = r[n, t : end + 1] @ discounts[:steps] + discounts[steps] * bootstrap[n, end] - v[n, t]
    within(run(backend, case)[0], expected, error_bound(case, c=order_of(backend)))


POISON = st.sampled_from([math.nan, math.inf, -math.inf, 3e38])


@given(draw=st.data())
def test_nothing_leaks_over_an_end(backend, draw):
    """Each environment ends at its own step; everything after it, and everything not read, is poisoned."""
    case = draw.draw(rollouts(backend, modes=("terminated", "final_values", "stored_value", "next_value")))
    poison = draw.draw(POISON, label="poison")
    rng = np.random.default_rng(draw.draw(st.integers(0, 99), label="ends"))
    (num_envs, num_steps), codes = case.codes.shape, case.codes.copy()
    how = case.data.get("timeout_bootstrap")
    kinds = (1, 3) if how is None and "final_values" not in case.data else (1, 2, 3)
    envs, end = np.arange(num_envs), rng.integers(0, num_steps, num_envs)
    codes[envs, end] = rng.choice(kinds, num_envs)
    late = torch.as_tensor(np.arange(num_steps) > end[:, None])
    # The value after a time-out is read if it is the bootstrap; V of an invalid step is read by the step before it.
    reads_next = (codes[envs, end] == 2) & (how == "next_value")
    late_values = torch.as_tensor(np.arange(num_steps) > (end + reads_next)[:, None])
    none = torch.as_tensor(codes == 3)
    clean = case._replace(data=flags_of(codes, dict(case.data)), codes=codes)
    data = dict(clean.data)
    data["rewards"] = data["rewards"].masked_fill(late | none, poison)
    data["values"] = data["values"].masked_fill(late_values, poison)
    data["last_values"] = data["last_values"].masked_fill(torch.as_tensor((end < num_steps - 1) | ~reads_next), poison)
    if "final_values" in data:
        data["final_values"] = data["final_values"].masked_fill(late | torch.as_tensor(codes != 2), poison)
    for x, y in zip(run(backend, clean), run(backend, clean._replace(data=data)), strict=True):
        assert x[~late].isfinite().all()
        assert torch.equal(x[~late], y[~late])


COEFFICIENTS = st.sampled_from([-4.0, -2.0, -1.0, -0.5, 0.5, 1.0, 2.0, 3.0])


@given(draw=st.data())
def test_linear_in_rewards_values_last_and_final_values(backend, draw):
    x = draw.draw(rollouts(backend, whole=True))
    g = torch.Generator().manual_seed(draw.draw(st.integers(0, 99), label="the other"))
    reals = [name for name in REALS if name in x.data]
    other = {name: (torch.randint(-512, 513, x.data[name].shape, generator=g) / 8).to(x.data[name]) for name in reals}
    a, b = draw.draw(COEFFICIENTS, label="a"), draw.draw(COEFFICIENTS, label="b")
    y = x._replace(data=x.data | other)
    both = x._replace(data=x.data | {name: a * x.data[name] + b * y.data[name] for name in reals})
    parts = [array(run(backend, case)[0]) for case in (x, y)]
    bounds = [error_bound(case, c=order_of(backend)) for case in (x, y, both)]
    within(run(backend, both)[0], a * parts[0] + b * parts[1], abs(a) * bounds[0] + abs(b) * bounds[1] + bounds[2])


@given(draw=st.data())
def test_environments_in_another_order_give_the_same_in_that_order(backend, draw):
    case = draw.draw(rollouts(backend))
    g = torch.Generator().manual_seed(draw.draw(st.integers(0, 99), label="order"))
    order = torch.randperm(len(case.codes), generator=g)
    data = {name: x[order] if isinstance(x, Tensor) else x for name, x in case.data.items()}
    straight, turned = run(backend, case, stats=True), run(backend, case._replace(data=data), stats=True)
    bound = 2 * error_bound(case, c=order_of(backend))[order.cpu().numpy()]
    within(turned[0], array(straight[0][order]), bound)
    assert turned[2][0] == straight[2][0]


@given(draw=st.data())
def test_rollouts_that_are_joined_equal_the_whole(backend, draw):
    """Each joint adds 8 to the bound's constant: lambda's product, V's sum, and a rounding of each, on both sides."""
    case = draw.draw(rollouts(backend))
    num_steps = case.codes.shape[1]
    cuts = sorted(draw.draw(st.sets(st.integers(0, num_steps), max_size=2), label="cuts"))
    bounds, last, parts = [0, *cuts, num_steps], case.data["last_values"], []
    for first, end in reversed(list(itertools.pairwise(bounds))):
        if first == end:
            continue
        data = {k: x[:, first:end] if isinstance(x, Tensor) and x.dim() == 2 else x for k, x in case.data.items()}
        advantages, _ = run(backend, case._replace(data=data | {"last_values": last}))
        last = data["values"][:, 0] + case.lam * advantages[:, 0]
        if case.data.get("timeout_bootstrap") == "next_value" and first:
            # A truncation there bootstraps with V alone, as its trace is cut.
            last = torch.where(case.data["truncated"][:, first - 1], data["values"][:, 0], last)
        parts.insert(0, advantages)
    whole, joined = run(backend, case)[0], torch.cat(parts, 1)
    c = order_of(backend)
    within(joined, array(whole), error_bound(case, c=c) + error_bound(case, c=c + 8 * len(cuts)))


@given(draw=st.data())
def test_a_large_prefix_does_not_drown_a_small_suffix(backend, draw):
    """The error stays within the suffix's own bound, which excludes the prefix; and vice versa, beyond an end."""
    case = draw.draw(rollouts(backend, whole=True))
    num_steps = case.codes.shape[1]
    cut = draw.draw(st.integers(0, num_steps - 1), label="cut")
    factor = draw.draw(st.sampled_from([1e6, 1e20, 1e30]), label="factor")
    scale = torch.where(torch.arange(num_steps) < cut, factor, 1.0)

    def scaled(by: Tensor) -> Case:
        planes = {name: case.data[name] * by for name in ("rewards", "values", "final_values") if name in case.data}
        return case._replace(data=case.data | planes)

    drowned, alone = scaled(scale), scaled(torch.ones(num_steps))
    bound = error_bound(alone, c=order_of(backend))[:, cut:]
    within(run(backend, drowned)[0][:, cut:], alone.expected()[0][:, cut:], bound)
    codes = case.codes.copy()
    codes[:, cut] = 1
    ended = alone._replace(codes=codes, data=flags_of(codes, dict(alone.data)))
    loud = scaled(factor / scale)._replace(codes=codes)
    loud.data.update({name: ended.data[name] for name in ("dones", "truncated", "valid") if name in ended.data})
    for name in ("rewards", "values", "final_values"):  # step ``cut`` is the last of the prefix
        if name in loud.data:
            loud.data[name][:, cut] = ended.data[name][:, cut]
    quiet = slice(None, cut + 1)
    bound = error_bound(ended, c=order_of(backend))[:, quiet]
    within(run(backend, loud)[0][:, quiet], ended.expected()[0][:, quiet], bound)


# ---------------------------------------------------------------------------------------------- statistics

# Rows of at most 1024 samples are summed in 16 float32 lanes, so a number is rounded at most 64 + 4 times; the sum of
# squares about a pivot is used if it is at most 4 times M2: 2 * 4 * 68 roundings in all. A Triton program sums 128
# samples by a tree. All merging is in float64, at most once per sample. Triton's programs merge plain sums of squares,
# which cost float32 advantages nothing and float64 ones the digits of the mean.
STATISTICS_ROUNDINGS = 600


def close_statistics(backend: str, stats: Tensor, advantages: Tensor, counts: np.ndarray) -> None:
    """(count, mean, M2) against two passes in float64."""
    count, mean, m2 = stats.tolist()
    sample = array(advantages)[counts]
    assert count == sample.size
    exact = sample.mean() if sample.size else 0.0
    squares = ((sample - exact) ** 2).sum()
    largest = np.abs(sample).max(initial=0)
    slack = STATISTICS_ROUNDINGS * ROUNDOFF[advantages.dtype]
    merged = 3 * count * ROUNDOFF[torch.float64] * largest
    assert abs(mean - exact) <= slack * largest + merged
    # If each deviation moves by at most x, the sum of squares S changes by at most 2 x sqrt(count S) + count x^2.
    moved = 2 * merged * math.sqrt(count * squares) + count * merged**2
    if order_of(backend) == TREE:
        moved += 2 * merged * largest
    assert m2 >= 0 and abs(m2 - squares) <= slack * squares + moved + 1e-300


@given(draw=st.data())
def test_statistics_equal_two_passes_in_float64(backend, draw):
    case = draw.draw(rollouts(backend, st.sampled_from([torch.float32, torch.float64])))
    far = draw.draw(st.sampled_from([0.0, 1e3, -1e5]), label="mean")
    data = dict(case.data)
    none = torch.as_tensor(case.codes == 3)
    data["rewards"] = (data["rewards"] + far).masked_fill(none, math.nan)  # invalid samples may hold anything
    columns = draw.draw(st.booleans(), label="columns")
    if columns:
        data = {k: x.t().contiguous().t() if isinstance(x, Tensor) and x.dim() == 2 else x for k, x in data.items()}
    advantages, _, stats = run(backend, case._replace(data=data), stats=True)
    close_statistics(backend, stats, advantages, case.codes != 3)


# ---------------------------------------------------------------------------------------------- the ring


@given(draw=st.data())
def test_a_ring_at_any_head_equals_the_rollout_by_itself(backend, draw):
    """[N, C] planes; the rollout begins at ``start`` and wraps; the other slots hold NaN and invalid codes."""
    case = draw.draw(rollouts(backend))
    num_envs, num_steps = case.codes.shape
    capacity = num_steps + draw.draw(st.integers(0, num_steps + 3), label="room")
    start = draw.draw(st.integers(0, capacity - 1), label="start")
    slots = (torch.arange(num_steps) + start) % capacity
    columns = draw.draw(st.booleans(), label="columns")

    def ring(x: Tensor, fill: float) -> Tensor:
        made = torch.full((capacity, num_envs), fill, dtype=x.dtype).t()
        made = made if columns else made.contiguous()
        made[:, slots] = x
        return made

    planes = {name: ring(case.data[name], math.nan) for name in ("rewards", "values")}
    codes = ring(torch.as_tensor(case.codes).to(planes["values"].device, torch.uint8), 3)
    final = case.data.get("final_values")
    how = case.data.get("timeout_bootstrap") or (None if final is None else "final_values")
    pooled = final is not None and draw.draw(st.booleans(), label="pooled")
    rows = None
    if pooled:  # only the values of truncated steps, in another order; elsewhere the index is invalid
        truncated = torch.as_tensor(case.codes == 2)
        place = torch.full((num_envs, num_steps), -1, dtype=torch.int32)
        place[truncated] = torch.arange(int(truncated.sum()) - 1, -1, -1).int()
        rows, final = ring(place, capacity), final[truncated].flip(0)
    elif final is not None:
        final = ring(final, math.nan)
    advantages, returns = (torch.full((num_envs, num_steps), math.nan) for _ in range(2))
    stats, workspace = (torch.zeros(size, dtype=torch.float64) for size in (3, workspace_size(num_envs)))
    select(advantages.device, backend).gae(
        *(planes["rewards"], planes["values"], codes, None, None, case.data["last_values"], final, rows),
        *(case.gamma, case.lam, start, True, BOOTSTRAP[how], None, advantages, returns, stats, workspace),
    )
    within(advantages, case.expected()[0], error_bound(case, c=order_of(backend)))
    assert torch.equal(returns, advantages + case.data["values"])
    close_statistics(backend, stats, advantages, case.codes != 3)


@given(draw=st.data())
def test_a_buffer_of_any_capacity(backend, draw):
    """Rows, advantages and minibatches of successive rollouts; the next one begins before the oldest is consumed."""
    small = backend == "triton"
    num_envs = draw.draw(st.integers(1, 5 if small else 40), label="N")
    num_steps = draw.draw(st.integers(1, 3 if small else 9), label="T")
    capacity = num_steps + draw.draw(st.integers(0, num_steps + 2), label="room")
    width = draw.draw(st.integers(1, 40), label="width")
    next_step = draw.draw(st.booleans(), label="autoreset next_step")
    gamma, lam = draw.draw(UNIT, label="gamma"), draw.draw(UNIT, label="lambda")
    g = torch.Generator().manual_seed(draw.draw(st.integers(0, 999), label="seed"))
    buf = RolloutBuffer(num_envs, num_steps, obs=width, actions=1, capacity=capacity, backend=backend, seed=7)
    rounds, ahead = 2 if small else 4, draw.draw(st.integers(0, capacity - num_steps), label="ahead")
    steps: list[dict] = []
    reset = torch.zeros(num_envs, dtype=torch.bool)

    def step() -> None:
        nonlocal reset
        made = {"obs": torch.randn(num_envs, width, generator=g), "actions": torch.randn(num_envs, 1, generator=g)}
        made |= {name: torch.randn(num_envs, generator=g) for name in ("rewards", "values", "log_probs")}
        made["dones"] = (torch.rand(num_envs, generator=g) < 0.3) & ~reset
        made["truncated"] = made["dones"] & (torch.rand(num_envs, generator=g) < 0.5)
        if next_step:
            made["valid"] = ~reset
            reset = made["dones"]
        buf.append(**made)
        steps.append(made)

    for _ in range(rounds):
        while len(steps) < num_steps + ahead:
            step()
        data = {
            name: torch.stack([x[name] for x in steps[:num_steps]], 1)
            for name in ("rewards", "values", "dones", "truncated", *(["valid"] if next_step else []))
        }
        data |= {"last_values": torch.randn(num_envs, generator=g)}
        data["timeout_bootstrap"] = how = "next_value" if next_step else "stored_value"
        codes = np.where(data["truncated"].cpu(), 2, np.where(data["dones"].cpu(), 1, 0))
        codes = np.where(data["valid"].cpu(), codes, 3) if next_step else codes
        case = Case(data, codes, gamma, lam)
        buf.compute_gae(data["last_values"], gamma, lam, timeout_bootstrap=how)
        within(buf.advantages, case.expected()[0], error_bound(case, c=order_of(backend)))
        close_statistics(backend, buf.statistics, buf.advantages, codes != 3)
        check_minibatches(buf, torch.stack([x["obs"] for x in steps[:num_steps]], 1), codes != 3, draw)
        buf.clear()
        del steps[:num_steps]


def check_minibatches(buf: RolloutBuffer, obs: Tensor, counts: np.ndarray, draw) -> None:
    """Every valid sample appears once per epoch, with its own row, return and normalised advantage."""
    samples = int(counts.sum())
    if samples == 0:
        return
    parts = draw.draw(st.integers(1, min(samples, 5)), label="num_minibatches")
    count, mean, m2 = buf.statistics.tolist()
    std = math.sqrt(m2 / (count - 1)) if count > 1 else 0.0
    exact = (array(buf.advantages) - mean) / (std + 1e-8)
    # A - mean: one rounding of the mean, one of the difference; times the rounded 1 / std: three more, of the result.
    u = 1.01 * ROUNDOFF[torch.float32]
    bound = u * (abs(mean) + np.abs(array(buf.advantages))) / (std + 1e-8) + 4 * u * np.abs(exact)
    orders = []
    for epoch in range(2):
        seen = []
        for mb in buf.minibatches(parts):
            env, t = (mb.indices // buf.num_steps).cpu().numpy(), (mb.indices % buf.num_steps).cpu().numpy()
            seen.append(mb.indices)
            assert torch.equal(mb.obs, obs[env, t]) and torch.equal(mb.returns, buf.returns[env, t])
            within(mb.advantages, exact[env, t], bound[env, t])
        orders.append(torch.cat(seen).tolist())
        assert sorted(orders[epoch]) == np.flatnonzero(counts).tolist()
        assert max(map(len, seen)) - min(map(len, seen)) <= 1
    assert samples < 13 or orders[0] != orders[1]  # 1 in 13! = 6e9 by chance


# ---------------------------------------------------------------------------------------------- permutations


def permutation(backend: str, num_envs: int, num_steps: int, key: int, rollout: int, epoch: int, first=0, size=None):
    """int64 [size]: the permutation of N * T samples from position ``first`` on, straight from the operation."""
    samples = num_envs * num_steps
    out = torch.empty(samples if size is None else size, dtype=torch.int64)
    rows = torch.empty(num_steps, num_envs, 0, dtype=torch.uint8)
    select(out.device, backend).gather(
        *(rows, [], [], [], 0, None, None, None, None, num_steps, 0, samples, key, rollout, epoch, True, first, None),
        *(None, None, out),
    )
    return out


KEYS, ROLLOUTS, EPOCHS = st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**40), st.integers(0, 2**31)


@given(draw=st.data())
def test_every_permutation_is_a_bijection_of_its_own(backend, draw):
    num_steps = draw.draw(st.one_of(st.sampled_from([1, 2]), STEPS), label="T")
    num_envs = min(draw.draw(st.one_of(st.just(1), ENVS), label="N"), max(1, most_samples(backend) // num_steps))
    samples = num_envs * num_steps
    key, rollout, epoch = (draw.draw(x, label=n) for x, n in ((KEYS, "key"), (ROLLOUTS, "rollout"), (EPOCHS, "epoch")))
    made = permutation(backend, num_envs, num_steps, key, rollout, epoch)
    assert torch.equal(made.sort().values, torch.arange(samples))
    assert torch.equal(made, permutation("reference", num_envs, num_steps, key, rollout, epoch))
    first = draw.draw(st.integers(0, samples - 1), label="first")
    size = draw.draw(st.integers(1, samples - first), label="size")
    part = permutation(backend, num_envs, num_steps, key, rollout, epoch, first, size)
    assert torch.equal(part, made[first : first + size])
    if samples >= 13:
        bit = 1 << draw.draw(st.integers(0, 62), label="bit")
        others = [(key ^ bit, rollout, epoch), (key, rollout ^ bit, epoch), (key, rollout, epoch + 1)]
        others += [(key, rollout + 1, epoch)]
        for other in others:
            assert not torch.equal(made, permutation(backend, num_envs, num_steps, *other))


@given(draw=st.data())
def test_permutations_are_uniform_in_position_and_neighbours(backend, draw):
    """Chi-square of a few hundred draws that differ only in epoch, rollout or key; also with one step or one
    environment. Chance exceeds the limit of 6 standard deviations once in 1e9."""
    samples = draw.draw(st.integers(2, 17), label="N * T")
    num_steps = draw.draw(st.sampled_from([x for x in range(1, samples + 1) if samples % x == 0]), label="T")
    key, rollout, epoch = (draw.draw(st.integers(0, 2**31 - 10**4), label=name) for name in ("key", "rollout", "epoch"))
    counted = draw.draw(st.integers(0, 2), label="what counts up")
    numbers = [[key, rollout, epoch] for _ in range(600 if backend == "cpu" else 60)]
    for i, x in enumerate(numbers):
        x[counted] += i
    draws = torch.stack([permutation(backend, samples // num_steps, num_steps, *x) for x in numbers])
    position, neighbour = position_and_neighbour(draws)
    assert position < 6 and neighbour < 6


@pytest.mark.parametrize("rotated", [True, False])
def test_the_limit_finds_a_bad_permutation(rotated):
    i = torch.arange(600).unsqueeze(1)
    draws = (torch.arange(11) + i * rotated) % 11
    assert max(position_and_neighbour(draws)) > 6
