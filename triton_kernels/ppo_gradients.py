"""PPO's gradients of a minibatch in two launches: both networks forward, the loss, and back; then the sums.

Programs of the first launch stride over tiles of samples, half of them for the actor, half for the critic. A tile's
activations never leave the multiprocessor, and a program's gradients stay in registers until its last tile. The second
launch adds the programs' gradients in a fixed order.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pydrone.ops import reference
from pydrone.ops.schema import MATMUL, NUM_METRICS

from .categorical import categorical_loss, check_categories, choices_of
from .gather import _words, locate, moments_of, oldest_rollout, round_keys
from .launch import on_device_of
from .networks import derivative, forward, load_input, load_network, multiply, multiply_add, operand, padded
from .ppo_loss import HALF_LOG_2PI, divergence_from, policy_loss, squared_error

# A program's sums for the metrics.
FIGURES = tl.constexpr(NUM_METRICS)
# Places of a minibatch's fields in their tuple; strides are three for each: of slot, environment and column.
ACTIONS, LOG_PROBS, VALUES, MU, SIGMA, RETURNS = (tl.constexpr(i) for i in range(6))

# The second launch: elements per program, rows of partial sums that it adds at a time, warps.
BLOCK, ROWS, ADD_WARPS = 128, 16, 4


@triton.jit
def load_matrix(fields, strides, AT: tl.constexpr, slot, env, column, mask, other):
    """[samples, columns] of a field."""
    row = fields[AT] + slot * strides[3 * AT] + env * strides[3 * AT + 1]
    x = tl.load(row[:, None] + column[None, :] * strides[3 * AT + 2], mask=mask, other=other)
    return x.to(tl.float32)


@triton.jit
def load_column(fields, strides, AT: tl.constexpr, slot, env, exists):
    """[samples] of a field."""
    source = fields[AT] + slot * strides[3 * AT] + env * strides[3 * AT + 1]
    return tl.load(source, mask=exists, other=0.0).to(tl.float32)


@triton.jit
def add_products(total, grad, x, PRECISION: tl.constexpr):
    """Adds a tile's gradient with respect to a weight to ``total``, [out, in] or [in, out]."""
    if total.shape[0] == grad.shape[1]:
        return multiply_add(tl.trans(grad), x, total, PRECISION)
    else:
        return multiply_add(tl.trans(x), grad, total, PRECISION)


@triton.jit
def backward(
    grad, weights, operands, sums, activations, weight_grads, bias_grads,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds a tile's gradients; ``grad``: with respect to the outputs. See :func:`networks.forward`."""
    # For products that depend on each other, the compiler divides among the warps what the last one has more of, rows
    # or columns. It must not be rows: a tile has few, and several warps would compute the same. See also learn.
    SQUARE: tl.constexpr = weights[0].shape[0] == weights[0].shape[1]
    LAST: tl.constexpr = len(weights) - 1
    by_weight = ()
    by_bias = ()
    outer = operand(grad, PRECISION)
    for i in tl.static_range(LAST, -1, -1):
        by_bias = (bias_grads[i] + tl.sum(grad, 0),) + by_bias
        factor = operand(grad, PRECISION)
        if i < LAST or not SQUARE:
            by_weight = (add_products(weight_grads[i], factor, operands[i], PRECISION),) + by_weight
        if i > 0:
            slope = derivative(sums[i - 1], activations[i - 1], ACTIVATION)
            grad = multiply(factor, weights[i], PRECISION) * slope
    if SQUARE:
        by_weight = by_weight + (add_products(weight_grads[LAST], outer, operands[LAST], PRECISION),)
    return by_weight, by_bias


@triton.jit
def learn(
    groups, group_strides, parameters, shift, spread, obs_clip, fields, strides, advantages, advantage_strides, std,
    value_moments, stats, subset, keys, numbers, clip, value_clip, value_loss_coef, entropy_coef, partials, figures,
    GROUPS: tl.constexpr, WIDTHS: tl.constexpr, ELEMENTS: tl.constexpr, AT: tl.constexpr, ACTOR: tl.constexpr,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, SAMPLES: tl.constexpr, NUM_STEPS: tl.constexpr,
    SHUFFLE: tl.constexpr, CLIPPED: tl.constexpr, GREATER: tl.constexpr, CATEGORIES: tl.constexpr,
    ESTIMATES: tl.constexpr,
):  # fmt: skip
    """One network's gradients of this program's tiles, to ``partials``, and its sums of the metrics, to ``figures``."""
    batch, first, start, num_envs, capacity, num_samples, a, b = numbers
    OUT: tl.constexpr = WIDTHS[len(WIDTHS) - 1]
    WITH_KL: tl.constexpr = fields[MU] is not None
    column = tl.arange(0, padded(OUT))
    weight_grads = ()
    bias_grads = ()
    for i in tl.static_range(len(WIDTHS) - 1):
        # Never taller than wide, see backward.
        if padded(WIDTHS[i + 1]) > padded(WIDTHS[i]):
            weight_grads = weight_grads + (tl.zeros([padded(WIDTHS[i]), padded(WIDTHS[i + 1])], tl.float32),)
        else:
            weight_grads = weight_grads + (tl.zeros([padded(WIDTHS[i + 1]), padded(WIDTHS[i])], tl.float32),)
        bias_grads = bias_grads + (tl.zeros([padded(WIDTHS[i + 1])], tl.float32),)
    total = batch.to(tl.float32)
    losses = tl.zeros([SAMPLES], tl.float64)
    if ACTOR:
        if std is not None:
            s = tl.load(std + column, mask=column < OUT, other=1.0)
            std_grad = tl.zeros([padded(OUT)], tl.float32)
        nats = tl.zeros([SAMPLES], tl.float64)  # a Gaussian's divergences, or the entropies of discrete actions
        if ESTIMATES:
            estimates = tl.zeros([SAMPLES], tl.float64)
            outside = tl.zeros([SAMPLES], tl.int32)
    elif value_moments[0] is not None:
        value_shift = tl.load(value_moments[0])
        value_spread = tl.load(value_moments[1])
    if NUM_STEPS > 0 and stats is not None:
        middle, scale = moments_of(stats, tl.float32)
    weights, biases = load_network(parameters, WIDTHS, PRECISION)

    tile = tl.program_id(0)
    while tile < tl.cdiv(batch, SAMPLES):  # no range: see ppo_loss.py
        slot = (tile * SAMPLES + tl.arange(0, SAMPLES)).to(tl.int64)
        exists = slot < batch
        env = tl.zeros_like(slot)
        if NUM_STEPS > 0:
            position = tl.where(exists, first + slot, first).to(tl.uint32)
            _, exists, env, step, slot = locate(
                position, exists, keys, subset, a, b, num_samples, num_envs, capacity, start, NUM_STEPS, SHUFFLE
            )
            slot, env = slot.to(tl.int64), env.to(tl.int64)
            source = advantages + env * advantage_strides[0] + step.to(tl.int64) * advantage_strides[1]
        else:
            source = advantages + slot * advantage_strides[0]
        x = load_input(groups, group_strides, slot, env, exists, shift, spread, obs_clip, GROUPS, WIDTHS[0])
        out, operands, sums, activations = forward(x, weights, biases, ACTIVATION, PRECISION)
        if ACTOR:
            mask = exists[:, None] & (column < OUT)[None, :]
            mean = tl.where(mask, out, 0.0)
            advantage = tl.load(source, mask=exists, other=0.0).to(tl.float32)
            if NUM_STEPS > 0 and stats is not None:
                advantage = (advantage - middle) * scale
            old = load_column(fields, strides, LOG_PROBS, slot, env, exists)
            if std is not None:
                actions = load_matrix(fields, strides, ACTIONS, slot, env, column, mask, 0.0)
                of_samples, grad, by_std = policy_loss(
                    mean, actions, s, old, advantage, exists, total, clip, OUT, ESTIMATES
                )
                std_grad += by_std
            else:
                action, _ = choices_of(column, CATEGORIES)
                actions = load_matrix(fields, strides, ACTIONS, slot, env, action, mask, 0.0)
                of_samples, entropies, grad = categorical_loss(
                    mean, actions, old, advantage, exists, total, clip, entropy_coef, CATEGORIES, ESTIMATES
                )
                nats += entropies.to(tl.float64)
            losses += of_samples[0].to(tl.float64)
            if ESTIMATES:  # which take registers
                estimates += of_samples[1].to(tl.float64)
                outside += of_samples[2].to(tl.int32)
            if WITH_KL:  # last, for the sake of registers
                old_mean = load_matrix(fields, strides, MU, slot, env, column, mask, 0.0)
                old_std = load_matrix(fields, strides, SIGMA, slot, env, column, mask, 1.0)
                nats += divergence_from(old_mean, old_std, mean, s, mask).to(tl.float64)
        else:
            old = load_column(fields, strides, VALUES, slot, env, exists)
            if NUM_STEPS > 0:
                target = tl.load(source, mask=exists, other=0.0) + old
            else:
                target = load_column(fields, strides, RETURNS, slot, env, exists)
            if value_moments[0] is not None:
                old = (old - value_shift) / value_spread
                target = (target - value_shift) / value_spread
            new = tl.sum(tl.where(column[None, :] == 0, out, 0.0), 1)
            error, by_value = squared_error(new, old, target, value_clip, CLIPPED, GREATER)
            losses += tl.where(exists, error, 0.0).to(tl.float64)
            by_value = tl.where(exists, by_value * (value_loss_coef / total), 0.0)
            grad = tl.where(column[None, :] == 0, by_value[:, None], 0.0)
        weight_grads, bias_grads = backward(
            grad, weights, operands, sums, activations, weight_grads, bias_grads, ACTIVATION, PRECISION
        )
        tile += tl.num_programs(0)

    # Addresses are computed here, not to take registers before. Parameters' gradients lie one after the other.
    program = tl.program_id(0).to(tl.int64)
    figures += program * FIGURES
    partials += program * ELEMENTS + AT
    for i in tl.static_range(len(WIDTHS) - 1):
        o = tl.arange(0, padded(WIDTHS[i + 1]))
        k = tl.arange(0, padded(WIDTHS[i]))
        if weight_grads[i].shape[0] == o.shape[0]:
            mask = (o < WIDTHS[i + 1])[:, None] & (k < WIDTHS[i])[None, :]
            tl.store(partials + o[:, None] * WIDTHS[i] + k[None, :], weight_grads[i], mask=mask)
        else:
            mask = (k < WIDTHS[i])[:, None] & (o < WIDTHS[i + 1])[None, :]
            tl.store(partials + o[None, :] * WIDTHS[i] + k[:, None], weight_grads[i], mask=mask)
        partials += WIDTHS[i] * WIDTHS[i + 1]
        tl.store(partials + o, bias_grads[i], mask=o < WIDTHS[i + 1])
        partials += WIDTHS[i + 1]
    if ACTOR:
        if std is not None:
            tl.store(partials + column, std_grad, mask=column < OUT)
        tl.store(figures, -tl.sum(losses, 0))
        summed = tl.sum(nats, 0)
        tl.store(figures + 2, summed)
        tl.store(figures + 3, tl.where(WITH_KL, summed, float("nan")))
        if ESTIMATES:
            tl.store(figures + 4, tl.sum(estimates, 0))
            tl.store(figures + 5, tl.sum(outside.to(tl.float64), 0))
    else:
        tl.store(figures + 1, tl.sum(losses, 0))


@triton.jit(do_not_specialize=["key_low", "key_high", "rollout_low", "rollout_high", "epoch", "num_envs", "capacity",
                               "start", "first", "batch", "num_samples", "a", "b"])  # fmt: skip
def ppo_gradients_kernel(
    groups, group_strides, actor, obs_shift, obs_std, critic_groups, critic_strides, critic, critic_shift, critic_std,
    obs_clip, fields, strides, advantages, advantage_strides, std, value_moments, stats, subset, cursor,
    key_low, key_high, rollout_low, rollout_high, epoch, num_envs, capacity, start, first, batch, num_samples, a, b,
    clip, value_clip, value_loss_coef, entropy_coef, partials, figures,
    GROUPS: tl.constexpr, WIDTHS: tl.constexpr, CRITIC_GROUPS: tl.constexpr, CRITIC_WIDTHS: tl.constexpr,
    ELEMENTS: tl.constexpr, CRITIC_AT: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    SAMPLES: tl.constexpr, NUM_STEPS: tl.constexpr, SHUFFLE: tl.constexpr, CLIPPED: tl.constexpr, GREATER: tl.constexpr,
    CATEGORIES: tl.constexpr, ESTIMATES: tl.constexpr,
):  # fmt: skip
    """``fields``: actions, log_probs, values, mu, sigma and returns. NUM_STEPS: 0 where the minibatch is not drawn.
    ELEMENTS: of a row of ``partials``; the critic's are at CRITIC_AT."""
    if cursor is not None:
        start, rollout_low, rollout_high = oldest_rollout(cursor, capacity, NUM_STEPS)
    keys = round_keys(key_low, key_high, rollout_low, rollout_high, epoch)
    numbers = (batch, first, start, num_envs, capacity, num_samples, a, b)
    # A branch for each network: they may differ in all widths.
    if tl.program_id(1) == 0:
        learn(
            groups, group_strides, actor, obs_shift, obs_std, obs_clip, fields, strides, advantages, advantage_strides,
            std, value_moments, stats, subset, keys, numbers, clip, value_clip, value_loss_coef, entropy_coef, partials,
            figures, GROUPS, WIDTHS, ELEMENTS, 0, True,
            ACTIVATION, PRECISION, SAMPLES, NUM_STEPS, SHUFFLE, CLIPPED, GREATER, CATEGORIES, ESTIMATES,
        )  # fmt: skip
    else:
        learn(
            critic_groups, critic_strides, critic, critic_shift, critic_std, obs_clip, fields, strides, advantages,
            advantage_strides, std, value_moments, stats, subset, keys, numbers, clip, value_clip, value_loss_coef,
            entropy_coef, partials, figures, CRITIC_GROUPS, CRITIC_WIDTHS, ELEMENTS, CRITIC_AT, False,
            ACTIVATION, PRECISION, SAMPLES, NUM_STEPS, SHUFFLE, CLIPPED, GREATER, CATEGORIES, ESTIMATES,
        )  # fmt: skip


@triton.jit(do_not_specialize=["programs", "batch"])
def add_partials_kernel(
    partials, figures, std, entropy_coef, grads, metrics, programs, batch,
    FIRST: tl.constexpr, STD: tl.constexpr, ELEMENTS: tl.constexpr, MEASURED: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Adds the programs' rows to the gradients, whose elements start at FIRST, and MEASURED of their figures to the
    metrics; then a Gaussian's entropy. STD: the standard deviation's place among the gradients."""
    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    first = 0
    while first < programs:
        row = (first + tl.arange(0, ROWS)).to(tl.int64)
        mask = (row < programs)[:, None] & (element < ELEMENTS)[None, :]
        total += tl.load(partials + row[:, None] * ELEMENTS + element[None, :], mask=mask, other=0.0)
        first += ROWS
    grad = tl.sum(total, 0)
    if std is not None:
        of_std = (element >= FIRST[STD]) & (element < FIRST[STD + 1])
        s = tl.load(std + (element - FIRST[STD]), mask=of_std, other=1.0)
        grad = tl.where(of_std, grad - entropy_coef / s, grad)
    for i in tl.static_range(len(grads)):
        inside = (element >= FIRST[i]) & (element < FIRST[i + 1])
        tl.store(grads[i] + (element - FIRST[i]), grad, mask=inside)
    if tl.program_id(0) == 0:
        column = tl.arange(0, 8)
        sums = tl.zeros([ROWS, 8], tl.float64)
        first = 0
        while first < programs:
            row = first + tl.arange(0, ROWS)
            mask = (row < programs)[:, None] & (column < MEASURED)[None, :]
            sums += tl.load(figures + row[:, None] * FIGURES + column[None, :], mask=mask, other=0.0)
            first += ROWS
        means = tl.sum(sums, 0) / batch
        if std is not None:
            NUM_ACTIONS: tl.constexpr = FIRST[STD + 1] - FIRST[STD]
            action = tl.arange(0, padded(NUM_ACTIONS))
            spread = tl.load(std + action, mask=action < NUM_ACTIONS, other=1.0).to(tl.float64)
            entropy = tl.sum(tl.where(action < NUM_ACTIONS, tl.log(spread) + (HALF_LOG_2PI + 0.5), 0.0), 0)
            means = tl.where(column == 2, entropy, means)
        tl.store(metrics + column, means.to(tl.float32), mask=column < MEASURED)


class Config(NamedTuple):
    """How a minibatch is cut up: samples of a tile, warps of a program, programs on a multiprocessor; and PRECISION."""

    samples: int
    warps: int
    programs: int
    precision: str


# Widest layer or input, most hidden layers, most outputs.
MAX_WIDTH, MAX_HIDDEN, MAX_OUTPUTS = 128, 3, 32
# A program has 8 warps, whose 65,536 registers hold the gradients of a network's weights, and beside them what a tile
# needs, most of it operands. So for each number of samples in a tile there is a limit of weights, padded.
WARPS = 8
TILES = {32: 24 * 1024, 16: 40 * 1024}
# float32's operands are split into two.
SPLIT_TILES = {16: 8 * 1024}
PRECISIONS = dict(zip(MATMUL, ("tf32x3", "tf32", "bfloat16"), strict=True))
BYTES = {"tf32x3": 8, "tf32": 4, "bfloat16": 2}


def shared_memory(widths: Sequence[int], samples: int, precision: str) -> int:
    """Bytes of shared memory that a program takes at most: weights as forward and backward products read them, except
    that the first layer has no backward one, and a tile's input and activations."""
    inputs, *hidden, outputs = (padded(x) for x in widths)
    weights = sum(x * y for x, y in itertools.pairwise((inputs, *hidden, outputs)))
    first = inputs * (hidden or [outputs])[0]
    tile = samples * (inputs + sum(hidden) + max(hidden, default=0) + outputs)
    return BYTES[precision] * (2 * weights - first + tile)


def config_of(actor: Sequence[Tensor], critic: Sequence[Tensor], matmul: int, shared: float) -> Config | str:
    """The configuration for a GPU whose programs may have ``shared`` bytes of shared memory, or why there is none."""
    networks = {"actor": _widths(actor), "critic": _widths(critic)}
    for name, widths in networks.items():
        if len(widths) - 2 > MAX_HIDDEN:
            return f"{name}: expected at most {MAX_HIDDEN} hidden layers, got {len(widths) - 2}"
        if max(widths[:-1]) > MAX_WIDTH:
            return f"{name}: expected at most {MAX_WIDTH} inputs and units in a layer, got {max(widths[:-1])}"
        if widths[-1] > MAX_OUTPUTS:
            return f"{name}: expected at most {MAX_OUTPUTS} outputs, got {widths[-1]}"
    precision = PRECISIONS[MATMUL[matmul]]
    if shared == math.inf:
        return Config(16, WARPS, 1, precision)
    weights = max(sum(padded(x) * padded(y) for x, y in itertools.pairwise(z)) for z in networks.values())
    for samples, most in (SPLIT_TILES if precision == "tf32x3" else TILES).items():
        needed = max(shared_memory(widths, samples, precision) for widths in networks.values())
        if weights <= most and needed <= shared:
            return Config(samples, WARPS, 1, precision)
    if weights > most:
        return (
            f"{MATMUL[matmul]}: expected networks of at most {most} weights, each width padded to a power of two, got "
            f"{weights}"
        )
    return f"{MATMUL[matmul]}: the networks need {needed} bytes of shared memory, this GPU has {shared:g}"


def why_not(actor: Sequence[Tensor], critic: Sequence[Tensor], matmul: int) -> str | None:
    """Why torch has to compute these networks' gradients, or None where :func:`ppo_gradients` can. actor, critic: as
    the operation takes them, on the GPU that is meant."""
    config = config_of(actor, critic, matmul, _shared_memory_of(actor[0].device))
    return config if isinstance(config, str) else None


def ppo_gradients(
    obs,
    critic_obs,
    actions,
    log_probs,
    advantages,
    returns,
    values,
    mu,
    sigma,
    actor,
    critic,
    std,
    activation,
    matmul,
    clip,
    value_clip,
    value_loss_coef,
    entropy_coef,
    obs_shift,
    obs_std,
    critic_shift,
    critic_std,
    obs_clip,
    value_shift,
    value_std,
    grads,
    metrics,
    drawn=(),
    stats=None,
    subset=None,
    cursor=None,
    categories=(),
    value_max=True,
) -> None:
    """The gradients of a minibatch, see :mod:`pydrone.ops.schema`. ``cursor``: as for ``gather``, for CUDA graphs."""
    config = config_of(actor, critic, matmul, _shared_memory_of(actions.device))
    if isinstance(config, str):
        raise RuntimeError(config)
    if drawn:
        num_steps, start, num_samples, key, rollout, epoch, shuffle, first, batch = drawn
        capacity, num_envs = actions.shape[:2]
        sides = reference.feistel_sides(num_samples)
    else:
        num_steps, start, num_samples, key, rollout, epoch, shuffle, first, batch = (0,) * 8 + (len(actions),)
        capacity, num_envs, sides = 0, 0, (0, 0)
    if batch == 0:
        raise RuntimeError(f"actions: expected at least one sample, got shape {list(actions.shape)}")
    widths, critic_widths = _widths(actor), _widths(critic)
    if std is None:
        check_categories(categories, actions.shape[-1], widths[-1])
    critic_groups = critic_obs or obs
    fields = (actions, log_probs, values, mu, sigma, returns)
    # As the kernel stores them: the actor's, the standard deviation's, the critic's.
    at = len(actor)
    ordered = tuple(grads) if std is None else (*grads[:at], grads[-1], *grads[at:-1])
    ends = [0]
    for grad in ordered:
        ends.append(ends[-1] + grad.numel())
    elements = -(-ends[-1] // 4) * 4  # rows start at multiples of 16 bytes
    programs = min(triton.cdiv(batch, config.samples), _programs(config, actions.device))
    partials = torch.empty(programs, elements, dtype=torch.float32, device=actions.device)
    figures = torch.empty(programs, NUM_METRICS, dtype=torch.float64, device=actions.device)
    with on_device_of(actions):
        ppo_gradients_kernel[(programs, 2)](
            tuple(obs), _strides(obs, drawn), tuple(actor), obs_shift, obs_std,
            tuple(critic_groups), _strides(critic_groups, drawn), tuple(critic), critic_shift, critic_std, obs_clip,
            fields, _strides(fields, drawn), advantages, (*advantages.stride(), 0)[:2], std, (value_shift, value_std),
            stats, subset, cursor, *_words(key), *_words(rollout), _words(epoch)[0], num_envs, capacity, start, first,
            batch, num_samples, *sides, clip, value_clip, value_loss_coef, entropy_coef, partials, figures,
            GROUPS=tuple(x.shape[-1] for x in obs), WIDTHS=widths,
            CRITIC_GROUPS=tuple(x.shape[-1] for x in critic_groups), CRITIC_WIDTHS=critic_widths,
            ELEMENTS=elements, CRITIC_AT=ends[at + (std is not None)], ACTIVATION=activation,
            PRECISION=config.precision, SAMPLES=config.samples, NUM_STEPS=num_steps, SHUFFLE=bool(shuffle),
            CLIPPED=value_clip >= 0, GREATER=value_max, CATEGORIES=tuple(categories), ESTIMATES=len(metrics) > 4,
            num_warps=config.warps, num_stages=1, enable_fp_fusion=True,
        )  # fmt: skip
        add_partials_kernel[(triton.cdiv(elements, BLOCK),)](
            partials, figures, std, entropy_coef, ordered, metrics, programs, batch, FIRST=tuple(ends), STD=at,
            ELEMENTS=elements, MEASURED=len(metrics), BLOCK=BLOCK, ROWS=ROWS, num_warps=ADD_WARPS,
            enable_fp_fusion=True,
        )  # fmt: skip


def _widths(parameters: Sequence[Tensor]) -> tuple[int, ...]:
    """Of a network's input and of each layer."""
    return (parameters[0].shape[1], *(weight.shape[0] for weight in parameters[::2]))


def _strides(tensors: Sequence[Tensor | None], drawn: Sequence[int]) -> tuple[int, ...]:
    """Of slot, environment and column for each; of sample, nothing and column where no minibatch is drawn."""
    strides = []
    for x in tensors:
        own = () if x is None else x.stride()
        strides += [*own, 0, 0, 0][:3] if drawn else [*own[:1], 0, *own[1:], 0, 0][:3]
    return tuple(strides)


def _programs(config: Config, device: torch.device) -> int:
    """Programs for each network; two, so that each sees several tiles, where the kernel is interpreted."""
    if device.type != "cuda":
        return 2
    return max(1, torch.cuda.get_device_properties(device).multi_processor_count * config.programs // 2)


def _shared_memory_of(device: torch.device) -> float:
    """The most bytes that a program may have; no limit where the kernel is interpreted."""
    if device.type != "cuda":
        return math.inf
    return triton.runtime.driver.active.utils.get_device_properties(device.index or 0)["max_shared_mem"]
