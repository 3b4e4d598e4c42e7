"""Every case of the CPU suite that takes a backend, on a GPU's backends."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
import test_buffer
import test_buffer_state
import test_captured
import test_final_obs
import test_gae
import test_gae_contract
import test_minibatches
import test_properties
import test_ring
import torch

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

pytestmark = pytest.mark.gpu

MODULES = (
    test_gae,
    test_gae_contract,
    test_ring,
    test_buffer,
    test_buffer_state,
    test_final_obs,
    test_minibatches,
    test_captured,
    test_properties,
)
CPU = "its tensors are made on import, or it names the CPU"
LEFT_OUT = {
    "test_gae_contract_equals_rsl_rl": CPU,
    "test_gae_contract_unsigned_flags_work_or_are_refused_by_name": CPU,
    "test_buffer_a_refused_step_leaves_everything_as_it_was": CPU,
    "test_buffer_state_to_its_own_device_is_itself": CPU,
    "test_buffer_state_repr_and_truth": CPU,
}


def cases(module: ModuleType) -> Iterator[tuple[str, Callable]]:
    for name, case in vars(module).items():
        if name.startswith("test_") and callable(case) and "backend" in inspect.signature(case).parameters:
            yield f"{module.__name__}_{name.removeprefix('test_')}", case


found = {name: case for module in MODULES for name, case in cases(module)}
assert LEFT_OUT.keys() <= found.keys() and len(found) > 70
globals().update({name: case for name, case in found.items() if name not in LEFT_OUT})
