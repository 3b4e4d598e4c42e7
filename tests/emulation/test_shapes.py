"""The scan's kernels by the shape of a rollout: several environments to a warp, several warps to an environment,
columns in chunks, more environments than blocks take at once. Against the reference in float64."""

from __future__ import annotations

import math

import pytest
import torch
from rollout_model import assert_close
from torch import Tensor

from pydrone.ops import reference
from pydrone.ops.schema import CURSOR_DISCARDED, CURSOR_SIZE, workspace_size

RUNNING, TERMINATED, TRUNCATED, INVALID = range(4)


def planes(num_envs: int, num_steps: int, capacity: int, start: int, seed: int = 0) -> dict[str, Tensor]:
    """Arguments of gae by name, [N, C], codes among them. What no result may depend on is NaN: slots outside the
    rollout, invalid rewards and ratios, and, for one environment in four, everything after an end."""
    g = torch.Generator().manual_seed(seed)
    slots = (torch.arange(num_steps) + start) % capacity
    chance = torch.rand(num_envs, num_steps, generator=g)
    codes = torch.where(chance < 0.02, TERMINATED, RUNNING)
    codes = torch.where(chance < 0.01, TRUNCATED, codes)
    codes = torch.where(chance > 0.99, INVALID, codes).to(torch.uint8)
    rewards, values, final, ratios, q = torch.randn(5, num_envs, num_steps, generator=g)
    last = torch.randn(num_envs, generator=g)
    cut = torch.zeros(num_envs, num_steps, dtype=torch.bool)
    if num_steps > 1:
        ends = torch.randint(num_steps, (num_envs,), generator=g)
        dirty = (torch.arange(num_envs) % 4 == 3) & (ends < num_steps - 1)
        codes[dirty, ends[dirty]] = TERMINATED
        cut = dirty[:, None] & (torch.arange(num_steps) > ends[:, None])
        rewards[cut] = values[cut] = ratios[cut] = q[cut] = math.nan
        codes[cut] = RUNNING
        last[dirty] = math.nan
    rewards[codes == INVALID] = ratios[codes == INVALID] = math.nan
    final[codes != TRUNCATED] = math.nan

    def ring(x: Tensor, fill: float) -> Tensor:
        made = torch.full((num_envs, capacity), fill, dtype=x.dtype)
        made[:, slots] = x
        return made

    return {
        "rewards": ring(rewards, math.nan),
        "values": ring(values, math.nan),
        "codes": ring(codes, INVALID),
        "last": last,
        "final": ring(final, math.nan),
        "log_rhos": ring(ratios, math.nan),
        "q": ring(q, math.nan),
        "kept": ~cut,
    }


def scanned(gae, x: dict, num_steps: int, start: int, coded: bool, cursor: Tensor | None, stats: bool, dtype) -> tuple:
    num_envs = x["rewards"].shape[0]
    out = torch.full((2, num_envs, num_steps), math.nan, dtype=dtype)
    if x["rewards"].stride(0) == 1 and x["rewards"].stride(1) != 1:
        out = torch.full((2, num_steps, num_envs), math.nan, dtype=dtype).transpose(1, 2)
    moments = torch.full((3,), math.nan, dtype=torch.float64) if stats else None
    workspace = torch.zeros(workspace_size(num_envs), dtype=torch.float64) if stats else None
    codes = x["codes"]
    flags = (codes, None, None)
    if not coded:
        # Any bits but none: a flag is what is not zero.
        ended = (codes == TERMINATED) | (codes == TRUNCATED)
        flags = ended.to(torch.uint8) * 128, (codes == TRUNCATED).to(torch.int8) * -2, (codes != INVALID)
    given = None if cursor is None else cursor.clone()
    for _ in range(2 if stats else 1):  # twice: a launch must leave the workspace fit for the next
        gae(
            x["rewards"], x["values"], *flags, x["last"], x["final"], None, 0.97, 0.9, start, coded, 1, given,
            out[0], out[1], moments, workspace,
        )  # fmt: skip
    return out, moments


# (environments, steps): the kernel, where the planes are aligned rows.
SHAPES = {
    (37, 1): "narrow accesses",
    (5, 3): "narrow accesses",
    (130, 8): "two lanes to an environment",
    (67, 16): "four lanes",
    (45, 24): "eight lanes",
    (45, 32): "eight lanes",
    (33, 50): "narrow accesses",
    (33, 64): "sixteen lanes",
    (17, 100): "a warp to an environment",
    (4100, 68): "a warp to two environments",
    (16390, 20): "eight lanes to two environments",
    (3, 132): "two warps to an environment",
    (3, 1001): "narrow accesses, eight warps",
    (1, 4500): "sixteen warps, three spans",
    (9, 2048): "sixteen warps, one span",
    (600, 260): "four warps, several environments to a block",
}
LAYOUTS = ("rows", "flags", "columns", "any")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda x: f"{x[0]}x{x[1]}")
def test_every_shape(shape, layout, operations):
    num_envs, num_steps = shape
    if layout != "rows" and num_envs * num_steps > 100_000:
        pytest.skip("one layout is enough for many samples")
    x = planes(num_envs, num_steps, num_steps, 0)
    expected, _ = scanned(reference.gae, double(x), num_steps, 0, True, None, False, torch.float64)
    kept, valid = x["kept"], x["codes"] != INVALID
    if layout == "columns":
        x = {name: y.t().contiguous().t() if y.dim() == 2 else y for name, y in x.items()}
    if layout == "any":  # another dtype, and strides
        x["values"] = x["values"].double().repeat_interleave(2, 1)[:, ::2]
    out, _ = scanned(operations.gae, x, num_steps, 0, layout != "flags", None, False, torch.float32)
    for got, wanted in zip(out, expected, strict=True):
        assert_close(got[kept], wanted[kept])
    clean = {name: y.nan_to_num(0.5) if y.is_floating_point() else y for name, y in x.items()}

    def once() -> tuple[Tensor, Tensor]:
        return scanned(operations.gae, clean, num_steps, 0, layout != "flags", None, True, torch.float32)

    (advantages, returns), moments = once()
    if num_envs * num_steps < 200_000:  # the emulator takes its time
        assert all(map(torch.equal, (advantages, returns, moments), (*(again := once())[0], again[1])))
    sample = advantages[valid].double()
    count, mean, m2 = moments.tolist()
    assert count == sample.numel()
    assert mean == pytest.approx(sample.mean().item() if count else 0, rel=1e-6, abs=1e-7)
    assert m2 == pytest.approx((sample - mean).square().sum().item(), rel=1e-5)


OFF_POLICY = [(37, 1), (45, 24), (17, 100), (9, 50), (3, 132), (3, 1001), (1, 4500), (600, 132)]


@pytest.mark.parametrize("layout", ["rows", "columns", "any"])
@pytest.mark.parametrize("retrace", [False, True], ids=["vtrace", "retrace"])
@pytest.mark.parametrize("shape", OFF_POLICY, ids=lambda x: f"{x[0]}x{x[1]}")
def test_off_policy_in_every_shape(shape, retrace, layout, operations):
    num_envs, num_steps = shape
    capacity, start = num_steps + 4, 4  # the rollout wraps
    data = planes(num_envs, num_steps, capacity, start)
    kept = data["kept"]

    def run(off_policy, x: dict, dtype) -> tuple[Tensor, ...]:
        out = torch.full((2, num_envs, num_steps), math.nan, dtype=dtype)
        advantages, moments = (None, None) if retrace else (out[0], torch.full((3,), math.nan, dtype=torch.float64))
        off_policy(
            *(x["rewards"], x["values"], x["codes"], None, None, x["last"], x["final"], None, x["log_rhos"]),
            *(x["q"] if retrace else None, 0.97, 0.9, 1.0, 1.5, start, True, 1, None, advantages, out[1], moments),
            torch.zeros(workspace_size(num_envs), dtype=torch.float64),
        )
        return (out[1][kept],) if retrace else (out[1][kept], out[0][kept], moments)

    expected = run(reference.off_policy, double(data), torch.float64)
    if layout == "columns":
        data = {name: x.t().contiguous().t() if x.dim() == 2 else x for name, x in data.items()}
    if layout == "any":
        data["log_rhos"] = data["log_rhos"].double().repeat_interleave(2, 1)[:, ::2]
    actual, again = (run(operations.off_policy, data, torch.float32) for _ in range(2))
    for x, y in zip(actual[:2], expected[:2], strict=True):
        assert_close(x, y)
    if not retrace and not kept.all():
        assert actual[2][1:].isnan().all()  # a NaN advantage shows in the statistics
    elif not retrace:
        assert actual[2].tolist() == pytest.approx(expected[2].tolist(), rel=1e-5)
    assert all(torch.equal(x.nan_to_num(7), y.nan_to_num(7)) for x, y in zip(actual, again, strict=True))


@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("num_steps, capacity, starts", [(8, 12, (0, 8, 5)), (132, 200, (0, 180, 77)), (9, 11, (0, 7))])
def test_a_cursor_begins_anywhere(num_steps, capacity, starts, layout, operations):
    """Where the host does not know whether a rollout begins aligned."""
    for start in starts:
        x = planes(7, num_steps, capacity, start)
        expected, _ = scanned(reference.gae, double(x), num_steps, start, True, None, False, torch.float64)
        if layout == "columns":
            x = {name: y.t().contiguous().t() if y.dim() == 2 else y for name, y in x.items()}
        cursor = torch.zeros(CURSOR_SIZE, dtype=torch.int64)
        cursor[CURSOR_DISCARDED] = start + 3 * capacity
        out, _ = scanned(operations.gae, x, num_steps, -1, True, cursor, False, torch.float32)
        for got, wanted in zip(out, expected, strict=True):
            assert_close(got[x["kept"]], wanted[x["kept"]])


@pytest.mark.parametrize("num_envs, num_steps, columns", [(4200, 5, False), (16500, 2, True), (300, 17, True)])
def test_more_environments_than_blocks_take_at_once(num_envs, num_steps, columns, operations):
    x = planes(num_envs, num_steps, num_steps, 0)
    expected, _ = scanned(reference.gae, double(x), num_steps, 0, True, None, False, torch.float64)
    if columns:
        x = {name: y.t().contiguous().t() if y.dim() == 2 else y for name, y in x.items()}
    else:
        x["rewards"] = x["rewards"].double()
    out, _ = scanned(operations.gae, x, num_steps, 0, True, None, False, torch.float32)
    for got, wanted in zip(out, expected, strict=True):
        assert_close(got[x["kept"]], wanted[x["kept"]])


@pytest.mark.parametrize("offset", [0, 1])
def test_a_workspace_at_any_address(offset, operations):
    """Partial sums are pairs, aligned to 16 bytes; a workspace need not be. As many blocks as it has room for."""
    num_envs, num_steps = 600, 300
    rewards = torch.randn(num_envs, num_steps)
    rewards[0] += 5
    zeros, last = torch.zeros_like(rewards), torch.zeros(num_envs)
    memory = torch.zeros(workspace_size(num_envs) + 3, dtype=torch.float64)
    memory[offset + workspace_size(num_envs) :] = 7
    moments = torch.full((3,), math.nan, dtype=torch.float64)
    workspace = memory[offset:][: workspace_size(num_envs)]
    outputs = torch.empty_like(rewards), None, moments, workspace
    operations.gae(rewards, zeros, zeros, None, None, last, None, None, 0.0, 0.0, 0, False, 0, None, *outputs)
    sample = rewards.double()
    wanted = [sample.numel(), sample.mean().item(), (sample - sample.mean()).square().sum().item()]
    assert moments.tolist() == pytest.approx(wanted, rel=1e-6)
    assert memory[offset] == 0 and (memory[offset + workspace_size(num_envs) :] == 7).all()


def double(x: dict) -> dict:
    return {name: y.double() if y.is_floating_point() else y for name, y in x.items()}
