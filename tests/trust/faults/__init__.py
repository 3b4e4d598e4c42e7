"""Known mistakes, which plant.py makes one at a time: a text that occurs exactly once in a file, and its replacement.

Their results are finite, plausible and wrong: a mistake that crashes at once needs no test to be found.
"""

from __future__ import annotations

from .c_export import C_EXPORT
from .cpp import CPP
from .cuda import CUDA
from .evaluation import EVALUATION
from .fault import Fault
from .learner import LEARNER
from .off_policy import OFF_POLICY
from .python import PYTHON
from .sb3 import SB3
from .skrl import SKRL
from .startup import STARTUP
from .triton import TRITON

FAULTS = [*PYTHON, *TRITON, *CPP, *C_EXPORT, *LEARNER, *OFF_POLICY, *CUDA, *SB3, *SKRL, *STARTUP, *EVALUATION]

__all__ = [
    "CPP",
    "CUDA",
    "C_EXPORT",
    "EVALUATION",
    "FAULTS",
    "LEARNER",
    "OFF_POLICY",
    "PYTHON",
    "SB3",
    "SKRL",
    "STARTUP",
    "TRITON",
    "Fault",
]
