// (count, mean, M2) of the advantages, from sums in a fixed order: of a thread's steps, a warp, a block and, through the
// workspace, the launch.
//
// What follows a launch's last load adds to its time, so there is little of it: one pass, one barrier, one fence, one
// atomic, one load a lane, by one warp.
#pragma once

#include "common.cuh"

namespace pydrone {

constexpr unsigned kAll = 0xFFFFFFFFu;
constexpr int kMostWarps = 16;  // in a block

// Number, sum and sum of squares. About 0 and in float64: float32 numbers lose nothing unless their mean is a million
// times their spread.
struct Sums {
  int32_t count = 0;
  double first = 0, second = 0;

  // Adds K numbers, first summed about one of them in their own precision, since converting takes longer than adding.
  template <typename T, int K, class IsValid>
  __device__ void add(const T (&x)[K], const IsValid& is_valid) {
    T pivot = 0, deviations = 0, squares = 0;
    int32_t valid = 0;
#pragma unroll
    for (int k = 0; k < K; ++k) pivot = is_valid(k) ? x[k] : pivot;
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const T deviation = is_valid(k) ? x[k] - pivot : T(0);
      deviations += deviation;
      squares += deviation * deviation;
      valid += is_valid(k);
    }
    const double about = pivot, off = deviations, sum = valid * about + off;
    count += valid;
    first += sum;
    second += about * (sum + off) + squares;
  }
};

// Adds up `x` over each half of the warp. In every lane.
__device__ inline double half_sum(double x) {
#pragma unroll
  for (int d = 8; d; d /= 2) x += __shfl_xor_sync(kAll, x, d);
  return x;
}

// The warp's sum of `first` in the lower half of its lanes, of `second` in the upper half.
__device__ inline double warp_sums(double first, double second) {
  const bool upper = threadIdx.x & 16;
  return half_sum((upper ? second : first) + __shfl_xor_sync(kAll, upper ? first : second, 16));
}

// The statistics of the launch from the sums of each thread. `ticket` counts blocks in its low 16 bits and samples in
// the others: integers, whose sum does not depend on the order. Which block is last changes from run to run; the order
// in which it adds the blocks' sums does not. Called by all threads of at most kMostWarps warps.
__device__ inline void finish_stats(double* stats, double2* partials, uint64_t* ticket, const Sums& own) {
  constexpr int kBatch = 8;  // loads in flight
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32, blocks = gridDim.x;
  __shared__ double sums[2 * kMostWarps];
  __shared__ uint32_t counts[kMostWarps];
  const double of_warp = warp_sums(own.first, own.second);
  const uint32_t in_warp = __reduce_add_sync(kAll, static_cast<uint32_t>(own.count));
  if (lane % 16 == 0) sums[lane + warp] = of_warp;
  if (lane == 0) counts[warp] = in_warp;
  __syncthreads();
  if (warp != 0) return;

  const double of_block = half_sum(lane % 16 < warps ? sums[lane] : 0.0), second = __shfl_sync(kAll, of_block, 16);
  const uint32_t part = lane < warps ? counts[lane] : 0u;
  const uint64_t in_block = __reduce_add_sync(kAll, part & 0xFFFFu) +
                            (static_cast<uint64_t>(__reduce_add_sync(kAll, part >> 16)) << 16);
  uint64_t before = 0;
  if (lane == 0) {
    partials[blockIdx.x] = double2{of_block, second};
    before = fetch_add(ticket, in_block << 16 | 1);
  }
  before = __shfl_sync(kAll, before, 0);
  __syncwarp();  // what lane 0 has acquired, the others may read
  if ((before & 0xFFFFu) != static_cast<unsigned>(blocks - 1)) return;

  double2 total{0, 0};
  for (int i0 = lane; i0 < blocks; i0 += 32 * kBatch) {
    double2 x[kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) x[j] = i0 + 32 * j < blocks ? __ldcg(partials + i0 + 32 * j) : double2{0, 0};
#pragma unroll
    for (int d = kBatch / 2; d; d /= 2)
#pragma unroll
      for (int j = 0; j < d; ++j) x[j].x += x[j + d].x, x[j].y += x[j + d].y;
    total.x += x[0].x, total.y += x[0].y;
  }
  const double x = warp_sums(total.x, total.y), squares = __shfl_sync(kAll, x, 16);
  if (lane == 0) {
    const double count = static_cast<double>((before >> 16) + in_block), mean = count > 0 ? x / count : 0;
    const double m2 = squares - x * mean;
    stats[0] = count;
    stats[1] = mean;
    stats[2] = m2 < 0 ? 0 : m2;  // keeps NaN
    *ticket = 0;
  }
}

}  // namespace pydrone
