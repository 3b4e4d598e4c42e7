"""Checks of a caller's arguments. Errors name the argument, what was expected and what it is."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd import forward_ad

from pydrone.ops.schema import FLOATS, REALS


def positive(name: str, x: object) -> int:
    """``x`` as an int of at least 1, or an error that names it."""
    if isinstance(x, bool) or not isinstance(x, int):
        raise TypeError(f"{name}: expected an int, got {type(x).__name__}")
    if x < 1:
        raise ValueError(f"{name}: expected at least 1, got {x}")
    return x


def boolean(name: str, x: object) -> bool:
    """``x`` if it is True or False, or an error that names it: the string "false" would count as true."""
    if not isinstance(x, bool):
        raise TypeError(f"{name}: expected a bool, got {type(x).__name__}")
    return x


def unit_interval(name: str, x: float) -> float:
    """``x`` as a float in [0, 1], or an error that names it."""
    number = _number(name, x)
    if not 0 <= number <= 1:  # NaN too; torch.compile cannot trace math.isfinite of a number that changes
        raise ValueError(f"{name}: expected a number in [0, 1], got {x}")
    return number


def at_least_0(name: str, x: float) -> float:
    """``x`` as a float of at least 0, infinity included, or an error that names it."""
    number = _number(name, x)
    if not number >= 0:
        raise ValueError(f"{name}: expected a number of at least 0, got {x}")
    return number


def _number(name: str, x: float) -> float:
    try:
        return float(None if isinstance(x, (str, bytes)) else x)
    except OverflowError:  # an int beyond all floats
        return math.inf
    except (TypeError, ValueError, RuntimeError):  # RuntimeError: a tensor
        raise TypeError(f"{name}: expected a number, got {type(x).__name__}") from None


def env_scalars(name: str, x: Tensor, num_envs: int, device: torch.device, hint: str = "") -> Tensor:
    """``x``, floating, as [N]; accepts [N] and [N, 1]. An error of the shape ends with ``hint``."""
    check_tensor(name, x, device, floating=True)
    if x.shape[:1] != (num_envs,) or x.numel() != num_envs:
        raise ValueError(f"{name}: expected shape [{num_envs}] or [{num_envs}, 1], got {list(x.shape)}{hint}")
    return x.reshape(num_envs) if x.dim() == 1 else x.flatten(1)[:, 0]


def check_strided(name: str, x: Tensor) -> None:
    """Raises TypeError unless ``x`` is plain memory with strides."""
    if x.layout != torch.strided or x.is_nested or x.is_quantized:
        kind = "a nested one" if x.is_nested else x.dtype if x.is_quantized else x.layout
        raise TypeError(f"{name}: expected a strided tensor, got {kind}")


def check_real(name: str, x: Tensor, floating: bool | None = None) -> None:
    """Raises TypeError unless ``x`` has a real dtype, or a floating one, that every backend reads."""
    known = FLOATS if floating else REALS
    if x.dtype not in known:
        unusual = x.is_floating_point() or not (floating or x.is_complex())
        wanted = f"one of {', '.join(map(str, known))}" if unusual else f"a {'floating' if floating else 'real'} dtype"
        raise TypeError(f"{name}: expected {wanted}, got {x.dtype}")


def check_tensor(
    name: str, x: object, device: torch.device | None, floating: bool | None = None, result: str = "advantages do"
) -> None:
    """Raises unless ``x`` is a tensor of real numbers on ``device``, without a gradient that ``result`` would drop."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if device is not None and x.device != device:
        raise ValueError(f"{name}: expected device {device}, got {x.device}")
    check_strided(name, x)
    check_real(name, x, floating)
    if x.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(f"{name}: requires grad, which {result} not pass on; pass {name}.detach()")
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None:
        raise RuntimeError(f"{name}: has a tangent, which {result} not pass on; pass {name}.detach()")


def overlaps_itself(x: Tensor) -> bool:
    """Whether two elements of ``x`` may be the same memory."""
    reach = 0  # of the dimensions with smaller strides
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1 and stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


def overlap(x: Tensor, y: Tensor) -> bool:
    """Whether the memory of ``x`` and of ``y``, each from first to last element, has bytes in common."""
    if x.numel() == 0 or y.numel() == 0 or x.untyped_storage().data_ptr() != y.untyped_storage().data_ptr():
        return False
    (x0, x1), (y0, y1) = _extent(x), _extent(y)
    return x0 < y1 and y0 < x1


def _extent(x: Tensor) -> tuple[int, int]:
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()
