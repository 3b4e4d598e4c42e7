// Computes which samples form a minibatch and where they lie in the ring, one batch of positions at a time, without an
// index tensor. Used to copy samples out (gather) and to learn from them in place (ppo_gradients).
#pragma once

#include "../permutation.h"
#include "common.h"

#include <algorithm>
#include <bit>
#include <cmath>

namespace pydrone {
namespace {

constexpr int64_t kBatch = 128;  // positions turned into samples at a time

struct Samples {
  int64_t num_envs, num_steps, capacity, start;
  int64_t row_env, row_step, advantage_env, advantage_step;  // strides over environments and steps, in bytes
  int64_t count, first;  // positions first .. first + count
  const int64_t* subset;
  bool shuffle;
  Permutation permutation;
};

// Positions turned into samples, always kBatch of them: what lies past the last position is computed and not used.
struct Batch {
  alignas(64) int32_t left[kBatch], right[kBatch], sample[kBatch];
  alignas(64) int64_t row[kBatch], advantage[kBatch];  // byte offsets from the first one
};

// Splits consecutive positions into the permutation's two sides without a division for each.
inline void split(const Permutation& p, uint32_t first, Batch& batch) {
  uint32_t left = first / p.b, right = first % p.b;
  for (int64_t i = 0; i < kBatch;) {
    const int64_t end = std::min<int64_t>(kBatch, i + p.b - right);
    for (; i < end; ++i) {
      batch.left[i] = static_cast<int32_t>(left);
      batch.right[i] = static_cast<int32_t>(right++);
    }
    if (right == p.b) right = 0, ++left;
  }
}

#if defined(PYDRONE_VERSIONS)
// Permutation::apply in vectors. GCC's own vectorisation moves every lane back and forth for each product of 64 bits.
// Four chains at a time, because each of a round's instructions waits for the one before.
template <int kSize>
PYDRONE_INLINE int32_t permute_body(const Permutation& p, Batch& batch) {
  using Kind = Vectors<kSize>;
  using U32 = typename Kind::U32;
  using I32 = typename Kind::I32;
  constexpr int kChains = 4, kLanes = kSize / 4;
  static_assert(kBatch % (kChains * kLanes) == 0 && kRounds % 2 == 0);
  I32 greatest{};
  for (int64_t i = 0; i < kBatch; i += kChains * kLanes) {
    U32 sides[2][kChains];
    std::memcpy(sides[0], batch.left + i, sizeof(sides[0]));
    std::memcpy(sides[1], batch.right + i, sizeof(sides[1]));
#pragma GCC unroll 8
    for (int round = 0; round < kRounds; ++round) {
      const U32 key = p.keys[round] + U32{};
      const uint32_t n = round % 2 ? p.b : p.a;
#pragma GCC unroll 4
      for (int k = 0; k < kChains; ++k) {
        const U32 h = feistel_round(sides[1 - round % 2][k], key);
        const U32 sum = sides[round % 2][k] + scale32<kSize>(h, n), reduced = sum - n;
        sides[round % 2][k] = reduced < sum ? reduced : sum;  // unsigned: reduced is the greater one if sum < n
      }
    }
#pragma GCC unroll 4
    for (int k = 0; k < kChains; ++k) {
      const I32 sample = reinterpret_cast<I32>(sides[0][k] * p.b + sides[1][k]);
      std::memcpy(batch.sample + i + k * kLanes, &sample, kSize);
      greatest = sample > greatest ? sample : greatest;
    }
  }
  int32_t result = 0;
  for (int k = 0; k < kLanes; ++k) result = std::max<int32_t>(result, greatest[k]);
  return result;
}
#else
template <int>
PYDRONE_INLINE int32_t permute_body(const Permutation& p, Batch& batch) {
  int32_t greatest = 0;
  for (int64_t i = 0; i < kBatch; ++i) {
    batch.sample[i] = static_cast<int32_t>(p.apply(batch.left[i], batch.right[i]));
    greatest = std::max(greatest, batch.sample[i]);
  }
  return greatest;
}
#endif
// Returns the greatest result; if it is not below the permutation's size, some need cycle walking.
PYDRONE_VERSIONED(int32_t, permute, permute_body, (const Permutation& p, Batch& batch), (p, batch))

// In doubles, which hold all these integers exactly; there are vector instructions for neither a division nor, before
// AVX-512, a product of 64-bit integers.
template <int kSize>
PYDRONE_INLINE void locate_body(const Samples& samples, Batch& batch) {
  using Kind = Vectors<kSize>;
  using F64 = typename Kind::F64;
  using I64 = typename Kind::I64;
  // Added to a number below 2^51, this rounds it to an integer, which the sum's low bits then hold.
  constexpr double kRound = 0x1.8p52;
  const auto bits_of_round = std::bit_cast<int64_t>(kRound);
  // The environment is sample / num_steps rounded down: ((sample + 1/2) / num_steps - 1/2) rounded to nearest. That is
  // at least 0.5 / num_steps from a tie; the rounding errors are 2^-20 / num_steps at most.
  const double inverse = 1.0 / static_cast<double>(samples.num_steps), half = 0.5 * inverse - 0.5;
  const auto all = [](int64_t x) { return static_cast<double>(x) - F64{}; };
  const F64 num_steps = all(samples.num_steps), start = all(samples.start), capacity = all(samples.capacity);
  const F64 row_env = all(samples.row_env), row_step = all(samples.row_step);
  const F64 advantage_env = all(samples.advantage_env), advantage_step = all(samples.advantage_step);
  for (int64_t i = 0; i < kBatch; i += kSize / 8) {
    typename Kind::Half sample;
    std::memcpy(&sample, batch.sample + i, sizeof(sample));
    const F64 x = __builtin_convertvector(sample, F64);
    const F64 env = x * inverse + half + kRound - kRound, step = x - env * num_steps;
    F64 slot = start + step;
    slot = slot >= capacity ? slot - capacity : slot;
    const I64 row = reinterpret_cast<I64>(env * row_env + slot * row_step + kRound) - bits_of_round;
    const I64 advantage = reinterpret_cast<I64>(env * advantage_env + step * advantage_step + kRound) - bits_of_round;
    std::memcpy(batch.row + i, &row, kSize);
    std::memcpy(batch.advantage + i, &advantage, kSize);
  }
}
PYDRONE_VERSIONED(void, locate, locate_body, (const Samples& samples, Batch& batch), (samples, batch))

// The samples of outputs position .. position + n, and where they lie.
void locate_batch(const Samples& samples, int64_t position, int64_t n, Batch& batch) {
  const int64_t first = samples.first + position;
  if (samples.shuffle) {
    split(samples.permutation, static_cast<uint32_t>(first), batch);
    if (static_cast<uint32_t>(permute(samples.permutation, batch)) >= samples.permutation.size)
      for (int64_t i = 0; i < n; ++i)
        while (static_cast<uint32_t>(batch.sample[i]) >= samples.permutation.size)
          batch.sample[i] = static_cast<int32_t>(samples.permutation(static_cast<uint32_t>(batch.sample[i])));
  } else {
    for (int64_t i = 0; i < kBatch; ++i) batch.sample[i] = static_cast<int32_t>(first + i);
  }
  if (samples.subset)
    for (int64_t i = 0; i < n; ++i) {
      const int64_t sample = samples.subset[batch.sample[i]];
      // The caller's number is clamped: it may be wrong, but it must not read outside the rollout.
      batch.sample[i] = static_cast<int32_t>(std::clamp<int64_t>(sample, 0, samples.num_envs * samples.num_steps - 1));
    }
  locate(samples, batch);
}

// Normalisation of the minibatch's advantages: (A - mean) * scale.
struct Moments {
  float mean = 0.0f, scale = 1.0f;

  Moments(const Optional& stats, const Tensor& like) {
    if (!stats) return;
    check_shape("stats", *stats, {3});
    check_dtype("stats", *stats, ScalarType::Double);
    check_contiguous("stats", *stats);
    check_device("stats", *stats, like);
    const auto* moments = static_cast<const double*>(stats->data_ptr());
    const double std = moments[0] > 1 ? std::sqrt(moments[2] / (moments[0] - 1)) : 0.0;
    mean = static_cast<float>(moments[1]);
    scale = static_cast<float>(1.0 / (std + kStdEpsilon));
  }
};

// Checks the rollout's advantages [N, T] and sets their strides; the ring's sizes must be set.
inline const float* take_advantages(Samples& samples, const Tensor& advantages, const Tensor& like) {
  check_shape("advantages", advantages, {samples.num_envs, samples.num_steps});
  check_dtype("advantages", advantages, ScalarType::Float);
  check_device("advantages", advantages, like);
  samples.advantage_env = 4 * advantages.stride(0);
  samples.advantage_step = 4 * advantages.stride(1);
  return static_cast<const float*>(advantages.data_ptr());
}

// Checks and sets the arguments that select the samples; the ring's sizes and `count` must be set. Returns false if
// there are no samples.
inline bool draw(Samples& samples, const Optional& subset, int64_t start, int64_t num_samples, int64_t key,
                 int64_t rollout, int64_t epoch, bool shuffle, int64_t first, const Optional& cursor,
                 const Tensor& like) {
  const int64_t total = samples.num_envs * samples.num_steps;
  STD_TORCH_CHECK(total < (int64_t{1} << 31), "rows: expected fewer than 2^31 samples, got ", total);
  if (subset) {
    check_shape("subset", *subset, {num_samples});
    check_dtype("subset", *subset, ScalarType::Long);
    check_contiguous("subset", *subset);
    check_device("subset", *subset, like);
    samples.subset = static_cast<const int64_t*>(subset->data_ptr());
  } else {
    STD_TORCH_CHECK(num_samples == total, "num_samples: expected ", total, ", got ", num_samples);
  }
  if (samples.count <= 0) return false;
  STD_TORCH_CHECK(total > 0, "rows: expected at least one sample, got ", samples.num_envs, " environments and ",
                  samples.num_steps, " steps");
  STD_TORCH_CHECK(first >= 0 && samples.count <= num_samples && first <= num_samples - samples.count,
                  "first: expected first + ", samples.count, " <= ", num_samples, ", got ", first);
  if (cursor) {
    check_cursor(cursor, like);
    const int64_t discarded = static_cast<const int64_t*>(cursor->data_ptr())[1];
    start = discarded % samples.capacity;
    rollout = discarded / samples.num_steps;
  }
  check_range("start", start, 0, samples.capacity);
  samples.start = start;
  samples.first = first;
  samples.shuffle = shuffle;
  if (shuffle)
    samples.permutation = make_permutation(num_samples, static_cast<uint64_t>(key), static_cast<uint64_t>(rollout),
                                           static_cast<uint64_t>(epoch));
  return true;
}

}  // namespace
}  // namespace pydrone
