// The arguments that gae and off_policy share, and their checks, for the CPU and CUDA libraries.
#pragma once

#include "checks.h"
#include "recurrence.h"

#include <algorithm>
#include <utility>

namespace pydrone {

constexpr int64_t kPartials = 512;  // as in pydrone/ops/schema.py

// See pydrone/ops/schema.py. An optional one may refer to a plain tensor: that is why they are copied.
struct Scan {
  const Tensor &rewards, &values, &dones;
  const Optional &truncated, &valid;
  const Tensor& last_values;
  const Optional &final_values, &final_rows;
  int64_t start;
  bool coded;
  int64_t bootstrap;
  const Optional& cursor;
  const Optional advantages, targets;  // gae's targets are its returns
  const Optional &stats, &workspace;
};

// Checks all arguments except `start`, which a cursor may replace. `first` names the output that must exist and gives
// the dtype and the number of steps, `second` the other; `inputs` are what an estimator has besides, [N, C].
inline void check_scan(const Scan& scan, std::pair<const char*, const Optional*> first,
                       std::pair<const char*, const Optional*> second,
                       std::initializer_list<std::pair<const char*, const Optional*>> inputs) {
  const Tensor &rewards = scan.rewards, &output = **first.second;
  check_shape("rewards", rewards, {-1, -1});
  const int64_t num_envs = rewards.size(0), capacity = rewards.size(1);
  auto check_plane = [&](const char* name, const Tensor& x, int64_t steps) {
    check_shape(name, x, {num_envs, steps});
    check_device(name, x, rewards);
  };
  check_plane(first.first, output, -1);
  const int64_t num_steps = output.size(1);
  STD_TORCH_CHECK(num_steps <= capacity && num_steps < (int64_t{1} << 30), first.first, ": expected at most ",
                  std::min(capacity, (int64_t{1} << 30) - 1), " steps, got ", num_steps);
  check_plane("values", scan.values, capacity);
  check_plane("dones", scan.dones, capacity);
  check_device("last_values", scan.last_values, rewards);
  check_scalars("last_values", scan.last_values, num_envs);
  check_real("rewards", rewards);
  check_real("values", scan.values);
  check_real("last_values", scan.last_values);
  for (const auto& [name, x] : inputs) {
    if (!x->has_value()) continue;
    check_plane(name, **x, capacity);
    check_real(name, **x);
  }
  if (scan.coded) check_dtype("dones", scan.dones, ScalarType::Byte);
  check_flags("dones", scan.dones);
  for (const auto& [name, flags] : {std::pair{"truncated", &scan.truncated}, {"valid", &scan.valid}}) {
    if (!flags->has_value()) continue;
    check_plane(name, **flags, capacity);
    check_flags(name, **flags);
  }
  check_range("bootstrap", scan.bootstrap, 0, 4);
  if (scan.bootstrap == kFinalValues) {
    STD_TORCH_CHECK(scan.final_values.has_value(), "final_values: expected a tensor with bootstrap 1, got None");
    check_device("final_values", *scan.final_values, rewards);
    check_real("final_values", *scan.final_values);
    if (scan.final_rows) {
      check_shape("final_values", *scan.final_values, {-1});
      check_plane("final_rows", *scan.final_rows, capacity);
      check_dtype("final_rows", *scan.final_rows, ScalarType::Int);
    } else {
      check_plane("final_values", *scan.final_values, capacity);
    }
  }
  const ScalarType type = output.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double, first.first,
                  ": expected dtype Float or Double, got ", torch::headeronly::toString(type));
  if (*second.second) {
    check_plane(second.first, **second.second, num_steps);
    check_dtype(second.first, **second.second, type);
  }
  if (scan.stats) {
    STD_TORCH_CHECK(scan.workspace.has_value(), "workspace: expected a tensor with stats, got None");
    for (const auto& [name, x] : {std::pair{"stats", &*scan.stats}, {"workspace", &*scan.workspace}}) {
      check_device(name, *x, rewards);
      check_dtype(name, *x, ScalarType::Double);
      check_contiguous(name, *x);
    }
    check_shape("stats", *scan.stats, {3});
    const int64_t needed = 3 * std::max((num_envs + 3) / 4, std::min(num_envs, kPartials)) + 1;
    STD_TORCH_CHECK(scan.workspace->numel() >= needed, "workspace: expected at least ", needed, " elements, got ",
                    scan.workspace->numel());
  }
  check_cursor(scan.cursor, rewards);
  for (const auto& [name, out] : {first, second}) {
    if (!out->has_value()) continue;
    check_own(name, **out);
    for (const Tensor* x : {&rewards, &scan.values, &scan.dones, &scan.last_values}) check_apart(name, **out, *x);
    for (const Optional* x : {&scan.truncated, &scan.valid, &scan.final_values, &scan.final_rows})
      if (*x) check_apart(name, **out, **x);
    for (const auto& input : inputs)
      if (*input.second) check_apart(name, **out, **input.second);
  }
  if (*second.second) check_apart(second.first, **second.second, output);
}

inline void check_gae(const Scan& scan) {
  check_scan(scan, {"advantages", &scan.advantages}, {"returns", &scan.targets}, {});
}

inline void check_off_policy(const Scan& scan, const Tensor& log_rhos, const Optional& q_values, double rho_clip,
                             double c_clip) {
  const Optional ratios = log_rhos;
  check_scan(scan, {"targets", &scan.targets}, {"advantages", &scan.advantages},
             {{"log_rhos", &ratios}, {"q_values", &q_values}});
  for (const auto& [name, clip] : {std::pair{"rho_clip", rho_clip}, {"c_clip", c_clip}})
    STD_TORCH_CHECK(clip >= 0, name, ": expected a number of at least 0, got ", clip);
  STD_TORCH_CHECK(!q_values || !scan.advantages, "advantages: expected None with q_values, got a tensor");
  STD_TORCH_CHECK(!scan.stats || scan.advantages, "advantages: expected a tensor with stats, got None");
}

}  // namespace pydrone
