"""Gathers a minibatch in one launch: indices from a keyed permutation, fields from packed rows, normalised advantages.

A program takes a block of samples and computes their indices where they are used: no index tensor and no sort, and a
fresh permutation each epoch.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pydrone.ops import reference, schema
from pydrone.ops.schema import DTYPES

from .launch import CURSOR_DISCARDED, TRITON_TYPES, power_of_2
from .prepared import Launches

STD_EPSILON = tl.constexpr(schema.STD_EPSILON)
ROUNDS = tl.constexpr(reference.ROUNDS)

# Most samples per program; warps; most elements per tile; fields up to NARROW wide are all loaded before any is stored.
SAMPLES, WARPS, MAX_TILE, NARROW = 32, 2, 4096, 64

# LENGTH constants describe a field, and one flat tuple all fields (kernels take no nested ones): byte offset, stored
# type, width, tile width.
OFFSET, KIND, WIDTH, TILE, LENGTH = (tl.constexpr(i) for i in (0, 1, 2, 3, 4))


@triton.jit
def mix32(x):
    """A 32-bit bijection with low bias (C. Wellons, hash-prospector, "lowbias32")."""
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def feistel_round(x, key):
    h = (x ^ key) * 0x9E3779B1
    h = h ^ (h >> 15)
    return h * 0x85EBCA77


@triton.jit
def round_keys(key_low, key_high, rollout_low, rollout_high, epoch):
    """The round keys from (key, rollout, epoch): two 32-bit lanes absorb one word at a time."""
    words = (key_low, key_high, rollout_low, rollout_high, epoch)
    k0 = tl.full((), 0x243F6A88, tl.uint32)
    k1 = tl.full((), 0x85A308D3, tl.uint32)
    for i in tl.static_range(5):
        word = words[i].to(tl.uint32)
        k0 = mix32(k0 ^ word)
        k1 = mix32(k1 + word + k0)
    keys = ()
    for i in tl.static_range(ROUNDS):
        step = tl.full((), ((i + 1) * 0x9E3779B9) & 0xFFFFFFFF, tl.uint32)
        if i % 2 == 0:
            keys = keys + (mix32(k0 + step),)
        else:
            keys = keys + (mix32(k1 + step),)
    return keys


@triton.jit
def feistel(x, keys, a, b):
    """One pass of the Feistel network over Z_a x Z_b."""
    left = x // b
    right = x % b
    for i in tl.static_range(ROUNDS):
        if i % 2 == 0:
            left = left + tl.umulhi(feistel_round(right, keys[i]), a)
            left = tl.where(left >= a, left - a, left)
        else:
            right = right + tl.umulhi(feistel_round(left, keys[i]), b)
            right = tl.where(right >= b, right - b, right)
    return left * b + right


@triton.jit
def permute(x, keys, a, b, size):
    """The permutation of ``x`` (uint32, below ``size``); the few that leave [0, size) are passed through again."""
    x = feistel(x, keys, a, b)
    outside = tl.max((x >= size).to(tl.int32))
    while outside > 0:
        x = tl.where(x >= size, feistel(x, keys, a, b), x)
        outside = tl.max((x >= size).to(tl.int32))
    return x


@triton.jit
def oldest_rollout(cursor, capacity, NUM_STEPS: tl.constexpr):
    """The slot where the oldest rollout not yet discarded starts, and the two words of its number."""
    discarded = tl.load(cursor + CURSOR_DISCARDED).to(tl.uint64)
    rollout = discarded // NUM_STEPS
    start = (discarded % capacity.to(tl.uint64)).to(tl.int32)
    return start, rollout.to(tl.uint32), (rollout >> 32).to(tl.uint32)


@triton.jit
def locate(
    position, inside, keys, subset, a, b, num_samples, num_envs, capacity, start,
    NUM_STEPS: tl.constexpr, SHUFFLE: tl.constexpr,
):  # fmt: skip
    """The samples at positions (uint32) of the epoch's permutation: number, whether there is one, environment, step,
    and slot in the ring."""
    if SHUFFLE:
        position = permute(position, keys, a.to(tl.uint32), b.to(tl.uint32), num_samples.to(tl.uint32))
    index = position.to(tl.int64)
    if subset is not None:
        index = tl.load(subset + index, mask=inside, other=0)
    # An out-of-range number in ``subset`` reads nothing and yields zeros.
    found = inside & (index >= 0) & (index < num_envs.to(tl.int64) * NUM_STEPS)
    env = tl.where(found, index, 0).to(tl.uint32) // NUM_STEPS
    step = (tl.where(found, index, 0).to(tl.uint32) - env * NUM_STEPS).to(tl.int32)
    slot = start + step
    slot = tl.where(slot >= capacity, slot - capacity, slot)
    return index, found, env, step, slot


@triton.jit
def moments_of(stats, dtype: tl.constexpr):
    """The mean of the advantages, and the factor that normalises their deviations from it."""
    count = tl.load(stats)
    variance = tl.where(count > 1, tl.load(stats + 2) / tl.where(count > 1, count - 1, 1.0), 0.0)
    scale = (1.0 / (tl.sqrt(variance) + STD_EPSILON)).to(tl.float32).to(dtype)
    return tl.load(stats + 1).to(tl.float32).to(dtype), scale


@triton.jit
def load_field(rows, row, found, first, ROW_BYTES: tl.constexpr, FIELDS: tl.constexpr, AT: tl.constexpr):
    """Loads a tile of the field described at AT from rows ``row``."""
    column = first + tl.arange(0, FIELDS[AT + TILE])[None, :]
    mask = found[:, None] & (column < FIELDS[AT + WIDTH])
    kind: tl.constexpr = FIELDS[AT + KIND]
    if kind == tl.int1:
        item: tl.constexpr = 1
        elements = rows.to(tl.pointer_type(tl.int8), bitcast=True)
    else:
        item: tl.constexpr = kind.primitive_bitwidth // 8
        elements = rows.to(tl.pointer_type(kind), bitcast=True)
    source = elements + row[:, None] * (ROW_BYTES // item) + FIELDS[AT + OFFSET] // item + column
    x = tl.load(source, mask=mask, other=0)
    if kind == tl.int1:
        x = x != 0
    return x


@triton.jit
def store_field(output, sample, inside, first, x, FIELDS: tl.constexpr, AT: tl.constexpr):
    column = first + tl.arange(0, FIELDS[AT + TILE])[None, :]
    target = output + sample[:, None] * FIELDS[AT + WIDTH] + column
    mask = inside[:, None] & (column < FIELDS[AT + WIDTH])
    tl.store(target, x.to(output.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["key_low", "key_high", "rollout_low", "rollout_high", "epoch", "num_envs", "capacity",
                               "start", "first", "batch", "num_samples", "a", "b"])  # fmt: skip
def gather_kernel(
    rows, outputs, advantages, returns, stats, subset, cursor, advantages_out, returns_out, indices_out, strides,
    key_low, key_high, rollout_low, rollout_high, epoch, num_envs, capacity, start, first, batch, num_samples, a, b,
    NUM_STEPS: tl.constexpr, SHUFFLE: tl.constexpr, ROW_BYTES: tl.constexpr, FIELDS: tl.constexpr,
    VALUE: tl.constexpr, SAMPLES: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    if cursor is not None:
        start, rollout_low, rollout_high = oldest_rollout(cursor, capacity, NUM_STEPS)
    sample = tl.program_id(0).to(tl.int64) * SAMPLES + tl.arange(0, SAMPLES)
    inside = sample < batch
    position = tl.where(inside, first + sample, first).to(tl.uint32)
    keys = round_keys(key_low, key_high, rollout_low, rollout_high, epoch)
    index, found, env, step, slot = locate(
        position, inside, keys, subset, a, b, num_samples, num_envs, capacity, start, NUM_STEPS, SHUFFLE
    )
    row = slot.to(tl.int64) * num_envs + env.to(tl.int64)

    # All narrow fields are loaded before the first is stored: the compiler does not move loads above stores.
    held = ()
    for i in tl.static_range(len(FIELDS) // LENGTH):
        if FIELDS[i * LENGTH + WIDTH] <= min(FIELDS[i * LENGTH + TILE], NARROW):
            held = held + (load_field(rows, row, found, 0, ROW_BYTES, FIELDS, i * LENGTH),)
        else:
            held = held + (0,)
    for i in tl.static_range(len(FIELDS) // LENGTH):
        if FIELDS[i * LENGTH + WIDTH] <= min(FIELDS[i * LENGTH + TILE], NARROW):
            store_field(outputs[i], sample, inside, 0, held[i], FIELDS, i * LENGTH)
        else:
            for column in range(0, FIELDS[i * LENGTH + WIDTH], FIELDS[i * LENGTH + TILE]):
                x = load_field(rows, row, found, column, ROW_BYTES, FIELDS, i * LENGTH)
                store_field(outputs[i], sample, inside, column, x, FIELDS, i * LENGTH)
    if indices_out is not None:
        tl.store(indices_out + sample, index, mask=inside)
    if advantages is not None:
        place = env.to(tl.int64) * strides[0] + step.to(tl.int64) * strides[1]
        advantage = tl.load(advantages + place, mask=found, other=0.0)
        if returns_out is not None:
            if returns is None:
                values = rows.to(tl.pointer_type(tl.float32), bitcast=True) + row * (ROW_BYTES // 4) + VALUE // 4
                total = advantage + tl.load(values, mask=found, other=0.0).to(advantage.dtype)
            else:
                total = tl.load(returns + place, mask=found, other=0.0)
            tl.store(returns_out + sample, total.to(returns_out.dtype.element_ty), mask=inside)
        if advantages_out is not None:
            if stats is not None:
                mean, scale = moments_of(stats, advantage.dtype)
                advantage = (advantage - mean) * scale
            tl.store(advantages_out + sample, advantage.to(advantages_out.dtype.element_ty), mask=inside)


LAUNCHES = Launches(gather_kernel)


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
    checked=None,
) -> None:
    """One minibatch, see :mod:`pydrone.ops.schema`. ``checked``: as :class:`Launches`."""
    batch = next((x.shape[0] for x in (*outputs, advantages_out, returns_out, indices_out) if x is not None), 0)
    if batch == 0:
        return

    def arrange(tensors, numbers):
        rows, advantages, returns, stats, subset, cursor, advantages_out, returns_out, indices_out, *outputs = tensors
        *words, start, first = numbers
        capacity, num_envs, row_bytes = rows.shape
        widths = [output.numel() // batch for output in outputs]
        samples = power_of_2(MAX_TILE // max(*widths, 1, 1), 1, SAMPLES)
        fields = []
        for width, offset, dtype in zip(widths, offsets, dtypes, strict=True):
            fields += [offset, TRITON_TYPES[DTYPES[dtype]], width, power_of_2(width, 1, MAX_TILE // samples)]
        a, b = reference.feistel_sides(num_samples)
        arguments = (
            rows, tuple(outputs), advantages, returns, stats, subset, cursor, advantages_out, returns_out, indices_out,
            (0, 0) if advantages is None else advantages.stride(),
            *words, num_envs, capacity, start, first, batch, num_samples, a, b,
        )  # fmt: skip
        constants = {
            "NUM_STEPS": num_steps, "SHUFFLE": shuffle, "ROW_BYTES": row_bytes, "FIELDS": tuple(fields),
            "VALUE": value_offset, "SAMPLES": samples, "NARROW": NARROW, "num_warps": WARPS, "enable_fp_fusion": True,
        }  # fmt: skip
        return (triton.cdiv(batch, samples),), arguments, constants

    tensors = (rows, advantages, returns, stats, subset, cursor, advantages_out, returns_out, indices_out, *outputs)
    numbers = (*_words(key), *_words(rollout), _words(epoch)[0], start, first)
    described = (*offsets, *dtypes, value_offset, num_steps, num_samples, shuffle)
    LAUNCHES(described, tensors, numbers, arrange, checked)


def _words(number: int) -> tuple[int, int]:
    """The low and high 32 bits as signed numbers, so that the kernel argument is always an int32."""
    low, high = number & 0xFFFFFFFF, (number >> 32) & 0xFFFFFFFF
    return low - ((low >> 31) << 32), high - ((high >> 31) << 32)
