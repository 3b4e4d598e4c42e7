"""Gradient clipping and Adam in one operation, on the state of a ``torch.optim.Adam``."""

from __future__ import annotations

import functools
import inspect
import operator
import sys
from collections.abc import Callable, Sequence
from types import NoneType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from pydrone.ops import dispatch, native, triton

# Options of torch.optim.Adam that the operation does not support, with the values it requires.
_PLAIN = {"weight_decay": 0, "amsgrad": False, "maximize": False, "differentiable": False}


def _uncompiled(name: str) -> Callable[..., Any]:
    """torch.optim.Adam's method, without torch's wrapper until torch._dynamo is imported."""
    wrapped = getattr(torch.optim.Adam, name)
    plain = inspect.unwrap(wrapped)

    @functools.wraps(plain)
    def method(*args: Any, **kwargs: Any) -> Any:
        return (wrapped if "torch._dynamo" in sys.modules else plain)(*args, **kwargs)

    return method


class Adam(torch.optim.Adam):
    """torch.optim.Adam that does not import torch._dynamo, which takes almost as long as ``import torch``.

    torch keeps these methods from being compiled by wrappers that import it at their first call. Before that import
    there is no compiler to keep away. ``step()``, which :func:`step` replaces, still imports it.
    """

    add_param_group = _uncompiled("add_param_group")
    zero_grad = _uncompiled("zero_grad")
    state_dict = _uncompiled("state_dict")
    load_state_dict = _uncompiled("load_state_dict")


# For each optimiser the tensors that were last found to fit.
_fitting: WeakKeyDictionary[torch.optim.Optimizer, list[object]] = WeakKeyDictionary()


def why_not(optimizer: torch.optim.Optimizer, groups: Sequence[Sequence[Tensor]] = ()) -> str | None:
    """Why :func:`clipped_step` cannot replace this optimiser's step, or None where it can.

    With ``groups``, also where a parameter is in two of them, which torch would clip twice.
    """
    if type(optimizer) not in (torch.optim.Adam, Adam):  # nor another subclass
        return f"it takes the steps of torch.optim.Adam, this is {type(optimizer).__name__}"
    if len(optimizer.param_groups) != 1:
        return f"expected one group of parameters, got {len(optimizer.param_groups)}"
    (group,) = optimizer.param_groups
    for name, plain in _PLAIN.items():
        if group.get(name, plain) != plain:
            return f"{name}: expected {plain}, got {group[name]}"
    hooks = optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks
    if any((*hooks, _global_optimizer_pre_hooks, _global_optimizer_post_hooks)):
        return "it would not call the optimiser's hooks"
    device = group["params"][0].device
    if device.type == "cpu" and native.CPU_MISSING is not None:
        return f"the native CPU library is missing: {native.CPU_MISSING}"
    tensors = [*group["params"], *(x for state in optimizer.state.values() for x in state.values())]
    known = _fitting.get(optimizer, ())
    if len(known) != len(tensors) or not all(map(operator.is_, known, tensors)):
        where, steps = (
            "the CPU" if device.type != "cuda" else device,
            {id(x.get("step")) for x in optimizer.state.values()},
        )
        for x in tensors:
            here = not isinstance(x, Tensor) or x.device == device or id(x) in steps
            fits = not isinstance(x, Tensor) or (x.dtype is torch.float32 and x.is_contiguous())
            if not here or not fits or device.type not in ("cpu", "cuda"):
                return f"expected contiguous float32 parameters on {where}, got {x.dtype} on {x.device}"
        _fitting[optimizer] = tensors
    if triton.serves(device) and (reason := triton.why_not("clipped_adam", group["params"])) is not None:
        return reason
    given = [id(x) for parameters in groups for x in parameters]
    return None if len(given) == len(set(given)) else "a parameter is in two of the groups"


def clipped_step(
    optimizer: torch.optim.Adam, groups: Sequence[Sequence[Tensor]], max_norm: float | None = None
) -> Tensor:
    """As ``clip_grad_norm_`` of each of ``groups``, then ``optimizer.step()``; gradients are not changed.

    Adam (`arXiv:1412.6980 <https://arxiv.org/abs/1412.6980>`_, algorithm 1 with epsilon as torch places it) reads and
    writes the optimiser's own state: its ``state_dict`` and its ``step()`` go on from there. Parameters without a
    gradient are skipped, as in torch. With clipping, a NaN norm makes the whole group NaN, and an infinite norm those
    elements whose gradient is infinite.

    Args:
        optimizer: of one parameter group, without weight decay, AMSGrad and hooks; see :func:`why_not`.
        groups: lists of the optimiser's parameters, each parameter that has a gradient in one list; each list is
            clipped on its own.
        max_norm: largest norm of a group's gradients, above 0. None: no clipping.

    Returns:
        [len(groups)] float32, the norms before clipping.

    Raises:
        RuntimeError: the optimiser is of another kind, or a tensor does not fit; nothing was written.
        TypeError, ValueError: ``max_norm`` or ``groups`` are not as above.
    """
    if reason := why_not(optimizer):
        raise RuntimeError(f"optimizer: {reason}")
    if isinstance(max_norm, bool) or not isinstance(max_norm, (int, float, NoneType)):
        raise TypeError(f"max_norm: expected a number above 0 or None, got {type(max_norm).__name__}")
    if max_norm is not None and not max_norm > 0:
        raise ValueError(f"max_norm: expected a number above 0 or None, got {max_norm}")
    try:
        groups = [list(group) for group in groups]
    except TypeError:
        raise TypeError(f"groups: expected lists of parameters, got {groups!r:.80}") from None
    given = {id(x) for group in groups for x in group}
    if sum(map(len, groups)) != len(given) or not given <= {id(x) for x in optimizer.param_groups[0]["params"]}:
        raise ValueError("groups: expected parameters of the optimiser, each once")
    return step(optimizer, groups, max_norm)


@torch.no_grad()
def step(
    optimizer: torch.optim.Adam,
    groups: Sequence[Sequence[Tensor]],
    max_norm: float | None,
    kl: Tensor | None = None,
    schedule: Sequence[float] = (),
) -> Tensor:
    """:func:`clipped_step` where :func:`why_not` has been asked, with the groups.

    With ``kl``, float32 [], the learning rate, a tensor then, is first adapted by ``schedule``, see ``clipped_adam`` in
    :mod:`pydrone.ops.schema`.
    """
    (options,) = optimizer.param_groups
    parameters = [x for x in options["params"] if x.grad is not None]
    index = {id(x): i for i, group in enumerate(groups) for x in group}
    numbers = [index.get(id(x)) for x in parameters]
    if None in numbers:
        raise ValueError("groups: expected each of the optimiser's parameters that has a gradient, one is missing")
    rate, device = options["lr"], options["params"][0].device
    like = {"dtype": torch.float32, "device": device}
    if not parameters:
        return torch.zeros(len(groups), **like)
    norms = torch.empty(len(groups), **like)
    states = [optimizer.state[x] or _begin(optimizer, x) for x in parameters]
    for state in states:
        if state["step"].device != device:  # torch keeps it on the CPU; it takes it from the device as well
            state["step"] = state["step"].to(device)
    beta1, beta2 = options["betas"]
    torch.ops.pydrone.clipped_adam.default(
        parameters,
        [x.grad.contiguous() for x in parameters],
        *([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq", "step")),
        numbers,
        float("inf") if max_norm is None else max_norm,
        rate.reshape(()).to(**like) if isinstance(rate, Tensor) else torch.full((), rate, **like),
        beta1,
        beta2,
        options["eps"],
        norms,
        kl,
        schedule,
    )
    dispatch.bump([*parameters, *([] if kl is None else [rate])])
    optimizer._opt_called = True  # a scheduler of the learning rate asks for it
    return norms


def _begin(optimizer: torch.optim.Adam, parameter: Tensor) -> dict[str, Tensor]:
    """Adam's own initial state."""
    optimizer.state[parameter].update(
        step=torch.zeros((), dtype=torch.float32, device=parameter.device),
        exp_avg=torch.zeros_like(parameter),
        exp_avg_sq=torch.zeros_like(parameter),
    )
    return optimizer.state[parameter]
