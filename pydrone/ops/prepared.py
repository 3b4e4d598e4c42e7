"""Repeats ``append`` on a CPU without PyTorch's dispatcher, which takes longer than a step of 256 environments.

The dispatcher converts, checks and counts references to each of a step's dozen tensors, and all but their addresses is
as in the step before. So the operation plans an append once from dtypes, shapes and strides (csrc/cpu/append.cpp), the
guards of torch.compile tell whether other tensors are like those, and the library launches the plan on addresses.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from operator import attrgetter

import torch
from torch import Tensor
from torch.nn import Parameter

from pydrone.ops import native

try:  # all of them are private
    from torch._C import _dispatch_keys, _dispatch_tls_local_include_set, _len_torch_dispatch_stack
    from torch._C._dynamo.guards import TensorGuards
except ImportError:
    TensorGuards = None

# The guards ask a nested tensor for strides, which ends the process.
NESTED = attrgetter("is_nested")

Again = Callable[[int, int, Sequence], bool]
"""Repeats an append with (slot, pool_slot, a step's tensors) if they fit it, and returns whether it did. If not, it has
written nothing."""


def _modes() -> int:
    """The dispatch keys that this thread's modes, tracers and function transforms add."""
    return _dispatch_tls_local_include_set().raw_repr()


def _kind(x: Tensor) -> int:
    """The dispatch keys of a tensor: its device, and whether it is negated, nested, sparse, of a transform."""
    return _dispatch_keys(x).raw_repr()


# The ordinary ones.
_MODES, _KINDS = set(), set()
if TensorGuards is not None:
    for inference in (False, True):
        with torch.inference_mode(inference):
            _MODES.add(_modes())
            _KINDS.add(_kind(torch.empty(0, device="cpu")))


def prepare(
    memory: Sequence[Tensor],
    layout: Tensor,
    sources: Sequence[int],
    flags: Sequence[Tensor | None],
    given: Sequence[Tensor],
) -> list[Again]:
    """Prepares an append that was just made, for steps like it; [] where it cannot be repeated so.

    Args:
        memory, layout: as in the operation.  flags: dones, truncated, valid.
        given: the step's tensors, each once: those that sources are, then the flags that are not None.
        sources: the operation's, as places in ``given``.
    """
    if TensorGuards is None or _modes() not in _MODES:
        return []
    if len({*map(id, given)}) < len(given):  # the guards never match a tensor given twice
        return []
    if any(type(x) not in (Tensor, Parameter) or _kind(x) not in _KINDS for x in (*memory, *given)):
        return []
    places = [*sources, *range(max(sources, default=-1) + 1, len(given))]
    try:
        plan = torch.ops.pydrone.append_plan(memory, [given[i] for i in sources], layout, *flags, places)
        shapes, strides = ([[*f(x)] for x in given] for f in (Tensor.size, Tensor.stride))
        matches = TensorGuards(*given, dynamic_dims_sizes=shapes, dynamic_dims_strides=strides).check
    except Exception:  # this torch is not as those known; the step is stored, so nothing may be raised
        return []
    launch, address = native.CPU_LIBRARY.pydrone_append, Tensor.data_ptr
    pack = struct.Struct(f"{2 + len(memory) + len(given)}q").pack

    def again(slot: int, pool_slot: int, given: Sequence) -> bool:
        try:  # the guards do not see a FakeTensorMode
            if _len_torch_dispatch_stack() or any(map(NESTED, given)) or not matches(*given):
                return False
        except AttributeError:  # not all are tensors
            return False
        # The memory's addresses too: share_memory_() of a view moves all of its storage.
        return not launch(plan.data_ptr(), pack(slot, pool_slot, *map(address, memory), *map(address, given)))

    return [again]
