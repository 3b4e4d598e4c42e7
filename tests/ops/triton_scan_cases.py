"""Cases for what GAE, V-trace and Retrace share in Triton: shapes of a launch, carries, statistics, links of every
step. test_triton.py runs them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from triton_cases import NAN, SLOW, Rollout, _on_device, laid_out  # noqa: F401, a fixture

from pydrone._triton import gae as gae_module
from pydrone.ops import reference
from pydrone.ops.schema import workspace_size


class OffPolicy(Rollout):
    """Random arguments for V-trace, or, with ``retrace``, Retrace."""

    def __init__(self, *args, retrace=False, **options):
        super().__init__(*args, **options)
        shape = self.arguments["rewards"].shape
        behind = {name: self.arguments.pop(name) for name in ("gamma", "lam", "start", "coded", "bootstrap", "cursor")}
        self.arguments["log_rhos"] = laid_out(0.5 * torch.randn(shape), self.layout)
        self.arguments["q_values"] = laid_out(torch.randn(shape), self.layout) if retrace else None
        clips = {"rho_clip": 1.1, "c_clip": 0.9}
        self.arguments |= {"gamma": behind.pop("gamma"), "lam": behind.pop("lam"), **clips, **behind}

    def run(self, backend, advantages=True, stats=True) -> list[Tensor]:
        shape = (self.num_envs, self.num_steps)
        advantages = advantages and self.arguments["q_values"] is None
        given = laid_out(torch.full(shape, NAN, dtype=self.dtype), self.layout) if advantages else None
        targets = laid_out(torch.full(shape, NAN, dtype=self.dtype), self.layout)
        moments = torch.full((3,), NAN, dtype=torch.float64) if advantages and stats else None
        workspace = torch.full((workspace_size(self.num_envs),), NAN, dtype=torch.float64)
        workspace[0] = 0
        backend(*self.arguments.values(), given, targets, moments, workspace if moments is not None else None)
        return [x for x in (given, targets, moments) if x is not None]

    def check(self, **options) -> None:
        expected, found = self.run(reference.off_policy, **options), self.run(gae_module.off_policy, **options)
        for wanted, got in zip(expected, found, strict=True):
            assert torch.equal(wanted.isnan(), got.isnan())
            scale = max(1.0, wanted.nan_to_num(posinf=0, neginf=0).abs().max().item())
            assert torch.equal(wanted.isinf(), got.isinf())
            difference = (wanted - got).nan_to_num(posinf=0, neginf=0)
            assert difference.abs().max().item() <= 1e-5 * scale


# ---------------------------------------------------------------------------------------------- shapes of a launch


@pytest.mark.parametrize("num_steps", [1, 4, 5, 8, 9, 16, 24, 33, 64, 65, 100, 128, 129, 300, 1024, 2048, 5000, 262144])
def test_shapes_fill_their_programs_and_fit_the_workspace(num_steps):
    for num_envs in (*range(1, 1100, 7), 1365, 2047, 2048, 4095, 4096, 8192, 16384, 32768, 65536, 100_003):
        shape = gae_module.shape_of(num_envs, num_steps)
        threads = shape.rows * shape.lanes * shape.segments
        assert threads in (32 * shape.warps, 2 * 32 * shape.warps)
        assert shape.lanes <= 32 and shape.segments <= shape.warps <= 16
        assert shape.segments == 1 or shape.lanes == 32
        programs = -(-num_envs // shape.rows)
        assert 1 + 3 * programs <= workspace_size(num_envs)


def test_shapes_of_the_benchmarks():
    """(rows, lanes, segments, warps): about one program a multiprocessor, and no loop over tiles."""
    expected = {
        (8192, 100): (32, 32, 1, 16),
        (4096, 24): (32, 8, 1, 8),
        (1024, 100): (8, 32, 1, 8),
        (16384, 128): (32, 32, 1, 16),
        (65536, 100): (32, 32, 1, 16),
        (256, 2048): (1, 32, 16, 16),
        (8192, 8): (64, 2, 1, 4),
        (32768, 8): (256, 2, 1, 16),
        (32768, 16): (256, 4, 1, 16),
    }
    assert {size: tuple(gae_module.shape_of(*size)) for size in expected} == expected


@pytest.mark.parametrize("shape", [(33, 4), (40, 7), (21, 13), (5, 24), (130, 3)])
@pytest.mark.parametrize("ends", [0.0, 0.3])
def test_several_environments_to_a_warp(shape, ends):
    Rollout(*shape, ends=ends).check()


@pytest.mark.parametrize(("warps", "num_steps"), [(2, 200), (4, 411), (8, 1000), (2, 600)])
@pytest.mark.parametrize("layout", ["env", "spread"])
def test_several_warps_to_an_environment(monkeypatch, warps, num_steps, layout):
    """The last of them in three tiles."""
    monkeypatch.setattr(gae_module, "WARPS_A_ROW", warps)
    Rollout(2, num_steps, layout=layout, ends=0.01).check()


@pytest.mark.parametrize("num_envs", [1, 3])
def test_several_rows_and_segments_in_a_program(monkeypatch, num_envs):
    monkeypatch.setattr(gae_module, "WARPS_A_ROW", 2)
    Rollout(num_envs, 250, ends=0.02).check()


def test_several_warps_wrap(monkeypatch):
    for start, by_cursor in ((200, False), (8, True), (250, True)):
        rollout = Rollout(2, 200, 260, start, ends=0.02)
        if by_cursor:
            rollout.arguments["start"] = 0
            rollout.arguments["cursor"] = torch.tensor([260 + start + 200, 260 + start, 0, 0, 200])
        rollout.check()


@pytest.mark.parametrize("gamma", [1.0, 1e-30])
@pytest.mark.parametrize("warps", [1, 4])
def test_no_number_passes_an_end_between_warps(monkeypatch, gamma, warps):
    """With gamma 1e-30 products of links underflow: -0 still marks a cut."""
    monkeypatch.setattr(gae_module, "WARPS_A_ROW", warps)
    rollout = Rollout(3, 400, ends=0.0)
    rollout.arguments |= {"gamma": gamma, "lam": 1.0}
    ends = torch.tensor([126, 127, 200])
    rollout.arguments["dones"][torch.arange(3), ends] = 1
    clean, _ = rollout.run(gae_module.gae, stats=False)
    for name in ("rewards", "values"):
        rollout.arguments[name][torch.arange(400) > ends[:, None]] = NAN
    rollout.arguments["last_values"].fill_(NAN)
    dirty, _ = rollout.run(gae_module.gae, stats=False)
    before = torch.arange(400) <= ends[:, None]
    assert torch.equal(dirty[before], clean[before]) and bool(dirty[~before].isnan().all())


def test_rows_stored_before_the_ticket(monkeypatch):
    expected = Rollout(9, 33)
    before = expected.run(gae_module.gae)
    monkeypatch.setattr(gae_module, "STORE_FIRST", True)
    assert all(map(torch.equal, before, expected.run(gae_module.gae)))


# ---------------------------------------------------------------------------------------------- statistics


@pytest.mark.parametrize("layout", ["env", "time"])
@pytest.mark.parametrize("num_steps", [33, 300])
def test_statistics_far_from_zero_with_steps_left_out(layout, num_steps):
    """Invalid steps where the pivots are taken: the first step, the last, whole environments, a whole program."""
    rollout = Rollout(20, num_steps, layout=layout, dtype=torch.float64, ends=0.1)
    rewards, dones = rollout.arguments["rewards"], rollout.arguments["dones"]
    rollout.arguments |= {"rewards": rewards.double() + 1e6, "gamma": 0.0}
    dones[:, 0] = dones[:, -1] = 3
    dones[1] = 3
    dones[16:] = 3
    expected, found = (rollout.run(x)[2].tolist() for x in (reference.gae, gae_module.gae))
    assert found[0] == expected[0] and found[1] == pytest.approx(expected[1], rel=1e-14)
    assert found[2] == pytest.approx(expected[2], rel=1e-9)


def test_statistics_of_what_is_not_finite():
    for number in (NAN, math.inf, -math.inf):
        for env, t in ((0, 0), (0, 32), (8, 5)):
            rollout = Rollout(9, 33, ends=0.0)
            rollout.arguments["rewards"][env, t] = number
            count, mean, m2 = rollout.run(gae_module.gae)[2].tolist()
            assert count == 9 * 33 and not (math.isfinite(mean) and math.isfinite(m2))


def test_statistics_of_many_programs(monkeypatch):
    """More than a program's threads: the merge is a loop where PARTIALS are fewer."""
    monkeypatch.setattr(gae_module, "power_of_2", lambda number, least, most: least)
    rollout = Rollout(520, 3)
    monkeypatch.setattr(gae_module, "shape_of", lambda *size: gae_module.Shape(32, 1, 1, 1))
    expected, found = (rollout.run(x)[2] for x in (reference.gae, gae_module.gae))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------------------------------------- V-trace and Retrace

LAYOUTS = pytest.mark.parametrize("layout", ["env", "time"])
ESTIMATORS = pytest.mark.parametrize("retrace", [False, True], ids=["vtrace", "retrace"])


def test_vtrace_by_hand():
    # gamma 0.5, lam 0.5, rho_clip 1, c_clip 0.5, V_2 = 4, ratios 2 and 0.5.
    #   t=1: delta = 1 + 2 - 2 = 1,  rho 0.5: x = 0.5, vs = 2.5,  advantage = 0.5
    #   t=0: delta = 1 + 1 - 2 = 0,  rho 1, c = 0.25: x = 0 + 0.5 * 0.25 * 0.5 = 0.0625, vs = 2.0625,
    #        advantage = 1 * (0 + 0.5 * 0.5) = 0.25
    rollout = OffPolicy(1, 2, ends=0.0)
    rollout.arguments |= {
        "rewards": torch.ones(1, 2), "values": torch.full((1, 2), 2.0), "last_values": torch.tensor([4.0]),
        "log_rhos": torch.tensor([[2.0, 0.5]]).log(), "gamma": 0.5, "lam": 0.5, "rho_clip": 1.0, "c_clip": 0.5,
    }  # fmt: skip
    advantages, targets, stats = rollout.run(gae_module.off_policy)
    torch.testing.assert_close(advantages, torch.tensor([[0.25, 0.5]]))
    torch.testing.assert_close(targets, torch.tensor([[2.0625, 2.5]]))
    torch.testing.assert_close(stats.cpu(), torch.tensor([2.0, 0.375, 0.03125], dtype=torch.float64, device="cpu"))


def test_retrace_by_hand():
    # gamma 0.5, lam 0.5, c_clip 0.5, V_2 = 4, Q 3 and 1, ratios 8 (unused) and 0.25.
    #   t=1: delta = 1 + 2 - 1 = 2, target = 3;  t=0: delta = 1 + 1 - 3 = -1, c_1 = 0.125, x = -1 + 0.0625 * 2
    rollout = OffPolicy(1, 2, ends=0.0, retrace=True)
    rollout.arguments |= {
        "rewards": torch.ones(1, 2), "values": torch.full((1, 2), 2.0), "last_values": torch.tensor([4.0]),
        "log_rhos": torch.tensor([[8.0, 0.25]]).log(), "q_values": torch.tensor([[3.0, 1.0]]),
        "gamma": 0.5, "lam": 0.5, "c_clip": 0.5,
    }  # fmt: skip
    torch.testing.assert_close(rollout.run(gae_module.off_policy)[0], torch.tensor([[2.125, 3.0]]))


@LAYOUTS
@ESTIMATORS
@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (3, 41), (2, 129), (2, 270)], ids=str)
def test_off_policy(shape, retrace, layout):
    OffPolicy(*shape, layout=layout, ends=0.1, retrace=retrace).check()


@ESTIMATORS
def test_off_policy_through_tiles_and_warps(monkeypatch, retrace):
    for warps in (1, 2):
        monkeypatch.setattr(gae_module, "WARPS_A_ROW", warps)
        OffPolicy(2, 300, ends=0.01, retrace=retrace).check()
    monkeypatch.setattr(gae_module, "MANY", 1)
    OffPolicy(9, 20, retrace=retrace).check()


@LAYOUTS
@ESTIMATORS
@pytest.mark.parametrize("bootstrap", [0, 1, 2, 3])
def test_off_policy_bootstraps_and_wraps(bootstrap, retrace, layout):
    rollout = OffPolicy(6, 21, 24, 8, layout, ends=0.5, retrace=retrace)
    rollout.arguments["bootstrap"] = bootstrap
    rollout.arguments["final_values"] = laid_out(torch.randn(6, 24), layout)
    rollout.check()


@LAYOUTS
@ESTIMATORS
@pytest.mark.parametrize("stored", [torch.float16, torch.float64])
@pytest.mark.parametrize("computed", [torch.float32, torch.float64])
def test_off_policy_dtypes(stored, computed, retrace, layout):
    rollout = OffPolicy(4, 9, layout=layout, dtype=computed, retrace=retrace)
    for name in ("rewards", "values", "last_values", "log_rhos", "q_values"):
        if rollout.arguments[name] is not None:
            rollout.arguments[name] = rollout.arguments[name].to(stored)
    expected, found = rollout.run(reference.off_policy), rollout.run(gae_module.off_policy)
    for wanted, got in zip(expected[:2], found[:2], strict=True):
        torch.testing.assert_close(wanted, got, rtol=0, atol=1e-12 if computed == torch.float64 else 1e-4)


@LAYOUTS
@ESTIMATORS
def test_off_policy_shows_a_ratio_that_is_not_a_number(retrace, layout):
    """In the steps that depend on it, and in no other; not if its step is invalid. NaN of either sign, which the
    exponential of a float64 keeps."""
    for number in (NAN, -NAN, math.inf, -math.inf):
        dtype = torch.float64 if number is not NAN else torch.float32
        rollout = OffPolicy(4, 40, layout=layout, ends=0.0, retrace=retrace, dtype=dtype)
        rollout.arguments["log_rhos"] = rollout.arguments["log_rhos"].to(dtype)
        rollout.arguments["dones"][:3, 20] = torch.tensor([0, 1, 3], dtype=torch.uint8)
        rollout.arguments["log_rhos"][:3, 21] = number
        rollout.arguments["log_rhos"][3, 20] = number
        rollout.arguments["dones"][3, 20] = 3
        found = rollout.run(gae_module.off_policy)[-1 if retrace else 1]
        if math.isnan(number):
            assert bool(found[0, :20].isnan().all()) and not bool(found[0, 22:].isnan().any())
            assert not bool(found[1:3, :20].isnan().any()) and not bool(found[3].isnan().any())
        rollout.check(stats=False)


@ESTIMATORS
def test_off_policy_without_bounds(retrace):
    rollout = OffPolicy(4, 9, retrace=retrace)
    rollout.arguments |= {"rho_clip": math.inf, "c_clip": math.inf}
    rollout.check()
    rollout.arguments |= {"rho_clip": 0.0, "c_clip": 0.0}
    rollout.check()


@LAYOUTS
def test_vtrace_without_advantages(layout):
    OffPolicy(4, 30, layout=layout).check(advantages=False)
    OffPolicy(4, 30, layout=layout).check(stats=False)


@LAYOUTS
def test_vtrace_on_policy_is_gae(layout):
    """With ratios of 1 and bounds of 1, vs - V is GAE's advantage."""
    rollout = OffPolicy(5, 30, layout=layout)
    rollout.arguments["log_rhos"].zero_()
    rollout.arguments |= {"rho_clip": 1.0, "c_clip": 1.0}
    targets = rollout.run(gae_module.off_policy)[1]
    plain = Rollout(5, 30, layout=layout)
    plain.arguments = {name: rollout.arguments[name] for name in plain.arguments}
    torch.testing.assert_close(targets, plain.run(gae_module.gae)[1], rtol=1e-5, atol=1e-5)


def test_off_policy_nothing():
    stats = torch.full((3,), NAN, dtype=torch.float64)
    rollout = OffPolicy(3, 1)
    empty = torch.empty(3, 0)
    gae_module.off_policy(*rollout.arguments.values(), empty, empty, stats, torch.zeros(10, dtype=torch.float64))
    assert stats.tolist() == [0.0, 0.0, 0.0]
