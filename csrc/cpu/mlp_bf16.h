// What mlp_tile.h's products are made of where operands are bfloat16, two in a float's place: AVX512_BF16's instructions.
// They round to nearest, ties to even, and take denormals for zero.
#include <immintrin.h>

namespace pydrone {
namespace PYDRONE_MLP {

constexpr int64_t kPair = 2;

// a0 b0 + a1 b1 + sum, in float32.
PYDRONE_IN Vec multiply_add(Vec a, Vec b, Vec sum) {
  return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
}

// Pairs of neighbours: of x, then of y.
PYDRONE_IN Vec neighbours(Vec x, Vec y) { return (Vec)_mm512_cvtne2ps_pbh((__m512)y, (__m512)x); }

// Pairs of x's and y's numbers in the same place.
PYDRONE_IN Vec zipped(Vec x, Vec y) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return (Vec)_mm512_permutexvar_epi16(order, (__m512i)neighbours(x, y));
}

// The first `count` of V numbers, which may be none or more than V; zero for the others.
PYDRONE_IN Vec load_some(const float* x, int64_t count) {
  const uint32_t kept = count >= V ? 0xFFFF : count > 0 ? (1u << count) - 1 : 0;
  return (Vec)_mm512_maskz_loadu_ps(static_cast<__mmask16>(kept), x);
}

// Both operands that x [rows, ld] is rounded to: pairs of columns, [kTile, ld / 2], and pairs of rows, [kTile / 2, ld].
// Zero beyond `width` columns. An odd last row is paired with the next, whatever that is.
static void round(const float* x, int64_t ld, int64_t rows, int64_t width, float* to) {
  float* const across = to + kTile * ld / 2;
  for (int64_t n = 0; n < rows; n += 2)
    for (int64_t j = 0; j < width; j += 2 * V) {
      const float *row = x + n * ld + j, *next = row + ld;
      const Vec a = load_some(row, width - j), b = load_some(row + V, width - j - V);
      const Vec c = load_some(next, width - j), d = load_some(next + V, width - j - V);
      store(to + (n * ld + j) / 2, neighbours(a, b));
      store(to + ((n + 1) * ld + j) / 2, neighbours(c, d));
      store(across + n * ld / 2 + j, zipped(a, c));
      if (width - j > V) store(across + n * ld / 2 + j + V, zipped(b, d));
    }
}

}  // namespace PYDRONE_MLP
}  // namespace pydrone
