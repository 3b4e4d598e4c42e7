// Argument checks that every operation makes before it touches memory. Errors name the argument, what it must be and
// what it was. The Python layer checks for its own users; these checks keep direct calls of torch.ops safe.
#pragma once

#include "errors.h"

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <initializer_list>
#include <limits>
#include <optional>
#include <string>
#include <vector>

namespace pydrone {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

inline std::string shape_of(std::initializer_list<int64_t> sizes) {
  std::string text;
  for (int64_t size : sizes) text += (text.empty() ? "" : ", ") + std::to_string(size);
  return '[' + text + ']';
}

inline std::string shape_of(const Tensor& x) {
  std::string text;
  for (int64_t i = 0; i < x.dim(); ++i) text += (i ? ", " : "") + std::to_string(x.size(i));
  return '[' + text + ']';
}

// Exactly these sizes; -1 matches any. Here and below `sizes()` and `strides()` are read once: each read of a tensor is
// a call into PyTorch, and an operation of a small step reads many.
inline void check_shape(const char* name, const Tensor& x, std::initializer_list<int64_t> sizes) {
  const auto given = x.sizes();
  bool same = given.size() == sizes.size();
  size_t i = 0;
  for (int64_t size : sizes) same = same && (size < 0 || given[i] == size), ++i;
  STD_TORCH_CHECK(same, name, ": expected shape ", shape_of(sizes), ", got ", shape_of(x));
}

// One element per environment: [N] or [N, 1].
inline void check_scalars(const char* name, const Tensor& x, int64_t num_envs) {
  const auto sizes = x.sizes();
  bool fits = sizes.size() >= 1 && sizes[0] == num_envs;
  for (size_t i = 1; i < sizes.size(); ++i) fits = fits && (sizes[i] == 1 || !num_envs);
  STD_TORCH_CHECK(fits, name, ": expected shape [", num_envs, "] or [", num_envs, ", 1], got ", shape_of(x));
}

inline void check_device(const char* name, const Tensor& x, const Tensor& like) {
  const bool cuda = x.is_cuda();
  STD_TORCH_CHECK(cuda == like.is_cuda() && (!cuda || x.get_device_index() == like.get_device_index()), name,
                  ": expected the device of the other arguments");
}

inline void check_dtype(const char* name, const Tensor& x, ScalarType expected) {
  STD_TORCH_CHECK(x.scalar_type() == expected, name, ": expected dtype ", torch::headeronly::toString(expected),
                  ", got ", torch::headeronly::toString(x.scalar_type()));
}

inline bool is_real(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::Half ||
         type == ScalarType::BFloat16;
}

inline void check_real(const char* name, const Tensor& x) {
  STD_TORCH_CHECK(is_real(x.scalar_type()), name, ": expected a floating dtype, got ",
                  torch::headeronly::toString(x.scalar_type()));
}

inline void check_contiguous(const char* name, const Tensor& x) {
  STD_TORCH_CHECK(x.is_contiguous(), name, ": expected a contiguous tensor, got one that is not");
}

inline void check_range(const char* name, int64_t value, int64_t low, int64_t high) {
  STD_TORCH_CHECK(value >= low && value < high, name, ": expected ", low, " <= ", name, " < ", high, ", got ", value);
}

// No two elements of an output share memory.
inline void check_own(const char* name, const Tensor& x) {
  for (int64_t i = 0; i < x.dim(); ++i)
    STD_TORCH_CHECK(x.stride(i) != 0 || x.size(i) <= 1, name,
                    ": expected memory of its own for every element, got an expanded tensor");
}

// The shape, strides, dtype and device of `like`.
inline void check_like(const char* name, const Tensor& x, const Tensor& like) {
  check_device(name, x, like);
  check_dtype(name, x, like.scalar_type());
  bool same = x.dim() == like.dim(), strides = true;
  for (int64_t i = 0; same && i < x.dim(); ++i) {
    same = x.size(i) == like.size(i);
    strides = strides && (x.stride(i) == like.stride(i) || x.size(i) <= 1);
  }
  STD_TORCH_CHECK(same, name, ": expected shape ", shape_of(like), ", got ", shape_of(x));
  STD_TORCH_CHECK(strides, name, ": expected the strides of the advantages, got others");
}

// Bytes from the start of a tensor's first element to the end of its last.
inline int64_t span(const Tensor& x) {
  const auto sizes = x.sizes(), strides = x.strides();
  int64_t last = 0;
  for (size_t i = 0; i < sizes.size(); ++i) {
    if (!sizes[i]) return 0;
    last += (sizes[i] - 1) * strides[i];
  }
  return (last + 1) * static_cast<int64_t>(x.element_size());
}

// `out` does not overlap `other`. Checked if both are dense or start at the same address: tensors that interleave may
// overlap in extent and still share no element.
inline void check_apart(const char* name, const Tensor& out, const Tensor& other) {
  if (!out.numel() || !other.numel()) return;
  auto dense = [](const Tensor& x, int64_t size) { return size <= x.numel() * static_cast<int64_t>(x.element_size()); };
  const auto first = reinterpret_cast<uintptr_t>(out.data_ptr()), second = reinterpret_cast<uintptr_t>(other.data_ptr());
  const int64_t size = span(out), other_size = span(other);
  const bool meet = first < second + other_size && second < first + size;
  STD_TORCH_CHECK(!meet || (first != second && !(dense(out, size) && dense(other, other_size))), name,
                  ": expected memory of its own, got some that another argument uses");
}

// A flag is set if nonzero, so every real dtype will do.
inline void check_flags(const char* name, const Tensor& x) {
  const ScalarType type = x.scalar_type();
  const bool whole = type == ScalarType::Bool || type == ScalarType::Byte || type == ScalarType::Char ||
                     type == ScalarType::Short || type == ScalarType::Int || type == ScalarType::Long ||
                     type == ScalarType::UInt16 || type == ScalarType::UInt32 || type == ScalarType::UInt64;
  STD_TORCH_CHECK(whole || is_real(type), name, ": expected a bool, integer or floating dtype, got ",
                  torch::headeronly::toString(type));
}

// The counters of a captured graph, if any: int64 [5], contiguous.
inline void check_cursor(const Optional& cursor, const Tensor& like) {
  if (!cursor) return;
  check_device("cursor", *cursor, like);
  check_shape("cursor", *cursor, {5});
  check_dtype("cursor", *cursor, ScalarType::Long);
  check_contiguous("cursor", *cursor);
}

// `bytes` at `offset` lie within a row; written so that no sum can overflow.
inline void check_offset(const char* name, int64_t offset, int64_t bytes, int64_t row_bytes) {
  STD_TORCH_CHECK(offset >= 0 && bytes <= row_bytes && offset <= row_bytes - bytes, name, ": byte offset ", offset,
                  " and ", bytes, " bytes do not lie in a row of ", row_bytes);
}

// Bytes per element of a stored dtype; raises for a dtype that cannot be stored.
inline int64_t item_size(const char* name, int64_t dtype) {
  switch (dtype < 0 || dtype > 127 ? ScalarType::Undefined : static_cast<ScalarType>(dtype)) {
    case ScalarType::Byte:
    case ScalarType::Char:
    case ScalarType::Bool:
      return 1;
    case ScalarType::Short:
    case ScalarType::UInt16:
    case ScalarType::Half:
    case ScalarType::BFloat16:
      return 2;
    case ScalarType::Int:
    case ScalarType::UInt32:
    case ScalarType::Float:
      return 4;
    case ScalarType::Long:
    case ScalarType::UInt64:
    case ScalarType::Double:
      return 8;
    default:
      STD_TORCH_CHECK(false, name, ": dtype number ", dtype, " cannot be stored");
  }
  return 0;
}

}  // namespace pydrone
