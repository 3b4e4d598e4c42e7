"""``pydrone doctor``: what is installed, whether each kernel computes what it should, how fast, and what to change."""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import textwrap
from typing import Any

from pydrone.doctor.machine import advice, facts

# Seconds for a backend's self-test; Triton's first compilation and its interpreter take the longest.
LIMIT = 300


def main(argv: list[str]) -> int:
    """Prints the report; returns 0 where every self-test passes, else 1."""
    parser = argparse.ArgumentParser(
        prog="pydrone doctor",
        description="Devices, versions and backends; a self-test of each kernel against the reference; a speed check; "
        "advice. Exits with 0 where every self-test passes, else with 1.",
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--no-speed", action="store_true", help="leave the speed check out")
    options = parser.parse_args(argv)
    try:
        report = facts()
    except ImportError as error:
        print(f"pydrone: {error}; `pip install torch` installs what pydrone cannot do without", file=sys.stderr)
        return 1
    report["self_tests"], report["speed"] = [], []
    for backend, device in usable(report):
        tests, speeds = run(backend, device, [] if options.no_speed else speed_threads(report, backend, device))
        report["self_tests"] += tests
        report["speed"] += speeds
    report["advice"] = advice(report)
    report["passed"] = all(test["error"] is None for test in report["self_tests"])
    print(json.dumps(report, indent=2) if options.json else text(report))
    return 0 if report["passed"] else 1


def usable(report: dict[str, Any]) -> list[tuple[str, str]]:
    """The (backend, device) pairs that can serve."""
    pairs = []
    for backend, reason in report["backends"].items():
        on = {"reference": ["cpu", "cuda"], "cpu": ["cpu"], "cuda": ["cuda"]}.get(backend, ["cuda"])
        if backend == "triton" and report["variables"].get("TRITON_INTERPRET") == "1":
            on = ["cpu"]
        if reason is None:
            pairs += [(backend, device) for device in on if device == "cpu" or report["gpus"]]
    return pairs


def speed_threads(report: dict[str, Any], backend: str, device: str) -> list[int]:
    """The numbers of threads to time a backend with; none for a slow one."""
    interpreted = backend == "triton" and device == "cpu"
    if backend == "reference" or interpreted:
        return []
    return sorted({1, report["cpu"]["threads"]}) if device == "cpu" else [1]


def run(
    backend: str, device: str, threads: list[int], limit: float = LIMIT
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Self-tests and speeds of a backend, from a process of its own: a crash there is an error here."""
    # The modules that are used here, wherever they come from.
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
        # Only that is left out which came after: the first without a line is the one that failed.
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


# -------------------------------------------------------------------------------------------------------------- text


def text(report: dict[str, Any]) -> str:
    """The report for a person to read."""
    parts = {
        "Versions": _versions(report),
        "Devices": _devices(report),
        "Backends": _backends(report),
        "Self-test, against the reference": _self_tests(report),
        "Speed, as the time over that of a memcpy of the same bytes (lower is faster)": _speeds(report),
        "Advice": _wrapped(report["advice"]) or ["none: nothing to change"],
    }
    return "\n\n".join(
        f"{title}\n" + "\n".join(f"  {line}" for line in lines) for title, lines in parts.items() if lines
    )


def _wrapped(sentences: list[str]) -> list[str]:
    return [line for x in sentences for line in textwrap.wrap(f"* {x}", 116, subsequent_indent="  ")]


def _versions(report: dict[str, Any]) -> list[str]:
    own, python, build = report["pydrone"], report["python"], report["pydrone"]["build"]
    lines = [
        f"pydrone {own['version']} in {own['folder']}"
        + (f", built by {build['compiler']}" if build.get("compiler") else ""),
        f"Python {python['version']} on {python['system']}",
    ]
    there = [f"{name} {version}" for name, version in report["packages"].items() if version is not None]
    missing = [name for name, version in report["packages"].items() if version is None]
    return lines + [", ".join(there)] + ([f"not installed: {', '.join(missing)}"] if missing else [])


def _devices(report: dict[str, Any]) -> list[str]:
    cpu = report["cpu"]
    cores = f"{cpu['cores']} cores"
    if cpu["cores_allowed"] != cpu["cores"]:
        cores += f", {cpu['cores_allowed']} allowed"
    if cpu["cores_of_the_quota"] is not None:
        cores += f", a quota of {cpu['cores_of_the_quota']:g}"
    lines = [
        f"cpu: {cpu['model']}, {cpu['simd']}, {cores}, {cpu['threads']} threads, load {cpu['load']}, "
        f"{cpu['memory_gb']} GB, huge pages {cpu['huge_pages'] or 'not there'}"
    ]
    for i, gpu in enumerate(report["gpus"]):
        lines.append(f"cuda:{i}: {gpu['name']}, {gpu['memory_gb']} GB, compute capability {gpu['capability']}")
    if not report["gpus"]:
        lines.append("cuda: none that torch can use")
    return lines


def _backends(report: dict[str, Any]) -> list[str]:
    lines = [
        f"{name:<10}{'usable' if reason is None else f'not usable: {reason}'}"
        for name, reason in report["backends"].items()
    ]
    return lines + [f"default on {device}: {name}" for device, name in report["default_backends"].items()]


def _self_tests(report: dict[str, Any]) -> list[str]:
    lines = []
    for test in report["self_tests"]:
        outcome = f"passed, {test['cases']} cases" if test["error"] is None else f"FAILED: {test['error']}"
        lines.append(f"{test['backend']:<10}{test['device']:<6}{test['kernel']:<10}{outcome}")
    return lines


def _speeds(report: dict[str, Any]) -> list[str]:
    lines = []
    for check in report["speed"]:
        threads = (
            "" if check["threads"] is None else f", {check['threads']} thread{'s' if check['threads'] > 1 else ''}"
        )
        ratios = ", ".join(f"{kernel} {ratio:g}" for kernel, ratio in check["ratios"].items())
        lines.append(
            f"{check['backend']} on {check['device']}{threads}, {check['num_envs']} x {check['num_steps']}: {ratios}; "
            f"memcpy {check['memcpy_gb_per_s']:g} GB/s"
        )
    return lines
