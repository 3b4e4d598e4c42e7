// append's arguments, parsed and checked, shared by the CPU and CUDA libraries.
#pragma once

#include "checks.h"
#include "recurrence.h"

#include <utility>
#include <vector>

namespace pydrone {

// Where a source [N, ...] lies.
struct Extent {
  const char* data;
  int64_t size, env, item;  // bytes: up to the end of its last element, from one environment to the next, of an element
};

inline Extent extent_of(const Tensor& x) {
  const auto item = static_cast<int64_t>(x.element_size());
  return {static_cast<const char*>(x.data_ptr()), span(x), x.stride(0) * item, item};
}

// The memory that a step writes in `slot`: rows of `bytes`, and columns of planes, float32. A view kept from an earlier
// rollout may lie there, and whether it is read before it is overwritten would depend on the backend.
class Written {
 public:
  Written(const char* rows, int64_t bytes, int64_t slot, int64_t num_planes)
      : slot_(slot), first_(rows + slot * bytes), end_(first_ + bytes) {
    columns_.reserve(num_planes);
  }

  void add(const void* plane, int64_t env, int64_t step, int64_t num_envs) {
    const char* const first = static_cast<const char*>(plane) + slot_ * step;
    columns_.push_back({first, first + (num_envs - 1) * env + 4, num_envs > 1 ? env : 4});
  }

  // `own`: the column that the source is copied to, which it may be; or -1.
  void check_apart(const char* name, const Extent& source, int64_t own) const {
    bool meet = first_ < end_ && first_ < source.data + source.size && source.data < end_;
    for (int64_t j = 0; j < static_cast<int64_t>(columns_.size()) && source.size; ++j)
      if (j != own) meet = meet || columns_[j].meets(source);
    STD_TORCH_CHECK(!meet, name, ": expected memory of its own, got a view of the step that is written");
  }

 private:
  struct Column {
    const char *first, *end;
    int64_t stride;  // bytes; at most 4 if dense

    // Whether they share an element. A source with the column's own stride, such as another column of the plane, may lie
    // between its elements.
    bool meets(const Extent& source) const {
      if (source.data >= end || first >= source.data + source.size) return false;
      if (stride <= 4) return true;
      if (source.env != stride) return false;
      const int64_t apart = ((source.data - first) % stride + stride) % stride;
      return apart < 4 || apart + source.item > stride;
    }
  };

  int64_t slot_;
  const char *first_, *end_;
  std::vector<Column> columns_;
};

// append's arguments, split up according to its layout; see pydrone/ops/schema.py.
struct Step {
  struct Field {
    int64_t offset, dtype, width, dims;
  };
  struct Sources {
    const char* name;
    const Tensor* tensors;
    const Field* fields;  // null for planes
    int64_t count;
    const Tensor& operator[](int64_t i) const { return tensors[i]; }
  };
  const Tensor& rows;
  const Tensor* codes;  // null: memory is rows only
  const Tensor* planes;
  const Tensor* pool;  // final_obs, count, final_rows; or null
  const Tensor* not_finite;  // one number per rollout; or null
  int64_t looked_at;         // this many fields of a row, from the first, are checked for values that are not finite
  Sources row, plane, final;

  Step(const std::vector<Tensor>& memory, const std::vector<Tensor>& sources, const Tensor& layout)
      : rows(first(memory)) {
    STD_TORCH_CHECK(!layout.is_cuda(), "layout: expected a tensor on the CPU");
    check_dtype("layout", layout, ScalarType::Long);
    check_contiguous("layout", layout);
    check_shape("layout", layout, {-1, 4});
    STD_TORCH_CHECK(layout.size(0) > 0, "layout: expected a row of counts first, got shape ", shape_of(layout));
    const auto* counts = static_cast<const int64_t*>(layout.data_ptr());
    const auto given = static_cast<int64_t>(sources.size()), rest = layout.size(0) - 1;
    for (int64_t i = 0; i < 3; ++i)
      STD_TORCH_CHECK(counts[i] >= 0 && counts[i] <= given, "layout: expected counts of 0 to ", given,
                      " sources, got ", counts[i]);
    STD_TORCH_CHECK(counts[0] + counts[1] + counts[2] == given, "sources: expected ", counts[0] + counts[1] + counts[2],
                    " as layout says, got ", given);
    STD_TORCH_CHECK(counts[0] + counts[2] == rest, "layout: expected ", counts[0] + counts[2], " fields, got ", rest);
    const auto* fields = reinterpret_cast<const Field*>(counts + 4);
    row = {"sources", sources.data(), fields, counts[0]};
    plane = {"sources of planes", row.tensors + counts[0], nullptr, counts[1]};
    final = {"final sources", plane.tensors + counts[1], fields + counts[0], counts[2]};
    looked_at = counts[3];
    STD_TORCH_CHECK(looked_at >= 0 && looked_at <= counts[0], "layout: expected 0 to ", counts[0],
                    " fields to check for finite values, got ", looked_at);
    const auto held = static_cast<int64_t>(memory.size()) - 2 - plane.count - (looked_at ? 1 : 0);
    const bool alone = memory.size() == 1 && plane.count == 0 && !looked_at;
    STD_TORCH_CHECK(alone || held == 0 || held == 3, "memory: expected rows, codes, ", plane.count,
                    " planes, and a pool's three tensors or none", looked_at ? ", then not_finite" : "", ", got ",
                    memory.size(), " tensors");
    codes = alone ? nullptr : &memory[1];
    planes = alone ? nullptr : memory.data() + 2;
    pool = held == 3 ? planes + plane.count : nullptr;
    not_finite = looked_at ? &memory.back() : nullptr;
    check_shape("rows", rows, {-1, -1, -1});
    check_dtype("rows", rows, ScalarType::Byte);
    check_contiguous("rows", rows);
    for (int64_t i = 0; i < plane.count; ++i) {
      check_device("planes", planes[i], rows);
      check_shape("planes", planes[i], {rows.size(1), rows.size(0)});
      check_dtype("planes", planes[i], ScalarType::Float);
      check_device(plane.name, plane[i], rows);
      check_scalars(plane.name, plane[i], rows.size(1));
      check_real(plane.name, plane[i]);
    }
    if (not_finite) {
      check_device("not_finite", *not_finite, rows);
      check_shape("not_finite", *not_finite, {-1});
      STD_TORCH_CHECK(not_finite->size(0) > 0, "not_finite: expected at least one rollout, got shape [0]");
      check_dtype("not_finite", *not_finite, ScalarType::Int);
      check_contiguous("not_finite", *not_finite);
    }
    if (!codes) return;
    check_device("codes", *codes, rows);
    check_shape("codes", *codes, {rows.size(1), rows.size(0)});
    check_dtype("codes", *codes, ScalarType::Byte);
  }

  // No source overlaps the memory written at `slot`.
  void check_apart(int64_t slot) const {
    const int64_t num_envs = rows.size(1);
    Written written(static_cast<char*>(rows.data_ptr()), row.count ? num_envs * rows.size(2) : 0, slot, plane.count);
    for (int64_t j = 0; j < plane.count; ++j)
      written.add(planes[j].data_ptr(), 4 * planes[j].stride(0), 4 * planes[j].stride(1), num_envs);
    for (const Sources* sources : {&row, &plane, &final})
      for (int64_t i = 0; i < sources->count; ++i)
        written.check_apart(sources->name, extent_of((*sources)[i]), sources == &plane ? i : -1);
  }

  // Checks the end flags and the pool; returns whether truncations go to a pool.
  bool check_ends(const Optional& dones, const Optional& truncated, const Optional& valid) const {
    STD_TORCH_CHECK(codes || !dones, "memory: expected codes with dones, got rows alone");
    for (const auto& [name, flags] : {std::pair{"dones", &dones}, {"truncated", &truncated}, {"valid", &valid}}) {
      if (!flags->has_value()) continue;
      check_device(name, **flags, rows);
      check_scalars(name, **flags, rows.size(1));
      check_flags(name, **flags);
    }
    if (!pool || !dones || !truncated) return false;
    for (int i = 0; i < 3; ++i) check_device("pool", pool[i], rows);
    check_shape("final_obs", pool[0], {-1, -1, -1});
    check_dtype("final_obs", pool[0], ScalarType::Byte);
    check_contiguous("final_obs", pool[0]);
    STD_TORCH_CHECK(pool[0].size(0) > 0, "final_obs: expected at least one pool, got shape ", shape_of(pool[0]));
    check_shape("count", pool[1], {pool[0].size(0), 2});
    check_dtype("count", pool[1], ScalarType::Int);
    check_contiguous("count", pool[1]);
    check_shape("final_rows", pool[2], {rows.size(1), rows.size(0)});
    check_dtype("final_rows", pool[2], ScalarType::Int);
    return true;
  }

 private:
  static const Tensor& first(const std::vector<Tensor>& memory) {
    STD_TORCH_CHECK(!memory.empty(), "memory: expected rows, codes and planes, got no tensor");
    return memory[0];
  }
};

// The exponent bits in 32 bits of a row read as `type`: two numbers of a half-precision type, or half of a double.
// `(x & mask) + add` carries into kCarry if an exponent is all ones, as in infinities and NaN only.
struct Exponent {
  uint32_t mask, add;
};
constexpr uint32_t kCarry = 0x80008000;

PYDRONE_HD Exponent exponent_of(int32_t type, bool high) {
  if (type == static_cast<int32_t>(ScalarType::Float)) return {0x7F800000, 0x00800000};
  if (type == static_cast<int32_t>(ScalarType::Half)) return {0x7C007C00, 0x04000400};
  if (type == static_cast<int32_t>(ScalarType::BFloat16)) return {0x7F807F80, 0x00800080};
  if (type == static_cast<int32_t>(ScalarType::Double) && high) return {0x7FF00000, 0x00100000};
  return {0, 0};
}

PYDRONE_HD bool not_finite(uint32_t bits, Exponent of) { return ((bits & of.mask) + of.add) & kCarry; }

// A field's source: [N, ...] with the dimensions and elements per environment that the layout gives; a scalar is [N] or
// [N, 1].
inline void check_source(const char* name, const Tensor& source, const Step::Field& field, int64_t num_envs) {
  const auto sizes = source.sizes();
  const auto dims = static_cast<int64_t>(sizes.size());
  bool fits = dims >= 1 && sizes[0] == num_envs;
  if (fits && dims == 2 && field.dims < 2) {
    fits = sizes[1] == (field.dims ? field.width : 1);
  } else if (fits) {
    int64_t width = 1;
    for (int64_t i = 1; i < dims; ++i) width *= sizes[i];
    fits = dims == 1 + field.dims && width == field.width;
  }
  STD_TORCH_CHECK(fits, name, ": expected shape [", num_envs, ", ...] of ", field.dims, " inner dimensions and ",
                  field.width, " elements, got ", shape_of(source));
}

}  // namespace pydrone
