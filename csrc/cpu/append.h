// append in two halves, check and write, so that ppo_step can check both of its appends before either writes.
#pragma once

#include "../checks.h"

#include <functional>
#include <vector>

namespace pydrone {

// Checks append's arguments (pydrone/ops/schema.py) and returns the function that writes; they must outlive it.
std::function<void()> checked_append(const std::vector<Tensor>& memory, const std::vector<Tensor>& sources,
                                     const Tensor& layout, const Optional& dones, const Optional& truncated,
                                     const Optional& valid, int64_t slot, int64_t pool_slot, const Optional& cursor,
                                     bool commit);

}  // namespace pydrone
