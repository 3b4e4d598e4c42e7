// Computes which samples form a minibatch and where they lie in the ring, one batch of positions at a time, without an
// index tensor. Used to copy samples out (gather) and to learn from them in place (ppo_gradients).
#pragma once

#include "../permutation.h"
#include "common.h"

#include <algorithm>
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

struct Batch {
  int32_t left[kBatch], right[kBatch], sample[kBatch], env[kBatch], step[kBatch];
  int64_t row[kBatch], advantage[kBatch];  // byte offsets from the first one
};

// Splits consecutive positions into the permutation's two sides without a division for each.
void split(const Permutation& p, uint32_t first, int64_t n, Batch& batch) {
  uint32_t left = first / p.b, right = first % p.b;
  for (int64_t i = 0; i < n;) {
    const int64_t end = std::min<int64_t>(n, i + p.b - right);
    for (; i < end; ++i) {
      batch.left[i] = static_cast<int32_t>(left);
      batch.right[i] = static_cast<int32_t>(right++);
    }
    if (right == p.b) right = 0, ++left;
  }
}

// Returns the greatest result; if it is not below the permutation's size, some need cycle walking.
template <int>
PYDRONE_INLINE int32_t permute_body(const Permutation& p, int64_t n, Batch& batch) {
  int32_t greatest = 0;
  for (int64_t i = 0; i < n; ++i) {
    batch.sample[i] = static_cast<int32_t>(p.apply(batch.left[i], batch.right[i]));
    greatest = std::max(greatest, batch.sample[i]);
  }
  return greatest;
}
PYDRONE_VERSIONED(int32_t, permute, permute_body, (const Permutation& p, int64_t n, Batch& batch), (p, n, batch))

// sample / num_steps by a double's reciprocal, exact after one correction: there is no vector division of integers.
template <int>
PYDRONE_INLINE void locate_body(const Samples& samples, int64_t n, Batch& batch) {
  const int32_t num_steps = static_cast<int32_t>(samples.num_steps);
  const double inverse = 1.0 / num_steps;
  for (int64_t i = 0; i < n; ++i) {
    const int32_t sample = batch.sample[i];
    int32_t env = static_cast<int32_t>(sample * inverse);
    int32_t step = sample - env * num_steps;
    env += step < 0 ? -1 : (step >= num_steps ? 1 : 0);
    step += step < 0 ? num_steps : (step >= num_steps ? -num_steps : 0);
    batch.env[i] = env;
    batch.step[i] = step;
  }
  const int64_t start = samples.start, capacity = samples.capacity, row_env = samples.row_env,
                row_step = samples.row_step, advantage_env = samples.advantage_env,
                advantage_step = samples.advantage_step;
  for (int64_t i = 0; i < n; ++i) {
    int64_t slot = start + batch.step[i];
    slot -= slot >= capacity ? capacity : 0;
    batch.row[i] = slot * row_step + batch.env[i] * row_env;
    batch.advantage[i] = batch.env[i] * advantage_env + batch.step[i] * advantage_step;
  }
}
PYDRONE_VERSIONED(void, locate, locate_body, (const Samples& samples, int64_t n, Batch& batch), (samples, n, batch))

// The samples of outputs position .. position + n, and where they lie.
void locate_batch(const Samples& samples, int64_t position, int64_t n, Batch& batch) {
  const int64_t first = samples.first + position;
  if (samples.shuffle) {
    split(samples.permutation, static_cast<uint32_t>(first), n, batch);
    if (static_cast<uint32_t>(permute(samples.permutation, n, batch)) >= samples.permutation.size)
      for (int64_t i = 0; i < n; ++i)
        while (static_cast<uint32_t>(batch.sample[i]) >= samples.permutation.size)
          batch.sample[i] = static_cast<int32_t>(samples.permutation(static_cast<uint32_t>(batch.sample[i])));
  } else {
    for (int64_t i = 0; i < n; ++i) batch.sample[i] = static_cast<int32_t>(first + i);
  }
  if (samples.subset)
    for (int64_t i = 0; i < n; ++i) {
      const int64_t sample = samples.subset[batch.sample[i]];
      // The caller's number is clamped: it may be wrong, but it must not read outside the rollout.
      batch.sample[i] = static_cast<int32_t>(std::clamp<int64_t>(sample, 0, samples.num_envs * samples.num_steps - 1));
    }
  locate(samples, n, batch);
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
