"""The tests that take a backend; tests/gpu and tests/emulation run them on their own backends."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import ModuleType

import test_buffer
import test_buffer_state
import test_captured
import test_final_obs
import test_gae
import test_gae_contract
import test_minibatches
import test_properties
import test_ring
import test_vtrace

MODULES = (
    test_gae,
    test_gae_contract,
    test_vtrace,
    test_ring,
    test_buffer,
    test_buffer_state,
    test_final_obs,
    test_minibatches,
    test_captured,
    test_properties,
)


def cases(*modules: ModuleType) -> dict[str, Callable]:
    """Each test under the name MODULE_TEST."""
    return {
        f"{module.__name__}_{name.removeprefix('test_')}": case
        for module in modules
        for name, case in vars(module).items()
        if name.startswith("test_") and callable(case) and "backend" in inspect.signature(case).parameters
    }
