"""A healthy machine for the tests of the doctor."""

from __future__ import annotations

import pytest

from pydrone.doctor import machine
from pydrone.ops import dispatch


@pytest.fixture
def healthy() -> dict:
    """A machine about which the doctor has no advice."""
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
