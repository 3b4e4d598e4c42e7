"""What belongs to a CUDA stream: whether it is captured, and scratch memory that launches on it share."""

from __future__ import annotations

import torch
from torch import Tensor

from pydrone.ops.schema import workspace_size

# Workspaces kept at once; the one made first goes.
MOST = 32

_kept: dict[tuple, Tensor] = {}


def capturing(device: int) -> bool:
    """Whether the device's current stream is being captured in a CUDA graph."""
    # The default stream, 0, cannot be. Asking CUDA takes several calls of it.
    return torch._C._cuda_getCurrentRawStream(device) != 0 and torch.cuda.is_current_stream_capturing()


def workspace(num_envs: int, num_steps: int, device: torch.device, backend: str) -> Tensor:
    """``workspace`` of ``gae``, see :mod:`pydrone.ops.schema`: zeroed, or as a launch on the same stream left it.

    Kept on CUDA, where zeroing it would be a second launch: launches of one stream run in turn, so they can share it.
    In a captured graph it is new, as replays may run on any stream.
    """
    if device.type != "cuda" or torch.compiler.is_compiling() or capturing(device.index):
        return _zeros(num_envs, device)
    if torch._C._len_torch_dispatch_stack() > 0:  # as in FakeTensorMode, whose tensors have no memory
        return _zeros(num_envs, device)
    key = device.index, torch._C._cuda_getCurrentRawStream(device.index), num_envs, num_steps, backend
    kept = _kept.get(key)
    if kept is None:
        with torch.inference_mode(False):
            kept = _zeros(num_envs, device)
        if torch._is_functional_tensor(kept):  # functionalize()'s, which is of no use outside it
            return kept
        if len(_kept) >= MOST:
            _kept.pop(next(iter(_kept)))
        _kept[key] = kept
    return kept


def _zeros(num_envs: int, device: torch.device) -> Tensor:
    return torch.zeros(workspace_size(num_envs), dtype=torch.float64, device=device)
