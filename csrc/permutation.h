// A keyed permutation of [0, size) that needs no memory: an alternating Feistel network over Z_a x Z_b with cycle
// walking (Black and Rogaway, Ciphers with arbitrary finite domains, CT-RSA 2002). It uses 32-bit unsigned arithmetic
// only, so that all backends agree bit for bit; pydrone/ops/reference.py has the plain form.
#pragma once

#include <cmath>
#include <cstdint>

#include "recurrence.h"

namespace pydrone {

constexpr int kRounds = 8;

// A 32-bit bijection with low bias (C. Wellons, hash-prospector, "lowbias32").
PYDRONE_HD uint32_t mix32(uint32_t x) {
  x ^= x >> 16;
  x *= 0x7FEB352Du;
  x ^= x >> 15;
  x *= 0x846CA68Bu;
  return x ^ (x >> 16);
}

template <class U32>  // uint32_t, or a vector of them
PYDRONE_HD U32 feistel_round(U32 x, U32 key) {
  U32 h = (x ^ key) * 0x9E3779B1u;
  h ^= h >> 15;
  return h * 0x85EBCA77u;
}

// Maps a uniform 32-bit h to [0, n): the high word of their product.
PYDRONE_HD uint32_t scale32(uint32_t h, uint32_t n) { return static_cast<uint32_t>((uint64_t(h) * n) >> 32); }

struct Permutation {
  uint32_t size;        // at most 2^31 - 1
  uint32_t a, b;        // a = ceil(sqrt(size)), b = ceil(size / a)
  uint32_t keys[kRounds];

  // The round keys from (key, rollout, epoch): two 32-bit lanes absorb one word at a time.
  PYDRONE_HD void set_keys(uint64_t key, uint64_t rollout, uint64_t epoch) {
    const uint32_t words[5] = {uint32_t(key), uint32_t(key >> 32), uint32_t(rollout), uint32_t(rollout >> 32),
                               uint32_t(epoch)};
    uint32_t k0 = 0x243F6A88u, k1 = 0x85A308D3u;
    for (int i = 0; i < 5; ++i) {
      k0 = mix32(k0 ^ words[i]);
      k1 = mix32(k1 + words[i] + k0);
    }
    for (int i = 0; i < kRounds; ++i) keys[i] = mix32((i % 2 ? k1 : k0) + uint32_t(i + 1) * 0x9E3779B9u);
  }

  // One pass over (left, right) in Z_a x Z_b; the result is below a * b. The sum of two numbers below n needs one
  // subtraction to be reduced modulo n.
  PYDRONE_HD uint32_t apply(uint32_t left, uint32_t right) const {
    for (int i = 0; i < kRounds; i += 2) {
      left += scale32(feistel_round(right, keys[i]), a);
      left -= left >= a ? a : 0u;
      right += scale32(feistel_round(left, keys[i + 1]), b);
      right -= right >= b ? b : 0u;
    }
    return left * b + right;
  }

  // The image of `position` < size. The few values in [size, a * b) are passed through again (cycle walking); a share
  // of about size / (a * b) of the positions, nearly all, needs one pass.
  PYDRONE_HD uint32_t operator()(uint32_t position) const {
    uint32_t x = position;
    do {
      x = apply(x / b, x % b);
    } while (x >= size);
    return x;
  }
};

// The permutation of `size` samples (0 < size < 2^31): side lengths and round keys.
inline Permutation make_permutation(int64_t size, uint64_t key, uint64_t rollout, uint64_t epoch) {
  Permutation p{};
  int64_t root = static_cast<int64_t>(std::sqrt(static_cast<double>(size - 1)));
  while (root * root > size - 1) --root;
  while ((root + 1) * (root + 1) <= size - 1) ++root;
  p.size = static_cast<uint32_t>(size);
  p.a = static_cast<uint32_t>(root + 1);
  p.b = static_cast<uint32_t>((size + p.a - 1) / p.a);
  p.set_keys(key, rollout, epoch);
  return p;
}

}  // namespace pydrone
