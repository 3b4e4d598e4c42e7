// The fields of a step's row: where they come from, and how they are written.
#pragma once

#include "../step.h"

#include <array>

namespace pydrone {

constexpr int64_t kInner = 6;  // most inner dimensions of a source, after merging contiguous ones

// A source [N, ...] and where it goes. `data` is known last: all the rest is the same for other tensors of this dtype,
// shape and strides.
struct Field : Extent {
  ScalarType from, to;
  int64_t offset, width, to_size;  // byte offset in the row, elements, bytes per element
  int64_t dims;                    // inner dimensions; 0: dense
  std::array<int64_t, kInner> sizes, strides;
  int64_t to_env, to_slot;  // of a plane: bytes from one environment, and one step, to the next
  int64_t address;          // the source's place among the addresses of a launch
  bool looked_at;           // checked for values that are not finite

  bool plain() const { return from == to && dims == 0; }
  int64_t bytes() const { return width * to_size; }
};

// Copies a field of environments [n0, n0 + envs) to rows from `to` on: any strides, any conversion between floating
// types.
void copy_general(const Field& field, char* to, int64_t row_bytes, int64_t n0, int64_t envs);

// Writes the rows of all environments; the fields come in ascending order of offset. Returns whether a checked value is
// not finite.
bool append_rows(char* rows, int64_t row_bytes, const Field* fields, int64_t count, int64_t num_envs);

}  // namespace pydrone
