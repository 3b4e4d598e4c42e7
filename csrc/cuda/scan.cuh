// The reverse scan of GAE, V-trace and Retrace over the steps of a rollout, cut at episode ends: gae.cu, off_policy.cu.
//
// A thread holds K consecutive steps of an environment. It passes over them twice, backwards: `weigh` for what they come
// to if nothing followed, and, once it knows what follows, `finish` for each step. In between, the threads of an
// environment exchange what their steps come to: by shuffles in a warp, through shared memory between warps.
#pragma once

#include "moments.cuh"

#include "../recurrence.h"
#include "../scan.h"

namespace pydrone {
namespace {

constexpr int kLaneSteps = 4, kTile = 32 * kLaneSteps;  // steps of a thread and of a warp where a row's steps lie together

enum Estimator { kGae, kVtrace, kRetrace };

template <typename T>
struct Args {
  Plane rewards, values, dones, truncated, valid, last_values, final_values, final_rows, log_rhos, q_values;
  T *advantages, *returns;  // returns: the targets of V-trace and Retrace
  int64_t advantages_env, advantages_step, returns_env, returns_step;
  double* stats;
  double2* partials;
  uint64_t* ticket;
  const int64_t* cursor;
  int64_t num_envs, capacity, start, pool_size;
  int32_t num_steps, bootstrap;
  int32_t shift;  // log2 of scan_tiles' warps to an environment, of scan_columns' environments to a block
  bool coded;
  T gamma, decay, rho_clip, c_clip;
  T powers[6];  // the decay over 1, 2, 4 .. 32 lanes; here because constant memory costs no registers
};

// Four numbers in 128-bit pieces.
template <typename T>
struct alignas(16) Four {
  T x[kLaneSteps];
};

// How a kernel reads. kGeneric: any strides and dtypes. kDirect: values of its own type, flags or codes of one byte.
// kWide: also rows of contiguous steps, aligned for 128-bit accesses.
enum Mode { kGeneric, kDirect, kWide };

// A thread's steps, in time's order.
template <typename T, Estimator estimator, int K>
struct Steps {
  T reward[K], value[K];  // by `weigh`, rewards become temporal differences; by `finish`, advantages and returns
  T ratio[estimator == kGae ? 1 : K];  // first its logarithm
  T q[estimator == kRetrace ? K : 1];
  uint32_t codes[(K + 3) / 4];  // one byte per step
  uint32_t truncated, valid;    // with kWide, until `pad`: flags of four steps, as are `codes`, if they are not codes

  __device__ int32_t code(int k) const { return codes[k / 4] >> 8 * (k % 4) & 0xFF; }
};

// What consecutive steps come to: the first one's carry is sum + (0 if an end cuts it off, else link * what follows).
template <typename T>
struct Run {
  T sum, link;
  bool cut;
};

template <typename T, bool Direct>
__device__ T read(const Plane& plane, int64_t n, int64_t slot) {
  if constexpr (Direct)
    return reinterpret_cast<const T*>(plane.data)[plane.at(n, slot)];
  else
    return read_real<T>(plane.data, plane.type, plane.at(n, slot));
}

// For rows of contiguous steps (stride 1).
template <typename T>
__device__ void read_four(T (&into)[kLaneSteps], const Plane& plane, int64_t n, int64_t slot) {
  const auto four = *reinterpret_cast<const Four<T>*>(reinterpret_cast<const T*>(plane.data) + n * plane.env + slot);
#pragma unroll
  for (int k = 0; k < kLaneSteps; ++k) into[k] = four.x[k];
}

template <typename T, bool Direct>
__device__ int32_t read_code(const Args<T>& args, int64_t n, int64_t slot) {
  auto byte = [&](const Plane& x) { return reinterpret_cast<const uint8_t*>(x.data)[x.at(n, slot)]; };
  auto flag = [&](const Plane& x) { return Direct ? byte(x) != 0 : read_flag(x, x.at(n, slot)); };
  if (args.coded) return byte(args.dones);
  const bool done = flag(args.dones), truncated = args.truncated.data && flag(args.truncated);
  return encode(done, truncated, !args.valid.data || flag(args.valid));
}

// Flags of one byte, set where not 0, to 1 for each.
__device__ inline uint32_t four_flags(uint32_t x) {
  return (((x & 0x7F7F7F7Fu) + 0x7F7F7F7Fu) | x) >> 7 & 0x01010101u;
}

// The value of the true final observation. Read at truncated steps only, which are rare.
template <typename T, bool Direct>
__device__ T read_final(const Args<T>& args, int64_t n, int64_t slot) {
  if (!args.final_rows.data) return read<T, Direct>(args.final_values, n, slot);
  const int32_t row = reinterpret_cast<const int32_t*>(args.final_rows.data)[args.final_rows.at(n, slot)];
  return row < 0 || row >= args.pool_size ? static_cast<T>(NAN) : read<T, Direct>(args.final_values, row, 0);
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

// Whether kWide's `load` yields codes: else flags, four at a time.
template <typename T>
__device__ bool encoded(const Args<T>& args, int64_t start) {
  return args.coded || (args.cursor && !starts_wide(args, start));
}

// The value after step t - 1: V_t, or that of the last observation.
template <typename T, bool Direct>
__device__ T value_at(const Args<T>& args, int64_t n, bool exists, int64_t start, int t) {
  if (!exists) return T(0);
  if (t >= args.num_steps) return read<T, Direct>(args.last_values, n, 0);
  return read<T, Direct>(args.values, n, wrapped(start + t, args.capacity));
}

// Loads the steps from t0 on; those beyond the last are invalid. Waits for nothing that was loaded before.
template <typename T, Estimator estimator, Mode mode, int K>
__device__ void load(const Args<T>& args, Steps<T, estimator, K>& s, int64_t n, bool exists, int64_t start, int t0) {
  constexpr bool Direct = mode != kGeneric;
  auto load_step = [&](int k, T& reward, T& value, T& ratio, T& q) {
    // Out of range, element 0 is read instead, which saves a branch.
    const bool inside = exists && t0 + k < args.num_steps;
    const int64_t env = inside ? n : 0, slot = inside ? wrapped(start + t0 + k, args.capacity) : 0;
    const int32_t code = read_code<T, Direct>(args, env, slot);
    reward = read<T, Direct>(args.rewards, env, slot);
    value = read<T, Direct>(args.values, env, slot);
    if constexpr (estimator != kGae) ratio = read<T, Direct>(args.log_rhos, env, slot);
    if constexpr (estimator == kRetrace) q = read<T, Direct>(args.q_values, env, slot);
    return static_cast<uint32_t>(inside ? code & 0xFF : kInvalid);
  };
  if constexpr (mode == kWide) {
    s.codes[0] = encoded(args, start) ? kInvalid * 0x01010101u : 0;
    s.truncated = s.valid = 0;
#pragma unroll
    for (int k = 0; k < K; ++k) {
      s.reward[k] = s.value[k] = 0;
      if constexpr (estimator != kGae) s.ratio[k] = 0;
      if constexpr (estimator == kRetrace) s.q[k] = 0;
    }
    if (!exists || t0 >= args.num_steps) return;
    if (!args.cursor || starts_wide(args, start)) {
      const int64_t slot = wrapped(start + t0, args.capacity);
      read_four(s.reward, args.rewards, n, slot);
      read_four(s.value, args.values, n, slot);
      if constexpr (estimator != kGae) read_four(s.ratio, args.log_rhos, n, slot);
      if constexpr (estimator == kRetrace) read_four(s.q, args.q_values, n, slot);
      auto four = [&](const Plane& x) { return *reinterpret_cast<const uint32_t*>(x.data + n * x.env + slot); };
      s.codes[0] = four(args.dones);
      if (args.truncated.data) s.truncated = four(args.truncated);
      s.valid = args.valid.data ? four(args.valid) : 0x01010101u;
      return;
    }
    // Else a cursor that no buffer makes: only the device knows that the rollout does not begin aligned.
  }
#pragma unroll
  for (int i = 0; i < (K + 3) / 4; ++i) s.codes[i] = 0;
#pragma unroll
  for (int k = 0; k < K; ++k) {
    T &ratio = s.ratio[estimator == kGae ? 0 : k], &q = s.q[estimator == kRetrace ? k : 0];
    s.codes[k / 4] |= load_step(k, s.reward[k], s.value[k], ratio, q) << 8 * (k % 4);
  }
}

// The factor of what follows step k; for Retrace, that of the step before it.
template <typename T, Estimator estimator, int K>
__device__ T link_of(const Args<T>& args, const Steps<T, estimator, K>& s, int k) {
  if constexpr (estimator == kGae)
    return args.decay;
  else
    return args.decay * clipped_ratio(s.ratio[k], args.c_clip);
}

// Step k from what follows it, `carry`, which becomes what step k - 1 is followed by: x, or Retrace's link * x. `total`
// is the return or target.
template <typename T, Estimator estimator, int K>
__device__ void step(const Args<T>& args, const Steps<T, estimator, K>& s, int k, T& carry, T& advantage, T& total) {
  const T delta = s.reward[k], link = link_of(args, s, k);
  if constexpr (estimator == kGae)
    advantage = carry = gae_join(s.code(k) != kRunning, delta, link, carry);
  else if constexpr (estimator == kVtrace)
    carry = vtrace_step(s.code(k), delta, clipped_ratio(s.ratio[k], args.rho_clip), link, args.gamma, carry, advantage);
  total = s.value[k] + (estimator == kRetrace ? retrace_step(s.code(k), delta, link, carry) : carry);
}

// What `load` leaves to do, since it would wait: gives steps beyond the last `after` as their value, which the last step
// thus finds as the next step's, and encodes four flags at a time, as `encode` does.
template <Mode mode, typename T, Estimator estimator, int K>
__device__ void pad(const Args<T>& args, Steps<T, estimator, K>& s, int64_t start, int t0, T after) {
  if (mode == kWide && !encoded(args, start)) {
    const uint32_t truncated = four_flags(s.truncated), invalid = four_flags(s.valid) ^ 0x01010101u;
    s.codes[0] = (four_flags(s.codes[0]) & ~truncated) | truncated << 1 | invalid * kInvalid;
  }
#pragma unroll
  for (int k = 0; k < K; ++k) s.value[k] = t0 + k < args.num_steps ? s.value[k] : after;
}

// What the steps come to. Turns rewards into temporal differences, logarithms into ratios, and for Retrace values into Q.
template <bool Direct, typename T, Estimator estimator, int K>
__device__ Run<T> weigh(const Args<T>& args, Steps<T, estimator, K>& s, int64_t n, int64_t start, int t0,
                        T next_value) {
  Run<T> run{0, 1, false};
#pragma unroll
  for (int k = K - 1; k >= 0; --k) {
    const int32_t code = s.code(k);
    const T value = s.value[k];
    T final_value = 0, advantage, total;
    if (args.bootstrap == kFinalValues && code == kTruncated)
      final_value = read_final<T, Direct>(args, n, wrapped(start + t0 + k, args.capacity));
    if constexpr (estimator != kGae) {
      s.ratio[k] = exp(s.ratio[k]);
      run.link *= link_of(args, s, k);
    }
    if constexpr (estimator == kRetrace) s.value[k] = s.q[k];
    const T at_truncation = value_at_truncation(args.bootstrap, value, next_value, final_value);
    s.reward[k] = gae_delta(code, s.reward[k], s.value[k], next_value, at_truncation, args.gamma);
    next_value = value;
    step(args, s, k, run.sum, advantage, total);
    run.cut = run.cut || code != kRunning;
  }
  return run;
}

// Advantages and returns of the steps, from the carry that follows them.
template <typename T, Estimator estimator, int K>
__device__ void finish(const Args<T>& args, Steps<T, estimator, K>& s, T carry) {
#pragma unroll
  for (int k = K - 1; k >= 0; --k) step(args, s, k, carry, s.reward[k], s.value[k]);
}

// Writes what `finish` has made of the steps.
template <typename T, Estimator estimator, Mode mode, int K>
__device__ void store(const Args<T>& args, const Steps<T, estimator, K>& s, int64_t n, bool exists, int t0) {
  if (!exists || t0 >= args.num_steps) return;
  if constexpr (mode == kWide) {
    auto write = [&](T* out, int64_t env, const T(&x)[K]) {
      *reinterpret_cast<Four<T>*>(out + n * env + t0) = Four<T>{x[0], x[1], x[2], x[3]};
    };
    if (args.advantages) write(args.advantages, args.advantages_env, s.reward);
    if (args.returns) write(args.returns, args.returns_env, s.value);
  } else {
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const int64_t t = t0 + k;
      if (t >= args.num_steps) return;
      if (args.advantages) args.advantages[n * args.advantages_env + t * args.advantages_step] = s.reward[k];
      if (args.returns) args.returns[n * args.returns_env + t * args.returns_step] = s.value[k];
    }
  }
}

// The decay over `count` lanes, fewer than 32.
template <typename T>
__device__ T decay_over(const Args<T>& args, int count) {
  T power = 1;
#pragma unroll
  for (int i = 0; i < 5; ++i) power *= count >> i & 1 ? args.powers[i] : T(1);
  return power;
}

// A scan over the `Lanes` lanes of an environment, where lane 0 has the last steps, so that a shuffle "up" carries
// backwards in time. Returns what the steps from a lane's first to the last of lane 0 come to.
template <int Lanes, Estimator estimator, typename T>
__device__ Run<T> scan_lanes(const Args<T>& args, Run<T> run) {
  const int lane = threadIdx.x % Lanes;
  // The distance down (later in time) to the nearest lane with an end, from one ballot.
  const unsigned ends = __ballot_sync(kAll, run.cut) >> (threadIdx.x % 32 - lane) & (kAll >> (31 - lane));
  const int reach = ends ? lane - (31 - __clz(ends)) : Lanes;
#pragma unroll
  for (int i = 0; 1 << i < Lanes; ++i) {
    const int d = 1 << i;
    const T later = __shfl_up_sync(kAll, run.sum, d, Lanes);
    T link = args.powers[i];
    if constexpr (estimator != kGae) {
      const T link_later = __shfl_up_sync(kAll, run.link, d, Lanes);
      link = run.link;
      run.link = lane < d ? run.link : run.link * link_later;
    }
    run.sum = gae_join(reach < d || lane < d, run.sum, link, later);
  }
  run.cut = reach <= lane;
  return run;
}

// Blocks resident on a multiprocessor: with kWide and float 64 registers a thread, which is all that fits it.
template <typename T, Mode mode>
constexpr int kMinBlocks = sizeof(T) == 4 && mode == kWide ? 2 : 1;
// And with any mode. Of 8 warps three blocks bound a thread's registers to 80, two to 128. Unbounded, ptxas takes half as
// many again for 10.0 and 12.0.
template <typename T, Estimator estimator, Mode mode, bool Tiles>
constexpr int min_blocks() {
  const int off_policy = estimator != kGae;
  if (mode == kWide) return Tiles && estimator == kRetrace ? 1 : kMinBlocks<T, mode>;
  if (sizeof(T) == 8) return 3 - Tiles - off_policy;
  return mode == kGeneric && Tiles && off_policy ? 2 : 3;
}
constexpr int kColumnWarps = 13;  // with eight steps a thread, 104 steps at once; two blocks fit at 72 registers
template <Mode mode>
constexpr int kBlockWarps = mode == kWide ? kMostWarps : kMostWarps / 2;

// Rows of at most 4 * Lanes steps: 32 / Lanes environments to a warp, `Rows` times.
template <typename T, Estimator estimator, Mode mode, int Lanes, int Rows>
__global__ void __launch_bounds__(32 * kBlockWarps<mode>, (min_blocks<T, estimator, mode, false>()))
    scan_rows(const __grid_constant__ Args<T> args) {
  constexpr int kEnvs = 32 / Lanes;
  const int lane = threadIdx.x % Lanes, t0 = (Lanes - 1 - lane) * kLaneSteps;
  const int64_t start = first_slot(args), envs = blockDim.x / 32 * kEnvs * Rows;
  const int64_t own = threadIdx.x / 32 * (kEnvs * Rows) + threadIdx.x % 32 / Lanes;
  Sums sums;
  for (int64_t n0 = blockIdx.x * envs; n0 < args.num_envs; n0 += gridDim.x * envs) {
    Steps<T, estimator, kLaneSteps> s[Rows];
    T after[Rows];
#pragma unroll
    for (int row = 0; row < Rows; ++row) {
      const int64_t n = n0 + own + row * kEnvs;
      after[row] = n < args.num_envs ? read<T, mode != kGeneric>(args.last_values, n, 0) : T(0);
      load<T, estimator, mode>(args, s[row], n, n < args.num_envs, start, t0);
    }
#pragma unroll
    for (int row = 0; row < Rows; ++row) {
      const int64_t n = n0 + own + row * kEnvs;
      pad<mode>(args, s[row], start, t0, after[row]);
      const T next_value = __shfl_up_sync(kAll, s[row].value[0], 1, Lanes);
      const Run<T> own_run = weigh<mode != kGeneric>(args, s[row], n, start, t0, lane == 0 ? after[row] : next_value);
      const Run<T> run = scan_lanes<Lanes, estimator>(args, own_run);
      const T carry = __shfl_up_sync(kAll, run.sum, 1, Lanes);
      finish(args, s[row], lane == 0 ? T(0) : carry);
      store<T, estimator, mode>(args, s[row], n, n < args.num_envs, t0);
      if (args.stats) sums.add(s[row].reward, [&](int k) { return s[row].code(k) != kInvalid; });
    }
  }
  if (args.stats) finish_stats(args.stats, args.partials, args.ticket, sums);
}

// Longer rows: several warps to an environment, each with a tile of 128 steps at a time. The next tiles are loaded
// before these are exchanged, so that memory works meanwhile.
template <typename T, Estimator estimator, Mode mode>
__global__ void __launch_bounds__(32 * kBlockWarps<mode>, (min_blocks<T, estimator, mode, true>()))
    scan_tiles(const __grid_constant__ Args<T> args) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, parts = 1 << args.shift, part = warp & (parts - 1);
  const int64_t start = first_slot(args), envs = blockDim.x / 32 >> args.shift;
  const int span = parts * kTile, own = (parts - 1 - part) * kTile;  // part 0 has the last tile of a span
  using Part = Run<T>;
  __shared__ Part runs[2 * kMostWarps];  // twice: while some warps read, others may write the next ones
  int side = 0;
  Sums sums;
  for (int64_t n0 = blockIdx.x * envs; n0 < args.num_envs; n0 += gridDim.x * envs) {
    const int64_t n = n0 + (warp >> args.shift);
    const bool exists = n < args.num_envs;
    Steps<T, estimator, kLaneSteps> ahead;
    T after_ahead, carry = 0;
    auto load_ahead = [&](int first) {
      after_ahead = value_at<T, mode != kGeneric>(args, n, exists, start, first + kTile);
      load<T, estimator, mode>(args, ahead, n, exists, start, first + kTile - (lane + 1) * kLaneSteps);
    };
    const int last = (args.num_steps - 1) / span * span;
    load_ahead(last + own);
    for (int first = last; first >= 0; first -= span) {
      const int t0 = first + own + kTile - (lane + 1) * kLaneSteps;
      Steps<T, estimator, kLaneSteps> s = ahead;
      const T after = after_ahead;
      if (first > 0) load_ahead(first - span + own);
      pad<mode>(args, s, start, t0, after);
      const T next_value = __shfl_up_sync(kAll, s.value[0], 1);
      Run<T> run = scan_lanes<32, estimator>(args, weigh<mode != kGeneric>(args, s, n, start, t0, lane == 0 ? after : next_value));
      Part* const of_env = runs + side * kMostWarps + warp - part;
      side ^= 1;
      if (lane == 31) of_env[part] = run;
      __syncthreads();
      T before = 0;  // what follows this warp's tile
      for (int i = 0; i < parts; ++i) {
        before = i == part ? carry : before;
        carry = gae_join(of_env[i].cut, of_env[i].sum, estimator == kGae ? args.powers[5] : of_env[i].link, carry);
      }
      // Of lane 31, whose own is `carry`, this is not used.
      run.sum = gae_join(run.cut, run.sum, estimator == kGae ? decay_over(args, lane + 1) : run.link, before);
      const T follows = __shfl_up_sync(kAll, run.sum, 1);
      finish(args, s, lane == 0 ? before : follows);
      store<T, estimator, mode>(args, s, n, exists, t0);
      if (args.stats) sums.add(s.reward, [&](int k) { return s.code(k) != kInvalid; });
    }
  }
  if (args.stats) finish_stats(args.stats, args.partials, args.ticket, sums);
}

// Columns, where the environments of a step lie together: a thread has K steps of one environment at a time,
// several threads share it, and neighbouring threads have neighbouring environments.
template <typename T, Estimator estimator, bool Direct, int K>
__global__ void __launch_bounds__(32 * kColumnWarps, sizeof(T) == 4 && Direct && estimator == kGae ? 2 : 1)
    scan_columns(const __grid_constant__ Args<T> args) {
  constexpr Mode mode = Direct ? kDirect : kGeneric;
  constexpr int kThreads = 32 * kColumnWarps;
  const int envs = 1 << args.shift, parts = blockDim.x >> args.shift;
  const int env = threadIdx.x & (envs - 1), part = threadIdx.x >> args.shift;
  const int64_t start = first_slot(args);
  const int span = parts * K, own = (parts - 1 - part) * K;
  T chunk_decay = 1;
#pragma unroll
  for (int k = 0; k < K; ++k) chunk_decay *= args.decay;
  __shared__ T run_sums[2 * kThreads];
  __shared__ T run_links[estimator == kGae ? 1 : 2 * kThreads];
  __shared__ bool run_cuts[2 * kThreads];
  int side = 0;
  Sums sums;
  for (int64_t n0 = static_cast<int64_t>(blockIdx.x) * envs; n0 < args.num_envs;
       n0 += static_cast<int64_t>(gridDim.x) * envs) {
    const int64_t n = n0 + env;
    const bool exists = n < args.num_envs;
    T carry = 0;
    for (int first = (args.num_steps - 1) / span * span; first >= 0; first -= span) {
      const int t0 = first + own;
      Steps<T, estimator, K> s;
      const T after = value_at<T, Direct>(args, n, exists, start, t0 + K);
      load<T, estimator, mode>(args, s, n, exists, start, t0);
      pad<mode>(args, s, start, t0, after);
      const Run<T> run = weigh<Direct>(args, s, n, start, t0, after);
      const int at = side * kThreads + env;
      side ^= 1;
      run_sums[at + part * envs] = run.sum;
      run_cuts[at + part * envs] = run.cut;
      if constexpr (estimator != kGae) run_links[at + part * envs] = run.link;
      __syncthreads();
      T before = 0;
      for (int i = 0; i < parts; ++i) {
        const int from = at + i * envs;
        before = i == part ? carry : before;
        carry = gae_join(run_cuts[from], run_sums[from],
                         estimator == kGae ? chunk_decay : run_links[estimator == kGae ? 0 : from], carry);
      }
      finish(args, s, before);
      store<T, estimator, mode>(args, s, n, exists, t0);
      if (args.stats) sums.add(s.reward, [&](int k) { return s.code(k) != kInvalid; });
    }
  }
  if (args.stats) finish_stats(args.stats, args.partials, args.ticket, sums);
}

}  // namespace
}  // namespace pydrone
