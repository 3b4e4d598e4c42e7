// Shared by the CUDA kernels: launch context, access to elements of any dtype and stride, finding the last block.
#pragma once

#include "../checks.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <optional>

namespace pydrone {

// Elements of the cursor; same as in pydrone/ops/schema.py.
enum Cursor : int { kAppended = 0, kDiscarded = 1, kFlag = 2, kTicket = 3, kNumSteps = 4 };

// Makes the tensor's device current, if it is not, and holds its current stream. Asks CUDA as little as it can: its calls
// are much of what a launch costs on the host.
class Launch {
 public:
  explicit Launch(const Tensor& tensor) {
    const auto device = tensor.get_device_index();
    static const bool several = [] {
      int count = 0;
      STD_CUDA_CHECK(cudaGetDeviceCount(&count));
      return count > 1;
    }();
    if (several) {
      int current = -1;
      STD_CUDA_CHECK(cudaGetDevice(&current));
      if (current != device) guard_.emplace(device);
    }
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
    this->stream = static_cast<cudaStream_t>(stream);
  }

  cudaStream_t stream;

 private:
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
};

inline void check_element(const char* name, const Tensor& x) { item_size(name, static_cast<int64_t>(x.scalar_type())); }

// A tensor [N, C] or [N] of any dtype and strides (in elements).
struct Plane {
  const char* data = nullptr;
  int64_t env = 0, step = 0;
  int32_t type = 0;
  int8_t size = 0;  // bytes per element
  bool real = false;

  Plane() = default;
  explicit Plane(const Tensor& x)
      : data(static_cast<const char*>(x.data_ptr())),
        env(x.stride(0)),
        step(x.dim() > 1 ? x.stride(1) : 0),
        type(static_cast<int32_t>(x.scalar_type())),
        size(static_cast<int8_t>(x.element_size())),
        real(is_real(x.scalar_type())) {}

  __device__ int64_t at(int64_t n, int64_t slot) const { return n * env + slot * step; }
};

// Reads a floating-point element; the host has checked the dtype. Few branches: deeply nested ones cost registers.
template <typename T>
__device__ inline T read_real(const char* data, int32_t type, int64_t i) {
  if (type == static_cast<int32_t>(ScalarType::Float)) return static_cast<T>(reinterpret_cast<const float*>(data)[i]);
  if (type == static_cast<int32_t>(ScalarType::Double)) return static_cast<T>(reinterpret_cast<const double*>(data)[i]);
  const uint16_t bits = reinterpret_cast<const uint16_t*>(data)[i];
  const float half = __half2float(__ushort_as_half(bits)), brain = __uint_as_float(static_cast<uint32_t>(bits) << 16);
  return static_cast<T>(type == static_cast<int32_t>(ScalarType::Half) ? half : brain);
}

// x != 0 for any dtype, from its bits without the sign of floating types. NaN is true.
__device__ inline bool read_flag(const Plane& plane, int64_t i) {
  uint64_t bits;
  if (plane.size == 1)
    bits = reinterpret_cast<const uint8_t*>(plane.data)[i];
  else if (plane.size == 2)
    bits = static_cast<uint64_t>(reinterpret_cast<const uint16_t*>(plane.data)[i]) << 48;
  else if (plane.size == 4)
    bits = static_cast<uint64_t>(reinterpret_cast<const uint32_t*>(plane.data)[i]) << 32;
  else
    bits = reinterpret_cast<const uint64_t*>(plane.data)[i];
  return (plane.real ? bits << 1 : bits) != 0;
}

// Writes a floating-point number as `type`; double converts to 16-bit types by way of float, as in torch.
__device__ inline void write_real(char* data, int32_t type, int64_t i, double x) {
  const auto narrow = static_cast<float>(x);
  if (type == static_cast<int32_t>(ScalarType::Float))
    reinterpret_cast<float*>(data)[i] = narrow;
  else if (type == static_cast<int32_t>(ScalarType::Double))
    reinterpret_cast<double*>(data)[i] = x;
  else
    reinterpret_cast<uint16_t*>(data)[i] = type == static_cast<int32_t>(ScalarType::Half)
                                               ? __half_as_ushort(__float2half(narrow))
                                               : __bfloat16_as_ushort(__float2bfloat16(narrow));
}

// The ring slot of counter `k`. Unsigned, so that even a corrupt cursor stays within bounds.
__device__ inline int64_t ring_slot(int64_t k, int64_t capacity) {
  return static_cast<int64_t>(static_cast<uint64_t>(k) % static_cast<uint64_t>(capacity));
}

// Adds to a counter that all blocks share and returns what it was. What this thread wrote before it, and behind a
// barrier its block, is seen by whoever reads the counter afterwards. One fence, where __threadfence() before and after
// an atomicAdd are two, each of them sequentially consistent.
__device__ inline uint64_t fetch_add(uint64_t* counter, uint64_t x) {
  uint64_t before;
  asm volatile("atom.add.acq_rel.gpu.global.u64 %0, [%1], %2;"
               : "=l"(before)
               : "l"(__cvta_generic_to_global(counter)), "l"(x)
               : "memory");
  return before;
}

// Returns true in every thread of the last of `blocks` to arrive. That block sees all writes of the others, and the
// others have finished reading. It must reset the counter.
__device__ inline bool last_block(uint64_t* ticket, uint64_t blocks) {
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0) last = fetch_add(ticket, 1) == blocks - 1;
  __syncthreads();
  return last;
}

}  // namespace pydrone
