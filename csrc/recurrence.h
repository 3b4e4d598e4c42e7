// One step of the recurrence that the estimators and both native backends share, on host and device:
//
//   x_t = weight_t * delta_t + (0 at an episode's end, else link_t * x_{t+1})
//
//            weight   link                  source
//   GAE      1        gamma * lambda        Schulman et al. 2016, arXiv:1506.02438, eq. 16
//   V-trace  rho_t    gamma * c_t           Espeholt et al. 2018, arXiv:1802.01561, eq. 1; c_t includes lambda (remark 2)
//   Retrace  1        gamma * c_{t+1}       Munos et al. 2016, arXiv:1606.02647, eq. 4
//
// Selects, never products: 0 * NaN is NaN, and
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

// The temporal difference r + gamma * V' - V, with V' chosen by the code; 0 for an invalid transition. Retrace's has
// Q(s, a) for V. `plain`: all codes are kRunning or kTerminated.
template <bool plain = false, typename T, typename C, typename S>
PYDRONE_HD T gae_delta(C code, T reward, T value, T next_value, T at_truncation, S gamma) {
  if constexpr (plain) {
    const T next = code == kRunning ? next_value : T{};
    return reward + gamma * next - value;
  } else {
    T next = code == kTruncated ? at_truncation : next_value;
    next = code == kTerminated ? T{} : next;
    const T delta = reward + gamma * next - value;
    return code == kInvalid ? T{} : delta;
  }
}

// Joins a weighted temporal difference (or a run of steps) to what follows it, unless an end lies between them. `link`
// is a scalar or as wide as T.
template <typename T, typename M, typename S>
PYDRONE_HD T gae_join(M cut, T delta, S link, T carry) {
  const T joined = delta + link * carry;
  return cut == 0 ? joined : delta;  // not `cut ?`: GCC 12 would invert a vector's mask first
}

// A_t from A_{t+1} (`carry`) and V_{t+1} (`next_value`); decay = gamma * lambda.
template <typename T, typename C, typename S>
PYDRONE_HD T gae_step(C code, T reward, T value, T next_value, T at_truncation, S gamma, S decay, T carry) {
  return gae_join(code != kRunning, gae_delta(code, reward, value, next_value, at_truncation, gamma), decay, carry);
}

// min(most, ratio), but NaN if the ratio of probabilities is.
template <typename T, typename S>
PYDRONE_HD T clipped_ratio(T ratio, S most) {
  const T bound = most - T{};
  return ratio > bound ? bound : ratio;
}

// V-trace's x_t from x_{t+1} (`carry`); `advantage` receives rho_t (r_t + gamma vs_{t+1} - V_t). Both are 0 for an
// invalid step, whose `delta` is, whatever its ratio.
template <bool plain = false, typename T, typename C, typename S>
PYDRONE_HD T vtrace_step(C code, T delta, T rho, T link, S gamma, T carry, T& advantage) {
  const auto cut = code != kRunning;
  T weight = rho;
  if constexpr (!plain) weight = code == kInvalid ? T{} : rho;
  advantage = weight * gae_join(cut, delta, gamma, carry);
  return gae_join(cut, weight * delta, link, carry);
}

// Retrace's x_t from `carry`, link_t x_{t+1}, which becomes that of the step before; `link`: that step's, gamma c_t.
template <bool plain = false, typename T, typename C>
PYDRONE_HD T retrace_step(C code, T delta, T link, T& carry) {
  const T joined = delta + carry, x = code != kRunning ? delta : joined, linked = link * x;
  carry = linked;
  if constexpr (!plain) carry = code == kInvalid ? T{} : linked;
  return x;
}

}  // namespace pydrone
