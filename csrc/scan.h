// Checks of gae's arguments, shared by the CPU and CUDA libraries.
#pragma once

#include "checks.h"
#include "recurrence.h"

#include <algorithm>
#include <utility>

namespace pydrone {

constexpr int64_t kPartials = 512;  // most blocks of a CUDA launch; same as in pydrone/ops/schema.py

// Checks all arguments except `start`, which a cursor may replace; see pydrone/ops/schema.py.
inline void check_gae(const Tensor& rewards, const Tensor& values, const Tensor& dones, const Optional& truncated,
                      const Optional& valid, const Tensor& last_values, const Optional& final_values,
                      const Optional& final_rows, bool coded, int64_t bootstrap, const Optional& cursor,
                      const Tensor& advantages, const Optional& returns, const Optional& stats,
                      const Optional& workspace) {
  check_shape("rewards", rewards, {-1, -1});
  const int64_t num_envs = rewards.size(0), capacity = rewards.size(1);
  auto check_plane = [&](const char* name, const Tensor& x, int64_t steps) {
    check_shape(name, x, {num_envs, steps});
    check_device(name, x, rewards);
  };
  check_plane("advantages", advantages, -1);
  const int64_t num_steps = advantages.size(1);
  STD_TORCH_CHECK(num_steps <= capacity && num_steps < (int64_t{1} << 30), "advantages: expected at most ",
                  std::min(capacity, (int64_t{1} << 30) - 1), " steps, got ", num_steps);
  check_plane("values", values, capacity);
  check_plane("dones", dones, capacity);
  check_device("last_values", last_values, rewards);
  check_scalars("last_values", last_values, num_envs);
  for (const auto& [name, x] : {std::pair{"rewards", &rewards}, {"values", &values}, {"last_values", &last_values}})
    check_real(name, *x);
  if (coded) check_dtype("dones", dones, ScalarType::Byte);
  check_flags("dones", dones);
  for (const auto& [name, flags] : {std::pair{"truncated", &truncated}, {"valid", &valid}}) {
    if (!flags->has_value()) continue;
    check_plane(name, **flags, capacity);
    check_flags(name, **flags);
  }
  check_range("bootstrap", bootstrap, 0, 4);
  if (bootstrap == kFinalValues) {
    STD_TORCH_CHECK(final_values.has_value(), "final_values: expected a tensor with bootstrap 1, got None");
    check_device("final_values", *final_values, rewards);
    check_real("final_values", *final_values);
    if (final_rows) {
      check_shape("final_values", *final_values, {-1});
      check_plane("final_rows", *final_rows, capacity);
      check_dtype("final_rows", *final_rows, ScalarType::Int);
    } else {
      check_plane("final_values", *final_values, capacity);
    }
  }
  const ScalarType type = advantages.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double,
                  "advantages: expected dtype Float or Double, got ", torch::headeronly::toString(type));
  if (returns) {
    check_plane("returns", *returns, num_steps);
    check_dtype("returns", *returns, type);
  }
  if (stats) {
    STD_TORCH_CHECK(workspace.has_value(), "workspace: expected a tensor with stats, got None");
    for (const auto& [name, x] : {std::pair{"stats", &*stats}, {"workspace", &*workspace}}) {
      check_device(name, *x, rewards);
      check_dtype(name, *x, ScalarType::Double);
      check_contiguous(name, *x);
    }
    check_shape("stats", *stats, {3});
    const int64_t needed = std::max(3 * ((num_envs + 3) / 4) + 1, 2 * std::min(num_envs, kPartials) + 2);
    STD_TORCH_CHECK(workspace->numel() >= needed, "workspace: expected at least ", needed, " elements, got ",
                    workspace->numel());
  }
  check_cursor(cursor, rewards);
  for (const auto& [name, out] : {std::pair{"advantages", &advantages}, {"returns", returns ? &*returns : nullptr}}) {
    if (!out) continue;
    check_own(name, *out);
    for (const Tensor* x : {&rewards, &values, &dones, &last_values}) check_apart(name, *out, *x);
    for (const Optional* x : {&truncated, &valid, &final_values, &final_rows})
      if (*x) check_apart(name, *out, **x);
  }
  if (returns) check_apart("returns", *returns, advantages);
}

}  // namespace pydrone
