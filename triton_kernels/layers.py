"""A layer of a wide network, between torch's matrix products: bias and activation in one launch, and back in one.

Backward, a program adds up the bias gradient of its own rows, and the last one to finish adds these sums in a fixed
order, so that runs are bit-equal.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pydrone.ops.schema import LAYER_ROWS, LAYER_TICKETS, layer_programs

from .launch import on_device_of, power_of_2, take_ticket
from .networks import activate as activation
from .networks import derivative

# Columns of a tile, 32 lanes of 128 bits, and its warps.
COLUMNS, WARPS = 128, 8

TICKETS = tl.constexpr(LAYER_TICKETS)


@triton.jit(do_not_specialize=["num_rows"])
def activate_kernel(
    x, bias, out, num_rows, WIDTH: tl.constexpr, ACTIVATION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < num_rows)[:, None] & (column < WIDTH)[None, :]
    at = row[:, None] * WIDTH + column[None, :]
    y = tl.load(x + at, mask=inside) + tl.load(bias + column, mask=column < WIDTH)[None, :]
    if out is not None:
        tl.store(x + at, y, mask=inside)
    if ACTIVATION >= 0:
        y = activation(y, ACTIVATION)
    tl.store((x if out is None else out) + at, y, mask=inside)


@triton.jit(do_not_specialize=["num_rows"])
def activate_backward_kernel(
    grad, kept, out, bias_grad, workspace, num_rows,
    WIDTH: tl.constexpr, ACTIVATION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SUMS: tl.constexpr,
    PARTIALS: tl.constexpr,
):  # fmt: skip
    programs = tl.num_programs(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    exists = column < WIDTH
    total = tl.zeros([SUMS, COLUMNS], tl.float32)
    first = tl.program_id(0) * ROWS
    while first < num_rows:  # not a range: with numpy 2.5, Triton 3.6's interpreter rejects a tensor as its bound
        row = (first + tl.arange(0, ROWS)).to(tl.int64)
        inside = (row < num_rows)[:, None] & exists[None, :]
        at = row[:, None] * WIDTH + column[None, :]
        d = tl.load(grad + at, mask=inside, other=0.0)
        if ACTIVATION >= 0:
            before = tl.load(kept + at, mask=inside, other=0.0)
            d = tl.where(inside, d * derivative(before, before, ACTIVATION), 0.0)
            tl.store(out + at, d, mask=inside)
        total += tl.sum(tl.reshape(d, [ROWS // SUMS, SUMS, COLUMNS]), 0)
        first += programs * ROWS
    partials = workspace + TICKETS
    tl.store(partials + tl.program_id(0) * WIDTH + column, tl.sum(total, 0).to(tl.float64), mask=exists)
    ticket = (workspace + tl.program_id(1)).to(tl.pointer_type(tl.int32), bitcast=True)
    if take_ticket(ticket) == programs - 1:
        # Which program is last changes from run to run; the order of the sums does not.
        sums = tl.zeros([PARTIALS, COLUMNS], tl.float64)
        begin = 0
        while begin < programs:
            i = begin + tl.arange(0, PARTIALS)
            mask = (i < programs)[:, None] & exists[None, :]
            sums += tl.load(partials + i[:, None] * WIDTH + column[None, :], mask=mask, other=0.0, cache_modifier=".cg")
            begin += PARTIALS
        tl.store(bias_grad + column, tl.sum(sums, 0).to(tl.float32), mask=exists)
        tl.store(ticket, 0)


def activate(x, bias, activation, out) -> None:
    """A layer's bias and activation, see :mod:`pydrone.ops.schema`."""
    rows, width = x.shape
    if rows == 0:
        return
    columns = power_of_2(width, 16, COLUMNS)
    with on_device_of(x):
        activate_kernel[(triton.cdiv(rows, LAYER_ROWS), triton.cdiv(width, columns))](
            x, bias, out, rows, WIDTH=width, ACTIVATION=activation, ROWS=LAYER_ROWS, COLUMNS=columns, num_warps=WARPS,
        )  # fmt: skip


def activate_backward(grad, kept, activation, out, bias_grad, workspace) -> None:
    """The gradients of a layer's bias and activation, see :mod:`pydrone.ops.schema`."""
    rows, width = grad.shape
    if rows == 0:
        bias_grad.zero_()
        return
    columns = power_of_2(width, 16, COLUMNS)
    # In a tile as wide as this each warp has every WARPS-th row: a thread adds up its own in registers.
    sums = WARPS if columns == COLUMNS else LAYER_ROWS
    if triton.cdiv(width, columns) > LAYER_TICKETS:
        raise RuntimeError(f"grad: expected at most {LAYER_TICKETS * columns} columns, got {width}")
    with on_device_of(grad):
        activate_backward_kernel[(layer_programs(rows), triton.cdiv(width, columns))](
            grad, kept, out, bias_grad, workspace, rows, WIDTH=width, ACTIVATION=activation,
            ROWS=LAYER_ROWS, COLUMNS=columns, SUMS=sums, PARTIALS=16, num_warps=WARPS,
        )  # fmt: skip
