"""When a kernel computes the steps; tests/ops/step_cases.py says that it computes the same."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pydrone.envs import Randomization
from pydrone.envs.base import StepResult
from pydrone.envs.drone import DroneState
from pydrone.envs.fused import NativeStep, why_not
from pydrone.envs.hover_task import HoverTask
from pydrone.envs.quadrotor import Quadrotor, QuadrotorCourse
from pydrone.ops import native, triton

ALL = Randomization(mass=(0.8, 1.2), latency=(0, 2), wind=(0, 0.1), pos_noise=(0, 0.1))


class Own(HoverTask):
    """A task of somebody else."""


def on_cuda(task_type: type = HoverTask) -> HoverTask:
    task = task_type.__new__(task_type)
    task.device = torch.device("cuda")
    return task


def test_on_a_cpu_it_is_the_native_library_unless_there_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYDRONE_BACKEND", raising=False)
    monkeypatch.setattr(native, "CPU_MISSING", None)
    for fused in (None, True):
        task = QuadrotorCourse(2, fused=fused).task
        assert isinstance(task.fused, NativeStep) and task.not_fused is None
    with pytest.raises(ValueError, match="fused: expected False or None here: Own may differ"):
        Own(2, fused=True)
    assert Own(2).fused is None and Own(2).not_fused.startswith("Own may differ")
    assert Quadrotor(2, fused=False).task.fused is None
    monkeypatch.setattr(native, "CPU_MISSING", "not built: no compiler")
    with pytest.raises(ValueError, match="expected False or None here: there is no native library: not built"):
        Quadrotor(2, fused=True)
    assert Quadrotor(2).task.not_fused == "there is no native library: not built: no compiler"
    monkeypatch.setattr(native, "CPU_MISSING", None)
    torch.set_default_dtype(torch.float64)
    try:
        env = Quadrotor(2)
        assert env.task.not_fused == "the kernel computes in float32, torch's default dtype is torch.float64"
        assert env.step(torch.zeros(2, 4)).obs.dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    monkeypatch.setenv("PYDRONE_BACKEND", "reference")
    assert Quadrotor(2).task.not_fused == "PYDRONE_BACKEND is 'reference'"
    elsewhere = on_cuda()
    elsewhere.device = torch.device("meta")
    assert why_not(elsewhere, None) == "PYDRONE_BACKEND is 'reference'"
    monkeypatch.delenv("PYDRONE_BACKEND")
    assert why_not(elsewhere, None) == "the kernels need a CPU or a CUDA device, the task is on meta"


@pytest.mark.skipif(native.CPU_MISSING is not None, reason=f"no native library: {native.CPU_MISSING}")
def test_whoever_watches_the_steps_sees_the_physics_by_pytorch() -> None:
    """The task's own step stays the library's."""

    class Watch:
        def __init__(self, task: HoverTask) -> None:
            self.task, self.seen = task, []

        def __getattr__(self, name: str) -> object:
            return getattr(self.task, name)

        def step(self, state: DroneState, actions: Tensor) -> StepResult:
            self.seen.append(state)
            return self.task.step(state, actions)

    env = Quadrotor(2, fused=True)
    env.task = watch = Watch(env.task)
    env.step(torch.zeros(2, 4))
    assert len(watch.seen) == 1 and torch.equal(watch.seen[0].pos, env.pos)


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
