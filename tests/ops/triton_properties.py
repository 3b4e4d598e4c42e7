"""tests/test_properties.py on the Triton kernels; test_triton.py runs it, interpreted."""

from __future__ import annotations

import os

import pytest
import test_properties

if os.environ.get("TRITON_INTERPRET") != "1":
    raise RuntimeError("its tensors lie on the CPU: set TRITON_INTERPRET=1")


@pytest.fixture
def backend() -> str:
    return "triton"


# A thousand launches, of permutations that another property shows to be the reference's to the bit.
LEFT_OUT = {"test_permutations_are_uniform_in_position_and_neighbours", "test_the_limit_finds_a_bad_permutation"}
cases = {name: case for name, case in vars(test_properties).items() if name.startswith("test_")}
assert cases.keys() > LEFT_OUT
globals().update({name: case for name, case in cases.items() if name not in LEFT_OUT})
