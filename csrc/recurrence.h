// One step of generalized advantage estimation: the recurrence that both native backends share, on host and device.
//
// Schulman et al. 2016 (arXiv:1506.02438), eq. 16, cut at episode ends. Selects, never products: 0 * NaN is NaN, and
// values after an end must not leak back across it. Both operands of a select are computed beforehand, so that a loop
// over environments compiles to blends.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define PYDRONE_HD __host__ __device__ __forceinline__
#elif defined(_MSC_VER)
#define PYDRONE_HD __forceinline
#else
#define PYDRONE_HD inline __attribute__((always_inline))
#endif

namespace pydrone {

// Codes of the stored end flags; same as in pydrone/ops/schema.py.
constexpr int32_t kRunning = 0, kTerminated = 1, kTruncated = 2, kInvalid = 3;

// The value that a truncated step bootstraps from; same as in pydrone/ops/schema.py.
constexpr int64_t kNone = 0, kFinalValues = 1, kStoredValue = 2, kNextValue = 3;

// Added to the standard deviation that advantages are divided by; same as in pydrone/ops/schema.py.
constexpr double kStdEpsilon = 1e-8;

// One code from three flags: invalid takes precedence over truncated, truncated over terminated.
PYDRONE_HD int32_t encode(bool done, bool truncated, bool valid) {
  int32_t code = done ? kTerminated : kRunning;
  code = truncated ? kTruncated : code;
  return valid ? code : kInvalid;
}

// The functions below take scalars or GCC vectors: T is a real type and C an integer type, with equally many lanes if
// they are vectors; S is always a scalar.

// The bootstrap value of a truncated step; `final_value` is used with kFinalValues only.
template <typename T>
PYDRONE_HD T value_at_truncation(int64_t bootstrap, T value, T next_value, T final_value) {
  return bootstrap == kFinalValues ? final_value : (bootstrap == kStoredValue ? value : next_value);
}

// The temporal difference r + gamma * V' - V, with V' chosen by the code; 0 for an invalid transition.
template <typename T, typename C, typename S>
PYDRONE_HD T gae_delta(C code, T reward, T value, T next_value, T at_truncation, S gamma) {
  T next = code == kTruncated ? at_truncation : next_value;
  next = code == kTerminated ? T{} : next;
  const T delta = reward + gamma * next - value;
  return code == kInvalid ? T{} : delta;
}

// Joins a temporal difference (or a run of steps) to the advantage that follows it, unless an end lies between them.
template <typename T, typename M, typename S>
PYDRONE_HD T gae_join(M cut, T delta, S decay, T carry) {
  const T joined = delta + decay * carry;
  return cut ? delta : joined;
}

// A_t from A_{t+1} (`carry`) and V_{t+1} (`next_value`); decay = gamma * lambda.
template <typename T, typename C, typename S>
PYDRONE_HD T gae_step(C code, T reward, T value, T next_value, T at_truncation, S gamma, S decay, T carry) {
  return gae_join(code != kRunning, gae_delta(code, reward, value, next_value, at_truncation, gamma), decay, carry);
}

}  // namespace pydrone
