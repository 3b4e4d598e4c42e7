// One step of a block of environments, for each estimator and instruction set, and the moments of its advantages.
#pragma once

#include "../recurrence.h"
#include "common.h"
#include "exponential.h"

#include <algorithm>
#include <cmath>
#include <utility>

namespace pydrone {
namespace {

enum class Estimator { kGae, kVtrace, kRetrace };

constexpr int64_t kLanes = 16;  // of the sums; the same on every instruction set, so that results do not depend on it

#if defined(__GNUC__)
// GCC does not vectorise the selects of a plain loop (jump threading turns them into branches first), so the loops use
// its vector types, as wide as the instruction set's.
template <class T, int Bytes>
struct Vector {
  static constexpr int64_t kSize = Bytes / sizeof(T), kParts = kLanes / kSize;  // elements; vectors to hold the lanes
  using Integer = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  typedef T Real __attribute__((vector_size(Bytes)));
  typedef Integer Code __attribute__((vector_size(Bytes)));
  typedef uint8_t Byte __attribute__((vector_size(Bytes / sizeof(T))));
  typedef uint16_t Wider __attribute__((vector_size(2 * Bytes / sizeof(T))));
};

template <class V>
PYDRONE_INLINE V load(const void* from) {
  V x;
  std::memcpy(&x, from, sizeof(V));
  return x;
}

template <class V>
PYDRONE_INLINE typename V::Code load_codes(const uint8_t* codes) {
  typename V::Code wide;
#if defined(PYDRONE_VERSIONS)  // GCC 12 would split a vector conversion that widens four times into scalar elements
  const auto& bytes = *reinterpret_cast<const uint8_t(*)[V::kSize]>(codes);
  if constexpr (sizeof(wide) > 16) {
    if constexpr (sizeof(wide) == 4 * sizeof(bytes))
      asm("vpmovzxbd %1, %0" : "=x"(wide) : "m"(bytes));
    else
      asm("vpmovzxbq %1, %0" : "=x"(wide) : "m"(bytes));
    return wide;
  }
#endif
#if defined(__SSE2__)
  if constexpr (sizeof(typename V::Byte) == 4 && sizeof(typename V::Code) == 16) {  // also if widened in two steps
    const __m128i none = _mm_setzero_si128();
    const __m128i bytes = _mm_cvtsi32_si128(load<int32_t>(codes));
    return reinterpret_cast<typename V::Code>(_mm_unpacklo_epi16(_mm_unpacklo_epi8(bytes, none), none));
  }
#endif
  const auto wider = __builtin_convertvector(load<typename V::Byte>(codes), typename V::Wider);
  return __builtin_convertvector(wider, typename V::Code);
}

#endif

// Ratios of probabilities; `Bytes` of them at once, or one.
template <int Bytes, class T, class V>
PYDRONE_INLINE V ratio_of(V log_rho) {
#if defined(__GNUC__)
  using Kind = Vector<T, Bytes>;
  if constexpr (std::is_same_v<V, T>)
    return exponential_of<T, typename Kind::Code>(log_rho - typename Kind::Real{})[0];
  else
    return exponential_of<T, typename Kind::Code>(log_rho);
#else
  return std::exp(log_rho);
#endif
}

// Sums over a row of advantages minus a pivot, and of their squares, in lanes.
template <class T>
struct Sums {
  alignas(64) T first[kLanes], second[kLanes];
};

#if defined(__GNUC__)
// A store that bypasses the cache where the processor has one; `to` is aligned to 16 bytes, or as a whole vector.
template <class V>
PYDRONE_INLINE void stream_vector(void* to, V x, bool whole) {
#if defined(PYDRONE_VERSIONS) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
  if constexpr (sizeof(V) > 16)  // in assembly: the intrinsics do not inline into a function for all instruction sets
    if (whole) {
      asm("vmovntps %1, %0" : "=m"(*static_cast<V*>(to)) : "x"(x));
      return;
    }
#endif
#if defined(__SSE2__)
  typedef long long Pairs __attribute__((vector_size(sizeof(V))));
  const Pairs all = reinterpret_cast<Pairs>(x);  // not by memcpy: GCC 12 would store `x` in every case
  [&]<size_t... i>(std::index_sequence<i...>) __attribute__((always_inline)) {
    (_mm_stream_si128(static_cast<__m128i*>(to) + i, __builtin_shufflevector(all, all, 2 * i, 2 * i + 1)), ...);
  }
  (std::make_index_sequence<sizeof(V) / 16>{});
#else
  std::memcpy(to, &x, sizeof(V));
#endif
}
#endif

// What one step of a block reads and writes, from its first environment on.
template <class T>
struct Row {
  const T *rewards, *values, *next, *at_truncation;  // V_t, V_{t+1} and the value where truncated
  const T *log_rhos, *q_values;
  const uint8_t* codes;
  const T* after;  // the next step's carry
  T* carry;        // this step's, possibly the same memory; GAE's is `advantages`
  T* advantages;
  T *advantages_out, *targets;  // if streamed: `advantages` once more; else no such copy
  const T *rewards_ahead, *values_ahead, *log_rhos_ahead, *q_values_ahead;  // if streamed: prefetched meanwhile
  bool summed;  // whether sums are wanted
};

template <class T>
struct Factors {
  T gamma, decay, rho_clip, c_clip;  // decay: gamma * lambda
};

template <class V>
struct Stepped {
  V carry, advantage, target;
};

// x_t and what is made of it: of a vector of environments (V, C) or of one. `plain`: as gae_delta's.
template <Estimator estimator, bool plain, class V, class C, class T>
PYDRONE_INLINE Stepped<V> step_of(C code, V reward, V value, V next, V at_truncation, V ratio, V carry,
                                  const Factors<T>& by) {
  const V delta = gae_delta<plain>(code, reward, value, next, at_truncation, by.gamma);
  if constexpr (estimator == Estimator::kGae) {
    const V advantage = gae_join(code != kRunning, delta, by.decay, carry);
    return {advantage, advantage, advantage + value};
  } else {
    const V link = by.decay * clipped_ratio(ratio, by.c_clip);
    if constexpr (estimator == Estimator::kVtrace) {
      V advantage;
      const V x = vtrace_step<plain>(code, delta, clipped_ratio(ratio, by.rho_clip), link, by.gamma, carry, advantage);
      return {x, advantage, x + value};
    } else {
      const V x = retrace_step<plain>(code, delta, link, carry);
      return {carry, x, x + value};
    }
  }
}

// Outputs of a streamed step are written past the cache.
template <int Bytes, Estimator estimator, bool Stream, bool plain, class T>
PYDRONE_INLINE void step_body(const Row<T>& given, const Factors<T>& factors, T pivot, Sums<T>& sums, int64_t n) {
  const Row<T> row = given;  // stores may alias `given`, but not a copy of it
  const Factors<T> by = factors;
  const T* const base = estimator == Estimator::kRetrace ? row.q_values : row.values;
  const bool whole = ((reinterpret_cast<uintptr_t>(row.advantages_out) | reinterpret_cast<uintptr_t>(row.targets)) & 63) == 0;
  constexpr bool off_policy = estimator != Estimator::kGae, has_advantages = estimator != Estimator::kRetrace;
  // A streamed row's `advantages` are read again as GAE's carry, or for the moments.
  const bool summed = row.summed, kept = !Stream || !off_policy || summed;
  std::fill(sums.first, sums.first + kLanes, T{0});
  std::fill(sums.second, sums.second + kLanes, T{0});
  int64_t i = 0;
#if defined(__GNUC__)
  using Kind = Vector<T, Bytes>;
  using V = typename Kind::Real;
  V first[Kind::kParts] = {}, second[Kind::kParts] = {};
  for (; i + kLanes <= n; i += kLanes) {
    constexpr int64_t kBytes = kLanes * sizeof(T);
    if constexpr (Stream) {
      fetch(reinterpret_cast<const char*>(row.rewards_ahead + i), kBytes);
      fetch(reinterpret_cast<const char*>(row.values_ahead + i), kBytes);
      if constexpr (off_policy) fetch(reinterpret_cast<const char*>(row.log_rhos_ahead + i), kBytes);
      if constexpr (!has_advantages) fetch(reinterpret_cast<const char*>(row.q_values_ahead + i), kBytes);
    }
    for (int64_t part = 0; part < Kind::kParts; ++part) {
      const int64_t k = i + part * Kind::kSize;
      V ratio{};
      if constexpr (off_policy) ratio = ratio_of<Bytes, T>(load<V>(row.log_rhos + k));
      const auto found = step_of<estimator, plain>(load_codes<Kind>(row.codes + k), load<V>(row.rewards + k),
                                                   load<V>(base + k), load<V>(row.next + k),
                                                   load<V>(row.at_truncation + k), ratio, load<V>(row.after + k), by);
      if constexpr (off_policy) std::memcpy(row.carry + k, &found.carry, sizeof(V));
      if constexpr (has_advantages) {
        if (summed) {
          const V difference = found.advantage - pivot;
          first[part] += difference;
          second[part] += difference * difference;
        }
        if (kept) std::memcpy(row.advantages + k, &found.advantage, sizeof(V));
      }
      if constexpr (Stream) {
        if constexpr (has_advantages) stream_vector(row.advantages_out + k, found.advantage, whole);
        stream_vector(row.targets + k, found.target, whole);
      } else {
        std::memcpy(row.targets + k, &found.target, sizeof(V));
      }
    }
  }
  std::memcpy(sums.first, first, sizeof(first));
  std::memcpy(sums.second, second, sizeof(second));
#endif
  for (; i < n; ++i) {
    T ratio{};
    if constexpr (off_policy) ratio = ratio_of<16, T>(row.log_rhos[i]);
    const auto found = step_of<estimator, plain>(int32_t{row.codes[i]}, row.rewards[i], base[i], row.next[i],
                                                 row.at_truncation[i], ratio, row.after[i], by);
    if constexpr (off_policy) row.carry[i] = found.carry;
    if constexpr (has_advantages) {
      if (summed) {
        const T difference = found.advantage - pivot;
        sums.first[i % kLanes] += difference;
        sums.second[i % kLanes] += difference * difference;
      }
      if (kept) row.advantages[i] = found.advantage;
      if constexpr (Stream) row.advantages_out[i] = found.advantage;
    }
    row.targets[i] = found.target;
  }
}

// Merges (count, mean, M2) of two disjoint samples: Chan, Golub and LeVeque 1979, eq. 2.1.
inline void merge(double* into, double count, double mean, double m2) {
  const double total = into[0] + count;
  if (total == 0) return;
  const double difference = mean - into[1];
  into[1] += difference * count / total;
  into[2] += m2 + difference * difference * into[0] * count / total;
  into[0] = total;
}

// Merges the moments of a row of samples into `into`, in two passes over L1.
template <int Bytes, class T>
PYDRONE_INLINE void moments_body(double* into, const T* x, int64_t n) {
  int64_t i = 0;
#if defined(__GNUC__)
  using Kind = Vector<T, Bytes>;
  using V = typename Kind::Real;
  V sum[Kind::kParts] = {}, square[Kind::kParts] = {};
  for (; i + kLanes <= n; i += kLanes)
    for (int64_t part = 0; part < Kind::kParts; ++part) sum[part] += load<V>(x + i + part * Kind::kSize);
  double all = 0, m2 = 0;
  for (int64_t j = 0; j < kLanes; ++j) all += sum[j / Kind::kSize][j % Kind::kSize];
  const double mean = i ? all / static_cast<double>(i) : 0;
  const T rounded = static_cast<T>(mean);
  for (int64_t k = 0; k < i; k += kLanes)
    for (int64_t part = 0; part < Kind::kParts; ++part) {
      const V difference = load<V>(x + k + part * Kind::kSize) - rounded;
      square[part] += difference * difference;
    }
  for (int64_t j = 0; j < kLanes; ++j) m2 += square[j / Kind::kSize][j % Kind::kSize];
  // Corrects M2 from the rounded mean to the mean.
  const double off = mean - rounded;
  m2 -= static_cast<double>(i) * off * off;
  merge(into, static_cast<double>(i), mean, m2 < 0 ? 0 : m2);  // not std::max, which drops a NaN
#endif
  for (; i < n; ++i) merge(into, 1, x[i], 0);
}

#define PYDRONE_STEP(name, estimator, stream, plain, T)                                                            \
  template <int Bytes>                                                                                             \
  PYDRONE_INLINE void name##_body(const Row<T>& row, const Factors<T>& by, T pivot, Sums<T>& sums, int64_t n) {     \
    step_body<Bytes, Estimator::estimator, stream, plain>(row, by, pivot, sums, n);                                \
  }                                                                                                                \
  PYDRONE_VERSIONED(void, name, name##_body,                                                                       \
                    (const Row<T>& row, const Factors<T>& by, T pivot, Sums<T>& sums, int64_t n),                  \
                    (row, by, pivot, sums, n))
// The four kinds of step of an estimator, and what picks one of them.
#define PYDRONE_STEPS(name, estimator, T)                                                                          \
  PYDRONE_STEP(name, estimator, false, false, T)                                                                   \
  PYDRONE_STEP(name##_streamed, estimator, true, false, T)                                                         \
  PYDRONE_STEP(name##_plain, estimator, false, true, T)                                                            \
  PYDRONE_STEP(name##_plain_streamed, estimator, true, true, T)                                                    \
  inline void any_##name(bool streamed, bool plain, const Row<T>& row, const Factors<T>& by, T pivot,              \
                         Sums<T>& sums, int64_t n) {                                                               \
    if (plain && streamed) return name##_plain_streamed(row, by, pivot, sums, n);                                  \
    if (plain) return name##_plain(row, by, pivot, sums, n);                                                       \
    return streamed ? name##_streamed(row, by, pivot, sums, n) : name(row, by, pivot, sums, n);                    \
  }
#define PYDRONE_INSTANCE(T)               \
  PYDRONE_STEPS(gae_row, kGae, T)         \
  PYDRONE_STEPS(vtrace_row, kVtrace, T)   \
  PYDRONE_STEPS(retrace_row, kRetrace, T) \
  PYDRONE_VERSIONED(void, moments, moments_body, (double* into, const T* x, int64_t n), (into, x, n))
PYDRONE_INSTANCE(float)
PYDRONE_INSTANCE(double)
#undef PYDRONE_INSTANCE
#undef PYDRONE_STEPS
#undef PYDRONE_STEP

// One step of n environments; see Row. `plain`: all codes are kRunning or kTerminated.
template <class T>
void run_row(Estimator estimator, bool streamed, bool plain, const Row<T>& row, const Factors<T>& by, T pivot,
             Sums<T>& sums, int64_t n) {
  switch (estimator) {
    case Estimator::kGae: return any_gae_row(streamed, plain, row, by, pivot, sums, n);
    case Estimator::kVtrace: return any_vtrace_row(streamed, plain, row, by, pivot, sums, n);
    case Estimator::kRetrace: return any_retrace_row(streamed, plain, row, by, pivot, sums, n);
  }
}

// Merges a row's moments into `into` from its sums about `pivot`, and returns the next row's pivot: this row's mean. If
// the mean is so far from the pivot that the subtraction would lose digits, two passes are made instead.
template <class T>
T join_sums(double* into, const Sums<T>& sums, T pivot, const T* row, int64_t n) {
  double first = 0, second = 0;
  for (int64_t j = 0; j < kLanes; ++j) first += sums.first[j], second += sums.second[j];
  const double count = static_cast<double>(n), off = first / count, m2 = second - first * off;
  if (m2 >= 0.25 * second)
    merge(into, count, pivot + off, m2);
  else
    moments(into, row, n);
  const T mean = static_cast<T>(pivot + off);
  return std::isfinite(mean) ? mean : T{0};
}

// The codes of a row from its flags (bytes, set if nonzero; null: no such flag). The highest code takes precedence.
template <int>
PYDRONE_INLINE void encode_row_body(uint8_t* codes, const uint8_t* dones, const uint8_t* truncated, const uint8_t* valid,
                               int64_t n) {
  for (int64_t i = 0; i < n; ++i) codes[i] = dones[i] ? uint8_t{kTerminated} : uint8_t{kRunning};
  if (truncated)
    for (int64_t i = 0; i < n; ++i) codes[i] = std::max(codes[i], truncated[i] ? uint8_t{kTruncated} : uint8_t{0});
  if (valid)
    for (int64_t i = 0; i < n; ++i) codes[i] = std::max(codes[i], valid[i] ? uint8_t{0} : uint8_t{kInvalid});
}
PYDRONE_VERSIONED(void, encode_row, encode_row_body,
                  (uint8_t* codes, const uint8_t* dones, const uint8_t* truncated, const uint8_t* valid, int64_t n),
                  (codes, dones, truncated, valid, n))

template <int>
PYDRONE_INLINE uint8_t highest_code_body(const uint8_t* codes, int64_t n) {
  uint8_t highest = 0;
  for (int64_t i = 0; i < n; ++i) highest = std::max(highest, codes[i]);
  return highest;
}
PYDRONE_VERSIONED(uint8_t, highest_code, highest_code_body, (const uint8_t* codes, int64_t n), (codes, n))

}  // namespace
}  // namespace pydrone
