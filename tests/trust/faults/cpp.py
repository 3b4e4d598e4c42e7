"""Mistakes in the C++ kernels of storage, GAE and minibatches, and of the environments' steps."""

from __future__ import annotations

from .fault import Fault

RECURRENCE = "csrc/recurrence.h"
GAE = "csrc/cpu/gae.cpp"
STEP = "csrc/cpu/scan_step.h"
GATHER = "csrc/cpu/gather.cpp"
APPEND, APPEND_ROWS = "csrc/cpu/append.cpp", "csrc/cpu/append_rows.cpp"
TILES = "csrc/cpu/tiles.h"
PERMUTATION = "csrc/permutation.h"
SAMPLES = "csrc/cpu/samples.h"
DRONE = "csrc/cpu/quadrotor.h"
TASK_STEP = "csrc/cpu/quadrotor.cpp"
OF_GAE = "tests/test_gae.py"
OF_STATS = "tests/test_gae_contract.py"
OF_RING = "tests/rollout/test_ring.py"
OF_MINIBATCHES = "tests/rollout/test_minibatches.py"
OF_FINAL_OBS = "tests/rollout/test_final_obs.py"
OF_STEPS = "tests/ops/test_steps.py"
OF_PROPERTIES = "tests/test_properties.py"
OF_REPEATED = "tests/rollout/test_repeated_steps.py"

CPP = [
    Fault(
        "last_values in the carry as well",
        GAE,
        "    row_.after = carry_row_;\n    next_ = next_row_;\n  }",
        "    std::copy(next_row_, next_row_ + envs_, carry_row_);\n    row_.after = carry_row_;\n"
        "    next_ = next_row_;\n  }",
        OF_GAE,
    ),
    Fault(
        "gamma instead of lambda",
        GAE,
        "job.decay = gamma * lam;\n  run(job, scan, advantages);",
        "job.decay = gamma * gamma;\n  run(job, scan, advantages);",
        OF_GAE,
    ),
    Fault(
        "done shifted by one step",
        GAE,
        "row.codes = codes_of(i, slot);",
        "row.codes = codes_of(i > 0 ? i - 1 : i, slot > 0 ? slot - 1 : slot);",
        OF_GAE,
    ),
    Fault(
        "a truncation taken for a termination",
        RECURRENCE,
        "T next = code == kTruncated ? at_truncation : next_value;",
        "T next = code == kTruncated ? T{} : next_value;",
        OF_GAE,
    ),
    Fault(
        "a product instead of the select of the next value",
        RECURRENCE,
        "next = code == kTerminated ? T{} : next;",
        "next = next * (code == kTerminated ? T{} : T{} + S{1});",
        OF_GAE,
    ),
    Fault(
        "a product instead of the select of the carry",
        RECURRENCE,
        "return cut == 0 ? joined : delta;",
        "return joined - (cut == 0 ? T{} : T{} + link) * carry;",
        OF_GAE,
    ),
    Fault(
        "the value after a termination, in a row without truncations",
        RECURRENCE,
        "const T next = code == kRunning ? next_value : T{};",
        "const T next = next_value;",
        OF_GAE,
    ),
    Fault(
        "a row with truncations taken for one of terminations",
        GAE,
        "const bool plain = highest <= kTerminated;",
        "const bool plain = highest <= kTruncated;",
        OF_GAE,
    ),
    Fault(
        "a row with invalid steps taken for one of terminations",
        GAE,
        "const bool plain = highest <= kTerminated;",
        "const bool plain = highest != kTruncated;",
        OF_GAE,
    ),
    Fault(
        "a row of the moments not kept",
        STEP,
        "kept = !Stream || !off_policy || summed;",
        "kept = !Stream || !off_policy;",
        "tests/test_vtrace.py",
    ),
    Fault(
        "the stored value instead of the next one",
        GAE,
        "if (job_.bootstrap == kStoredValue) row.at_truncation",
        "if (job_.bootstrap != kFinalValues) row.at_truncation",
        OF_GAE,
    ),
    Fault(
        "the ring's head off by one",
        GAE,
        "const int64_t last_slot = (job_.start + end - 1) % job_.capacity;",
        "const int64_t last_slot = (job_.start + end) % job_.capacity;",
        OF_RING,
    ),
    Fault(
        "the last environment of a row left out",
        STEP,
        "  for (; i < n; ++i) {\n    T ratio",
        "  for (; i + 1 < n; ++i) {\n    T ratio",
        OF_GAE,
    ),
    Fault(
        "the value after a tile read from the tile that replaced it",
        GAE,
        "if (next_ != next_row_) std::copy(next_, next_ + envs_, next_row_);",
        "",
        OF_GAE,
    ),
    Fault(
        "the end of a row left out of the moments",
        STEP,
        "  for (; i < n; ++i) merge(into, 1, x[i], 0);",
        "",
        OF_STATS,
    ),
    Fault(
        "moments joined without the difference of the means",
        STEP,
        "into[2] += m2 + difference * difference * into[0] * count / total;",
        "into[2] += m2;",
        OF_STATS,
    ),
    Fault("naive sums of squares", STEP, "if (m2 >= 0.25 * second)", "if (m2 >= 0 || second >= 0)", OF_STATS),
    Fault("invalid steps in the statistics", GAE, "valid += row.codes[n] != kInvalid;", "valid += 1;", OF_GAE),
    Fault(
        "zero for a missing final value",
        GAE,
        "spare_row_[n] = std::numeric_limits<T>::quiet_NaN();",
        "spare_row_[n] = T{0};",
        f"{OF_FINAL_OBS} tests/rollout/test_captured.py",
    ),
    Fault(
        "streamed advantages without the end of a row",
        STEP,
        "      if constexpr (Stream) row.advantages_out[i] = found.advantage;\n",
        "",
        "tests/test_gae.py tests/ops/test_pages.py",
    ),
    Fault(
        "streamed rows without their last bytes",
        "csrc/cpu/common.h",
        "    std::memcpy(target + i, source + i, bytes - i);",
        "",
        "tests/test_buffer.py",
    ),
    Fault(
        "the end of a tile not transposed",
        TILES,
        "for (int64_t c = r < whole_rows ? whole_columns : 0; c < columns; ++c)",
        "for (int64_t c = whole_columns; c < columns; ++c)",
        OF_GAE,
    ),
    Fault(
        "flags read from their lowest byte",
        TILES,
        "[](From x) -> uint8_t { return nonzero(x); }",
        "[](From x) -> uint8_t { return static_cast<uint8_t>(static_cast<int64_t>(x)); }",
        OF_GAE,
    ),
    Fault(
        "two rounds instead of eight",
        PERMUTATION,
        "constexpr int kRounds = 8;",
        "constexpr int kRounds = 2;",
        OF_MINIBATCHES,
    ),
    Fault(
        "the same permutation in every epoch",
        PERMUTATION,
        "for (int i = 0; i < 5; ++i) {",
        "for (int i = 0; i < 4; ++i) {",
        OF_MINIBATCHES,
    ),
    Fault(
        "only half of the rollout's number in the key",
        PERMUTATION,
        "uint32_t(rollout), uint32_t(rollout >> 32),",
        "uint32_t(rollout), uint32_t(rollout),",
        f"{OF_PROPERTIES} {OF_MINIBATCHES}",
    ),
    Fault(
        "the first sample beyond the last not walked back",
        SAMPLES,
        "permute(samples.permutation, batch)) >= samples.permutation.size)",
        "permute(samples.permutation, batch)) > samples.permutation.size)",
        OF_MINIBATCHES,
    ),
    Fault(
        "a biased standard deviation",
        SAMPLES,
        "std::sqrt(moments[2] / (moments[0] - 1))",
        "std::sqrt(moments[2] / moments[0])",
        OF_MINIBATCHES,
    ),
    Fault(
        "no epsilon in the normalisation",
        SAMPLES,
        "static_cast<float>(1.0 / (std + kStdEpsilon))",
        "static_cast<float>(1.0 / std)",
        OF_MINIBATCHES,
    ),
    Fault(
        "returns of normalised advantages",
        GATHER,
        "result[i] = advantage[i] + value;",
        "result[i] = (advantage[i] - job.mean) * job.scale + value;",
        OF_MINIBATCHES,
    ),
    Fault(
        "rows gathered past the ring's end",
        SAMPLES,
        "slot = slot >= capacity ?",
        "slot = slot > capacity ?",
        OF_RING,
    ),
    Fault(
        "every minibatch equals the first",
        SAMPLES,
        "const int64_t first = samples.first + position;",
        "const int64_t first = position;",
        OF_MINIBATCHES,
    ),
    Fault(
        "a sample's environment rounded to nearest",
        SAMPLES,
        "x * inverse + half + kRound",
        "x * inverse + kRound",
        OF_MINIBATCHES,
    ),
    Fault(
        "odd lanes multiplied as the even ones",
        "csrc/cpu/common.h",
        "odd = multiply_halves(x >> 32, all);",
        "odd = multiply_halves(x, all);",
        OF_MINIBATCHES,
    ),
    Fault(
        "vectors wider than the instruction set's, which GCC takes apart",
        APPEND_ROWS,
        "return look_body<kSize, float>(from, bytes, found);",
        "return look_body<64, float>(from, bytes, found);",
        "tests/ops/test_vectors.py",
    ),
    Fault(
        "time-outs stored as crashes",
        APPEND,
        '{"truncated", true, kTruncated}',
        '{"truncated", true, kTerminated}',
        OF_FINAL_OBS,
    ),
    Fault(
        "the last flag of a repeated step read from the tensor before",
        APPEND,
        "field.address = num_memory + place;",
        "field.address = num_memory + std::min(place, given - 2);",
        OF_REPEATED,
    ),
    Fault("two final observations in one place", APPEND, "number = place;", "number = place / 2;", OF_FINAL_OBS),
    Fault(
        "the default's decay of the heading reward, whatever the task's, in C++",
        DRONE,
        "power_of_2(yaw * c.yaw_decay)",
        "power_of_2(yaw * -14.4269504f)",
        OF_STEPS,
    ),
    Fault(
        "a reward that is not finite passed on, in C++",
        DRONE,
        "finite_or_0(gain * c.weights[0])",
        "gain * c.weights[0]",
        OF_STEPS,
    ),
    Fault(
        "the target of a new episode in the final observation of the old one, in C++",
        TASK_STEP,
        "  std::memcpy(job.obs + n * kObs, &seen, sizeof(seen));",
        "  std::memcpy(job.obs + n * kObs, &seen, sizeof(seen));\n"
        "  std::memcpy(job.final_obs + n * kObs, &seen.target, sizeof(seen.target));",
        OF_STEPS,
    ),
    Fault(
        "lanes without a drone counted in the log, in C++",
        TASK_STEP,
        "    for (int64_t r = count; r < kBlock; ++r) b.log[k][r] = 0;\n",
        "",
        OF_STEPS,
    ),
    Fault(
        "an action one step later than its latency, in C++",
        TASK_STEP,
        "(static_cast<int64_t>(late) - 1) * place",
        "static_cast<int64_t>(late) * place",
        OF_STEPS,
    ),
]
