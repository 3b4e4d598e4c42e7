// Replaces CUDA's header of this name: the part of CUDA that csrc/cuda uses, emulated on one CPU thread.
//
// A CUDA thread runs until it must wait for others of its block. The order of threads and of blocks is random, and some
// warps run far ahead of others. Shared memory is new in every block and filled with NaN. A missing barrier therefore
// reads NaN or what comes later, and a sum that depends on which block comes last changes from run to run. Whatever would
// hang, fail or be undefined on a GPU is an error: warps that diverge before a shuffle, a barrier that some threads never
// reach, launches that are too large.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <exception>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __launch_bounds__(...)

// The operations are registered for CPU tensors, under a library name of their own.
#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY_IMPL(ns, key, m) _STABLE_TORCH_LIBRARY_IMPL(pydrone_emulated, CPU, m, C10_UID)
#undef STD_CUDA_CHECK
#undef STD_CUDA_KERNEL_LAUNCH_CHECK
#define STD_CUDA_CHECK(call) call
#define STD_CUDA_KERNEL_LAUNCH_CHECK()

struct uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulated {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

constexpr int kWarp = 32;
constexpr size_t kStack = 128 << 10, kMostShared = 48 << 10;  // what a launch gets without asking for more

struct Stack {
  ucontext_t context;  // where it begins
  jmp_buf jump;        // where it waits: a jump, unlike swapcontext, makes no system call
  bool begun = false;
  std::unique_ptr<char[]> memory{new char[kStack]};
};

struct Thread {
  // A thread in kShuffle waits until all 32 threads of its warp are in the same `call`.
  enum State { kReady, kBarrier, kShuffle, kDone } state;
  const char* call;
  uint64_t given, lanes[kWarp];  // the bits it gave, and those of all lanes
  Stack* stack;                  // the one it waits on
};

class Block {
 public:
  // Runs `body` in this many threads.
  template <class F>
  void run(unsigned threads, size_t dynamic, const F& body, std::mt19937& random) {
    body_ = &body;
    call_ = [](const void* f) { (*static_cast<const F*>(f))(); };
    error_ = nullptr;
    shared_.clear();
    if (dynamic) shared(nullptr, dynamic);
    threads_.assign(threads, Thread{Thread::kReady});
    order_.resize(threads);
    std::iota(order_.begin(), order_.end(), 0u);
    std::shuffle(order_.begin(), order_.end(), random);
    next_ = 0;
    for (size_t i = 0; next_ < threads; ++i) {
      if (i == stacks_.size()) stacks_.push_back(std::make_unique<Stack>());
      ucontext_t& context = stacks_[i]->context;
      getcontext(&context);
      context.uc_stack.ss_sp = stacks_[i]->memory.get();
      context.uc_stack.ss_size = kStack;
      makecontext(&context, &Block::begin, 0);
      stacks_[i]->begun = false;
      enter(*stacks_[i]);
    }
    // Warps that are held run when the others can do nothing more, so that some are far ahead.
    for (uint32_t held = random(); released();) {
      std::shuffle(order_.begin(), order_.end(), random);
      bool any = false;
      for (const unsigned i : order_) {
        if (threads_[i].state != Thread::kReady || held >> i / kWarp & 1) continue;
        any = true;
        become(i);
        enter(*threads_[i].stack);
      }
      if (!any) held = random();
    }
    for (const Thread& thread : threads_)
      if (thread.state != Thread::kDone) throw Error("threads wait for each other: " + whereabouts());
    size_t bytes = 0;
    for (const auto& [place, variable] : shared_) bytes += variable.second;
    if (bytes > kMostShared) throw Error(std::to_string(bytes) + " bytes of shared memory, expected 49152 at most");
  }

  void barrier() { wait(Thread::kBarrier, "__syncthreads"); }

  // The bits given by each lane of the warp.
  template <typename T>
  const uint64_t* shuffle(const char* call, unsigned mask, T x) {
    static_assert(sizeof(T) <= 8);
    if (mask != 0xFFFFFFFFu) throw Error(std::string(call) + ": expected all lanes in the mask");
    std::memcpy(&threads_[current_].given, &x, sizeof(T));
    wait(Thread::kShuffle, call);
    return threads_[current_].lanes;
  }

  unsigned lane() const { return current_ % kWarp; }

  // The shared variable with this key; null: the dynamic shared memory of the launch.
  void* shared(const void* place, size_t bytes) {
    auto& [memory, size] = shared_[place];
    if (!memory) {
      memory.reset(new (std::align_val_t{16}) char[bytes]);
      size = bytes;
      std::memset(memory.get(), 0xFF, bytes);
    }
    return memory.get();
  }

 private:
  struct Delete {
    void operator()(char* x) const { operator delete[](x, std::align_val_t{16}); }
  };

  // Entry point of a stack: runs one thread after the other until one has to wait.
  static void begin();

  void become(unsigned i) {
    current_ = i;
    threadIdx = {i};
  }

  void enter(Stack& stack) {
    running_ = &stack;
#if defined(__SANITIZE_ADDRESS__)
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, stack.memory.get(), kStack);
    swapcontext(&host_, &stack.context);
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#else
    if (!_setjmp(jump_)) {
      if (stack.begun) _longjmp(stack.jump, 1);
      stack.begun = true;
      setcontext(&stack.context);
    }
#endif
    if (error_) std::rethrow_exception(error_);
  }

  // Returns to the host until it enters this stack again.
  void leave([[maybe_unused]] bool forever) {
    Stack& stack = *running_;
#if defined(__SANITIZE_ADDRESS__)
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(forever ? nullptr : &fake, host_stack_, host_size_);
    swapcontext(&stack.context, &host_);
    __sanitizer_finish_switch_fiber(fake, &host_stack_, &host_size_);
#else
    if (!_setjmp(stack.jump)) _longjmp(jump_, 1);
#endif
  }

  void wait(Thread::State state, const char* call) {
    Thread& thread = threads_[current_];
    thread.state = state;
    thread.call = call;
    thread.stack = running_;
    leave(false);
  }

  // Releases the threads whose wait is over; returns false if none can run.
  bool released() {
    bool any = false;
    for (auto warp = threads_.begin(); threads_.end() - warp >= kWarp; warp += kWarp) {
      if (!std::all_of(warp, warp + kWarp, [&](const Thread& x) {
            return x.state == Thread::kShuffle && !std::strcmp(x.call, warp->call);
          }))
        continue;
      for (auto i = warp; i != warp + kWarp; ++i) {
        for (int k = 0; k < kWarp; ++k) i->lanes[k] = warp[k].given;
        i->state = Thread::kReady;
      }
      any = true;
    }
    auto at_barrier = [](const Thread& x) { return x.state == Thread::kBarrier || x.state == Thread::kDone; };
    for (const Thread& thread : threads_) any = any || thread.state == Thread::kReady;
    if (any || !std::all_of(threads_.begin(), threads_.end(), at_barrier)) return any;
    for (Thread& thread : threads_)
      if (thread.state == Thread::kBarrier) thread.state = Thread::kReady, any = true;
    return any;
  }

  std::string whereabouts() const {
    std::map<std::string, int> counts;
    for (const Thread& thread : threads_) ++counts[thread.state == Thread::kDone ? "the end" : thread.call];
    std::string text;
    for (const auto& [place, count] : counts) text += (text.empty() ? "" : ", ") + std::to_string(count) + " at " + place;
    return text;
  }

  std::vector<Thread> threads_;
  std::vector<unsigned> order_;
  std::vector<std::unique_ptr<Stack>> stacks_;
  std::map<const void*, std::pair<std::unique_ptr<char[], Delete>, size_t>> shared_;
  ucontext_t host_;
  jmp_buf jump_;
  Stack* running_ = nullptr;
  unsigned current_ = 0;
  size_t next_ = 0;  // index in order_ of the first thread that has not begun
  const void* body_ = nullptr;
  void (*call_)(const void*) = nullptr;
  std::exception_ptr error_;
  const void* host_stack_ = nullptr;
  size_t host_size_ = 0;
};

inline Block block;

inline void Block::begin() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &block.host_stack_, &block.host_size_);
#endif
  try {
    while (block.next_ < block.order_.size()) {
      block.become(block.order_[block.next_++]);
      block.call_(block.body_);
      block.threads_[block.current_].state = Thread::kDone;
    }
  } catch (...) {
    block.error_ = std::current_exception();
  }
  block.leave(true);
}

// kernel<<<grid, threads, dynamic, stream>>>(args)
template <class Kernel, class Args>
void launch(Kernel* kernel, dim3 grid, dim3 threads, size_t dynamic, void*, const Args& args) {
  static std::mutex one_at_a_time;
  static std::mt19937 random(0);
  const std::lock_guard guard(one_at_a_time);
  const bool fits = grid.x >= 1 && grid.x < (1u << 31) && grid.y >= 1 && grid.y < (1u << 16) && grid.z == 1 &&
                    threads.x >= 1 && threads.x <= 1024 && threads.y == 1 && threads.z == 1;
  if (!fits) throw Error("no such launch: invalid configuration");
  std::vector<unsigned> order(size_t{grid.x} * grid.y);
  std::iota(order.begin(), order.end(), 0u);
  std::shuffle(order.begin(), order.end(), random);
  gridDim = grid;
  blockDim = threads;
  for (const unsigned i : order) {
    blockIdx = {i % grid.x, i / grid.x};
    block.run(threads.x, dynamic, [&] { kernel(args); }, random);
  }
}

// A shared variable of type T; `Tag` is a type unique to its declaration.
template <typename T, class Tag>
T& shared(Tag) {
  static const char place = 0;
  return *static_cast<T*>(block.shared(&place, sizeof(T)));
}

template <typename T>
T from_lane(const uint64_t* lanes, unsigned lane) {
  T x;
  std::memcpy(&x, lanes + lane, sizeof(T));
  return x;
}

}  // namespace emulated

inline void __syncthreads() { emulated::block.barrier(); }
inline void __syncwarp() { emulated::block.shuffle(__func__, 0xFFFFFFFFu, 0); }

template <typename T>
T __shfl_sync(unsigned mask, T x, int lane) {
  return emulated::from_lane<T>(emulated::block.shuffle(__func__, mask, x), lane % emulated::kWarp);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T x, int with) {
  return emulated::from_lane<T>(emulated::block.shuffle(__func__, mask, x), emulated::block.lane() ^ with);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T x, unsigned by, int width = emulated::kWarp) {
  const unsigned lane = emulated::block.lane();
  return emulated::from_lane<T>(emulated::block.shuffle(__func__, mask, x), lane % width < by ? lane : lane - by);
}
inline unsigned __reduce_add_sync(unsigned mask, unsigned x) {
  const uint64_t* lanes = emulated::block.shuffle(__func__, mask, x);
  return static_cast<unsigned>(std::accumulate(lanes, lanes + emulated::kWarp, uint64_t{0}));
}
inline unsigned __ballot_sync(unsigned mask, bool x) {
  const uint64_t* lanes = emulated::block.shuffle(__func__, mask, uint64_t{x});
  unsigned bits = 0;
  for (int i = 0; i < emulated::kWarp; ++i) bits |= static_cast<unsigned>(lanes[i]) << i;
  return bits;
}

template <typename T>
T atomicAdd(T* at, T x) {
  const T before = *at;
  *at += x;
  return before;
}
template <typename T>
T __ldcg(const T* at) {
  return *at;
}
inline void __threadfence() {}
inline int __popc(unsigned x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline int __ffs(int x) { return x ? std::countr_zero(static_cast<unsigned>(x)) + 1 : 0; }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
using std::max;
using std::min;

// There is one device and one stream.
struct EmulatedGuard {
  explicit EmulatedGuard(int32_t) {}
};
namespace torch::stable::accelerator {
using ::EmulatedGuard;
}
#define DeviceGuard EmulatedGuard
using cudaStream_t = void*;
inline void cudaGetDeviceCount(int* count) { *count = 2; }
inline void cudaGetDevice(int* device) { *device = -1; }  // what CPU tensors say
inline void cudaMemsetAsync(void* at, int byte, size_t count, cudaStream_t) { std::memset(at, byte, count); }
inline AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return AOTI_TORCH_SUCCESS;
}
