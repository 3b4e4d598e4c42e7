// Test kernels for the emulation: 64 threads that reverse or sum 64 numbers, most with a mistake it must detect.
#include <torch/csrc/stable/tensor.h>

#include <cuda_runtime.h>

namespace {

using torch::stable::Tensor;

constexpr unsigned kAll = 0xFFFFFFFFu;

struct Args {
  const float* in;
  float* out;
  unsigned* ticket;
};

template <bool Barrier>
__global__ void reverse(const __grid_constant__ Args args) {
  __shared__ float numbers[64];
  numbers[threadIdx.x] = args.in[threadIdx.x];
  if (Barrier) __syncthreads();
  args.out[threadIdx.x] = numbers[63 - threadIdx.x];
}

template <bool All>
__global__ void sum_of_warps(const __grid_constant__ Args args) {
  float x = args.in[threadIdx.x];
  if (!All && threadIdx.x % 32 == 31) return;
  for (int d = 16; d; d /= 2) x += __shfl_xor_sync(kAll, x, d);
  args.out[threadIdx.x] = x;
}

__global__ void two_shuffles(const __grid_constant__ Args args) {
  const float x = args.in[threadIdx.x];
  args.out[threadIdx.x] = threadIdx.x % 2 ? __shfl_sync(kAll, x, 0) : __shfl_up_sync(kAll, x, 1);
}

__global__ void barrier_for_one_warp(const __grid_constant__ Args args) {
  float x = args.in[threadIdx.x];
  if (threadIdx.x < 32)
    __syncthreads();
  else if (threadIdx.x == 32)
    x = __shfl_sync(kAll, x, 0);
  args.out[threadIdx.x] = x;
}

__global__ void half_a_mask(const __grid_constant__ Args args) {
  args.out[threadIdx.x] = __shfl_sync(0xFFFFu, args.in[threadIdx.x], 0);
}

// Reverses twice. Without a second array, a warp may write the second time before another has read the first.
template <bool Twice>
__global__ void reverse_again(const __grid_constant__ Args args) {
  __shared__ float numbers[128];
  float x = args.in[threadIdx.x];
  for (int i = 0; i < 2; ++i) {
    float* const side = numbers + (Twice ? 64 * i : 0);
    side[threadIdx.x] = __shfl_sync(kAll, x, threadIdx.x % 32);
    __syncthreads();
    x = side[63 - threadIdx.x];
  }
  args.out[threadIdx.x] = x;
}

// Records the order of blocks: each stores its ticket.
__global__ void tickets(const __grid_constant__ Args args) {
  if (threadIdx.x == 0) args.out[blockIdx.x] = static_cast<float>(atomicAdd(args.ticket, 1u));
}

__global__ void much_shared(const __grid_constant__ Args args) {
  extern __shared__ uint4 asked[];
  __shared__ float numbers[64];
  numbers[threadIdx.x] = args.in[threadIdx.x];
  args.out[threadIdx.x] = numbers[threadIdx.x] + static_cast<float>(asked[0].x);
}

void run(int64_t kind, const Tensor& in, const Tensor& out) {
  unsigned ticket = 0;
  const Args args{static_cast<const float*>(in.data_ptr()), static_cast<float*>(out.data_ptr()), &ticket};
  auto* kernel = kind == 0   ? reverse<true>
                 : kind == 1 ? reverse<false>
                 : kind == 2 ? sum_of_warps<true>
                 : kind == 3 ? sum_of_warps<false>
                 : kind == 4 ? two_shuffles
                 : kind == 5 ? barrier_for_one_warp
                 : kind == 6 ? half_a_mask
                 : kind == 7 ? tickets
                 : kind == 10 ? reverse_again<true>
                 : kind == 11 ? reverse_again<false>
                              : much_shared;
  const dim3 grid(kind == 7 ? 64 : 1, kind == 9 ? 70000 : 1);
  const size_t shared = kind == 8 ? 48 << 10 : 0;
  kernel<<<grid, 64, shared, nullptr>>>(args);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pydrone, CUDA, m) { m.impl("mistake", TORCH_BOX(&run)); }
