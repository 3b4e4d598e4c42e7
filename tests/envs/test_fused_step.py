"""When a kernel computes the steps; tests/ops/step_cases.py says that it computes the same."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pydrone.envs import Randomization
from pydrone.envs.fused import why_not
from pydrone.envs.hover_task import HoverTask
from pydrone.envs.quadrotor import Quadrotor, QuadrotorCourse
from pydrone.ops import triton

ALL = Randomization(mass=(0.8, 1.2), latency=(0, 2), wind=(0, 0.1), pos_noise=(0, 0.1))


class Own(HoverTask):
    """A task of somebody else."""


def on_cuda(task_type: type = HoverTask) -> HoverTask:
    task = task_type.__new__(task_type)
    task.device = torch.device("cuda")
    return task


def test_on_a_cpu_it_is_pytorch() -> None:
    for fused in (None, False):
        assert Quadrotor(2, fused=fused).task.fused is None
    assert QuadrotorCourse(2).task.not_fused == "the kernel needs a CUDA device, the task is on cpu"
    with pytest.raises(ValueError, match="fused: expected False or None here: the kernel needs a CUDA device"):
        Quadrotor(2, fused=True)


def test_on_cuda_it_is_the_kernel_unless_there_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYDRONE_BACKEND", raising=False)
    monkeypatch.setattr(triton, "missing", lambda: None)
    assert why_not(on_cuda(), None) is None and why_not(on_cuda(), True) is None
    assert why_not(on_cuda(), False) == "fused is False"
    with pytest.warns(RuntimeWarning, match="PyTorch computes the steps of Own, .*: Own may differ from the tasks"):
        assert "Own may differ" in why_not(on_cuda(Own), None)
    monkeypatch.setattr(triton, "missing", lambda: "triton is not installed")
    with pytest.warns(RuntimeWarning, match="triton is not installed. fused=False says"):
        assert why_not(on_cuda(), None) == "triton is not installed"
    monkeypatch.setenv("PYDRONE_BACKEND", "reference")
    assert why_not(on_cuda(), None) == "PYDRONE_BACKEND is 'reference'"


class Drawn(TorchDispatchMode):
    """Counts the operations that draw random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if "rand" in name or name in ("uniform_", "normal_"):
            self.calls.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("ranges", "draws"), [(None, 1), (Randomization(mass=(0.8, 1.2)), 1), (ALL, 2)])
def test_a_step_draws_all_its_numbers_in_two_launches_at_most(ranges: Randomization | None, draws: int) -> None:
    env = QuadrotorCourse(4, randomization=ranges)
    with Drawn() as seen:
        env.step(torch.zeros(4, 4))
    assert len(seen.calls) == draws, seen.calls
