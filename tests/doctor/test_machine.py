"""The doctor's advice."""

from __future__ import annotations

import pytest

from pydrone.doctor import machine

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
        ["CUDA kernels are not available (nvcc was not found). The Triton kernels run"],
    ),
    (
        {"backends.cuda": "no nvcc", "backends.triton": "no triton"},
        ["CUDA kernels", "No kernels for the GPU: no triton"],
    ),
    ({"backends.cpu": "not built"}, ["C++ kernels are not available (not built)"]),
    ({"backends.cpu": "not built", "compiler": None}, ["Install a C++ compiler"]),
    ({"variables.PYDRONE_BACKEND": "reference"}, ["by the slowest"]),
    ({"variables.PYDRONE_BACKEND": "triton"}, ["replaces the default backend."]),
    ({"variables.PYDRONE_BACKEND": "gpu"}, ["PYDRONE_BACKEND=gpu is not usable: there is none of that name"]),
    ({"variables.PYDRONE_BACKEND": "cuda", "backends.cuda": "old"}, ["CUDA kernels", "is not usable: old"]),
    ({"variables.TRITON_INTERPRET": "1"}, ["TRITON_INTERPRET=1 interprets"]),
    ({"variables.TRITON_INTERPRET": "0"}, []),
    ({"cpu.threads": 9}, ["9 threads on the 8 cores that it may use"]),
    (
        {"cpu.cores_of_the_quota": 1.5},
        ["8 threads on the 1.5 cores that it may use"],
    ),
    ({"cpu.load": 5.0}, ["load 5 on 8 cores"]),
    ({"cpu.load": None, "cpu.huge_pages": None}, []),
    ({"variables": {}}, ["GOMP_SPINCOUNT=10000"]),
    ({"variables": {}, "cpu.threads": 1}, []),
    ({"variables": {"OMP_WAIT_POLICY": "passive"}}, []),
    ({"variables": {"OMP_WAIT_POLICY": "active"}}, ["OMP_WAIT_POLICY=ACTIVE lets"]),
    ({"cpu.huge_pages": "never"}, ["huge pages are off"]),
    ({"packages.tyro": None, "packages.skrl": None}, ["`pydrone train` needs tyro:"]),
]


@pytest.mark.parametrize(("changes", "expected"), ADVICE, ids=lambda x: ",".join(x) if isinstance(x, dict) else "")
def test_advice(changes, expected, healthy):
    for place, value in changes.items():
        *parents, name = place.split(".")
        at = healthy
        for parent in parents:
            at = at[parent]
        assert name in at or at is healthy["variables"], place
        at[name] = value
    said = machine.advice(healthy)
    assert len(said) == len(expected) and all(y in x for x, y in zip(said, expected)), said


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
    # 2.10 is newer than 2.9; trailing zeros and release candidates make no difference
    for version in ("2.10", "2.10.0", "2.10.0rc1", "2.11.0.dev2"):
        assert machine.too_old({"torch": version}, ["torch>=2.10.0"]) == {}
