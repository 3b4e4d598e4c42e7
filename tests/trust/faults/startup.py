"""Mistakes in what a command does before and after its work."""

from __future__ import annotations

from .fault import Fault

OF_STARTUP = "tests/cli/test_startup.py"

STARTUP = [
    Fault(
        "an optimiser that imports the compiler",
        "pydrone/ppo/learner/learner.py",
        "adam.Adam(policy.parameters()",
        "torch.optim.Adam(policy.parameters()",
        OF_STARTUP,
    ),
    Fault(
        "torch's wrappers left off where there is a compiler",
        "pydrone/ppo/learner/adam.py",
        '(wrapped if "torch._dynamo" in sys.modules else plain)',
        "plain",
        "tests/ppo/learner/test_adam.py",
    ),
    Fault(
        "tensors frozen with the garbage of an earlier training",
        "pydrone/cli/common.py",
        'if "torch" in sys.modules or not gc.isenabled():',
        "if not gc.isenabled():",
        OF_STARTUP,
    ),
    Fault(
        "torch imported to read a log",
        "pydrone/ppo/training/run_log.py",
        "import os\n",
        "import os\n\nimport torch  # noqa: F401\n",
        OF_STARTUP,
    ),
]
