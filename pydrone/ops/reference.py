"""The operations in plain PyTorch: short, slow, and the ground truth that the kernels are tested against.

Signatures and argument shapes: :mod:`pydrone.ops.schema`. Runs on any device, in the dtype of the outputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from pydrone.ops.schema import (
    ACTIVATIONS,
    CURSOR_APPENDED,
    CURSOR_DISCARDED,
    CURSOR_FLAG,
    CURSOR_NUM_STEPS,
    DTYPES,
    INVALID,
    STD_EPSILON,
    TERMINATED,
    TRUNCATED,
)

MASK32 = 0xFFFFFFFF
HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)
ROUNDS = 8


def encode(dones: Tensor, truncated: Tensor | None, valid: Tensor | None) -> Tensor:
    """End flags of any dtype to uint8 codes: 0 running, 1 terminated, 2 truncated, 3 invalid."""
    codes = (dones != 0).to(torch.uint8)
    if truncated is not None:
        codes = torch.where(truncated != 0, TRUNCATED, codes)
    if valid is not None:
        codes = torch.where(valid != 0, codes, INVALID)
    return codes


def gae(
    rewards,
    values,
    dones,
    truncated,
    valid,
    last_values,
    final_values,
    final_rows,
    gamma,
    lam,
    start,
    coded,
    bootstrap,
    cursor,
    advantages,
    returns,
    stats,
    workspace,
) -> None:
    """Generalized advantage estimation (Schulman et al. 2016, arXiv:1506.02438, eq. 16), cut at episode ends."""
    dtype, codes = advantages.dtype, dones if coded else encode(dones, truncated, valid)
    slots = _slots(advantages, rewards, start, cursor)
    carry = 0.0
    bootstrapped = rewards, values, codes, last_values, final_values, final_rows, bootstrap
    for t, code, reward, value, next_value in _backwards(slots, dtype, *bootstrapped):
        delta = reward + gamma * next_value - value
        carry = torch.where(code == 0, delta + gamma * lam * carry, delta)
        advantages[:, t] = carry = torch.where(code == INVALID, 0, carry)
        if returns is not None:
            returns[:, t] = carry + value
    if stats is not None:
        _moments(advantages, codes[:, slots], stats)


def off_policy(
    rewards,
    values,
    dones,
    truncated,
    valid,
    last_values,
    final_values,
    final_rows,
    log_rhos,
    q_values,
    gamma,
    lam,
    rho_clip,
    c_clip,
    start,
    coded,
    bootstrap,
    cursor,
    advantages,
    targets,
    stats,
    workspace,
) -> None:
    """V-trace (arXiv:1802.01561, eq. 1 and remark 2); with q_values, Retrace(lambda) (arXiv:1606.02647, eq. 4)."""
    dtype, codes = targets.dtype, dones if coded else encode(dones, truncated, valid)
    slots = _slots(targets, rewards, start, cursor)
    most = torch.finfo(dtype).max  # clamp refuses a finite bound beyond it
    rho_clip, c_clip = (x if x <= most else math.inf for x in (rho_clip, c_clip))
    carry = link = 0.0
    bootstrapped = rewards, values, codes, last_values, final_values, final_rows, bootstrap
    for t, code, reward, value, next_value in _backwards(slots, dtype, *bootstrapped):
        ratio = log_rhos[:, slots[t]].to(dtype).exp()
        rho, trace = ratio.clamp(max=rho_clip), lam * ratio.clamp(max=c_clip)  # clamp keeps a NaN
        if q_values is not None:
            value, rho = q_values[:, slots[t]].to(dtype), 1
        else:
            link = trace
        delta = reward + gamma * next_value - value
        if advantages is not None:
            advantage = rho * torch.where(code == 0, delta + gamma * carry, delta)
            advantages[:, t] = torch.where(code == INVALID, 0, advantage)
        carry = torch.where(code == 0, rho * delta + gamma * link * carry, rho * delta)
        carry = torch.where(code == INVALID, 0, carry)
        link = torch.where(code == INVALID, 0, trace)
        targets[:, t] = value + carry
    if stats is not None:
        _moments(advantages, codes[:, slots], stats)


def _slots(output: Tensor, plane: Tensor, start: int, cursor: Tensor | None) -> list[int]:
    """The slots of a rollout's steps in a ring's planes."""
    capacity = plane.shape[1]
    if cursor is not None:
        start = int(cursor[CURSOR_DISCARDED]) % capacity
    return [(start + t) % capacity for t in range(output.shape[1])]


def _backwards(
    slots: list[int],
    dtype: torch.dtype,
    rewards: Tensor,
    values: Tensor,
    codes: Tensor,
    last_values: Tensor,
    final_values: Tensor | None,
    final_rows: Tensor | None,
    bootstrap: int,
) -> Iterator[tuple]:
    """The steps from the last to the first: t, code, reward, value, and V' of the temporal difference."""
    following = last_values.to(dtype)
    for t in reversed(range(len(slots))):
        slot = slots[t]
        code, value = codes[:, slot], values[:, slot].to(dtype)
        if bootstrap == 1:
            at_truncation = _final_value(final_values, final_rows, slot, dtype)
        elif bootstrap == 2:
            at_truncation = value
        else:
            at_truncation = following
        # Selects, never products: 0 * NaN is NaN, and values after an end must not leak back across it.
        next_value = torch.where(code == TRUNCATED, at_truncation, following)
        next_value = torch.where(code == TERMINATED, 0, next_value)
        yield t, code, rewards[:, slot].to(dtype), value, next_value
        following = value


def _moments(advantages: Tensor, codes: Tensor, stats: Tensor) -> None:
    """Count, mean and M2 of the advantages of valid steps."""
    sample = advantages[codes != INVALID].double()
    count = sample.numel()
    mean = sample.mean() if count else sample.new_zeros(())
    stats.copy_(torch.stack([mean.new_tensor(float(count)), mean, (sample - mean).square().sum()]))


def _final_value(final_values: Tensor, final_rows: Tensor | None, slot: int, dtype: torch.dtype) -> Tensor:
    if final_rows is None:
        return final_values[:, slot].to(dtype)
    row = final_rows[:, slot].long()
    found = (row >= 0) & (row < final_values.shape[0])
    pool = torch.cat([final_values.to(dtype), final_values.new_full((1,), math.nan, dtype=dtype)])
    return pool[torch.where(found, row, final_values.shape[0])]


def append(memory, sources, layout, dones, truncated, valid, slot, pool_slot, cursor, commit) -> None:
    """Stores one step: fields in packed rows, scalars in planes, flags as codes, final observations in the pool."""
    (num_fields, num_planes, _, looked_at), *fields = layout.tolist()
    *memory, not_finite = memory if looked_at else (*memory, None)
    rows, codes, planes = memory[0], memory[1] if len(memory) > 1 else None, memory[2 : 2 + num_planes]
    pool = memory[2 + num_planes :]
    final_sources = sources[num_fields + num_planes :]
    capacity, num_envs = rows.shape[:2]
    final_obs, count, final_rows = pool or (None, None, None)
    if cursor is not None:
        appended, discarded = int(cursor[CURSOR_APPENDED]), int(cursor[CURSOR_DISCARDED])
        if appended - discarded >= capacity:
            cursor[CURSOR_FLAG] = 1
            return
        slot = appended % capacity
        if pool or looked_at:
            num_rollouts = (final_obs if pool else not_finite).shape[0]
            pool_slot = appended // int(cursor[CURSOR_NUM_STEPS]) % num_rollouts
        cursor[CURSOR_APPENDED] += int(commit)
    for i, (source, (offset, dtype, width, _)) in enumerate(zip(sources, fields[:num_fields])):
        field = _field(rows[slot], offset, DTYPES[dtype], width)
        field.copy_(source.reshape(num_envs, width))
        if i < looked_at and not field.isfinite().all():
            not_finite[pool_slot] = 1
    for plane, source in zip(planes, sources[num_fields:]):
        plane[:, slot] = source.reshape(num_envs)
    if dones is None:
        return
    truncated = None if truncated is None else truncated.reshape(num_envs)
    valid = None if valid is None else valid.reshape(num_envs)
    codes[:, slot] = encode(dones.reshape(num_envs), truncated, valid)
    if not pool or truncated is None:
        return
    envs = (codes[:, slot] == TRUNCATED).nonzero().squeeze(1)
    if not final_sources:
        final_rows[envs, slot] = -1
        count[pool_slot, 1] += len(envs)
        return
    places = int(count[pool_slot, 0]) + torch.arange(len(envs), device=envs.device)
    count[pool_slot, 0] += len(envs)
    fits = places < final_obs.shape[1]
    final_rows[envs, slot] = torch.where(fits, places, -1).int()
    envs, places = envs[fits], places[fits]
    for source, (offset, dtype, width, _) in zip(final_sources, fields[num_fields:], strict=True):
        field = _field(final_obs[pool_slot], offset, DTYPES[dtype], width)
        field[places] = source.reshape(num_envs, width)[envs].to(field.dtype)


def _field(rows: Tensor, offset: int, dtype: torch.dtype, width: int) -> Tensor:
    """A typed view, [..., width], of the bytes at ``offset`` of each row."""
    return rows[..., offset : offset + width * dtype.itemsize].view(dtype)


def gather(
    rows,
    offsets,
    dtypes,
    outputs,
    value_offset,
    advantages,
    returns,
    stats,
    subset,
    num_steps,
    start,
    num_samples,
    key,
    rollout,
    epoch,
    shuffle,
    first,
    cursor,
    advantages_out,
    returns_out,
    indices_out,
) -> None:
    """Gathers one minibatch of the epoch's permutation, all fields at once."""
    capacity = rows.shape[0]
    if cursor is not None:
        discarded = int(cursor[CURSOR_DISCARDED])
        start, rollout = discarded % capacity, discarded // num_steps
    written = [*outputs, *(x for x in (advantages_out, returns_out, indices_out) if x is not None)]
    if not written or written[0].shape[0] == 0:
        return
    position = torch.arange(first, first + written[0].shape[0], device=rows.device)
    sample = permute(position, num_samples, key, rollout, epoch) if shuffle else position
    if subset is not None:
        sample = subset[sample]
    env, step = sample // num_steps, sample % num_steps
    row = rows[(start + step) % capacity, env]
    for output, offset, dtype in zip(outputs, offsets, dtypes, strict=True):
        output.copy_(_field(row, offset, DTYPES[dtype], output.shape[1:].numel()).reshape(output.shape))
    if indices_out is not None:
        indices_out.copy_(sample)
    if advantages is None:
        return
    advantage = advantages[env, step]
    if returns_out is not None:
        value = _field(row, value_offset, torch.float32, 1).squeeze(1)
        returns_out.copy_(advantage + value if returns is None else returns[env, step])
    if advantages_out is not None:
        if stats is not None:
            mean, scale = normalization(stats)
            advantage = (advantage - mean) * scale
        advantages_out.copy_(advantage)


def normalization(stats: Tensor) -> tuple[Tensor, Tensor]:
    """(mean, 1 / (unbiased std + epsilon)), float32 scalars, from stats [3]; with fewer than two samples, std is 0."""
    count, mean, m2 = stats.unbind()
    std = torch.where(count > 1, m2 / (count - 1).clamp_min(1), 0).sqrt()
    return mean.float(), (1 / (std + STD_EPSILON)).float()


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
    """PPO's loss (formulas: ppo/learner/loss.py, ppo/policy/distributions.py) and its gradients, term by term."""
    mean, std, actions, log_probs, advantages, new, old, target = (
        x.to(mean_grad.dtype) for x in (mean, std, actions, log_probs, advantages, new_values, values, returns)
    )
    if value_shift is not None:
        old, target = (old - value_shift) / value_std, (target - value_shift) / value_std
    share = len(mean) / num_samples
    z = (actions - mean) / std
    entropy = (std.log() + HALF_LOG_2PI + 0.5).sum()
    log_ratio = -0.5 * z.square().sum(1) - entropy + 0.5 * len(std) - log_probs
    most = math.log1p(clip) + 1  # held there, where it is of no effect, a ratio does not overflow: inf * 0 is NaN
    ratio = torch.where((advantages >= 0) & (log_ratio > most), most, log_ratio).exp()
    plain, clipped = ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages
    # As torch differentiates minimum and clamp: the unclipped term's gradient, unless the clipped term is smaller.
    by_log_prob = -torch.where(clipped < plain, 0, plain)[:, None] / num_samples
    mean_grad.copy_(by_log_prob * z / std)
    std_grad.copy_((by_log_prob * (z.square() - 1) / std).sum(0) - entropy_coef * share / std)
    error = new - target
    square, by_value = error.square(), 2 * error
    if value_clip >= 0:
        moved = new - old
        held = moved.clamp(-value_clip, value_clip)
        other = held + (old - target)
        larger = other.square() > square
        by_value = torch.where(larger, torch.where(moved == held, 2 * other, 0), by_value)
        square = torch.maximum(square, other.square())
    value_grad.copy_(by_value * (value_loss_coef / num_samples))
    kl = torch.full_like(entropy, math.nan)
    if mu is not None:
        apart, s = mu.to(mean.dtype) - mean, sigma.to(mean.dtype)
        # Factored to be exactly 0 if the policy has not changed.
        kl = ((apart.square() + (s - std) * (s + std)) / (2 * std.square()) + (std.log() - s.log())).sum() / num_samples
    surrogate = -torch.minimum(plain, clipped).sum() / num_samples
    metrics.copy_(torch.stack([surrogate, square.sum() / num_samples, entropy * share, kl]))


def activate(x, bias, activation, out) -> None:
    """A layer's bias and activation, by torch's own functions."""
    x.add_(bias)
    if activation >= 0:
        (x if out is None else out).copy_(getattr(functional, ACTIVATIONS[activation])(x))


def activate_backward(grad, kept, activation, out, bias_grad, workspace) -> None:
    """The gradients of a layer's bias and activation. Derivatives from the result, SiLU's from its argument."""
    if activation >= 0:
        gate = kept.sigmoid()
        slopes = {
            "tanh": 1 - kept.square(),
            "elu": torch.where(kept > 0, 1, kept + 1),
            "relu": (kept > 0).to(kept.dtype),
            "silu": gate + kept * gate * (1 - gate),
        }
        grad = out.copy_(grad * slopes[ACTIVATIONS[activation]])
    bias_grad.copy_(grad.sum(0, dtype=torch.float64))


def permute(position: Tensor, num_samples: int, key: int, rollout: int, epoch: int) -> Tensor:
    """The keyed permutation of [0, num_samples), applied to ``position`` (int64, in [0, num_samples)).

    An alternating Feistel network over Z_a x Z_b (:func:`feistel_sides`); the few values >= num_samples are mapped
    back by cycle walking (Black and Rogaway, Ciphers with arbitrary finite domains, CT-RSA 2002). Integer arithmetic
    only: bit-identical in every backend.
    """
    a, b = feistel_sides(num_samples)
    keys = round_keys(key, rollout, epoch)

    def once(x: Tensor) -> Tensor:
        left, right = x // b, x % b
        for i, k in enumerate(keys):
            if i % 2 == 0:
                left = (left + ((_round(right, k) * a) >> 32)) % a
            else:
                right = (right + ((_round(left, k) * b) >> 32)) % b
        return left * b + right

    x = once(position)
    while bool((outside := x >= num_samples).any()):
        x = torch.where(outside, once(x), x)
    return x


def _round(x: Tensor, k: int) -> Tensor:
    h = ((x ^ k) * 0x9E3779B1) & MASK32
    h = h ^ (h >> 15)
    # int64 products wrap around; their low 32 bits stay correct.
    return (h * 0x85EBCA77) & MASK32


def feistel_sides(num_samples: int) -> tuple[int, int]:
    """(a, b): a = ceil(sqrt(num_samples)), b = ceil(num_samples / a)."""
    a = math.isqrt(max(num_samples - 1, 0)) + 1
    return a, -(-max(num_samples, 1) // a)


def mix32(x: int) -> int:
    """A 32-bit bijection with low bias (C. Wellons, hash-prospector, "lowbias32")."""
    x &= MASK32
    x ^= x >> 16
    x = (x * 0x7FEB352D) & MASK32
    x ^= x >> 15
    x = (x * 0x846CA68B) & MASK32
    return x ^ (x >> 16)


def round_keys(key: int, rollout: int, epoch: int) -> list[int]:
    """The ROUNDS 32-bit round keys from (key, rollout, epoch): two 32-bit lanes absorb one word at a time."""
    k0, k1 = 0x243F6A88, 0x85A308D3
    for word in (key, key >> 32, rollout, rollout >> 32, epoch):
        word &= MASK32
        k0 = mix32(k0 ^ word)
        k1 = mix32(k1 + word + k0)
    return [mix32((k1 if i % 2 else k0) + (i + 1) * 0x9E3779B9) for i in range(ROUNDS)]
