// GAE in one launch, for either layout, with the statistics of the advantages.
//
// Env-major: one warp per one or two environments, in tiles of 128 steps, four per lane, with the last steps in lane 0,
// so that a shuffle "up" carries backwards in time. Time-major: one thread per environment, which loads a few dozen
// steps at a time and walks backwards over them; a plain loop would wait for memory at each step, since the compiler
// does not move loads above stores. Both are correct for any strides and dtypes, with 128-bit accesses where the rows
// allow them.
#include "moments.cuh"

#include "../recurrence.h"
#include "../scan.h"

namespace pydrone {
namespace {

constexpr int kWarps = 8, kLaneSteps = 4, kTile = 32 * kLaneSteps;
constexpr int kManyEnvs = 4096;  // from here on, two environments per warp: half as many partial statistics
constexpr int kColumnThreads = 64;

template <typename T>
struct Args {
  Plane rewards, values, dones, truncated, valid, last_values, final_values, final_rows;
  T *advantages, *returns;
  int64_t advantages_env, advantages_step, returns_env, returns_step;
  double *stats, *partials;
  uint32_t* ticket;
  const int64_t* cursor;
  int64_t num_envs, capacity, start, pool_size;
  int32_t num_steps, bootstrap;
  bool coded, wide;  // wide: rows of inputs and outputs are aligned for 128-bit accesses
  T gamma, decay;
};

// Four numbers in 128-bit pieces.
template <typename T>
struct alignas(16) Four {
  T x[kLaneSteps];
};

// How a kernel reads. kGeneric: any strides and dtypes. kDirect: values of its own type, and codes. kWide: also rows
// that the host knows to allow 128-bit accesses; with a cursor only the device knows the start, and kDirect checks.
enum Mode { kGeneric, kDirect, kWide };

template <typename T, bool Direct>
__device__ T read(const Plane& plane, int64_t n, int64_t slot) {
  if constexpr (Direct)
    return reinterpret_cast<const T*>(plane.data)[plane.at(n, slot)];
  else
    return read_real<T>(plane.data, plane.type, plane.at(n, slot));
}

// For rows of contiguous steps (stride 1).
template <typename T>
__device__ Four<T> read_four(const Plane& plane, int64_t n, int64_t slot) {
  return *reinterpret_cast<const Four<T>*>(reinterpret_cast<const T*>(plane.data) + n * plane.env + slot);
}

template <typename T, bool Direct>
__device__ int32_t read_code(const Args<T>& args, int64_t n, int64_t slot) {
  if (Direct || args.coded) return reinterpret_cast<const uint8_t*>(args.dones.data)[args.dones.at(n, slot)];
  const bool done = read_flag(args.dones, args.dones.at(n, slot));
  const bool truncated =
      args.truncated.data && read_flag(args.truncated, args.truncated.at(n, slot));
  const bool valid = !args.valid.data || read_flag(args.valid, args.valid.at(n, slot));
  return encode(done, truncated, valid);
}

// The value of the true final observation. Read at truncated steps only, which are rare.
template <typename T>
__device__ T read_final(const Args<T>& args, int64_t n, int64_t slot) {
  const Plane& values = args.final_values;
  if (!args.final_rows.data) return read_real<T>(values.data, values.type, values.at(n, slot));
  const int32_t row = reinterpret_cast<const int32_t*>(args.final_rows.data)[args.final_rows.at(n, slot)];
  if (row < 0 || row >= args.pool_size) return static_cast<T>(NAN);
  return read_real<T>(values.data, values.type, row * values.env);
}

// The same, not inlined: keeps an unrolled loop short.
template <typename T>
__device__ __noinline__ T call_read_final(const Args<T>& args, int64_t n, int64_t slot) {
  return read_final(args, n, slot);
}

template <typename T>
__device__ int64_t first_slot(const Args<T>& args) {
  return args.cursor ? ring_slot(args.cursor[kDiscarded], args.capacity) : args.start;
}

__device__ inline int64_t wrapped(int64_t slot, int64_t capacity) { return slot >= capacity ? slot - capacity : slot; }

// Whether every group of four steps is contiguous in a rollout that begins in slot `start`, even if it wraps.
template <typename T>
__host__ __device__ bool starts_wide(const Args<T>& args, int64_t start) {
  return start % kLaneSteps == 0 && (args.capacity % kLaneSteps == 0 || start + args.num_steps <= args.capacity);
}

// At 64 registers per thread, 8192 environments are one wave on 132 multiprocessors.
template <typename T, Mode mode>
constexpr int kMinBlocks = sizeof(T) == 8 ? 2 : (mode == kWide ? 4 : (mode == kDirect ? 3 : 2));

template <typename T, Mode mode, int Rows>
__global__ void __launch_bounds__(32 * kWarps, kMinBlocks<T, mode>) gae_rows(const __grid_constant__ Args<T> args) {
  const int lane = threadIdx.x % 32;
  const int64_t env0 = (static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32) * Rows;
  const int64_t start = first_slot(args);
  const int num_steps = args.num_steps;
  constexpr bool Direct = mode != kGeneric;
  const bool wide = mode == kWide || (Direct && args.wide && starts_wide(args, start));
  const bool with_final = args.bootstrap == kFinalValues;

  T decays[5];  // for runs of 4, 8, 16, 32 and 64 steps
  decays[0] = args.decay * args.decay * args.decay * args.decay;
#pragma unroll
  for (int i = 1; i < 5; ++i) decays[i] = decays[i - 1] * decays[i - 1];

  __shared__ Moments parts[kWarps * Rows];
  T carry[Rows], value_after[Rows];
#pragma unroll
  for (int row = 0; row < Rows; ++row) {
    carry[row] = 0;
    value_after[row] = env0 + row < args.num_envs ? read<T, false>(args.last_values, env0 + row, 0) : T(0);
  }

  for (int first = (num_steps - 1) / kTile * kTile; first >= 0; first -= kTile) {
    const int t0 = first + (31 - lane) * kLaneSteps;
    Four<T> reward[Rows], value[Rows];
    uint32_t codes[Rows];  // one byte per step
#pragma unroll
    for (int row = 0; row < Rows; ++row) {
      const int64_t n = env0 + row;
      const bool exists = n < args.num_envs;
      if (wide) {
        codes[row] = kInvalid * 0x01010101u;
        reward[row] = value[row] = Four<T>{};
        if (exists && t0 < num_steps) {
          const int64_t slot = wrapped(start + t0, args.capacity);
          reward[row] = read_four<T>(args.rewards, n, slot);
          value[row] = read_four<T>(args.values, n, slot);
          codes[row] = *reinterpret_cast<const uint32_t*>(args.dones.data + n * args.dones.env + slot);
        }
      } else {
        codes[row] = 0;
#pragma unroll
        for (int k = 0; k < kLaneSteps; ++k) {
          // Out of range, element 0 is read instead, which saves a branch.
          const bool inside = exists && t0 + k < num_steps;
          const int64_t env = inside ? n : 0, slot = inside ? wrapped(start + t0 + k, args.capacity) : 0;
          const int32_t code = read_code<T, Direct>(args, env, slot);
          reward[row].x[k] = read<T, Direct>(args.rewards, env, slot);
          value[row].x[k] = read<T, Direct>(args.values, env, slot);
          codes[row] |= static_cast<uint32_t>(inside ? code & 0xFF : kInvalid) << 8 * k;
        }
      }
    }
#pragma unroll
    for (int row = 0; row < Rows; ++row) {
      const int64_t n = env0 + row;
      Four<T>& v = value[row];
      // Steps beyond the last hold last_values, so that the last step finds it as the next step's value.
#pragma unroll
      for (int k = 0; k < kLaneSteps; ++k) v.x[k] = t0 + k < num_steps ? v.x[k] : value_after[row];
      T next_value = __shfl_up_sync(kAll, v.x[0], 1);
      next_value = lane == 0 ? value_after[row] : next_value;

      // The lane's own steps, as if nothing came after them. `cut`: whether an end separates a step from what comes
      // after the lane; `decay`: the factor by which the step discounts it.
      T run = 0;
      Four<T> advantage, decay;
      bool cut[kLaneSteps], cut_off = false;
      T power = 1;
#pragma unroll
      for (int k = kLaneSteps - 1; k >= 0; --k) {
        const int32_t c = codes[row] >> 8 * k & 0xFF;
        T final_value = 0;
        if (with_final && c == kTruncated) final_value = read_final(args, n, wrapped(start + t0 + k, args.capacity));
        const T at_truncation = value_at_truncation(args.bootstrap, v.x[k], next_value, final_value);
        run = gae_step(c, reward[row].x[k], v.x[k], next_value, at_truncation, args.gamma, args.decay, run);
        cut_off = cut_off || c != kRunning;
        cut[k] = cut_off;
        power *= args.decay;
        decay.x[k] = power;
        advantage.x[k] = run;
        next_value = v.x[k];
      }

      // Across lanes: the distance down (later in time) to the nearest lane with an end, from one ballot.
      const unsigned ends = __ballot_sync(kAll, cut[0]) & (kAll >> (31 - lane));
      const int reach = ends ? lane - (31 - __clz(ends)) : 32;
#pragma unroll
      for (int i = 0; i < 5; ++i) {
        const int d = 1 << i;
        const T later = __shfl_up_sync(kAll, run, d);
        run = gae_join(reach < d || lane < d, run, decays[i], later);
      }
      // The carry from after the tile reaches the lanes with no end in between.
      if (first + kTile < num_steps) {
        T through = 1;
#pragma unroll
        for (int i = 0; i < 5; ++i) through *= ((lane + 1) >> i) & 1 ? decays[i] : T(1);
        through *= lane == 31 ? decays[4] * decays[4] : T(1);
        run = gae_join(reach <= lane, run, through, carry[row]);
      }
      T after = __shfl_up_sync(kAll, run, 1);
      after = lane == 0 ? carry[row] : after;
#pragma unroll
      for (int k = 0; k < kLaneSteps; ++k) advantage.x[k] = gae_join(cut[k], advantage.x[k], decay.x[k], after);
      carry[row] = __shfl_sync(kAll, run, 31);
      value_after[row] = __shfl_sync(kAll, v.x[0], 31);

      if (n < args.num_envs && wide && t0 < num_steps) {
        *reinterpret_cast<Four<T>*>(args.advantages + n * args.advantages_env + t0) = advantage;
        if (args.returns) {
          Four<T> total;
#pragma unroll
          for (int k = 0; k < kLaneSteps; ++k) total.x[k] = advantage.x[k] + v.x[k];
          *reinterpret_cast<Four<T>*>(args.returns + n * args.returns_env + t0) = total;
        }
      } else if (n < args.num_envs && !wide) {
#pragma unroll
        for (int k = 0; k < kLaneSteps; ++k) {
          if (t0 + k >= num_steps) continue;
          args.advantages[n * args.advantages_env + (t0 + k) * args.advantages_step] = advantage.x[k];
          if (args.returns)
            args.returns[n * args.returns_env + (t0 + k) * args.returns_step] = advantage.x[k] + v.x[k];
        }
      }
      if (args.stats) {
        int count = 0;
        T sum = 0, deviations = 0, squares = 0;
#pragma unroll
        for (int k = 0; k < kLaneSteps; ++k) {
          const bool valid = (codes[row] >> 8 * k & 0xFF) != kInvalid;
          count += __popc(__ballot_sync(kAll, valid));
          sum += valid ? advantage.x[k] : T(0);
        }
        const T mean = warp_sum(sum) / static_cast<T>(count > 0 ? count : 1);
#pragma unroll
        for (int k = 0; k < kLaneSteps; ++k) {
          const T deviation = (codes[row] >> 8 * k & 0xFF) != kInvalid ? advantage.x[k] - mean : T(0);
          deviations += deviation;
          squares += deviation * deviation;
        }
        const Sums<T> sums = warp_sums(deviations, squares);
        if (lane == 0) {
          const Moments tile = moments_about(mean, count, sums.a, sums.b);
          Moments& part = parts[threadIdx.x / 32 * Rows + row];
          part = first + kTile >= num_steps ? tile : merge(part, tile);
        }
      }
    }
  }
  if (args.stats) finish_stats(args.stats, args.partials, args.ticket, parts, kWarps * Rows);
}

template <typename T, bool Direct, int Steps>
__global__ void __launch_bounds__(kColumnThreads) gae_columns(const __grid_constant__ Args<T> args) {
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kColumnThreads + threadIdx.x;
  const int64_t start = first_slot(args);
  Moments moments{};
  if (n < args.num_envs) {
    T carry = 0, next_value = read<T, false>(args.last_values, n, 0);
    for (int last = args.num_steps - 1; last >= 0; last -= Steps) {
      T reward[Steps], value[Steps];
      int32_t code[Steps];
#pragma unroll
      for (int i = 0; i < Steps; ++i) {
        const int64_t slot = wrapped(start + max(last - i, 0), args.capacity);
        code[i] = read_code<T, Direct>(args, n, slot);
        reward[i] = read<T, Direct>(args.rewards, n, slot);
        value[i] = read<T, Direct>(args.values, n, slot);
        code[i] = last - i >= 0 ? code[i] : kInvalid;
      }
      int count = 0;
      T sum = 0, deviations = 0, squares = 0;
#pragma unroll
      for (int i = 0; i < Steps; ++i) {
        const int t = last - i;
        T final_value = 0;
        if (args.bootstrap == kFinalValues && code[i] == kTruncated)
          final_value = call_read_final(args, n, wrapped(start + t, args.capacity));
        const T at_truncation = value_at_truncation(args.bootstrap, value[i], next_value, final_value);
        carry = gae_step(code[i], reward[i], value[i], next_value, at_truncation, args.gamma, args.decay, carry);
        next_value = value[i];
        reward[i] = carry;
        count += code[i] != kInvalid;
        sum += code[i] != kInvalid ? carry : T(0);
        if (t < 0) continue;
        args.advantages[n * args.advantages_env + t * args.advantages_step] = carry;
        if (args.returns) args.returns[n * args.returns_env + t * args.returns_step] = carry + value[i];
      }
      if (args.stats && count) {
        const T mean = sum / static_cast<T>(count);
#pragma unroll
        for (int i = 0; i < Steps; ++i) {
          const T deviation = code[i] != kInvalid ? reward[i] - mean : T(0);
          deviations += deviation;
          squares += deviation * deviation;
        }
        moments = merge(moments, moments_about(mean, count, deviations, squares));
      }
    }
  }
  if (!args.stats) return;
  __shared__ Moments parts[kColumnThreads / 32];
  moments = warp_merge(moments, 32);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = moments;
  finish_stats(args.stats, args.partials, args.ticket, parts, kColumnThreads / 32);
}

template <typename T>
void launch(const Args<T>& args, bool env_major, bool direct, cudaStream_t stream) {
  constexpr int kSteps = 136 / sizeof(T);  // as many as fit a thread's registers; 100 steps are three chunks of 34
  auto blocks = [&](int64_t envs) { return static_cast<unsigned>((args.num_envs + envs - 1) / envs); };
  auto* kernel = direct ? gae_columns<T, true, kSteps> : gae_columns<T, false, 4>;
  unsigned grid = blocks(kColumnThreads), threads = kColumnThreads;
  if (env_major) {
    const bool two = args.num_envs >= kManyEnvs;
    const bool wide = args.wide && !args.cursor && starts_wide(args, args.start);
    kernel = wide     ? (two ? gae_rows<T, kWide, 2> : gae_rows<T, kWide, 1>)
             : direct ? (two ? gae_rows<T, kDirect, 2> : gae_rows<T, kDirect, 1>)
                      : (two ? gae_rows<T, kGeneric, 2> : gae_rows<T, kGeneric, 1>);
    grid = blocks(two ? 2 * kWarps : kWarps), threads = 32 * kWarps;
  }
  kernel<<<grid, threads, 0, stream>>>(args);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <typename T>
void run(const Tensor& rewards, const Tensor& values, const Tensor& dones, const Optional& truncated,
         const Optional& valid, const Tensor& last_values, const Optional& final_values, const Optional& final_rows,
         double gamma, double lam, int64_t start, bool coded, int64_t bootstrap, const Optional& cursor,
         const Tensor& advantages, const Optional& returns, const Optional& stats, const Optional& workspace) {
  Args<T> args{};
  args.rewards = Plane(rewards);
  args.values = Plane(values);
  args.dones = Plane(dones);
  args.last_values = Plane(last_values);
  if (!coded && truncated) args.truncated = Plane(*truncated);
  if (!coded && valid) args.valid = Plane(*valid);
  if (bootstrap == kFinalValues) {
    args.final_values = Plane(*final_values);
    if (final_rows) {
      args.final_rows = Plane(*final_rows);
      args.pool_size = final_values->size(0);
    }
  }
  args.advantages = static_cast<T*>(advantages.data_ptr());
  args.advantages_env = advantages.stride(0);
  args.advantages_step = advantages.stride(1);
  if (returns) {
    args.returns = static_cast<T*>(returns->data_ptr());
    args.returns_env = returns->stride(0);
    args.returns_step = returns->stride(1);
  }
  if (stats) {
    args.stats = static_cast<double*>(stats->data_ptr());
    args.ticket = static_cast<uint32_t*>(workspace->data_ptr());
    args.partials = static_cast<double*>(workspace->data_ptr()) + 1;
  }
  if (cursor) args.cursor = static_cast<const int64_t*>(cursor->data_ptr());
  args.num_envs = rewards.size(0);
  args.capacity = rewards.size(1);
  args.num_steps = static_cast<int32_t>(advantages.size(1));
  args.start = start;
  args.bootstrap = static_cast<int32_t>(bootstrap);
  args.coded = coded;
  args.gamma = static_cast<T>(gamma);
  args.decay = static_cast<T>(gamma * lam);

  const ScalarType type = advantages.scalar_type();
  const bool direct = coded && rewards.scalar_type() == type && values.scalar_type() == type;
  auto rows_of_four = [](const void* data, int64_t env, int64_t step, size_t size) {
    return step == 1 && env % kLaneSteps == 0 && reinterpret_cast<uintptr_t>(data) % size == 0;
  };
  const bool wide = rows_of_four(args.rewards.data, args.rewards.env, args.rewards.step, 16) &&
                    rows_of_four(args.values.data, args.values.env, args.values.step, 16) &&
                    rows_of_four(args.dones.data, args.dones.env, args.dones.step, 4) &&
                    rows_of_four(args.advantages, args.advantages_env, args.advantages_step, 16) &&
                    (!returns || rows_of_four(args.returns, args.returns_env, args.returns_step, 16));
  args.wide = direct && wide && args.num_steps % kLaneSteps == 0;
  const bool env_major = rewards.stride(0) != 1 || rewards.stride(1) == 1;
  const Launch context(rewards);
  launch(args, env_major, direct, context.stream);
}

void gae(const Tensor& rewards, const Tensor& values, const Tensor& dones, const Optional& truncated,
         const Optional& valid, const Tensor& last_values, const Optional& final_values, const Optional& final_rows,
         double gamma, double lam, int64_t start, bool coded, int64_t bootstrap, const Optional& cursor,
         const Tensor& advantages, const Optional& returns, const Optional& stats, const Optional& workspace) {
  check_gae({rewards, values, dones, truncated, valid, last_values, final_values, final_rows, start, coded, bootstrap,
             cursor, advantages, returns, stats, workspace});
  const int64_t num_envs = rewards.size(0), capacity = rewards.size(1), num_steps = advantages.size(1);
  if (num_envs == 0 || num_steps == 0) {
    if (stats) {
      const Launch context(rewards);
      STD_CUDA_CHECK(cudaMemsetAsync(stats->data_ptr(), 0, 3 * sizeof(double), context.stream));
    }
    return;
  }
  if (!cursor) check_range("start", start, 0, capacity);
  auto* typed = advantages.scalar_type() == ScalarType::Float ? run<float> : run<double>;
  typed(rewards, values, dones, truncated, valid, last_values, final_values, final_rows, gamma, lam, start, coded,
        bootstrap, cursor, advantages, returns, stats, workspace);
}

void off_policy(const Tensor&, const Tensor&, const Tensor&, const Optional&,
                const Optional&, const Tensor&, const Optional&,
                const Optional&, const Tensor&, const Optional&, double, double,
                double, double, int64_t, bool, int64_t, const Optional&,
                const Optional&, const Tensor&, const Optional&, const Optional&) {
  STD_TORCH_CHECK(false, "off_policy: not implemented in the CUDA library yet");
}

}  // namespace
}  // namespace pydrone

STABLE_TORCH_LIBRARY_IMPL(pydrone, CUDA, m) {
  m.impl("gae", TORCH_BOX(&pydrone::gae));
  m.impl("off_policy", TORCH_BOX(&pydrone::off_policy));
}
