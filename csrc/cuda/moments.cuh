// (count, mean, M2) of the advantages: per warp, per block and, through the workspace, for the whole launch.
#pragma once

#include "common.cuh"

namespace pydrone {

constexpr unsigned kAll = 0xFFFFFFFFu;

struct Moments {
  double count, mean, m2;
};

template <typename T>
__device__ inline T warp_sum(T x) {
#pragma unroll
  for (int d = 16; d; d /= 2) x += __shfl_xor_sync(kAll, x, d);
  return x;
}

// The sums of `a` and of `b`, valid in lane 0: half of the lanes sum `a`, the other half `b`.
template <typename T>
struct Sums {
  T a, b;
};
template <typename T>
__device__ inline Sums<T> warp_sums(T a, T b) {
  const bool upper = threadIdx.x & 16;
  T x = (upper ? b : a) + __shfl_xor_sync(kAll, upper ? a : b, 16);
#pragma unroll
  for (int d = 8; d; d /= 2) x += __shfl_xor_sync(kAll, x, d);
  return {x, __shfl_xor_sync(kAll, x, 16)};
}

// (count, mean, M2) of `count` numbers, from the sums of their deviations from `near`, a number near their mean, and of
// the squared deviations. A mean rounded to T has an error that may be large compared to the numbers' spread.
template <typename T>
__device__ inline Moments moments_about(T near, int count, T deviations, T squares) {
  const double n = count, offset = deviations / (n > 0 ? n : 1), m2 = squares - n * offset * offset;
  return {n, near + offset, m2 < 0 ? 0 : m2};
}

// Merges the moments of two samples (Chan, Golub and LeVeque 1979).
__device__ inline Moments merge(const Moments& a, const Moments& b) {
  const double count = a.count + b.count, share = b.count / (count > 0 ? count : 1), difference = b.mean - a.mean;
  return {count, a.mean + difference * share, a.m2 + b.m2 + difference * difference * a.count * share};
}

// Merges the moments of the first `lanes` lanes (a power of two), in sums about the first lane's mean: one pass without
// cancellation. The order of the sums depends on `lanes` only.
__device__ inline Moments warp_merge(const Moments& own, int lanes) {
  const double about = __shfl_sync(kAll, own.mean, 0), offset = own.count > 0 ? own.mean - about : 0;
  double count = own.count, first = own.count * offset, second = own.m2 + own.count * offset * offset;
  for (int d = lanes / 2; d; d /= 2) {
    count += __shfl_xor_sync(kAll, count, d);
    first += __shfl_xor_sync(kAll, first, d);
    second += __shfl_xor_sync(kAll, second, d);
  }
  const double mean = first / (count > 0 ? count : 1), m2 = second - count * mean * mean;
  return {count, count > 0 ? about + mean : 0, m2 < 0 ? 0 : m2};
}

// Merges the `entries` (a power of two, at most 32) of `parts` and stores them in the workspace; the last block merges
// those of all blocks. Which block is last changes from run to run; the order of the sums does not.
__device__ inline void finish_stats(double* stats, double* partials, uint32_t* ticket, Moments* parts, int entries) {
  const int lane = threadIdx.x % 32, warps = blockDim.x / 32;
  const int64_t blocks = gridDim.x;
  __syncthreads();
  if (threadIdx.x < 32) {
    const Moments block = warp_merge(lane < entries ? parts[lane] : Moments{}, entries);
    if (lane == 0) {
      partials[blockIdx.x] = block.count;
      partials[blocks + blockIdx.x] = block.mean;
      partials[2 * blocks + blockIdx.x] = block.m2;
    }
  }
  if (!last_block(ticket, static_cast<uint32_t>(blocks))) return;
  Moments own{};
  for (int64_t i = threadIdx.x; i < blocks; i += blockDim.x) {
    const Moments part{__ldcg(partials + i), __ldcg(partials + blocks + i),
                       __ldcg(partials + 2 * blocks + i)};
    own = i < blockDim.x ? part : merge(own, part);
  }
  own = warp_merge(own, 32);
  if (lane == 0) parts[threadIdx.x / 32] = own;
  __syncthreads();
  if (threadIdx.x >= 32) return;
  own = warp_merge(lane < warps ? parts[lane] : Moments{}, warps);
  if (lane == 0) {
    stats[0] = own.count;
    stats[1] = own.mean;
    stats[2] = own.m2;
    *ticket = 0;
  }
}

}  // namespace pydrone
