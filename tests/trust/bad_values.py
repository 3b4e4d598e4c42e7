"""Wrong values for bad_input.py and bad_learner.py, by the kind of argument."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

NAN, INF = float("nan"), float("inf")
HUGE, BIG = 10**400, 2**63 - 1


class Bad(NamedTuple):
    """A wrong value; ``names``: what an error may name instead of the argument."""

    value: object
    names: tuple[str, ...] = ()


class Subject(NamedTuple):
    """A valid call. ``wrong``: wrong values for each argument. ``held``: what a refused call must not change."""

    name: str
    call: Callable[..., object]
    arguments: dict[str, object]
    wrong: dict[str, list]
    held: tuple[object, ...] = ()


# Nested and quantized tensors must be refused; PyTorch's warnings about them do not matter here.
warnings.filterwarnings("ignore", message=".*(nested tensors|quantize|Sparse CSR)")


def not_tensors(x: Tensor, optional: bool) -> list[object]:
    wrong: list[object] = [3.0, "x", [1.0, 2.0], object(), {"a": x}]
    if x.dtype not in (torch.bfloat16,):
        wrong.append(x.detach().numpy())
    return wrong if optional else [*wrong, None]


def other_layouts(x: Tensor) -> list[Tensor]:
    """Tensors not in plain memory. Kinds that PyTorch warns about are rare here: a warning takes milliseconds."""
    x = x.detach()
    made = [x.to("meta"), x.to_sparse()]
    if x.dtype == torch.float32 and x.dim() > 0:
        made.append(x.to_mkldnn())
    seldom = int(torch.randint(24, ()))
    if seldom == 0:
        made += [torch.nested.nested_tensor([x, x])] * 3
    if seldom == 1 and x.dim() == 2:
        made += [x.to_sparse_csr()] * 3
    if seldom == 2 and x.dtype == torch.float32:
        made += [torch.quantize_per_tensor(x, 0.1, 0, torch.quint8)] * 3
    return made


def other_shapes(x: Tensor) -> list[Tensor]:
    """Shapes that are invalid if N, T > 1: one environment more or fewer, one more dimension, empty, a scalar."""
    made = [torch.cat([x, x[:1]]), x[:-1], x.unsqueeze(0), x.new_zeros(0), x.new_zeros(())]
    made.append(x.unsqueeze(-1).expand(*x.shape, 2))
    if x.dim() > 1:
        made += [x[:, :-1], torch.cat([x, x[:, :1]], 1), torch.cat([x] * 5, 1)]
        made += [x.flatten()] if x.shape[1] > 1 else []  # [N] is valid for [N, 1]
    return made


def bad_tensor(x: Tensor, kind: str, optional: bool = False) -> list[object]:
    """``kind``, the valid dtypes: "real", any floating; "flag", any that has a zero; "exact", its own."""
    dtypes = {"real": (torch.int64, torch.bool), "flag": (), "exact": (torch.float32, torch.int16, torch.bool)}[kind]
    made = [x.to(dtype) for dtype in (*dtypes, torch.complex64, torch.complex128) if dtype != x.dtype]
    return [*not_tensors(x, optional), *other_layouts(x), *other_shapes(x), *made]


def bad_unit() -> list[object]:
    wrong = [NAN, INF, -INF, -1e-9, 1 + 1e-9, 2, -1, HUGE, -HUGE, "0.5", "x", None, [0.5], 1j, object(), b"1"]
    return [*wrong, torch.tensor([0.1, 0.2]), torch.tensor(NAN), torch.tensor([]), torch.tensor(0.5, device="meta")]


def bad_int(least: int, optional: bool = False) -> list[object]:
    wrong = [least - 1, -BIG, -HUGE, 1.0, 2.5, NAN, INF, "3", True, [3], 3j, object(), torch.tensor(3)]
    return wrong if optional else [*wrong, None]


def bad_choice(optional: bool = False) -> list[object]:
    wrong = ["nonsense", "", b"full", 3, 0.5, [], {}, object()]
    return wrong if optional else [*wrong, None]


def bad_bool() -> list[object]:
    return ["false", "", 2, 0.5, None, [], object()]


def overlapping(outputs: tuple[Tensor, Tensor], inputs: Iterable[Tensor]) -> list[tuple]:
    """Replacements for ``outputs`` that overlap an input, each other, or themselves."""
    first, second = outputs
    shape = first.shape
    both = first.new_zeros(first.numel() + 1)
    made = [(first, first), (first, second[:1].expand(shape)), (second[..., :1].expand(shape), second)]
    made.append((both[:-1].view(shape), both[1:].view(shape)))
    made.append((both.as_strided(shape, (1,) * len(shape)), second))
    made += [(x, second) for x in inputs if x.shape == shape and x.dtype == first.dtype]
    return made
