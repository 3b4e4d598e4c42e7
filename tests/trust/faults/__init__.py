"""Known mistakes, for plant.py to make one at a time: each is a text that stands once in a file, and what replaces it.

Finite, plausible and wrong is the rule here: a mistake that crashes at once needs no test to be found.
"""

from __future__ import annotations

from .cpp import CPP
from .cuda import CUDA
from .fault import Fault
from .learner import LEARNER
from .python import PYTHON
from .triton import TRITON

FAULTS = [*PYTHON, *TRITON, *CPP, *LEARNER, *CUDA]

__all__ = ["CPP", "CUDA", "FAULTS", "LEARNER", "PYTHON", "TRITON", "Fault"]
