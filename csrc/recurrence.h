// Generalized advantage estimation, one step: the recurrence of every native backend, on the host and on the device.
//
// Schulman et al. 2016 (arXiv:1506.02438), eq. 16, cut at every end of an episode. Selects and no products: 0 * NaN is
// NaN, and what follows an end must not reach back over it. The selects are of values computed beforehand, so that a
// loop over environments becomes blends.
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

// Codes of the stored end flags, as in pydrone/ops/schema.py.
constexpr int32_t kRunning = 0, kTerminated = 1, kTruncated = 2, kInvalid = 3;

// What a truncated step bootstraps with, as in pydrone/ops/schema.py.
constexpr int64_t kNone = 0, kFinalValues = 1, kStoredValue = 2, kNextValue = 3;

// Added to the standard deviation that advantages are divided by, as in pydrone/ops/schema.py.
constexpr double kStdEpsilon = 1e-8;

// One code of three flags: invalid over truncated over terminated.
PYDRONE_HD int32_t encode(bool done, bool truncated, bool valid) {
  int32_t code = done ? kTerminated : kRunning;
  code = truncated ? kTruncated : code;
  return valid ? code : kInvalid;
}

// The functions below take scalars, or GCC's vectors of them (T and a C of as many integers as wide): S is a scalar.

// V at the end of a truncated step; `final_value` is looked at for kFinalValues alone.
template <typename T>
PYDRONE_HD T value_at_truncation(int64_t bootstrap, T value, T next_value, T final_value) {
  return bootstrap == kFinalValues ? final_value : (bootstrap == kStoredValue ? value : next_value);
}

// The temporal difference r + gamma * V' - V, V' as the code says; 0 for a transition that does not count.
template <typename T, typename C, typename S>
PYDRONE_HD T gae_delta(C code, T reward, T value, T next_value, T at_truncation, S gamma) {
  T next = code == kTruncated ? at_truncation : next_value;
  next = code == kTerminated ? T{} : next;
  const T delta = reward + gamma * next - value;
  return code == kInvalid ? T{} : delta;
}

// Joins a temporal difference (or a whole run of steps) to the advantage after it, unless it is cut off from that.
template <typename T, typename M, typename S>
PYDRONE_HD T gae_join(M cut, T delta, S decay, T carry) {
  const T joined = delta + decay * carry;
  return cut ? delta : joined;
}

// A_t of A_{t+1} (`carry`) and V_{t+1} (`next_value`); decay = gamma * lambda.
template <typename T, typename C, typename S>
PYDRONE_HD T gae_step(C code, T reward, T value, T next_value, T at_truncation, S gamma, S decay, T carry) {
  return gae_join(code != kRunning, gae_delta(code, reward, value, next_value, at_truncation, gamma), decay, carry);
}

}  // namespace pydrone
