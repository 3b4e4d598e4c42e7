"""The pool of final observations: value_fn gets the true final observation of each time-out once, and nothing else."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from rollout_model import assert_close, gae_loop, memory_bytes, random_step, stacked

from pydrone import BufferFull, RolloutBuffer
from pydrone.ops.dispatch import select


def step_of(obs: list[float], rewards: list[float], values: list[float], dones: list[int], **more) -> dict:
    n = len(obs)
    return {
        "obs": torch.tensor(obs, dtype=torch.float32).unsqueeze(1),
        "actions": torch.zeros(n, 1),
        "rewards": torch.tensor(rewards, dtype=torch.float32),
        "values": torch.tensor(values, dtype=torch.float32),
        "log_probs": torch.zeros(n),
        "dones": torch.tensor(dones),
    } | more


def test_by_hand(backend):
    """Two environments, two steps, gamma = lam = 1/2; V(x) = 10 x, so a final observation of 2 is worth 20.

    env 0: truncated at 0 with final observation 2: A0 = 1 + 20/2 - 2 = 9;  A1 = 3 + 8/2 - 4 = 3.
    env 1: continues at 0, truncated at 1 with 3: A1 = 1 + 30/2 - 6 = 10;  A0 = 2 + 6/2 - 4 + 10/4 = 7/2.
    """
    buf = RolloutBuffer(2, 2, obs=1, actions=1, backend=backend)
    nan = math.nan
    final = torch.tensor([[2.0], [nan]])
    buf.append(**step_of([0, 0], [1, 2], [2, 4], [1, 0], truncated=torch.tensor([1, 0]), final_obs=final))
    final = torch.tensor([[nan], [3.0]])
    buf.append(**step_of([0, 0], [3, 1], [4, 6], [0, 1], truncated=torch.tensor([0, 1]), final_obs=final))
    calls = []

    def value_fn(obs):
        calls.append(sorted(obs.flatten().tolist()))
        assert not torch.is_grad_enabled()
        return 10 * obs

    buf.compute_gae(torch.tensor([8.0, nan]), 0.5, 0.5, value_fn=value_fn)
    assert buf.advantages.tolist() == [[9, 3], [3.5, 10]]
    assert buf.returns.tolist() == [[11, 7], [7.5, 16]]
    assert calls == [[2, 3]]
    assert buf.dones.tolist() == [[2, 0], [0, 2]]


def test_a_final_value_that_is_missing_is_no_number(backend):
    """Calls the operation directly, as with ``check=False`` on a GPU, with indices outside the pool."""
    zeros, (stats, workspace) = torch.zeros(3, 2), torch.zeros(2, 10, dtype=torch.float64)
    codes, rows = torch.tensor([[2, 0]] * 3, dtype=torch.uint8), torch.tensor([[0, 0], [1, 0], [-1, 0]]).int()
    advantages, returns = torch.zeros(3, 2), torch.zeros(3, 2)
    select(zeros.device, backend).gae(
        *(zeros, zeros, codes, None, None, torch.zeros(3), torch.ones(1), rows, 0.5, 0.5, 0, True, 1, None),
        *(advantages, returns, stats[:3], workspace),
    )
    assert advantages[0].tolist() == [0.5, 0]
    assert advantages.isnan().tolist() == returns.isnan().tolist() == [[False, False], [True, False], [True, False]]


def timed_out_step(buf: RolloutBuffer, rate: float = 0.3, **options) -> dict:
    """A random step with time-outs, terminations and both at once; NaN where final observations must not be read."""
    made = random_step(buf)
    kind = torch.rand(buf.num_envs)
    made["truncated"] = kind < rate
    made["dones"] = kind < 1.5 * rate
    valid = torch.rand(buf.num_envs) > 0.1
    if options.get("valid"):
        made["valid"] = valid
    read = made["truncated"] & (valid if options.get("valid") else True)
    final = random_step(buf)["obs"]
    groups = final if isinstance(final, dict) else {"obs": final}
    for x in groups.values():
        x[~read] = math.nan if x.is_floating_point() else 0
    made["final_obs"] = final
    return made


def value(obs) -> torch.Tensor:
    """A value that differs between observations."""
    if isinstance(obs, dict):
        return sum((k + 1) * x.float().flatten(1).mean(1) for k, x in enumerate(obs.values()))
    return obs.float().flatten(1).mean(1)


def rows_of(groups: dict[str, torch.Tensor]) -> list[list[float]]:
    return sorted(torch.cat([x.double().flatten(1) for x in groups.values()], 1).tolist())


def check(buf: RolloutBuffer, steps: list[dict]) -> None:
    """Compares compute_gae with value_fn to the loop with dense final values, and value_fn's inputs as a multiset."""
    grouped = isinstance(steps[0]["obs"], dict)
    truncated = stacked(steps, "truncated")
    valid = stacked(steps, "valid") if "valid" in steps[0] else torch.ones_like(truncated)
    dense = torch.stack([value(s["final_obs"]) for s in steps], 1)
    picked = [(n, t) for n, t in (truncated & valid).nonzero().tolist()]
    shown = []

    def value_fn(obs):
        shown.append(obs)
        return value(obs).unsqueeze(1)

    last = torch.randn(buf.num_envs)
    buf.compute_gae(last, 0.9, 0.8, value_fn=value_fn)
    assert len(shown) == bool(picked)
    if picked:
        groups = shown[0] if grouped else {"obs": shown[0]}
        for name, x in groups.items():
            stored = buf.layout.fields[f"obs.{name}"].dtype
            assert x.dtype == (torch.float32 if stored in (torch.float16, torch.bfloat16) else stored)
            assert x.shape == (len(picked), *buf.layout.obs[name][0])
        wanted = {}
        for name, x in groups.items():
            finals = [steps[t]["final_obs"] for _, t in picked]
            finals = [f[name] if grouped else f for f in finals]
            wanted[name] = torch.stack([f[n] for f, (n, _) in zip(finals, picked)]).to(x.dtype)
        assert rows_of(wanted) == rows_of(groups)
    expected = gae_loop(
        *(stacked(steps, name) for name in ("rewards", "values", "dones")),
        last,
        0.9,
        0.8,
        truncated=truncated,
        final_values=dense,
        valid=valid,
    )
    assert_close(buf.advantages, expected[0])
    assert_close(buf.returns, expected[1])
    computed = buf.advantages.clone()
    buf.compute_gae(last, 0.9, 0.8, final_values=dense)
    assert_close(buf.advantages, computed)


@pytest.mark.parametrize("obs", [1, 17, (2, 3), {"state": 5, "camera": ((3, 4, 4), torch.uint8)}], ids=str)
@pytest.mark.parametrize("capacity", [6, 7, 9, 12, 17])
@pytest.mark.parametrize("valid", [False, True])
def test_against_dense_values(obs, capacity, valid, backend):
    """Successive rollouts at every start position; the next is partly collected before the present one is computed."""
    buf = RolloutBuffer(33, 6, obs=obs, actions=1, capacity=capacity, final_obs_rows=33 * 6, backend=backend)
    steps = []
    for _ in range(5):
        while len(buf) < capacity:
            steps.append(timed_out_step(buf, valid=valid))
            buf.append(**steps[-1])
        check(buf, steps[:6])
        buf.clear()
        del steps[:6]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_storage_keeps_final_observations_whole(dtype, backend):
    buf = RolloutBuffer(33, 6, obs=17, actions=1, obs_dtype=dtype, final_obs_rows=33 * 6, backend=backend)
    steps = [random_step(buf) for _ in range(6)]
    for made in steps:
        made |= {"obs": torch.randn(33, 17), "final_obs": torch.randn(33, 17)}
        made["truncated"] = made["dones"].clone()
        buf.append(**made)
    check(buf, steps)


def test_pools_of_two_rollouts(backend):
    """The second rollout's time-outs are collected before the first one is computed: neither sees the other's."""
    buf = RolloutBuffer(8, 3, obs=1, actions=1, capacity=6, final_obs_rows=24, backend=backend)
    steps = [timed_out_step(buf, rate=0.6) for _ in range(9)]
    for made in steps[:6]:
        buf.append(**made)
    check(buf, steps[:3])
    buf.clear()
    for made in steps[6:]:
        buf.append(**made)
    check(buf, steps[3:6])
    buf.clear()
    check(buf, steps[6:])


def test_in_two_halves_and_strided(backend):
    buf = RolloutBuffer(8, 3, obs={"a": 3, "b": ((2, 2), torch.uint8)}, actions=1, final_obs_rows=24, backend=backend)
    steps = [timed_out_step(buf, rate=0.5) for _ in range(3)]
    for made in steps:
        late = {k: made[k] for k in ("rewards", "dones", "truncated")}
        buf.begin(**{k: made[k] for k in ("obs", "actions", "values", "log_probs")})
        a, b = made["final_obs"]["a"], made["final_obs"]["b"]
        strided = {"b": b.movedim(1, 2).contiguous().movedim(2, 1), "a": a.double().t().contiguous().t()}
        buf.end(**late, final_obs=strided)
    check(buf, steps)


def all_late(buf: RolloutBuffer, count: int) -> dict:
    made = random_step(buf)
    late = torch.arange(buf.num_envs) < count
    return made | {"truncated": late, "dones": late, "final_obs": torch.ones(buf.num_envs, 2)}


def make(backend: str, **options) -> RolloutBuffer:
    return RolloutBuffer(6, 4, **{"obs": 2, "actions": 1, "backend": backend} | options)


@pytest.mark.parametrize(
    "options, room",
    [
        ({}, 6),
        ({"max_episode_length": 100}, 6),
        ({"max_episode_length": 4}, 12),
        ({"max_episode_length": 2}, 18),
        ({"max_episode_length": 1}, 24),
        ({"final_obs_rows": 5}, 5),
        ({"final_obs_rows": 100}, 100),
    ],
    ids=str,
)
def test_room_and_overflow(options, room, backend):
    """N * (1 + T // max_episode_length) rows by default; one more time-out raises an error that says so."""
    buf = make(backend, **options)
    assert buf._storage.tensors["final_obs"].shape[:2] == (1, room)
    counts = [min(6, max(0, min(room, 24) - 6 * t)) for t in range(4)]
    for count in counts:
        buf.append(**all_late(buf, count))
    buf.compute_gae(torch.zeros(6), value_fn=value)
    assert buf.advantages.isfinite().all()
    if room >= 24:
        return
    buf.clear()
    extra = next(t for t in range(4) if counts[t] < 6)
    counts[extra] += 1
    for count in counts:
        buf.append(**all_late(buf, count))
    before = memory_bytes(buf)
    with pytest.raises(RuntimeError, match=rf"^final_obs: {room + 1} truncations .* room for {room}: .*final_obs_rows"):
        buf.compute_gae(torch.zeros(6), value_fn=value)
    with pytest.raises(RuntimeError, match=rf"^final_obs: {room + 1} truncations"):
        buf.check()
    assert memory_bytes(buf) == before
    buf.compute_gae(torch.zeros(6), timeout_bootstrap="stored_value")  # needs no pool
    buf.clear()
    buf.append(**all_late(buf, 1))
    for _ in range(3):
        buf.append(**random_step(buf))
    buf.compute_gae(torch.zeros(6), value_fn=value)  # the overflow is forgotten with its rollout
    assert buf.advantages.isfinite().all()


def test_a_truncation_without_its_observation(backend):
    buf = make(backend)
    for t in range(4):
        made = all_late(buf, 2 if t else 0)
        if t == 2:
            del made["final_obs"]
        buf.append(**made)
    before = memory_bytes(buf)
    for call in (lambda: buf.compute_gae(torch.zeros(6), value_fn=value), buf.check):
        with pytest.raises(RuntimeError, match=r"^final_obs: 2 truncations of this rollout came without a final obs"):
            call()
    assert memory_bytes(buf) == before
    with pytest.raises(RuntimeError, match=r"^advantages: "):
        buf.advantages  # noqa: B018
    buf.compute_gae(torch.zeros(6), timeout_bootstrap="next_value")


def test_flags_without_any_truncation(backend):
    buf = make(backend)
    for _ in range(4):
        buf.append(**all_late(buf, 0))
    buf.compute_gae(torch.zeros(6), value_fn=lambda obs: pytest.fail("nothing to evaluate"))
    assert buf.advantages.isfinite().all()


def test_no_pool(backend):
    buf = make(backend, final_obs_rows=0)
    assert "final_obs" not in buf._storage.tensors
    made = all_late(buf, 3)
    with pytest.raises(ValueError, match=r"^final_obs: this buffer has no pool for them.*final_obs_rows > 0"):
        buf.append(**made)
    del made["final_obs"]
    for _ in range(4):
        buf.append(**made)
    with pytest.raises(ValueError, match=r"^value_fn: this buffer has no pool"):
        buf.compute_gae(torch.zeros(6), value_fn=value)
    buf.compute_gae(torch.zeros(6), final_values=torch.zeros(6, 4))


def test_a_value_fn_of_the_wrong_shape(backend):
    buf = make(backend)
    for _ in range(4):
        buf.append(**all_late(buf, 1))
    with pytest.raises(ValueError, match=r"^value_fn's result: expected shape \[4\] or \[4, 1\], got \[4, 2\]$"):
        buf.compute_gae(torch.zeros(6), value_fn=lambda obs: obs)
    with pytest.raises(TypeError, match=r"^value_fn's result: expected a tensor, got NoneType$"):
        buf.compute_gae(torch.zeros(6), value_fn=lambda obs: None)
    with pytest.raises(TypeError, match=r"^value_fn's result: expected a floating dtype"):
        buf.compute_gae(torch.zeros(6), value_fn=lambda obs: obs[:, 0].long())


def test_truncations_that_are_not_in_the_pool_take_their_stored_value_where_that_is_asked_for(backend):
    """gamma = 1/2, lam = 0, V(final) = 10: A = 1 + 10/2 - V where it is in the pool, 1 + V/2 - V elsewhere.

    Two rows of room; step 0 truncates without an observation, step 1 twice with one, step 2 once more.
    """
    buf = RolloutBuffer(2, 3, obs=1, actions=1, final_obs_rows=2, backend=backend)
    final = torch.ones(2, 1)
    buf.append(**step_of([0, 0], [1, 1], [4, 8], [1, 0], truncated=torch.tensor([1, 0])))
    buf.append(**step_of([0, 0], [1, 1], [2, 6], [1, 1], truncated=torch.tensor([1, 1]), final_obs=final))
    buf.append(**step_of([0, 0], [1, 1], [12, 3], [1, 1], truncated=torch.tensor([1, 0]), final_obs=final))
    how = {"value_fn": lambda obs: 10 * obs, "without_final_obs": "stored_value"}
    buf.compute_gae(torch.zeros(2), 0.5, 0.0, **how)
    assert buf.advantages.tolist() == [[-1, 4, -5], [1 + 6 / 2 - 8, 0, -2]]
    buf.check()
    assert buf.flags()[1:3].tolist() == [3, 1]
    for call in (lambda: buf.compute_gae(torch.zeros(2), 0.5, 0.0, value_fn=how["value_fn"]), buf.check):
        with pytest.raises(RuntimeError, match=r"^final_obs: 1 truncations of this rollout came without"):
            call()
    with pytest.raises(ValueError, match=r"^without_final_obs: expected 'error' or 'stored_value', got 'zero'"):
        buf.compute_gae(torch.zeros(2), value_fn=how["value_fn"], without_final_obs="zero")


def test_none_in_the_pool(backend):
    buf = make(backend)
    made = all_late(buf, 3)
    del made["final_obs"]
    for _ in range(4):
        buf.append(**made)
    unused = {"value_fn": lambda obs: pytest.fail("nothing to evaluate"), "without_final_obs": "stored_value"}
    buf.compute_gae(torch.zeros(6), **unused)
    found = buf.advantages.clone()
    buf.compute_gae(torch.zeros(6), timeout_bootstrap="stored_value")
    assert torch.equal(found, buf.advantages)


@pytest.mark.parametrize("capacity", [4, 8, 6])
def test_a_pool_grows_and_keeps_what_it_holds(capacity, backend):
    """In the middle of a rollout, and with another one in the ring."""
    buf = RolloutBuffer(6, 4, obs={"a": 3, "b": ((2,), torch.uint8)}, actions=1, capacity=capacity, backend=backend)
    for _ in range(3):
        steps = []
        for t in range(4):
            used = sum(int(x["truncated"].sum()) for x in steps)
            assert buf.final_obs_used == used
            steps.append(timed_out_step(buf, 0.7))
            now = used + int(steps[-1]["truncated"].sum())
            if now > buf.layout.final_obs_rows:
                buf.grow_final_obs(now)
                assert buf.nbytes == sum(x.nbytes for x in buf.layout.allocations())
            if t % 2:
                buf.append(**steps[-1])
            else:
                late = {name: steps[-1].pop(name) for name in ("rewards", "dones", "truncated", "final_obs")}
                buf.begin(**steps[-1])
                buf.end(**late)
                steps[-1] |= late
        assert buf.layout.final_obs_rows > 6
        check(copy.deepcopy(buf), steps)
        check(buf, steps)
        buf.clear()
    rows = buf.layout.final_obs_rows
    buf.grow_final_obs(1)
    assert buf.layout.final_obs_rows == rows
    for wrong in (0, 2.0, True):
        with pytest.raises((TypeError, ValueError), match=r"^rows: "):
            buf.grow_final_obs(wrong)
    with pytest.raises(ValueError, match=r"^rows: this buffer has no pool"):
        make(backend, final_obs_rows=0).grow_final_obs(3)


def test_rewinding_empties_the_pool(backend):
    buf = make(backend)
    for _ in range(3):
        buf.append(**all_late(buf, 3))
        buf.clear()
    steps = [all_late(buf, 1) for _ in range(4)]
    for made in steps:
        buf.append(**made)
    check(buf, steps)


def test_check_requires_final_observations_only_if_the_pool_was_used(backend):
    """Time-outs without final observations are fine with another bootstrap, then and later."""
    buf = RolloutBuffer(3, 2, obs=1, actions=1, backend=backend)
    ones, step = torch.ones(3), {"obs": torch.ones(3, 1), "actions": torch.ones(3, 1)}
    for _ in range(2):
        buf.append(rewards=ones, dones=ones, values=ones, log_probs=ones, truncated=ones, **step)
    buf.compute_gae(ones, timeout_bootstrap="stored_value")
    buf.check()
    assert buf.flags().tolist()[:3] == [0, 0, 0]
    with pytest.raises(RuntimeError, match="6 truncations of this rollout came without"):
        buf.compute_gae(ones, value_fn=lambda obs: obs.squeeze(1))
    assert buf.flags().tolist()[:3] == [0, 0, 6]
    with pytest.raises(RuntimeError, match="6 truncations of this rollout came without"):
        buf.check()
    buf.check([0, 3, 0, 0, 0])
    with pytest.raises(RuntimeError, match="4 truncations in this rollout, the pool has room for 3"):
        buf.check([0, 4, 0, 0, 0])
    with pytest.raises(BufferFull):
        buf.check([1, 0, 0, 0, 0])
