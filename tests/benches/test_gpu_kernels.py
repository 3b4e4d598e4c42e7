"""Sweep and profile of the GPU kernels, tested without a GPU: trials on the CPU, variants, parsing of ncu's output."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
BENCHES = ROOT / "benches"
SMALL = ["--device", "stand-in", "--num-envs", "3", "--num-steps", "8", "--repeats", "1"]

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


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_swept():
    done = run("gpu_sweep.py")
    assert done.returncode == 1 and "gpu_sweep.py: no CUDA device is seen by torch" in done.stderr


def test_options_that_make_no_sense_are_refused(capsys):
    import gpu_sweep

    parser = argparse.ArgumentParser(prog="bench")
    fine = {"device": "stand-in", "out": None, "num_envs": 1, "num_steps": 1, "repeats": 1}
    gpu_sweep.refuse(parser, argparse.Namespace(**fine))
    with pytest.raises(SystemExit, match=r"^bench: --out: a stand-in's figures are no GPU's"):
        gpu_sweep.refuse(parser, argparse.Namespace(**fine | {"out": Path("results")}))
    with pytest.raises(SystemExit):
        gpu_sweep.refuse(parser, argparse.Namespace(**fine | {"num_envs": 0}))
    assert "--num-envs: expected at least 1, got 0" in capsys.readouterr().err


def test_triton_variants_are_interpreted_and_checked():
    pytest.importorskip("triton")
    done = run("gpu_sweep.py", *SMALL, "--backends", "triton", "--kernels", "append", "--variants", "2")
    assert done.returncode == 0, done.stderr
    assert "ENVS 16, WARPS 4; the default; again" in done.stdout and "ENVS 32, WARPS 4" in done.stdout


def test_the_backends_are_compared_by_kind_of_call():
    pytest.importorskip("triton")
    done = run("gpu_backends.py", "--device", "stand-in", "--repeats", "1")
    assert done.returncode == 0, done.stderr
    assert all(f"3x8 {x}, {kind}" in done.stdout for x in ("gae", "append", "gather") for kind in ("eager", "graph"))
    assert "the figures mean nothing" in done.stdout


def test_a_default_that_is_slower_is_named():
    import gpu_backends

    rows = [{"num_envs": 4, "num_steps": 2, "operation": "gae", "kind": kind, "cuda_us": 2.0, "triton_us": x}
            for kind in ("eager", "graph") for x in (1.0, 2.05, 4.0)]  # fmt: skip
    lines = gpu_backends.table(rows).splitlines()[1:]
    assert [line.endswith("is slower") for line in lines] == [True, False, False, False, False, True]
    assert "the default, cuda, is slower" in lines[0] and "the default, triton, is slower" in lines[5]


@pytest.mark.slow
def test_every_triton_variant_is_right():
    pytest.importorskip("triton")
    done = run("gpu_sweep.py", *SMALL, "--backends", "triton")
    assert done.returncode == 0, done.stdout


def rows_are_right(*names: str) -> None:
    command = [sys.executable, str(Path(__file__).with_name("kernel_rows.py")), *names]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    right = {line.removesuffix(": right") for line in done.stdout.splitlines() if line.endswith(": right")}
    kernels = ("ppo gradients", "ppo minibatch", "clipped adam", "act", "act and store", "environment step")
    assert {f"{kernel}, pydrone" for kernel in (*kernels, "layer forward", "layer backward")} <= right


def test_rows_of_the_learners_kernels_are_right_when_interpreted():
    pytest.importorskip("triton")
    rows_are_right("pydrone")


@pytest.mark.slow
def test_every_row_of_the_learners_kernels_is_right_when_interpreted():
    pytest.importorskip("triton")
    rows_are_right()


def test_a_row_that_is_wrong_is_not_timed():
    from peers.kernels import Agreement

    exact = torch.tensor([1.0, 4.0])
    Agreement().check({"pairs": [("x", exact + 1e-5, exact.double(), 1e-5)]})
    with pytest.raises(AssertionError, match=r"^x is off by"):
        Agreement().check({"pairs": [("x", exact + 1e-4, exact.double(), 1e-5)]})
    with pytest.raises(AssertionError, match=r"^x is off by nan"):
        Agreement().check({"pairs": [("x", exact * float("nan"), exact.double(), 1e-5)]})


def test_a_training_on_a_gpu_can_be_tried_on_a_cpu(monkeypatch, capsys):
    import gpu_train

    sizes = ("--num-envs", "8", "--num-steps", "8", "--iterations", "2", "--memory-iterations", "5")
    monkeypatch.setattr(gpu_train, "SEEDS", (3,))
    monkeypatch.setattr(sys, "argv", ["gpu_train.py", "--device", "cpu", "--parts", "memory", "curves", *sizes])
    gpu_train.main()
    said = capsys.readouterr().out
    assert "memory: constant" in said and "curves, seed 3, --learner torch: 2 iterations" in said
    assert said.count("not measured") == 2


@pytest.mark.slow
def test_the_command_can_be_timed():
    sizes = ("--num-envs", "8", "--num-steps", "8", "--iterations", "2")
    done = run("gpu_train.py", "--device", "cpu", "--parts", "hover", *sizes)
    assert done.returncode == 0 and done.stdout.count("hover ") >= 4, done.stdout + done.stderr


def test_what_a_training_has_done_is_not_done_again(monkeypatch, tmp_path, capsys):
    import clock
    import gpu_train
    import machine

    asked = []
    found = {"memory": {"after": [{"iteration": 4}] * 2, "grew": False}, "hover 1": {"seconds": 9.0, "said": []}}

    def part(name: str):
        def do() -> dict:
            asked.append(name)
            if name == "hover 1" and asked.count(name) == 1:
                raise RuntimeError("no such thing")
            return found[name]

        return do

    monkeypatch.setattr(gpu_train, "parts", lambda options: {name: part(name) for name in found})
    monkeypatch.setattr(clock, "for_device", lambda device: clock.CpuClock())
    monkeypatch.setattr(sys, "argv", ["gpu_train.py", "--out", str(tmp_path), "--resume"])
    with pytest.raises(SystemExit, match="a part failed"):
        gpu_train.main()
    assert "hover 1: FAILED: RuntimeError: no such thing" in capsys.readouterr().out
    gpu_train.main()
    assert asked == ["memory", "hover 1", "hover 1"]
    (path,) = tmp_path.glob("*-train.json")
    assert machine.kept(path, machine.provenance(clock.CpuClock()))["parts"] == found
    found["memory"] = {**found["memory"], "grew": True}
    monkeypatch.setattr(sys, "argv", ["gpu_train.py", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="memory grew"):
        gpu_train.main()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc not found")
def test_cuda_variants_compile():
    done = run("gpu_sweep.py", *SMALL, "--backends", "cuda", "--kernels", "append", "gather", "--variants", "3")
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("compiled") == 6


def test_each_cuda_variant_differs_from_its_source_in_the_constants_named():
    import gpu_variants as variants

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
    import gpu_variants as variants
    from gpu_variants import Variant

    source = (variants.SOURCES / "append.cu").read_text()
    with pytest.raises(ValueError, match=r"^kGone: expected one definition in the CUDA source, found 0$"):
        variants.changed(source, Variant("append", "cuda", {"kGone": 1}), "other")
    with pytest.raises(ValueError, match=r"^'gone': expected once in the CUDA source, found 0 times$"):
        variants.changed(source, Variant("append", "cuda", {}, {"gone": "come"}), "other")


def test_variants_are_compiled_as_the_library_is():
    import gpu_variants as variants

    setup = (ROOT / "setup.py").read_text()
    assert all(f'"{flag}"' in setup for flag in variants.FLAGS)


def test_triton_constants_come_back_after_a_failure():
    pytest.importorskip("triton")
    import gpu_variants as variants
    from gpu_variants import Variant

    from pydrone._triton import gae

    before, twice = gae.WARPS, 2 * gae.WARPS
    with pytest.raises(RuntimeError), variants.launched_with(Variant("gae rows", "triton", {"WARPS": twice})):
        assert twice == gae.WARPS
        raise RuntimeError
    assert before == gae.WARPS


def test_what_was_derived_from_other_constants_is_forgotten():
    pytest.importorskip("triton")
    import gpu_variants as variants
    from gpu_variants import Variant

    from pydrone._triton import clipped_adam

    sizes, groups = (5000, 100), (0, 1)
    usual = clipped_adam._layout(sizes, groups)
    with variants.launched_with(Variant("clipped_adam", "triton", {"LEAST": 128, "MOST": 128})):
        assert clipped_adam._layout(sizes, groups) != usual
    assert clipped_adam._layout(sizes, groups) == usual


def test_triton_variants_name_constants_that_there_are():
    pytest.importorskip("triton")
    import gpu_variants as variants

    for variant in variants.triton():
        assert set(variants.KERNELS[variant.kernel][1]) <= set(variants.constants(variant)), variant


@pytest.mark.parametrize("name", ["gae", "append", "gather"])
def test_an_operation_that_writes_nothing_is_not_timed(name):
    import cases
    from workload import Truth

    from pydrone.ops import reference

    inputs = rollout()
    case = getattr(cases, name)(inputs, "reference", 0)
    case.check(getattr(reference, name), Truth(inputs))
    with pytest.raises(AssertionError):
        case.check(lambda *arguments: None, Truth(inputs))


@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_gae_in_either_layout(layout):
    import cases
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


def test_what_ncu_says_of_a_kernel():
    import gpu_profile

    stall = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
    columns = {
        "ID": ("", "0"),
        "Kernel Name": ("", "void pydrone::(anonymous namespace)::scan_rows<float, 0, 2, 32, 2>(Args<float>)"),
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
    assert row["kernel"] == "scan_rows<float, 0, 2, 32, 2>(Args<float>)"
    assert (row["us"], row["read MB"], row["written MB"]) == ("5.12", "7.37", "1 furlong")
    assert row["occupancy %"] == "43.21"
    assert row["stalls, cycles an instruction"] == "long_scoreboard 12.5, barrier 0.2"
    assert "long_scoreboard" in gpu_profile.table([row])
    with pytest.raises(ValueError, match=r"^expected ncu's CSV"):
        gpu_profile.summary("==ERROR== no permission")
