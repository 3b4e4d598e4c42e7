"""The benchmarks on a CPU, and with a CPU standing in for a GPU: checks, timing, counts and reports.

The tests judge no timings.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
BENCHES = ROOT / "benches"
KINDS = ("cpu", "stand-in")

pytestmark = pytest.mark.skipif(not BENCHES.is_dir(), reason="benches is not in this source tree")


@pytest.fixture(autouse=True)
def benches_on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHES))


def bench(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--benchmark-only", *arguments]
    # pytest-benchmark measures nothing where it is told of several processes.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)


def suite(device: str):
    from clock import for_device
    from suite import Suite

    return Suite(for_device(device), scale=0.0)


def compared(device: str, monkeypatch, *contenders):
    """Results of these contenders for "gae" at a small size."""
    import suite as suites
    from workload import Size

    monkeypatch.setattr(suites, "contenders", lambda operation, clock: list(contenders))
    return suite(device).comparison("gae", Size(5, 8)).results


def ours(name: str = "pydrone", **options):
    from measurement import Contender
    from peers import ours
    from workload import GAE_BYTES

    return Contender(name, ours.gae, GAE_BYTES, **options)


QUICK = ("--pydrone-sizes", "5x8", "--pydrone-time", "0")


def test_the_program_on_a_cpu(tmp_path):
    report = ("--pydrone-device", "cpu", "--pydrone-report", str(tmp_path))
    done = bench("benches/bench_append.py", "benches/bench_iteration.py", *QUICK, *report)
    assert done.returncode == 0, done.stdout
    assert "append, 5 envs x 8 steps" in done.stdout and "benchmark 'append, 5x8, hot'" in done.stdout
    (path,) = tmp_path.glob("*-append-iteration.json")  # does not replace the report of a whole session
    found = json.loads(path.read_text())
    assert found["kind"] == "cpu" and "targets" not in found
    for comparison in found["comparisons"]:
        names = [row["name"] for row in comparison["contenders"]]
        assert {"pydrone", "memcpy", "rsl_rl"} <= set(names)
        for row in comparison["contenders"]:
            assert row["problem"] or row["cache"]["cold"]["median_ms"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("device", KINDS)
def test_every_benchmark(device):
    done = bench("benches/", *QUICK, "--pydrone-device", device)
    assert done.returncode == 0, done.stdout


def test_the_program_with_a_stand_in_for_a_gpu():
    done = bench("benches/bench_append.py", *QUICK, "--pydrone-device", "stand-in")
    assert done.returncode == 0, done.stdout
    assert "benchmark 'append, 5x8, eager'" in done.stdout and "to reach on an H200" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there():
    done = bench("benches/bench_gae.py", "--pydrone-device", "cuda")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "--pydrone-device cuda: no CUDA device is seen by torch" in done.stderr


def config_of(**options):
    """pytest's, with these options of benches/conftest.py."""
    given = {"--pydrone-threads": torch.get_num_threads(), "--pydrone-time": 1.0}
    given |= {f"--pydrone-{name}": x for name, x in options.items()}
    return type("Config", (), {"stash": pytest.Stash(), "getoption": lambda self, name: given.get(name)})()


def test_a_stand_ins_figures_are_not_kept(tmp_path):
    import conftest_of_benches as conftest

    with pytest.raises(pytest.UsageError, match="a stand-in's figures are no GPU's"):
        conftest.pytest_configure(config_of(device="stand-in", report=str(tmp_path)))
    conftest.pytest_configure(config_of(device="stand-in"))


def test_the_device_that_is_there_is_measured(monkeypatch):
    """conftest.py asks for a GPU if torch sees one."""
    import clock
    import conftest_of_benches as conftest

    asked = []
    monkeypatch.setattr(clock, "for_device", lambda device: asked.append(device) or clock.CpuClock())
    config = config_of()
    for there, wanted in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        conftest.pytest_configure(config)
        assert asked.pop() == wanted


@pytest.fixture(autouse=True)
def conftest_of_benches(monkeypatch, benches_on_path):
    """benches/conftest.py under another name, as tests has one too."""
    import importlib.util

    spec = importlib.util.spec_from_file_location("conftest_of_benches", BENCHES / "conftest.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(sys.modules, "conftest_of_benches", module)


def test_no_comparison_is_begun_when_the_time_is_up():
    from clock import for_device
    from suite import Suite
    from workload import Size

    assert Suite(for_device("cpu"), limit=-1.0).comparison("gae", Size(5, 8)) is None


@pytest.mark.parametrize("device", KINDS)
def test_a_copy_stands_beside_every_operation(device):
    from clock import for_device
    from contenders import OPERATIONS, contenders

    for operation in OPERATIONS:
        names = [c.name for c in contenders(operation, for_device(device))]
        assert names.count("memcpy") == 1 and len(set(names)) == len(names)
        two = ("gae", "append", "minibatch epoch", "iteration", "calls")  # operations that have two GPU backends
        assert names[0] == "pydrone"
        assert ("pydrone, triton" in names) == (device == "stand-in" and operation in two)


@pytest.mark.parametrize("operation, per, most", [("append", 8, 9), ("minibatch epoch", 4, 4), ("iteration", 1, 30)])
def test_what_a_gpus_clock_measures(operation, per, most):
    import report
    import targets
    from workload import Size

    measured = suite("stand-in")
    found = measured.comparison(operation, Size(5, 8))
    document = report.document([found], measured.clock)
    (comparison,) = document["comparisons"]
    assert document["kind"] == "cuda" and comparison["per"] == per
    rows = {row["name"]: row for row in comparison["contenders"]}
    figures = {"cold", "eager"} if operation == "iteration" else {"hot", "cold", "eager"}
    for name in ("pydrone", "memcpy"):
        assert set(rows[name]["cache"]) == figures and rows[name]["device_time"] == "graph"
    assert rows["memcpy"]["cache"]["cold"]["of_memcpy"] == pytest.approx(1)
    assert rows["pydrone"]["launches"] <= most and rows["pydrone"]["host_waits"] == 0
    assert rows["rsl_rl"]["launches"] > most and rows["rsl_rl"]["problem"] is None
    assert set(rows["SB3"]["cache"]) == {"eager"}  # it computes on the host
    judged = targets.measured(comparison, rows["pydrone"])
    assert judged["launches"] == rows["pydrone"]["launches"] / per
    assert judged["eager"] == 1e3 * rows["pydrone"]["cache"]["eager"]["median_ms"] / per
    lines: list[str] = []
    report.print_summary(lines.append, document)
    assert any(line.startswith("  pydrone ") for line in lines)


def test_what_a_gpus_clock_measures_of_gae(monkeypatch):
    import cases
    from measurement import Contender
    from peers import by_hand, ours, rsl_rl
    from workload import GAE_BYTES

    prepare = cases.timed(ours.gae, cases.gae, 1 << 12, None)
    found = compared(
        "stand-in",
        monkeypatch,
        Contender("pydrone", prepare, GAE_BYTES),
        Contender("memcpy", by_hand.memcpy(GAE_BYTES), GAE_BYTES, capturable=True),
        Contender("rsl_rl", rsl_rl.gae, GAE_BYTES),
    )
    assert all(set(result.seconds) == {"hot", "cold", "eager"} for result in found.values())
    assert [result.device_time for result in found.values()] == ["graph", "graph", "profiler"]
    assert found["pydrone"].counts["launches"] == 1


@pytest.mark.parametrize("device", KINDS)
def test_wrong_results_have_no_time(device, monkeypatch):
    from measurement import Contender
    from peers import ours as peer

    def wrong(rollout):
        run = peer.gae(rollout)

        def off() -> dict:
            return {name: x + 1 for name, x in run.outputs().items()}

        return run._replace(outputs=off)

    def fails(rollout):
        raise RuntimeError("no such thing")

    def later(rollout):
        run, calls = peer.gae(rollout), []

        def call() -> None:
            calls.append(1)
            if len(calls) > 4:
                raise RuntimeError("broken by now")
            run.call()

        return run._replace(call=call)

    rest = [Contender("wrong", wrong), Contender("fails", fails), Contender("later", later)]
    found = compared(device, monkeypatch, ours(), *rest)
    assert found["wrong"].wrong.startswith("advantages is off by") and not found["wrong"].seconds
    assert found["fails"].problem == "FAILED: RuntimeError: no such thing" and not found["fails"].seconds
    assert "broken by now" in found["later"].problem
    assert found["pydrone"].problem is None and found["pydrone"].seconds


def test_launches_that_write_nothing_have_no_time(monkeypatch):
    import cases

    class Case(cases.Case):
        def kernels(self, operation):
            return super().kernels(lambda *arguments: None)

    def made(rollout, backend, cache):
        return Case(*cases.gae(rollout, backend, cache))

    contender = ours()
    contender.prepare = cases.timed(contender.prepare, made, 1 << 12, None)
    found = compared("stand-in", monkeypatch, contender)["pydrone"]
    assert found.wrong and not found.seconds


def test_a_graph_that_lacks_launches_leaves_the_time_to_the_profiler(monkeypatch):
    from cuda_device import StandIn

    found = compared("stand-in", monkeypatch, ours(capturable=True))["pydrone"]
    assert found.device_time == "graph"
    monkeypatch.setattr(StandIn, "captured", lambda self, call: lambda: None)
    found = compared("stand-in", monkeypatch, ours(capturable=True))["pydrone"]
    assert found.device_time == "profiler" and set(found.seconds) == {"hot", "cold", "eager"}


def test_what_waits_is_not_captured(monkeypatch):
    from cuda_device import StandIn

    def captured(self, call):
        raise AssertionError("captured")

    monkeypatch.setattr(StandIn, "captured", captured)
    monkeypatch.setattr(StandIn, "host_calls", lambda self, call: {"host_launches": 1, "host_waits": 1})
    found = compared("stand-in", monkeypatch, ours(capturable=True))["pydrone"]
    assert found.device_time == "profiler" and found.problem is None


@pytest.mark.parametrize("capturable", [True, False])
def test_cold_launches_rotate_over_more_than_the_cache(capturable, monkeypatch):
    from cuda_device import StandIn

    monkeypatch.setattr(StandIn, "cache_bytes", 2 * 17 * 40)  # two rollouts
    made, rotated = [], []
    contender = ours(capturable=capturable)
    prepare = contender.prepare

    def prepared(rollout):
        run, where = prepare(rollout), rollout.rewards.data_ptr()
        made.append(where)
        return run._replace(call=lambda: rotated.append(where) or run.call())

    contender.prepare = prepared
    assert compared("stand-in", monkeypatch, contender)["pydrone"].seconds["cold"]
    assert len(made) == len(set(made)) == 8
    assert any(rotated[i : i + 8] == made for i in range(len(rotated)))


def test_times_are_of_a_whole_call(monkeypatch):
    import cases
    import suite as suites
    from cuda_device import StandIn
    from measurement import Contender
    from peers import ours as peer
    from workload import Size

    prepare = cases.timed(peer.append, cases.append, 1 << 12, None)
    monkeypatch.setattr(suites, "contenders", lambda operation, clock: [Contender("pydrone", prepare)])
    monkeypatch.setattr(StandIn, "seconds", lambda self, call, before: 3.0)
    monkeypatch.setattr(StandIn, "in_a_graph", 16)
    found = suite("stand-in").comparison("append", Size(5, 8)).results["pydrone"]
    # A replay has 16 launches: the first step's 16 times, or all eight steps twice.
    assert found.median("hot") == found.median("cold") == pytest.approx(3.0 / 16 * 8)


def test_an_iteration_is_right_before_and_after_its_replays():
    from peers import ours as peer
    from workload import Rollout, Size, Truth

    rollout = Rollout(Size(5, 8))
    run, truth = peer.iteration(rollout), Truth(rollout)
    for _ in range(2):
        run.call()
        truth.check(run.outputs())
        for _ in range(3):
            run.graph.before()
            run.graph.call()
        run.graph.check()


def test_replays_that_went_wrong_have_no_time(monkeypatch):
    from measurement import Graphed

    def overflowed() -> None:
        raise RuntimeError("a captured append found the ring full")

    contender = ours()
    prepare = contender.prepare

    def prepared(rollout):
        run = prepare(rollout)
        return run._replace(graph=Graphed(run.call, check=overflowed))

    contender.prepare = prepared
    found = compared("stand-in", monkeypatch, contender)["pydrone"]
    assert "found the ring full" in found.failed and set(found.seconds) == {"eager"}


@pytest.mark.parametrize("name", ["amd-epyc.json"])
def test_kept_results_can_be_read(name, tmp_path):
    import report

    found = json.loads((BENCHES / "results" / name).read_text())
    lines: list[str] = []
    report.print_summary(lines.append, found)
    assert sum(line.startswith("  rsl_rl ") for line in lines) >= len(found["comparisons"]) - 1
    chart = pytest.importorskip("chart")
    chart.draw(found, tmp_path / "chart.png")
    assert (tmp_path / "chart.png").stat().st_size > 10_000


def test_targets_are_reached_missed_or_not_measured():
    import targets

    def row(name: str, of_memcpy: float | None = None, device_time: str = "graph", counts=(), **figures: float) -> dict:
        cache = {figure: {"median_ms": x, "of_memcpy": of_memcpy} for figure, x in figures.items()}
        return {"name": name, "cache": cache, "device_time": device_time, **dict(counts)}

    def comparison(operation: str, per: int, *rows: dict) -> dict:
        return {"operation": operation, "num_envs": 8192, "num_steps": 100, "per": per, "contenders": list(rows)}

    found = [
        comparison("gae", 1, row("pydrone", hot=0.0045, cold=0.0056)),
        comparison("append", 100, row("pydrone", eager=0.9, counts={"host_waits": 1, "launches": 100})),
        comparison("minibatch epoch", 4, row("pydrone", of_memcpy=0.725, cold=1.0)),
        comparison("iteration", 1, row("pydrone", eager=1.0, cold=0.6), row("rsl_rl", eager=9.0)),
        {**comparison("gae", 1, row("pydrone", hot=0.001)), "num_envs": 4096},
    ]
    verdicts = targets.judge(found)
    by_key = {(x["operation"], x["key"], x["contender"]): x["verdict"] for x in verdicts}
    assert by_key["gae", "hot", "pydrone"] == "reached" and by_key["gae", "cold", "pydrone"] == "missed"
    assert by_key["minibatch epoch", "of_memcpy", "pydrone"] == "reached"
    assert by_key["iteration", "rsl_rl_over_eager", "pydrone"] == "reached"
    assert by_key["iteration", "rsl_rl_over_graph", "pydrone"] == "missed"
    assert by_key["append", "host_waits", "pydrone"] == "missed"
    assert by_key["append", "launches", "pydrone"] == by_key["append", "eager", "pydrone"] == "reached"
    assert {x for key, x in by_key.items() if key[2].endswith("triton")} == {"not measured"}
    assert "0.725" in "\n".join(targets.table(verdicts))
    found[3]["contenders"][0]["device_time"] = "profiler"
    (verdict,) = [x for x in targets.judge(found) if x["key"] == "rsl_rl_over_graph" and x["contender"] == "pydrone"]
    assert verdict["verdict"] == "not measured"  # the sum of kernel times is not a graph's time


def test_targets_with_sizes_of_their_own_and_without_a_second_backend():
    import targets

    def comparison(operation: str, size: tuple[int, int], **rows: dict) -> dict:
        found = [{"name": name.replace("__", ", "), **row} for name, row in rows.items()]
        return {"operation": operation, "num_envs": size[0], "num_steps": size[1], "per": 1, "contenders": found}

    def row(launches: int | None = None, **ms: float) -> dict:
        cache = {figure: {"median_ms": x} for figure, x in ms.items()}
        return {"cache": cache, "device_time": "graph", "launches": launches}

    found = [
        comparison("gae", (256, 2048), pydrone=row(hot=1.0, cold=1.1), memcpy=row(hot=1.0)),
        comparison("gae", (8192, 100), pydrone=row(eager=2.6), memcpy=row(eager=1.0)),
        comparison("ppo minibatch", (8192, 100), pydrone=row(launches=5, eager=1.0)),
        comparison("iteration", (8192, 100), pydrone=row(cold=1.1)),
        comparison("update", (8192, 100), **{"pydrone, captured": row(eager=9.0)}),
        comparison(targets.HOVER, (8192, 100), **{"pydrone train": row(eager=5000.0)}),
    ]
    found[0]["contenders"].append({"name": "rl-triton", **row(hot=0.9, cold=1.2)})
    verdicts = {
        (x["operation"], x["key"], x["size"], x["limit"]): x["verdict"]
        for x in targets.judge(found)
        if not x["contender"].endswith("triton")
    }
    at = (256, 2048)
    assert verdicts["gae", "hot_over_rl-triton", at, 1.0] == "missed"
    assert verdicts["gae", "cold_over_rl-triton", at, 1.0] == "reached"
    assert verdicts["gae", "hot_over_memcpy", at, 1.3] == "reached"
    assert verdicts["gae", "cold_over_memcpy", at, 1.3] == "not measured"
    size = targets.SIZE
    assert verdicts["gae", "eager_over_memcpy", size, 2.5] == "missed"
    assert verdicts["ppo minibatch", "launches", size, 5] == "reached"
    assert verdicts["iteration", "graph", size, 1.0] == "missed"
    assert verdicts["update", "eager", size, 13] == "reached" and verdicts["update", "eager", size, 8] == "missed"
    assert verdicts[targets.HOVER, "eager", size, 6] == "reached"
    assert verdicts[targets.HOVER, "eager", size, 3] == "missed"
    lines = targets.table(targets.judge(found))
    assert any("hot, over rl-triton's, 256x2048" in line for line in lines)
    assert len({(x.operation, x.contender, x.name, x.size) for x in targets.TARGETS}) == len(targets.TARGETS)


def test_targets_name_what_is_measured():
    """Each has a comparison and a contender, or is gpu_train.py's."""
    import targets
    from clock import for_device
    from contenders import OPERATIONS, contenders

    names = {(x, c.name) for x in OPERATIONS for c in contenders(x, for_device("stand-in"))}
    for target in targets.TARGETS:
        known = (target.operation, target.contender) in names
        assert known or target.operation == targets.HOVER, target


def test_what_an_earlier_run_has_measured_is_kept():
    import report
    from workload import Size

    first = suite("cpu")
    document = report.document([first.comparison("append", Size(5, 8))], first.clock)
    again = suite("cpu")
    again.before = document["comparisons"]
    assert again.comparison("append", Size(5, 8)) is None and again.is_known("append", Size(5, 8))
    assert not again.is_known("append", Size(5, 9)) and not again.is_known("gae", Size(5, 8))
    assert report.document([], again.clock, again.before)["comparisons"] == document["comparisons"]


def test_only_results_of_this_commit_and_machine_are_kept(tmp_path):
    import clock
    import machine

    now, path = machine.provenance(clock.CpuClock()), tmp_path / "x.json"
    assert machine.kept(path, now) is None
    for change, known in (({}, True), ({"commit": "another"}, False), ({"device": "another"}, False)):
        machine.write(path, now | change | {"sizes": {"num_envs": 5}})
        assert (machine.kept(path, now) is not None) == known
        assert machine.kept(path, now, {"num_envs": 6}) is None


@pytest.mark.slow
def test_a_run_that_goes_on_keeps_what_was_measured(tmp_path):
    report = ("--pydrone-device", "cpu", "--pydrone-report", str(tmp_path))
    assert bench("benches/bench_append.py", *QUICK, *report).returncode == 0
    (path,) = tmp_path.glob("*-append.json")
    found = json.loads(path.read_text())
    found["comparisons"][0]["contenders"][0]["cache"]["hot"]["median_ms"] = 123.0
    path.write_text(json.dumps(found))
    done = bench("benches/bench_append.py", *QUICK, *report, "--pydrone-resume", "-rs")
    assert done.returncode in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED), done.stdout
    assert "measured before: --pydrone-resume" in done.stdout and "123.000" in done.stdout
    assert json.loads(path.read_text())["comparisons"] == found["comparisons"]
    found["commit"] = "another"
    path.write_text(json.dumps(found))
    done = bench("benches/bench_append.py", *QUICK, *report, "--pydrone-resume", "-rs")
    assert "measured before" not in done.stdout and "123.000" not in done.stdout


def test_packages_that_were_built_come_before_the_source_tree():
    """`make gpu-checks` and `make sanitize` put their builds on PYTHONPATH."""
    text = (ROOT / "pyproject.toml").read_text()
    (line,) = [line for line in text.splitlines() if line.startswith("pythonpath")]
    assert '"."' not in line
