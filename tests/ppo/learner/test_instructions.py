"""What the fused learner costs on a CPU, in instructions, by the version for each instruction set: test_speed.py."""

from __future__ import annotations

import instructions
import pytest
from test_speed import ISAS, count

from pydrone.ops import native

pytestmark = pytest.mark.skipif(native.CPU_MISSING is not None, reason=f"no native library: {native.CPU_MISSING}")

# Measured (GCC 12): a sample through two networks of 17-32-8 units, and a parameter's step. Products take 3,832
# multiply-adds of a sample's gradients, and 1,640 of acting.
MEASURED = {"gradients": (713, 1426, 5320), "act": (651, 1024, 2981), "adam": (2, 3.42, 8.9)}


# Each takes 12 to 20 s. In the default run test_vectors.py and test_isa.py cover the lesser ones.
OWN = instructions.isa() if native.CPU_MISSING is None else None


@pytest.mark.parametrize("isa", [x if x == OWN else pytest.param(x, marks=pytest.mark.slow) for x in ISAS])
def test_instructions_of_a_sample(isa):
    """Vectors that the instruction set lacks are taken apart; so were activations and products by scalars."""
    at = ISAS.index(isa)
    if ISAS.index(instructions.isa()) > at:
        pytest.skip(f"{instructions.isa()} is all that there is")
    counted = count(*MEASURED, PYDRONE_ISA=isa)
    assert counted.keys() == MEASURED.keys()
    for call, found in counted.items():
        assert 0 < found < 1.2 * MEASURED[call][at], f"{call}: {found} instructions"
