// The launch of a scan: which kernel, how many threads share an environment, how many blocks.
#pragma once

#include "scan.cuh"

#include <algorithm>

namespace pydrone {
namespace {

// Chosen for GPUs of 100 to 150 multiprocessors, whatever runs them: the order of the statistics' sums depends on it.
constexpr int kManyWarps = 2048;    // from here on, a warp takes two environments at once
constexpr int kFullWarps = 4096;    // warps that are resident at once: as many share an environment, if steps allow
constexpr int kFewBlocks = 128;     // smaller blocks rather than fewer
constexpr int kColumnSteps = 8;     // of a thread in columns
constexpr int kColumnEnvs = 32, kFewColumnEnvs = 8;  // of a block in columns: a cache line, or a sector where few

template <typename T>
struct Choice {
  void (*kernel)(Args<T>);
  int lanes, rows;
};

// The kernel for rows of at most 4 * lanes steps. Only what is fast and often used has kernels of its own for few steps.
template <typename T, Estimator estimator, Mode mode>
Choice<T> choose_rows(int lanes, bool two) {
#define PYDRONE_ROWS(n, rows) Choice<T>{scan_rows<T, estimator, mode, n, rows>, n, rows}
  if constexpr (sizeof(T) == 4 && mode == kWide && estimator == kGae) {
    if (lanes == 2) return two ? PYDRONE_ROWS(2, 2) : PYDRONE_ROWS(2, 1);
    if (lanes == 4) return two ? PYDRONE_ROWS(4, 2) : PYDRONE_ROWS(4, 1);
    if (lanes == 8) return two ? PYDRONE_ROWS(8, 2) : PYDRONE_ROWS(8, 1);
    if (lanes == 16) return two ? PYDRONE_ROWS(16, 2) : PYDRONE_ROWS(16, 1);
  }
  if constexpr (sizeof(T) == 4 && (mode == kDirect ? estimator == kGae : mode == kWide))
    if (lanes <= 8) return PYDRONE_ROWS(8, 1);
  if constexpr (sizeof(T) == 4 && mode == kWide && estimator == kGae)
    if (two) return PYDRONE_ROWS(32, 2);
  return PYDRONE_ROWS(32, 1);
#undef PYDRONE_ROWS
}

// Launches with `warps` or fewer in a block of `envs` environments a warp (parts: warps an environment).
template <typename T>
void launch(const Args<T>& args, void (*kernel)(Args<T>), int64_t block_envs, int threads, cudaStream_t stream) {
  const int64_t blocks = (args.num_envs + block_envs - 1) / block_envs, turns = (blocks + kPartials - 1) / kPartials;
  kernel<<<static_cast<unsigned>((blocks + turns - 1) / turns), threads, 0, stream>>>(args);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

inline int log2(int power) { return power > 1 ? 1 + log2(power / 2) : 0; }

// Warps of a block, if there are `warps` in all and `least` must be together.
inline int block_warps(int64_t warps, int least, int most) {
  while (most > least && warps < int64_t{most} * kFewBlocks) most /= 2;
  return most;
}

template <typename T, Estimator estimator, Mode mode>
void launch_rows(Args<T> args, cudaStream_t stream) {
  const int64_t groups = (args.num_steps + kLaneSteps - 1) / kLaneSteps;
  int lanes = 2;
  while (lanes < groups && lanes <= 32) lanes *= 2;
  if (lanes <= 32) {
    Choice<T> choice = choose_rows<T, estimator, mode>(lanes, true);
    auto warps = [&] { return (args.num_envs * choice.lanes + 32 * choice.rows - 1) / (32 * choice.rows); };
    if (warps() < kManyWarps) choice = choose_rows<T, estimator, mode>(lanes, false);
    const int in_block = block_warps(warps(), 1, kBlockWarps<mode>);
    launch(args, choice.kernel, int64_t{in_block} * (32 / choice.lanes) * choice.rows, 32 * in_block, stream);
  } else {
    int parts = 1;
    while (parts < kBlockWarps<mode> && parts * kTile < args.num_steps && args.num_envs * parts < kFullWarps) parts *= 2;
    const int in_block = block_warps(args.num_envs * parts, parts, kBlockWarps<mode>);
    args.shift = log2(parts);
    launch(args, scan_tiles<T, estimator, mode>, in_block / parts, 32 * in_block, stream);
  }
}

template <typename T, Estimator estimator, bool Direct>
void launch_columns(Args<T> args, cudaStream_t stream) {
  constexpr int kSmaller = sizeof(T) == 4 || estimator == kGae ? 2 : 4;  // in what is slow anyway, without spills
  constexpr int K = Direct && sizeof(T) == 4 ? kColumnSteps : kColumnSteps / kSmaller;
  const int envs = args.num_envs < kColumnEnvs * kFewBlocks ? kFewColumnEnvs : kColumnEnvs, step = 32 / envs;
  const int wanted = (args.num_steps + K * step - 1) / (K * step) * step;
  args.shift = log2(envs);
  launch(args, scan_columns<T, estimator, Direct, K>, envs, envs * std::min(wanted, 32 * kColumnWarps / envs), stream);
}

template <typename T, Estimator estimator>
void launch(const Args<T>& args, bool env_major, Mode mode, cudaStream_t stream) {
  constexpr bool kFast = sizeof(T) == 4 || estimator == kGae;  // else all accesses are generic
  constexpr Mode direct = sizeof(T) == 4 ? kDirect : kGeneric;
  if (!env_major)
    kFast && mode != kGeneric ? launch_columns<T, estimator, kFast>(args, stream)
                              : launch_columns<T, estimator, false>(args, stream);
  else if (kFast && mode == kWide)
    launch_rows<T, estimator, kFast ? kWide : kGeneric>(args, stream);
  else if (kFast && mode == kDirect)
    launch_rows<T, estimator, direct>(args, stream);
  else
    launch_rows<T, estimator, kGeneric>(args, stream);
}

template <typename T, Estimator estimator>
void run(const Scan& scan, const Optional& log_rhos, const Optional& q_values, double gamma, double lam,
         double rho_clip, double c_clip) {
  const Tensor& out = estimator == kGae ? *scan.advantages : *scan.targets;
  Args<T> args{};
  args.rewards = Plane(scan.rewards);
  args.values = Plane(scan.values);
  args.dones = Plane(scan.dones);
  args.last_values = Plane(scan.last_values);
  if (!scan.coded && scan.truncated) args.truncated = Plane(*scan.truncated);
  if (!scan.coded && scan.valid) args.valid = Plane(*scan.valid);
  if (scan.bootstrap == kFinalValues) {
    args.final_values = Plane(*scan.final_values);
    if (scan.final_rows) {
      args.final_rows = Plane(*scan.final_rows);
      args.pool_size = scan.final_values->size(0);
    }
  }
  if (log_rhos) args.log_rhos = Plane(*log_rhos);
  if (q_values) args.q_values = Plane(*q_values);
  if (scan.advantages) {
    args.advantages = static_cast<T*>(scan.advantages->data_ptr());
    args.advantages_env = scan.advantages->stride(0);
    args.advantages_step = scan.advantages->stride(1);
  }
  if (scan.targets) {
    args.returns = static_cast<T*>(scan.targets->data_ptr());
    args.returns_env = scan.targets->stride(0);
    args.returns_step = scan.targets->stride(1);
  }
  if (scan.stats) {
    char* memory = static_cast<char*>(scan.workspace->data_ptr());
    args.stats = static_cast<double*>(scan.stats->data_ptr());
    args.ticket = reinterpret_cast<uint64_t*>(memory);
    args.partials = reinterpret_cast<double2*>(memory + (reinterpret_cast<uintptr_t>(memory) % 16 ? 8 : 16));
  }
  if (scan.cursor) args.cursor = static_cast<const int64_t*>(scan.cursor->data_ptr());
  args.num_envs = scan.rewards.size(0);
  args.capacity = scan.rewards.size(1);
  args.num_steps = static_cast<int32_t>(out.size(1));
  args.start = scan.start;
  args.bootstrap = static_cast<int32_t>(scan.bootstrap);
  args.coded = scan.coded;
  args.gamma = static_cast<T>(gamma);
  args.decay = static_cast<T>(gamma * lam);
  args.powers[0] = args.decay * args.decay * args.decay * args.decay;
  for (int i = 1; i < 6; ++i) args.powers[i] = args.powers[i - 1] * args.powers[i - 1];
  args.rho_clip = static_cast<T>(rho_clip);
  args.c_clip = static_cast<T>(c_clip);

  bool direct = true, wide = args.num_steps % kLaneSteps == 0 && (scan.cursor || starts_wide(args, scan.start));
  auto see = [&](const void* data, int64_t env, int64_t step, bool fits, size_t aligned) {
    direct = direct && fits;
    wide = wide && step == 1 && env % kLaneSteps == 0 && reinterpret_cast<uintptr_t>(data) % aligned == 0;
  };
  const auto type = static_cast<int32_t>(out.scalar_type());
  for (const Plane* x : {&args.rewards, &args.values, &args.log_rhos, &args.q_values})
    if (x->data) see(x->data, x->env, x->step, x->type == type, 16);
  direct = direct && args.last_values.type == type && (!args.final_values.data || args.final_values.type == type);
  for (const Plane* x : {&args.dones, &args.truncated, &args.valid})
    if (x->data) see(x->data, x->env, x->step, x->size == 1, 4);
  if (scan.advantages) see(args.advantages, args.advantages_env, args.advantages_step, true, 16);
  if (scan.targets) see(args.returns, args.returns_env, args.returns_step, true, 16);
  const Launch context(scan.rewards);
  launch<T, estimator>(args, scan.rewards.stride(0) != 1 || scan.rewards.stride(1) == 1,
                       !direct ? kGeneric : wide ? kWide : kDirect, context.stream);
}

// Runs a checked scan in the dtype of its outputs. Without a sample only the statistics are written.
template <Estimator estimator>
void run(const Scan& scan, const Optional& log_rhos, const Optional& q_values, double gamma, double lam,
         double rho_clip, double c_clip) {
  const Tensor& out = estimator == kGae ? *scan.advantages : *scan.targets;
  if (out.size(0) == 0 || out.size(1) == 0) {
    if (!scan.stats) return;
    const Launch context(scan.rewards);
    STD_CUDA_CHECK(cudaMemsetAsync(scan.stats->data_ptr(), 0, 3 * sizeof(double), context.stream));
    return;
  }
  if (!scan.cursor) check_range("start", scan.start, 0, scan.rewards.size(1));
  auto* typed = out.scalar_type() == ScalarType::Float ? run<float, estimator> : run<double, estimator>;
  typed(scan, log_rhos, q_values, gamma, lam, rho_clip, c_clip);
}

}  // namespace
}  // namespace pydrone
