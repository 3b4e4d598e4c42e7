"""The state of a RolloutBuffer between calls: memory, autograd versions, inference mode, state dicts, copies."""

from __future__ import annotations

import copy
import gc
import pickle
import resource
import sys
import tracemalloc

import pytest
import torch
from rollout_model import fill, memory_bytes, random_step

from pydrone import RolloutBuffer

OPTIONS = {"obs": {"a": 3, "b": ((2, 2), torch.uint8)}, "actions": 2, "fields": {"mu": 2}}


def make(backend: str | None, **options) -> RolloutBuffer:
    return RolloutBuffer(**{"num_envs": 6, "num_steps": 4, "backend": backend} | OPTIONS | options)


def iteration(buf: RolloutBuffer, g: torch.Generator, epochs: int = 2, **options) -> list[torch.Tensor]:
    """One iteration: collect, compute, read all minibatches, discard. Returns all outputs."""
    late = torch.zeros(buf.num_envs, dtype=torch.bool)
    late[0] = True
    while not buf.full:
        step = random_step(buf, g=g)
        buf.append(**step, truncated=late & step["dones"], final_obs=random_step(buf, g=g)["obs"])
    buf.compute_gae(torch.randn(buf.num_envs, generator=g), value_fn=lambda obs: obs["a"].sum(1))
    out = [buf.advantages.clone(), buf.statistics.clone()]
    for mb in buf.minibatches(3, epochs, **options):
        out += [x.clone() for x in (mb.obs["a"], mb.obs["b"], mb["mu"], mb.advantages, mb.returns, mb.indices)]
    buf.clear()
    return out


# ---------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"obs": 17, "actions": 4, "fields": None},
        {"capacity": 7},
        {"capacity": 12, "max_episode_length": 3},
        {"final_obs_rows": 0},
        {"num_envs": 1, "num_steps": 1},
        {"num_envs": 65, "obs": (3, 5), "actions": ((), torch.int64), "obs_dtype": torch.bfloat16},
    ],
    ids=str,
)
def test_bytes_are_those_of_the_plan(options, backend):
    buf = make(backend, **options)
    assert buf.nbytes == sum(made.nbytes for made in buf.layout.allocations())
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in buf._storage.tensors.values()}
    assert buf.nbytes == sum(storages.values()) and len(storages) == len(buf._storage.tensors)
    assert {made.name for made in buf.layout.allocations()} == set(buf._storage.tensors)


def test_the_table_of_the_task():
    """8192 x 100, 17 observations, 4 actions: rows of 128 bytes with mean, std and row number; 96 without them."""
    from pydrone.rollout.layout import Layout

    def rows(**options) -> int:
        return Layout(8192, 100, 17, 4, **options).row_bytes

    # 17 + 4 + value + log-probability = 23 words of 4 bytes = 92, + the pool's row number = 96; + 4 + 4 = 128.
    assert rows() == rows(final_obs_rows=0) == 96
    assert rows(fields={"mu": 4, "std": 4}) == 128


def pointers(buf: RolloutBuffer) -> list[int]:
    return [x.data_ptr() for x in (*buf._storage.tensors.values(), *buf._storage.views.values())]


def test_memory_is_constant_over_301_iterations():
    buf = make(None, num_envs=256, num_steps=3, capacity=5)
    g = torch.Generator().manual_seed(0)
    for _ in range(101):
        iteration(buf, g, epochs=1, reuse=True)
    before, size = pointers(buf), buf.nbytes
    gc.collect()
    tracemalloc.start()
    try:
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for _ in range(200):
            iteration(buf, g, epochs=1, reuse=True)
        gc.collect()
        grown = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert pointers(buf) == before and buf.nbytes == size
    assert buf._ring.appended == 301 * 3
    assert grown < 49152  # bytes of Python objects, mostly interpreter caches
    # If each iteration leaked its rollout (768 samples in rows of 64 bytes), this would be 10 MB.
    unit = 1024 if sys.platform == "linux" else 1
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - resident) * unit < 4e6


def test_live_tensors_do_not_grow(backend):
    buf = make(backend)
    g = torch.Generator().manual_seed(0)

    def alive() -> int:
        gc.collect()
        return sum(type(x) is torch.Tensor for x in gc.get_objects())

    iteration(buf, g)
    first = alive()
    for _ in range(5):
        iteration(buf, g)
    assert alive() <= first


def test_reused_minibatches_are_counted(backend):
    buf = make(backend)
    fill(buf)
    buf.compute_gae(torch.zeros(6))
    plan = buf.nbytes
    list(buf.minibatches(3))
    assert buf.nbytes == plan
    list(buf.minibatches(3, reuse=True))
    # Eight samples of 3 + 2 + 2 + (value, log-prob, advantage, return) = 11 floats, and four bytes.
    assert buf.nbytes == plan + 8 * (11 * 4 + 4)
    list(buf.minibatches(3, reuse=True))
    assert buf.nbytes == plan + 8 * (11 * 4 + 4)


# ---------------------------------------------------------------------------------------------- autograd

SAVED = {
    "advantages": lambda buf: buf.advantages,
    "returns": lambda buf: buf.returns,
    "rewards": lambda buf: buf.rewards,
    "values": lambda buf: buf.values,
    "obs": lambda buf: buf.obs["a"],
    "mu": lambda buf: buf["mu"],
}


def product(x: torch.Tensor) -> torch.Tensor:
    """A scalar whose backward pass needs the present contents of ``x``."""
    weight = torch.ones_like(x, requires_grad=True)
    return (weight * x).sum()


@pytest.mark.parametrize("name", SAVED)
def test_overwriting_what_autograd_saved_is_an_error(name, backend):
    buf = make(backend)
    fill(buf)
    buf.compute_gae(torch.zeros(6))
    loss = product(SAVED[name](buf))
    loss.backward()
    loss = product(SAVED[name](buf))
    if name in ("advantages", "returns"):
        buf.compute_gae(torch.ones(6))
    else:
        buf.clear()
        buf.append(**random_step(buf))
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("count", [1, 3, 5])
def test_overwriting_a_reused_minibatch_is_an_error(count, backend):
    buf = make(backend)
    fill(buf)
    buf.compute_gae(torch.zeros(6))
    for name in ("obs", "advantages", "returns", "mu", "values"):
        reading = buf.minibatches(count, 2, reuse=True)
        mb = next(reading)
        loss = product(mb.obs["a"] if name == "obs" else mb[name])
        next(reading)
        with pytest.raises(RuntimeError, match=r"modified by an inplace operation"):
            loss.backward()
        mb = next(buf.minibatches(count))
        loss = product(mb.obs["a"] if name == "obs" else mb[name])
        list(buf.minibatches(count))
        loss.backward()  # fresh tensors belong to the caller


def test_slot_views_and_their_version(backend):
    buf = make(backend)
    loss = product(buf.slot()["actions"])
    step = random_step(buf)
    buf.end(rewards=step["rewards"], dones=step["dones"])
    buf.clear()
    buf.append(**step)
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation"):
        loss.backward()


def test_collected_in_inference_mode_and_trained_on_later(backend):
    with torch.inference_mode():
        buf = make(backend)
        fill(buf)
        buf.compute_gae(torch.zeros(6), value_fn=None)
        first = list(buf.minibatches(2, reuse=True))
    held = (*buf._storage.tensors.values(), *buf._storage.views.values(), buf.obs["a"], buf.advantages)
    assert not any(x.is_inference() for x in held)
    assert not any(x.is_inference() for mb in first for x in (mb.obs["a"], mb.advantages))
    product(buf.advantages).backward()
    product(buf.obs["a"]).backward()
    for reuse in (True, False):
        for mb in buf.minibatches(2, 2, reuse=reuse):
            product(mb.obs["a"] * 2 + mb.advantages.unsqueeze(1)).backward()
    buf.clear()
    fill(buf)
    with torch.inference_mode():
        buf.compute_gae(torch.zeros(6))
    loss = product(buf.returns)
    with torch.inference_mode():
        buf.compute_gae(torch.ones(6))
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation"):
        loss.backward()


# ---------------------------------------------------------------------------------------------- state, copies


@pytest.mark.parametrize("when", ["empty", "open rollout", "full", "computed", "between epochs", "wrapped"])
def test_state_dict_goes_on_bit_for_bit(when, backend):
    buf = make(backend, capacity=6, seed=3, rank=1)
    g = torch.Generator().manual_seed(1)
    if when != "empty":
        for _ in range(4 if when == "wrapped" else 1):
            iteration(buf, g)
    if when in ("full", "computed", "between epochs", "wrapped"):
        fill(buf, g=g)
    if when in ("open rollout", "wrapped"):
        fill(buf, 2, g=g)
    if when in ("computed", "between epochs"):
        buf.compute_gae(torch.zeros(6))
    if when == "between epochs":
        list(buf.minibatches(2, 3))
    other = make(backend, capacity=6, seed=3, rank=1)
    fill(other)  # previous contents do not matter
    state = {k: x.clone() if isinstance(x, torch.Tensor) else copy.copy(x) for k, x in buf.state_dict().items()}
    other.load_state_dict(state)
    assert len(other) == len(buf) and other.full == buf.full
    if when in ("computed", "between epochs"):
        assert torch.equal(other.advantages, buf.advantages)
        assert next(other.minibatches(1)).indices.tolist() == next(buf.minibatches(1)).indices.tolist()
        for x in (buf, other):
            x.clear()
    elif when in ("full", "wrapped"):
        for x in (buf, other):
            x.compute_gae(torch.zeros(6))
            x.clear()
    states = [g.get_state() for _ in range(2)]
    for _ in range(3):
        results = []
        for i, x in enumerate((buf, other)):
            g.set_state(states[i])
            results.append(iteration(x, g))
            states[i] = g.get_state()
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_state_is_saved_and_loaded_by_torch(tmp_path, backend):
    buf = make(backend)
    fill(buf)
    buf.compute_gae(torch.zeros(6))
    torch.save(buf.state_dict(), tmp_path / "state.pt")
    other = make(backend)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(other.advantages, buf.advantages) and torch.equal(other.obs["b"], buf.obs["b"])


def test_a_state_that_does_not_fit_changes_nothing(backend):
    buf = make(backend)
    fill(buf, 3)
    before, length = memory_bytes(buf), len(buf)
    for options in ({"num_steps": 5}, {"num_envs": 7}, {"capacity": 8}, {"obs": 187}, {"final_obs_rows": 0}):
        other = make(backend, **options)
        fill(other)
        with pytest.raises(ValueError, match=r"^state_dict: "):
            buf.load_state_dict(other.state_dict())
        assert memory_bytes(buf) == before and len(buf) == length
    state = buf.state_dict()
    del state["epoch"]
    with pytest.raises(ValueError, match=r"^state_dict: expected the keys .*'epoch'"):
        buf.load_state_dict(state)
    assert memory_bytes(buf) == before and len(buf) == length


@pytest.mark.parametrize(
    "options",
    [{"obs": 3, "actions": 2}, {"actions": ((3,), torch.int32)}, {"fields": {"std": 2}}, {"obs": {"a": 1, "b": 1}}],
    ids=str,
)
def test_a_state_of_other_fields_is_refused_though_rows_are_as_long(options, backend):
    """A row of 2 + 3 floats is as long as one of 3 + 2: unchecked, the fields would be mixed up silently."""
    base = {"obs": 2, "actions": 3, "fields": {"mu": 2}, "final_obs_rows": 0}
    one, other = make(backend, **base), make(backend, **base | options)
    fill(one)
    assert one._storage.rows.shape == other._storage.rows.shape
    with pytest.raises(ValueError, match=r"^state_dict: "):
        other.load_state_dict(one.state_dict())


def test_to_its_own_device_is_itself(backend):
    buf = make(backend)
    assert buf.to("cpu") is buf and buf.to(torch.device("cpu")) is buf


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda buf: pickle.loads(pickle.dumps(buf))])
def test_a_copy_is_another_buffer(backend, duplicate):
    buf = make(backend, seed=7)
    fill(buf)
    buf.compute_gae(torch.zeros(6))
    other = duplicate(buf)
    assert not set(pointers(buf)) & set(pointers(other))
    assert [mb.indices.tolist() for mb in buf.minibatches(2)] == [mb.indices.tolist() for mb in other.minibatches(2)]
    before = memory_bytes(buf)
    other.clear()
    steps = fill(other)
    assert memory_bytes(buf) == before and len(buf) == 4
    assert torch.equal(other["mu"][:, 0], steps[0]["mu"]) and torch.equal(other.values[:, 3], steps[3]["values"])


def test_two_buffers_do_not_meet(backend):
    """Two interleaved buffers give the same results as each on its own."""

    def run(numbers: tuple[int, ...]) -> dict[int, list[torch.Tensor]]:
        buffers = {i: make(backend, seed=i, capacity=5 + i) for i in numbers}
        generators = {i: torch.Generator().manual_seed(i) for i in numbers}
        results = {i: [] for i in numbers}
        for _ in range(3):
            for i in numbers:
                results[i] += iteration(buffers[i], generators[i])
        return results

    together = run((0, 1))
    for i in (0, 1):
        assert all(torch.equal(x, y) for x, y in zip(run((i,))[i], together[i], strict=True))


def test_repr_and_truth(backend):
    buf = make(backend, capacity=8)
    text = repr(buf)
    for part in (
        "num_envs=6",
        "num_steps=4",
        "'a': [3]",
        "capacity=8",
        "'cpu'",
        f"backend={backend!r}",
        "steps=0",
        "mu",
    ):
        assert part in text
    fill(buf, 3)
    assert "steps=3" in repr(buf) and len(buf) == 3
