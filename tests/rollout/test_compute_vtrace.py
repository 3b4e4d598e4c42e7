"""V-trace of a buffer's rollout, and what minibatches, sequences, graphs and states make of it."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from rollout_model import assert_close, random_step, stacked
from test_captured import Graph
from torch import Tensor

from pydrone import RolloutBuffer, vtrace
from pydrone.ops.reference import normalization

N, T = 37, 5
FACTORS = {"gamma": 0.97, "lam": 0.9, "rho_clip": 1.2, "c_clip": 1.1}
FIELDS = {"log_rhos": (), "half": ((), torch.float16), "wide": (2,), "count": ((), torch.int64)}


def make(backend: str | None = None, **options) -> RolloutBuffer:
    return RolloutBuffer(N, T, **{"obs": 2, "actions": 1, "backend": backend, "fields": FIELDS} | options)


def filled(buf: RolloutBuffer, truncations: bool = True, steps: int = T) -> list[dict]:
    made = [random_step(buf) for _ in range(steps)]
    for step in made:
        step["truncated"] = (step["dones"] & (torch.rand(N) < 0.5)) if truncations else None
        step["valid"] = torch.rand(N) < 0.9
        buf.append(**step)
    return made


def expected(steps: list[dict], last: Tensor, log_rhos: Tensor, **how) -> tuple[Tensor, Tensor, Tensor]:
    """(vs, advantages, statistics) by the reference, in float64."""
    names = ("rewards", "values", "dones", "truncated", "valid")
    planes = {x: stacked(steps, x) for x in names if steps[0][x] is not None}
    wide = {x: y.double() if y.is_floating_point() else y for x, y in planes.items()}
    given = wide | {"last_values": last, "log_rhos": log_rhos.double(), "stats": True, "backend": "reference"}
    return vtrace(**given, **FACTORS, **how)


@pytest.mark.parametrize("capacity", [T, T + 2, 2 * T])
@pytest.mark.parametrize("source", ["log_rhos", "half", "a tensor"])
def test_a_rollout(capacity, source, backend):
    buf = make(backend, capacity=capacity)
    for _ in range(2):
        steps, last = filled(buf), torch.randn(N)
        name = "log_rhos" if source == "a tensor" else source
        log_rhos = stacked(steps, name) if source == "a tensor" else source
        buf.compute_vtrace(last, log_rhos, **FACTORS, timeout_bootstrap="stored_value")
        vs, advantages, stats = expected(steps, last, stacked(steps, name), timeout_bootstrap="stored_value")
        assert_close(buf.returns, vs)
        assert_close(buf.advantages, advantages)
        assert buf.statistics.tolist() == pytest.approx(stats.tolist(), rel=1e-5)
        mean, scale = normalization(stats)
        for mb in buf.minibatches(3):
            env, t = mb.indices // T, mb.indices % T
            assert torch.equal(mb.returns, buf.returns[env, t])
            assert_close(mb.advantages, (advantages[env, t] - mean) * scale)
        plain = next(buf.minibatches(normalize_advantages=False, lazy=True))
        assert torch.equal(plain.returns, buf.returns.flatten()[plain.indices])
        assert torch.equal(plain.advantages, buf.advantages.flatten()[plain.indices])
        assert not torch.allclose(plain.returns, plain.advantages + plain.values, atol=1e-3)
        trajectories = next(buf.sequences(normalize_advantages=False))
        assert trajectories.fields["returns"].sum() == pytest.approx(
            float(next(buf.sequences()).fields["returns"].sum())
        )
        buf.clear()


def test_values_of_the_true_final_observations(backend):
    given, value_fn = make(backend, final_obs_rows=0), lambda obs: obs.sum(1)
    pooled = make(backend, final_obs_rows=N * T)
    steps, last, finals = [random_step(given) for _ in range(T)], torch.randn(N), torch.randn(T, N, 2)
    for step, final in zip(steps, finals):
        step["truncated"], step["valid"] = step["dones"] & (torch.rand(N) < 0.6), None
        given.append(**step)
        pooled.append(**step, final_obs=final)
    final_values = finals.sum(2).t()
    pooled.compute_vtrace(last, "log_rhos", **FACTORS, value_fn=value_fn)
    given.compute_vtrace(last, "log_rhos", **FACTORS, final_values=final_values)
    vs, advantages, _ = expected(steps, last, stacked(steps, "log_rhos"), final_values=final_values)
    for buf in (pooled, given):
        assert_close(buf.returns, vs)
        assert_close(buf.advantages, advantages)


def test_compute_gae_goes_back(backend):
    buf, last = make(backend), torch.randn(N)
    filled(buf, truncations=False)
    buf.compute_gae(last)
    before = [buf.advantages.clone(), *(mb.returns for mb in buf.minibatches(1))]
    buf.compute_vtrace(last, "log_rhos")
    late = next(buf.minibatches(1, lazy=True))
    buf.compute_gae(last)
    with pytest.raises(RuntimeError, match=r"^minibatches: compute_gae\(\) has renewed the advantages"):
        _ = late.obs
    buf._draws.epoch = 0
    after = [buf.advantages, *(mb.returns for mb in buf.minibatches(1))]
    assert all(map(torch.equal, after, before))
    late = next(buf.minibatches(1, lazy=True))
    buf.compute_vtrace(last, "log_rhos")
    with pytest.raises(RuntimeError, match=r"^minibatches: compute_vtrace\(\) has renewed the advantages"):
        _ = late.obs


def test_a_saved_state_keeps_the_targets(backend):
    buf = make(backend)
    filled(buf, truncations=False)
    buf.compute_vtrace(torch.randn(N), "log_rhos")
    other = copy.deepcopy(buf)
    for x, y in zip(buf.minibatches(2), other.minibatches(2), strict=True):
        assert torch.equal(x.returns, y.returns)
    state = buf.state_dict()
    with pytest.raises(ValueError, match=r"^state_dict: method: expected one of compute_gae, compute_vtrace, got 'x'$"):
        other.load_state_dict(state | {"method": "x"})
    with pytest.raises(TypeError, match=r"^state_dict: method: expected str, got int$"):
        other.load_state_dict(state | {"method": 1})
    earlier = {name: x for name, x in state.items() if name != "method"}  # as versions without V-trace wrote it
    other.load_state_dict(earlier)
    mb = next(other.minibatches(1))
    assert torch.equal(mb.returns, buf.advantages.flatten()[mb.indices] + mb.values)


def test_a_field_of_one_float(backend):
    buf, flat = make(backend, fields={"log_rhos": (1,)}), make(backend)
    for _ in range(T):
        step = random_step(flat)
        flat.append(**step)
        unused = ("half", "wide", "count")
        buf.append(**{x: y for x, y in step.items() if x not in unused} | {"log_rhos": step["log_rhos"][:, None]})
    for x in (buf, flat):
        x.compute_vtrace(torch.zeros(N), "log_rhos", **FACTORS)
    assert torch.equal(buf.returns, flat.returns) and torch.equal(buf.advantages, flat.advantages)


def test_a_replay_after_eager_calls(backend, monkeypatch):
    """What a replay computes is known, whatever was computed between."""
    buf = make(backend)
    inputs, last = [random_step(buf) for _ in range(T)], torch.randn(N)
    with Graph(buf, monkeypatch) as graph:
        for step in inputs:
            buf.append(**step)
        buf.compute_vtrace(last, "log_rhos", **FACTORS)
    for _ in range(2):
        buf.advance(T)
        graph.replay()
        mb = next(buf.minibatches(normalize_advantages=False))
        assert torch.equal(mb.returns, buf._storage.returns.flatten()[mb.indices])
        assert not torch.allclose(mb.returns, mb.advantages + mb.values, atol=1e-3)
        buf.compute_gae(last)
        mb = next(buf.minibatches(normalize_advantages=False))
        assert_close(mb.returns, mb.advantages + mb.values)
        buf.clear()


def test_a_captured_call(backend, monkeypatch):
    buf, eager = make(backend, capacity=T + 2), make(backend)
    inputs, last = [random_step(buf) for _ in range(T)], torch.zeros(N)
    found = {}
    with Graph(buf, monkeypatch) as graph:
        for step in inputs:
            buf.append(**step)
        buf.compute_vtrace(last, "log_rhos", **FACTORS)
        found["mb"] = next(buf.minibatches(1))
    for _ in range(4):
        buf.advance(T)
        steps = [{name: x.copy_(random_step(buf)[name]) for name, x in step.items()} for step in inputs]
        last.copy_(torch.randn(N))
        graph.replay()
        for step in steps:
            eager.append(**step)
        eager.compute_vtrace(last, stacked(steps, "log_rhos"), **FACTORS)
        assert_close(buf._storage.returns, eager.returns)
        wanted = next(eager.minibatches(1))
        assert_close(found["mb"].returns, wanted.returns)
        assert_close(found["mb"].advantages, wanted.advantages)
        buf.clear()
        eager.clear()


@pytest.mark.parametrize("how", ["field", "tensor"])
def test_a_ratio_that_is_not_finite_is_reported(how, backend):
    buf = make(backend, non_finite="raise")
    steps = [random_step(buf) for _ in range(T)]
    steps[2]["log_rhos"][5] = math.nan
    for step in steps:
        buf.append(**step)
    with pytest.raises(FloatingPointError, match=r"advantages: .* the first of environment 5"):
        buf.compute_vtrace(torch.zeros(N), "log_rhos" if how == "field" else stacked(steps, "log_rhos"))


ERRORS = [
    ("x", ValueError, r"^log_rhos: expected a field of one float, one of log_rhos, half; got 'x'$"),
    ("wide", ValueError, r"^log_rhos: expected a field of one float, .*; got 'wide'$"),
    ("count", ValueError, r"^log_rhos: expected a field of one float, .*; got 'count'$"),
    ("rewards", ValueError, r"^log_rhos: expected a field of one float, .*; got 'rewards'$"),
    (None, TypeError, r"^log_rhos: expected a tensor, got NoneType$"),
    (torch.zeros(T, N), ValueError, rf"^log_rhos: expected shape \[{N}, {T}\], got \[{T}, {N}\]$"),
    (torch.zeros(N, T, dtype=torch.int64), TypeError, r"^log_rhos: expected a floating dtype, got torch.int64$"),
]


@pytest.mark.parametrize("log_rhos, error, message", ERRORS)
def test_errors(log_rhos, error, message):
    buf = make()
    with pytest.raises(RuntimeError, match=rf"^compute_vtrace: expected a rollout of {T} steps, 0 are stored$"):
        buf.compute_vtrace(torch.zeros(N), "log_rhos")
    filled(buf, truncations=False)
    with pytest.raises(error, match=message):
        buf.compute_vtrace(torch.zeros(N), log_rhos)
    with pytest.raises(ValueError, match=r"^rho_clip: expected a number of at least 0, got -1$"):
        buf.compute_vtrace(torch.zeros(N), "log_rhos", rho_clip=-1)
    with pytest.raises(ValueError, match=r"^log_rhos: expected memory of its own, got some of this buffer's"):
        buf.compute_vtrace(torch.zeros(N), buf._storage.returns)
    with pytest.raises(RuntimeError, match=r"^advantages: expected compute_gae"):
        _ = buf.advantages
