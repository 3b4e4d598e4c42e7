"""``pydrone doctor``: its self-test notices mistakes, its report says what is there, its advice what to change."""

from __future__ import annotations

import copy
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch

import pydrone
from pydrone.cli import doctor
from pydrone.doctor import machine, selftest
from pydrone.ops import dispatch, reference, triton

# ------------------------------------------------------------------------------------------------------- self-tests


def wrong_gae(*args) -> None:
    reference.gae(*args)
    args[14][-1, -1] += 1e-3  # the last advantage of the last environment


def gae_without_statistics(*args) -> None:
    reference.gae(*args[:16], None, None)


def wrong_append(*args) -> None:
    reference.append(*args)
    if args[2][0, 0]:
        args[0][0][args[6], -1, 0] ^= 1  # a bit of the last environment's row


def append_without_codes(*args) -> None:
    reference.append(*args)
    args[0][1][:, args[6]] &= 1  # truncations become running steps


def wrong_final_observation(*args) -> None:
    reference.append(*args)
    for pool in (x for x in args[0][1:] if x.dim() == 3):
        pool[0, 0, 1] ^= 0x40  # in the exponent of the first final observation's first half


def other_permutation(*args) -> None:
    reference.gather(*args[:11], args[11] + 1, *args[12:])


def gather_of_a_neighbour(*args) -> None:
    reference.gather(*args)
    if args[3]:
        args[3][-1][-1] += 1  # the last sample's last field


def gather_unshuffled(*args) -> None:
    reference.gather(*args[:14], False, *args[15:])


def raising(*args) -> None:
    raise RuntimeError("no kernel image\nis available")


MISTAKES = [
    ("gae", wrong_gae, "advantages of the rollout worked out by hand: differs"),
    ("gae", gae_without_statistics, "statistics of 1 x 1"),
    ("gae", raising, "RuntimeError no kernel image is available"),
    ("append", wrong_append, "of 1 x 1: differs from the expected in 1 places"),
    ("append", append_without_codes, "dones of 3 x 7"),
    ("append", wrong_final_observation, "values of the final observations of"),
    ("append", raising, "RuntimeError no kernel image is available"),
    ("gather", other_permutation, "indices of 3 x 7, minibatch 0 of epoch 0"),
    ("gather", gather_of_a_neighbour, "of 1 x 1, minibatch 0 of epoch 0: differs"),
    ("gather", gather_unshuffled, "indices of 3 x 7, minibatch 0 of epoch 0"),
    ("gather", raising, "RuntimeError no kernel image is available"),
]


@pytest.mark.parametrize(("kernel", "mistake", "message"), MISTAKES, ids=lambda x: getattr(x, "__name__", None))
def test_the_self_test_notices_a_mistake(kernel, mistake, message, monkeypatch):
    own = dispatch._operations
    planted = own("reference")._replace(**{kernel: mistake})
    monkeypatch.setattr(dispatch, "backends", lambda: dict.fromkeys(dispatch.NAMES))
    monkeypatch.setattr(dispatch, "_operations", lambda name: planted if name == "cpu" else own(name))
    monkeypatch.setattr(dispatch, "_cache", {})
    errors = {result["kernel"]: result["error"] for result in selftest.run("cpu", "cpu")}
    assert errors[kernel] is not None and message in errors[kernel]
    if kernel == "gather":  # the last of them: what it does is no other's fault
        assert errors["gae"] is None and errors["append"] is None


def test_the_self_test_passes(backend):
    results = {result["kernel"]: (result["cases"], result["error"]) for result in selftest.run(backend, "cpu")}
    # one by hand and 4 shapes x 2 memory orders x 3 bootstraps; 4 shapes; 4 shapes
    expected = {"gae": (25, None), "append": (4, None), "gather": (4, None)}
    if backend == "reference":  # as Triton; the native libraries have no loss
        expected["ppo_loss"] = (9, None)  # one by hand and 4 sizes x 2 sets of options
    assert results == expected


def loss_off_by(output: int, much: float) -> Callable[..., None]:
    def wrong(*args) -> None:
        reference.ppo_loss(*args)
        args[17 + output].view(-1)[-1] += much

    return wrong


def loss_without_a_sample(*args) -> None:
    rest = [x[:-1] if isinstance(x, torch.Tensor) and x.dim() and len(x) == len(args[0]) else x for x in args[2:10]]
    reference.ppo_loss(args[0][:-1], args[1], *rest, *args[10:17], args[17][:-1], args[18][:-1], *args[19:])


def loss_that_leaves_its_workspace(*args) -> None:
    reference.ppo_loss(*args)
    args[20].add_(args[21][0])
    args[21][0] += 1


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (loss_off_by(0, 1e-4), "mean_grad of the sample worked out by hand"),
        (loss_off_by(1, math.nan), "value_grad of the sample worked out by hand"),
        (loss_off_by(2, 1e-4), "std_grad of the sample worked out by hand"),
        (loss_off_by(3, 1e-3), "metrics of the sample worked out by hand"),
        (loss_without_a_sample, "mean_grad of"),
        (loss_that_leaves_its_workspace, "metrics of 1 x 1 from launch to launch"),
        (raising, "RuntimeError no kernel image is available"),
    ],
)
def test_the_self_test_notices_a_mistake_in_the_loss(mistake, message, monkeypatch):
    monkeypatch.setitem(selftest.LOSSES, "triton", mistake)
    with pytest.raises((selftest.Wrong, RuntimeError)) as found:
        selftest.check_ppo_loss("triton", "cpu")
    assert message in f"{type(found.value).__name__} {found.value}".replace("\n", " ")


def test_triton_has_the_loss_tested():
    assert list(selftest.kernels("triton")) == ["gae", "append", "gather", "ppo_loss"]
    assert selftest.LOSSES["triton"] is triton.ppo_loss


def test_the_speed_check_says_what_it_measured():
    before = torch.get_num_threads()
    found = selftest.speed("reference", "cpu", 1)
    assert torch.get_num_threads() == before
    assert found["threads"] == 1 and found["backend"] == "reference" and found["memcpy_gb_per_s"] > 0
    assert set(found["ratios"]) == {"append", "gae", "gather"}
    assert all(ratio > 1 for ratio in found["ratios"].values())  # a memcpy of no more bytes than they need


# ------------------------------------------------------------------------------------------------------ the process


def child(tmp_path, monkeypatch, body: str) -> None:
    """Has the self-test's process run ``body`` in place of the self-test."""
    package = tmp_path / "pydrone"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "selftest.py").write_text("import os, signal, sys, time\ndef main(*_):\n    " + body)
    monkeypatch.syspath_prepend(str(tmp_path))


PASSED = 'print(\'{"kernel": "gae", "cases": 3, "error": null}\', flush=True); '


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (PASSED + "os.kill(os.getpid(), signal.SIGILL)", "killed by SIGILL"),
        (PASSED + "print('out of it', file=sys.stderr); sys.exit(3)", "ended with status 3: out of it"),
        (PASSED + "time.sleep(60)", "not done after 1.5 s"),
    ],
)
def test_a_crash_is_a_line_of_the_report(body, message, tmp_path, monkeypatch):
    child(tmp_path, monkeypatch, body)
    tests, speeds = doctor.run("cpu", "cpu", [], limit=1.5)
    where = {"backend": "cpu", "device": "cpu"}
    assert tests == [
        where | {"kernel": "gae", "cases": 3, "error": None},
        where | {"kernel": "append", "cases": 0, "error": message},
        where | {"kernel": "gather", "cases": 0, "error": "not run: append failed before"},
    ]
    assert speeds == []


def test_the_report(tmp_path):
    """In a folder and a process of its own; as JSON, and that report as text."""
    code = "from pydrone.cli.main import main; import sys; sys.exit(main(['doctor', '--json']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["passed"] and report["backends"] == pydrone.backends()
    assert report["packages"]["torch"] == torch.__version__
    tested = {(test["backend"], test["device"], test["kernel"]) for test in report["self_tests"]}
    assert {("reference", "cpu", kernel) for kernel in ("gae", "append", "gather")} <= tested
    assert all((name in {x[0] for x in tested}) == (reason is None) for name, reason in report["backends"].items())
    if report["backends"]["cpu"] is None:
        assert [check["threads"] for check in report["speed"]] == sorted({1, report["cpu"]["threads"]})
    shown = doctor.text(report)
    for part in ("Versions", "Devices", "Backends", "Self-test", "Advice", torch.__version__, "passed, 25 cases"):
        assert part in shown, part


def test_a_failed_self_test_is_a_status_of_one(monkeypatch, capsys):
    failed = {"backend": "cpu", "device": "cpu", "kernel": "gae", "cases": 0, "error": "advantages: off by 1"}
    monkeypatch.setattr(doctor, "facts", healthy)
    monkeypatch.setattr(doctor, "run", lambda *_: ([failed], []))
    assert doctor.main(["--no-speed"]) == 1
    assert re.search(r"cpu +cpu +gae +FAILED: advantages: off by 1", capsys.readouterr().out)


# ----------------------------------------------------------------------------------------------------------- advice


def healthy() -> dict:
    """A machine with nothing to change."""
    return {
        "pydrone": {"version": "1.0.0", "folder": "/x", "build": {}},
        "python": {"version": "3.12.1", "executable": "/python", "system": "Linux"},
        "packages": dict.fromkeys(machine.PACKAGES, "9.9"),
        "old": {},
        "torch": {"cuda": "13.0", "hip": None, "cuda_available": True},
        "cpu": {
            "model": "a CPU",
            "simd": "AVX2",
            "cores": 8,
            "cores_allowed": 8,
            "cores_of_the_quota": None,
            "threads": 8,
            "load": 0.2,
            "memory_gb": 16.0,
            "huge_pages": "madvise",
        },
        "gpus": [{"name": "a GPU", "memory_gb": 80.0, "capability": "9.0"}],
        "gpus_of_the_driver": ["a GPU (driver 580)"],
        "backends": dict.fromkeys(dispatch.NAMES),
        "default_backends": {"cpu": "cpu", "cuda": "cuda"},
        "variables": {"GOMP_SPINCOUNT": "10000"},
        "compiler": "/usr/bin/c++",
    }


NO_CUDA = {
    "torch.cuda": None,
    "torch.cuda_available": False,
    "gpus": [],
    "backends.cuda": "no",
    "backends.triton": "no",
}

ADVICE = [
    ({"old": {"torch": "2.10"}}, ["torch 9.9 is older than 2.10"]),
    (NO_CUDA, ["has a GPU, a GPU (driver 580), but this torch is a build for the CPU"]),
    (NO_CUDA | {"gpus_of_the_driver": []}, []),
    (NO_CUDA | {"torch.cuda": "13.0"}, ["built for CUDA 13.0, cannot use it: is the driver too old"]),
    (NO_CUDA | {"variables.CUDA_VISIBLE_DEVICES": ""}, ["CUDA_VISIBLE_DEVICES= hides it"]),
    (
        {"backends.cuda": "nvcc was not found"},
        ["CUDA kernels are not there (nvcc was not found). Triton's"],
    ),
    (
        {"backends.cuda": "no nvcc", "backends.triton": "no triton"},
        ["CUDA kernels", "No kernels for the GPU: no triton"],
    ),
    ({"backends.cpu": "not built"}, ["C++ kernels are not there (not built)"]),
    ({"backends.cpu": "not built", "compiler": None}, ["Install a C++ compiler"]),
    ({"variables.PYDRONE_BACKEND": "reference"}, ["by the slowest"]),
    ({"variables.PYDRONE_BACKEND": "triton"}, ["replaces the default backend."]),
    ({"variables.PYDRONE_BACKEND": "gpu"}, ["PYDRONE_BACKEND=gpu cannot be served: there is none of that name"]),
    ({"variables.PYDRONE_BACKEND": "cuda", "backends.cuda": "old"}, ["CUDA kernels", "cannot be served: old"]),
    ({"variables.TRITON_INTERPRET": "1"}, ["TRITON_INTERPRET=1 interprets"]),
    ({"variables.TRITON_INTERPRET": "0"}, []),
    ({"cpu.threads": 9}, ["9 threads on 8 cores that it may use"]),
    (
        {"cpu.cores_of_the_quota": 1.5},
        ["8 threads on 1.5 cores that it may use"],
    ),
    ({"cpu.load": 5.0}, ["load 5 on 8 cores"]),
    ({"cpu.load": None, "cpu.huge_pages": None}, []),
    ({"variables": {}}, ["GOMP_SPINCOUNT=10000"]),
    ({"variables": {}, "cpu.threads": 1}, []),
    ({"variables": {"OMP_WAIT_POLICY": "passive"}}, []),
    ({"variables": {"OMP_WAIT_POLICY": "active"}}, ["OMP_WAIT_POLICY=ACTIVE has"]),
    ({"cpu.huge_pages": "never"}, ["huge pages are off"]),
    ({"packages.tyro": None, "packages.skrl": None}, ["For `pydrone train`, tyro not installed"]),
]


@pytest.mark.parametrize(("changes", "expected"), ADVICE, ids=lambda x: ",".join(x) if isinstance(x, dict) else "")
def test_advice(changes, expected):
    facts = copy.deepcopy(healthy())
    for place, value in changes.items():
        *parents, name = place.split(".")
        at = facts
        for parent in parents:
            at = at[parent]
        assert name in at or at is facts["variables"], place
        at[name] = value
    said = machine.advice(facts)
    assert len(said) == len(expected) and all(y in x for x, y in zip(said, expected)), said


def test_nothing_to_change_is_said():
    report = healthy() | {"self_tests": [], "speed": []}
    assert machine.advice(report) == []
    assert "none: nothing to change" in doctor.text(report | {"advice": []})


def test_which_versions_are_too_old():
    requirements = [
        "torch>=2.10",
        'triton>=3.6; extra == "triton"',
        "tyro >=0.9",
        "numpy",
        'skrl[x]>=2.1; extra == "y"',
    ]
    versions = {"torch": "2.9.1+cu130", "triton": "3.6.0", "tyro": None, "numpy": "1.0", "skrl": "2.0.5", "more": "0"}
    assert machine.too_old(versions, requirements) == {"torch": "2.10", "skrl": "2.1"}
    # 2.10 is more than 2.9, and a zero more or less, or a release candidate, is the same version
    for version in ("2.10", "2.10.0", "2.10.0rc1", "2.11.0.dev2"):
        assert machine.too_old({"torch": version}, ["torch>=2.10.0"]) == {}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {("reference", "cpu"), ("reference", "cuda"), ("cpu", "cpu"), ("triton", "cuda"), ("cuda", "cuda")}),
        ({"gpus": [], "backends": {"reference": None, "cpu": "x", "triton": "x", "cuda": "x"}}, {("reference", "cpu")}),
        (
            {
                "gpus": [],
                "backends": {"reference": None, "cpu": "x", "triton": None, "cuda": "x"},
                "variables": {"TRITON_INTERPRET": "1"},
            },
            {("reference", "cpu"), ("triton", "cpu")},
        ),
    ],
)
def test_every_usable_backend_is_tested_where_it_runs(changes, expected):
    assert set(doctor.usable(healthy() | changes)) == expected
