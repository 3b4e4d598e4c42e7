"""``pydrone doctor``: versions, devices, self-tests of the kernels, their speed, and advice."""

from __future__ import annotations

import argparse
import json

from pydrone.cli.common import fail
from pydrone.doctor import runner
from pydrone.doctor.machine import advice, facts
from pydrone.doctor.text import text


def main(argv: list[str]) -> int:
    """Runs ``pydrone doctor ARGV`` and returns the exit status: 0 if every self-test passes, else 1."""
    parser = argparse.ArgumentParser(
        prog="pydrone doctor",
        description="Report devices, versions and backends; test each kernel against the reference; measure its speed; "
        "give advice. The exit status is 0 if every self-test passes, else 1.",
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--no-speed", action="store_true", help="skip the speed check")
    options = parser.parse_args(argv)
    try:
        report = facts()
    except ImportError as error:
        return fail(f"{error}; pydrone needs PyTorch: `pip install torch`")
    report["self_tests"], report["speed"] = [], []
    for backend, device in runner.usable(report):
        threads = [] if options.no_speed else runner.speed_threads(report, backend, device)
        tests, speeds = runner.run(backend, device, threads)
        report["self_tests"] += tests
        report["speed"] += speeds
    report["advice"] = advice(report)
    report["passed"] = all(test["error"] is None for test in report["self_tests"])
    print(json.dumps(report, indent=2) if options.json else text(report))
    return 0 if report["passed"] else 1
