"""The Triton kernels against the reference: triton_cases.py, triton_properties.py, triton_scan_cases.py (what GAE,
V-trace and Retrace share), step_cases.py (the environments' steps) and genesis_cases.py (what surrounds the
simulator's), each in its own process.

Triton decides at import, for the whole process, whether kernels are interpreted, and other tests may have imported it
already. On a machine with a GPU the cases run compiled; the properties use CPU tensors and are always interpreted here
(tests/gpu runs them compiled). To run the cases directly: ``TRITON_INTERPRET=1 pytest tests/ops/triton_cases.py``.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pydrone.ops import native

pytest.importorskip("triton")

CASES = Path(__file__).with_name("triton_cases.py")


def run(path: Path, *options: str, interpreted: bool = not torch.cuda.is_available()) -> None:
    environment = dict(os.environ)
    environment.pop("TRITON_INTERPRET", None)
    if interpreted:
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", "pytest", "-q", "-x", str(path), *options]
    done = subprocess.run(command, env=environment, cwd=CASES.parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout and "skipped" not in done.stdout, done.stdout


@pytest.mark.parametrize("operations", ["gae", "append-gather", "loss-layer"])  # a process takes seconds to start
def test_cases(operations):
    run(CASES, "-k", " or ".join(f"test_{x}" for x in operations.split("-")), "-m", "not slow")


def test_scan():
    run(CASES.with_name("triton_scan_cases.py"), "-m", "not slow")


def test_steps():
    run(CASES.with_name("step_cases.py"), "-m", "not slow")


def test_steps_of_genesis():
    run(CASES.with_name("genesis_cases.py"))


def test_gradients():
    run(CASES.with_name("triton_gradients_cases.py"), "-m", "not slow")


def test_adam():
    run(CASES.with_name("triton_adam_cases.py"))


def test_act():
    run(CASES.with_name("triton_act_cases.py"))


@pytest.mark.skipif(native.CPU_MISSING is not None, reason=f"no native library: {native.CPU_MISSING}")
def test_launches():
    run(CASES.with_name("launch_cases.py"), interpreted=True)


def test_properties():
    run(CASES.with_name("triton_properties.py"), "--hypothesis-profile", "few", interpreted=True)


@pytest.mark.slow
def test_gradients_of_every_activation():
    run(CASES.with_name("triton_gradients_cases.py"), "-m", "slow")


@pytest.mark.slow
def test_the_whole_size():
    run(CASES, "-k", "test_gae", "-m", "slow")


@pytest.mark.slow
def test_a_hundred_steps():
    run(CASES.with_name("step_cases.py"), "-m", "slow")
