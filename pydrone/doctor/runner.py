"""Which backends can be tested on this machine, and the self-test of each in a process of its own."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from typing import Any

# Seconds allowed for the self-test of a backend. Triton's first compilation and its interpreter take the longest.
LIMIT = 300


def usable(report: dict[str, Any]) -> list[tuple[str, str]]:
    """The (backend, device) pairs that work on this machine."""
    pairs = []
    for backend, reason in report["backends"].items():
        on = {"reference": ["cpu", "cuda"], "cpu": ["cpu"], "cuda": ["cuda"]}.get(backend, ["cuda"])
        if backend == "triton" and report["variables"].get("TRITON_INTERPRET") == "1":
            on = ["cpu"]
        if reason is None:
            pairs += [(backend, device) for device in on if device == "cpu" or report["gpus"]]
    return pairs


def speed_threads(report: dict[str, Any], backend: str, device: str) -> list[int]:
    """The numbers of threads to time a backend with; empty for a slow one."""
    interpreted = backend == "triton" and device == "cpu"
    if backend == "reference" or interpreted:
        return []
    return sorted({1, report["cpu"]["threads"]}) if device == "cpu" else [1]


def run(
    backend: str, device: str, threads: list[int], limit: float = LIMIT
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Self-tests and speeds of a backend, run in a process of its own so that a crash there becomes an error here."""
    # The child process imports from where this one does.
    code = (
        f"import sys; sys.path[:] = {sys.path!r}\n"
        f"from pydrone.doctor.selftest import main; main({backend!r}, {device!r}, {threads!r})"
    )
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=limit)
        output, errors, ended = done.stdout, done.stderr, _ending(done.returncode)
    except subprocess.TimeoutExpired as expired:
        output, errors = (expired.stdout or b"").decode(), (expired.stderr or b"").decode()
        ended = f"not done after {limit:g} s"
    lines = [json.loads(line) for line in output.splitlines() if line.startswith("{") and line.endswith("}")]
    tests = [line for line in lines if "kernel" in line]
    speeds = [line for line in lines if "ratios" in line]
    if ended is not None:
        from pydrone.doctor.selftest import kernels

        last = errors.strip().splitlines()[-1:]
        reason = ": ".join([ended, *last])
        # The first kernel without a result is the one that failed; those after it did not run.
        left = [kernel for kernel in kernels(backend) if kernel not in {test["kernel"] for test in tests}]
        tests += [
            {"kernel": kernel, "cases": 0, "error": reason if i == 0 else f"not run: {left[0]} failed before"}
            for i, kernel in enumerate(left)
        ]
        if not left:
            tests.append({"kernel": "speed check", "cases": 0, "error": reason})
    return [{"backend": backend, "device": device, **test} for test in tests], speeds


def _ending(returncode: int) -> str | None:
    if returncode == 0:
        return None
    if returncode > 0:
        return f"ended with status {returncode}"
    try:
        return f"killed by {signal.Signals(-returncode).name}"
    except ValueError:
        return f"killed by signal {-returncode}"
