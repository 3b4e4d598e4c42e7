"""PPO's loss of a minibatch, forward and backward, in one launch, where autograd needs about sixty.

A program takes a block of samples, one or a few per thread, with all of a sample's actions in one thread's registers,
so that sums over actions need no shuffle. Each program stores its sums in the workspace, and the last one to finish
adds them in a fixed order, so that runs are bit-equal.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import clamp, on_device_of, power_of_2, take_ticket

# Elements of a program's tile [samples, actions], eight of each argument per thread; most samples per program; warps.
TILE, SAMPLES, WARPS = 2048, 512, 8

HALF_LOG_2PI = tl.constexpr(0.9189385332046727)


@triton.jit
def load_rows(source, strides, row, action, mask, other, dtype: tl.constexpr, NUM_ACTIONS: tl.constexpr):
    """[SAMPLES, ACTIONS] of a tensor [B, A]. Strides None: contiguous, with strides that the compiler knows."""
    if strides is None:
        x = tl.load(source + row[:, None] * NUM_ACTIONS + action[None, :], mask=mask, other=other)
    else:
        x = tl.load(source + row[:, None] * strides[0] + action[None, :] * strides[1], mask=mask, other=other)
    return x.to(dtype)


@triton.jit
def load_scalars(source, stride, row, exists, dtype: tl.constexpr):
    return tl.load(source + row * stride, mask=exists, other=0.0).to(dtype)


@triton.jit
def surrogate(log_prob, old_log_prob, advantage, exists, total, clip, ESTIMATES: tl.constexpr):
    """Of each sample the clipped surrogate, to be maximised, and with ESTIMATES the divergence as its ratio estimates
    it, and whether the ratio is outside of the clip; then the gradient of minus the surrogates' sum / ``total`` with
    respect to the log-probability. All are 0 where a sample does not exist."""
    log_ratio = log_prob - old_log_prob
    # Far above the clip, a ratio matters only to negative advantages; for others it is held, as inf * 0 is NaN.
    most = tl.log(1 + clip) + 1
    beyond = (advantage >= 0) & (log_ratio > most)
    if ESTIMATES:  # of the ratio that is not held, with the same exponential
        ratio = tl.exp(log_ratio)
        moved = ratio - 1
        estimate = moved - log_ratio
        outside = (moved > clip) | (moved < -clip)
        ratio = tl.where(beyond, tl.exp(most), ratio)
    else:
        ratio = tl.exp(tl.where(beyond, most, log_ratio))
    kept = clamp(ratio, 1 - clip, 1 + clip)
    plain = ratio * advantage
    clipped = kept * advantage
    # As torch differentiates minimum and clamp: the unclipped term's gradient, unless the clipped term is smaller.
    grad = tl.where(plain <= clipped, plain, tl.where(plain != plain, plain, 0.0))
    gained = tl.where(plain <= clipped, plain, tl.where(clipped < plain, clipped, plain + clipped))
    gained = tl.where(exists, gained, 0.0)
    if ESTIMATES:
        figures = (gained, tl.where(exists, estimate, 0.0), exists & outside)
    else:
        figures = (gained,)
    return figures, tl.where(exists, -grad / total, 0.0)


@triton.jit
def squared_error(new, old, target, clip, CLIPPED: tl.constexpr, GREATER: tl.constexpr):
    """A sample's value loss and its derivative with respect to ``new``. GREATER: of the clipped and the plain error,
    not the clipped one alone."""
    error = new - target
    square = error * error
    grad = 2.0 * error
    if CLIPPED:
        moved = new - old
        held = clamp(moved, -clip, clip)
        other = held + (old - target)
        squared = other * other
        by_other = tl.where(moved == held, 2.0 * other, 0.0)
        if GREATER:
            grad = tl.where(squared > square, by_other, grad)
            square = tl.where(squared <= square, square, squared)  # propagates NaN
        else:
            grad = by_other
            square = squared
    return square, grad


@triton.jit
def policy_loss(
    mean, actions, s, old_log_prob, advantage, exists, total, clip, NUM_ACTIONS: tl.constexpr, ESTIMATES: tl.constexpr
):
    """The figures of :func:`surrogate`; its gradients with respect to the means [SAMPLES, ACTIONS] and the standard
    deviations ``s`` [ACTIONS]. Where masked, mean and actions are 0 and ``s`` is 1."""
    action = tl.arange(0, s.shape[0])
    inverse = 1.0 / s
    z = (actions - mean) * inverse[None, :]
    lacking = tl.sum(tl.where(action < NUM_ACTIONS, tl.log(s) + HALF_LOG_2PI, 0.0), 0)
    log_prob = -0.5 * tl.sum(z * z, 1) - lacking
    figures, grad = surrogate(log_prob, old_log_prob, advantage, exists, total, clip, ESTIMATES)
    mask = exists[:, None] & (action < NUM_ACTIONS)[None, :]
    by_std = tl.sum(tl.where(mask, grad[:, None] * (z * z - 1.0) * inverse[None, :], 0.0), 0)
    return figures, grad[:, None] * z * inverse[None, :], by_std


@triton.jit
def divergence_from(old_mean, old_std, mean, s, mask):
    """Each sample's KL(old || new); ``old_std`` is 1 where masked."""
    apart = old_mean - mean
    # Factored to be exactly 0 if the policy has not changed, however the compiler fuses products and sums.
    widths = (old_std - s[None, :]) * (old_std + s[None, :])
    inverse = 1.0 / s
    nats = (apart * apart + widths) * (0.5 * inverse * inverse)[None, :] + (tl.log(s)[None, :] - tl.log(old_std))
    return tl.sum(tl.where(mask, nats, 0.0), 1)


@triton.jit
def merge_programs(
    metrics, std, std_stride, std_grad, workspace, own, entropy_coef, samples, total_samples,
    NUM_ACTIONS: tl.constexpr, ACTIONS: tl.constexpr, PARTIALS: tl.constexpr, WITH_KL: tl.constexpr,
    dtype: tl.constexpr,
):  # fmt: skip
    """Stores a program's sums, ``own``, in the workspace; the last program adds up all of them."""
    programs = tl.num_programs(0)
    WIDTH: tl.constexpr = NUM_ACTIONS + 3
    action = tl.arange(0, ACTIONS)
    partials = workspace + 1
    mine = partials + tl.program_id(0) * WIDTH
    tl.store(mine + action, own[0], mask=action < NUM_ACTIONS)
    for k in tl.static_range(3):
        tl.store(mine + NUM_ACTIONS + k, own[1 + k])
    ticket = workspace.to(tl.pointer_type(tl.int32), bitcast=True)
    if take_ticket(ticket) == programs - 1:
        # Which program is last changes from run to run; the order of the sums does not.
        by_action = tl.zeros([PARTIALS, ACTIONS], tl.float64)
        surrogates = tl.zeros([PARTIALS], tl.float64)
        errors = tl.zeros([PARTIALS], tl.float64)
        divergences = tl.zeros([PARTIALS], tl.float64)
        first = 0
        while first < programs:  # not a range: with numpy 2.5, Triton 3.6's interpreter rejects a tensor as its bound
            i = first + tl.arange(0, PARTIALS)
            rows = partials + i * WIDTH
            mask = (i < programs)[:, None] & (action < NUM_ACTIONS)[None, :]
            by_action += tl.load(rows[:, None] + action[None, :], mask=mask, other=0.0, cache_modifier=".cg")
            sums = rows + NUM_ACTIONS
            surrogates += tl.load(sums, mask=i < programs, other=0.0, cache_modifier=".cg")
            errors += tl.load(sums + 1, mask=i < programs, other=0.0, cache_modifier=".cg")
            divergences += tl.load(sums + 2, mask=i < programs, other=0.0, cache_modifier=".cg")
            first += PARTIALS
        total = total_samples.to(tl.float64)
        share = samples.to(tl.float64) / total
        s = tl.load(std + action * std_stride, mask=action < NUM_ACTIONS, other=1.0).to(tl.float64)
        logs = tl.where(action < NUM_ACTIONS, tl.log(s) + (HALF_LOG_2PI + 0.5), 0.0)
        grad = tl.sum(by_action, 0) - entropy_coef * share / s
        tl.store(std_grad + action, grad.to(dtype), mask=action < NUM_ACTIONS)
        metric = metrics.dtype.element_ty
        tl.store(metrics, (-tl.sum(surrogates) / total).to(metric))
        tl.store(metrics + 1, (tl.sum(errors) / total).to(metric))
        tl.store(metrics + 2, (tl.sum(logs) * share).to(metric))
        divergence = tl.sum(divergences) / total
        tl.store(metrics + 3, tl.where(WITH_KL, divergence, float("nan")).to(metric))
        tl.store(ticket, 0)


@triton.jit(do_not_specialize=["num_samples", "total_samples"])
def ppo_loss_kernel(
    tensors, strides, scalars, scalar_strides, std, std_stride, value_shift, value_std, mean_grad, value_grad,
    std_grad, metrics, workspace, clip: tl.float64, value_clip: tl.float64, value_loss_coef: tl.float64,
    entropy_coef: tl.float64, num_samples, total_samples,
    NUM_ACTIONS: tl.constexpr, ACTIONS: tl.constexpr, SAMPLES: tl.constexpr, PARTIALS: tl.constexpr,
    CLIPPED: tl.constexpr,
):  # fmt: skip
    """``tensors``: mean, actions, mu, sigma, with ``strides``; ``scalars``: log_probs, advantages, new_values, values,
    returns, with ``scalar_strides``."""
    dtype: tl.constexpr = mean_grad.dtype.element_ty
    WITH_KL: tl.constexpr = tensors[2] is not None
    clip = tl.full((), clip, dtype)
    held = tl.full((), value_clip, dtype)
    row = (tl.program_id(0) * SAMPLES + tl.arange(0, SAMPLES)).to(tl.int64)
    action = tl.arange(0, ACTIONS)
    exists = row < num_samples
    mask = exists[:, None] & (action < NUM_ACTIONS)[None, :]
    mean = load_rows(tensors[0], strides[0], row, action, mask, 0.0, dtype, NUM_ACTIONS)
    actions = load_rows(tensors[1], strides[1], row, action, mask, 0.0, dtype, NUM_ACTIONS)
    if WITH_KL:
        old_mean = load_rows(tensors[2], strides[2], row, action, mask, 0.0, dtype, NUM_ACTIONS)
        # Masked elements are 1, like those of std below: their divergence is 0.
        old_std = load_rows(tensors[3], strides[3], row, action, mask, 1.0, dtype, NUM_ACTIONS)
    old_log_prob = load_scalars(scalars[0], scalar_strides[0], row, exists, dtype)
    advantage = load_scalars(scalars[1], scalar_strides[1], row, exists, dtype)
    new = load_scalars(scalars[2], scalar_strides[2], row, exists, dtype)
    old = load_scalars(scalars[3], scalar_strides[3], row, exists, dtype)
    target = load_scalars(scalars[4], scalar_strides[4], row, exists, dtype)
    s = tl.load(std + action * std_stride, mask=action < NUM_ACTIONS, other=1.0).to(dtype)
    if value_shift is not None:
        shift = tl.load(value_shift).to(dtype)
        spread = tl.load(value_std).to(dtype)
        old = (old - shift) / spread
        target = (target - shift) / spread

    figures, along, by_std = policy_loss(
        mean, actions, s, old_log_prob, advantage, exists, total_samples.to(dtype), clip, NUM_ACTIONS, False
    )
    tl.store(mean_grad + row[:, None] * NUM_ACTIONS + action[None, :], along, mask=mask)
    divergence = tl.zeros((), dtype)
    if WITH_KL:
        divergence = tl.sum(divergence_from(old_mean, old_std, mean, s, mask), 0)
    error, value_by = squared_error(new, old, target, held, CLIPPED, True)
    scale = tl.full((), value_loss_coef, dtype) / total_samples.to(dtype)
    tl.store(value_grad + row, value_by * scale, mask=exists)
    merge_programs(
        metrics, std, std_stride, std_grad, workspace,
        (by_std.to(tl.float64), tl.sum(figures[0], 0).to(tl.float64),
         tl.sum(tl.where(exists, error, 0.0), 0).to(tl.float64), divergence.to(tl.float64)),
        entropy_coef, num_samples, total_samples, NUM_ACTIONS, ACTIONS, PARTIALS, WITH_KL, dtype,
    )  # fmt: skip


def ppo_loss(
    mean,
    std,
    actions,
    log_probs,
    advantages,
    new_values,
    values,
    returns,
    mu,
    sigma,
    clip,
    value_clip,
    value_loss_coef,
    entropy_coef,
    value_shift,
    value_std,
    num_samples,
    mean_grad,
    value_grad,
    std_grad,
    metrics,
    workspace,
) -> None:
    """PPO's loss of a minibatch and its gradients, see :mod:`pydrone.ops.schema`."""
    batch, num_actions = mean_grad.shape
    if batch == 0:
        std_grad.zero_()
        metrics.zero_()
        return
    columns = power_of_2(num_actions, 1, num_actions * 2)
    samples = power_of_2(TILE // columns, 16, SAMPLES)
    programs = triton.cdiv(batch, samples)
    tensors = (mean, actions, mu, sigma)
    scalars = (log_probs, advantages, new_values, values, returns)
    with on_device_of(mean_grad):
        ppo_loss_kernel[(programs,)](
            tensors, tuple(_strides(x) for x in tensors), scalars, tuple(x.stride(0) for x in scalars),
            std, std.stride(0), value_shift, value_std, mean_grad, value_grad, std_grad, metrics, workspace,
            clip, value_clip, value_loss_coef, entropy_coef, batch, num_samples,
            NUM_ACTIONS=num_actions, ACTIONS=columns, SAMPLES=samples,
            PARTIALS=power_of_2(programs, 1, power_of_2(TILE // columns, 1, 256)),
            CLIPPED=value_clip >= 0, num_warps=WARPS, enable_fp_fusion=True,
        )  # fmt: skip


def _strides(tensor: Tensor | None) -> tuple[int, int] | None:
    return None if tensor is None or tensor.is_contiguous() else tensor.stride()
