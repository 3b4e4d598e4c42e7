// Copies the fields of a row: narrow fields are assembled in L1, a block of environments at a time; wide ones are
// copied directly. Rows are written with streaming stores. One thread: one core saturates the write bandwidth, and
// forking costs as much as the step of a small ring.
#include "append_rows.h"

#include "common.h"

#include <algorithm>
#include <array>
#include <span>
#include <vector>

namespace pydrone {
namespace {

constexpr int64_t kBlockBytes = 4096;  // of rows assembled at a time: small, so that reads and writes alternate
constexpr int64_t kSlack = 16;         // bytes that a copy in 16-byte pieces may write past a field's end

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

}  // namespace

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

namespace {

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
  x.item = x.to_size = 1;
  return x;
}

}  // namespace

bool append_rows(char* rows, int64_t row_bytes, const Field* first, int64_t count, int64_t num_envs) {
  const std::span fields(first, count);
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
    if (!field.width) continue;  // an empty tensor has no address
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

}  // namespace pydrone
