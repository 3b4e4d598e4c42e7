// Storing one step on the CPU: rows are put together in L1, a block of environments at a time, and leave it in
// streaming stores. One thread: a core saturates the write bandwidth, and a fork costs as much as the step of a
// small ring.
#include "common.h"

#include <algorithm>
#include <array>
#include <vector>

namespace pydrone {
namespace {

constexpr int64_t kInner = 6;         // most inner dimensions of a source, after merging what is dense
constexpr int64_t kBlockBytes = 16384;  // of rows put together at a time
constexpr int64_t kSlack = 16;        // a copy in 16-byte pieces may run over a field's end by so much

// A source [N, ...] and where it goes in a row.
struct Field {
  const char* data;
  int64_t env;  // bytes from one environment to the next
  ScalarType from, to;
  int64_t offset, width, from_size, to_size;  // byte offset in the row, elements, bytes an element
  int64_t dims;                               // inner dimensions; 0: dense
  std::array<int64_t, kInner> sizes, strides;

  bool plain() const { return from == to && dims == 0; }
  int64_t bytes() const { return width * to_size; }
};

Field describe(const char* name, const Tensor& source, int64_t offset, int64_t dtype, const Tensor& rows,
               int64_t row_bytes) {
  const int64_t num_envs = rows.size(1);
  STD_TORCH_CHECK(source.dim() >= 1 && source.size(0) == num_envs, name, ": expected a first dimension of ", num_envs,
                  ", got shape ", shape_of(source));
  Field field{};
  field.data = static_cast<const char*>(source.data_ptr());
  field.from = source.scalar_type();
  field.to = static_cast<ScalarType>(dtype);
  field.from_size = static_cast<int64_t>(source.element_size());
  field.to_size = item_size(name, dtype);
  field.env = source.stride(0) * field.from_size;
  field.offset = offset;
  field.width = 1;
  for (int64_t i = 1; i < source.dim(); ++i) field.width *= source.size(i);
  check_offset(name, offset, field.bytes(), row_bytes);
  STD_TORCH_CHECK(offset % field.to_size == 0, name, ": byte offset ", offset, " is no multiple of ", field.to_size);
  STD_TORCH_CHECK(field.from == field.to || (is_real(field.from) && is_real(field.to)), name, ": expected dtype ",
                  torch::headeronly::toString(field.to), ", got ", torch::headeronly::toString(field.from));
  check_device(name, source, rows);
  // Merge inner dimensions from the last one up; none left over means the environment's elements are dense.
  int64_t dense = 1;
  bool is_dense = true;
  for (int64_t i = source.dim() - 1; i >= 1; --i) {
    const int64_t size = source.size(i), stride = source.stride(i);
    if (size == 1) continue;
    is_dense = is_dense && stride == dense;
    dense *= size;
    if (field.dims && stride == field.strides[field.dims - 1] * field.sizes[field.dims - 1]) {
      field.sizes[field.dims - 1] *= size;
      continue;
    }
    STD_TORCH_CHECK(field.dims < kInner, name, ": more than ", kInner,
                    " inner dimensions of unrelated strides; pass .contiguous()");
    field.sizes[field.dims] = size;
    field.strides[field.dims++] = stride;
  }
  if (is_dense || field.width == 0) field.dims = 0;
  return field;
}

// Elements of one environment, in order, to a dense row of another type.
template <class To, class From>
void copy_strided(const Field& field, To* to, const From* from) {
  if (field.dims == 0) {
    for (int64_t i = 0; i < field.width; ++i) to[i] = convert<To>(from[i]);
    return;
  }
  std::array<int64_t, kInner> index{};
  const From* source = from;
  for (int64_t i = 0; i < field.width; ++i) {
    to[i] = convert<To>(*source);
    for (int64_t d = 0; d < field.dims; ++d) {
      source += field.strides[d];
      if (++index[d] < field.sizes[d]) break;
      source -= field.strides[d] * field.sizes[d];
      index[d] = 0;
    }
  }
}

template <class To, class From>
void copy_envs(const Field& field, char* to, int64_t row_bytes, int64_t n0, int64_t envs) {
  for (int64_t n = 0; n < envs; ++n)
    copy_strided(field, reinterpret_cast<To*>(to + n * row_bytes + field.offset),
                 reinterpret_cast<const From*>(field.data + (n0 + n) * field.env));
}

// Any strides, any conversion between floating types.
void copy_general(const Field& field, char* to, int64_t row_bytes, int64_t n0, int64_t envs) {
  if (field.from == field.to) {
    switch (field.to_size) {
      case 1: return copy_envs<uint8_t, uint8_t>(field, to, row_bytes, n0, envs);
      case 2: return copy_envs<uint16_t, uint16_t>(field, to, row_bytes, n0, envs);
      case 4: return copy_envs<uint32_t, uint32_t>(field, to, row_bytes, n0, envs);
      default: return copy_envs<uint64_t, uint64_t>(field, to, row_bytes, n0, envs);
    }
  }
  for_real("sources", field.from, [&](auto from) {
    for_real("dtypes", field.to,
             [&](auto kind) { copy_envs<decltype(kind), decltype(from)>(field, to, row_bytes, n0, envs); });
  });
}

// `Pieces` 16-byte pieces an environment: what runs over the field's end is written over by the next field or row.
template <int Pieces>
void copy_pieces(const Field& field, char* to, int64_t row_bytes, int64_t n0, int64_t envs) {
  to += field.offset;
  const char* from = field.data + n0 * field.env;
  for (int64_t n = 0; n < envs; ++n, to += row_bytes, from += field.env) std::memcpy(to, from, Pieces * 16);
}

template <class Word>
void copy_word(const Field& field, char* to, int64_t row_bytes, int64_t n0, int64_t envs) {
  to += field.offset;
  const char* from = field.data + n0 * field.env;
  for (int64_t n = 0; n < envs; ++n, to += row_bytes, from += field.env) std::memcpy(to, from, sizeof(Word));
}

// Fields come in ascending order of their offsets.
void copy_field(const Field& field, char* to, int64_t row_bytes, int64_t n0, int64_t envs, int64_t num_envs) {
  if (!field.plain()) return copy_general(field, to, row_bytes, n0, envs);
  const int64_t bytes = field.bytes();
  if (bytes == 4) return copy_word<uint32_t>(field, to, row_bytes, n0, envs);
  if (bytes == 8) return copy_word<uint64_t>(field, to, row_bytes, n0, envs);
  // The last environments' last pieces would be read beyond the end of the source, and a row's last field must not
  // run over into the next row, whose first fields stand there already.
  const int64_t pieces = (bytes + 15) / 16, over = pieces * 16 - bytes;
  int64_t safe = envs;
  if (over && field.env < bytes) safe = 0;
  else if (over) safe = std::clamp<int64_t>(num_envs - (over + field.env - 1) / field.env - n0, 0, envs);
  if (field.offset + pieces * 16 > row_bytes) safe = 0;
  switch (pieces) {
    case 1: copy_pieces<1>(field, to, row_bytes, n0, safe); break;
    case 2: copy_pieces<2>(field, to, row_bytes, n0, safe); break;
    case 3: copy_pieces<3>(field, to, row_bytes, n0, safe); break;
    case 4: copy_pieces<4>(field, to, row_bytes, n0, safe); break;
    case 5: copy_pieces<5>(field, to, row_bytes, n0, safe); break;
    case 6: copy_pieces<6>(field, to, row_bytes, n0, safe); break;
    default: safe = 0;
  }
  for (int64_t n = safe; n < envs; ++n)
    std::memcpy(to + n * row_bytes + field.offset, field.data + (n0 + n) * field.env, bytes);
}

std::vector<Field> describe_all(const char* name, const std::vector<Tensor>& sources,
                                const std::vector<int64_t>& offsets, const std::vector<int64_t>& dtypes,
                                const Tensor& rows, int64_t row_bytes) {
  STD_TORCH_CHECK(sources.size() == offsets.size() && sources.size() == dtypes.size(), name,
                  ": expected as many tensors as offsets and dtypes");
  std::vector<Field> fields;
  fields.reserve(sources.size());
  for (size_t i = 0; i < sources.size(); ++i)
    fields.push_back(describe(name, sources[i], offsets[i], dtypes[i], rows, row_bytes));
  std::sort(fields.begin(), fields.end(), [](const Field& x, const Field& y) { return x.offset < y.offset; });
  return fields;
}

void append_rows(char* rows, int64_t row_bytes, const std::vector<Field>& fields, int64_t num_envs) {
  if (row_bytes > kBlockBytes) {  // pictures: a row is longer than what is put together at a time
    for (const Field& field : fields) copy_general(field, rows, row_bytes, 0, num_envs);
    return;
  }
  const int64_t block = kBlockBytes / row_bytes;
  alignas(64) char staged[kBlockBytes + kSlack];
  std::memset(staged, 0, sizeof(staged));
  for (int64_t n0 = 0; n0 < num_envs; n0 += block) {
    const int64_t envs = std::min(block, num_envs - n0), ahead = std::clamp<int64_t>(num_envs - n0 - envs, 0, block);
    for (const Field& field : fields) {
      // Each field is a short run of memory, over before the processor's own prefetcher has noticed it.
      if (field.env > 0) fetch(field.data + (n0 + envs) * field.env, ahead * field.env);
      copy_field(field, staged, row_bytes, n0, envs, num_envs);
    }
    stream(rows + n0 * row_bytes, staged, envs * row_bytes);
  }
}

template <class To>
void copy_plane(To* to, int64_t stride, const Tensor& source, int64_t num_envs) {
  const int64_t step = source.stride(0);
  for_real("plane_sources", source.scalar_type(), [&](auto kind) {
    using From = decltype(kind);
    auto* from = static_cast<const From*>(source.data_ptr());
    if constexpr (std::is_same_v<To, From>)
      if (stride == 1 && step == 1) return stream(to, from, num_envs * sizeof(To));
    for (int64_t n = 0; n < num_envs; ++n) to[n * stride] = convert<To>(from[n * step]);
  });
}

// codes[i] = value where the flag of environment n0 + i, as a truth, equals `when`.
void mark(uint8_t* codes, const char* name, const Tensor& flags, int64_t n0, int64_t envs, bool when, uint8_t value) {
  const int64_t step = flags.stride(0);
  for_flag(name, flags.scalar_type(), [&](auto kind) {
    using From = decltype(kind);
    auto* from = static_cast<const From*>(flags.data_ptr()) + n0 * step;
    if (step == 1)
      for (int64_t i = 0; i < envs; ++i) codes[i] = nonzero(from[i]) == when ? value : codes[i];
    else
      for (int64_t i = 0; i < envs; ++i) codes[i] = nonzero(from[i * step]) == when ? value : codes[i];
  });
}

// The final observations of one environment to the pool of its rollout, if there is a place left.
struct Pool {
  char* rows;
  int64_t size, row_bytes;
  int32_t* count;  // rows wanted, truncations that came without a final observation
  const std::vector<Field>& fields;

  int32_t take(int64_t env) const {
    if (fields.empty()) {
      ++count[1];
      return -1;
    }
    const int64_t place = count[0];
    if (count[0] < std::numeric_limits<int32_t>::max()) ++count[0];
    if (place >= size) return -1;
    for (const Field& field : fields) copy_general(field, rows + place * row_bytes, row_bytes, env, 1);
    return static_cast<int32_t>(place);
  }
};

}  // namespace

void append(const Tensor& rows, const std::vector<Tensor>& sources, const std::vector<int64_t>& offsets,
            const std::vector<int64_t>& dtypes, const std::vector<Tensor>& planes,
            const std::vector<Tensor>& plane_sources, const Optional& codes, const Optional& dones,
            const Optional& truncated, const Optional& valid, const Optional& pool,
            const std::vector<Tensor>& final_sources, const std::vector<int64_t>& final_offsets,
            const std::vector<int64_t>& final_dtypes, const Optional& pool_count, const Optional& final_rows,
            int64_t slot, int64_t pool_slot, const Optional& cursor, bool commit) {
  check_shape("rows", rows, {-1, -1, -1});
  check_dtype("rows", rows, ScalarType::Byte);
  check_contiguous("rows", rows);
  const int64_t capacity = rows.size(0), num_envs = rows.size(1), row_bytes = rows.size(2);
  const std::vector<Field> fields = describe_all("sources", sources, offsets, dtypes, rows, row_bytes);
  STD_TORCH_CHECK(planes.size() == plane_sources.size(), "planes: expected as many planes as plane_sources");
  for (size_t i = 0; i < planes.size(); ++i) {
    check_shape("planes", planes[i], {num_envs, capacity});
    check_dtype("planes", planes[i], ScalarType::Float);
    check_scalars("plane_sources", plane_sources[i], num_envs);
    check_real("plane_sources", plane_sources[i]);
    check_device("planes", planes[i], rows);
    check_device("plane_sources", plane_sources[i], rows);
  }
  if (codes) {
    check_shape("codes", *codes, {num_envs, capacity});
    check_dtype("codes", *codes, ScalarType::Byte);
    STD_TORCH_CHECK(dones.has_value(), "dones: expected a tensor with codes, got None");
    check_device("codes", *codes, rows);
    for (const auto& [name, flags] : {std::pair{"dones", &dones}, {"truncated", &truncated}, {"valid", &valid}}) {
      if (!flags->has_value()) continue;
      check_scalars(name, **flags, num_envs);
      check_flags(name, **flags);
      check_device(name, **flags, rows);
    }
  }
  std::vector<Field> finals;
  const bool pooled = codes && truncated && pool_count;
  if (pooled) {
    STD_TORCH_CHECK(pool && final_rows, "pool: expected pool and final_rows with pool_count, got None");
    check_shape("pool", *pool, {-1, -1, -1});
    check_dtype("pool", *pool, ScalarType::Byte);
    check_contiguous("pool", *pool);
    check_shape("pool_count", *pool_count, {pool->size(0), 2});
    check_dtype("pool_count", *pool_count, ScalarType::Int);
    check_contiguous("pool_count", *pool_count);
    const auto* counts = static_cast<const int32_t*>(pool_count->data_ptr());
    for (int64_t i = 0; i < pool_count->numel(); ++i)
      STD_TORCH_CHECK(counts[i] >= 0, "pool_count: expected counts of at least 0, got ", counts[i]);
    check_shape("final_rows", *final_rows, {num_envs, capacity});
    check_dtype("final_rows", *final_rows, ScalarType::Int);
    check_device("pool", *pool, rows);
    check_device("pool_count", *pool_count, rows);
    check_device("final_rows", *final_rows, rows);
    finals = describe_all("final_sources", final_sources, final_offsets, final_dtypes, rows, pool->size(2));
  }
  int64_t* state = nullptr;
  if (cursor) {
    check_cursor(cursor, rows);
    STD_TORCH_CHECK(capacity > 0, "rows: expected a capacity of at least 1, got 0");
    if (pooled) STD_TORCH_CHECK(pool->size(0) > 0, "pool: expected a first dimension of at least 1, got 0");
    state = static_cast<int64_t*>(cursor->data_ptr());
    if (state[0] - state[1] >= capacity) {
      state[2] = 1;
      return;
    }
    slot = state[0] % capacity;
    if (pooled) pool_slot = state[0] / std::max<int64_t>(state[4], 1) % pool->size(0);
  }
  check_range("slot", slot, 0, capacity);
  if (pooled) check_range("pool_slot", pool_slot, 0, pool->size(0));

  if (num_envs && row_bytes && !fields.empty())
    append_rows(static_cast<char*>(rows.data_ptr()) + slot * num_envs * row_bytes, row_bytes, fields, num_envs);
  for (size_t i = 0; i < planes.size(); ++i)
    copy_plane(static_cast<float*>(planes[i].data_ptr()) + slot * planes[i].stride(1), planes[i].stride(0),
               plane_sources[i], num_envs);
  if (codes) {
    stream_fence();
    auto* to = static_cast<uint8_t*>(codes->data_ptr()) + slot * codes->stride(1);
    int32_t* row_numbers = pooled ? static_cast<int32_t*>(final_rows->data_ptr()) + slot * final_rows->stride(1) : nullptr;
    constexpr int64_t kBatch = 1024;
    alignas(64) uint8_t batch[kBatch];
    const int64_t stride = codes->stride(0);
    for (int64_t n0 = 0; n0 < num_envs; n0 += kBatch) {
      const int64_t envs = std::min(kBatch, num_envs - n0);
      std::memset(batch, 0, envs);
      mark(batch, "dones", *dones, n0, envs, true, 1);
      if (truncated) mark(batch, "truncated", *truncated, n0, envs, true, 2);
      if (valid) mark(batch, "valid", *valid, n0, envs, false, 3);
      if (stride == 1)
        std::memcpy(to + n0, batch, envs);
      else
        for (int64_t i = 0; i < envs; ++i) to[(n0 + i) * stride] = batch[i];
      if (!pooled || !std::memchr(batch, 2, envs)) continue;
      const Pool target{static_cast<char*>(pool->data_ptr()) + pool_slot * pool->size(1) * pool->size(2), pool->size(1),
                        pool->size(2), static_cast<int32_t*>(pool_count->data_ptr()) + 2 * pool_slot, finals};
      for (int64_t i = 0; i < envs; ++i)
        if (batch[i] == 2) row_numbers[(n0 + i) * final_rows->stride(0)] = target.take(n0 + i);
    }
  }
  stream_fence();
  if (state && commit) ++state[0];
}

}  // namespace pydrone
