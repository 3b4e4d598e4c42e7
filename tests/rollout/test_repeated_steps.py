"""Steps like earlier ones, which the CPU library takes without PyTorch's dispatcher (pydrone/ops/prepared.py)."""

from __future__ import annotations

import copy
import os
import pickle
import threading
import weakref

import pytest
import torch
from rollout_model import memory_bytes, random_like, random_step
from torch._subclasses.fake_tensor import FakeTensorMode

import pydrone
from pydrone import RolloutBuffer
from pydrone.rollout.steps import MOST

pytestmark = pytest.mark.skipif(pydrone.backends()["cpu"] is not None, reason=f"cpu: {pydrone.backends()['cpu']}")

OBS = {"policy": 17, "camera": ((2, 3), torch.uint8), "half": (5, torch.bfloat16)}
FIELDS = {"mu": 4, "cost": ((), torch.float64), "mask": ((3,), torch.bool), "grid": ((2, 2), torch.int16)}
PARTS = {"plain": (), "final": ("truncated", "final_obs"), "all": ("truncated", "final_obs", "valid")}


def watched(buf: RolloutBuffer, repeats: bool = True) -> list[int]:
    """Counts the steps that the operation stores, not a repetition; without ``repeats`` all of them."""
    ops, stored = buf._storage.ops, []

    def append(*arguments) -> None:
        ops.append(*arguments)
        stored.append(arguments[6])

    buf._storage.ops = ops._replace(append=append, **({} if repeats else {"prepare_append": None}))
    return stored


def step_of(buf: RolloutBuffer, *parts: str) -> dict[str, object]:
    step = random_step(buf)
    if "truncated" in parts:
        step["truncated"] = torch.rand(buf.num_envs) < 0.4
    if "final_obs" in parts:
        step["final_obs"] = random_step(buf)["obs"]
    if "valid" in parts:
        step["valid"] = torch.rand(buf.num_envs) < 0.7
    return step


def changed(step: dict[str, object], change) -> dict[str, object]:
    return {
        name: {group: change(x) for group, x in given.items()} if isinstance(given, dict) else change(given)
        for name, given in step.items()
    }


def strided(x: torch.Tensor) -> torch.Tensor:
    return torch.stack([x, x], -1)[..., 0]


def widened(x: torch.Tensor) -> torch.Tensor:
    return x.double() if x.is_floating_point() else x


def columns(x: torch.Tensor) -> torch.Tensor:
    return x[:, None] if x.dim() == 1 else x


CHANGES = {"dense": lambda x: x, "strided": strided, "float64": widened, "[N, 1]": columns}


def whole(buf: RolloutBuffer, step: dict) -> None:
    buf.append(**step)


def halves(buf: RolloutBuffer, step: dict) -> None:
    ends = {"rewards", "dones", "truncated", "final_obs", "valid"}
    buf.begin(**{name: x for name, x in step.items() if name not in ends})
    buf.end(**{name: x for name, x in step.items() if name in ends})


def in_place(buf: RolloutBuffer, step: dict) -> None:
    slot = buf.slot()
    for group, x in slot.pop("obs").items():
        x.copy_(step["obs"][group])
    for name, x in slot.items():
        x.copy_(step[name].view(x.shape))
    buf.end(**{x: step[x] for x in ("rewards", "dones", "truncated", "final_obs", "valid") if x in step})


@pytest.mark.parametrize("store", [whole, halves, in_place])
@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("num_envs", [1, 7, 300])
def test_a_repeated_step_is_stored_as_the_operation_stores_it(num_envs, change, parts, store):
    ours, theirs = (
        RolloutBuffer(num_envs, 5, OBS, ((), torch.int64), capacity=7, fields=FIELDS, max_episode_length=2)
        for _ in range(2)
    )
    by_operation, always = watched(ours), watched(theirs, repeats=False)
    for x in (ours, theirs):
        for tensor in x._storage.tensors.values():
            if tensor.dtype == torch.uint8:
                tensor.fill_(0xA5)
    torch.manual_seed(num_envs)
    found = 0
    for t in range(12):
        step = changed(step_of(ours, *PARTS[parts]), CHANGES[change])
        if t in (3, 9):
            step["obs"]["policy"][-1, -1] = float("nan")
        for buf in (ours, theirs):
            if buf.full:
                buf.clear()
            store(buf, step)
        assert memory_bytes(ours) == memory_bytes(theirs), t
        found += t in (3, 9) and int(ours._storage.not_finite.sum())
    kinds = 2 if store is halves else 1
    assert len(by_operation) == kinds and len(always) == 12 * kinds
    assert found == (0 if store is in_place else 2)


def test_kinds_of_steps_in_turn():
    ours, theirs = (RolloutBuffer(9, 24, obs=3, actions=2, max_episode_length=2) for _ in range(2))
    by_operation, _ = watched(ours), watched(theirs, repeats=False)
    for t in range(24):
        step = step_of(ours, *[*PARTS.values(), ("valid",)][t % 4])
        for buf in (ours, theirs):
            (whole if t % 8 < 4 else halves)(buf, step)
        assert memory_bytes(ours) == memory_bytes(theirs), t
    # halves: one beginning, and four ends
    assert len(by_operation) == 4 + 5


def prepared(num_envs: int = 4, num_steps: int = 6, **options) -> tuple[RolloutBuffer, list[int]]:
    """A buffer that repeats steps of one kind."""
    buf = RolloutBuffer(num_envs, num_steps, **{"obs": 3, "actions": 2, **options})
    stored = watched(buf)
    for _ in range(2):
        buf.append(**step_of(buf))
    assert stored == [0]
    return buf, stored


def test_steps_of_many_kinds_are_searched_no_further_than_it_pays():
    buf, stored = prepared(num_steps=50)
    kinds = [(x, y) for x in (torch.float64, torch.float16, torch.bfloat16) for y in ("obs", "actions")]
    for dtype, name in kinds:
        for _ in range(2):
            step = step_of(buf)
            buf.append(**step | {name: step[name].to(dtype)})
            assert torch.equal(buf[name][:, -1], step[name].to(dtype).float())
    # the first of its kind each; and those that came too late twice
    assert len(stored) == MOST + 2 * (1 + len(kinds) - MOST)


def test_versions_are_bumped():
    buf, stored = prepared()
    tensors = buf._storage.rewards, buf._storage.values, buf._storage.codes, buf._storage.rows
    before = [x._version for x in tensors]
    buf.append(**step_of(buf))
    assert [x._version for x in tensors] == [x + 1 for x in before] and len(stored) == 1


NESTED = [torch.zeros(3), torch.zeros(2)]
BAD = {
    "dtype": {"actions": torch.zeros(4, 2, dtype=torch.int64)},
    "shape": {"rewards": torch.zeros(5)},
    "no tensor": {"values": 1.0},
    "None": {"log_probs": None},
    "sparse": {"obs": torch.zeros(4, 3).to_sparse()},
    "meta": {"obs": torch.zeros(4, 3, device="meta")},
    "array": {"dones": torch.zeros(4).numpy()},
}


@pytest.mark.parametrize("change", BAD)
def test_a_bad_argument_is_named_as_in_a_first_step(change):
    buf, _ = prepared()
    before = memory_bytes(buf)
    with pytest.raises((TypeError, ValueError), match=f"^{next(iter(BAD[change]))}: expected"):
        buf.append(**step_of(buf) | BAD[change])
    assert memory_bytes(buf) == before and len(buf) == 2


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_nested_tensor_is_refused():
    buf, _ = prepared()
    for name in ("obs", "rewards"):
        with pytest.raises(TypeError, match=f"^{name}: expected a strided tensor, got a nested one"):
            buf.append(**step_of(buf) | {name: torch.nested.nested_tensor(NESTED)})


def test_a_gradient_does_not_reach_the_buffer():
    """Python detaches the tensors, which are then like those of earlier steps."""
    buf, stored = prepared()
    buf.append(**changed(step_of(buf), lambda x: x.requires_grad_() if x.is_floating_point() else x))
    assert len(stored) == 1 and not any(x.requires_grad for x in buf._storage.tensors.values())


def test_a_view_of_the_step_that_is_written_is_refused():
    buf, _ = prepared(num_steps=3, capacity=3)
    buf.append(**step_of(buf))
    old = buf.obs[:, 0]
    buf.clear()
    before = memory_bytes(buf)
    with pytest.raises(RuntimeError, match="expected memory of its own, got a view of the step that is written"):
        buf.append(**step_of(buf) | {"obs": old})
    assert memory_bytes(buf) == before
    step = step_of(buf)
    buf.append(**step | {"obs": buf._storage.views["obs.obs"][2]})


@pytest.mark.parametrize("times", [1, 3])
def test_tensors_that_are_not_what_their_memory_says(times):
    buf, stored = prepared(num_steps=12)
    for _ in range(times):
        step = step_of(buf)
        buf.append(**step | {"obs": torch._neg_view(step["obs"]), "rewards": torch._neg_view(step["rewards"])})
        assert torch.equal(buf.obs[:, -1], -step["obs"]) and torch.equal(buf.rewards[:, -1], -step["rewards"])
        buf.append(**step | {"values": torch._efficientzerotensor(4)})
        assert not buf.values[:, -1].any()
    assert len(stored) == 1 + 2 * times


def test_a_tensor_given_twice():
    buf, _ = prepared()
    for _ in range(3):
        step = step_of(buf)
        buf.append(**step | {"log_probs": step["values"]})
        assert torch.equal(buf.log_probs[:, -1], step["values"]) and torch.equal(buf.values[:, -1], step["values"])


def test_modes_and_profilers_see_the_operation(seen):
    buf, stored = prepared(num_steps=12)
    step = step_of(buf)
    for _ in range(2):
        seen.names.clear()
        with seen:
            buf.append(**step)
        assert "pydrone.append.default" in seen.names
    for _ in range(2):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            buf.append(**step)
        assert "pydrone::append" in {x.name for x in profile.events()}
    assert len(stored) == 5
    buf.append(**step)
    assert len(stored) == 5


def test_nothing_fake_is_stored():
    buf, _ = prepared()
    step, before = step_of(buf), memory_bytes(buf)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = changed(step, mode.from_tensor)
        for given in (step, fake):
            buf.append(**given)
    assert memory_bytes(buf) == before


def test_inference_mode():
    buf, stored = prepared()
    for _ in range(2):
        with torch.inference_mode():
            step = step_of(buf)
            buf.append(**step)
        assert torch.equal(buf.obs[:, -1], step["obs"])
    assert len(stored) == 2


# ---------------------------------------------------------------------------------------------- lifetimes


def test_memory_that_moves_is_followed():
    """A view sent to another process takes its whole storage to shared memory."""
    buf, stored = prepared()
    for tensor in buf._storage.tensors.values():
        before = tensor.data_ptr()
        tensor[:1].share_memory_()
        assert tensor.is_shared() and (tensor.data_ptr() != before or not tensor.numel())
    step = step_of(buf)
    buf.append(**step)
    assert len(stored) == 1
    for name in ("obs", "actions", "values", "log_probs", "rewards"):
        assert torch.equal(buf[name][:, -1], step[name]), name


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_stores_into_its_own_memory(copied):
    buf, _ = prepared()
    del buf._storage.ops  # a watched one cannot be pickled
    buf._storage.ops = pydrone.ops.dispatch.select(buf.device)
    other, before = copied(buf), memory_bytes(buf)
    for _ in range(2):
        step = step_of(other)
        other.append(**step)
        assert torch.equal(other.obs[:, -1], step["obs"])
    assert memory_bytes(buf) == before
    del buf
    step = step_of(other)
    other.append(**step)
    assert torch.equal(other.obs[:, -1], step["obs"])


def test_a_loaded_state_is_continued():
    buf, stored = prepared()
    other = RolloutBuffer(4, 6, obs=3, actions=2)
    other.append(**step_of(other))
    buf.load_state_dict(other.state_dict())
    step = step_of(buf)
    buf.append(**step)
    assert len(buf) == 2 and len(stored) == 1
    assert torch.equal(buf.obs[:, 0], other.obs[:, 0]) and torch.equal(buf.obs[:, 1], step["obs"])


def test_a_grown_pool_is_used():
    buf = RolloutBuffer(4, 8, obs=3, actions=2, final_obs_rows=4)
    late = {"truncated": torch.ones(4)}
    given = []
    for t in range(4):
        if t == 2:
            buf.grow_final_obs(64)
        final = random_like((4, 3), torch.float32)
        buf.append(**step_of(buf) | late | {"final_obs": final})
        given.append(final)
    kept = buf._storage.final_observations(0, 16)  # the second step's found no room
    assert torch.equal(kept[:4], given[0]) and torch.equal(kept[8:], torch.cat(given[2:]))


def test_a_buffer_is_freed_with_its_last_name():
    buf, _ = prepared()
    gone = [weakref.ref(x) for x in (buf, buf._storage.rows)]
    del buf
    assert [x() for x in gone] == [None, None]


def test_a_buffer_dropped_while_a_thread_appends():
    failed = []

    def collect() -> None:
        try:
            for _ in range(200):
                buf = RolloutBuffer(64, 4, obs=5, actions=2)
                for _ in range(4):
                    step = random_step(buf)
                    held.append(buf)
                    buf.append(**step)
                    held.clear()
                    if not torch.equal(buf.obs[:, -1], step["obs"]):
                        raise AssertionError("another step was stored")
        except Exception as error:
            failed.append(error)

    held: list[RolloutBuffer] = []
    threads = [threading.Thread(target=collect) for _ in range(3)]
    for x in threads:
        x.start()
    for x in threads:
        x.join()
    assert not failed


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform has no fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_stores_into_its_own_memory():
    buf, stored = prepared()
    before, step = memory_bytes(buf), step_of(buf)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            buf.append(**step)
            code = 0 if len(stored) == 1 and torch.equal(buf.obs[:, -1], step["obs"]) else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert memory_bytes(buf) == before and len(buf) == 2


def test_a_plan_checks_what_it_is_given():
    buf, _ = prepared()
    call = buf._steps._calls["append"][0]
    given = [torch.zeros(4, 3), torch.zeros(4, 2), *torch.zeros(4, 4).unbind(1)]
    plan = torch.ops.pydrone.append_plan
    for places, message in (([0] * 5, "one for each source and flag, got 5"), ([9] * 6, "expected 0 <= places < 6")):
        with pytest.raises(RuntimeError, match=f"^places: .*{message}"):
            plan(call.memory, given, call.layout, None, None, None, places)
    with pytest.raises(RuntimeError, match=r"^dones: expected shape \[4\]"):
        plan(call.memory, given, call.layout, torch.zeros(5), None, None, [*range(7)])
