// Stores one step on the CPU: narrow fields are assembled in L1, a block of environments at a time; wide ones are
// copied directly. Rows are written with streaming stores. One thread: one core saturates the write bandwidth, and
// forking costs as much as the step of a small ring.
#include "../recurrence.h"
#include "../step.h"
#include "append.h"
#include "common.h"

#include <algorithm>
#include <array>
#include <vector>

namespace pydrone {
namespace {

constexpr int64_t kInner = 6;         // most inner dimensions of a source, after merging contiguous ones
constexpr int64_t kBlockBytes = 4096;   // of rows assembled at a time: small, so that reads and writes alternate
constexpr int64_t kSlack = 16;        // bytes that a copy in 16-byte pieces may write past a field's end

// A source [N, ...] and where it goes in a row.
struct Field {
  const char* data;
  int64_t env;  // bytes from one environment to the next
  ScalarType from, to;
  int64_t offset, width, from_size, to_size;  // byte offset in the row, elements, bytes per element
  int64_t dims;                               // inner dimensions; 0: dense
  std::array<int64_t, kInner> sizes, strides;
  bool looked_at;  // checked for values that are not finite

  bool plain() const { return from == to && dims == 0; }
  int64_t bytes() const { return width * to_size; }
};

Field describe(const char* name, const Tensor& source, const Step::Field& wanted, const Tensor& rows, int64_t num_envs,
               int64_t row_bytes) {
  const auto [offset, dtype, width, dims] = wanted;
  check_source(name, source, wanted, num_envs);
  Field field{};
  field.data = static_cast<const char*>(source.data_ptr());
  field.from = source.scalar_type();
  field.to = static_cast<ScalarType>(dtype);
  field.to_size = item_size(name, dtype);
  field.from_size = field.from == field.to ? field.to_size : static_cast<int64_t>(source.element_size());
  const auto sizes = source.sizes(), strides = source.strides();
  field.env = strides[0] * field.from_size;
  field.offset = offset;
  field.width = width;
  STD_TORCH_CHECK(offset % field.to_size == 0, name, ": byte offset ", offset, " is not a multiple of ", field.to_size);
  STD_TORCH_CHECK(field.from == field.to || (is_real(field.from) && is_real(field.to)), name, ": expected dtype ",
                  torch::headeronly::toString(field.to), ", got ", torch::headeronly::toString(field.from));
  check_device(name, source, rows);
  // Merge inner dimensions from the last one up; if none is left, each environment's elements are dense.
  int64_t dense = 1;
  bool is_dense = true;
  for (auto i = static_cast<int64_t>(sizes.size()) - 1; i >= 1; --i) {
    const int64_t size = sizes[i], stride = strides[i];
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
  check_offset(name, offset, field.bytes(), row_bytes);
  return field;
}

// Copies one environment's elements, in order, to a dense row of another type.
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

// `Pieces` 16-byte pieces per environment; the next field or row overwrites what runs past the field's end.
template <int Pieces, int Path>
void copy_pieces(const Field& field, char* to, int64_t row_bytes, int64_t n0, int64_t envs) {
#if defined(__GNUC__)
  asm volatile("" : : "i"(Path));  // keeps the compiler from merging the instances
#endif
  to += field.offset;
  const char* from = field.data + n0 * field.env;
#pragma GCC unroll 8
  for (int64_t n = 0; n < envs; ++n, to += row_bytes, from += field.env) std::memcpy(to, from, Pieces * 16);
}

template <class Word>
void copy_word(const Field& field, char* to, int64_t row_bytes, int64_t n0, int64_t envs) {
  to += field.offset;
  const char* from = field.data + n0 * field.env;
#pragma GCC unroll 8
  for (int64_t n = 0; n < envs; ++n, to += row_bytes, from += field.env) std::memcpy(to, from, sizeof(Word));
}

// Fields come in ascending order of offset. Neighbours take different paths (code copies): a single load instruction
// that went from field to field at equal distances would train the prefetcher on that stride: 100 us a step, not 70.
template <int Path>
void copy_field(const Field& field, char* to, int64_t row_bytes, int64_t n0, int64_t envs, int64_t num_envs) {
  if (!field.plain()) return copy_general(field, to, row_bytes, n0, envs);
  const int64_t bytes = field.bytes();
  if (bytes == 4) return copy_word<uint32_t>(field, to, row_bytes, n0, envs);
  if (bytes == 8) return copy_word<uint64_t>(field, to, row_bytes, n0, envs);
  // The last environments' last pieces would read past the end of the source, and a row's last field must not
  // run over into the next row, whose first fields are already written.
  const int64_t pieces = (bytes + 15) / 16, over = pieces * 16 - bytes;
  int64_t safe = envs;
  if (over && field.env < bytes) safe = 0;
  else if (over) safe = std::clamp<int64_t>(num_envs - (over + field.env - 1) / field.env - n0, 0, envs);
  if (field.offset + pieces * 16 > row_bytes) safe = 0;
  switch (pieces) {
    case 1: copy_pieces<1, Path>(field, to, row_bytes, n0, safe); break;
    case 2: copy_pieces<2, Path>(field, to, row_bytes, n0, safe); break;
    case 3: copy_pieces<3, Path>(field, to, row_bytes, n0, safe); break;
    case 4: copy_pieces<4, Path>(field, to, row_bytes, n0, safe); break;
    case 5: copy_pieces<5, Path>(field, to, row_bytes, n0, safe); break;
    case 6: copy_pieces<6, Path>(field, to, row_bytes, n0, safe); break;
    default: safe = 0;
  }
  for (int64_t n = safe; n < envs; ++n)
    std::memcpy(to + n * row_bytes + field.offset, field.data + (n0 + n) * field.env, bytes);
}

// Fields in ascending order of offset; the first `looked_at` sources are checked for finite values.
std::vector<Field> describe_all(const Step::Sources& sources, const Tensor& rows, int64_t num_envs,
                                int64_t looked_at = 0) {
  std::vector<Field> fields;
  fields.reserve(sources.count);
  const int64_t row_bytes = rows.size(2);
  for (int64_t i = 0; i < sources.count; ++i) {
    fields.push_back(describe(sources.name, sources[i], sources.fields[i], rows, num_envs, row_bytes));
    fields.back().looked_at = i < looked_at && is_real(fields.back().to);
  }
  auto before = [](const Field& x, const Field& y) { return x.offset < y.offset; };
  if (!std::is_sorted(fields.begin(), fields.end(), before)) std::sort(fields.begin(), fields.end(), before);
  return fields;
}

// A stretch of a row and where it is copied from: a source, or the rows assembled in L1.
struct Run {
  const char* from;  // for environment 0
  int64_t stride, offset, bytes;  // bytes between environments; offset in the row and length, multiples of kUnit
};

constexpr int64_t kUnit = 32;  // rows are multiples of it
constexpr int64_t kMaxRuns = 8;
constexpr int64_t kNarrow = 256;

// Writes the runs of environments [0, envs) in order and past the cache, so that whole lines leave the core.
#define PYDRONE_STREAM_ROWS(version, name, Word, load, store)                                                  \
  version void name(char* to, int64_t row_bytes, const Run* runs, int64_t num_runs, int64_t envs) {     \
    for (int64_t n = 0; n < envs; ++n, to += row_bytes)                                                        \
      for (int64_t r = 0; r < num_runs; ++r) {                                                                 \
        const char* from = runs[r].from + n * runs[r].stride;                                                  \
        for (int64_t i = 0; i < runs[r].bytes; i += sizeof(Word))                                              \
          store(reinterpret_cast<Word*>(to + runs[r].offset + i), load(reinterpret_cast<const Word*>(from + i))); \
      }                                                                                                        \
  }
#if defined(PYDRONE_VERSIONS)  // 64-byte stores are no faster
PYDRONE_STREAM_ROWS(PYDRONE_V3, stream_rows_v3, __m256i, _mm256_loadu_si256, _mm256_stream_si256)
#endif
#if defined(__SSE2__)
PYDRONE_STREAM_ROWS(, stream_rows_baseline, __m128i, _mm_loadu_si128, _mm_stream_si128)
#else
struct Word {
  char bytes[16];
};
// memcpy, because this memory was written as other types.
inline Word load_word(const Word* from) {
  Word x;
  std::memcpy(&x, from, sizeof(x));
  return x;
}
inline void store_word(Word* to, Word x) { std::memcpy(to, &x, sizeof(x)); }
PYDRONE_STREAM_ROWS(, stream_rows_baseline, Word, load_word, store_word)
#endif
#undef PYDRONE_STREAM_ROWS

void stream_rows(char* to, int64_t row_bytes, const Run* runs, int64_t num_runs, int64_t envs) {
#if defined(PYDRONE_VERSIONS)
  if (isa() != Isa::kBaseline) return stream_rows_v3(to, row_bytes, runs, num_runs, envs);
#endif
  stream_rows_baseline(to, row_bytes, runs, num_runs, envs);
}

// Result of the check for finite values so far, in lanes: all zeros as long as every number was finite.
struct Found {
  alignas(64) uint64_t lanes[8] = {};
  bool any() const {
    uint64_t all = 0;
    for (uint64_t lane : lanes) all |= lane;
    return all;
  }
};

#if defined(__GNUC__)
// x - x is +0, all zeros, unless x is infinite or NaN.
template <class V, class W>
PYDRONE_INLINE W difference(const char* from) {
  V x;
  std::memcpy(&x, from, sizeof(V));
  return reinterpret_cast<W>(x - x);
}

// Checks the whole vectors among `bytes` and returns how many bytes they are. Four chains hide the latency of one.
template <int kSize, class T>
PYDRONE_INLINE int64_t look_body(const char* from, int64_t bytes, Found& found) {
  typedef T V __attribute__((vector_size(kSize)));
  typedef uint32_t W __attribute__((vector_size(kSize)));
  W a, b{}, c{}, d{};
  std::memcpy(&a, found.lanes, sizeof(a));
  int64_t i = 0;
  for (; i + 4 * kSize <= bytes; i += 4 * kSize) {
    a |= difference<V, W>(from + i);
    b |= difference<V, W>(from + i + kSize);
    c |= difference<V, W>(from + i + 2 * kSize);
    d |= difference<V, W>(from + i + 3 * kSize);
  }
  for (; i + kSize <= bytes; i += kSize) b |= difference<V, W>(from + i);
  a |= b | (c | d);
  std::memcpy(found.lanes, &a, sizeof(a));
  return i;
}
template <int kSize>
PYDRONE_INLINE int64_t look_floats_body(const char* from, int64_t bytes, Found& found) {
  return look_body<kSize, float>(from, bytes, found);
}
template <int kSize>
PYDRONE_INLINE int64_t look_doubles_body(const char* from, int64_t bytes, Found& found) {
  return look_body<kSize, double>(from, bytes, found);
}
PYDRONE_VERSIONED(int64_t, look_floats, look_floats_body, (const char* from, int64_t bytes, Found& found),
                  (from, bytes, found))
PYDRONE_VERSIONED(int64_t, look_doubles, look_doubles_body, (const char* from, int64_t bytes, Found& found),
                  (from, bytes, found))
#endif

// Checks contiguous numbers of one type.
void look(const char* from, int64_t bytes, ScalarType type, Found& found) {
  int64_t i = 0;
#if defined(__GNUC__)
  if (type == ScalarType::Float) i = look_floats(from, bytes, found);
  if (type == ScalarType::Double) i = look_doubles(from, bytes, found);
#endif
  const Exponent low = exponent_of(static_cast<int32_t>(type), false), high = exponent_of(static_cast<int32_t>(type), true);
  const uint64_t mask = uint64_t{high.mask} << 32 | low.mask, add = uint64_t{high.add} << 32 | low.add;
  uint64_t carries = 0, bits = 0;
  if (bytes >= 8) {
    for (; i + 8 <= bytes; i += 8) {
      std::memcpy(&bits, from + i, 8);
      carries |= (bits & mask) + add;
    }
    std::memcpy(&bits, from + bytes - 8, 8);  // the rest, overlapping what was checked before
  } else {
    for (; i < bytes; ++i) bits |= uint64_t{static_cast<uint8_t>(from[i])} << 8 * i;
  }
  carries |= (bits & mask) + add;
  found.lanes[0] |= carries & (uint64_t{kCarry} << 32 | kCarry);
}

// The part of a field in bytes [begin, end) of a row, which does not fill whole units and is assembled in L1.
Field part(const Field& field, int64_t begin, int64_t end) {
  Field x = field;
  x.data += begin - field.offset;
  x.offset = begin;
  x.width = end - begin;
  x.from = x.to = ScalarType::Byte;
  x.from_size = x.to_size = 1;
  return x;
}

// Returns whether a checked value is not finite.
bool append_rows(char* rows, int64_t row_bytes, const std::vector<Field>& fields, int64_t num_envs) {
  Found found;
  if (row_bytes > kBlockBytes) {  // images: a row is longer than an assembled block
    for (const Field& field : fields) {
      if (!field.looked_at) {
        copy_general(field, rows, row_bytes, 0, num_envs);
        continue;
      }
      for (int64_t n = 0; n < num_envs; ++n) {
        char* const row = rows + n * row_bytes;
        copy_general(field, row, row_bytes, n, 1);
        look(row + field.offset, field.bytes(), field.to, found);
      }
    }
    return found.any();
  }
  alignas(64) char staged[kBlockBytes + kSlack];
  std::memset(staged, 0, sizeof(staged));
  Run runs[kMaxRuns];
  int64_t num_runs = 0, covered = 0;
  std::vector<Field> parts;
  parts.reserve(2 * fields.size());
  auto run = [&](const char* from, int64_t stride, int64_t end) {
    if (end > covered) runs[num_runs++] = {from, stride, covered, end - covered};
    covered = std::max(covered, end);
  };
  for (const Field& field : fields) {
    const int64_t end = field.offset + field.bytes();
    const int64_t first = (field.offset + kUnit - 1) / kUnit * kUnit, last = end / kUnit * kUnit;
    if (!field.plain() || last - first < 2 * kUnit || num_runs + 3 > kMaxRuns) {
      parts.push_back(field);
      continue;
    }
    run(staged + covered, row_bytes, first);
    run(field.data + (first - field.offset), field.env, last);
    if (first > field.offset) parts.push_back(part(field, field.offset, first));
    if (end > last) parts.push_back(part(field, last, end));
  }
  run(staged + covered, row_bytes, row_bytes);

  const int64_t block = kBlockBytes / row_bytes;
  for (int64_t n0 = 0; n0 < num_envs; n0 += block) {
    const int64_t envs = std::min(block, num_envs - n0), ahead = std::clamp<int64_t>(num_envs - n0 - envs, 0, block);
    // The hardware prefetcher keeps up with narrow fields.
    for (const Field& field : fields)
      if (field.plain() && field.bytes() > kNarrow && field.env > 0)
        fetch(field.data + (n0 + envs) * field.env, ahead * field.env);
    for (size_t i = 0; i < parts.size(); ++i) {
      if (i % 2) copy_field<1>(parts[i], staged, row_bytes, n0, envs, num_envs);
      else copy_field<0>(parts[i], staged, row_bytes, n0, envs, num_envs);
    }
    // Fields copied as they are get checked in the source, converted or gathered ones where they were assembled.
    for (const Field& field : fields) {
      if (!field.looked_at) continue;
      if (field.plain() && field.env == field.bytes()) {
        look(field.data + n0 * field.env, envs * field.env, field.to, found);
      } else {
        for (int64_t n = 0; n < envs; ++n)
          look(field.plain() ? field.data + (n0 + n) * field.env : staged + n * row_bytes + field.offset, field.bytes(),
               field.to, found);
      }
    }
    stream_rows(rows + n0 * row_bytes, row_bytes, runs, num_runs, envs);
    for (int64_t r = 0; r < num_runs; ++r)
      if (runs[r].from < staged || runs[r].from >= staged + kBlockBytes) runs[r].from += envs * runs[r].stride;
  }
  return found.any();
}

template <class To>
void copy_plane(To* to, int64_t stride, const Tensor& source, int64_t num_envs) {
  const int64_t step = source.stride(0);
  for_real("sources of planes", source.scalar_type(), [&](auto kind) {
    using From = decltype(kind);
    auto* from = static_cast<const From*>(source.data_ptr());
    if constexpr (std::is_same_v<To, From>)
      if (stride == 1 && step == 1) return stream(to, from, num_envs * sizeof(To));
    for (int64_t n = 0; n < num_envs; ++n) to[n * stride] = convert<To>(from[n * step]);
  });
}

// codes[i] = value where the flag of environment n0 + i, as a bool, equals `when`.
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

// The pool that a rollout's final observations go to.
struct Pool {
  char* rows;
  int64_t size, row_bytes;
  int32_t* count;    // rows requested, truncations without a final observation
  int32_t* numbers;  // for this step: each environment's row in the pool
  int64_t numbers_env;
  std::vector<Field> fields;

  // Stores one environment's final observation, if the pool has room.
  void take(int64_t env) const {
    int32_t& number = numbers[env * numbers_env];
    number = -1;
    if (fields.empty()) {
      ++count[1];
      return;
    }
    const int32_t place = count[0];
    if (count[0] < std::numeric_limits<int32_t>::max()) ++count[0];
    if (place >= size) return;
    for (const Field& field : fields) copy_general(field, rows + place * row_bytes, row_bytes, env, 1);
    number = place;
  }
};

void store_ends(uint8_t* to, int64_t stride, int64_t num_envs, const Tensor& dones, const Optional& truncated,
                const Optional& valid, const Pool* pool) {
  constexpr int64_t kBatch = 1024;
  alignas(64) uint8_t batch[kBatch];
  for (int64_t n0 = 0; n0 < num_envs; n0 += kBatch) {
    const int64_t envs = std::min(kBatch, num_envs - n0);
    std::memset(batch, kRunning, envs);
    mark(batch, "dones", dones, n0, envs, true, kTerminated);
    if (truncated) mark(batch, "truncated", *truncated, n0, envs, true, kTruncated);
    if (valid) mark(batch, "valid", *valid, n0, envs, false, kInvalid);
    if (stride == 1)
      std::memcpy(to + n0, batch, envs);
    else
      for (int64_t i = 0; i < envs; ++i) to[(n0 + i) * stride] = batch[i];
    if (!pool || !std::memchr(batch, kTruncated, envs)) continue;
    for (int64_t i = 0; i < envs; ++i)
      if (batch[i] == kTruncated) pool->take(n0 + i);
  }
}

}  // namespace

std::function<void()> checked_append(const std::vector<Tensor>& memory, const std::vector<Tensor>& sources,
                                     const Tensor& layout, const Optional& dones, const Optional& truncated,
                                     const Optional& valid, int64_t slot, int64_t pool_slot, const Optional& cursor,
                                     bool commit) {
  const Step step(memory, sources, layout);
  const Tensor& rows = step.rows;
  const int64_t capacity = rows.size(0), num_envs = rows.size(1), row_bytes = rows.size(2);
  std::vector<Field> fields = describe_all(step.row, rows, num_envs, step.looked_at);
  const bool pooled = step.check_ends(dones, truncated, valid);
  Pool target{};
  if (pooled) {
    const auto* counts = static_cast<const int32_t*>(step.pool[1].data_ptr());
    for (int64_t i = 0; i < step.pool[1].numel(); ++i)
      STD_TORCH_CHECK(counts[i] >= 0, "count: expected counts of at least 0, got ", counts[i]);
    target.fields = describe_all(step.final, step.pool[0], num_envs);
  }
  int64_t* state = nullptr;
  if (cursor) {
    check_cursor(cursor, rows);
    STD_TORCH_CHECK(capacity > 0, "rows: expected a capacity of at least 1, got 0");
    state = static_cast<int64_t*>(cursor->data_ptr());
    if (state[0] - state[1] >= capacity) return [state] { state[2] = 1; };
    slot = state[0] % capacity;
    if (pooled || step.not_finite)
      pool_slot = state[0] / std::max<int64_t>(state[4], 1) % (pooled ? step.pool[0] : *step.not_finite).size(0);
  }
  check_range("slot", slot, 0, capacity);
  if (step.not_finite) {
    const int64_t rollouts = step.not_finite->size(0);
    STD_TORCH_CHECK(!pooled || rollouts == step.pool[0].size(0), "not_finite: expected ", pooled ? step.pool[0].size(0) : 0,
                    " rollouts as final_obs has, got ", rollouts);
    check_range("pool_slot", pool_slot, 0, rollouts);
  }
  if (pooled) {
    const Tensor &final_obs = step.pool[0], &final_rows = step.pool[2];
    check_range("pool_slot", pool_slot, 0, final_obs.size(0));
    target.size = final_obs.size(1);
    target.row_bytes = final_obs.size(2);
    target.rows = static_cast<char*>(final_obs.data_ptr()) + pool_slot * target.size * target.row_bytes;
    target.count = static_cast<int32_t*>(step.pool[1].data_ptr()) + 2 * pool_slot;
    target.numbers = static_cast<int32_t*>(final_rows.data_ptr()) + slot * final_rows.stride(1);
    target.numbers_env = final_rows.stride(0);
  }

  char* const row = static_cast<char*>(rows.data_ptr()) + slot * num_envs * row_bytes;
  step.check_apart(slot);
  return [=, &dones, &truncated, &valid, fields = std::move(fields), target = std::move(target)] {
    if (num_envs && row_bytes && !fields.empty() && append_rows(row, row_bytes, fields, num_envs) && step.not_finite)
      static_cast<int32_t*>(step.not_finite->data_ptr())[pool_slot] = 1;
    for (int64_t i = 0; i < step.plane.count; ++i) {
      const Tensor& plane = step.planes[i];
      copy_plane(static_cast<float*>(plane.data_ptr()) + slot * plane.stride(1), plane.stride(0), step.plane[i],
                 num_envs);
    }
    if (dones)
      store_ends(static_cast<uint8_t*>(step.codes->data_ptr()) + slot * step.codes->stride(1), step.codes->stride(0),
                 num_envs, *dones, truncated, valid, pooled ? &target : nullptr);
    stream_fence();
    if (state && commit) ++state[0];
  };
}

void append(const std::vector<Tensor>& memory, const std::vector<Tensor>& sources, const Tensor& layout,
            const Optional& dones, const Optional& truncated, const Optional& valid, int64_t slot, int64_t pool_slot,
            const Optional& cursor, bool commit) {
  checked_append(memory, sources, layout, dones, truncated, valid, slot, pool_slot, cursor, commit)();
}

}  // namespace pydrone
