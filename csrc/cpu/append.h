// append in two halves, for an operation that does more than one: all are checked before the first one writes.
#pragma once

#include "../checks.h"

#include <functional>
#include <vector>

namespace pydrone {

// Checks append's arguments (pydrone/ops/schema.py), which have to outlive what it returns: the writing.
std::function<void()> checked_append(const std::vector<Tensor>& memory, const std::vector<Tensor>& sources,
                                     const Tensor& layout, const Optional& dones, const Optional& truncated,
                                     const Optional& valid, int64_t slot, int64_t pool_slot, const Optional& cursor,
                                     bool commit);

}  // namespace pydrone
