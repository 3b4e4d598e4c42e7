"""Prepared launches of Triton's kernels: prepared_cases.py, in a process whose Triton launches nothing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

CASES = Path(__file__).with_name("prepared_cases.py")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a libcuda already")
@pytest.mark.skipif(shutil.which("cc") is None, reason="cc not found")
def test_prepared_launches():
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(CASES)]
    done = subprocess.run(command, env=environment, cwd=CASES.parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout and "skipped" not in done.stdout, done.stdout
