// (count, mean, M2) of the advantages: within a warp, a block and, by way of the workspace, the whole launch.
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

// The sums of `a` and of `b` in lane 0: half of the lanes add the ones, half the others.
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

// (count, mean, M2) of `count` numbers, from the sums of their deviations from some number near their mean and of
// the squares of these. A mean in T is off by its rounding, which may be large beside the numbers' spread.
template <typename T>
__device__ inline Moments moments_about(T near, int count, T deviations, T squares) {
  const double n = count, offset = deviations / (n > 0 ? n : 1), m2 = squares - n * offset * offset;
  return {n, near + offset, m2 < 0 ? 0 : m2};
}

// Joins two samples (Chan, Golub and LeVeque 1979).
__device__ inline Moments merge(const Moments& a, const Moments& b) {
  const double count = a.count + b.count, share = b.count / (count > 0 ? count : 1), difference = b.mean - a.mean;
  return {count, a.mean + difference * share, a.m2 + b.m2 + difference * difference * a.count * share};
}

// Joins the samples of the first `lanes` lanes, a power of two: by sums about the first one's mean, so that one pass
// does without cancellation. The order depends on nothing but `lanes`.
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

// Leaves the block's statistics, the `entries` (a power of two, at most 32) of `parts`, in the workspace; the last
// block merges all blocks'. Which one is the last changes from run to run; the order of the sums does not.
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
