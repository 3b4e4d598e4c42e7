"""tests/test_properties.py on the Triton kernels, interpreted; test_triton.py runs it."""

from __future__ import annotations

import os

import pytest
import test_properties

if os.environ.get("TRITON_INTERPRET") != "1":
    raise RuntimeError("these tests use CPU tensors: set TRITON_INTERPRET=1")


@pytest.fixture
def backend() -> str:
    return "triton"


# A thousand launches, for permutations that another property proves bit-equal to the reference's.
LEFT_OUT = {"test_permutations_are_uniform_in_position_and_neighbours", "test_the_limit_finds_a_bad_permutation"}
cases = {name: case for name, case in vars(test_properties).items() if name.startswith("test_")}
assert cases.keys() > LEFT_OUT
globals().update({name: case for name, case in cases.items() if name not in LEFT_OUT})
