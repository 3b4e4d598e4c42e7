// Shared by the CPU kernels: versions for several instruction sets, streaming stores, element conversion.
#pragma once

#include "../checks.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstring>

#if defined(__GNUC__)
#define PYDRONE_INLINE inline __attribute__((always_inline))
#else
#define PYDRONE_INLINE inline
#endif

// One wheel for every x86-64: hot loops are compiled three times, and each call picks a version. Other compilers and
// processors have the baseline alone. (target_clones would pick when the library loads, before PYDRONE_ISA is read.)
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define PYDRONE_VERSIONS
#define PYDRONE_V3 __attribute__((target("arch=x86-64-v3")))
#define PYDRONE_V4 __attribute__((target("arch=x86-64-v4")))
#define PYDRONE_BASELINE __attribute__((noinline))  // as the others are; tests/ops/test_isa.py finds it by name
// Defines the function `name`; `body` is an inline template over the bytes of a vector. GCC 12 takes selects of wider
// vectors than the instruction set has apart into scalars.
#define PYDRONE_VERSIONED(result, name, body, parameters, arguments)                       \
  PYDRONE_V4 inline result name##_v4 parameters { return body<64> arguments; }             \
  PYDRONE_V3 inline result name##_v3 parameters { return body<32> arguments; }             \
  PYDRONE_BASELINE inline result name##_baseline parameters { return body<16> arguments; } \
  [[maybe_unused]] inline result name parameters {                                         \
    switch (isa()) {                                                                       \
      case Isa::kV4: return name##_v4 arguments;                                           \
      case Isa::kV3: return name##_v3 arguments;                                           \
      default: return name##_baseline arguments;                                           \
    }                                                                                      \
  }
#else
#define PYDRONE_BASELINE
#define PYDRONE_VERSIONED(result, name, body, parameters, arguments) \
  [[maybe_unused]] inline result name parameters { return body<16> arguments; }
#endif

// Vector types are passed between inlined functions only, so the calling convention does not matter.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"
#endif

#if defined(__SSE2__)
#include <immintrin.h>
#endif

// The sanitizers do not see streaming stores: replace them by plain stores with the same alignment requirement.
#if defined(__SSE2__) && (defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__))
#define _mm_stream_si128 _mm_store_si128
#define _mm256_stream_si256 _mm256_store_si256
#endif

namespace pydrone {

// Vectors of kSize bytes; Half has as many lanes as F64.
template <int kSize>
struct Vectors {
  typedef int32_t I32 __attribute__((vector_size(kSize)));
  typedef uint32_t U32 __attribute__((vector_size(kSize)));
  typedef int64_t I64 __attribute__((vector_size(kSize)));
  typedef uint64_t U64 __attribute__((vector_size(kSize)));
  typedef float F32 __attribute__((vector_size(kSize)));
  typedef double F64 __attribute__((vector_size(kSize)));
  typedef int32_t Half __attribute__((vector_size(kSize / 2)));
};

#if defined(PYDRONE_VERSIONS)
// The products of the lower halves of 64-bit lanes, for which GNU C has no operator. In assembly, because an intrinsic
// cannot be inlined into a template that is compiled for several instruction sets.
template <class V>
PYDRONE_INLINE V multiply_halves(V x, V y) {
  if constexpr (sizeof(V) == 16)
    asm("pmuludq %1, %0" : "+x"(x) : "x"(y));
  else
    asm("vpmuludq %1, %0, %0" : "+v"(x) : "v"(y));
  return x;
}

// The upper halves of the products of 32-bit lanes with n: those of even lanes, and those of odd ones.
template <int kSize>
PYDRONE_INLINE typename Vectors<kSize>::U32 scale32(typename Vectors<kSize>::U32 h, uint32_t n) {
  using U32 = typename Vectors<kSize>::U32;
  using U64 = typename Vectors<kSize>::U64;
  typename Vectors<kSize>::I32 places{};
  for (int i = 0; i < kSize / 4; ++i) places[i] = i % 2 ? kSize / 4 + i : i;
  const U64 x = reinterpret_cast<U64>(h), all = n + U64{};
  const U64 even = multiply_halves(x, all) >> 32, odd = multiply_halves(x >> 32, all);
  return __builtin_shuffle(reinterpret_cast<U32>(even), reinterpret_cast<U32>(odd), places);
}
#endif

enum class Isa { kBaseline, kV3, kV4 };

// The best instruction set of this processor, or the lesser one that PYDRONE_ISA names.
Isa isa();

// Outputs of at least this size bypass the cache: the same core reads them much later, if at all.
constexpr int64_t kStreamBytes = int64_t{2} << 20;

// memcpy with stores that bypass the cache if the destination is aligned (SSE2: 16 bytes, combined into full lines).
inline void stream(void* to, const void* from, int64_t bytes) {
#if defined(__SSE2__)
  auto* target = static_cast<char*>(to);
  auto* source = static_cast<const char*>(from);
  if (reinterpret_cast<uintptr_t>(target) % 16 == 0) {
    int64_t i = 0;
    for (; i + 64 <= bytes; i += 64) {
      const __m128i a = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source + i));
      const __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source + i + 16));
      const __m128i c = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source + i + 32));
      const __m128i d = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source + i + 48));
      _mm_stream_si128(reinterpret_cast<__m128i*>(target + i), a);
      _mm_stream_si128(reinterpret_cast<__m128i*>(target + i + 16), b);
      _mm_stream_si128(reinterpret_cast<__m128i*>(target + i + 32), c);
      _mm_stream_si128(reinterpret_cast<__m128i*>(target + i + 48), d);
    }
    for (; i + 16 <= bytes; i += 16)
      _mm_stream_si128(reinterpret_cast<__m128i*>(target + i),
                       _mm_loadu_si128(reinterpret_cast<const __m128i*>(source + i)));
    std::memcpy(target + i, source + i, bytes - i);
    return;
  }
#endif
  std::memcpy(to, from, bytes);
}

inline void put(void* to, const void* from, int64_t bytes, bool streaming) {
  if (streaming)
    stream(to, from, bytes);
  else
    std::memcpy(to, from, bytes);
}

// Prefetches into L2. In assembly: gcc 12 treats a function that only prefetches as having no effect, and drops calls
// to it.
inline void fetch(const char* from, int64_t bytes) {
#if defined(__GNUC__) && defined(__x86_64__)
  for (int64_t i = 0; i < bytes; i += 64) asm volatile("prefetcht1 %0" : : "m"(from[i]));
#elif defined(__GNUC__) && defined(__aarch64__)
  for (int64_t i = 0; i < bytes; i += 64) asm volatile("prfm pldl2keep, %0" : : "Q"(from[i]));
#else
  (void)from, (void)bytes;
#endif
}

// Prefetches into L1, for data read within a microsecond.
inline void fetch_near(const char* from, int64_t bytes) {
#if defined(__GNUC__) && defined(__x86_64__)
  for (int64_t i = 0; i < bytes; i += 64) asm volatile("prefetcht0 %0" : : "m"(from[i]));
#elif defined(__GNUC__) && defined(__aarch64__)
  for (int64_t i = 0; i < bytes; i += 64) asm volatile("prfm pldl1keep, %0" : : "Q"(from[i]));
#else
  (void)from, (void)bytes;
#endif
}

// Streaming stores are weakly ordered: this makes them visible before another thread reads.
inline void stream_fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// Calls f with a value of the C++ type for a flag's dtype `type`.
template <class F>
inline void for_flag(const char* name, ScalarType type, const F& f) {
  switch (type) {
    case ScalarType::Byte: return f(uint8_t{});
    case ScalarType::Char: return f(int8_t{});
    case ScalarType::Short: return f(int16_t{});
    case ScalarType::Int: return f(int32_t{});
    case ScalarType::Long: return f(int64_t{});
    case ScalarType::UInt16: return f(uint16_t{});
    case ScalarType::UInt32: return f(uint32_t{});
    case ScalarType::UInt64: return f(uint64_t{});
    case ScalarType::Half: return f(torch::headeronly::Half{});
    case ScalarType::Float: return f(float{});
    case ScalarType::Double: return f(double{});
    case ScalarType::Bool: return f(bool{});
    case ScalarType::BFloat16: return f(torch::headeronly::BFloat16{});
    default:
      STD_TORCH_CHECK(false, name, ": dtype ", torch::headeronly::toString(type), " is not supported");
  }
}

template <class F>
inline void for_real(const char* name, ScalarType type, const F& f) {
  switch (type) {
    case ScalarType::Half: return f(torch::headeronly::Half{});
    case ScalarType::Float: return f(float{});
    case ScalarType::Double: return f(double{});
    case ScalarType::BFloat16: return f(torch::headeronly::BFloat16{});
    default:
      STD_TORCH_CHECK(false, name, ": expected a floating dtype, got ", torch::headeronly::toString(type));
  }
}

// Half and BFloat16 convert only by way of float.
template <class To, class From>
PYDRONE_INLINE To convert(From x) {
  constexpr bool narrow = std::is_same_v<From, torch::headeronly::Half> ||
                          std::is_same_v<From, torch::headeronly::BFloat16>;
  constexpr bool to_narrow = std::is_same_v<To, torch::headeronly::Half> ||
                             std::is_same_v<To, torch::headeronly::BFloat16>;
  if constexpr (std::is_same_v<To, From>)
    return x;
  else if constexpr (narrow || to_narrow)
    return static_cast<To>(static_cast<float>(x));
  else
    return static_cast<To>(x);
}

template <class T>
PYDRONE_INLINE bool nonzero(T x) {
  if constexpr (std::is_same_v<T, torch::headeronly::Half> || std::is_same_v<T, torch::headeronly::BFloat16>)
    return static_cast<float>(x) != 0.0f;
  else
    return x != T{0};
}

}  // namespace pydrone
