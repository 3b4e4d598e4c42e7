"""`pytest benches/ --benchmark-only`: options, thread settings, cases, and the report at the end.

The first case of a comparison measures all of it (see harness.py). Each case passes its recorded times to
pytest-benchmark, whose table, ``--benchmark-json`` and ``--benchmark-compare`` work as usual. Figures of different
machines or runs are not comparable: read the ratios within a group.
"""

from __future__ import annotations

import os

# Before torch is imported: OpenMP threads that spin after their work would slow down whatever is timed next.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from collections.abc import Callable, Iterator
from pathlib import Path

import clock
import machine
import pytest
import report
import torch
from suite import Case, Suite, parse_size


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("pydrone")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    devices = "cpu, cuda, cuda:1, ...; the default is a GPU where torch sees one. stand-in: the GPU's code on the CPU, "
    group.addoption("--pydrone-device", metavar="DEVICE", help=devices + "to try it out; its figures mean nothing")
    group.addoption("--pydrone-report", metavar="DIR", help="write JSON and a chart, named after the machine, to DIR")
    group.addoption("--pydrone-threads", type=int, default=cores, help=f"torch's threads (default: {cores})")
    group.addoption("--pydrone-sizes", metavar="NxT,...", help="sizes instead of those of suite.py")
    group.addoption("--pydrone-time", type=float, default=1.0, metavar="FACTOR", help="multiplies the time budgets")
    group.addoption("--pydrone-limit", type=float, metavar="SECONDS", help="start no comparison after so long")
    kept = "keep the comparisons that the report of this commit and machine has already, and measure the others"
    group.addoption("--pydrone-resume", action="store_true", help=kept)


SUITE = pytest.StashKey[Suite]()


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(config.getoption("--pydrone-threads"))
    device, folder = config.getoption("--pydrone-device"), config.getoption("--pydrone-report")
    try:
        found = clock.for_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except (ValueError, RuntimeError) as error:
        raise pytest.UsageError(f"--pydrone-device {device}: {error}") from error
    if device == "stand-in" and folder:
        raise pytest.UsageError("--pydrone-report: a stand-in's figures are no GPU's; leave --pydrone-report out")
    suite = Suite(found, config.getoption("--pydrone-time"), config.getoption("--pydrone-limit"))
    config.stash[SUITE] = suite


def pytest_collection_finish(session: pytest.Session) -> None:
    """Writes the report after each comparison, so that a killed session leaves what it has measured."""
    suite, path = session.config.stash[SUITE], _path(session)
    if path is None:
        return
    if session.config.getoption("--pydrone-resume"):
        known = machine.kept(path, machine.provenance(suite.clock)) or {"comparisons": []}
        suite.before = known["comparisons"]
    suite.keep = lambda comparisons: report.write(
        path, report.document(comparisons, suite.clock, suite.before), chart=False
    )


def _path(session: pytest.Session) -> Path | None:
    """The report's path, named after the machine and the operations to be measured."""
    folder, suite = session.config.getoption("--pydrone-report"), session.config.stash[SUITE]
    cases = [item.callspec.params["case"] for item in session.items if hasattr(item, "callspec")]
    if not folder or not cases:
        return None
    operations = {case.operation.removeprefix("sweep: ") for case in cases}
    return Path(folder) / report.file_name(operations, suite.clock)


class Replay:
    """A timer for pytest-benchmark that replays recorded seconds: each pair of readings differs by the next of them."""

    __name__ = "replay"

    def __init__(self) -> None:
        self.seconds: Iterator[float] = iter(())
        self._started = False

    def __call__(self) -> float:
        self._started = not self._started
        return 0.0 if self._started else next(self.seconds)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Makes the cases of a module's test from its OPERATIONS."""
    if "case" not in metafunc.fixturenames:
        return
    chosen, suite = metafunc.config.getoption("--pydrone-sizes"), metafunc.config.stash[SUITE]
    sizes = [parse_size(text) for text in chosen.split(",")] if chosen else None
    found = [case for operation in metafunc.module.OPERATIONS for case in suite.cases(operation, sizes)]
    parameters = []
    for case in found:
        operation = case.operation.replace("sweep: ", "").replace(" ", "_")
        name = f"{operation}-{case}" if len(metafunc.module.OPERATIONS) > 1 else str(case)
        mark = pytest.mark.benchmark(group=case.group, timer=Replay())
        parameters.append(pytest.param(case, id=name, marks=mark))
    metafunc.parametrize("case", parameters)


@pytest.fixture
def replay(request: pytest.FixtureRequest, case: Case, benchmark) -> Callable[[], None]:  # type: ignore[no-untyped-def]
    """Measures the case's comparison unless that is done, and passes the case's times to ``benchmark``."""

    def run() -> None:
        comparison = request.config.stash[SUITE].comparison(case.operation, case.size)
        if comparison is None:
            known = request.config.stash[SUITE].is_known(case.operation, case.size)
            pytest.skip("measured before: --pydrone-resume" if known else "not begun: --pydrone-limit")
        result = comparison.results[case.contender]
        if result.wrong or result.failed:
            pytest.fail(f"{case.contender}, {case.size}: {result.problem}", pytrace=False)
        if result.absent:
            pytest.skip(f"{case.contender}: {result.absent}")
        if case.figure not in result.seconds:
            pytest.skip(comparison.hot or f"{case.contender} has no {case.figure} figure")
        seconds = result.seconds[case.figure]
        benchmark.extra_info = {"contender": case.contender, **result.counts}
        request.node.get_closest_marker("benchmark").kwargs["timer"].seconds = iter(seconds)
        benchmark.pedantic(lambda: None, rounds=len(seconds))

    return run


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    suite = config.stash[SUITE]
    comparisons = list(suite.comparisons.values())
    if not comparisons and not suite.before:
        return
    line, found = terminalreporter.write_line, report.document(comparisons, suite.clock, suite.before)
    report.print_summary(line, found)
    path = _path(terminalreporter._session)
    if path is not None:
        for file in report.write(path, found):
            line(f"written: {file}")
