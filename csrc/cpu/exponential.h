// e^x for vectors of float or double: what the learner's networks and the off-policy estimators share. Nothing of the
// standard library is used here, see mlp_tile.h.
#pragma once

#include <cstdint>

#if defined(__GNUC__)
namespace pydrone {
namespace {

// x = n ln 2 + r with |r| <= ln 2 / 2: how n is rounded, split and made an exponent, and how far e^r needs its series.
template <class T>
struct Exponential;
template <>
struct Exponential<float> {
  static constexpr float kRounder = 12582912.0f, kHigh = 0.693359375f, kLow = 2.12194440e-4f;
  static constexpr float kLeast = -87.0f, kMost = 88.0f;  // where e^x is a normal number
  static constexpr float kZero = -88.0f, kInfinite = 89.0f;  // 2^n comes out as 0 and as infinity
  static constexpr int32_t kFraction = 23, kOne = 0x3F800000;
  static constexpr int kTerms = 7;  // to 1e-8
};
template <>
struct Exponential<double> {
  static constexpr double kRounder = 6755399441055744.0, kHigh = 0.693145751953125, kLow = -1.42860682030941723212e-6;
  static constexpr double kLeast = -708.0, kMost = 709.0;
  static constexpr double kZero = -709.0, kInfinite = 710.0;
  static constexpr int64_t kFraction = 52, kOne = 0x3FF0000000000000;
  static constexpr int kTerms = 13;  // to 1e-17
};

template <class T>
constexpr T inverse_factorial(int n) {
  double product = 1;
  for (int i = 2; i <= n; ++i) product *= i;
  return static_cast<T>(1 / product);
}

// Returns e^r - 1, from its Taylor series, and 2^n in `power`. V: a vector of T; I: of integers as wide.
template <class T, class I, class V>
static inline __attribute__((always_inline)) V reduced_expm1(V x, V& power) {
  using E = Exponential<T>;
  const V shifted = x * static_cast<T>(1.44269504088896340736) + E::kRounder;  // the nearest integer in the low bits
  const V n = shifted - E::kRounder;
  const V r = (x - n * E::kHigh) + n * E::kLow;
  V p = inverse_factorial<T>(E::kTerms) - V{};  // x - 0 is a broadcast; 0 + x is not x for x = -0
#pragma GCC unroll 16
  for (int k = E::kTerms - 1; k >= 2; --k) p = p * r + inverse_factorial<T>(k);
  power = reinterpret_cast<V>((reinterpret_cast<I>(shifted) << E::kFraction) + E::kOne);
  return p * (r * r) + r;
}

// `x` brought between two bounds; NaN stays NaN. GCC 12 finds one instruction for a select only if it does not know the
// bound.
template <class V, class T>
static inline __attribute__((always_inline)) V between(T least, T most, V x) {
  V low = least - V{}, high = most - V{};
#if defined(__x86_64__)
  asm("" : "+v"(low), "+v"(high));  // hides them
#endif
  const V below = x > high ? high : x;
  return below < low ? low : below;
}

// Accurate to about 1 ulp where e^x is a normal number; clamped outside that range. NaN stays NaN.
template <class T, class I, class V>
static inline __attribute__((always_inline)) V clamped_exponential(V x) {
  using E = Exponential<T>;
  V power;
  const V part = reduced_expm1<T, I>(between(E::kLeast, E::kMost, x), power);
  return part * power + power;
}

// Accurate to about 2 ulp; 0 and infinity from where e^x is within a factor of 2 of being no normal number. NaN stays.
template <class T, class I, class V>
static inline __attribute__((always_inline)) V exponential_of(V x) {
  using E = Exponential<T>;
  V power;
  const V part = reduced_expm1<T, I>(between(E::kZero, E::kInfinite, x), power);
  return (part + static_cast<T>(1)) * power;  // not part * power + power: infinity less infinity
}

}  // namespace
}  // namespace pydrone
#endif
