"""Vectors of three and four numbers a row, one row a thread: tuples of [BLOCK], and rows in memory."""

from __future__ import annotations

import triton
import triton.language as tl

INF = tl.constexpr(float("inf"))
HALF_PI = tl.constexpr(1.5707963267948966)


@triton.jit
def load3(source, row, mask, STRIDE: tl.constexpr = 3):
    at = source + row * STRIDE
    return (
        tl.load(at, mask=mask, other=0.0),
        tl.load(at + 1, mask=mask, other=0.0),
        tl.load(at + 2, mask=mask, other=0.0),
    )


@triton.jit
def load4(source, row, mask, STRIDE: tl.constexpr = 4):
    """A row of four, in one access of 128 bits."""
    BLOCK: tl.constexpr = row.shape[0]
    at = source + row[:, None] * STRIDE + tl.arange(0, 4)[None, :]
    tile = tl.reshape(tl.load(at, mask=mask[:, None], other=0.0), [BLOCK, 2, 2])
    even, odd = tl.split(tile)
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return x0, x1, x2, x3


@triton.jit
def store3(target, row, mask, x):
    at = target + row * 3
    tl.store(at, x[0], mask=mask)
    tl.store(at + 1, x[1], mask=mask)
    tl.store(at + 2, x[2], mask=mask)


@triton.jit
def store4(target, row, mask, x):
    BLOCK: tl.constexpr = row.shape[0]
    tile = tl.reshape(quad(x[0], x[2], x[1], x[3]), [BLOCK, 4])
    tl.store(target + row[:, None] * 4 + tl.arange(0, 4)[None, :], tile, mask=mask[:, None])


@triton.jit
def select3(chosen, a, b):
    return tl.where(chosen, a[0], b[0]), tl.where(chosen, a[1], b[1]), tl.where(chosen, a[2], b[2])


@triton.jit
def select4(chosen, a, b):
    x, y, z = select3(chosen, a, b)
    return x, y, z, tl.where(chosen, a[3], b[3])


@triton.jit
def quad(a, b, c, d):
    return tl.join(tl.join(a, b), tl.join(c, d))


@triton.jit
def columns(x):
    """[BLOCK, 16] of a tuple of sixteen [BLOCK]."""
    BLOCK: tl.constexpr = x[0].shape[0]
    even = tl.join(quad(x[0], x[8], x[4], x[12]), quad(x[2], x[10], x[6], x[14]))
    odd = tl.join(quad(x[1], x[9], x[5], x[13]), quad(x[3], x[11], x[7], x[15]))
    return tl.reshape(tl.join(even, odd), [BLOCK, 16])


@triton.jit
def finite_or_0(x):
    return tl.where(tl.abs(x) < INF, x, 0.0)


@triton.jit
def cross(ax, ay, az, bx, by, bz):
    return ay * bz - az * by, az * bx - ax * bz, ax * by - ay * bx


@triton.jit
def norm3(x, y, z):
    return tl.sqrt(x * x + y * y + z * z)


@triton.jit
def angle(y, x):
    """|atan2(y, x)|, off by 3e-7 at most. (The interpreter has no arc tangent.)"""
    ax, ay = tl.abs(x), tl.abs(y)
    most, least = tl.where(ax > ay, ax, ay), tl.where(ax > ay, ay, ax)
    slope = tl.where(most == 0, 0.0, least / most)
    steep = slope > 0.41421356  # tan(pi / 8)
    t = tl.where(steep, (slope - 1.0) / (slope + 1.0), slope)
    z = t * t
    tail = ((8.05374449538e-2 * z - 1.38776856032e-1) * z + 1.99777106478e-1) * z - 3.33329491539e-1
    found = tail * z * t + t + tl.where(steep, HALF_PI / 2, 0.0)
    found = tl.where(ay > ax, HALF_PI - found, found)
    return tl.where(x < 0, 2 * HALF_PI - found, found)
