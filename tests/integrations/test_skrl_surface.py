"""What users touch of skrl's memory beyond the agents' own calls: the same calls, the same outcome, for every dtype."""

from __future__ import annotations

import copy
import io
import pickle
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch

pytest.importorskip("skrl")

from skrl.agents.torch.ppo.ppo import compute_gae as their_gae
from skrl.agents.torch.ppo.ppo_rnn import compute_gae as their_recurrent_gae
from surface import outcome, same_outcome
from test_skrl import ADDED, TENSORS, both, random_samples

from pydrone.integrations import skrl as ours
from pydrone.ops.schema import SCALAR_TYPES

T, N = 3, 2
SAVED = [name for name in TENSORS if name not in ("states", "rnn_policy_0")]  # skrl's csv knows no nested sizes


def put(memory, steps=1, names=ADDED):
    torch.manual_seed(len(memory))
    for _ in range(steps):
        memory.add_samples(**random_samples(memory, N, names))


def contents(memory):
    found = {name: memory.get_tensor_by_name(name).clone() for name in memory.get_tensor_names()}
    views = [memory.tensors_view[name].clone() for name in found]
    attributes = [getattr(memory, f"_tensor_{name}").clone() for name in found]
    return found, views, attributes, (len(memory), memory.filled, memory.memory_index, memory.env_index)


def batches(memory):
    torch.manual_seed(3)
    names = list(memory.tensors)
    return memory.sample(names, batch_size=4, mini_batches=2), memory.sample_all(names, sequence_length=2)


def saved(suffix, steps=2):
    def call(memory, folder):
        put(memory, steps)
        memory.save(str(folder), format=suffix)
        (file,) = (folder / "memories").iterdir()
        read = {"pt": torch.load, "npz": lambda x: dict(np.load(x)), "csv": lambda x: [x.read_text()]}[suffix](file)
        put(memory)
        return read, contents(memory), batches(memory)

    return call


def exported(memory, folder):
    memory.export, memory.export_directory = True, str(folder)
    put(memory, T + 1)
    (file,) = (folder / "memories").iterdir()
    return torch.load(file), contents(memory)


def loaded(suffix):
    """skrl's ``load`` replaces the attributes alone."""

    def call(memory, folder):
        put(memory, 2)
        memory.save(str(folder), format=suffix)
        put(memory)
        (file,) = (folder / "memories").iterdir()
        memory.load(str(file))
        return contents(memory), batches(memory), contents(copy.deepcopy(memory))

    return call


def copied(how, steps):
    """The copy goes on by itself, in all the ways of reading and writing."""

    def call(memory, folder):
        put(memory, steps)
        twin = how(memory)
        put(twin)
        twin.set_tensor_by_name("returns", torch.ones(T, N, 1))
        twin.tensors["rewards"][0] = 7
        return contents(memory), contents(twin), batches(twin), batches(memory)

    return call


def through_a_pickle(memory):
    # The views in skrl's own memory are no longer views after a pickle: a deep copy is the right one.
    return pickle.loads(pickle.dumps(memory)) if isinstance(memory, ours.RandomMemory) else copy.deepcopy(memory)


def created_late(memory, folder):
    put(memory)
    made = memory.create_tensor(name="late", size=2, dtype=torch.float32)
    put(memory, names=[*ADDED, "late"])
    return made, contents(memory), batches(memory), contents(through_a_pickle(memory))


def reset(memory, folder):
    put(memory, T + 1)
    memory.reset()
    put(memory)
    return contents(memory)


SURFACE = {
    **{f"save {suffix}": saved(suffix) for suffix in ("pt", "npz")},
    "save pt before the first use": saved("pt", 0),
    "export": exported,
    "load pt": loaded("pt"),
    "load npz": loaded("npz"),
    "load csv": loaded("csv"),
    "save of an unknown format": lambda memory, folder: memory.save(str(folder), format="zip"),
    **{
        f"{how.__name__} of {steps}": copied(how, steps)
        for how in (copy.deepcopy, through_a_pickle)
        for steps in (0, 2)
    },
    "created late": created_late,
    "reset": reset,
    "created again": lambda memory, folder: memory.create_tensor(name="rewards", size=1),
    "created with another size": lambda memory, folder: memory.create_tensor(name="rewards", size=2),
    "created with another dtype": lambda m, folder: m.create_tensor(name="rewards", size=1, dtype=torch.int64),
    "created empty": lambda memory, folder: memory.create_tensor(name="none", size=0),
    "an unknown name": lambda memory, folder: memory.set_tensor_by_name("none", torch.zeros(1)),
}


@pytest.mark.parametrize("call", SURFACE.values(), ids=SURFACE)
def test_the_same_calls_have_the_same_outcome(call, tmp_path):
    theirs, mine = both(T, N)
    expected = outcome(call, theirs, tmp_path / "theirs")
    same_outcome(expected, outcome(call, mine, tmp_path / "mine"))


def test_csv(tmp_path):
    for memory, folder in zip(both(T, N), (tmp_path / "theirs", tmp_path / "mine")):
        for name in set(memory.tensors) - set(SAVED):
            del memory.tensors[name]
        put(memory, 2, [name for name in ADDED if name in SAVED])
        memory.save(str(folder), format="csv")
    first, second = (next((tmp_path / x / "memories").iterdir()).read_text() for x in ("theirs", "mine"))
    assert first == second


@pytest.mark.parametrize("dtype", SCALAR_TYPES, ids=str)
def test_every_dtype_comes_out_as_it_went_in(dtype, tmp_path):
    """Alone in its row and beside others, whole and sampled, saved and copied."""

    def call(memory, folder):
        for name, size in (("one", 1), ("three", 3), ("image", (2, 1))):
            memory.create_tensor(name=name, size=size, dtype=dtype, keep_dimensions=isinstance(size, tuple))
        put(memory, 2, [*ADDED, "one", "three", "image"])
        memory.save(str(folder))
        file = next((folder / "memories").iterdir())
        return contents(memory), batches(memory), torch.load(file), contents(through_a_pickle(memory))

    theirs, mine = both(T, N)
    same_outcome(outcome(call, theirs, tmp_path / "theirs"), outcome(call, mine, tmp_path / "mine"))


def test_memory_shared_between_processes_is_shared_after_pickling():
    """As torch.multiprocessing sends a memory to another process."""
    for memory in both(T, N):
        put(memory)
        memory.share_memory()
        data = io.BytesIO()
        ForkingPickler(data).dump(memory)
        twin = pickle.loads(data.getvalue())
        twin.tensors["rewards"][0] = 5
        put(twin)
        for name in ADDED:
            assert torch.equal(memory.tensors[name][1], twin.tensors[name][1]), name
        assert (memory.get_tensor_by_name("rewards")[0] == 5).all()


@pytest.mark.parametrize("rewards", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("values", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_gae_keeps_dtypes(rewards, values):
    r, v = torch.randn(2, 5, 4, 1)
    common = {"rewards": r.to(rewards), "values": v.to(values), "terminated": torch.rand(5, 4, 1) < 0.2}
    last, truncated = torch.randn(4, 1).to(values), torch.rand(5, 4, 1) < 0.2
    for theirs, mine, more in (
        (their_gae, ours.compute_gae, {"last_values": last, "truncated": truncated, "time_limit_bootstrap": True}),
        (their_recurrent_gae, ours.compute_gae_rnn, {"next_values": last}),
    ):
        for expected, got in zip(theirs(**common, **more), mine(**common, **more), strict=True):
            assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
            worst = max(torch.finfo(rewards).eps, torch.finfo(values).eps)
            assert (got - expected).abs().max() <= max(16 * worst, 1e-5) * expected.abs().max()


def test_one_sample_has_an_advantage_of_zero():
    """skrl's is NaN."""
    one, ended = torch.ones(1, 1, 1), torch.zeros(1, 1, 1, dtype=torch.bool)
    arguments = {"rewards": one, "values": one, "terminated": ended, "next_values": one[0], "discount_factor": 0.5}
    (expected, theirs), (returns, advantages) = (f(**arguments) for f in (their_recurrent_gae, ours.compute_gae_rnn))
    assert returns.item() == expected.item() == 1.5
    assert advantages.item() == 0 and theirs.isnan().all()
