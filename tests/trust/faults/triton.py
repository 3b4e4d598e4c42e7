"""Mistakes in the Triton kernels."""

from __future__ import annotations

from .fault import Fault

TRITON_SCAN, TRITON_MOMENTS = "triton_kernels/scan.py", "triton_kernels/moments.py"
TRITON_GATHER = "triton_kernels/gather.py"
OF_TRITON = "tests/ops/test_triton.py::test_cases[gae] tests/ops/test_triton.py::test_properties"
OF_SCAN = "tests/ops/test_triton.py::test_scan"
OF_GATHER = "tests/ops/test_triton.py::test_cases[append-gather] tests/ops/test_triton.py::test_properties"
TRITON_GRADIENTS, TRITON_NETWORKS = "triton_kernels/ppo_gradients.py", "triton_kernels/networks.py"
CATEGORICAL = "triton_kernels/categorical.py"
OF_GRADIENTS = "tests/ops/test_triton.py::test_gradients"
OF_APPEND = "tests/ops/test_triton.py::test_cases[append-gather] tests/ops/test_triton.py::test_properties"
OF_LAYER = "tests/ops/test_triton.py::test_cases[loss-layer]"

STEP = "triton_kernels/quadrotor.py"
OF_STEP = "tests/ops/test_triton.py::test_steps"
PROPELLERS, OF_GENESIS = "triton_kernels/propellers.py", "tests/ops/test_triton.py::test_steps_of_genesis"

ADAM, ACT = "triton_kernels/clipped_adam.py", "triton_kernels/ppo_act.py"
OF_ADAM, OF_ACT = "tests/ops/test_triton.py::test_adam", "tests/ops/test_triton.py::test_act"

TRITON = [
    Fault(
        "a force that is not negated in Genesis' arrays, in Triton",
        PROPELLERS,
        "(fx - force[0], fy - force[1], fz - force[2])",
        "(fx + force[0], fy + force[1], fz + force[2])",
        OF_GENESIS,
    ),
    Fault(
        "a drone that Genesis could not integrate flies on, in Triton",
        STEP,
        'tl.where(tl.load(solver.error + row, mask=live, other=0) > 0, float("nan"), 0.0)',
        "0.0 * tl.load(solver.error + row, mask=live, other=0)",
        OF_GENESIS,
    ),
    Fault(
        "drones that fly on placed at the start in Genesis, in Triton",
        STEP,
        "place(solver, row, ended, (start",
        "place(solver, row, live, (start",
        OF_GENESIS,
    ),
    Fault(
        "an infinite action taken for the largest one, in Triton",
        STEP,
        'tl.where(tl.abs(a) < INF, clamp(a, -1.0, 1.0), float("nan"))',
        "clamp(a, -1.0, 1.0)",
        OF_STEP,
    ),
    Fault(
        "a crash on the last step taken for a time-out, in Triton",
        STEP,
        "timeout & (crash == 0)",
        "timeout",
        OF_STEP,
    ),
    Fault(
        "a final observation that shows the target of the next episode, in Triton",
        STEP,
        "store_row(out.final_obs, row, live, last, a)",
        "store_row(out.final_obs, row, live, first, a)",
        OF_STEP,
    ),
    Fault(
        "one noise for the last observation and the first, in Triton",
        STEP,
        "draws.normal, draws.normal + 12",
        "draws.normal, draws.normal",
        OF_STEP,
    ),
    Fault(
        "an action that arrives in the next episode, in Triton",
        STEP,
        "row, live & (dones == 0))",
        "row, live)",
        OF_STEP,
    ),
    Fault(
        "draws for drones that fly on, in Triton",
        STEP,
        "tl.store(varied.drawn + row * DRAWN + k, new[k], mask=ended)",
        "tl.store(varied.drawn + row * DRAWN + k, new[k], mask=live)",
        OF_STEP,
    ),
    Fault(
        "drones that do not exist in the log, in Triton",
        STEP,
        "tl.sum(tl.where(live[:, None], tile, 0.0), 0)",
        "tl.sum(tile, 0)",
        OF_STEP,
    ),
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
        "triton_kernels/launch.py",
        "return tl.where(x > high, high, tl.where(x < low, low, x))",
        "return tl.minimum(tl.maximum(x, low), high)",
        "tests/ops/test_triton_compile.py::test_no_minimum_or_maximum_drops_a_nan",
    ),
    Fault(
        "an overflowing ratio of advantage 0, in Triton",
        "triton_kernels/ppo_loss.py",
        "(advantage >= 0) & (log_ratio > most)",
        "log_ratio != log_ratio",
        "tests/ops/test_triton.py::test_cases[loss-layer]",
    ),
    Fault(
        "a product instead of the select of the carry, in Triton",
        TRITON_SCAN,
        "return tl.where(cut, x, x + link * later), ",
        "return x + tl.where(cut, 0.0, link) * later, ",
        OF_TRITON,
    ),
    Fault(
        "a truncation taken for a termination, in Triton",
        TRITON_SCAN,
        "next_value = tl.where(code == TRUNCATED, at_truncation, next_value)",
        "next_value = tl.where(code == TRUNCATED, 0.0, next_value)",
        OF_TRITON,
    ),
    Fault(
        "the last tile without its mask",
        TRITON_SCAN,
        "mask=mask, other=INVALID).to(tl.int32)",
        "mask=mask, other=RUNNING).to(tl.int32)",
        OF_TRITON,
    ),
    Fault(
        "the carry between tiles from the wrong step",
        TRITON_SCAN,
        "carry = head  #",
        "carry = run  #",
        OF_TRITON,
    ),
    Fault(
        "a cut between warps lost by underflow",
        TRITON_SCAN,
        "last = tl.where(lane == x.shape[1] - 1, x.to(bits, bitcast=True), 0)",
        "last = tl.where(lane == x.shape[1] - 1, (x + 0.0).to(bits, bitcast=True), 0)",
        OF_SCAN,
    ),
    Fault(
        "a warp's whole joined to itself",
        TRITON_SCAN,
        "whole = of_segment_before(whole, SEGMENTS)",
        "whole = whole",
        OF_SCAN,
    ),
    Fault(
        "the sign of a ratio that is not a number taken for a cut, in Triton",
        TRITON_SCAN,
        "factors[1] * tl.abs(tl.where(ratio > factors[3], factors[3], ratio))",
        "factors[1] * tl.where(ratio > factors[3], factors[3], ratio)",
        OF_SCAN,
    ),
    Fault(
        "an invalid step's ratio used, in Triton",
        TRITON_SCAN,
        "ratio = tl.where(codes == INVALID, 0.0, ratio)",
        "ratio = ratio + 0.0",
        OF_SCAN,
    ),
    Fault(
        "Retrace with the ratio of the step itself, in Triton",
        TRITON_SCAN,
        "d = (d[1], d[2], d[3], trace)",
        "d = (d[0], d[1], d[2], d[3])",
        OF_SCAN,
    ),
    Fault(
        "a pivot taken from the float32 of a float64, in Triton",
        TRITON_MOMENTS,
        "offset = pivot.to(tl.float64) - new_pivot.to(tl.float64)",
        "offset = pivot.to(tl.float32).to(tl.float64) - new_pivot.to(tl.float64)",
        OF_SCAN,
    ),
    Fault(
        "a cut lost by underflow",
        TRITON_SCAN,
        "cut = link.to(tl.int32, bitcast=True) < 0",
        "cut = link < 0",
        OF_TRITON,
    ),
    Fault(
        "the ring's end off by one, in Triton",
        TRITON_SCAN,
        "slot = tl.where(slot >= capacity, slot - capacity, slot)",
        "slot = tl.where(slot > capacity, slot - capacity, slot)",
        OF_TRITON,
    ),
    Fault(
        "moments of programs joined without their means' differences, in Triton",
        TRITON_MOMENTS,
        "return new_total, squares.to(tl.float64) + offset * (total.to(tl.float64) + new_total)",
        "return new_total, squares.to(tl.float64)",
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
    Fault(
        "SiLU's derivative of what is not kept, in Triton",
        "triton_kernels/networks.py",
        "        return gate + x * gate * (1.0 - gate)",
        "        return gate + x * gate * (1.0 + gate)",
        OF_LAYER,
    ),
    Fault(
        "the last partial sums of a bias gradient are left out, in Triton",
        "triton_kernels/layers.py",
        "while begin < programs:",
        "while begin + PARTIALS <= programs:",
        OF_LAYER,
    ),
    Fault(
        "tanh's derivative of its argument, in Triton",
        TRITON_NETWORKS,
        "        return 1.0 - y * y\n",
        "        return 1.0 - x * x\n",
        OF_GRADIENTS,
    ),
    Fault(
        "a NaN rounded to 0, in Triton",
        TRITON_NETWORKS,
        "x = tl.where(x == x, rounded, x)",
        "x = rounded",
        OF_GRADIENTS,
    ),
    Fault(
        "samples beyond the minibatch's end learnt from, in Triton",
        TRITON_GRADIENTS,
        "by_value = tl.where(exists, by_value * (value_loss_coef / total), 0.0)",
        "by_value = by_value * (value_loss_coef / total)",
        OF_GRADIENTS,
    ),
    Fault(
        "every drawn minibatch is the epoch's first, in Triton",
        TRITON_GRADIENTS,
        "tl.where(exists, first + slot, first)",
        "tl.where(exists, slot, first)",
        OF_GRADIENTS,
    ),
    Fault(
        "gradients of a program's last tile only, in Triton",
        TRITON_GRADIENTS,
        "(bias_grads[i] + tl.sum(grad, 0),)",
        "(tl.sum(grad, 0),)",
        OF_GRADIENTS,
    ),
    Fault(
        "the entropy bonus as a penalty, in Triton",
        TRITON_GRADIENTS,
        "grad - entropy_coef / s",
        "grad + entropy_coef / s",
        OF_GRADIENTS,
    ),
    Fault(
        "tickets where the sums of a narrower layer were",
        "triton_kernels/layers.py",
        "partials = workspace + TICKETS",
        "partials = workspace + tl.num_programs(1)",
        OF_LAYER,
    ),
    Fault(
        "the entropy of discrete actions as a penalty, in Triton",
        CATEGORICAL,
        " + (entropy_coef / total) * p * apart",
        " - (entropy_coef / total) * p * apart",
        OF_GRADIENTS,
    ),
    Fault(
        "an action that is no choice learnt from, in Triton",
        CATEGORICAL,
        "tl.sum(hit.to(tl.int32), 1) == len(CATEGORIES)",
        "tl.sum(hit.to(tl.int32), 1) <= len(CATEGORIES)",
        OF_GRADIENTS,
    ),
    Fault(
        "logits shifted by the largest one of all actions, in Triton",
        CATEGORICAL,
        'tl.where(here, logits, float("-inf"))',
        "logits",
        OF_GRADIENTS,
    ),
    Fault(
        "the last of equally likely choices, in Triton",
        CATEGORICAL,
        "best = tl.min(first, 1)",
        "best = tl.max(tl.where(first < logits.shape[1], first, 0), 1)",
        OF_ACT,
    ),
    Fault(
        "an estimate of the KL divergence from the ratio that the surrogate holds, in Triton",
        "triton_kernels/ppo_loss.py",
        "    estimate = moved - log_ratio",
        "    estimate = tl.where(moved < tl.exp(tl.log(1 + clip) + 1) - 1, moved, 1) - log_ratio",
        OF_GRADIENTS,
    ),
    Fault(
        "the plain value error where the clipped one alone is asked for, in Triton",
        "triton_kernels/ppo_loss.py",
        "        if GREATER:",
        "        if CLIPPED:",
        OF_GRADIENTS,
    ),
]
