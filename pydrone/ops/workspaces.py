"""Scratch memory for the statistics of a scan, kept on CUDA: zeroing it for each call would be a second launch."""

from __future__ import annotations

import torch
from torch import Tensor

from pydrone.ops.schema import workspace_size

# Kept at once; the one made first goes.
MOST = 32

_kept: dict[tuple, Tensor] = {}


def workspace(num_envs: int, num_steps: int, device: torch.device, backend: str) -> Tensor:
    """``workspace`` of ``gae``, see :mod:`pydrone.ops.schema`: zeroed, or as a launch on the same stream left it.

    Launches of one stream run in turn, so they can share it. In a captured graph it is new: replays may run on any
    stream.
    """
    if device.type != "cuda" or torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing():
        return _zeros(num_envs, device)
    key = device.index, torch._C._cuda_getCurrentRawStream(device.index), num_envs, num_steps, backend
    kept = _kept.get(key)
    if kept is None:
        if len(_kept) >= MOST:
            _kept.pop(next(iter(_kept)))
        with torch.inference_mode(False):
            kept = _kept[key] = _zeros(num_envs, device)
    return kept


def _zeros(num_envs: int, device: torch.device) -> Tensor:
    return torch.zeros(workspace_size(num_envs), dtype=torch.float64, device=device)
