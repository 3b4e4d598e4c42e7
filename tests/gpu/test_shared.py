"""Every test of the CPU suite that takes a backend, on the GPU backends."""

from __future__ import annotations

import pytest
import torch
from shared_cases import MODULES, cases

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

pytestmark = pytest.mark.gpu

CPU = "it creates tensors on import, or names the CPU"
LAZY = "minibatches are lazy on the CPU only"
LEFT_OUT = {
    "test_gae_contract_equals_rsl_rl": CPU,
    "test_gae_contract_unsigned_flags_work_or_are_refused_by_name": CPU,
    "test_buffer_a_refused_step_leaves_everything_as_it_was": CPU,
    "test_buffer_state_to_its_own_device_is_itself": CPU,
    "test_buffer_state_repr_and_truth": CPU,
    "test_minibatches_an_older_lazy_minibatch_does_not_overwrite_the_last": LAZY,
    "test_minibatches_two_iterators_over_the_same_tensors": LAZY,
    "test_minibatches_a_lazy_minibatch_of_another_rollout": LAZY,
    "test_minibatches_a_lazy_minibatch_of_other_advantages": LAZY,
    "test_minibatches_a_lazy_minibatch_while_the_next_rollout_is_collected": LAZY,
    "test_minibatches_what_does_not_gather_a_lazy_minibatch": LAZY,
    "test_minibatches_copies": LAZY,
}

found = cases(*MODULES)
assert LEFT_OUT.keys() <= found.keys() and len(found) > 70
globals().update({name: case for name, case in found.items() if name not in LEFT_OUT})
