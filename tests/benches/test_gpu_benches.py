"""The benchmarks on a GPU, as far as they go without one: trials on the CPU, and what they judge, vary and read."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
BENCHES = ROOT / "benches"
SMALL = ["--device", "cpu", "--num-envs", "3", "--num-steps", "8", "--repeats", "1"]

pytestmark = pytest.mark.skipif(not BENCHES.is_dir(), reason="benches is not in this source tree")


@pytest.fixture(autouse=True)
def benches_on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHES))


def run(script: str, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(BENCHES / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def rollout(num_envs: int = 5, num_steps: int = 8):
    from workload import Rollout, Size

    return Rollout(Size(num_envs, num_steps))


def test_a_trial_has_a_row_for_each_operation_and_a_verdict_for_each_target():
    done = run("gpu_bench.py", *SMALL, "--parts", "operations", "iterations")
    assert done.returncode == 0, done.stderr
    for name in ("gae", "append", "begin + end", "minibatch", "iteration"):
        assert f"\n{name:24}cpu " in done.stdout, done.stdout
    assert done.stdout.count("not measured") >= 6  # launches and waits are a GPU's
    assert "the figures mean nothing" in done.stdout


@pytest.mark.slow
def test_a_trial_of_everything():
    done = run("gpu_bench.py", *SMALL)
    assert done.returncode == 0, done.stderr
    rows = done.stdout.split("to reach")[0]
    assert "gae                     rl-triton" in rows and "gae                     PufferLib" in rows
    assert rows.count("training iteration") == 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("script", ["gpu_bench.py", "gpu_sweep.py"])
def test_without_a_gpu_nothing_is_timed(script):
    done = run(script)
    assert done.returncode == 1 and f"{script}: no CUDA device is seen by torch" in done.stderr


def test_options_that_make_no_sense_are_refused(capsys):
    from gpu import machine

    parser = argparse.ArgumentParser(prog="bench")
    fine = {"device": "cpu", "out": None, "num_envs": 1, "num_steps": 1, "repeats": 1}
    machine.refuse(parser, argparse.Namespace(**fine))
    with pytest.raises(SystemExit, match=r"^bench: --out: a CPU's figures are no GPU's"):
        machine.refuse(parser, argparse.Namespace(**fine | {"out": Path("results")}))
    with pytest.raises(SystemExit):
        machine.refuse(parser, argparse.Namespace(**fine | {"num_envs": 0}))
    assert "--num-envs: expected at least 1, got 0" in capsys.readouterr().err


def test_triton_variants_are_interpreted_and_checked():
    pytest.importorskip("triton")
    done = run("gpu_sweep.py", *SMALL, "--backends", "triton", "--kernels", "append", "--variants", "2")
    assert done.returncode == 0, done.stderr
    assert "ENVS 32, WARPS 4; the default; again" in done.stdout and "ENVS 16, WARPS 4" in done.stdout


@pytest.mark.slow
def test_every_triton_variant_is_right():
    pytest.importorskip("triton")
    done = run("gpu_sweep.py", *SMALL, "--backends", "triton")
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc not found")
def test_cuda_variants_compile():
    done = run("gpu_sweep.py", *SMALL, "--backends", "cuda", "--kernels", "append", "gather", "--variants", "3")
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("compiled") == 6


def test_each_cuda_variant_differs_from_its_source_in_the_constants_named():
    from gpu import variants

    seen = set()
    for variant in variants.cuda():
        source = (variants.SOURCES / f"{variant.operation}.cu").read_text()
        changed = variants.changed(source, variant, "namespace_of_its_own")
        assert "STABLE_TORCH_LIBRARY_IMPL(namespace_of_its_own," in changed
        for name, x in variant.parameters.items():
            assert f"{name} = {x}" in changed
        constants = variants.constants(variant)
        assert set(variants.KERNELS[variant.kernel][0]) <= set(constants)
        seen.add((variant.kernel, *constants.values()))
    assert len(seen) >= len(variants.cuda()) - 1  # the defaults of GAE's rows are also one of the combinations


def test_a_constant_that_is_gone_is_named():
    from gpu import variants
    from gpu.variants import Variant

    source = (variants.SOURCES / "append.cu").read_text()
    with pytest.raises(ValueError, match=r"^kGone: expected one definition in the CUDA source, found 0$"):
        variants.changed(source, Variant("append", "cuda", {"kGone": 1}), "other")
    with pytest.raises(ValueError, match=r"^'gone': expected once in the CUDA source, found 0 times$"):
        variants.changed(source, Variant("append", "cuda", {}, {"gone": "come"}), "other")


def test_variants_are_compiled_as_the_library_is():
    from gpu import variants

    setup = (ROOT / "setup.py").read_text()
    assert all(f'"{flag}"' in setup for flag in variants.FLAGS)


def test_triton_constants_come_back_after_a_failure():
    pytest.importorskip("triton")
    from gpu import variants
    from gpu.variants import Variant

    from pydrone._triton import gae

    before, twice = gae.WARPS, 2 * gae.WARPS
    with pytest.raises(RuntimeError), variants.launched_with(Variant("gae rows", "triton", {"WARPS": twice})):
        assert twice == gae.WARPS
        raise RuntimeError
    assert before == gae.WARPS


@pytest.mark.parametrize("name", ["gae", "append", "gather"])
def test_an_operation_that_writes_nothing_is_not_timed(name):
    from gpu import cases
    from workload import Truth

    from pydrone.ops import reference

    inputs = rollout()
    case = getattr(cases, name)(inputs, "reference", *([0] if name == "gae" else []))
    case.check(getattr(reference, name), Truth(inputs))
    with pytest.raises(AssertionError):
        case.check(lambda *arguments: None, Truth(inputs))


@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_gae_in_either_layout(layout):
    from gpu import cases
    from workload import Truth

    from pydrone.ops import reference

    inputs = rollout()
    case = cases.gae(inputs, "reference", 1 << 10, layout)
    assert len(case.cold) > 2
    for arguments in (case.hot[0], case.cold[-1]):
        planes = [arguments[i] for i in (0, 1, 2, 14, 15)]
        assert {x.stride() for x in planes} == {(8, 1) if layout == "rows" else (1, 5)}
    assert len({arguments[0].data_ptr() for arguments in case.cold}) == len(case.cold)
    case.check(reference.gae, Truth(inputs))


def test_targets_are_reached_missed_or_not_measured():
    from gpu import targets

    rows = [
        {"what": "gae", "backend": "cuda", "hot_us": 4.5, "cold_us": 5.6, "cold_gb_s": 2000.0},
        {"what": "minibatch", "backend": "cuda", "cold_gb_s": 2900.0},
        {"what": "iteration", "backend": "cuda", "eager_us": 1000.0, "graph_us": 600.0},
        {"what": "iteration", "backend": "rsl_rl", "eager_us": 9000.0},
        {"what": "append", "backend": "cuda", "host_waits": 1, "launches": 1.0},
    ]
    targets.derive(rows, 4000.0)
    verdicts = targets.judge(rows, ["cuda", "triton"])
    found = {(x["what"], x["key"], x["backend"]): x["verdict"] for x in verdicts}
    assert found["gae", "hot_us", "cuda"] == "reached" and found["gae", "cold_us", "cuda"] == "missed"
    assert found["minibatch", "of_copy", "cuda"] == "reached"
    assert found["iteration", "rsl_rl_over_eager", "cuda"] == "reached"
    assert found["iteration", "rsl_rl_over_graph", "cuda"] == "missed"
    assert found["append", "host_waits", "cuda"] == "missed" and found["append", "launches", "cuda"] == "reached"
    assert {x for key, x in found.items() if key[2] == "triton"} == {"not measured"}
    assert "0.725" in targets.table(verdicts)


def test_a_graph_that_lacks_launches_leaves_the_time_to_the_profiler(monkeypatch):
    from gpu.clock import Clock

    clock = Clock("cpu", 1)
    monkeypatch.setattr(clock, "cuda", True)
    monkeypatch.setattr(clock, "wait", lambda: None)
    monkeypatch.setattr(clock, "captured", lambda run: "replay")
    monkeypatch.setattr(clock, "_profiled", lambda calls: 7.0)
    monkeypatch.setattr(clock, "launches", lambda calls, times: 5.0)
    monkeypatch.setattr(clock, "count", lambda run: 0 if run == "replay" else 1)
    assert clock.device_time([lambda: None]) == (7.0, "profiler")
    monkeypatch.setattr(clock, "count", lambda run: 1)
    assert clock.device_time([lambda: None]) == (5.0, "graph")
    assert clock.device_time([lambda: None], graph=False) == (7.0, "profiler")


def test_what_ncu_says_of_a_kernel():
    import gpu_profile

    stall = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
    columns = {
        "ID": ("", "0"),
        "Kernel Name": ("", "void pydrone::(anonymous namespace)::gae_rows<float, 2, 2>(Args<float>)"),
        "gpu__time_duration.sum": ("ns", "5,120"),
        "dram__bytes_read.sum": ("Mbyte", "7.37"),
        "dram__bytes_write.sum": ("furlong", "1"),
        "sm__warps_active.avg.pct_of_peak_sustained_active": ("%", "43.21"),
        stall.format("long_scoreboard"): ("inst", "12.5"),
        stall.format("barrier"): ("inst", "0.25"),
        stall.format("selected"): ("inst", "99"),
        stall.format("wait_not_issued"): ("inst", "98"),
    }
    lines = [",".join(f'"{x}"' for x in line) for line in (columns, *zip(*columns.values()))]
    (row,) = gpu_profile.summary("\n".join(["==PROF== a line of ncu's own", *lines]))
    assert row["kernel"] == "gae_rows<float, 2, 2>(Args<float>)"
    assert (row["us"], row["read MB"], row["written MB"]) == ("5.12", "7.37", "1 furlong")
    assert row["occupancy %"] == "43.21"
    assert row["stalls, cycles an instruction"] == "long_scoreboard 12.5, barrier 0.2"
    assert "long_scoreboard" in gpu_profile.table([row])
    with pytest.raises(ValueError, match=r"^expected ncu's CSV"):
        gpu_profile.summary("==ERROR== no permission")
