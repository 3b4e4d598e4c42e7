"""NaN and infinite numbers: the kernels find them; errors and warnings name field, environment and step."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
from rollout_model import random_step
from test_captured import Graph

from pydrone import RolloutBuffer
from pydrone.buffer import NonFinite

N, T = 37, 5
OBS = {"a": 3, "b": ((), torch.float64), "c": ((2, 2), torch.uint8), "d": ((3,), torch.int32)}
BAD = [math.nan, math.inf, -math.inf]


def make(backend: str, **options) -> RolloutBuffer:
    return RolloutBuffer(N, T, **{"obs": OBS, "actions": 2, "backend": backend, "non_finite": "raise"} | options)


def steps_of(buf: RolloutBuffer) -> list[dict]:
    """Steps of integers and finite numbers; the integers include the bits of a NaN."""
    steps = [random_step(buf, ends=False) for _ in range(T)]
    for step in steps if buf.layout.obs_is_mapping else ():
        step["obs"] = step["obs"] | {"c": torch.full((N, 2, 2), 255, dtype=torch.uint8)}
        step["obs"]["d"] = torch.full((N, 3), 0x7FC00000, dtype=torch.int32)  # the bits of a NaN
    return steps


def store(buf: RolloutBuffer, steps: list[dict], halves: bool = False) -> None:
    for step in steps:
        if halves:
            late = {name: step[name] for name in ("rewards", "dones", "valid") if name in step}
            buf.begin(**{name: x for name, x in step.items() if name not in late})
            buf.end(**late)
        else:
            buf.append(**step)


def target(step: dict, name: str) -> torch.Tensor:
    return step["obs"][name[-3]] if name.startswith("obs[") else step[name]


@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize("number", BAD)
@pytest.mark.parametrize("name", ["obs['a']", "obs['b']", "rewards", "values"])
def test_one_number_is_found_wherever_it_is(name, number, halves, backend):
    buf = make(backend)
    for env, step in ((0, 0), (N - 1, T - 1), (17, 2), (32, 3)):
        steps = steps_of(buf)
        x = target(steps[step], name)
        x[(env, -1) if x.dim() > 1 else env] = number
        store(buf, steps, halves)
        with pytest.raises(FloatingPointError, match=rf"1 value that is not finite, .* {env} at step {step}$"):
            buf.compute_gae(torch.zeros(N))
        assert buf.non_finite() == [NonFinite(name, 1, env, step)]
        with pytest.raises(FloatingPointError):
            buf.check()
        buf.clear()
        # The next rollout is finite, and reported as such.
        store(buf, steps_of(buf), halves)
        buf.compute_gae(torch.zeros(N))
        buf.check()
        assert buf._storage.not_finite.tolist() == [0]
        buf.clear()


def test_the_count_and_the_first(backend):
    """The first one is by step, then by environment; within a step observations come before the reward."""
    buf = make(backend)
    steps = steps_of(buf)
    steps[3]["obs"]["a"][2, 0] = steps[1]["obs"]["a"][30, 1] = steps[1]["obs"]["a"][30, 2] = math.nan
    steps[1]["obs"]["a"][9, 0] = math.inf
    steps[1]["rewards"][4] = steps[4]["rewards"][0] = math.nan
    store(buf, steps)
    buf_says = (
        r"^rollout 0: obs\['a'\]: 4 values that are not finite, the first of environment 9 at step 1; rewards: 2 "
    )
    with pytest.raises(FloatingPointError, match=buf_says):
        buf.compute_gae(torch.zeros(N))
    assert buf.non_finite() == [NonFinite("obs['a']", 4, 9, 1), NonFinite("rewards", 2, 4, 1)]
    buf.clear()
    steps = steps_of(buf)
    steps[3]["obs"]["a"][2, 0] = steps[2]["rewards"][4] = math.nan
    store(buf, steps)
    assert buf.non_finite() == [NonFinite("rewards", 1, 4, 2), NonFinite("obs['a']", 1, 2, 3)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 2, 5, 17, 64, 1100])
@pytest.mark.parametrize("how", ["dense", "strided envs", "strided", "converted", "float64"])
def test_observations_of_every_size_and_layout(how, width, dtype, backend):
    """Every copy path of the kernel: whole, split, merged and converted; and rows longer than its block."""
    buf = make(backend, obs=width, obs_dtype=dtype)
    # bfloat16 rounds the largest float32 up to infinity.
    largest = 3e38 if how == "converted" and dtype == torch.float32 else torch.finfo(dtype).max
    for at in sorted({0, width // 2, width - 1}):
        for number in (math.nan, -math.inf, largest, -largest, 0.0):
            steps = steps_of(buf)
            for step in steps:
                given = torch.full((N, width), largest if number == 0 else 1.0, dtype=dtype)
                given[11, at] = number if step is steps[2] else 1.0
                if how == "strided envs":
                    given = torch.cat([given, torch.full((N, 3), math.nan, dtype=dtype)], 1)[:, :width]
                elif how == "strided":
                    given = given.t().contiguous().t()
                elif how == "converted":
                    given = given.to(torch.float32 if dtype != torch.float32 else torch.bfloat16)
                elif how == "float64":
                    given = given.double()
                step["obs"] = given
            store(buf, steps)
            expected = [0] if math.isfinite(number) else [1]
            assert buf._storage.not_finite.tolist() == expected
            assert [x[2:] for x in buf.non_finite()] == [(11, 2)] * expected[0]
            buf._storage.not_finite.zero_()
            buf.clear()


def test_what_becomes_infinite_as_it_is_stored(backend):
    buf = make(backend, obs=17, obs_dtype=torch.float16)
    steps = steps_of(buf)
    steps[0]["obs"][36, 16] = 1e6
    store(buf, steps)
    with pytest.raises(FloatingPointError, match=r"environment 36 at step 0$"):
        buf.compute_gae(torch.zeros(N))


def test_steps_that_are_none_do_not_count(backend):
    buf = make(backend)
    steps = steps_of(buf)
    for step in steps:
        step["valid"] = torch.arange(N) != 3
        step["obs"]["a"][3] = step["rewards"][3] = math.nan
    store(buf, steps)
    buf.compute_gae(torch.zeros(N))
    buf.check()
    assert buf.non_finite() == []


@pytest.mark.parametrize("capacity", [T, T + 2, 2 * T, 3 * T - 1])
def test_each_rollout_of_the_ring_on_its_own(capacity, backend):
    """Also where it wraps, and where the next rollout is collected while this one is consumed."""
    buf = make(backend, capacity=capacity)
    pending = []
    for k in range(40):
        step, bad = steps_of(buf)[0], k % 7 == 3 or k in (20, 21)
        if bad:
            step["obs"]["a"][k % N, 1] = math.inf
        pending.append((k % N) if bad else None)
        buf.append(**step)
        if len(buf) < capacity:
            continue
        expected = [NonFinite("obs['a']", sum(x is not None for x in pending[:T]), x, t)
                    for t, x in enumerate(pending[:T]) if x is not None][:1]  # fmt: skip
        if expected:
            with pytest.raises(FloatingPointError, match=f"^rollout {buf._ring.rollout}: "):
                buf.compute_gae(torch.zeros(N))
        else:
            buf.compute_gae(torch.zeros(N))
            buf.check()
        assert buf.non_finite() == expected
        buf.clear()
        del pending[:T]


def test_a_restarted_rollout_is_not_blamed(backend):
    buf = make(backend)
    steps = steps_of(buf)
    steps[0]["obs"]["a"][0, 0] = math.nan
    store(buf, steps[:2])
    buf.clear()
    store(buf, steps_of(buf))
    buf.compute_gae(torch.zeros(N))
    buf.check()


def test_last_values_and_overflow_are_told_apart(backend):
    buf = make(backend)
    store(buf, steps_of(buf))
    last = torch.zeros(N)
    last[8] = math.nan
    with pytest.raises(
        FloatingPointError, match=r"^rollout 0: advantages: 5 values .* environment 8 at step 0, and obs"
    ):
        buf.compute_gae(last)
    buf.compute_gae(torch.zeros(N))
    buf.check()
    buf.clear()
    # Advantages whose squares overflow float32 are still finite.
    steps = steps_of(buf)
    for step in steps:
        step["rewards"] = torch.full((N,), 1e30)
    store(buf, steps)
    buf.compute_gae(torch.zeros(N))


def test_policies(backend):
    for policy in ("warn", "ignore"):
        buf = make(backend, non_finite=policy)
        steps = steps_of(buf)
        steps[1]["obs"]["a"][5, 1] = math.nan
        store(buf, steps)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            buf.compute_gae(torch.zeros(N))
            buf.check()  # already reported for this rollout
        assert [(x.category, str(x.message), x.filename) for x in caught] == [
            (RuntimeWarning, "rollout 0: " + str(NonFinite("obs['a']", 1, 5, 1)), __file__)
        ][: policy == "warn"]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            buf.compute_gae(torch.zeros(N), check=False)
    assert RolloutBuffer(2, 2, 1, 1)._report.policy == "warn"
    for policy in ("error", None, True):
        with pytest.raises(ValueError, match=r"^non_finite: expected 'ignore', 'warn' or 'raise', got"):
            make(backend, non_finite=policy)


def test_check_later(backend):
    buf = make(backend)
    steps = steps_of(buf)
    steps[1]["rewards"][5] = math.nan
    store(buf, steps)
    buf.compute_gae(torch.zeros(N), check=False)
    flags = buf.flags().tolist()
    with pytest.raises(FloatingPointError, match="rewards: 1 value"):
        buf.check(flags)


def test_a_copy_looks_again(backend):
    buf = make(backend)
    steps = steps_of(buf)
    steps[1]["obs"]["a"][5, 0] = math.nan
    store(buf, steps)
    for copied in (copy.deepcopy(buf), make(backend)):
        copied.load_state_dict(buf.state_dict())
        with pytest.raises(FloatingPointError, match="environment 5 at step 1"):
            copied.compute_gae(torch.zeros(N))
    assert copy.deepcopy(buf)._report.policy == "raise"


@pytest.mark.parametrize("capacity", [T, 2 * T])
@pytest.mark.parametrize("late", [False, True])
def test_captured_launches(capacity, late, backend, monkeypatch):
    """Replays find numbers the host never saw; the cursor gives the rollout, with and without a pool."""
    buf = make(backend, capacity=capacity, obs=3, final_obs_rows=N if late else 0)
    inputs, last = random_step(buf, ends=False), torch.zeros(N)
    how = {"timeout_bootstrap": "stored_value"} if late else {}
    if late:
        inputs |= {"truncated": torch.zeros(N), "final_obs": torch.zeros(N, 3)}
    with Graph(buf, monkeypatch) as graph:
        buf.append(**inputs)
    for rollout in range(6):
        for t in range(T):
            buf.advance(1)
            inputs["obs"].fill_(math.nan if rollout in (1, 2, 5) and t == 2 else 1.0)
            graph.replay()
        if rollout in (1, 2, 5):
            with pytest.raises(FloatingPointError, match=rf"^rollout {rollout}: obs: {3 * N} values .* 0 at step 2$"):
                buf.compute_gae(last, **how)
        else:
            buf.compute_gae(last, **how)
        buf.clear()


@pytest.mark.parametrize("check", [True, False])
def test_what_was_found_ends_with_its_rollout(check, backend, monkeypatch):
    """The rollout of a loaded state is scanned once, whoever reads the flags; so is one with NaN in an invalid step."""
    looked = []
    look = RolloutBuffer.non_finite
    monkeypatch.setattr(RolloutBuffer, "non_finite", lambda self: looked.append(self._ring.rollout) or look(self))
    buf = make(backend)
    buf.load_state_dict(make(backend).state_dict())
    for rollout in range(5):
        steps = steps_of(buf)
        if rollout == 2:
            steps[1]["valid"] = torch.ones(N)
            steps[1]["valid"][3], steps[1]["obs"]["a"][3] = 0, math.nan
        store(buf, steps)
        buf.compute_gae(torch.zeros(N), check=check)
        assert bool(buf.flags()[3]) == (not check and rollout in (0, 2))
        buf.clear()
    assert looked == ([0, 2] if check else [])
