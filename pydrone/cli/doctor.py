"""``pydrone doctor``: what is installed, whether each kernel computes what it should, how fast, and what to change."""

from __future__ import annotations

import argparse
import json

from pydrone.cli.common import fail
from pydrone.doctor import runner
from pydrone.doctor.machine import advice, facts
from pydrone.doctor.text import text


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
