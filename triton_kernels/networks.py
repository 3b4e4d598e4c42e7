"""Multilayer perceptrons over a tile of samples: what ``ppo_act`` and ``ppo_gradients`` share.

Widths are padded to powers of two, at least 16, as products of tiles need. Padded inputs, weights and biases are 0, and
so are padded outputs, since all activations are 0 at 0. A network's layers are tuples, which Triton unrolls.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pydrone.ops import schema

from .launch import clamp

# The interpreter multiplies the bits of bfloat16 numbers: there, rounded numbers stay float32.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
TANH, ELU, RELU = (tl.constexpr(schema.ACTIVATIONS.index(name)) for name in ("tanh", "elu", "relu"))


@triton.constexpr_function
def padded(width):
    """The width of a tile that holds ``width`` columns."""
    return max(16, triton.next_power_of_2(width))


@triton.jit
def operand(x, PRECISION: tl.constexpr):
    """``x``, float32, as an operand of products: rounded to nearest for "bfloat16" and "tf32", which the tensor cores
    would truncate."""
    if PRECISION == "bfloat16":
        x = x.to(tl.bfloat16)
        if INTERPRETED:
            x = x.to(tl.float32)
    elif PRECISION == "tf32":
        rounded = ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
        x = tl.where(x == x, rounded, x)  # the sum may carry a NaN's bits into its sign, and make it 0
    return x


@triton.jit
def multiply(a, b, PRECISION: tl.constexpr):
    """The product of two operands, summed in float32. "ieee" and "tf32x3" (three products of tensor cores) are
    float32's."""
    if PRECISION == "bfloat16":
        return tl.dot(a, b)
    else:
        return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def multiply_add(a, b, total, PRECISION: tl.constexpr):
    if PRECISION == "bfloat16":
        return tl.dot(a, b, total)
    else:
        return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def load_layer(weight, bias, IN: tl.constexpr, OUT: tl.constexpr, PRECISION: tl.constexpr):
    """A layer's weight, an operand [out, in], and its bias [out], padded."""
    i = tl.arange(0, padded(IN))[None, :]
    o = tl.arange(0, padded(OUT))
    w = tl.load(weight + o[:, None] * IN + i, mask=(o[:, None] < OUT) & (i < IN), other=0.0)
    return operand(w, PRECISION), tl.load(bias + o, mask=o < OUT, other=0.0)


@triton.jit
def load_network(parameters, WIDTHS: tl.constexpr, PRECISION: tl.constexpr):
    """The weights and biases of all layers; ``parameters``: weight and bias of each in turn, contiguous; WIDTHS: of the
    input and of each layer."""
    weights = ()
    biases = ()
    for i in tl.static_range(len(WIDTHS) - 1):
        w, b = load_layer(parameters[2 * i], parameters[2 * i + 1], WIDTHS[i], WIDTHS[i + 1], PRECISION)
        weights = weights + (w,)
        biases = biases + (b,)
    return weights, biases


@triton.jit
def load_input(groups, strides, slot, env, exists, shift, std, clip, GROUPS: tl.constexpr, WIDTH: tl.constexpr):
    """A network's input [samples, padded WIDTH]: groups of observations, concatenated and normalised; 0 where a sample
    does not exist.

    Group i is GROUPS[i] wide, in [B, width] or a ring's [C, N, width]; strides[3 * i:]: of slot, environment and
    column. slot, env: int64 [samples]; for a group [B, width] the sample and 0. shift, std: [WIDTH], or None.
    """
    column = tl.arange(0, padded(WIDTH))[None, :]
    x = tl.zeros([slot.shape[0], padded(WIDTH)], tl.float32)
    first: tl.constexpr = 0
    for i in tl.static_range(len(GROUPS)):
        row = groups[i] + slot * strides[3 * i] + env * strides[3 * i + 1]
        inside = (column >= first) & (column < first + GROUPS[i])
        read = tl.load(row[:, None] + (column - first) * strides[3 * i + 2], mask=exists[:, None] & inside, other=0.0)
        x = tl.where(inside, read.to(tl.float32), x)
        first += GROUPS[i]
    if shift is not None:
        middle = tl.load(shift + column, mask=column < WIDTH, other=0.0)
        spread = tl.load(std + column, mask=column < WIDTH, other=1.0)
        x = (x - middle) / spread
        x = tl.where(exists[:, None], clamp(x, -clip, clip), 0.0)
    return x


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """The activation. Where exponentials overflow, the results are the limits."""
    if ACTIVATION == TANH:
        return 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)
    elif ACTIVATION == ELU:
        return tl.where(x > 0, x, tl.exp(x) - 1.0)
    elif ACTIVATION == RELU:
        return tl.where(x < 0, 0.0, x)
    else:
        return x / (1.0 + tl.exp(-x))


@triton.jit
def derivative(x, y, ACTIVATION: tl.constexpr):
    """Of y = activate(x). Only SiLU needs x; for the others it is not kept."""
    if ACTIVATION == TANH:
        return 1.0 - y * y
    elif ACTIVATION == ELU:
        return tl.where(y > 0, 1.0, y + 1.0)
    elif ACTIVATION == RELU:
        return tl.where(y > 0, 1.0, 0.0)
    else:
        gate = 1.0 / (1.0 + tl.exp(-x))
        return gate + gate * (x - x * gate)


@triton.jit
def forward(x, weights, biases, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr):
    """A network's outputs [samples, padded out], and what its backward pass needs: for each layer the operand that it
    multiplies, and for each hidden one also its sums and its activations."""
    operands = (operand(x, PRECISION),)
    sums = ()
    activations = ()
    for i in tl.static_range(len(weights)):
        x = multiply(operands[i], tl.trans(weights[i]), PRECISION) + biases[i][None, :]
        if i + 1 < len(weights):
            sums = sums + (x,)
            x = activate(x, ACTIVATION)
            activations = activations + (x,)
            operands = operands + (operand(x, PRECISION),)
    return x, operands, sums, activations
