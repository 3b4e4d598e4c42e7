"""Generalized advantage estimation over a whole rollout in one launch, for callers with storage of their own."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from pydrone.ops.arguments import boolean, check_tensor, env_scalars, overlap, overlaps_itself, unit_interval
from pydrone.ops.dispatch import select, written
from pydrone.ops.schema import BOOTSTRAP
from pydrone.ops.streams import workspace

__all__ = ["gae"]


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
    if time_dim not in (0, 1):
        raise ValueError(f"time_dim: expected 0 or 1, got {time_dim!r}")
    gamma, lam = unit_interval("gamma", gamma), unit_interval("lam", lam)
    boolean("stats", stats)
    given = rewards, values, dones, truncated, valid, final_values
    usual = _usual(given, last_values, gamma, lam, timeout_bootstrap, time_dim, out, stats, backend)
    if usual is not None:
        return usual
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

    planes = {"rewards": plane("rewards", rewards, True), "values": plane("values", values, True)}
    planes["dones"] = plane("dones", dones, False)
    for name, x, floating in (("truncated", truncated, False), ("final_values", final_values, True)):
        planes[name] = None if x is None else plane(name, x, floating)
    planes["valid"] = None if valid is None else plane("valid", valid, False)
    swapped = isinstance(last_values, Tensor) and last_values.shape[:1] == (num_steps,)
    hint = f"; rewards are read as {order}: pass time_dim={1 - time_dim} for {other}" if swapped else ""
    last_values = env_scalars("last_values", last_values, num_envs, rewards.device, hint)
    bootstrap = pick_bootstrap(truncated is not None, final_values=final_values, timeout_bootstrap=timeout_bootstrap)

    if final_values is not None and truncated is None:
        raise ValueError("final_values: expected truncated with it, got None")

    floats = [x for x in (planes["rewards"], planes["values"], last_values, planes["final_values"]) if x is not None]
    dtype = torch.float64 if any(x.dtype == torch.float64 for x in floats) else torch.float32
    if out is None:
        advantages = torch.empty_like(planes["rewards"], dtype=dtype)
        returns = torch.empty_like(advantages)
    else:
        advantages, returns = _check_out(
            out, shape, dtype, [last_values, *(x for x in planes.values() if x is not None)]
        )
        advantages, returns = (plane(f"out[{i}]", x, True) for i, x in enumerate((advantages, returns)))
    moments = torch.empty(3, dtype=torch.float64, device=rewards.device) if stats else None
    ops = select(rewards.device, backend)
    scratch = workspace(num_envs, num_steps, rewards.device, ops.name) if stats else None
    if num_steps == 0 or num_envs == 0:
        if stats:
            moments.zero_()
    else:
        ops.gae(
            planes["rewards"],
            planes["values"],
            planes["dones"],
            planes["truncated"],
            planes["valid"],
            last_values,
            planes["final_values"] if bootstrap == 1 else None,
            None,
            gamma,
            lam,
            0,
            False,
            bootstrap,
            None,
            advantages,
            returns,
            moments,
            scratch,
        )
        written(advantages, returns)
    if out is not None:
        result = tuple(out)
    else:
        result = tuple((x if time_dim else x.t()).reshape(shape) for x in (advantages, returns))
    return (*result, moments) if stats else result


def _usual(
    given: tuple,
    last_values: Tensor,
    gamma: float,
    lam: float,
    timeout_bootstrap: str | None,
    time_dim: int,
    out: tuple[Tensor, Tensor] | None,
    stats: bool,
    backend: str | None,
) -> tuple[Tensor, ...] | None:
    """The fast path of :func:`gae` for the usual arguments: skips the checks that the operation makes itself.

    Otherwise None, with nothing written: then Python's checks, which take longer than a small rollout, name the fault.
    """
    rewards, values, _, truncated, _, final_values = given
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
        wide = torch.float64 in (rewards.dtype, values.dtype, last_values.dtype, getattr(final_values, "dtype", None))
        dtype = torch.float64 if wide else torch.float32
        if out is None:
            outputs = torch.empty_like(rewards, dtype=dtype), torch.empty_like(rewards, dtype=dtype)
        elif type(out) not in (tuple, list) or len(out) != 2 or out[0].dtype != dtype:
            return None
        moments = torch.empty(3, dtype=torch.float64, device=rewards.device) if stats else None
        sizes = rewards.shape if time_dim else rewards.shape[::-1]
        scratch = workspace(*sizes, rewards.device, ops.name) if stats else None
        planes = (*given, *outputs)
        if time_dim == 0:
            planes = [None if x is None else x.t() for x in planes]
        *planes, final, advantages, returns = planes
        ops.gae(
            *planes, last_values, final if bootstrap == BOOTSTRAP["final_values"] else None, None, gamma, lam, 0, False,
            bootstrap, None, advantages, returns, moments, scratch,
        )  # fmt: skip
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


def _check_out(out: object, shape: tuple[int, ...], dtype: torch.dtype, inputs: list[Tensor]) -> tuple[Tensor, Tensor]:
    if not isinstance(out, (tuple, list)) or len(out) != 2:
        raise TypeError(f"out: expected (advantages, returns), got {type(out).__name__}")
    traced = torch.compiler.is_compiling()  # then there is no memory yet
    for i, x in enumerate(out):
        check_tensor(f"out[{i}]", x, inputs[0].device, floating=True)
        if tuple(x.shape) != shape:
            raise ValueError(f"out[{i}]: expected shape {list(shape)}, got {list(x.shape)}")
        if x.dtype != dtype:
            raise TypeError(f"out[{i}]: expected dtype {dtype}, got {x.dtype}")
        if not traced and x.is_neg():
            raise ValueError(f"out[{i}]: expected memory of its own, got a negated view")
        if overlaps_itself(x):
            raise ValueError(f"out[{i}]: expected memory of its own for every element, got strides {list(x.stride())}")
        others = [] if traced else [*inputs, *(out[:i])]
        if any(overlap(x, other) for other in others):
            raise ValueError(f"out[{i}]: expected memory of its own, got some that another argument uses")
    return out[0], out[1]
