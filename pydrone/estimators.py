"""GAE, V-trace and Retrace(lambda) over a whole rollout in one launch, for callers with storage of their own."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from pydrone.ops.arguments import (
    at_least_0,
    boolean,
    check_tensor,
    env_scalars,
    overlap,
    overlaps_itself,
    unit_interval,
)
from pydrone.ops.dispatch import Backend, select, written
from pydrone.ops.schema import BOOTSTRAP
from pydrone.ops.streams import workspace

__all__ = ["gae", "retrace", "vtrace"]


class _Estimator(NamedTuple):
    """An operation of :mod:`pydrone.ops.schema` as these functions call it.

    planes: the arguments [N, T] that it reads, in its order, where last_values stands before final_values.
    outputs: what is returned, by name.  places: where the operation's (advantages, other output) are among them.
    """

    operation: str
    planes: tuple[str, ...]
    outputs: tuple[str, ...]
    places: tuple[int | None, int]


_FLAGS, _OPTIONAL = ("dones", "truncated", "valid"), ("truncated", "valid", "final_values")
_PLANES = ("rewards", "values", "dones", "truncated", "valid", "final_values")
_GAE = _Estimator("gae", _PLANES, ("advantages", "returns"), (0, 1))
_VTRACE = _Estimator("off_policy", (*_PLANES, "log_rhos"), ("vs", "pg_advantages"), (1, 0))
_RETRACE = _Estimator("off_policy", (*_PLANES, "log_rhos", "q_values"), ("targets",), (None, 0))


def gae(
    rewards: Tensor,
    values: Tensor,
    dones: Tensor,
    last_values: Tensor,
    gamma: float = 0.99,
    lam: float = 0.95,
    truncated: Tensor | None = None,
    final_values: Tensor | None = None,
    timeout_bootstrap: str | None = None,
    valid: Tensor | None = None,
    time_dim: int = 1,
    out: tuple[Tensor, Tensor] | None = None,
    stats: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, ...]:
    """Advantages and returns of N environments over T steps (Schulman et al. 2016, arXiv:1506.02438, eq. 16).

    With A_T = 0 and V_T = last_values::

        next_t   = 0 where terminated, the bootstrap value where truncated, V_{t+1} elsewhere
        delta_t  = r_t + gamma * next_t - V_t
        A_t      = delta_t + (0 where the episode ended with t, else gamma * lam * A_{t+1})
        return_t = A_t + V_t

    No value after an episode's end, NaN and infinity included, reaches an advantage before it.

    Args:
        rewards: [N, T], floating of 16, 32 or 64 bits, as all floating arguments. With ``time_dim=0``: [T, N]. A
            trailing dimension of 1 is accepted everywhere, and neither layout is copied into the other.
        values: V(s_t), shaped as rewards, floating.
        dones: shaped as rewards, bool, an integer of 8 to 64 bits or floating; nonzero: the episode ended with
            transition t, for whatever reason.
        last_values: V(s_T), [N] or [N, 1], floating.
        gamma: discount factor, in [0, 1].
        lam: GAE's lambda, in [0, 1].
        truncated: as dones; nonzero: the episode ended with transition t by a time limit and nothing else. Counts as
            done by itself. Needs exactly one of:
        final_values: shaped as rewards, floating: V of the true final observation, read where truncated.
        timeout_bootstrap: "stored_value": V_t (rsl_rl's ``r_t += gamma * V_t``, the rewards untouched);
            "next_value": V_{t+1} (NEXT_STEP autoreset, where the stored next observation is the final one).
        valid: as dones; zero marks a step that is no transition (the reset step of NEXT_STEP autoreset): its advantage
            is 0, it cuts the trace, and the statistics leave it out.
        time_dim: 1 for [N, T], 0 for [T, N].
        out: (advantages, returns) to write to, shaped as rewards, of the dtype that would be returned.
        stats: return a third tensor, float64 [3]: count, mean and M2 (sum of squared deviations) of the advantages of
            all valid samples.
        backend: "reference", "cpu", "triton" or "cuda"; None: ``PYDRONE_BACKEND`` or the best for the device.

    Returns:
        (advantages, returns), and the statistics if asked for; shaped as rewards; float64 where an input is, else
        float32.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, dtype or device (the error names it); truncations
            have no bootstrap, or two. RuntimeError: the backend cannot be used, or an input requires grad (advantages
            are constants to PPO: pass ``values.detach()``).
    """
    gamma, lam = unit_interval("gamma", gamma), unit_interval("lam", lam)
    planes = rewards, values, dones, truncated, valid, final_values
    how = timeout_bootstrap, time_dim, out, stats, backend
    return _estimate(_GAE, planes, last_values, (gamma, lam), *how)


def vtrace(
    rewards: Tensor,
    values: Tensor,
    dones: Tensor,
    last_values: Tensor,
    log_rhos: Tensor,
    gamma: float = 0.99,
    lam: float = 1.0,
    rho_clip: float = 1.0,
    c_clip: float = 1.0,
    truncated: Tensor | None = None,
    final_values: Tensor | None = None,
    timeout_bootstrap: str | None = None,
    valid: Tensor | None = None,
    time_dim: int = 1,
    out: tuple[Tensor, Tensor] | None = None,
    stats: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, ...]:
    """V-trace's targets and policy gradient advantages (Espeholt et al. 2018, arXiv:1802.01561, eq. 1), for actions
    that another policy took.

    With next_t and delta_t as in :func:`gae`, and x_T = 0::

        rho_t          = min(rho_clip, exp(log_rho_t))
        c_t            = lam * min(c_clip, exp(log_rho_t))              (remark 2)
        x_t            = rho_t * delta_t + (0 where the episode ended with t, else gamma * c_t * x_{t+1})
        vs_t           = V_t + x_t
        pg_advantage_t = rho_t * (r_t + gamma * vs_{t+1} - V_t), with next_t for vs_{t+1} where the episode ended with t

    On-policy (all log_rhos 0, clips at least 1), vs are :func:`gae`'s returns, and with lam 1 the pg_advantages its
    advantages. No value and no ratio after an episode's end, NaN and infinity included, reaches what is before it. A
    NaN ratio makes its own step NaN.

    Args:
        log_rhos: shaped as rewards, floating: log pi(a_t | s_t) - log mu(a_t | s_t), pi the policy that is evaluated,
            mu the one that acted.
        lam: lambda, in [0, 1].
        rho_clip: bound of rho, at least 0, may be infinite: it decides which policy's value the targets converge to.
        c_clip: bound of c before lam, at least 0, may be infinite: how far corrections reach.
        out: (vs, pg_advantages) to write to.
        stats: return a third tensor, float64 [3]: count, mean and M2 of the pg_advantages of all valid samples.
        others: as in :func:`gae`. A step that is no transition has the target V_t and the advantage 0.

    Returns:
        (vs, pg_advantages), and the statistics if asked for; shaped as rewards; float64 where an input is, else
        float32.

    Raises:
        As :func:`gae`.
    """
    gamma, lam = unit_interval("gamma", gamma), unit_interval("lam", lam)
    factors = gamma, lam, at_least_0("rho_clip", rho_clip), at_least_0("c_clip", c_clip)
    planes = rewards, values, dones, truncated, valid, final_values, log_rhos
    return _estimate(_VTRACE, planes, last_values, factors, timeout_bootstrap, time_dim, out, stats, backend)


def retrace(
    rewards: Tensor,
    q_values: Tensor,
    values: Tensor,
    dones: Tensor,
    last_values: Tensor,
    log_rhos: Tensor,
    gamma: float = 0.99,
    lam: float = 1.0,
    c_clip: float = 1.0,
    truncated: Tensor | None = None,
    final_values: Tensor | None = None,
    timeout_bootstrap: str | None = None,
    valid: Tensor | None = None,
    time_dim: int = 1,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Retrace(lambda)'s targets for Q(s_t, a_t) (Munos et al. 2016, arXiv:1606.02647, eq. 4).

    With next_t as in :func:`gae`, and x_T = 0::

        c_t      = lam * min(c_clip, exp(log_rho_t))
        delta_t  = r_t + gamma * next_t - Q_t
        x_t      = delta_t + (0 where the episode ended with t, else gamma * c_{t+1} * x_{t+1})
        target_t = Q_t + x_t

    The first step's ratio is not used, nor one right after an end: the actions that are corrected are taken as given.

    Args:
        q_values: Q(s_t, a_t), shaped as rewards, floating.
        values: the expectation of Q(s_t, a) under the policy that is evaluated, shaped as rewards, floating.
        last_values: the same of s_T, [N] or [N, 1], floating. final_values likewise.
        log_rhos, lam, c_clip: as in :func:`vtrace`.
        out: the tensor to write to.
        others: as in :func:`gae`. A step that is no transition has the target Q_t.

    Returns:
        The targets, shaped as rewards; float64 where an input is, else float32.

    Raises:
        As :func:`gae`.
    """
    gamma, lam = unit_interval("gamma", gamma), unit_interval("lam", lam)
    factors = gamma, lam, 0.0, at_least_0("c_clip", c_clip)
    planes = rewards, values, dones, truncated, valid, final_values, log_rhos, q_values
    out = None if out is None else (out,)
    return _estimate(_RETRACE, planes, last_values, factors, timeout_bootstrap, time_dim, out, False, backend)[0]


def _estimate(
    kind: _Estimator,
    given: tuple[Tensor | None, ...],
    last_values: Tensor,
    factors: tuple[float, ...],
    timeout_bootstrap: str | None,
    time_dim: int,
    out: tuple[Tensor, ...] | None,
    stats: bool,
    backend: str | None,
) -> tuple[Tensor, ...]:
    """Runs ``kind`` on ``given`` (its planes) and its ``factors``, after all checks."""
    if time_dim not in (0, 1):
        raise ValueError(f"time_dim: expected 0 or 1, got {time_dim!r}")
    boolean("stats", stats)
    usual = _usual(kind, given, last_values, factors, timeout_bootstrap, time_dim, out, stats, backend)
    if usual is not None:
        return usual
    rewards, truncated, final_values = given[0], given[3], given[5]
    check_tensor("rewards", rewards, None, floating=True)
    shape = tuple(rewards.shape)
    order, other = ("[N, T]", "[T, N]") if time_dim else ("[T, N]", "[N, T]")
    if len(shape) not in (2, 3) or (len(shape) == 3 and shape[2] != 1):
        raise ValueError(f"rewards: expected shape {order}, or that with a last dimension of 1, got {list(shape)}")
    num_envs, num_steps = shape[1 - time_dim], shape[time_dim]

    def plane(name: str, x: Tensor, floating: bool) -> Tensor:
        check_tensor(name, x, rewards.device, floating)
        if tuple(x.shape[:2]) != shape[:2] or x.dim() > 3 or x.shape[2:].numel() != 1:
            raise ValueError(f"{name}: expected shape {list(shape)}, got {list(x.shape)}")
        x = x[:, :, 0] if x.dim() == 3 else x
        return x if time_dim else x.t()

    planes = {
        name: None if x is None and name in _OPTIONAL else plane(name, x, name not in _FLAGS)
        for name, x in zip(kind.planes, given, strict=True)
    }
    swapped = isinstance(last_values, Tensor) and last_values.shape[:1] == (num_steps,)
    hint = f"; rewards are read as {order}: pass time_dim={1 - time_dim} for {other}" if swapped else ""
    last_values = env_scalars("last_values", last_values, num_envs, rewards.device, hint)
    bootstrap = pick_bootstrap(truncated is not None, final_values=final_values, timeout_bootstrap=timeout_bootstrap)
    if final_values is not None and truncated is None:
        raise ValueError("final_values: expected truncated with it, got None")

    read = [last_values, *(x for x in planes.values() if x is not None)]
    floats = [x for name, x in (planes | {"last_values": last_values}).items() if name not in _FLAGS and x is not None]
    dtype = torch.float64 if any(x.dtype == torch.float64 for x in floats) else torch.float32
    if out is None:
        outputs = [torch.empty_like(planes["rewards"], dtype=dtype) for _ in kind.outputs]
    else:
        names = _check_out(out, kind.outputs, shape, dtype, read)
        outputs = [plane(name, x, True) for name, x in zip(names, out)]
    moments = torch.empty(3, dtype=torch.float64, device=rewards.device) if stats else None
    if num_steps == 0 or num_envs == 0:
        if stats:
            moments.zero_()
    else:
        ops, planes = select(rewards.device, backend), [*planes.values()]
        _launch(ops, kind, planes, last_values, factors, bootstrap, outputs, moments)
        written(*outputs)
    if out is not None:
        result = tuple(out)
    else:
        result = tuple((x if time_dim else x.t()).reshape(shape) for x in outputs)
    return (*result, moments) if stats else result


def _launch(
    ops: Backend,
    kind: _Estimator,
    planes: list[Tensor | None],
    last_values: Tensor,
    factors: tuple[float, ...],
    bootstrap: int,
    outputs: list[Tensor],
    moments: Tensor | None,
) -> None:
    """The operation on planes [N, T]."""
    scratch = None if moments is None else workspace(*planes[0].shape, moments.device, ops.name)
    rewards, values, dones, truncated, valid, final, *others = planes
    final = final if bootstrap == BOOTSTRAP["final_values"] else None
    if kind.operation != "gae" and len(others) == 1:
        others.append(None)
    first, second = kind.places
    getattr(ops, kind.operation)(
        rewards, values, dones, truncated, valid, last_values, final, None, *others, *factors, 0, False, bootstrap,
        None, None if first is None else outputs[first], outputs[second], moments, scratch,
    )  # fmt: skip


def _usual(
    kind: _Estimator,
    given: tuple[Tensor | None, ...],
    last_values: Tensor,
    factors: tuple[float, ...],
    timeout_bootstrap: str | None,
    time_dim: int,
    out: tuple[Tensor, ...] | None,
    stats: bool,
    backend: str | None,
) -> tuple[Tensor, ...] | None:
    """The fast path of :func:`_estimate` for the usual arguments: skips the checks that the operation makes itself.

    Otherwise None, with nothing written: then Python's checks, which take longer than a small rollout, name the fault.
    """
    rewards, values, _, truncated, _, final_values, *others = given
    outputs = () if out is None else out
    try:
        ops = select(rewards.device, backend).unchecked
        if ops is None or torch.compiler.is_compiling() or forward_ad._current_level >= 0:
            return None
        if rewards.numel() == 0 or (final_values is not None and truncated is None):
            return None
        grads = torch.is_grad_enabled()
        for x in (*given, *outputs):
            if x is not None and not _is_plain(x, 2, grads):
                return None
        if not _is_plain(last_values, 1, grads):
            return None
        bootstrap = pick_bootstrap(
            truncated is not None, final_values=final_values, timeout_bootstrap=timeout_bootstrap
        )
        dtypes = rewards.dtype, values.dtype, last_values.dtype, getattr(final_values, "dtype", None)
        wide = torch.float64 in dtypes or torch.float64 in [x.dtype for x in others]
        dtype = torch.float64 if wide else torch.float32
        if out is None:
            outputs = [torch.empty_like(rewards, dtype=dtype) for _ in kind.outputs]
        elif type(out) not in (tuple, list) or len(out) != len(kind.outputs) or out[0].dtype != dtype:
            return None
        moments = torch.empty(3, dtype=torch.float64, device=rewards.device) if stats else None
        planes, turned = given, outputs
        if time_dim == 0:
            planes = [None if x is None else x.t() for x in given]
            turned = [x.t() for x in outputs]
        _launch(ops, kind, planes, last_values, factors, bootstrap, turned, moments)
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return None
    written(*outputs)
    return (*outputs, moments) if stats else tuple(outputs)


def _is_plain(x: Tensor, dims: int, grads: bool) -> bool:
    """Whether ``x`` is dense memory in either order, without a gradient or a lazy conjugation or negation."""
    return (
        type(x) is Tensor
        and x.dim() == dims
        and not (grads and x.requires_grad)
        and not x.is_neg()
        and (x.is_contiguous() or (dims == 2 and x.t().is_contiguous()))
    )


def pick_bootstrap(truncations: bool, *, timeout_bootstrap: str | None, **values: object | None) -> int:
    """The BOOTSTRAP code of the given arguments; ``values``: those that supply V(final observation), by name.

    ``truncations``: whether there can be truncations, which need a bootstrap.
    """
    if timeout_bootstrap not in (None, "stored_value", "next_value"):
        raise ValueError(f"timeout_bootstrap: expected None, 'stored_value' or 'next_value', got {timeout_bootstrap!r}")
    given = [name for name, x in values.items() if x is not None]
    given += ["timeout_bootstrap"] if timeout_bootstrap is not None else []
    if len(given) > 1:
        raise ValueError(f"{given[1]}: expected one bootstrap at a truncation, got {' and '.join(given)}")
    if truncations and not given:
        wanted = ", ".join([*values, "timeout_bootstrap"])
        raise ValueError(f"truncated: expected a bootstrap with it, one of {wanted}; got none")
    return BOOTSTRAP[timeout_bootstrap] if timeout_bootstrap else BOOTSTRAP["final_values"] if given else 0


def _check_out(
    out: object, outputs: tuple[str, ...], shape: tuple[int, ...], dtype: torch.dtype, inputs: list[Tensor]
) -> list[str]:
    """The names of the given outputs in messages, after all checks of them."""
    if not isinstance(out, (tuple, list)) or len(out) != len(outputs):
        raise TypeError(f"out: expected ({', '.join(outputs)}), got {type(out).__name__}")
    names = [f"out[{i}]" for i in range(len(out))] if len(out) > 1 else ["out"]
    traced = torch.compiler.is_compiling()  # then there is no memory yet
    for i, (name, x) in enumerate(zip(names, out)):
        check_tensor(name, x, inputs[0].device, floating=True)
        if tuple(x.shape) != shape:
            raise ValueError(f"{name}: expected shape {list(shape)}, got {list(x.shape)}")
        if x.dtype != dtype:
            raise TypeError(f"{name}: expected dtype {dtype}, got {x.dtype}")
        if not traced and x.is_neg():
            raise ValueError(f"{name}: expected memory of its own, got a negated view")
        if overlaps_itself(x):
            raise ValueError(f"{name}: expected memory of its own for every element, got strides {list(x.stride())}")
        others = [] if traced else [*inputs, *(out[:i])]
        if any(overlap(x, other) for other in others):
            raise ValueError(f"{name}: expected memory of its own, got some that another argument uses")
    return names
