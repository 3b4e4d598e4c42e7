"""Gradient clipping and Adam in one operation of the CPU library, on the state of a ``torch.optim.Adam``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pydrone.ops import dispatch, native

# Of torch.optim.Adam's options, what the operation does not do.
_PLAIN = {"weight_decay": 0, "amsgrad": False, "maximize": False, "differentiable": False}


def why_not(optimizer: torch.optim.Optimizer) -> str | None:
    """Why :func:`clipped_step` cannot take this optimiser's steps, or None where it can."""
    if native.CPU_MISSING is not None:
        return f"the native CPU library is missing: {native.CPU_MISSING}"
    if type(optimizer) is not torch.optim.Adam:  # nor one that is derived from it
        return f"it takes the steps of torch.optim.Adam, this is {type(optimizer).__name__}"
    if len(optimizer.param_groups) != 1:
        return f"expected one group of parameters, got {len(optimizer.param_groups)}"
    (group,) = optimizer.param_groups
    for name, plain in _PLAIN.items():
        if group.get(name, plain) != plain:
            return f"{name}: expected {plain}, got {group[name]}"
    if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
        return "it would not call the optimiser's hooks"
    for x in group["params"]:
        if x.device.type != "cpu" or x.dtype != torch.float32 or not x.is_contiguous():
            return f"expected contiguous float32 parameters on the CPU, got {x.dtype} on {x.device}"
    return None


@torch.no_grad()
def clipped_step(
    optimizer: torch.optim.Adam, groups: Sequence[Sequence[Tensor]], max_norm: float | None = None
) -> Tensor:
    """As ``clip_grad_norm_`` of each of ``groups`` and then ``optimizer.step()``; the gradients stay as they are.

    Adam (`arXiv:1412.6980 <https://arxiv.org/abs/1412.6980>`_, algorithm 1 with epsilon as torch places it) reads and
    writes the optimiser's own state: its ``state_dict`` and its ``step()`` go on from there. Parameters without a
    gradient are left out, as torch does; in a group whose norm is not a number all parameters become so.

    Args:
        optimizer: of one parameter group, without weight decay, AMSGrad and hooks; see :func:`why_not`.
        groups: parameters of the optimiser, each in one of the lists, whose gradients' norms are each held to ...
        max_norm: ... this, above 0. None: no clipping.

    Returns:
        [len(groups)] float32, the norms before clipping.

    Raises:
        RuntimeError: the optimiser is of another kind, or a tensor does not fit; nothing was written.
        ValueError: parameters and the optimiser's are not the same.
    """
    if reason := why_not(optimizer):
        raise RuntimeError(f"optimizer: {reason}")
    (options,) = optimizer.param_groups
    try:
        index = {id(x): i for i, group in enumerate(groups) for x in group}
    except TypeError:
        raise TypeError(f"groups: expected lists of parameters, got {groups!r:.80}") from None
    if index.keys() != {id(x) for x in options["params"]}:
        raise ValueError("groups: expected each of the optimiser's parameters in one of them, and no others")
    parameters = [x for x in options["params"] if x.grad is not None]
    norms = torch.zeros(len(groups))
    if not parameters:
        return norms
    states = [optimizer.state[x] or _begin(optimizer, x) for x in parameters]
    rate = options["lr"]
    beta1, beta2 = options["betas"]
    torch.ops.pydrone.clipped_adam(
        parameters,
        [x.grad.contiguous() for x in parameters],
        *([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq", "step")),
        [index[id(x)] for x in parameters],
        float("inf") if max_norm is None else max_norm,
        rate if isinstance(rate, Tensor) else torch.tensor(rate),
        beta1,
        beta2,
        options["eps"],
        norms,
    )
    dispatch.bump(parameters)
    optimizer._opt_called = True  # a scheduler of the learning rate asks for it
    return norms


def _begin(optimizer: torch.optim.Adam, parameter: Tensor) -> dict[str, Tensor]:
    """The state that Adam itself would begin with."""
    optimizer.state[parameter].update(
        step=torch.zeros(()), exp_avg=torch.zeros_like(parameter), exp_avg_sq=torch.zeros_like(parameter)
    )
    return optimizer.state[parameter]
