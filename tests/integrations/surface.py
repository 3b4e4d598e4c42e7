"""Compares what the same calls do on an object of a peer and on its drop-in."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch


def outcome(call: Callable, *arguments: object) -> object:
    """What ``call`` returns, or "raised"."""
    try:
        return call(*arguments)
    except Exception:
        return "raised"


def same_outcome(expected: object, got: object, path: str = "") -> None:
    """Two nests of arrays, tensors and plain values agree: types, shapes, dtypes, and numbers to 1e-5."""
    if isinstance(expected, (dict, tuple, list)):
        assert len(expected) == len(got), path
        for key in expected if isinstance(expected, dict) else range(len(expected)):
            same_outcome(expected[key], got[key], f"{path}[{key!r}]")
    elif isinstance(expected, (np.ndarray, torch.Tensor)):
        assert type(expected) is type(got) and (expected.dtype, expected.shape) == (got.dtype, got.shape), path
        if isinstance(expected, torch.Tensor):
            expected, got = (x.float() if x.dtype == torch.bfloat16 else x for x in (expected.detach(), got.detach()))
        np.testing.assert_allclose(np.asarray(got), np.asarray(expected), rtol=1e-5, atol=1e-5, err_msg=path)
    else:
        assert expected == got, path
