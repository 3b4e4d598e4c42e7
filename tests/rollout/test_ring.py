"""The ring compared with a list of dicts after every operation, at every head position."""

from __future__ import annotations

import random

import pytest
import torch
from rollout_model import (
    SCALARS,
    RingModel,
    assert_close,
    fill,
    gae_loop,
    memory_bytes,
    random_step,
    stacked,
)

from pydrone import BufferFull, RolloutBuffer

N, T = 5, 4
CAPACITIES = [T, T + 1, T + 3, 2 * T, 3 * T - 1]
OBS = {"policy": 3, "camera": ((2, 3), torch.uint8), "half": (5, torch.bfloat16)}
FIELDS = {
    "mu": 2,
    "cost": ((), torch.float64),
    "flag": ((), torch.bool),
    "grid": ((2, 2), torch.int16),
    "thin": (3, torch.float16),
}


def make(capacity: int, backend: str, **options) -> RolloutBuffer:
    options = {"obs": OBS, "actions": ((), torch.int64), "fields": FIELDS} | options
    return RolloutBuffer(N, T, capacity=capacity, backend=backend, **options)


def same(view: torch.Tensor, expected: torch.Tensor) -> None:
    assert view.dtype == expected.dtype and torch.equal(view, expected)


def compare(buf: RolloutBuffer, model: RingModel) -> None:
    assert len(buf) == len(model.steps)
    assert buf.full == (len(model.steps) in range(T, 3 * T, T))
    steps = model.oldest
    if not steps:
        assert buf.rewards.shape == (N, 0) and buf["mu"].shape == (N, 0, 2)
        return
    for group in OBS:
        same(buf.obs[group], stacked(steps, "obs", group))
    for name in ("actions", "log_probs", *FIELDS):
        same(buf[name], stacked(steps, name))
    for name in ("rewards", "values", "actions", "log_probs"):
        same(getattr(buf, name), stacked(steps, name))
    same(buf["values"], buf.values)
    same(buf.dones, stacked(steps, "code").byte())
    same(buf.truncated, stacked(steps, "code") == 2)
    # A view if the rollout does not wrap, otherwise a copy.
    inside = {x.untyped_storage().data_ptr() for x in buf._storage.tensors.values()}
    for view in (buf.rewards, buf.values, buf.dones, buf["mu"], buf["cost"], buf.obs["camera"]):
        assert (view.untyped_storage().data_ptr() in inside) == (not model.wraps)


def step_of(buf: RolloutBuffer, g: torch.Generator) -> dict:
    """Random arguments with time-outs and reset steps among the ends."""
    step = random_step(buf, g=g)
    kind = torch.randint(0, 8, (N,), generator=g)
    step["dones"], step["truncated"], step["valid"] = (kind >= 5).int(), (kind == 6).float(), kind != 7
    step["code"] = torch.where(kind == 5, 1, torch.where(kind == 6, 2, torch.where(kind == 7, 3, 0)))
    return step


def write(buf: RolloutBuffer, step: dict, how: str) -> None:
    step = {name: x for name, x in step.items() if name != "code"}
    late = {name: step.pop(name) for name in ("rewards", "dones", "truncated", "valid")}
    if how == "append":
        buf.append(**step, **late)
    elif how == "begin":
        buf.begin(**step)
        for x in (*step["obs"].values(), step["values"]):
            x.zero_()  # an environment may overwrite them in step()
        buf.end(**late)
    else:
        slot = buf.slot()
        assert slot.keys() == {"obs", "actions", "values", "log_probs", *FIELDS}
        for name, x in step["obs"].items():
            slot["obs"][name].copy_(x)
        for name in slot.keys() - {"obs"}:
            slot[name].copy_(step[name])
        buf.end(**late)


def copied(step: dict) -> dict:
    return {k: {g: y.clone() for g, y in x.items()} if isinstance(x, dict) else x.clone() for k, x in step.items()}


def learn(buf: RolloutBuffer, model: RingModel, g: torch.Generator) -> None:
    """GAE and an epoch of minibatches of the oldest rollout, compared with the loop and the list."""
    steps = model.oldest
    last = torch.randn(N, generator=g)
    buf.compute_gae(last, 0.9, 0.8, timeout_bootstrap="stored_value")
    code = stacked(steps, "code")
    advantages, returns = gae_loop(
        *(stacked(steps, name) for name in ("rewards", "values", "dones")),
        last,
        0.9,
        0.8,
        truncated=code == 2,
        timeout_bootstrap="stored_value",
        valid=code != 3,
    )
    assert_close(buf.advantages, advantages)
    assert_close(buf.returns, returns)
    seen = []
    if not (code != 3).any():
        return
    for mb in buf.minibatches(min(3, int((code != 3).sum())), normalize_advantages=False):
        env, step = mb.indices // T, mb.indices % T
        seen += mb.indices.tolist()
        for group in OBS:
            stored = stacked(steps, "obs", group)[env, step]
            same(mb.obs[group], stored.float() if group == "half" else stored)
        for name in ("actions", *FIELDS):
            stored = stacked(steps, name)[env, step]
            same(mb[name], stored.float() if name == "thin" else stored)
        same(mb.values, stacked(steps, "values")[env, step])
        same(mb.log_probs, stacked(steps, "log_probs")[env, step])
        same(mb.advantages, buf.advantages[env, step])
        same(mb.returns, mb.advantages + mb.values)
    assert sorted(seen) == (code != 3).flatten().nonzero().squeeze(1).tolist()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("capacity", CAPACITIES)
def test_random_operations(capacity, seed, backend):
    rng, g = random.Random(seed), torch.Generator().manual_seed(seed)
    buf, model = make(capacity, backend), RingModel(T, capacity)
    heads, refused = set(), 0
    for _ in range(60 + 25 * capacity):
        operation = rng.choices(["append", "begin", "slot", "clear", "learn"], [5, 5, 5, 2, 1])[0]
        if operation == "clear":
            # Rarely in the middle of a rollout, or the ring would never move.
            if len(model.steps) < T and rng.random() < 0.8:
                continue
            buf.clear()
            model.clear()
        elif operation == "learn":
            if len(model.steps) < T:
                with pytest.raises(RuntimeError, match=rf"^compute_gae: expected a rollout of {T} steps"):
                    buf.compute_gae(torch.zeros(N))
                continue
            learn(buf, model, g)
        else:
            step = step_of(buf, g)
            kept = copied(step)
            if len(model.steps) == capacity:
                refused += 1
                before = memory_bytes(buf)
                with pytest.raises(BufferFull, match=rf"^the ring of {capacity} steps holds {capacity} "):
                    write(buf, step, operation)
                assert memory_bytes(buf) == before
            else:
                heads.add((model.first + len(model.steps)) % capacity)
                assert model.append(kept)
                write(buf, step, operation)
        compare(buf, model)
    assert heads == set(range(capacity)) and refused


@pytest.mark.parametrize("capacity", CAPACITIES)
def test_a_rollout_at_every_start(capacity, backend):
    """Every position a rollout can begin at, in turn, while the next rollout is being collected."""
    g = torch.Generator().manual_seed(capacity)
    buf, model = make(capacity, backend), RingModel(T, capacity)
    starts = set()
    for _ in range(2 * capacity):
        while len(model.steps) < capacity:
            step = step_of(buf, g)
            model.append(copied(step))
            write(buf, step, "append")
        compare(buf, model)
        starts.add(model.first % capacity)
        learn(buf, model, g)
        buf.clear()
        model.clear()
        compare(buf, model)
    assert starts == {k * T % capacity for k in range(capacity)}


def test_clear_in_the_middle_rewinds(backend):
    buf = make(2 * T, backend)
    fill(buf)
    buf.compute_gae(torch.zeros(N))
    buf.clear()
    fill(buf, 2)
    buf.clear()
    assert len(buf) == 0 and not buf.full
    steps = fill(buf)
    same(buf.rewards, stacked(steps, "rewards"))
    # clear() discards a full rollout and keeps the one being collected.
    more = fill(buf, 3)
    assert len(buf) == T + 3 and not buf.full
    buf.clear()
    assert len(buf) == 3
    same(buf.rewards, stacked(more, "rewards"))


def test_clear_discards_an_open_step(backend):
    buf = make(T, backend)
    step = random_step(buf)
    rewards, dones = step.pop("rewards"), step.pop("dones")
    buf.begin(**step)
    buf.clear()
    with pytest.raises(RuntimeError, match=r"^end: expected begin\(\) or slot\(\) before it"):
        buf.end(rewards=rewards, dones=dones)
    steps = fill(buf)
    same(buf["mu"], stacked(steps, "mu"))


def test_halves_out_of_order(backend):
    buf = make(T, backend)
    step = random_step(buf)
    late = {name: step.pop(name) for name in ("rewards", "dones")}
    with pytest.raises(RuntimeError, match=r"^end: expected begin\(\) or slot\(\) before it"):
        buf.end(**late)
    for first in (lambda: buf.begin(**step), buf.slot):
        first()
        for call, again in (
            ("begin", lambda: buf.begin(**step)),
            ("slot", buf.slot),
            ("append", lambda: buf.append(**step, **late)),
            ("state_dict", buf.state_dict),
            ("advance", lambda: buf.advance(1)),
        ):
            with pytest.raises(RuntimeError, match=rf"^{call}: expected end\(\) first, (begin|slot)\(\) has begun"):
                again()
        assert len(buf) == 0
        with pytest.raises(ValueError, match=r"^rewards: "):
            buf.end(rewards=late["rewards"][1:], dones=late["dones"])
        buf.end(**late)  # an error in between leaves the step open
        assert len(buf) == 1
        buf.clear()


def test_an_open_step_is_not_seen(backend):
    buf = make(2 * T, backend)
    steps = fill(buf, 2)
    step = random_step(buf)
    late = {name: step.pop(name) for name in ("rewards", "dones")}
    buf.begin(**step)
    assert len(buf) == 2 and not buf.full
    same(buf["mu"], stacked(steps, "mu"))
    same(buf.rewards, stacked(steps, "rewards"))
    buf.end(**late)
    same(buf["mu"], stacked([*steps, step], "mu"))
    same(buf.values, stacked([*steps, step], "values"))


def test_slot_writes_into_the_buffer_itself(backend):
    buf = make(T, backend)
    fill(buf, 1)
    slot = buf.slot()
    rows = buf._storage.tensors["rows"]
    for x in (*slot["obs"].values(), *(slot[name] for name in ("actions", "values", "log_probs", *FIELDS))):
        assert x.untyped_storage().data_ptr() == rows.untyped_storage().data_ptr()
        assert x.shape[0] == N
    assert slot["obs"]["camera"].shape == (N, 2, 3) and slot["obs"]["half"].dtype == torch.bfloat16


def test_full_ring_refuses_every_way_in(backend):
    buf = make(T, backend)
    fill(buf)
    step = random_step(buf)
    before = memory_bytes(buf)
    with pytest.raises(BufferFull, match=r"learn from the rollout and call clear\(\) first"):
        buf.append(**step)
    with pytest.raises(BufferFull):
        buf.begin(**{name: x for name, x in step.items() if name not in ("rewards", "dones")})
    with pytest.raises(BufferFull):
        buf.slot()
    with pytest.raises(BufferFull):
        buf.advance(1)
    assert memory_bytes(buf) == before and len(buf) == T
    buf.compute_gae(torch.zeros(N))  # computing discards nothing
    with pytest.raises(BufferFull):
        buf.append(**step)
    buf.clear()
    buf.append(**step)
    assert len(buf) == 1
    assert all(torch.equal(buf[name][:, 0], step[name]) for name in SCALARS if name != "rewards")
