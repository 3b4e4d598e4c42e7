"""Cases for the Triton kernels; test_triton.py runs them. Outputs start as NaN or as bytes that no case writes."""

from __future__ import annotations

import math
import os

import layer_cases
import loss_cases
import pytest
import torch
from torch import Tensor

from pydrone.ops import reference
from pydrone.ops.schema import ACTIVATIONS, SCALAR_TYPES, layer_workspace_size, workspace_size

if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    raise RuntimeError("no CUDA device: set TRITON_INTERPRET=1")

from pydrone._triton import append as append_module
from pydrone._triton import gae as gae_module
from pydrone._triton import gather as gather_module
from pydrone._triton import layers as layers_module
from pydrone._triton import ppo_loss as loss_module

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
NAN = float("nan")
SLOW = pytest.mark.slow  # of each kind, others are in the default tests


@pytest.fixture(autouse=True)
def _on_device():
    with torch.device(DEVICE):
        yield


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same numbers env-major, time-major, or spread over every second row and third column of a larger tensor."""
    if layout == "env":
        return x.contiguous()
    if layout == "time":
        return x.t().contiguous().t()
    spread = x.new_empty(2 * x.shape[0], 3 * x.shape[1])[::2, 1::3]
    return spread.copy_(x)


class Rollout:
    """Random arguments for gae; outputs have the layout and dtype given here for both backends."""

    def __init__(self, num_envs, num_steps, capacity=None, start=0, layout="env", dtype=torch.float32, ends=0.2):
        capacity = capacity or num_steps
        shape = (num_envs, capacity)
        codes = torch.randint(0, 4, shape) * (torch.rand(shape) < ends)
        self.layout, self.dtype, self.num_envs, self.num_steps = layout, dtype, num_envs, num_steps
        self.arguments = {
            "rewards": laid_out(torch.randn(shape), layout),
            "values": laid_out(torch.randn(shape), layout),
            "dones": laid_out(codes.to(torch.uint8), layout),
            "truncated": None,
            "valid": None,
            "last_values": torch.randn(num_envs),
            "final_values": None,
            "final_rows": None,
            "gamma": 0.99,
            "lam": 0.95,
            "start": start,
            "coded": True,
            "bootstrap": 0,
            "cursor": None,
        }

    def run(self, backend, returns=True, stats=True) -> list[Tensor]:
        shape = (self.num_envs, self.num_steps)
        advantages = laid_out(torch.full(shape, NAN, dtype=self.dtype), self.layout)
        returned = laid_out(torch.full(shape, NAN, dtype=self.dtype), self.layout) if returns else None
        moments = torch.full((3,), NAN, dtype=torch.float64) if stats else None
        workspace = torch.full((workspace_size(self.num_envs),), NAN, dtype=torch.float64)
        workspace[0] = 0
        outputs = (advantages, returned, moments)
        backend(*self.arguments.values(), *outputs, workspace if stats else None)
        assert workspace[0].view(torch.int64) == 0, "the ticket must be left at 0"
        return [x for x in outputs if x is not None]

    def check(self, **options) -> None:
        expected, found = self.run(reference.gae, **options), self.run(gae_module.gae, **options)
        for wanted, got in zip(expected, found, strict=True):
            assert torch.equal(wanted.isnan(), got.isnan())
            scale = max(1.0, wanted.nan_to_num().abs().max().item())
            assert (wanted - got).nan_to_num().abs().max().item() <= 1e-5 * scale


def test_gae_by_hand():
    # gamma 0.5, lam 0.5, V_4 = 8. Backwards:
    #   t=3 running:    delta = 1 + 4 - 2 = 3,    A = 3
    #   t=2 terminated: delta = 1 + 0 - 4 = -3,   A = -3
    #   t=1 truncated, final value 6: delta = 1 + 3 - 2 = 2,   A = 2
    #   t=0 running:    delta = 1 + 1 - 2 = 0,    A = 0 + 0.25 * 2 = 0.5
    rollout = Rollout(1, 4)
    rollout.arguments |= {
        "rewards": torch.ones(1, 4),
        "values": torch.tensor([[2.0, 2.0, 4.0, 2.0]]),
        "dones": torch.tensor([[0, 2, 1, 0]], dtype=torch.uint8),
        "last_values": torch.tensor([8.0]),
        "final_values": torch.tensor([[NAN, 6.0, NAN, NAN]]),
        "gamma": 0.5,
        "lam": 0.5,
        "bootstrap": 1,
    }
    advantages, returns, stats = rollout.run(gae_module.gae)
    assert advantages.tolist() == [[0.5, 2.0, -3.0, 3.0]]
    assert returns.tolist() == [[2.5, 4.0, 1.0, 5.0]]
    # count 4, mean 2.5 / 4, M2 = 0.25 + 4 + 9 + 9 - 4 * 0.625^2
    assert stats.tolist() == [4.0, 0.625, 20.6875]


@pytest.mark.parametrize("layout", ["env", "time", "spread"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 37), (5, 2), (8, 31), (9, 32), (17, 100), (3, 128), (2, 129), (66, 41)])
def test_gae_shapes(shape, layout):
    Rollout(*shape, layout=layout).check()


@pytest.mark.parametrize("layout", ["env", "time"])
@pytest.mark.parametrize("ends", [pytest.param(0.0, marks=SLOW), 0.03, pytest.param(1.0, marks=SLOW)])
def test_gae_64_by_100(layout, ends):
    Rollout(64, 100, layout=layout, ends=ends).check()


@pytest.mark.parametrize(("num_steps", "ends"), [(100, 0.05), (9, 0.1), (260, 0.0), (260, 0.01)])
def test_gae_two_rows_a_thread(monkeypatch, num_steps, ends):
    monkeypatch.setattr(gae_module, "MANY", 1)
    Rollout(19, num_steps, ends=ends).check()


@pytest.mark.parametrize("layout", ["env", "time"])
@pytest.mark.parametrize(("capacity", "start"), [(40, 20), (40, 4), (40, 36), (23, 0), (23, 7), (20, 19)])
@pytest.mark.parametrize("by_cursor", [False, True])
def test_gae_wraps(layout, capacity, start, by_cursor):
    rollout = Rollout(9, 20, capacity, start, layout)
    if by_cursor:
        rollout.arguments["start"] = 0
        rollout.arguments["cursor"] = torch.tensor([5 * capacity + start + 20, 5 * capacity + start, 0, 0, 20])
    rollout.check()


@pytest.mark.parametrize("layout", ["env", "time"])
@pytest.mark.parametrize("bootstrap", [0, 1, 2, 3])
@pytest.mark.parametrize("pooled", [False, True])
def test_gae_bootstraps(layout, bootstrap, pooled):
    rollout = Rollout(9, 21, 24, 8, layout, ends=0.5)
    rollout.arguments["bootstrap"] = bootstrap
    if pooled:  # -1 and indices beyond the pool are missing values
        rollout.arguments["final_values"] = torch.randn(20)[::2]
        rollout.arguments["final_rows"] = laid_out(torch.randint(-1, 12, (9, 24)).int(), layout)
    else:
        rollout.arguments["final_values"] = laid_out(torch.randn(9, 24), layout)
    rollout.check()


@pytest.mark.parametrize("layout", ["env", "time"])
@pytest.mark.parametrize(
    "dtype",
    [torch.bool, torch.uint8, torch.int64, torch.float32]
    + [pytest.param(x, marks=SLOW) for x in (torch.int8, torch.int16, torch.float16, torch.float64)],
)
def test_gae_flags(layout, dtype):
    rollout = Rollout(9, 30, layout=layout)
    codes = rollout.arguments["dones"]
    flag = -0.0 + 0.5 * (codes == 1) if dtype.is_floating_point else codes == 1
    rollout.arguments |= {"dones": flag.to(dtype), "truncated": (codes == 2).to(dtype), "coded": False}
    rollout.check()
    rollout.arguments["valid"] = (codes != 3).to(dtype)
    rollout.check()
    rollout.arguments["truncated"] = None
    rollout.check()


@pytest.mark.parametrize("layout", ["env", "time"])
@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("computed", [torch.float32, torch.float64])
def test_gae_dtypes(layout, stored, computed):
    rollout = Rollout(9, 30, layout=layout, dtype=computed)
    for name in ("rewards", "values", "last_values"):
        rollout.arguments[name] = rollout.arguments[name].to(stored)
    rollout.check()


@pytest.mark.parametrize("layout", ["env", "time"])
@pytest.mark.parametrize("lam", [0.0, 0.95, 1.0])
@pytest.mark.parametrize("poison", [NAN, math.inf])
def test_gae_nothing_leaks_over_an_end(layout, lam, poison):
    rollout = Rollout(12, 40, layout=layout, ends=0.0)
    rollout.arguments["lam"] = lam
    codes, rewards = rollout.arguments["dones"], rollout.arguments["rewards"]
    ends = 3 * torch.arange(12)
    codes[torch.arange(12), ends] = torch.tensor([1, 3] * 6, dtype=torch.uint8)
    clean, _ = rollout.run(gae_module.gae, stats=False)
    rewards[torch.arange(12), ends + 1] = poison
    rollout.arguments["values"][torch.arange(12), ends + 1] = poison
    dirty, _ = rollout.run(gae_module.gae, stats=False)
    before = torch.arange(40) <= ends[:, None]
    assert torch.equal(dirty[before], clean[before])
    rollout.check(stats=False)


def test_gae_nan_where_a_final_value_is_missing():
    rollout = Rollout(2, 6, ends=0.0)
    rollout.arguments["dones"][:, 3] = 2
    rollout.arguments |= {"bootstrap": 1, "final_values": torch.ones(1), "final_rows": torch.zeros(2, 6).int()}
    rollout.arguments["final_rows"][1, 3] = 1
    advantages = rollout.run(gae_module.gae)[0]
    assert advantages.isnan().tolist() == [[False] * 6, [True] * 4 + [False] * 2]


@pytest.mark.parametrize("num_steps", [257, 300])
@pytest.mark.parametrize("warps", [1, 2, 16])
def test_gae_carries_through_tiles_and_warps(monkeypatch, num_steps, warps):
    """Three tiles, two of two warps each, one of four."""
    monkeypatch.setattr(gae_module, "WARPS_A_ROW", warps)
    rollout = Rollout(2, num_steps, ends=0.0)
    rollout.arguments |= {"gamma": 0.999, "lam": 0.998}
    rollout.check()


@pytest.mark.parametrize("layout", ["env", "time"])
def test_gae_statistics(layout):
    rollout = Rollout(70, 33, layout=layout)
    *_, first = rollout.run(gae_module.gae)
    *_, second = rollout.run(gae_module.gae)
    assert torch.equal(first, second)
    rollout.check(returns=False)
    rollout.check(stats=False)
    rollout.arguments["dones"].fill_(3)
    assert rollout.run(gae_module.gae)[2].tolist() == [0.0, 0.0, 0.0]
    rollout.arguments["dones"][69, 32] = 1
    advantages, _, stats = rollout.run(gae_module.gae)
    assert stats.tolist() == [1.0, advantages[69, 32].item(), 0.0]


@pytest.mark.parametrize("layout", ["env", "time"])
def test_gae_statistics_of_a_mean_far_from_zero(layout):
    """A mean rounded to float32 has an error, and the sum of squares about it would be too large."""
    rollout = Rollout(70, 33, layout=layout)
    rollout.arguments["gamma"] = 0.0
    rollout.arguments["rewards"].mul_(1e-3).add_(1e3)
    rollout.arguments["values"].zero_()
    rollout.arguments["dones"].zero_()
    advantages, _, stats = rollout.run(gae_module.gae)
    advantages = advantages.double()
    exact = advantages.mean()
    assert stats[1].item() == pytest.approx(exact.item(), abs=1e-7)
    assert stats[2].item() == pytest.approx((advantages - exact).square().sum().item(), rel=1e-4)


def test_gae_empty():
    stats = torch.full((3,), NAN, dtype=torch.float64)
    rollout = Rollout(3, 1)
    gae_module.gae(*rollout.arguments.values(), torch.empty(3, 0), None, stats, torch.zeros(4, dtype=torch.float64))
    assert stats.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.slow
def test_gae_8192_by_100():
    Rollout(8192, 100, ends=0.02).check()


# The fields of a step: (source of any strides, byte offset, stored dtype).
def step_fields(num_envs: int) -> list[tuple[Tensor, int, torch.dtype]]:
    return [
        (torch.randn(num_envs, 17), 0, torch.float32),
        (torch.randn(4, num_envs).t(), 68, torch.float32),
        (torch.randn(num_envs, 3, 4, 5).permute(0, 2, 3, 1)[:, ::2], 96, torch.float16),  # [N, 2, 5, 3]
        (torch.rand(num_envs, 1) > 0.5, 216, torch.bool),
        (torch.randint(0, 9, (num_envs, 2)), 220, torch.uint8),
        (torch.randn(num_envs, 3).bfloat16().double(), 224, torch.bfloat16),
        (torch.randn(num_envs, 100)[:, ::2], 256, torch.float64),
        (torch.randn(num_envs, 80), 672, torch.float32),
        (torch.randint(-9, 9, (num_envs, 2)).to(torch.uint64), 992, torch.uint64),
        (torch.randint(-9, 9, (num_envs, 2)).to(torch.uint32), 1008, torch.uint32),
        (torch.randint(-9, 9, (num_envs, 3)).to(torch.uint16), 1016, torch.uint16),
        (torch.zeros(num_envs, 0), 672, torch.float32),
    ]


CAPACITY, NUM_STEPS, ROW_BYTES, POOL = 7, 5, 1024, 6


def append_state(num_envs: int) -> dict[str, Tensor | list[Tensor]]:
    return {
        "rows": torch.full((CAPACITY, num_envs, ROW_BYTES), 171, dtype=torch.uint8),
        "planes": [torch.full((num_envs, CAPACITY), NAN), torch.full((CAPACITY, num_envs), NAN).t()],
        "codes": torch.full((num_envs, CAPACITY), 9, dtype=torch.uint8),
        "pool": torch.full((2, POOL, 96), 171, dtype=torch.uint8),
        "pool_count": torch.tensor([[0, 0], [1, 2]], dtype=torch.int32),
        "final_rows": torch.full((num_envs, CAPACITY), -7, dtype=torch.int32),
        "cursor": torch.tensor([9, 3, 0, 0, NUM_STEPS]),
    }


def do_append(backend, state, fields, scalars, flags, final, by_cursor=False, commit=True, slot=3, pool_slot=1):
    scalars, finals = scalars or [], [] if final is None else [(final, 4, torch.float32)]
    described = [
        (offset, SCALAR_TYPES[dtype], source.shape[1:].numel(), source.dim() - 1)
        for source, offset, dtype in [*fields, *finals]
    ]
    pool = [state["pool"], state["pool_count"], state["final_rows"]]
    backend(
        [state["rows"], state["codes"], *(state["planes"] if scalars else []), *pool],
        [*(source for source, _, _ in fields), *scalars, *(source for source, _, _ in finals)],
        torch.tensor([(len(fields), len(scalars), len(finals), 0), *described]),
        *(flags or (None, None, None)),
        slot,
        pool_slot,
        state["cursor"] if by_cursor else None,
        commit,
    )


@pytest.mark.parametrize("num_envs", [1, 37])
@pytest.mark.parametrize("with_final", [True, False])
@pytest.mark.parametrize(
    ("by_cursor", "appended", "commit"),
    [(False, 9, True), (True, 9, True), (True, 9, False), (True, 10, True)],
    ids=["host", "commit", "no commit", "full"],
)
def test_append(num_envs, by_cursor, appended, with_final, commit):
    fields = step_fields(num_envs)
    final = torch.randn(num_envs, 17)
    scalars = [torch.randn(num_envs, 3)[:, 1], torch.randn(num_envs, 1)]
    flags = (torch.rand(num_envs, 1) < 0.5, torch.rand(num_envs) < 0.4, (torch.rand(num_envs) < 0.8).int())
    states = []
    for backend in (reference.append, append_module.append):
        states.append(append_state(num_envs))
        states[-1]["cursor"][0] = appended
        do_append(backend, states[-1], fields, scalars, flags, final if with_final else None, by_cursor, commit)
    expected, found = states
    for name in ("rows", "codes", "pool_count", "cursor"):
        assert torch.equal(expected[name], found[name]), name
    for wanted, got in zip(expected["planes"], found["planes"], strict=True):
        assert torch.equal(wanted.view(torch.int32), got.view(torch.int32))
    # The order in the pool is free: as many rows are placed, each once, where each environment's index says.
    slot, pool_slot = (9 % CAPACITY, 9 // NUM_STEPS % 2) if by_cursor else (3, 1)
    wanted, got = expected["final_rows"], found["final_rows"]
    assert torch.equal(wanted == -7, got == -7)
    placed = (got[:, slot] >= 0).nonzero().flatten()
    assert len(placed) == (wanted[:, slot] >= 0).sum() == got[placed, slot].unique().numel()
    pool = found["pool"][pool_slot]
    assert torch.equal(pool[got[placed, slot].long()][:, 4:72].contiguous().view(torch.float32), final[placed])
    others = torch.ones(2, POOL, dtype=torch.bool)
    others[pool_slot, got[placed, slot].long()] = False
    assert bool((found["pool"][others] == 171).all())


def test_append_in_halves():
    fields, states = step_fields(5), []
    for backend in (reference.append, append_module.append):
        state = append_state(5)
        do_append(backend, state, fields[:4], [torch.arange(5.0), torch.ones(5)], None, None, True, commit=False)
        assert state["cursor"].tolist() == [9, 3, 0, 0, NUM_STEPS]
        do_append(backend, state, fields[4:], [], (torch.ones(5), None, None), None, True)
        assert state["cursor"].tolist() == [10, 3, 0, 0, NUM_STEPS]
        states.append(state)
    assert torch.equal(states[0]["rows"], states[1]["rows"])
    assert torch.equal(states[0]["codes"], states[1]["codes"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("by_cursor", [False, True])
def test_append_looks_for_what_is_not_finite(by_cursor, dtype):
    """Only the first field is checked, in its stored dtype, and flagged per rollout; the largest number is finite."""
    for number, expected in ((NAN, 1), (-float("inf"), 1), (torch.finfo(dtype).max, 0)):
        for env, k, field in ((0, 0, 0), (36, 69, 0), (5, 3, 1)):
            sources = [torch.zeros(37, 70, dtype=dtype), torch.zeros(37, 70, dtype=dtype)]
            sources[field][env, k] = number
            offset = 70 * dtype.itemsize
            number_of = SCALAR_TYPES[dtype]
            layout = torch.tensor([[2, 0, 0, 1], [0, number_of, 70, 1], [offset, number_of, 70, 1]])
            rows, codes = torch.zeros(4, 37, 1120, dtype=torch.uint8), torch.zeros(37, 4, dtype=torch.uint8)
            not_finite = torch.zeros(2, dtype=torch.int32)
            cursor = torch.tensor([6, 4, 0, 0, 2]) if by_cursor else None
            append_module.append(
                [rows, codes, not_finite], sources, layout, None, None, None, 2, 1, cursor, False
            )  # fmt: skip
            assert not_finite.tolist() == [0, expected if field == 0 else 0]


def test_append_names_what_it_cannot_store():
    state = append_state(3)
    tangled = torch.zeros(3, 4, 4, 4, 4)[:, ::2, ::3, ::2, ::3]
    with pytest.raises(ValueError, match=r"sources\[0\]: expected at most 3 unrelated inner strides"):
        do_append(append_module.append, state, [(tangled, 0, torch.float32)], [], None, None)
    with pytest.raises(ValueError, match=r"sources\[0\]: .* row of 1024, got offset 1000"):
        do_append(append_module.append, state, [(torch.zeros(3, 17), 1000, torch.float32)], [], None, None)


NUM_ENVS = 37


def filled_rows() -> Tensor:
    """[CAPACITY, NUM_ENVS, ROW_BYTES] of valid numbers, different in each slot."""
    state = append_state(NUM_ENVS)
    for slot in range(CAPACITY):
        do_append(reference.append, state, step_fields(NUM_ENVS), [], None, None, slot=slot)
    return state["rows"]


GATHERED = [
    (0, torch.float32, (17,), torch.float32),
    (96, torch.float16, (2, 5, 3), torch.float32),
    (216, torch.bool, (), torch.bool),
    (220, torch.uint8, (2,), torch.uint8),
    (224, torch.bfloat16, (3,), torch.float32),
    (256, torch.float64, (50,), torch.float64),
    (672, torch.float32, (80,), torch.float32),
    (96, torch.float16, (2, 5, 3), torch.float16),
    (224, torch.bfloat16, (3,), torch.bfloat16),
    (992, torch.uint64, (2,), torch.uint64),
    (1008, torch.uint32, (2,), torch.uint32),
    (1016, torch.uint16, (3,), torch.uint16),
    (672, torch.float32, (0,), torch.float32),
]


@pytest.mark.parametrize(
    ("batch", "shuffle", "subset", "by_cursor", "count", "with_returns"),
    [
        (1, True, False, False, None, False),
        (64, False, False, False, 100.0, True),
        (150, True, False, False, 100.0, False),
        (150, True, True, False, 100.0, False),
        (150, True, True, True, 0.0, True),
        (65, False, True, True, 1.0, False),
        (178, True, False, True, 2.0, True),
    ],
)
def test_gather(batch, shuffle, subset, by_cursor, count, with_returns):
    rows = filled_rows()
    advantages = torch.randn(NUM_STEPS, NUM_ENVS).t()
    returns = torch.randn(NUM_STEPS, NUM_ENVS).t() if with_returns else None
    total = NUM_ENVS * NUM_STEPS
    numbers = torch.randperm(total)[:160] if subset else None
    stats = None if count is None else torch.tensor([count, 0.3, 70.0], dtype=torch.float64)
    cursor = torch.tensor([2**33 + 15, 2**33 + 10, 0, 0, NUM_STEPS]) if by_cursor else None
    outcome = []
    for backend in (reference.gather, gather_module.gather):
        fields = [torch.full((batch, *shape), 77).to(dtype) for _, _, shape, dtype in GATHERED]
        scalars = [torch.full((batch,), NAN), torch.full((batch,), NAN)]
        indices = torch.full((batch,), -1)
        offsets, stored = [f[0] for f in GATHERED], [SCALAR_TYPES[f[1]] for f in GATHERED]
        backend(
            rows, offsets, stored, fields, 64, advantages, returns, stats, numbers, NUM_STEPS, 4,
            160 if subset else total, 2**62 + 12345, 2**33 + 1, 3, shuffle, 7, cursor, *scalars, indices,
        )  # fmt: skip
        outcome.append((fields, scalars, indices))
    (fields, scalars, indices), (fields_, scalars_, indices_) = outcome
    assert torch.equal(indices, indices_)
    for wanted, got in zip(fields, fields_, strict=True):
        assert torch.equal(wanted, got)
    for wanted, got in zip(scalars, scalars_, strict=True):
        # With std 0, 1 / epsilon scales advantages to 1e8: compare at the scale of the batch.
        assert (wanted - got).abs().max().item() <= 1e-5 * max(1.0, wanted.abs().max().item())


# The last: a square, of which no position leaves the range, and whole programs.
@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (3, 1), (5, 1), (17, 1), (4, 25), (101, 1), (16, 36)])
def test_gather_permutation(shape):
    total = math.prod(shape)
    rows = torch.zeros(shape[1], shape[0], 32, dtype=torch.uint8)
    seen = []
    for key, rollout, epoch in ((0, 0, 0), (2**63 - 1, 0, 0), (7, 2**40 + 1, 0), (7, 2**40 + 1, 2**31 + 5)):
        indices = torch.full((total,), -1)
        gather_module.gather(
            rows, [], [], [], 0, None, None, None, None, shape[1], 0, total, key, rollout, epoch, True, 0, None, None,
            None, indices,
        )  # fmt: skip
        assert torch.equal(indices, reference.permute(torch.arange(total), total, key, rollout, epoch))
        assert torch.equal(indices.sort().values, torch.arange(total))
        seen.append(tuple(indices.tolist()))
    if total > 20:
        assert len(set(seen)) == len(seen)


def test_gather_nothing():
    rows = torch.zeros(2, 3, 32, dtype=torch.uint8)
    gather_module.gather(
        rows, [0], [0], [torch.zeros(0, 4, dtype=torch.uint8)], 0, None, None, None, None, 2, 0, 6, 1, 0, 0, True, 0,
        None, None, None, None,
    )  # fmt: skip


@pytest.mark.parametrize(("given", "expected"), loss_cases.HAND)
def test_loss_by_hand(given, expected):
    loss_cases.check_by_hand(loss_module.ppo_loss, given, expected)


@pytest.mark.parametrize("actions", range(1, 18))
@pytest.mark.parametrize("size", [1, 130])
def test_loss_actions(size, actions):
    loss_cases.check(loss_module.ppo_loss, loss_cases.random_case(size, actions, value_clip=0.2, entropy_coef=0.01))


@pytest.mark.parametrize("size", [2, 511, 512, 513, 5000])
def test_loss_sizes(size):
    """Several programs, with partial sums added in several rounds."""
    options = {"value_clip": 0.1, "value_loss_coef": 0.7, "entropy_coef": 0.3, "num_samples": 2 * size}
    case = loss_cases.random_case(size, 4, **options)
    loss_cases.check(loss_module.ppo_loss, case)
    first, second = (loss_cases.run(loss_module.ppo_loss, case) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_loss_more_programs_than_partial_sums(monkeypatch):
    monkeypatch.setattr(loss_module, "TILE", 64)  # 16 samples per program, 16 partial sums at a time
    loss_cases.check(loss_module.ppo_loss, loss_cases.random_case(700, 4, value_clip=0.2))


def test_loss_options():
    loss = loss_module.ppo_loss
    loss_cases.check(loss, loss_cases.random_case(70, 4))  # no value clipping
    loss_cases.check(loss, loss_cases.random_case(70, 4, value_clip=0.0))
    loss_cases.check(loss, loss_cases.random_case(70, 4) | {"mu": None, "sigma": None})
    moments = {"value_shift": torch.tensor(0.7), "value_std": torch.tensor(1.9)}
    loss_cases.check(loss, loss_cases.random_case(70, 4, **moments, value_clip=0.2))
    loss_cases.check(loss, loss_cases.random_case(70, 4, torch.float64, value_clip=0.2), torch.float64)


def test_loss_any_strides():
    case = loss_cases.random_case(70, 3, value_clip=0.2)
    for name, x in case.items():
        if isinstance(x, Tensor):
            spread = torch.full([2 * n for n in x.shape], NAN)
            case[name] = (spread[1::2, ::2] if x.dim() == 2 else spread[::2]).copy_(x)
    loss_cases.check(loss_module.ppo_loss, case)


def test_loss_propagates_nan():
    case = loss_cases.random_case(40, 2, value_clip=0.2)
    case["mean"][7, 1] = NAN
    found = loss_cases.run(loss_module.ppo_loss, case)
    assert found["metrics"].isnan().tolist() == [True, False, False, True]
    assert found["mean_grad"].isnan().any(1).nonzero().tolist() == [[7]] and found["std_grad"].isnan().any()
    for name in ("values", "returns", "new_values"):
        case = loss_cases.random_case(40, 2, value_clip=0.2)
        case[name][3] = NAN
        found = loss_cases.run(loss_module.ppo_loss, case)
        assert found["metrics"].isnan().tolist() == [False, True, False, False], name


def test_loss_nothing():
    found = loss_cases.run(loss_module.ppo_loss, loss_cases.random_case(0, 2, num_samples=5))
    assert found["std_grad"].tolist() == [0, 0] and found["metrics"].tolist() == [0] * 4


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
@pytest.mark.parametrize("shape", [(0, 3), (1, 1), (17, 5), (33, 130), (600, 64)], ids=str)
def test_layer(shape, activation):
    layer_cases.check(layers_module.activate, layers_module.activate_backward, *shape, activation)


def test_layer_several_tiles_and_partial_sums(monkeypatch):
    monkeypatch.setattr(layers_module, "LAYER_ROWS", 8)  # 20 programs, which add up 16 sums at a time
    monkeypatch.setattr(layers_module, "layer_programs", lambda rows: 20)
    layer_cases.check(layers_module.activate, layers_module.activate_backward, 500, 3, "elu", programs=20)


def test_layers_of_different_widths_share_a_workspace():
    """As the layers of a network do, minibatch after minibatch."""
    rows, widths = 10, (512, 256, 128)
    workspace = torch.zeros(layer_workspace_size(rows, max(widths)), dtype=torch.float64)
    for width in widths * 2:
        grad, bias_grad = torch.randn(rows, width), torch.full((width,), torch.nan)
        layers_module.activate_backward(grad, None, -1, None, bias_grad, workspace)
        torch.testing.assert_close(bias_grad, grad.sum(0))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_layer_propagates_nan(activation):
    layer_cases.check_nan(layers_module.activate, layers_module.activate_backward, activation)
