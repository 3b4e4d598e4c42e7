// Building blocks of mlp_tile.h's products with bfloat16 operands, stored in pairs, two in the place of a float. The
// AVX512_BF16 instructions round to nearest, ties to even, and treat denormals as zero.
#include <immintrin.h>

namespace pydrone {
namespace PYDRONE_MLP {

constexpr int64_t kPair = 2;

// a0 b0 + a1 b1 + sum, in float32.
PYDRONE_IN Vec multiply_add(Vec a, Vec b, Vec sum) {
  return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
}

// Rounds 2 V numbers, keeping their order: each pair holds neighbours.
PYDRONE_IN Vec rounded(Vec x, Vec y) { return (Vec)_mm512_cvtne2ps_pbh((__m512)y, (__m512)x); }

PYDRONE_IN float pair(float first, float second) { return rounded(Vec{first, second}, Vec{})[0]; }

// From such vectors x and y, pairs (x[i], y[i]) for the first V numbers, or for the `others`.
PYDRONE_IN Vec zipped(Vec x, Vec y, bool others) {
  const __m512i order = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37,
                                         5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i picked = others ? _mm512_add_epi16(order, _mm512_set1_epi16(16)) : order;
  return (Vec)_mm512_permutex2var_epi16((__m512i)x, picked, (__m512i)y);
}

// Loads the first `count` of V numbers and zeros for the rest; count may be negative or above V.
PYDRONE_IN Vec load_some(const float* x, int64_t count) {
  if (count >= V) return load(x);
  const uint32_t kept = count > 0 ? (1u << count) - 1 : 0;
  return (Vec)_mm512_maskz_loadu_ps(static_cast<__mmask16>(kept), x);
}

// Rounds x [rows, ld] to both of its uses as an operand: pairs of columns, [kTile, row_ld], then pairs of rows,
// [kTile / 2, ld]. Zero beyond `width` columns. An odd last row is paired with whatever follows it.
static void round(const float* x, int64_t ld, int64_t rows, int64_t width, float* to, int64_t row_ld) {
  float* const across = to + kTile * row_ld;
  for (int64_t n = 0; n < rows; n += 2)
    for (int64_t j = 0; j < width; j += 2 * V) {
      const float *row = x + n * ld + j, *next = row + ld;
      const Vec a = rounded(load_some(row, width - j), load_some(row + V, width - j - V));
      const Vec b = rounded(load_some(next, width - j), load_some(next + V, width - j - V));
      store(to + n * row_ld + j / 2, a);
      store(to + (n + 1) * row_ld + j / 2, b);
      store(across + n * ld / 2 + j, zipped(a, b, false));
      if (width - j > V) store(across + n * ld / 2 + j + V, zipped(a, b, true));
    }
}

}  // namespace PYDRONE_MLP
}  // namespace pydrone
