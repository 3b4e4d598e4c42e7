"""The operations as PyTorch sees them: schemas, tracing, and direct calls with wrong or hostile arguments."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest
import torch
from torch import Tensor

import pydrone
from pydrone.ops import reference
from pydrone.ops.schema import SCALAR_TYPES, SCHEMAS, workspace_size

OPS = torch.ops.pydrone
BIG = 2**63 - 1
F32, F16 = SCALAR_TYPES[torch.float32], SCALAR_TYPES[torch.float16]
N, C = 4, 3

native = pytest.mark.skipif(pydrone.backends()["cpu"] is not None, reason=str(pydrone.backends()["cpu"]))


def zeros(*shape: int, dtype: torch.dtype = torch.float32, **options) -> Tensor:
    return torch.zeros(shape, dtype=dtype, **options)


def u8(*shape: int) -> Tensor:
    return zeros(*shape, dtype=torch.uint8)


def i32(*shape: int) -> Tensor:
    return zeros(*shape, dtype=torch.int32)


def i64(*shape: int) -> Tensor:
    return zeros(*shape, dtype=torch.int64)


def f64(*shape: int) -> Tensor:
    return zeros(*shape, dtype=torch.float64)


def cursor(appended: int = 0, discarded: int = 0, num_steps: int = C) -> Tensor:
    return torch.tensor([appended, discarded, 0, 0, num_steps])


def gae_arguments() -> dict:
    return {
        "rewards": torch.randn(N, C),
        "values": torch.randn(N, C),
        "dones": (torch.rand(N, C) < 0.3).float(),
        "truncated": None,
        "valid": None,
        "last_values": torch.randn(N),
        "final_values": None,
        "final_rows": None,
        "gamma": 0.9,
        "lam": 0.9,
        "start": 0,
        "coded": False,
        "bootstrap": 0,
        "cursor": None,
        "advantages": zeros(N, C),
        "returns": zeros(N, C),
        "stats": f64(3),
        "workspace": f64(workspace_size(N)),
    }


def off_policy_arguments() -> dict:
    given = gae_arguments()
    given["targets"] = given.pop("returns")
    given |= {"log_rhos": torch.randn(N, C), "q_values": None, "rho_clip": 1.0, "c_clip": 1.2}
    return {name: given[name] for name in inspect.signature(reference.off_policy).parameters}


SHORT = SCALAR_TYPES[torch.int16]


def ring(rows: Tensor | None = None, codes: Tensor | None = None, *planes: Tensor) -> list[Tensor]:
    return [u8(C, N, 32) if rows is None else rows, u8(N, C) if codes is None else codes, *(planes or (zeros(N, C),))]


def pool(
    final_obs: Tensor | None = None, count: Tensor | None = None, final_rows: Tensor | None = None
) -> list[Tensor]:
    given = ((final_obs, u8(2, N, 32)), (count, i32(2, 2)), (final_rows, i32(N, C)))
    return [usual if x is None else x for x, usual in given]


FIELDS = [[0, F32, 2, 1], [8, SHORT, 1, 0], [0, F32, 2, 1]]  # two of a row, one of a pool row


def step(row=None, plane=None, final=None, fields=None, memory=None, pools=None, looked_at=0) -> dict:
    """append's lists and their layout. Rows of 32 bytes: two floats at byte 0, an int16 at 8; pool rows: two floats
    at 0."""
    row = [torch.randn(N, 2), torch.ones(N, dtype=torch.int16)] if row is None else row
    plane = [torch.randn(N)] if plane is None else plane
    final = [torch.randn(N, 2)] if final is None else final
    fields = FIELDS if fields is None else fields
    return {
        "memory": [*(ring() if memory is None else memory), *(pool() if pools is None else pools)],
        "sources": [*row, *plane, *final],
        "layout": torch.tensor([[len(row), len(plane), len(final), looked_at], *fields]),
    }


def look(not_finite: Tensor) -> dict:
    """A step whose first field is checked for finite values."""
    return step(pools=[*pool(), not_finite], looked_at=1)


def at(offset: int, dtype: int = F32) -> dict:
    """A step with the first field at another offset or of another dtype."""
    return step(fields=[[offset, dtype, 2, 1], *FIELDS[1:]])


def append_arguments() -> dict:
    return {
        **step(),
        "dones": torch.ones(N),
        "truncated": torch.tensor([0, 1, 0, 1]),
        "valid": None,
        "slot": 1,
        "pool_slot": 1,
        "cursor": None,
        "commit": True,
    }


def gather_arguments() -> dict:
    return {
        "rows": torch.randint(0, 255, (C, N, 32), dtype=torch.uint8),
        "offsets": [0, 8],
        "dtypes": [SCALAR_TYPES[torch.int32], SCALAR_TYPES[torch.uint8]],
        "outputs": [i32(5, 2), u8(5)],
        "value_offset": 12,
        "advantages": torch.randn(N, C),
        "returns": None,
        "stats": f64(3),
        "subset": None,
        "num_steps": C,
        "start": 0,
        "num_samples": N * C,
        "key": 1,
        "rollout": 0,
        "epoch": 0,
        "shuffle": True,
        "first": 0,
        "cursor": None,
        "advantages_out": zeros(5),
        "returns_out": zeros(5),
        "indices_out": i64(5),
    }


ARGUMENTS = {
    "gae": gae_arguments,
    "off_policy": off_policy_arguments,
    "append": append_arguments,
    "gather": gather_arguments,
}


def call(name: str, change: dict | None = None) -> None:
    getattr(OPS, name).default(*(ARGUMENTS[name]() | (change or {})).values())


# ---------------------------------------------------------------------------------------------- schemas, tracing


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_backend_has_the_schema(name):
    arguments = [a.name for a in getattr(OPS, name).default._schema.arguments]
    assert arguments == list(ARGUMENTS[name]())
    assert list(inspect.signature(getattr(reference, name)).parameters) == arguments
    assert len(getattr(OPS, name).default._schema.returns) == 0


VARIANTS = [
    ("gae", {}),
    ("gae", {"returns": None, "stats": None, "workspace": None}),
    ("gae", {"dones": u8(N, C), "coded": True, "start": 2, "advantages": zeros(N, 2), "returns": zeros(N, 2)}),
    ("gae", {"truncated": torch.ones(N, C), "final_values": torch.ones(N, C), "bootstrap": 1, "valid": zeros(N, C)}),
    ("append", {}),
    ("append", step(row=[], fields=FIELDS[2:])),
    ("append", step(pools=[], final=[], fields=FIELDS[:2]) | {"dones": None, "truncated": None}),
    ("append", step(memory=[u8(C, N, 32)], plane=[], pools=[]) | {"dones": None, "truncated": None}),
    ("append", {"cursor": cursor()}),
    ("append", look(i32(2))),
    ("gather", {}),
    ("gather", {"subset": torch.arange(12), "shuffle": False, "first": 7}),
    (
        "gather",
        {"outputs": [], "offsets": [], "dtypes": [], "advantages": None, "advantages_out": None, "returns_out": None},
    ),
]


@pytest.mark.parametrize("name, change", VARIANTS, ids=lambda x: x if isinstance(x, str) else ",".join(x))
def test_opcheck(name, change):
    torch.library.opcheck(getattr(OPS, name).default, tuple((ARGUMENTS[name]() | change).values()))


@pytest.mark.parametrize("name", SCHEMAS)
def test_native_and_reference_agree(name):
    """torch.ops.pydrone and pydrone.ops.reference write the same results into the same arguments."""
    first = ARGUMENTS[name]()

    def copied(x):
        return [copied(y) for y in x] if isinstance(x, list) else x.clone() if isinstance(x, Tensor) else x

    second = {key: copied(x) for key, x in first.items()}
    start = {key: copied(x) for key, x in first.items()}
    getattr(OPS, name).default(*first.values())
    getattr(reference, name)(*second.values())
    changed = set()
    for key in first:
        for x, y, z in zip(*(d[key] if isinstance(d[key], list) else [d[key]] for d in (first, second, start))):
            if isinstance(x, Tensor) and key != "workspace":
                assert torch.allclose(x.double(), y.double(), atol=1e-6, equal_nan=True), key
                if not torch.equal(x, z):
                    changed.add(key)
    mutable = {a.name for a in getattr(OPS, name).default._schema.arguments if a.is_write}
    assert changed == mutable - {"workspace", "cursor"}


def test_compiles_into_one_graph():
    def step(rewards: Tensor, values: Tensor, dones: Tensor, last: Tensor) -> Tensor:
        advantages = torch.empty_like(rewards)
        returns = torch.empty_like(rewards)
        OPS.gae.default(
            *(rewards * 2, values, dones, None, None, last, None, None, 0.9, 0.8, 0, False, 0, None),
            *(advantages, returns, None, None),
        )
        return advantages + returns

    x = torch.randn(N, 9), torch.randn(N, 9), torch.rand(N, 9) < 0.2, torch.randn(N)
    compiled = torch.compile(step, fullgraph=True, backend="eager")
    assert torch.equal(compiled(*x), step(*x)) and step(*x).abs().sum() > 0
    advantages, returns = pydrone.gae(x[0] * 2, *x[1:], 0.9, 0.8)
    assert torch.allclose(step(*x), advantages + returns)


# ---------------------------------------------------------------------------------------------- wrong arguments

META, COMPLEX = {"device": "meta"}, torch.complex64
BAD = [
    # gae
    ("gae", {"rewards": zeros(N)}, "rewards: expected shape"),
    ("gae", {"rewards": i32(N, C)}, "rewards: expected a floating dtype"),
    ("gae", {"values": zeros(N, C + 1)}, "values: expected shape"),
    ("gae", {"values": zeros(N, C, dtype=COMPLEX)}, "values: expected a floating dtype"),
    ("gae", {"dones": zeros(C, N)}, "dones: expected shape"),
    ("gae", {"dones": zeros(N, C, dtype=COMPLEX)}, "dones: "),
    ("gae", {"dones": zeros(N, C), "coded": True}, "dones: expected dtype"),
    ("gae", {"truncated": zeros(N, 1)}, "truncated: expected shape"),
    ("gae", {"truncated": zeros(N, C, dtype=COMPLEX)}, "truncated: "),
    ("gae", {"valid": zeros(1, C)}, "valid: expected shape"),
    ("gae", {"last_values": zeros(N + 1)}, "last_values: expected shape"),
    ("gae", {"last_values": i64(N)}, "last_values: expected a floating dtype"),
    ("gae", {"last_values": zeros(N, **META)}, "last_values|device"),
    ("gae", {"bootstrap": 4}, "bootstrap: expected 0 <= bootstrap < 4, got 4"),
    ("gae", {"bootstrap": -1}, "bootstrap: expected"),
    ("gae", {"bootstrap": 1}, "final_values: expected a tensor"),
    ("gae", {"bootstrap": 1, "final_values": i64(N, C)}, "final_values: expected a floating dtype"),
    ("gae", {"bootstrap": 1, "final_values": zeros(N)}, "final_values: expected shape"),
    ("gae", {"bootstrap": 1, "final_values": zeros(N, C), "final_rows": i32(N, C)}, "final_values: expected shape"),
    ("gae", {"bootstrap": 1, "final_values": zeros(N), "final_rows": i64(N, C)}, "final_rows: expected dtype"),
    ("gae", {"bootstrap": 1, "final_values": zeros(N), "final_rows": i32(N, 1)}, "final_rows: expected shape"),
    ("gae", {"start": C}, "start: expected 0 <= start < 3, got 3"),
    ("gae", {"start": -1}, "start: expected"),
    ("gae", {"start": BIG}, "start: expected"),
    ("gae", {"advantages": zeros(N, C + 1)}, "advantages: expected at most 3 steps"),
    ("gae", {"advantages": zeros(N + 1, C)}, "advantages: expected shape"),
    ("gae", {"advantages": zeros(N, C, dtype=torch.float16)}, "advantages: expected dtype"),
    ("gae", {"returns": zeros(N, C - 1)}, "returns: expected shape"),
    ("gae", {"returns": f64(N, C)}, "returns: expected dtype"),
    ("gae", {"stats": zeros(3)}, "stats: expected dtype"),
    ("gae", {"stats": f64(4)}, "stats: expected shape"),
    ("gae", {"stats": f64(6)[::2]}, "stats: expected a contiguous"),
    ("gae", {"workspace": None}, "workspace: expected a tensor"),
    ("gae", {"workspace": f64(workspace_size(N) - 1)}, "workspace: expected at least 10 elements, got 9"),
    ("gae", {"workspace": zeros(9)}, "workspace: expected dtype"),
    ("gae", {"workspace": f64(18)[::2]}, "workspace: expected a contiguous"),
    ("gae", {"cursor": i64(4)}, "cursor: expected shape"),
    ("gae", {"cursor": i32(5)}, "cursor: expected dtype"),
    ("gae", {"cursor": i64(1).expand(5)}, "cursor: expected a contiguous"),
    ("gae", {"cursor": cursor(0, -1)}, "start: expected"),
    # append
    ("append", look(i64(2)), "not_finite: expected dtype Int, got Long"),
    ("append", look(i32(1, 1)), "not_finite: expected shape"),
    ("append", look(i32(0)), "not_finite: expected at least one rollout"),
    ("append", look(i32(5)), "not_finite: expected 2 rollouts as final_obs has, got 5"),
    ("append", look(i32(4)[::2]), "not_finite: expected a contiguous"),
    ("append", step(looked_at=3), "layout: expected 0 to 2 fields to check for finite values, got 3"),
    ("append", step(looked_at=-1), "layout: expected 0 to 2 fields to check for finite values, got -1"),
    ("append", {"memory": []}, "memory: expected rows, codes and planes, got no tensor"),
    ("append", step(memory=[u8(C, N, 32)], plane=[], pools=[]), "memory: expected codes with dones, got rows alone"),
    ("append", step(memory=ring()[:2]), r"memory: expected rows, codes, 1 planes, and a pool's .*, got 5 tensors"),
    ("append", step(pools=pool()[:2]), "memory: expected rows, codes, 1 planes, and a pool's .*, got 5 tensors"),
    ("append", step(memory=[u8(C, N, 32)], pools=[]), "memory: expected rows, codes, 1 planes, .*, got 1 tensors"),
    ("append", step(memory=ring(u8(C, N, 64)[..., :32])), "rows: expected a contiguous"),
    ("append", step(memory=ring(zeros(C, N, 32))), "rows: expected dtype"),
    ("append", step(memory=ring(u8(C, N * 32))), "rows: expected shape"),
    ("append", {"layout": torch.tensor([[2, 1, 1, 0.0]])}, "layout: expected dtype Long, got Float"),
    ("append", {"layout": i64(4)}, "layout: expected shape"),
    ("append", {"layout": i64(0, 4)}, "layout: expected a row of counts first"),
    ("append", {"layout": i64(4, 8)[:, ::2]}, "layout: expected a contiguous"),
    ("append", {"layout": torch.tensor([[-1, 4, 1, 0], *FIELDS])}, "layout: expected counts of 0 to 4 sources, got -1"),
    ("append", {"layout": torch.tensor([[BIG, 1, 1, 0], *FIELDS])}, "layout: expected counts of 0 to 4 sources, got"),
    ("append", {"layout": torch.tensor([[2, 2, 1, 0], *FIELDS])}, "sources: expected 5 as layout says, got 4"),
    ("append", step(fields=FIELDS[:2]), "layout: expected 3 fields, got 2"),
    ("append", step(fields=[*FIELDS, FIELDS[0]]), "layout: expected 3 fields, got 4"),
    ("append", step(row=[zeros(N - 1, 2), i32(N)]), r"sources: expected shape \[4, ...\] of 1 .* got \[3"),
    ("append", step(row=[zeros(), i32(N)]), "sources: expected shape"),
    ("append", step(row=[zeros(N, 3), i32(N)]), "sources: expected shape"),
    ("append", step(row=[zeros(N, 2, 1), i32(N)]), "sources: expected shape"),
    ("append", step(row=[zeros(2 * N), i32(N)]), "sources: expected shape"),
    ("append", step(row=[zeros(N, 2), zeros(N, 2)]), "sources: expected shape"),
    ("append", step(row=[zeros(N, 2), zeros(N)]), "sources: expected dtype Short, got Float"),
    ("append", step(row=[zeros(N, 2, dtype=COMPLEX), torch.ones(N, dtype=torch.int16)]), "sources: expected"),
    (
        "append",
        step(row=[zeros(N, 9), torch.ones(N, dtype=torch.int16)], fields=[[0, F32, 9, 1], *FIELDS[1:]]),
        "sources: .*do not lie in a row of 32",
    ),
    ("append", at(28), "sources: byte offset 28 and 8 bytes do not lie in a row of 32"),
    ("append", at(2), "sources: byte offset 2"),
    ("append", at(-4), "sources: byte offset -4"),
    ("append", at(0, 9), "sources: dtype number 9 cannot be stored"),
    ("append", at(0, -1), "sources: dtype number -1 cannot be stored"),
    ("append", at(0, 256 + F32), "sources: dtype number 262 cannot be stored"),
    ("append", step(memory=ring(None, None, f64(N, C))), "planes: expected dtype"),
    ("append", step(memory=ring(None, None, zeros(N, C + 1))), "planes: expected shape"),
    ("append", step(plane=[zeros(N, 2)]), "sources of planes: expected shape"),
    ("append", step(plane=[i64(N)]), "sources of planes: expected a floating dtype"),
    ("append", step(memory=ring(None, i32(N, C))), "codes: expected dtype"),
    ("append", step(memory=ring(None, u8(C, N))), "codes: expected shape"),
    ("append", {"dones": zeros(N - 1)}, "dones: expected shape"),
    ("append", {"dones": zeros(N, dtype=COMPLEX)}, "dones: "),
    ("append", {"truncated": zeros(1)}, "truncated: expected shape"),
    ("append", {"valid": zeros(N, 2)}, "valid: expected shape"),
    ("append", {"valid": zeros(N, dtype=COMPLEX)}, "valid: "),
    ("append", step(pools=pool(zeros(2, N, 32))), "final_obs: expected dtype"),
    ("append", step(pools=pool(u8(2, N, 4))), "final sources: .*do not lie in a row of 4"),
    ("append", step(pools=pool(None, i32(1, 2))), "count: expected shape"),
    ("append", step(pools=pool(None, i64(2, 2))), "count: expected dtype"),
    ("append", step(pools=pool(None, None, i64(N, C))), "final_rows: expected dtype"),
    ("append", step(final=[i64(N, 2)]), "final sources: expected dtype Float, got Long"),
    ("append", step(final=[zeros(N)]), "final sources: expected shape"),
    ("append", {"slot": C}, "slot: expected 0 <= slot < 3, got 3"),
    ("append", {"slot": -1}, "slot: expected"),
    ("append", {"pool_slot": 2}, "pool_slot: expected 0 <= pool_slot < 2, got 2"),
    ("append", {"pool_slot": -1}, "pool_slot: expected"),
    ("append", {"cursor": i64(6)}, "cursor: expected shape"),
    ("append", {"cursor": i64(1).expand(5)}, "cursor: expected a contiguous"),
    ("append", {"cursor": cursor(-1)}, "slot: expected"),
    ("append", step(plane=[zeros(N, **META)]), "sources of planes|device"),
    # gather
    ("gather", {"rows": u8(C, N, 64)[..., :32]}, "rows: expected a contiguous"),
    ("gather", {"rows": i32(C, N, 8)}, "rows: expected dtype"),
    ("gather", {"num_steps": C + 1}, "num_steps: expected"),
    ("gather", {"num_steps": -1}, "num_steps: expected"),
    ("gather", {"outputs": [i32(5, 2)]}, "outputs: expected as many"),
    ("gather", {"outputs": [i32(5, 2), u8(4)]}, "outputs: expected a first dimension of 5"),
    ("gather", {"outputs": [zeros(5, 2), u8(5)]}, "outputs: expected dtype Int or Float, got"),
    ("gather", {"outputs": [i32(5, 4)[:, ::2], u8(5)]}, "outputs: expected a contiguous"),
    ("gather", {"offsets": [28, 8]}, "offsets: byte offset 28 and 8 bytes do not lie in a row of 32"),
    ("gather", {"offsets": [-4, 8]}, "offsets: byte offset -4"),
    ("gather", {"dtypes": [9, 0]}, "dtypes: dtype number 9 cannot be stored"),
    ("gather", {"dtypes": [256 + 3, 0]}, "dtypes: dtype number 259 cannot be stored"),
    ("gather", {"value_offset": 29}, "value_offset: expected"),
    ("gather", {"value_offset": -1}, "value_offset: expected"),
    ("gather", {"advantages": None}, "advantages: expected a tensor"),
    ("gather", {"advantages": zeros(N, C + 1)}, "advantages: expected shape"),
    ("gather", {"advantages": f64(N, C)}, "advantages: expected dtype"),
    ("gather", {"advantages_out": zeros(4)}, "advantages_out: expected a first dimension of 5"),
    ("gather", {"returns_out": f64(5)}, "returns_out: expected dtype"),
    ("gather", {"returns_out": zeros(5, 2)}, "returns_out: expected one dimension"),
    ("gather", {"indices_out": i32(5)}, "indices_out: expected dtype"),
    ("gather", {"indices_out": i64(10)[::2]}, "indices_out: expected a contiguous"),
    ("gather", {"stats": zeros(3)}, "stats: expected dtype"),
    ("gather", {"stats": f64(2)}, "stats: expected shape"),
    ("gather", {"subset": i64(5)}, "subset: expected shape"),
    ("gather", {"subset": i32(12)}, "subset: expected dtype"),
    ("gather", {"num_samples": 13}, "num_samples: expected 12, got 13"),
    ("gather", {"first": 8}, "first: expected"),
    ("gather", {"first": -1}, "first: expected"),
    ("gather", {"start": C}, "start: expected"),
    ("gather", {"start": -1}, "start: expected"),
    ("gather", {"cursor": cursor(0, -1)}, "start: expected"),
    ("gather", {"cursor": i64(1).expand(5)}, "cursor: expected a contiguous"),
    ("gather", {"stats": zeros(3, dtype=torch.float64, **META)}, "stats|device"),
]


@native
@pytest.mark.parametrize(
    "name, change, message", BAD, ids=[f"{n}-{'-'.join(c)}-{i}" for i, (n, c, _) in enumerate(BAD)]
)
def test_wrong_arguments_are_named_and_nothing_is_written(name, change, message):
    arguments = ARGUMENTS[name]() | change
    flat = [x for value in arguments.values() for x in (value if isinstance(value, list) else [value])]
    tensors = [x for x in flat if isinstance(x, Tensor) and x.device.type == "cpu"]
    before = [x.clone() for x in tensors]
    with pytest.raises(RuntimeError, match=message):
        getattr(OPS, name).default(*arguments.values())
    assert all(torch.equal(x, y) for x, y in zip(tensors, before))


@native
@pytest.mark.parametrize(
    "name, change, message",
    [
        ("gae", {"values": zeros(C, N)}, "values: expected shape [4, 3], got [3, 4]"),
        (
            "gae",
            {"dones": zeros(N, C, dtype=torch.complex64)},
            "dones: expected a bool, integer or floating dtype, got ComplexFloat",
        ),
        ("gather", {"first": -(2**63)}, "first: expected first + 5 <= 12, got -9223372036854775808"),
        ("append", {"sources": []}, "layout: expected counts of 0 to 0 sources, got 2"),
    ],
)
def test_errors_are_complete_and_begin_with_the_argument(name, change, message):
    with pytest.raises(RuntimeError) as error:
        call(name, change)
    assert str(error.value) == message


# Each of these could access memory out of bounds, divide by zero or loop forever, so they run in another process.
HOSTILE = {
    "an output offset that overflows": lambda: call("gather", {"offsets": [BIG - 3, 8]}),
    "a first position that overflows": lambda: call("gather", {"first": BIG}),
    "the same, unshuffled": lambda: call("gather", {"first": BIG, "shuffle": False}),
    "samples of no steps": lambda: call("gather", {"num_steps": 0, "subset": i64(12), "advantages": zeros(N, 0)}),
    "samples of no steps, by the cursor": lambda: call(
        "gather", {"num_steps": 0, "subset": i64(12), "advantages": zeros(N, 0), "cursor": cursor()}
    ),
    "samples of no environments": lambda: call(
        "gather", {"rows": u8(C, 0, 32), "subset": i64(12), "advantages": zeros(0, C)}
    ),
    "samples of no capacity": lambda: call(
        "gather",
        {"rows": u8(0, N, 32), "num_steps": 0, "subset": i64(12), "advantages": zeros(N, 0), "cursor": cursor()},
    ),
    "a source offset that overflows": lambda: call("append", at(BIG - 7)),
    "a pool offset that overflows": lambda: call("append", step(fields=[*FIELDS[:2], [BIG - 7, F32, 2, 1]])),
    "no capacity, by the cursor": lambda: call(
        "append",
        step(memory=ring(u8(0, N, 32), u8(N, 0), zeros(N, 0)), pools=pool(None, None, i32(N, 0)))
        | {"cursor": cursor(-1)},
    ),
    "no pool, by the cursor": lambda: call("append", step(pools=pool(u8(0, N, 32), i32(0, 2))) | {"cursor": cursor()}),
    "a pool's count below zero": lambda: call(
        "append", step(pools=pool(None, torch.full((2, 2), -(2**30), dtype=torch.int32)))
    ),
}
# Unusual but meaningful: these must work.
HARMLESS = {
    "rows of no bytes": lambda: call(
        "append",
        step(
            memory=ring(u8(C, N, 0)),
            row=[zeros(N, 0), zeros(N, 0, dtype=torch.int16)],
            fields=[[0, F32, 0, 1], [0, SHORT, 0, 1], FIELDS[2]],
        ),
    ),
    "fields that overlap": lambda: call(
        "append",
        step(
            memory=ring(u8(C, N, 256)),
            row=[torch.ones(N, 64), torch.ones(N, 60), torch.ones(N, 63)],
            fields=[[0, F32, 64, 1], [0, F32, 60, 1], [4, F32, 63, 1], FIELDS[2]],
        ),
    ),
    "a subset that leads out": lambda: call("gather", {"subset": torch.tensor([BIG, -1, -BIG, 12] * 3)}),
    "unknown codes": lambda: call("gae", {"dones": torch.full((N, C), 200, dtype=torch.uint8), "coded": True}),
    "row numbers that lead out": lambda: call(
        "gae",
        {
            "dones": torch.full((N, C), 2, dtype=torch.uint8),
            "coded": True,
            "bootstrap": 1,
            "final_values": zeros(2),
            "final_rows": torch.tensor([[-1, 2, 2**31 - 1]] * N, dtype=torch.int32),
        },
    ),
    "a cursor of no steps": lambda: call("append", {"cursor": cursor(0, 0, 0)}),
    "a full pool": lambda: call("append", step(pools=pool(None, torch.full((2, 2), 2**31 - 1, dtype=torch.int32)))),
    "keys of any size": lambda: call("gather", {"key": -(2**63), "rollout": BIG, "epoch": -1}),
}


def run_alone(name: str) -> None:
    """Runs a case in this process and prints the outcome."""
    torch.set_num_threads(1)
    try:
        (HOSTILE | HARMLESS)[name]()
    except RuntimeError as error:
        print(f"raised: {error}")
    else:
        print("returned")


@native
def test_hostile_arguments():
    """All cases run in one subprocess, which is restarted after a crash. Reports each case with the wrong outcome."""
    script = "import sys; sys.path.insert(0, sys.argv[1]); import test_ops as t\n" + (
        "for name in sys.argv[2:]: print(name, end=' -> ', flush=True); t.run_alone(name)"
    )
    waiting, wrong = [*HOSTILE, *HARMLESS], []
    while waiting:
        command = [sys.executable, "-c", script, __file__.rpartition("/")[0], *waiting]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=20)
            output, code = done.stdout, done.returncode
        except subprocess.TimeoutExpired as expired:
            output, code = (expired.stdout or b"").decode(), "timeout"
        lines = [line.split(" -> ") for line in output.splitlines() if " -> " in line]
        assert lines, f"nothing was run: {code}, {output}"
        for name, result in lines:
            if code and name == waiting[len(lines) - 1] and not result:
                wrong.append(f"{name}: crashed or hung ({code})")
            elif result.startswith("raised") != (name in HOSTILE):
                wrong.append(f"{name}: {result}")
        waiting = waiting[len(lines) :]
    assert not wrong, "\n".join(wrong)
