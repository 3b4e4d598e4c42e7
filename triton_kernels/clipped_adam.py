"""Clips gradients and takes one Adam step for all parameters, in two launches.

The first adds up the squares of each piece of a gradient, counts the step and adapts the learning rate; the second adds
the pieces' sums, each program in the same order, clips and steps. What one launch writes only the next one reads.

Pointers are arguments, not a table in memory: a CUDA graph keeps its launches' arguments, while a table would have to
be copied to the device whenever gradients lie elsewhere, which a capture forbids. A program finds its parameter by
selects over program numbers known when the kernel is compiled.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import triton
import triton.language as tl

from .launch import on_device_of, power_of_2

# Elements per program: one 128-bit access for each thread and array, up to four if there were more than PROGRAMS
# programs otherwise, each of which reads all sums.
LEAST, MOST, WARPS, PROGRAMS = 512, 2048, 4, 256
# Sums added at a time.
PARTIALS = 1024

NORM_EPSILON = tl.constexpr(1e-6)  # torch.nn.utils.clip_grad_norm_'s

# LAYOUT describes each parameter by LENGTH numbers: its first program, its size, its group.
FIRST, SIZE, GROUP, LENGTH = (tl.constexpr(i) for i in range(4))


@triton.jit
def described(program, LAYOUT: tl.constexpr, KIND: tl.constexpr):
    """A number of the parameter that this program works on."""
    x = tl.full((), LAYOUT[KIND], tl.int32)
    for i in tl.static_range(LENGTH, len(LAYOUT), LENGTH):
        x = tl.where(program >= LAYOUT[i], LAYOUT[i + KIND], x)
    return x


@triton.jit
def own(tensors, program, LAYOUT: tl.constexpr):
    """The pointer that belongs to the parameter that this program works on."""
    x = tensors[0]
    for i in tl.static_range(1, len(tensors)):
        x = tl.where(program >= LAYOUT[i * LENGTH], tensors[i], x)
    return x


@triton.jit
def adapted(rate, kl, desired_kl, zero_kl, factor, least, most):
    """The learning rate after a step of divergence ``kl``, as :meth:`Learner.adapt_learning_rate` has it. By selects,
    which keep a rate that is NaN."""
    lower = rate / factor
    lower = tl.where(lower < least, least, lower)
    higher = rate * factor
    higher = tl.where(higher > most, most, higher)
    slower = (kl > 2 * desired_kl) & (lower < rate)
    faster = (kl > zero_kl) & (2 * kl < desired_kl) & (higher > rate)
    return tl.where(slower, lower, tl.where(faster, higher, rate))


@triton.jit
def squares_kernel(
    grads, steps, learning_rate, kl, sums, desired_kl: tl.float64, zero_kl: tl.float64, factor: tl.float64,
    least: tl.float64, most: tl.float64, LAYOUT: tl.constexpr, BLOCK: tl.constexpr, NUM_GROUPS: tl.constexpr,
    GROUPS: tl.constexpr,
):  # fmt: skip
    """``sums`` [groups, programs] receives the sum of squares of a program's gradients, 0 in all groups but its own."""
    program = tl.program_id(0)
    at = (program - described(program, LAYOUT, FIRST)) * BLOCK
    size = described(program, LAYOUT, SIZE)
    grad = own(grads, program, LAYOUT)
    i = at + tl.arange(0, BLOCK)
    # Without a mask the accesses are wide.
    if at + BLOCK <= size:
        g = tl.load(grad + i)
    else:
        g = tl.load(grad + i, mask=i < size, other=0.0)
    g = g.to(tl.float64)  # in which the square of a float is exact
    group = tl.arange(0, GROUPS)
    total = tl.where(group == described(program, LAYOUT, GROUP), tl.sum(g * g), 0.0)
    tl.store(sums + group * tl.num_programs(0) + program, total, mask=group < NUM_GROUPS)
    if at == 0:
        step = own(steps, program, LAYOUT)
        tl.store(step, tl.load(step) + 1)
    if kl is not None:  # noqa: SIM102, known when the kernel is compiled
        if program == 0:
            rate = tl.load(learning_rate).to(tl.float64)
            rate = adapted(rate, tl.load(kl).to(tl.float64), desired_kl, zero_kl, factor, least, most)
            tl.store(learning_rate, rate.to(tl.float32))


@triton.jit
def adam_kernel(
    parameters, grads, exp_avgs, exp_avg_sqs, steps, learning_rate, sums, norms, max_norm: tl.float64,
    log_beta1: tl.float64, log_beta2: tl.float64, beta2, rest1, rest2, epsilon, LAYOUT: tl.constexpr,
    BLOCK: tl.constexpr, NUM_GROUPS: tl.constexpr, GROUPS: tl.constexpr, NUM_PROGRAMS: tl.constexpr,
    PARTIALS: tl.constexpr, CLIP: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    at = (program - described(program, LAYOUT, FIRST)) * BLOCK
    size = described(program, LAYOUT, SIZE)
    parameter = own(parameters, program, LAYOUT)
    grad = own(grads, program, LAYOUT)
    exp_avg = own(exp_avgs, program, LAYOUT)
    exp_avg_sq = own(exp_avg_sqs, program, LAYOUT)
    i = at + tl.arange(0, BLOCK)
    if at + BLOCK <= size:
        p = tl.load(parameter + i)
        g = tl.load(grad + i)
        m = tl.load(exp_avg + i)
        v = tl.load(exp_avg_sq + i)
    else:
        p = tl.load(parameter + i, mask=i < size, other=0.0)
        g = tl.load(grad + i, mask=i < size, other=0.0)
        m = tl.load(exp_avg + i, mask=i < size, other=0.0)
        v = tl.load(exp_avg_sq + i, mask=i < size, other=0.0)
    step = tl.load(own(steps, program, LAYOUT)).to(tl.float64)
    rate = tl.load(learning_rate).to(tl.float64)

    group = tl.arange(0, GROUPS)
    totals = tl.zeros([GROUPS], tl.float64)
    for first in tl.static_range(0, NUM_PROGRAMS, PARTIALS):
        k = first + tl.arange(0, PARTIALS)
        mask = (group < NUM_GROUPS)[:, None] & (k < NUM_PROGRAMS)[None, :]
        totals += tl.sum(tl.load(sums + group[:, None] * NUM_PROGRAMS + k[None, :], mask=mask, other=0.0), 1)
    lengths = tl.sqrt(totals)
    if program == 0:
        tl.store(norms + group, lengths.to(tl.float32), mask=group < NUM_GROUPS)
    if CLIP:
        length = tl.sum(tl.where(group == described(program, LAYOUT, GROUP), lengths, 0.0))
        shorter = max_norm / (length + NORM_EPSILON)
        # A norm that is NaN makes the whole group NaN, as in torch, so that it cannot go unnoticed.
        g = g * tl.where(shorter >= 1, 1.0, shorter).to(tl.float32)

    step_size = (rate / (1 - tl.exp(step * log_beta1))).to(tl.float32)
    correction = tl.sqrt(1 - tl.exp(step * log_beta2)).to(tl.float32)
    m = m + rest1 * (g - m)
    v = beta2 * v + rest2 * g * g
    spread = tl.div_rn(tl.sqrt_rn(v), correction) + epsilon
    p = p - tl.div_rn(step_size * m, spread)
    if at + BLOCK <= size:
        tl.store(exp_avg + i, m)
        tl.store(exp_avg_sq + i, v)
        tl.store(parameter + i, p)
    else:
        tl.store(exp_avg + i, m, mask=i < size)
        tl.store(exp_avg_sq + i, v, mask=i < size)
        tl.store(parameter + i, p, mask=i < size)


def clipped_adam(
    parameters,
    grads,
    exp_avgs,
    exp_avg_sqs,
    steps,
    groups,
    max_norm,
    learning_rate,
    beta1,
    beta2,
    epsilon,
    norms,
    kl=None,
    schedule=(),
) -> None:
    """Clips gradients and takes one Adam step, see :mod:`pydrone.ops.schema`."""
    layout, block, programs = _layout(tuple(x.numel() for x in parameters), tuple(groups))
    desired_kl, zero_kl, factor, least, most = schedule if kl is not None else (0.0, 0.0, 1.0, 0.0, 0.0)
    num_groups = norms.shape[0]
    grads, steps = tuple(grads), tuple(steps)
    sums = torch.empty(num_groups * programs, dtype=torch.float64, device=norms.device)
    shared = {"LAYOUT": layout, "BLOCK": block, "NUM_GROUPS": num_groups}
    shared |= {"GROUPS": power_of_2(num_groups, 1, 2 * num_groups), "num_warps": WARPS, "enable_fp_fusion": True}
    with on_device_of(norms):
        squares_kernel[(programs,)](
            grads, steps, learning_rate, kl, sums, desired_kl, zero_kl, factor, least, most, **shared
        )
        adam_kernel[(programs,)](
            tuple(parameters), grads, tuple(exp_avgs), tuple(exp_avg_sqs), steps, learning_rate, sums, norms, max_norm,
            _log(beta1), _log(beta2), beta2, 1 - beta1, 1 - beta2, epsilon, NUM_PROGRAMS=programs,
            PARTIALS=power_of_2(programs, 1, PARTIALS), CLIP=max_norm != math.inf, **shared,
        )  # fmt: skip


def _log(beta: float) -> float:
    return math.log(beta) if beta > 0 else -math.inf


@lru_cache
def _layout(sizes: tuple[int, ...], groups: tuple[int, ...]) -> tuple[tuple[int, ...], int, int]:
    """LAYOUT, elements per program, number of programs. A parameter without elements has a program too: it steps."""
    block = power_of_2(sum(sizes) // PROGRAMS, LEAST, MOST)
    layout, programs = [], 0
    for size, group in zip(sizes, groups, strict=True):
        layout += [programs, size, group]
        programs += max(1, triton.cdiv(size, block))
    return tuple(layout), block, programs
