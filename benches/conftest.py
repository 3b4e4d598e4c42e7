"""`pytest benches/ --benchmark-only`: options, thread settings, cases, and the report at the end.

A case asks for its comparison, which the first of them measures (see harness.py), and hands the recorded times to
pytest-benchmark, so that its own table, ``--benchmark-json`` and ``--benchmark-compare`` go on working. Figures of
different machines, or of different runs, do not compare: read the ratios within a group.
"""

from __future__ import annotations

import os

# Before torch is imported: OpenMP threads that spin after their work take the cores from whatever is timed next.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from report import print_summary, write
from suite import Case, Suite, cases, parse_size


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("pydrone")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    group.addoption("--pydrone-report", metavar="DIR", help="write JSON and a chart, named after the machine, to DIR")
    group.addoption("--pydrone-device", default="cpu", help="cpu (the default), cuda, cuda:1, ...")
    group.addoption("--pydrone-threads", type=int, default=cores, help=f"torch's threads (default: {cores})")
    group.addoption("--pydrone-sizes", metavar="NxT,...", help="sizes instead of the five of workload.py")
    group.addoption("--pydrone-time", type=float, default=1.0, metavar="FACTOR", help="measure so much longer")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(config.getoption("--pydrone-threads"))
    config.stash[SUITE] = Suite(config.getoption("--pydrone-device"), config.getoption("--pydrone-time"))


SUITE = pytest.StashKey[Suite]()


class Replay:
    """A clock for pytest-benchmark that runs through recorded seconds: every second reading is one of them later."""

    __name__ = "replay"

    def __init__(self) -> None:
        self.seconds: Iterator[float] = iter(())
        self._started = False

    def __call__(self) -> float:
        self._started = not self._started
        return 0.0 if self._started else next(self.seconds)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A module's OPERATION makes the cases of its test."""
    if "case" not in metafunc.fixturenames:
        return
    chosen = metafunc.config.getoption("--pydrone-sizes")
    found: list[Case] = []
    for operation in metafunc.module.OPERATIONS:
        sizes = [parse_size(text) for text in chosen.split(",")] if chosen else None
        found += cases(operation, metafunc.config.getoption("--pydrone-device"), sizes)
    parameters = []
    for case in found:
        operation = case.operation.replace("sweep: ", "").replace(" ", "_")
        name = f"{operation}-{case}" if len(metafunc.module.OPERATIONS) > 1 else str(case)
        mark = pytest.mark.benchmark(group=case.group, timer=Replay())
        parameters.append(pytest.param(case, id=name, marks=mark))
    metafunc.parametrize("case", parameters)


@pytest.fixture
def replay(request: pytest.FixtureRequest, case: Case, benchmark) -> Callable[[], None]:  # type: ignore[no-untyped-def]
    """Measures the case's comparison if that has not been done, and gives the case's times to ``benchmark``."""

    def run() -> None:
        comparison = request.config.stash[SUITE].comparison(case.operation, case.size)
        result = comparison.results[case.contender]
        if result.absent:
            pytest.skip(f"{case.contender}: {result.absent}")
        if result.wrong:
            pytest.fail(f"{case.contender}, {case.size}: {result.wrong}", pytrace=False)
        if case.cache not in result.seconds:
            pytest.skip(comparison.hot)
        seconds = result.seconds[case.cache]
        benchmark.extra_info = {"contender": case.contender, "launches": result.launches}
        request.node.get_closest_marker("benchmark").kwargs["timer"].seconds = iter(seconds)
        benchmark.pedantic(lambda: None, rounds=len(seconds))

    return run


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    suite = config.stash[SUITE]
    comparisons = list(suite.comparisons.values())
    if not comparisons:
        return
    print_summary(terminalreporter.write_line, comparisons)
    folder = config.getoption("--pydrone-report")
    if folder:
        for path in write(Path(folder), comparisons, suite.device):
            terminalreporter.write_line(f"written: {path}")
