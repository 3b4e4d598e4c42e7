"""Repeats ``append`` on a CPU without PyTorch's dispatcher, which takes three times as long as a step of 256
environments.

The dispatcher converts, checks and counts references to each of a step's dozen tensors. All of them but their contents
are as in the step before. So the operation plans an append once from dtypes, shapes and strides (csrc/cpu/append.cpp),
the guards of torch.compile tell whether other tensors are like those, and the library launches the plan on addresses.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from operator import attrgetter

import torch
from torch import Tensor
from torch.nn import Parameter

from pydrone.ops import native

try:
    from torch._C._dynamo.guards import TensorGuards
except ImportError:  # they are private
    TensorGuards = None

# The guards ask a nested tensor for strides, which ends the process.
NESTED = attrgetter("is_nested")

Again = Callable[[int, int, Sequence], bool]
"""Repeats an append for (slot, pool_slot, the step's tensors) if the tensors fit; returns whether it did. Where it did
not, nothing was written."""


def _modes() -> int:
    """The dispatch keys that this thread's modes, tracers and function transforms add."""
    return torch._C._dispatch_tls_local_include_set().raw_repr()


def _kind(x: Tensor) -> int:
    """The dispatch keys of a tensor: whether it is negated, nested, sparse, of a transform, on a CPU."""
    return torch._C._dispatch_keys(x).raw_repr()


_MODES, _KINDS = {_modes()}, {_kind(torch.empty(0))}
with torch.inference_mode():
    _MODES.add(_modes())
    _KINDS.add(_kind(torch.empty(0)))


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
    if TensorGuards is None or _modes() not in _MODES or len({*map(id, given)}) < len(given):
        return []
    if any(type(x) not in (Tensor, Parameter) or _kind(x) not in _KINDS for x in (*memory, *given)):
        return []
    places = [*sources, *range(max(sources, default=-1) + 1, len(given))]
    plan = torch.ops.pydrone.append_plan(memory, [given[i] for i in sources], layout, *flags, places)
    shapes, strides = ([[*f(x)] for x in given] for f in (Tensor.size, Tensor.stride))
    matches = TensorGuards(*given, dynamic_dims_sizes=shapes, dynamic_dims_strides=strides).check
    launch, at, address = native.CPU_LIBRARY.pydrone_append, plan.data_ptr(), Tensor.data_ptr
    pack, modes = struct.Struct(f"{2 + len(memory) + len(given)}q").pack, torch._C._len_torch_dispatch_stack

    def again(slot: int, pool_slot: int, given: Sequence) -> bool:
        try:
            if modes() or any(map(NESTED, given)) or not matches(*given):
                return False
        except AttributeError:  # not all are tensors
            return False
        # The memory may have moved: share_memory_() of a view moves it.
        return not launch(at, pack(slot, pool_slot, *map(address, memory), *map(address, given)))

    again.plan = plan  # which owns its memory
    return [again]
