"""Every case of the CPU suite that takes a backend, on a GPU's backends."""

from __future__ import annotations

import pytest
import torch
from shared_cases import MODULES, cases

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

pytestmark = pytest.mark.gpu

CPU = "its tensors are made on import, or it names the CPU"
LEFT_OUT = {
    "test_gae_contract_equals_rsl_rl": CPU,
    "test_gae_contract_unsigned_flags_work_or_are_refused_by_name": CPU,
    "test_buffer_a_refused_step_leaves_everything_as_it_was": CPU,
    "test_buffer_state_to_its_own_device_is_itself": CPU,
    "test_buffer_state_repr_and_truth": CPU,
}

found = cases(*MODULES)
assert LEFT_OUT.keys() <= found.keys() and len(found) > 70
globals().update({name: case for name, case in found.items() if name not in LEFT_OUT})
