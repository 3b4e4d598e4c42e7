"""Mistakes in the CUDA kernels: caught by compiling them for the CPU."""

from __future__ import annotations

from .fault import Fault

GAE, MOMENTS = "csrc/cuda/gae.cu", "csrc/cuda/moments.cuh"
APPEND, GATHER, COMMON = "csrc/cuda/append.cu", "csrc/cuda/gather.cu", "csrc/cuda/common.cuh"
TESTS = "tests/emulation/test_on_cpu.py"

CUDA = [
    Fault(
        "a lane that reaches across an end in another lane",
        GAE,
        "run = gae_join(reach < d || lane < d, run,",
        "run = gae_join(lane < d, run,",
        TESTS,
    ),
    Fault(
        "the carry between tiles from the wrong lane",
        GAE,
        "carry[row] = __shfl_sync(kAll, run, 31);",
        "carry[row] = __shfl_sync(kAll, run, 30);",
        TESTS,
    ),
    Fault(
        "last_values in the carry as well, in CUDA",
        GAE,
        "    carry[row] = 0;\n",
        "    carry[row] = env0 + row < args.num_envs ? read<T, false>(args.last_values, env0 + row, 0) : T(0);\n",
        TESTS,
    ),
    Fault(
        "the decay of a tile without its last power",
        GAE,
        "through *= lane == 31 ? decays[4] * decays[4] : T(1);",
        "",
        TESTS,
    ),
    Fault(
        "a wrap within four steps ignored",
        GAE,
        "(args.capacity % kLaneSteps == 0 || start + args.num_steps <= args.capacity)",
        "(args.capacity >= 0 || start + args.num_steps <= args.capacity)",
        TESTS,
    ),
    Fault(
        "zero for a final value without a place in the pool",
        GAE,
        "if (row < 0 || row >= args.pool_size) return static_cast<T>(NAN);",
        "if (row >= args.pool_size) return static_cast<T>(NAN);\n  if (row < 0) return 0;",
        TESTS,
    ),
    Fault(
        "chunks that overlap by one step",
        GAE,
        "last >= 0; last -= Steps)",
        "last >= 0; last -= Steps - 1)",
        TESTS,
    ),
    Fault(
        "statistics merged before the warps have stored theirs",
        MOMENTS,
        "blocks = gridDim.x;\n  __syncthreads();",
        "blocks = gridDim.x;",
        TESTS,
    ),
    Fault(
        "means of tiles rounded to float32",
        MOMENTS,
        "return {n, near + offset, m2 < 0 ? 0 : m2};",
        "return {n, double(near), squares};",
        TESTS,
    ),
    Fault(
        "statistics of no more blocks than a block has threads",
        MOMENTS,
        "own = i < blockDim.x ? part : merge(own, part);",
        "own = part;",
        TESTS,
    ),
    Fault("a ticket that is not reset", MOMENTS, "    *ticket = 0;\n", "", TESTS),
    Fault(
        "minus zero counts as a flag",
        COMMON,
        "return (plane.real ? bits << 1 : bits) != 0;",
        "return bits != 0;",
        TESTS,
    ),
    Fault(
        "a captured step stored in a full ring",
        APPEND,
        "if (appended - args.cursor[kDiscarded] >= args.capacity) {",
        "if (appended - args.cursor[kDiscarded] > args.capacity) {",
        TESTS,
    ),
    Fault(
        "one place for all final observations of a warp",
        APPEND,
        "__popc(wanted & ((1u << lane) - 1));",
        "__popc(wanted & 1u);",
        TESTS,
    ),
    Fault(
        "crashes counted as time-outs",
        APPEND,
        "const unsigned wanted = __ballot_sync(0xFFFFFFFFu, code == kTruncated);",
        "const unsigned wanted = __ballot_sync(0xFFFFFFFFu, code != kRunning);",
        TESTS,
    ),
    Fault(
        "only half of each 16 bytes checked for finite values",
        APPEND,
        "return is_bad(uint2{x.x, x.y}, low, high) || is_bad(uint2{x.z, x.w}, low, high);",
        "return is_bad(uint2{x.x, x.y}, low, high);",
        TESTS,
    ),
    Fault(
        "rows read before their offsets are known",
        GATHER,
        "permutation);\n  }\n  __syncthreads();",
        "permutation);\n  }",
        TESTS,
    ),
    Fault(
        "rows written out before all are loaded",
        GATHER,
        "    __syncthreads();\n    const char* base",
        "    const char* base",
        TESTS,
    ),
    Fault(
        "a division off by one",
        GATHER,
        "((uint64_t{1} << 32) + field.width - 1) / field.width",
        "(uint64_t{1} << 32) / field.width",
        TESTS,
    ),
    Fault(
        "a biased standard deviation, in CUDA",
        GATHER,
        "sqrt(args.stats[2] / (count - 1))",
        "sqrt(args.stats[2] / count)",
        TESTS,
    ),
    Fault(
        "another rollout's number in the key, in CUDA",
        GATHER,
        "static_cast<uint64_t>(discarded) / args.num_steps",
        "static_cast<uint64_t>(discarded)",
        TESTS,
    ),
]
