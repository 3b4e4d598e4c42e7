"""Mistakes in the Triton kernels."""

from __future__ import annotations

from .fault import Fault

TRITON_GAE = "triton_kernels/gae.py"
TRITON_GATHER = "triton_kernels/gather.py"
OF_TRITON = "tests/ops/test_triton.py::test_cases[gae] tests/ops/test_triton.py::test_properties"
OF_GATHER = "tests/ops/test_triton.py::test_cases[gather] tests/ops/test_triton.py::test_properties"
OF_APPEND = "tests/ops/test_triton.py::test_cases[append] tests/ops/test_triton.py::test_properties"

ADAM, ACT = "triton_kernels/clipped_adam.py", "triton_kernels/ppo_act.py"
OF_ADAM, OF_ACT = "tests/ops/test_triton.py::test_adam", "tests/ops/test_triton.py::test_act"

TRITON = [
    Fault(
        "a step that starts with the last learning rate, in Triton",
        ADAM,
        "tl.store(learning_rate, rate.to(tl.float32))",
        "tl.store(learning_rate, tl.load(learning_rate))",
        OF_ADAM,
    ),
    Fault(
        "a group clipped by the norm of all, in Triton",
        ADAM,
        "tl.where(group == described(program, LAYOUT, GROUP), tl.sum(g * g), 0.0)",
        "tl.where(group >= 0, tl.sum(g * g), 0.0)",
        OF_ADAM,
    ),
    Fault(
        "bias corrections of the step before, in Triton",
        ADAM,
        "tl.store(step, tl.load(step) + 1)",
        "tl.store(step, tl.load(step) + 0)",
        OF_ADAM,
    ),
    Fault(
        "a step that begins in the slot where the last one ended, in Triton",
        ACT,
        "first = appended + 1",
        "first = appended + 0",
        OF_ACT,
    ),
    Fault(
        "values stored as the network has them, not undone, in Triton",
        ACT,
        "values = values * tl.load(value_moments[1]) + tl.load(value_moments[0])",
        "values = values * tl.load(value_moments[1])",
        OF_ACT,
    ),
    Fault(
        "the second block of a weight read for the first, in Triton",
        ACT,
        "load_block(weight, first, k * COLUMNS, IN",
        "load_block(weight, first, 0, IN",
        OF_ACT,
    ),
    Fault(
        "a NaN that a clamp drops, in Triton",
        "triton_kernels/ppo_loss.py",
        "return tl.where(x > high, high, tl.where(x < low, low, x))",
        "return tl.minimum(tl.maximum(x, low), high)",
        "tests/ops/test_triton_compile.py::test_no_minimum_or_maximum_drops_a_nan",
    ),
    Fault(
        "an overflowing ratio of advantage 0, in Triton",
        "triton_kernels/ppo_loss.py",
        "(advantage >= 0) & (log_ratio > most)",
        "log_ratio != log_ratio",
        "tests/ops/test_triton.py::test_cases[loss]",
    ),
    Fault(
        "a product instead of the select of the carry, in Triton",
        TRITON_GAE,
        "return tl.where(cut, advantage, advantage + link * later), ",
        "return advantage + tl.where(cut, 0.0, link) * later, ",
        OF_TRITON,
    ),
    Fault(
        "a truncation taken for a termination, in Triton",
        TRITON_GAE,
        "next_value = tl.where(code == TRUNCATED, at_truncation, next_value)",
        "next_value = tl.where(code == TRUNCATED, 0.0, next_value)",
        OF_TRITON,
    ),
    Fault(
        "the last tile without its mask",
        TRITON_GAE,
        "mask=mask, other=INVALID).to(tl.int32)",
        "mask=mask, other=RUNNING).to(tl.int32)",
        OF_TRITON,
    ),
    Fault(
        "the carry between tiles from the wrong step",
        TRITON_GAE,
        "carry = tl.sum(tl.where(lane == 0, a0, 0.0), 1)[:, None]",
        "carry = tl.sum(tl.where(lane == 0, a1, 0.0), 1)[:, None]",
        OF_TRITON,
    ),
    Fault(
        "a cut lost by underflow",
        TRITON_GAE,
        "cut = link.to(tl.int32, bitcast=True) < 0",
        "cut = link < 0",
        OF_TRITON,
    ),
    Fault(
        "the ring's end off by one, in Triton",
        TRITON_GAE,
        "slot = tl.where(slot >= capacity, slot - capacity, slot)",
        "slot = tl.where(slot > capacity, slot - capacity, slot)",
        OF_TRITON,
    ),
    Fault(
        "moments of programs joined without their means' differences, in Triton",
        TRITON_GAE,
        "squares += spread + number * offset * offset",
        "squares += spread",
        OF_TRITON,
    ),
    Fault(
        "a biased standard deviation, in Triton",
        TRITON_GATHER,
        "tl.load(stats + 2) / tl.where(count > 1, count - 1, 1.0)",
        "tl.load(stats + 2) / tl.where(count > 1, count, 1.0)",
        OF_GATHER,
    ),
    Fault(
        "every minibatch equals the first, in Triton",
        TRITON_GATHER,
        "position = tl.where(inside, first + sample, first).to(tl.uint32)",
        "position = tl.where(inside, sample, first).to(tl.uint32)",
        OF_GATHER,
    ),
    Fault(
        "the first sample beyond the last not walked back, in Triton",
        TRITON_GATHER,
        "    outside = tl.max((x >= size).to(tl.int32))\n    while outside > 0:",
        "    outside = tl.max((x > size).to(tl.int32))\n    while outside > 0:",
        OF_GATHER,
    ),
    Fault(
        "two final observations in one place, in Triton",
        "triton_kernels/append.py",
        "place = place + tl.cumsum(wanted.to(tl.int32)) - 1",
        "place = place + tl.cumsum(wanted.to(tl.int32)) // 2",
        OF_APPEND,
    ),
]
