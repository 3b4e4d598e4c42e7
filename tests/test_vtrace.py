"""pydrone.vtrace and pydrone.retrace against tables derived by hand, their definition as sums in float64, and GAE."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rollout_model import TERMINAL, array, assert_close, in_float64, rollout, terminal
from test_gae import BOOTSTRAPS, FLOATS, LAYOUTS, SHAPES, assert_same, with_bootstrap
from torch import Tensor, tensor

from pydrone import gae, retrace, vtrace
from pydrone.ops.dispatch import select

INF, NAN = math.inf, math.nan
FINAL, STORED, NEXT = {"final": 20.0}, {"timeout_bootstrap": "stored_value"}, {"timeout_bootstrap": "next_value"}


def row(*numbers: float) -> Tensor:
    return tensor([[float(x) for x in numbers]])


# gamma = lam = 1/2, rho_clip 4, c_clip 2; every number below is exact in float32.
# Ratios infinite, 1, 1: rho = 4, 1, 1; c = 1, 1/2, 1/2; so links gamma c = 1/2, 1/4, 1/4.
# Rewards 1 2 3, values 2 4 6, last value 10, value of the true final observation 20: TD errors 1, 1, 2 as in test_gae.
# x2 = 2;  x1 = 1 + 2/4 = 3/2;  x0 = 4 + x1/2 = 19/4.  Advantages: 2;  1 + 2/2 = 2;  4 (1 + x1/2) = 7.
# Ended at 1: terminated d1 = -2, final value 8, stored value 0, next value 1; x1 = advantage 1 = d1.
# Terminated at 2: x2 = d2 = -3.  Ratio 0 at 1: x1 = 0.  Infinite at 1: x1 = 4 + 2/2 = 5, advantage 1 = 4 (1 + 2/2) = 8.
RATIOS = (INF, 0, 0)
VTRACE = {
    "running": (RATIOS, [0, 0, 0], None, {}, [19 / 4, 3 / 2, 2], [7, 2, 2]),
    "terminated": (RATIOS, [0, 1, 0], None, {}, [3, -2, 2], [0, -2, 2]),
    "truncated, final value": (RATIOS, [0, 1, 0], [0, 1, 0], FINAL, [8, 8, 2], [20, 8, 2]),
    "truncated, stored value": (RATIOS, [0, 1, 0], [0, 1, 0], STORED, [4, 0, 2], [4, 0, 2]),
    "truncated, next value": (RATIOS, [0, 1, 0], [0, 1, 0], NEXT, [9 / 2, 1, 2], [6, 1, 2]),
    "terminated at the last step": (RATIOS, [0, 0, 1], None, {}, [33 / 8, 1 / 4, -3], [9 / 2, -1 / 2, -3]),
    "never taken at 1": ((INF, -INF, 0), [0, 0, 0], None, {}, [4, 0, 2], [4, 0, 2]),
    "clipped at 1": ((INF, INF, 0), [0, 0, 0], None, {}, [13 / 2, 5, 2], [14, 8, 2]),
}


@pytest.mark.parametrize("case", VTRACE)
def test_table(case, backend):
    log_rhos, dones, truncated, how, errors, expected = VTRACE[case]
    how = {"final_values" if x == "final" else x: torch.full((1, 3), y) if x == "final" else y for x, y in how.items()}
    values = row(2, 4, 6)
    vs, advantages = vtrace(
        *(row(1, 2, 3), values, tensor([dones]), tensor([10.0]), row(*log_rhos), 0.5, 0.5, 4.0, 2.0),
        truncated=None if truncated is None else tensor([truncated]),
        backend=backend,
        **how,
    )
    assert (vs - values).tolist() == [errors]
    assert advantages.tolist() == [expected]
    assert vs.dtype == advantages.dtype == torch.float32


@pytest.mark.parametrize("bad", [0.0, NAN, INF])
def test_invalid_step_counts_for_nothing(bad, backend):
    # NEXT_STEP: step 1 is truncated, step 2 is not a transition. d3 = 5 + 10/2 - 8 = 2, d1 = 2 + 6/2 - 4 = 1, trace
    # cut;  x0 = 4 + 1/2, advantage 0 = 4 (1 + 1/2).
    steps = row(1, 2, NAN, 5), row(2, 4, 6, 8), row(0, 1, 0, 0), tensor([10.0]), row(INF, 0, bad, 0)
    valid = {"truncated": row(0, 1, 0, 0), "timeout_bootstrap": "next_value", "valid": row(1, 1, 0, 1)}
    vs, advantages, stats = vtrace(*steps, 0.5, 0.5, 4.0, 2.0, **valid, stats=True, backend=backend)
    assert vs.tolist() == [[13 / 2, 5, 6, 10]] and advantages.tolist() == [[6, 1, 0, 2]]
    assert stats.tolist() == pytest.approx([3, 3, 14])
    # Without the flags at step 1, which then runs into the invalid step: d1 = 2 + 6/2 - 4, and nothing more.
    vs, _ = vtrace(*steps[:2], torch.zeros(1, 4), *steps[3:], 0.5, 0.5, 4.0, 2.0, valid=valid["valid"], backend=backend)
    assert vs.tolist() == [[13 / 2, 5, 6, 10]]


# Q(s, a) 2 4 6 and expected values 100 8 12, last 10: d0 = 1 + 8/2 - 2 = 3, d1 = 2 + 12/2 - 4 = 4, d2 = 3 + 5 - 6 = 2.
# Ratios: none needed at 0, infinite at 1 (c = 1, link 1/2), 1 at 2 (c = 1/2, link 1/4).
# x2 = 2;  x1 = 4 + 2/4 = 9/2;  x0 = 3 + x1/2 = 21/4.
# Ended at 1: terminated d1 = -2; final value 2 + 20/2 - 4 = 8; stored value 2 + 8/2 - 4 = 2; next value 4.
RETRACE = {
    "running": ([0, 0, 0], None, {}, [21 / 4, 9 / 2, 2]),
    "terminated": ([0, 1, 0], None, {}, [2, -2, 2]),
    "truncated, final value": ([0, 1, 0], [0, 1, 0], FINAL, [7, 8, 2]),
    "truncated, stored value": ([0, 1, 0], [0, 1, 0], STORED, [4, 2, 2]),
    "truncated, next value": ([0, 1, 0], [0, 1, 0], NEXT, [5, 4, 2]),
    "terminated at the last step": ([0, 0, 1], None, {}, [3 + (4 - 3 / 4) / 2, 4 - 3 / 4, -3]),
}


@pytest.mark.parametrize("case", RETRACE)
def test_retrace_table(case, backend):
    dones, truncated, how, expected = RETRACE[case]
    how = {"final_values" if x == "final" else x: torch.full((1, 3), y) if x == "final" else y for x, y in how.items()}
    q = row(2, 4, 6)
    targets = retrace(
        *(row(1, 2, 3), q, row(100, 8, 12), tensor([dones]), tensor([10.0]), row(NAN, INF, 0), 0.5, 0.5, 2.0),
        truncated=None if truncated is None else tensor([truncated]),
        backend=backend,
        **how,
    )
    assert (targets - q).tolist() == [expected] and targets.dtype == torch.float32


def test_retrace_with_an_invalid_step(backend):
    # d1 = 2 + 12/2 - 4 = 4, trace cut;  x0 = 3 + 4/2;  d3 = 5 + 5 - 8 = 2, whose ratio nothing uses.
    given = row(1, 2, NAN, 5), row(2, 4, 6, 8), row(100, 8, 12, 16), row(0, 0, 0, 0), tensor([10.0])
    targets = retrace(*given, row(NAN, INF, NAN, NAN), 0.5, 0.5, 2.0, valid=row(1, 1, 0, 1), backend=backend)
    assert targets.tolist() == [[7, 8, 6, 10]]


# ---------------------------------------------------------------------------------------------- against the definition


def off_policy(seed: int, num_envs: int, num_steps: int, bootstrap: str = "final_values", **how) -> dict:
    data = with_bootstrap(rollout(num_envs, num_steps, seed=seed, **how), bootstrap)
    g = torch.Generator().manual_seed(seed + 1000)
    data["log_rhos"] = torch.randn(num_envs, num_steps, generator=g)
    return data


def definition(
    data: dict, gamma: float, lam: float, rho_clip: float, c_clip: float, q_values: Tensor | None = None
) -> tuple[list, list]:
    """Sums over what follows, in float64, one sample at a time: V-trace's (vs, advantages), or Retrace's targets."""
    r, v, last, log_rhos = (array(data[x]) for x in ("rewards", "values", "last_values", "log_rhos"))
    q = v if q_values is None else array(q_values)
    num_envs, num_steps = r.shape
    flags = {x: array(data[x]) if data.get(x) is not None else None for x in ("truncated", "valid")}
    done, final, how = array(data["dones"]), array(data.get("final_values")), data.get("timeout_bootstrap")
    targets, advantages = q.copy(), q * 0
    for n in range(num_envs):
        rho = [min(rho_clip, math.exp(x)) for x in log_rhos[n]]
        c = [lam * min(c_clip, math.exp(x)) for x in log_rhos[n]] + [0.0]
        nexts, ends = [], []
        for t in range(num_steps):
            after = last[n] if t == num_steps - 1 else v[n, t + 1]
            late = flags["truncated"] is not None and flags["truncated"][n, t] != 0
            out = flags["valid"] is not None and flags["valid"][n, t] == 0
            at_end = {"stored_value": v[n, t], "next_value": after}.get(how, 0.0 if final is None else final[n, t])
            nexts.append(at_end if late else 0.0 if done[n, t] else after)
            ends.append("invalid" if out else "end" if late or done[n, t] else "")
        for s in range(num_steps):
            factor, t = 1.0, s
            while t < num_steps and ends[t] != "invalid":
                delta = r[n, t] + gamma * nexts[t] - q[n, t]
                targets[n, s] += factor * delta * (rho[t] if q_values is None else 1)
                if ends[t]:
                    break
                factor *= gamma * (c[t] if q_values is None else c[t + 1])
                t += 1
        for s in range(num_steps):
            ahead = targets[n, s + 1] if s + 1 < num_steps and not ends[s] else nexts[s]
            advantages[n, s] = 0.0 if ends[s] == "invalid" else rho[s] * (r[n, s] + gamma * ahead - v[n, s])
    return targets, advantages


@pytest.mark.parametrize("bootstrap", BOOTSTRAPS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_matches_the_definition(shape, bootstrap, backend):
    data, q = off_policy(shape[0], *shape, bootstrap), torch.randn(shape)
    factors = {"gamma": 0.97, "lam": 0.9, "rho_clip": 1.3, "c_clip": 1.1}
    vs, advantages = vtrace(backend=backend, **factors, **data)
    expected = definition(data, **factors)
    assert_close(vs, expected[0])
    assert_close(advantages, expected[1])
    del factors["rho_clip"]
    targets = retrace(q_values=q, backend=backend, **factors, **data)
    assert_close(targets, definition(data, 0.97, 0.9, 0.0, 1.1, q)[0])


@pytest.mark.parametrize("clips", [(INF, INF), (0.0, 1.0), (1.0, 0.0), (0.5, 2.0)], ids=str)
@pytest.mark.parametrize("gamma, lam", [(0, 1), (1, 1), (0.9, 0), (0.999, 0.5)])
def test_any_factors(gamma, lam, clips, backend):
    data = off_policy(3, 33, 12)
    vs, advantages = vtrace(gamma=gamma, lam=lam, rho_clip=clips[0], c_clip=clips[1], backend=backend, **data)
    expected = definition(data, gamma, lam, *clips)
    assert_close(vs, expected[0])
    assert_close(advantages, expected[1])
    if clips[0] == 0:
        assert torch.equal(vs, data["values"]) and not advantages.any()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("time_dim", [0, 1])
def test_any_layout(layout, time_dim, backend):
    data = off_policy(5, 70, 19)
    last, q = data.pop("last_values"), torch.randn(70, 19)
    data, q = {name: LAYOUTS[layout](x) for name, x in data.items()}, LAYOUTS[layout](q)
    expected = definition(data | {"last_values": last}, 0.9, 0.8, 1.0, 1.0)
    turned, q_turned = ({name: x.t() for name, x in data.items()}, q.t()) if time_dim == 0 else (data, q)
    how = {"last_values": last, "gamma": 0.9, "lam": 0.8, "time_dim": time_dim, "backend": backend}
    out = tuple(torch.full(turned["rewards"].shape, NAN) for _ in range(2))
    assert all(x is y for x, y in zip(vtrace(**turned, **how, out=out), out, strict=True))
    for x, y in zip(out, expected, strict=True):
        assert_close(x if time_dim else x.t(), y)
    for x, y in zip(vtrace(**{name: x.unsqueeze(2) for name, x in turned.items()}, **how), out, strict=True):
        assert torch.equal(x.squeeze(2), y)
    into = torch.full(turned["rewards"].shape, NAN)
    assert retrace(q_values=q_turned, **turned, **how, out=into) is into
    expected = definition(data | {"last_values": last}, 0.9, 0.8, 1.0, 1.0, q)[0]
    assert_close(into if time_dim else into.t(), expected)


@pytest.mark.parametrize("values", FLOATS, ids=str)
@pytest.mark.parametrize("log_rhos", FLOATS, ids=str)
def test_any_float_dtype(values, log_rhos, backend):
    data = off_policy(7, 19, 18)
    data |= {"values": data["values"].to(values), "log_rhos": data["log_rhos"].to(log_rhos)}
    wide = torch.float64 in (values, log_rhos)
    for x, y in zip(vtrace(backend=backend, **data), definition(data, 0.99, 1.0, 1.0, 1.0), strict=True):
        assert x.dtype == (torch.float64 if wide else torch.float32)
        assert_close(x, y, 1e-13 if wide else 2e-6)
    q = torch.randn(19, 18, dtype=log_rhos)
    expected = definition(data, 0.99, 1.0, 0.0, 1.0, q)[0]
    assert_close(retrace(q_values=q, backend=backend, **data), expected, 1e-13 if wide else 2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ratios_of_any_size(dtype, backend):
    """One step, reward 1, no discount: vs is the clipped ratio itself."""
    logs = torch.linspace(-120, 120, 4801, dtype=dtype)[:, None]
    logs = torch.cat([logs, 10 * logs, tensor([[0.0], [-0.0], [1e-30], [-1e-8], [INF], [-INF]], dtype=dtype)])
    ones, zeros = torch.ones_like(logs), torch.zeros_like(logs)
    for clip in (INF, 1e30, 3.7):
        vs, _ = vtrace(ones, zeros, ones, zeros[:, 0], logs, rho_clip=clip, backend=backend)
        exact = logs.double().exp().clamp(max=clip)
        # float32's e^x overflows and underflows; pydrone may do so where the number is within a factor of 2 of that.
        low, high = (2.4e-38, 1e38) if dtype == torch.float32 else (1e-300, 1e300)
        inside = (exact > low) & (exact < high)
        error = (vs.double() - exact)[inside].abs() / exact[inside]
        assert error.max() <= (3e-7 if dtype == torch.float32 else 4e-16)
        assert (vs[exact <= low] <= 2 * low).all() and (vs[exact >= high] >= min(clip, high)).all()
        assert vs[-2] == clip and vs[-1] == 0 and vs[-6] == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_infinite_ratio_times_zero_shows(dtype, backend):
    """Unbounded, and not hidden by lambda: 0 * infinity is NaN, with either sign."""
    x, none = torch.ones(2, 3, dtype=dtype), torch.zeros(2, 3)
    log_rhos = torch.tensor([[0, INF, 0], [0, 0, 0]], dtype=dtype)
    vs, _ = vtrace(x, x, none, x[:, 0], log_rhos, 0.9, 0.0, c_clip=INF, backend=backend)
    assert vs.isnan().tolist() == [[True, True, False], [False, False, False]]


def test_clips_beyond_float32(backend):
    data = off_policy(31, 5, 7)
    for x, y in zip(
        vtrace(rho_clip=1e300, c_clip=1e39, backend=backend, **data),
        definition(data, 0.99, 1.0, 1e300, 1e39),
        strict=True,
    ):
        assert_close(x, y)


def test_negated_views(backend):
    """torch._neg_view, as the imaginary part of a conjugate is: its memory holds the opposite numbers."""
    data = off_policy(37, 5, 7)
    views = data | {name: torch._neg_view(-data[name]) for name in ("rewards", "log_rhos", "last_values")}
    for x, y in zip(vtrace(backend=backend, **views), vtrace(backend=backend, **data), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("start", [0, 3, 8])
@pytest.mark.parametrize("retraced", [False, True])
def test_in_a_ring(start, retraced, backend):
    """Codes, a rollout that wraps around, a pool of final values, and ratios in rows of their own."""
    num_envs, num_steps, capacity = 37, 8, 10
    slots = (torch.arange(num_steps) + start) % capacity
    data, q = off_policy(start, num_envs, num_steps), torch.randn(num_envs, num_steps)
    codes = torch.where(data["dones"], 1, 0)
    codes = torch.where(data["truncated"], 2, codes)
    codes = torch.where(data["valid"], codes, 3).byte()

    def stored(x: Tensor, fill: float, columns: bool) -> Tensor:
        made = torch.full((capacity, num_envs), fill).to(x.dtype).t()
        made = made if columns else made.contiguous()
        made[:, slots] = x
        return made

    truncations = (codes == 2).nonzero()
    pool = data["final_values"][truncations[:, 0], truncations[:, 1]]
    numbers = torch.full((num_envs, num_steps), -1, dtype=torch.int32)
    numbers[truncations[:, 0], truncations[:, 1]] = torch.arange(len(pool), dtype=torch.int32)
    for columns in (True, False):
        planes = [stored(data[x], NAN, columns) for x in ("rewards", "values")]
        outputs = torch.full((3, num_envs, num_steps), NAN)
        stats, workspace = torch.full((3,), NAN, dtype=torch.float64), torch.zeros(200, dtype=torch.float64)
        select(outputs.device, backend).off_policy(
            *(*planes, stored(codes, 9, columns), None, None, data["last_values"], pool),
            *(stored(numbers, -7, columns), stored(data["log_rhos"], NAN, columns)),
            *(stored(q, NAN, columns) if retraced else None, 0.97, 0.9, 1.3, 1.1, start, True, 1, None),
            *(None if retraced else outputs[0], outputs[1]),
            *((None, None) if retraced else (stats, workspace)),
        )
        expected = definition(data, 0.97, 0.9, 1.3, 1.1, q if retraced else None)
        assert_close(outputs[1], expected[0])
        if not retraced:
            assert_close(outputs[0], expected[1])
            sample = outputs[0][data["valid"]].double()
            exact = [sample.numel(), sample.mean(), sample.var(unbiased=False) * sample.numel()]
            assert stats.tolist() == pytest.approx([float(x) for x in exact], rel=1e-5)


# ---------------------------------------------------------------------------------------------- properties


@given(draw=st.data())
def test_any_sizes_and_factors_match_the_definition(backend, draw):
    shape = draw.draw(st.tuples(st.integers(1, 70), st.integers(1, 9)), label="N, T")
    bootstrap = draw.draw(st.sampled_from(BOOTSTRAPS), label="bootstrap")
    data = off_policy(draw.draw(st.integers(0, 2**20), label="seed"), *shape, bootstrap, ends=0.4)
    unit, clip = st.floats(0, 1), st.one_of(st.floats(0, 4), st.just(INF))
    factors = {x: draw.draw(unit, label=x) for x in ("gamma", "lam")}
    factors |= {x: draw.draw(clip, label=x) for x in ("rho_clip", "c_clip")}
    expected = definition(data, **factors)
    turned = {x: y.t().contiguous().t() if isinstance(y, Tensor) and y.dim() == 2 else y for x, y in data.items()}
    for x in (data, turned):
        for found, wanted in zip(vtrace(backend=backend, **factors, **x), expected, strict=True):
            assert_close(found, wanted, 2e-5)


@pytest.mark.parametrize("bootstrap", BOOTSTRAPS)
def test_on_policy_it_is_gae(bootstrap, backend):
    data = with_bootstrap(rollout(70, 24), bootstrap)
    _, returns = gae(gamma=0.97, lam=0.9, backend=backend, **data)
    zeros = torch.zeros(70, 24)
    for clips in ((1.0, 1.0), (INF, INF), (3.0, 2.0)):
        vs, _ = vtrace(log_rhos=zeros, gamma=0.97, lam=0.9, rho_clip=clips[0], c_clip=clips[1], backend=backend, **data)
        assert_close(vs, returns)
    vs, ahead = vtrace(log_rhos=zeros, gamma=0.97, backend=backend, **data)
    monte_carlo = gae(gamma=0.97, lam=1.0, backend=backend, **data)
    assert_close(ahead, monte_carlo[0])
    assert_close(vs, monte_carlo[1])
    # Retrace on values of states alone, which is GAE's returns too.
    same = retrace(q_values=data["values"], log_rhos=zeros, gamma=0.97, lam=0.9, backend=backend, **data)
    assert_close(same, returns)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("bootstrap", BOOTSTRAPS)
@pytest.mark.parametrize("invalid", [[], [3, 69]], ids=["all valid", "some invalid"])
def test_nothing_leaks_over_an_end(bad, bootstrap, invalid, backend):
    shape, end = (70, 24), 15
    data, q = off_policy(11, *shape, bootstrap, ends=0), torch.randn(shape)
    data["valid"] = torch.ones(shape, dtype=torch.bool)
    data["valid"][invalid] = False
    data["dones"][:, end] = True
    if "truncated" in data:
        data["truncated"][:, end] = True
    clean = [*vtrace(backend=backend, **data), retrace(q_values=q, backend=backend, **data)]
    first_unread = end + 2 if bootstrap == "next_value" else end + 1
    for name, first in (("rewards", end + 1), ("log_rhos", end + 1), ("values", first_unread)):
        data[name][:, first:] = bad
    q[:, end + 1 :] = bad
    data["last_values"][:] = bad
    if "final_values" in data:
        data["final_values"][:, :end] = data["final_values"][:, end + 1 :] = bad
    dirty = [*vtrace(backend=backend, **data), retrace(q_values=q, backend=backend, **data)]
    for x, y in zip(clean, dirty, strict=True):
        assert torch.equal(x[:, : end + 1], y[:, : end + 1])


def test_a_ratio_that_is_nan_shows(backend):
    data = off_policy(13, 35, 8, "none", ends=0)
    del data["valid"]
    data["log_rhos"][33, 5] = data["log_rhos"][3, 5] = NAN  # of a vector, and of its remainder
    for x in vtrace(backend=backend, **data):
        assert x.isnan().nonzero().tolist() == [[n, t] for n in (3, 33) for t in range(6)]
    targets = retrace(q_values=data["values"], backend=backend, **data)
    assert targets.isnan().nonzero().tolist() == [[n, t] for n in (3, 33) for t in range(5)]
    _, _, stats = vtrace(backend=backend, stats=True, **data)
    assert stats[0] == 35 * 8 and not stats[1:].isfinite().all()


@pytest.mark.parametrize("which", TERMINAL)
@pytest.mark.parametrize(("num_envs", "stats"), [(5252, False), (5255, True)])
def test_outputs_that_bypass_the_cache(num_envs, which, stats, backend):
    data, q = terminal(off_policy(17, num_envs, 100), which), torch.randn(100, num_envs).t()
    precise = in_float64(data)
    data = {name: x if x.dim() == 1 else x.t().contiguous().t() for name, x in data.items()}
    out = [torch.full((100, num_envs), NAN).t() for _ in range(3)]
    actual = vtrace(backend=backend, stats=stats, out=out[:2], **data)
    assert_same(actual, vtrace(backend="reference", stats=stats, **precise))
    retrace(q_values=q, backend=backend, out=out[2], **data)
    assert_close(out[2], retrace(q_values=q.double(), backend="reference", **precise))


@pytest.mark.parametrize("bootstrap", ["final_values", "stored_value", "next_value"])
@pytest.mark.parametrize("which", TERMINAL)
def test_rows_that_only_terminate(which, bootstrap, backend):
    data, q = terminal(off_policy(18, 70, 31, bootstrap), which), torch.randn(70, 31)
    precise = in_float64(data)
    expected = vtrace(backend="reference", stats=True, **precise)
    assert_same(vtrace(backend=backend, stats=True, **data), expected)
    expected = retrace(q_values=q.double(), backend="reference", **precise)
    assert_close(retrace(q_values=q, backend=backend, **data), expected)


def test_bit_equal_from_run_to_run(backend):
    data = off_policy(19, 1000, 80)
    first = vtrace(stats=True, backend=backend, **data)
    for _ in range(3):
        assert all(torch.equal(x, y) for x, y in zip(vtrace(stats=True, backend=backend, **data), first, strict=True))


# ---------------------------------------------------------------------------------------------- what GAE makes besides


def test_lambda_and_discounted_returns_are_cases_of_gae(backend):
    """docs/conventions.md: the lambda return is A + V; with lam 1 and values of zero it is the discounted return."""
    data = with_bootstrap(rollout(5, 9), "none")
    del data["valid"]
    r, v, last, done = (array(data[x]) for x in ("rewards", "values", "last_values", "dones"))
    lam_return, discounted = r * 0, r * 0
    for n in range(5):
        ahead, total = last[n], last[n]  # G = r + gamma ((1 - lam) V' + lam G')
        for t in reversed(range(9)):
            following = last[n] if t == 8 else v[n, t + 1]
            on = 1.0 - done[n, t]
            ahead = r[n, t] + 0.9 * on * (0.2 * following + 0.8 * ahead)
            total = r[n, t] + 0.9 * on * total
            lam_return[n, t], discounted[n, t] = ahead, total
    assert_close(gae(gamma=0.9, lam=0.8, backend=backend, **data)[1], lam_return)
    data["values"] = torch.zeros(5, 9)
    assert_close(gae(gamma=0.9, lam=1.0, backend=backend, **data)[0], discounted)


# ---------------------------------------------------------------------------------------------- peers


@pytest.mark.parametrize("clips", [(1.0, 1.0), (2.0, 0.5)])
def test_equals_torchrl(clips, backend):
    functional = pytest.importorskip("torchrl.objectives.value.functional")
    data = off_policy(23, 33, 21)
    del data["valid"]
    ends = data["dones"] | data["truncated"]
    following = torch.cat([data["values"][:, 1:], data["last_values"][:, None]], 1)
    following = torch.where(data["truncated"], data["final_values"], following)
    columns = [x.unsqueeze(2) for x in (data["values"], following, data["rewards"], ends, ends & ~data["truncated"])]
    logs = data["log_rhos"].unsqueeze(2)
    clips_of = {"rho_thresh": clips[0], "c_thresh": clips[1]}
    theirs = functional.vtrace_advantage_estimate(0.98, logs, torch.zeros_like(logs), *columns, **clips_of)
    vs, advantages = vtrace(gamma=0.98, rho_clip=clips[0], c_clip=clips[1], backend=backend, **data)
    assert_close(vs, theirs[1].squeeze(2))
    assert_close(advantages, theirs[0].squeeze(2))


def test_equals_rl_triton():
    peer = pytest.importorskip("rl_triton")
    if not torch.cuda.is_available():
        pytest.skip("rl_triton runs on CUDA only")
    given = {name: x.cuda() for name, x in off_policy(29, 64, 50, "none").items() if name != "valid"}
    dones, zeros = given["dones"].float(), torch.zeros_like(given["log_rhos"])
    first = given["log_rhos"], zeros, given["values"], given["rewards"], dones
    theirs = peer.compute_vtrace(*first, gamma=0.98, last_value=given["last_values"])
    for x, y in zip(vtrace(gamma=0.98, **given), theirs, strict=True):
        assert_close(x.cpu(), y.cpu())
    # Retrace, with one action, taken: then its Q is the state's value, and the last step's comes last.
    following = torch.cat([given["values"][:, 1:], given["last_values"][:, None]], 1)
    q, probs = torch.randn_like(zeros), torch.ones_like(zeros)
    actions = torch.zeros_like(zeros, dtype=torch.int64)
    many = probs.unsqueeze(2), (-given["log_rhos"]).exp(), q, following.unsqueeze(2), actions, given["rewards"]
    targets = retrace(q_values=q, gamma=0.98, lam=0.9, **given)
    assert_close(targets.cpu(), peer.compute_retrace(*many, dones, 0 * dones, 0.98, 0.9)[0].cpu())


# ---------------------------------------------------------------------------------------------- errors

X, ENVS = torch.zeros(3, 5), torch.zeros(3)


def fresh(*shape: int) -> Tensor:
    return torch.zeros(shape or (3, 5))


ERRORS = [
    (vtrace, {"log_rhos": None}, TypeError, r"^log_rhos: expected a tensor, got NoneType$"),
    (vtrace, {"log_rhos": X[:, :4]}, ValueError, r"^log_rhos: expected shape \[3, 5\], got \[3, 4\]$"),
    (vtrace, {"log_rhos": X.long()}, TypeError, r"^log_rhos: expected a floating dtype, got torch.int64$"),
    (vtrace, {"log_rhos": X.clone().requires_grad_()}, RuntimeError, r"^log_rhos: requires grad.*log_rhos\.detach\(\)"),
    (vtrace, {"rho_clip": -1}, ValueError, r"^rho_clip: expected a number of at least 0, got -1$"),
    (vtrace, {"c_clip": NAN}, ValueError, r"^c_clip: expected a number of at least 0, got nan$"),
    (vtrace, {"rho_clip": None}, TypeError, r"^rho_clip: expected a number, got NoneType$"),
    (vtrace, {"out": (fresh(),)}, TypeError, r"^out: expected \(vs, pg_advantages\), got tuple$"),
    (vtrace, {"out": (fresh(), X)}, ValueError, r"^out\[1\]: expected memory of its own, got some that another"),
    (vtrace, {"truncated": X}, ValueError, r"^truncated: expected a bootstrap.*; got none$"),
    (retrace, {"q_values": X.t()}, ValueError, r"^q_values: expected shape \[3, 5\], got \[5, 3\]$"),
    (retrace, {"q_values": [1]}, TypeError, r"^q_values: expected a tensor, got list$"),
    (retrace, {"c_clip": "1"}, TypeError, r"^c_clip: expected a number, got str$"),
    (retrace, {"out": fresh(5, 3)}, ValueError, r"^out: expected shape \[3, 5\], got \[5, 3\]$"),
    (retrace, {"out": (fresh(),)}, TypeError, r"^out: expected a tensor, got tuple$"),
    (retrace, {"out": X}, ValueError, r"^out: expected memory of its own, got some that another argument uses$"),
]


@pytest.mark.parametrize("function, change, error, message", ERRORS)
def test_errors_name_the_argument(function, change, error, message):
    given = {"rewards": X, "values": X, "dones": X, "last_values": ENVS, "log_rhos": X}
    with pytest.raises(error, match=message):
        function(**({"q_values": X} if function is retrace else {}) | given | change)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0)])
def test_nothing_to_do(shape, backend):
    x = torch.zeros(shape)
    vs, advantages, stats = vtrace(x, x, x, torch.zeros(shape[0]), x, stats=True, backend=backend)
    assert vs.shape == advantages.shape == shape and stats.tolist() == [0, 0, 0]
    assert retrace(x, x, x, x, torch.zeros(shape[0]), x, backend=backend).shape == shape
