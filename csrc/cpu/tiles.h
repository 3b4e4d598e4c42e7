// Tiles of a logical [N, C] plane, read into [steps, envs] order and written back: kTileSteps x kTileEnvs, small enough
// for L1. Planes with contiguous steps are transposed in vector registers.
#pragma once

#include "common.h"

#include <algorithm>
#include <type_traits>

namespace pydrone {
namespace {

constexpr int64_t kTileEnvs = 128;
constexpr int64_t kTileSteps = 16;

// A logical [N, C] argument; strides in bytes.
struct Plane {
  char* data = nullptr;
  int64_t env = 0;
  int64_t step = 0;
  ScalarType type = ScalarType::Float;

  Plane() = default;
  explicit Plane(const Tensor& x)
      : data(static_cast<char*>(x.data_ptr())),
        env(x.stride(0) * static_cast<int64_t>(x.element_size())),
        step(x.dim() > 1 ? x.stride(1) * static_cast<int64_t>(x.element_size()) : 0),
        type(x.scalar_type()) {}

  char* at(int64_t n, int64_t t) const { return data + n * env + t * step; }
  // Whether environments are contiguous, with dtype `wanted`; and whether steps are.
  bool direct(ScalarType wanted, int64_t size) const { return type == wanted && env == size; }
  bool row_major(ScalarType wanted, int64_t size) const { return type == wanted && step == size && env != size; }
};

// Clang has no shuffle by an index vector: there elements are moved one by one.
#if defined(__GNUC__) && !defined(__clang__)
#define PYDRONE_SQUARES
// A kSize x kSize square of elements; a Row is one vector of kBytes.
template <class T, int kBytes>
struct Square {
  using Integer = std::conditional_t<sizeof(T) == 1, uint8_t, std::conditional_t<sizeof(T) == 4, int32_t, int64_t>>;
  typedef T Row __attribute__((vector_size(kBytes)));
  typedef Integer Mask __attribute__((vector_size(kBytes)));
  static constexpr int kSize = kBytes / sizeof(T);
};

// Swaps the off-diagonal quarters of each 2 D x 2 D square; with D = kSize / 2 ... 1 in turn, this is a transpose.
template <class Kind, int D>
PYDRONE_INLINE void swap_quarters(typename Kind::Row* rows) {
  constexpr int kSize = Kind::kSize;
  typename Kind::Mask low{}, high{};
  for (int j = 0; j < kSize; ++j) {
    low[j] = j & D ? kSize + j - D : j;
    high[j] = j & D ? kSize + j : j + D;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kSize; ++i) {
    if (i & D) continue;
    const auto upper = rows[i], lower = rows[i + D];
    rows[i] = __builtin_shuffle(upper, lower, low);
    rows[i + D] = __builtin_shuffle(upper, lower, high);
  }
}

// Interleaves row i with row i + kSize / 2, for which vectors of 16 bytes have instructions; log2(kSize) times, this is a
// transpose.
template <class Kind>
PYDRONE_INLINE void interleave(typename Kind::Row* rows) {
  constexpr int kSize = Kind::kSize, kHalf = kSize / 2;
  typename Kind::Mask low{}, high{};
  for (int j = 0; j < kSize; ++j) {
    low[j] = j / 2 + (j % 2 ? kSize : 0);
    high[j] = low[j] + kHalf;
  }
  typename Kind::Row before[kSize];
#pragma GCC unroll 16
  for (int i = 0; i < kSize; ++i) before[i] = rows[i];
#pragma GCC unroll 16
  for (int i = 0; i < kHalf; ++i) {
    rows[2 * i] = __builtin_shuffle(before[i], before[i + kHalf], low);
    rows[2 * i + 1] = __builtin_shuffle(before[i], before[i + kHalf], high);
  }
}

// All loops are unrolled: rows that are indexed by a variable would go through memory.
template <class Kind>
PYDRONE_INLINE void transpose_square(char* to, int64_t to_row, const char* from, int64_t from_row) {
  constexpr int kSize = Kind::kSize;
  using Row = typename Kind::Row;
  Row rows[kSize];
#pragma GCC unroll 16
  for (int i = 0; i < kSize; ++i) std::memcpy(&rows[i], from + i * from_row, sizeof(Row));
  if constexpr (sizeof(Row) == 16) {
#pragma GCC unroll 4
    for (int size = 1; size < kSize; size *= 2) interleave<Kind>(rows);
  } else {
    if constexpr (kSize > 4) swap_quarters<Kind, 4>(rows);
    swap_quarters<Kind, 2>(rows);
    swap_quarters<Kind, 1>(rows);
  }
#pragma GCC unroll 16
  for (int i = 0; i < kSize; ++i) std::memcpy(to + i * to_row, &rows[i], sizeof(Row));
}
#endif

// to[c][r] = from[r][c]; to_row and from_row are row strides in bytes.
template <int kVector, class T>
PYDRONE_INLINE void transpose_body(T* to_first, int64_t to_row, const T* from_first, int64_t from_row, int64_t rows,
                                   int64_t columns) {
  auto* const to = reinterpret_cast<char*>(to_first);
  auto* const from = reinterpret_cast<const char*>(from_first);
  int64_t whole_rows = 0, whole_columns = 0;
#if defined(PYDRONE_SQUARES)
  using Kind = Square<T, sizeof(T) == 1 ? 16 : std::min(kVector, 32)>;
  constexpr int kSize = Kind::kSize;
  whole_rows = rows / kSize * kSize, whole_columns = columns / kSize * kSize;
  for (int64_t r = 0; r < whole_rows; r += kSize)
    for (int64_t c = 0; c < whole_columns; c += kSize)
      transpose_square<Kind>(to + c * to_row + r * sizeof(T), to_row, from + r * from_row + c * sizeof(T), from_row);
#endif
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = r < whole_rows ? whole_columns : 0; c < columns; ++c)
      std::memcpy(to + c * to_row + r * sizeof(T), from + r * from_row + c * sizeof(T), sizeof(T));
}

#define PYDRONE_TRANSPOSE(T)                                                                                     \
  PYDRONE_VERSIONED(void, transpose, transpose_body,                                                             \
                    (T * to, int64_t to_row, const T* from, int64_t from_row, int64_t rows, int64_t columns),    \
                    (to, to_row, from, from_row, rows, columns))
PYDRONE_TRANSPOSE(float)
PYDRONE_TRANSPOSE(double)
PYDRONE_TRANSPOSE(uint8_t)
#undef PYDRONE_TRANSPOSE

// dst[t * ld + n] = f(src(n, t)); the inner loop runs along the source's dimension with the smaller stride.
template <class To, class From, class F>
inline void read_tile(To* dst, int64_t ld, const Plane& src, int64_t n0, int64_t envs, int64_t t0, int64_t steps,
                      const F& f) {
  if (src.env == sizeof(From)) {
    for (int64_t t = 0; t < steps; ++t) {
      const auto* row = reinterpret_cast<const From*>(src.at(n0, t0 + t));
      for (int64_t n = 0; n < envs; ++n) dst[t * ld + n] = f(row[n]);
    }
  } else if (src.env <= src.step || steps == 1) {
    for (int64_t t = 0; t < steps; ++t)
      for (int64_t n = 0; n < envs; ++n)
        dst[t * ld + n] = f(*reinterpret_cast<const From*>(src.at(n0 + n, t0 + t)));
  } else {
    for (int64_t n = 0; n < envs; ++n)
      for (int64_t t = 0; t < steps; ++t)
        dst[t * ld + n] = f(*reinterpret_cast<const From*>(src.at(n0 + n, t0 + t)));
  }
}

template <class T>
constexpr ScalarType kTypeOf = std::is_same_v<T, float> ? ScalarType::Float : ScalarType::Double;

template <class T>
void read_reals(const char* name, T* dst, int64_t ld, const Plane& src, int64_t n0, int64_t envs, int64_t t0,
                int64_t steps) {
  if (steps > 1 && src.row_major(kTypeOf<T>, sizeof(T)))
    return transpose(dst, ld * sizeof(T), reinterpret_cast<const T*>(src.at(n0, t0)), src.env, envs, steps);
  for_real(name, src.type, [&](auto kind) {
    using From = decltype(kind);
    read_tile<T, From>(dst, ld, src, n0, envs, t0, steps, [](From x) { return convert<T>(x); });
  });
}

// read_bytes copies bytes as they are; read_flags turns flags of other sizes into 0 or 1.
inline void read_bytes(uint8_t* dst, int64_t ld, const Plane& src, int64_t n0, int64_t envs, int64_t t0, int64_t steps) {
  if (steps > 1 && src.step == 1 && src.env != 1)
    return transpose(dst, ld, reinterpret_cast<const uint8_t*>(src.at(n0, t0)), src.env, envs, steps);
  read_tile<uint8_t, uint8_t>(dst, ld, src, n0, envs, t0, steps, [](uint8_t x) { return x; });
}

inline void read_flags(const char* name, uint8_t* dst, int64_t ld, const Plane& src, int64_t n0, int64_t envs,
                       int64_t t0, int64_t steps) {
  if (src.type == ScalarType::Bool || src.type == ScalarType::Byte || src.type == ScalarType::Char)
    return read_bytes(dst, ld, src, n0, envs, t0, steps);
  for_flag(name, src.type, [&](auto kind) {
    using From = decltype(kind);
    read_tile<uint8_t, From>(dst, ld, src, n0, envs, t0, steps, [](From x) -> uint8_t { return nonzero(x); });
  });
}

template <class T>
void write_tile(const Plane& dst, const T* src, int64_t ld, int64_t n0, int64_t envs, int64_t t0, int64_t steps) {
  if (steps > 1 && dst.row_major(kTypeOf<T>, sizeof(T)))
    return transpose(reinterpret_cast<T*>(dst.at(n0, t0)), dst.env, src, ld * sizeof(T), steps, envs);
  if (dst.env <= dst.step) {
    for (int64_t t = 0; t < steps; ++t)
      for (int64_t n = 0; n < envs; ++n) *reinterpret_cast<T*>(dst.at(n0 + n, t0 + t)) = src[t * ld + n];
  } else {
    for (int64_t n = 0; n < envs; ++n)
      for (int64_t t = 0; t < steps; ++t) *reinterpret_cast<T*>(dst.at(n0 + n, t0 + t)) = src[t * ld + n];
  }
}

}  // namespace
}  // namespace pydrone
