"""The CUDA kernels, compiled for the CPU: the CPU suite's cases that take a backend, and direct calls."""

from __future__ import annotations

import bad_input
import pytest
import test_non_finite
import test_ops
import torch
from shared_cases import MODULES, cases

found = cases(*MODULES, test_non_finite)
del found["test_buffer_state_repr_and_truth"]  # it looks for the backend's name
globals().update(found)


@pytest.fixture
def direct(operations, monkeypatch) -> None:
    """torch.ops.pydrone in the modules of direct calls."""
    for module in (test_ops, bad_input):
        monkeypatch.setattr(module, "OPS", torch.ops.pydrone_emulated)


@pytest.mark.parametrize("name", test_ops.SCHEMAS)
def test_agrees_with_the_reference(name, direct):
    test_ops.test_native_and_reference_agree(name)


@pytest.mark.parametrize("name", [*test_ops.HOSTILE, *test_ops.HARMLESS])
def test_hostile_and_harmless_arguments(name, direct):
    if name in test_ops.HARMLESS or name == "a pool's count below zero":  # which no host reads from a device
        (test_ops.HOSTILE | test_ops.HARMLESS)[name]()
    else:
        with pytest.raises(RuntimeError):
            test_ops.HOSTILE[name]()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_wrong_calls_are_refused_by_name(direct, monkeypatch):
    monkeypatch.setattr(bad_input, "SUBJECTS", {bad_input.an_op: 1})
    wrong = []
    for number in range(1000):
        case = bad_input.make(number)
        problem = bad_input.problem(case)
        if problem:
            wrong.append(f"case {number}: {case.what}: {problem}")
    assert not wrong, "\n".join(wrong)
