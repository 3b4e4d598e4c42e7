// Gathers one minibatch in one launch.
//
// A block takes 256 samples, or 128 where rows are long. One thread per sample evaluates the permutation and shares the result. The needed part of
// each row is then loaded into shared memory in 16-byte words, several lanes per row and all loads in flight together,
// and written out field by field in contiguous stores. Rows too long for that are copied from memory to memory.
#include "common.cuh"

#include "../permutation.h"

#include <algorithm>

namespace pydrone {
namespace {

constexpr int kMaxFields = 60;  // limited by the 4 KiB of kernel arguments
constexpr int kThreads = 256, kSamples = 256, kUnroll = 4;
constexpr int64_t kStaged = 288;         // most bytes of a row loaded into shared memory
constexpr int64_t kShared = 128 * 304;   // and most for all rows of a block
constexpr int kPad = 16;          // bytes between rows in shared memory, against bank conflicts

// A field, copied `word` bytes at a time; word 0: converted between floating types.
struct Field {
  char* to;
  uint64_t magic;  // ceil(2^32 / width): idx / width is the high word of idx * magic
  int64_t offset;  // byte offset in the row, or in its staged part
  int32_t width;   // words or elements per sample
  int8_t from, into, word;
};

struct Args {
  const char* rows;
  int64_t row_bytes, num_envs, capacity, start, first, count;
  int64_t staged_offset;
  int32_t staged_words;  // 16-byte words of a row in shared memory; 0: none
  int32_t num_steps, num_fields, samples;  // samples: of a block
  const int64_t *cursor, *subset;
  const char* advantages;
  const char* returns;  // null, or as advantages
  int64_t advantages_env, advantages_step, value_offset;
  const double* stats;
  char *advantages_out, *returns_out;
  int64_t* indices_out;
  int64_t key, epoch;
  int32_t advantages_type, advantages_out_type, returns_out_type;
  bool shuffle;
  Permutation permutation;
  Field fields[kMaxFields];
};
static_assert(sizeof(Args) <= 4096, "kernel arguments are limited to 4 KiB");

// Copies the words of one field for the block's samples; `read` returns the address of a sample's row.
template <typename Word, class Read>
__device__ void copy_words(const Field& field, int64_t begin, int samples, const Read& read) {
  const uint32_t width = field.width;
  Word* out = reinterpret_cast<Word*>(field.to) + begin * width;
  const int64_t total = static_cast<int64_t>(samples) * width;
  for (int64_t i0 = blockIdx.y * kUnroll * kThreads + threadIdx.x; i0 < total; i0 += gridDim.y * kUnroll * kThreads) {
    Word words[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t i = i0 + u * kThreads < total ? i0 + u * kThreads : 0;
      const auto sample = static_cast<uint32_t>(field.magic ? (i * field.magic) >> 32 : i / width);
      words[u] = reinterpret_cast<const Word*>(read(sample) + field.offset)[i - static_cast<int64_t>(sample) * width];
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u)
      if (i0 + u * kThreads < total) out[i0 + u * kThreads] = words[u];
  }
}

template <class Read>
__device__ void copy_field(const Field& field, int64_t begin, int samples, const Read& read) {
  switch (field.word) {
    case 1: return copy_words<uint8_t>(field, begin, samples, read);
    case 2: return copy_words<uint16_t>(field, begin, samples, read);
    case 4: return copy_words<uint32_t>(field, begin, samples, read);
    case 8: return copy_words<uint2>(field, begin, samples, read);
    case 16: return copy_words<uint4>(field, begin, samples, read);
  }
  const int64_t total = static_cast<int64_t>(samples) * field.width;
  for (int64_t i = blockIdx.y * kThreads + threadIdx.x; i < total; i += gridDim.y * kThreads) {
    const int64_t sample = i / field.width;
    const double x = read_real<double>(read(static_cast<uint32_t>(sample)) + field.offset, field.from, i % field.width);
    write_real(field.to, field.into, begin * field.width + i, x);
  }
}

// Returns the byte offset of a sample's row. Also writes the sample's advantage, return and index, in the first of the
// blocks that share these samples.
__device__ int64_t place(const Args& args, int64_t position, int64_t start, const Permutation& permutation) {
  const int64_t i = args.first + position;
  int64_t index = args.shuffle ? permutation(static_cast<uint32_t>(i)) : i;
  if (args.subset) index = args.subset[index];
  if (args.indices_out && blockIdx.y == 0) args.indices_out[position] = index;
  // An out-of-range number in `subset` must not read out of bounds: it is replaced by sample 0.
  const uint32_t sample = index >= 0 && index < args.num_envs * args.num_steps ? static_cast<uint32_t>(index) : 0;
  const uint32_t env = sample / args.num_steps, step = sample - env * args.num_steps;
  int64_t slot = start + step;
  slot -= slot >= args.capacity ? args.capacity : 0;
  const int64_t row = (slot * args.num_envs + env) * args.row_bytes;
  if (args.advantages && blockIdx.y == 0) {
    const int64_t at = env * args.advantages_env + step * args.advantages_step;
    const double advantage = read_real<double>(args.advantages, args.advantages_type, at);
    const bool wide = args.advantages_type == static_cast<int32_t>(ScalarType::Double);
    if (args.returns_out && args.returns) {
      write_real(args.returns_out, args.returns_out_type, position,
                 read_real<double>(args.returns, args.advantages_type, at));
    } else if (args.returns_out) {
      const float value = *reinterpret_cast<const float*>(args.rows + row + args.value_offset);
      write_real(args.returns_out, args.returns_out_type, position,
                 wide ? advantage + value : static_cast<float>(advantage) + value);
    }
    if (args.advantages_out) {
      double out = advantage;
      if (args.stats) {
        const double count = args.stats[0], std = count > 1 ? sqrt(args.stats[2] / (count - 1)) : 0.0;
        const float mean = static_cast<float>(args.stats[1]), scale = static_cast<float>(1.0 / (std + kStdEpsilon));
        out = wide ? (advantage - mean) * scale : (static_cast<float>(advantage) - mean) * scale;
      }
      write_real(args.advantages_out, args.advantages_out_type, position, out);
    }
  }
  return row;
}

template <bool Staged>
__global__ void __launch_bounds__(kThreads) gather_rows(const __grid_constant__ Args args) {
  extern __shared__ uint4 staged[];
  // Offsets, not addresses: through shared memory the compiler would not know that they point to global memory.
  __shared__ int64_t rows[kSamples];
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * args.samples;
  const int samples = static_cast<int>(min(static_cast<int64_t>(args.samples), args.count - begin));
  if (threadIdx.x < samples) {
    int64_t start = args.start;
    Permutation permutation = args.permutation;
    if (args.cursor) {
      const int64_t discarded = args.cursor[kDiscarded];
      start = ring_slot(discarded, args.capacity);
      permutation.set_keys(args.key, static_cast<uint64_t>(discarded) / args.num_steps, args.epoch);
    }
    rows[threadIdx.x] = place(args, begin + threadIdx.x, start, permutation);
  }
  __syncthreads();
  if constexpr (Staged) {
    const uint32_t words = args.staged_words, stride = words + kPad / 16;
    const uint32_t total = samples * words;
    for (uint32_t i0 = threadIdx.x; i0 < total; i0 += kUnroll * kThreads) {
      uint4 x[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const uint32_t i = i0 + u * kThreads < total ? i0 + u * kThreads : 0;
        x[u] = reinterpret_cast<const uint4*>(args.rows + rows[i / words] + args.staged_offset)[i % words];
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const uint32_t i = i0 + u * kThreads;
        if (i < total) staged[i / words * stride + i % words] = x[u];
      }
    }
    __syncthreads();
    const char* base = reinterpret_cast<const char*>(staged);
    for (int i = 0; i < args.num_fields; ++i)
      copy_field(args.fields[i], begin, samples, [=](uint32_t sample) { return base + sample * stride * 16; });
  } else {
    for (int i = 0; i < args.num_fields; ++i)
      copy_field(args.fields[i], begin, samples, [&](uint32_t sample) { return args.rows + rows[sample]; });
  }
}

void gather(const Tensor& rows, const std::vector<int64_t>& offsets, const std::vector<int64_t>& dtypes,
            const std::vector<Tensor>& outputs, int64_t value_offset, const Optional& advantages,
            const Optional& returns, const Optional& stats, const Optional& subset, int64_t num_steps, int64_t start,
            int64_t num_samples, int64_t key, int64_t rollout, int64_t epoch, bool shuffle, int64_t first,
            const Optional& cursor, const Optional& advantages_out, const Optional& returns_out,
            const Optional& indices_out) {
  check_shape("rows", rows, {-1, -1, -1});
  check_dtype("rows", rows, ScalarType::Byte);
  check_contiguous("rows", rows);
  Args args{};
  args.rows = static_cast<const char*>(rows.data_ptr());
  args.capacity = rows.size(0);
  args.num_envs = rows.size(1);
  args.row_bytes = rows.size(2);
  check_range("num_steps", num_steps, 0, std::min<int64_t>(args.capacity, (int64_t{1} << 30) - 1) + 1);
  args.num_steps = static_cast<int32_t>(num_steps);
  STD_TORCH_CHECK(offsets.size() == outputs.size() && dtypes.size() == outputs.size(),
                  "outputs: expected as many tensors as offsets and dtypes");
  STD_TORCH_CHECK(outputs.size() <= kMaxFields, "outputs: expected at most ", kMaxFields, " tensors, got ",
                  outputs.size());
  args.count = -1;
  auto check_count = [&](const char* name, const Tensor& x) {
    check_device(name, x, rows);
    STD_TORCH_CHECK(x.dim() >= 1 && (args.count < 0 || x.size(0) == args.count), name,
                    ": expected a first dimension of ", args.count, ", got shape ", shape_of(x));
    check_contiguous(name, x);
    check_apart(name, x, rows);
    args.count = x.size(0);
  };
  int64_t low = args.row_bytes, high = 0;
  for (size_t i = 0; i < outputs.size(); ++i) {
    check_count("outputs", outputs[i]);
    const ScalarType from = static_cast<ScalarType>(dtypes[i]), into = outputs[i].scalar_type();
    const int64_t size = item_size("dtypes", dtypes[i]);
    int64_t width = 1;
    for (int64_t d = 1; d < outputs[i].dim(); ++d) {
      width *= outputs[i].size(d);
      STD_TORCH_CHECK(width < (int64_t{1} << 30), "outputs: expected fewer than 2^30 elements a sample, got shape ",
                      shape_of(outputs[i]));
    }
    STD_TORCH_CHECK(from == into || (is_real(from) && is_real(into)), "outputs: expected dtype ",
                    torch::headeronly::toString(from), " or floating dtypes, got ", torch::headeronly::toString(into));
    STD_TORCH_CHECK(offsets[i] >= 0 && offsets[i] % size == 0 && args.row_bytes % size == 0 &&
                        offsets[i] <= args.row_bytes - width * size,
                    "offsets: ", offsets[i], " and ", width * size, " bytes do not lie aligned in a row of ",
                    args.row_bytes);
    if (width == 0) continue;
    Field field{};
    field.to = static_cast<char*>(outputs[i].data_ptr());
    field.offset = offsets[i];
    field.width = static_cast<int32_t>(width);
    field.from = static_cast<int8_t>(from);
    field.into = static_cast<int8_t>(into);
    for (int64_t word = from == into ? 16 : 0; word >= size; word /= 2) {
      if (width * size % word || offsets[i] % word || args.row_bytes % word ||
          reinterpret_cast<uintptr_t>(field.to) % word || reinterpret_cast<uintptr_t>(args.rows) % word)
        continue;
      field.word = static_cast<int8_t>(word);
      field.width = static_cast<int32_t>(width * size / word);
      break;
    }
    STD_TORCH_CHECK(from != into || field.word, "outputs: expected aligned storage");
    // Exact as long as idx * width < 2^32.
    if (int64_t{kSamples} * field.width * field.width < (int64_t{1} << 32))
      field.magic = ((uint64_t{1} << 32) + field.width - 1) / field.width;
    low = std::min(low, offsets[i]);
    high = std::max(high, offsets[i] + width * size);
    args.fields[args.num_fields++] = field;
  }
  if (indices_out) {
    check_count("indices_out", *indices_out);
    check_shape("indices_out", *indices_out, {-1});
    check_dtype("indices_out", *indices_out, ScalarType::Long);
    args.indices_out = static_cast<int64_t*>(indices_out->data_ptr());
  }
  if (advantages) {
    check_device("advantages", *advantages, rows);
    check_shape("advantages", *advantages, {args.num_envs, num_steps});
    check_real("advantages", *advantages);
    args.advantages = static_cast<const char*>(advantages->data_ptr());
    args.advantages_type = static_cast<int32_t>(advantages->scalar_type());
    args.advantages_env = advantages->stride(0);
    args.advantages_step = advantages->stride(1);
  }
  for (const auto& [name, out] : {std::pair{"advantages_out", &advantages_out}, {"returns_out", &returns_out}}) {
    if (!out->has_value()) continue;
    STD_TORCH_CHECK(advantages.has_value(), "advantages: expected a tensor with ", name, ", got None");
    check_count(name, **out);
    check_shape(name, **out, {-1});
    check_real(name, **out);
  }
  if (returns) {
    STD_TORCH_CHECK(advantages.has_value(), "advantages: expected a tensor with returns, got None");
    check_like("returns", *returns, *advantages);
    args.returns = static_cast<const char*>(returns->data_ptr());
  }
  if (advantages_out) {
    args.advantages_out = static_cast<char*>(advantages_out->data_ptr());
    args.advantages_out_type = static_cast<int32_t>(advantages_out->scalar_type());
  }
  if (returns_out) {
    args.returns_out = static_cast<char*>(returns_out->data_ptr());
    args.returns_out_type = static_cast<int32_t>(returns_out->scalar_type());
    args.value_offset = value_offset;
    check_range("value_offset", value_offset, 0, args.row_bytes - 3);
    STD_TORCH_CHECK(value_offset % 4 == 0 && args.row_bytes % 4 == 0, "value_offset: expected a multiple of 4, got ",
                    value_offset);
  }
  if (stats) {
    check_device("stats", *stats, rows);
    check_shape("stats", *stats, {3});
    check_dtype("stats", *stats, ScalarType::Double);
    check_contiguous("stats", *stats);
    args.stats = static_cast<const double*>(stats->data_ptr());
  }
  const int64_t total = args.num_envs * num_steps;
  STD_TORCH_CHECK(total < (int64_t{1} << 31), "rows: expected fewer than 2^31 samples, got ", total);
  if (subset) {
    check_device("subset", *subset, rows);
    check_shape("subset", *subset, {num_samples});
    check_dtype("subset", *subset, ScalarType::Long);
    check_contiguous("subset", *subset);
    STD_TORCH_CHECK(num_samples < (int64_t{1} << 31), "num_samples: expected fewer than 2^31, got ", num_samples);
    args.subset = static_cast<const int64_t*>(subset->data_ptr());
  } else {
    STD_TORCH_CHECK(num_samples == total, "num_samples: expected ", total, ", got ", num_samples);
  }
  check_cursor(cursor, rows);
  if (args.count <= 0) return;
  STD_TORCH_CHECK(first >= 0 && first <= num_samples - args.count, "first: expected 0 <= first <= ",
                  num_samples - args.count, ", got ", first);
  STD_TORCH_CHECK(total > 0, "rows: expected at least one sample, got shape ", shape_of(rows));
  if (cursor)
    args.cursor = static_cast<const int64_t*>(cursor->data_ptr());
  else
    check_range("start", start, 0, args.capacity);
  args.start = start;
  args.first = first;
  args.key = key;
  args.epoch = epoch;
  args.shuffle = shuffle;
  if (shuffle)
    args.permutation = make_permutation(num_samples, static_cast<uint64_t>(key), static_cast<uint64_t>(rollout),
                                        static_cast<uint64_t>(epoch));

  low = low / 16 * 16;
  high = (high + 15) / 16 * 16;
  const bool stage = args.num_fields > 1 && high - low <= kStaged && args.row_bytes % 16 == 0 &&
                     reinterpret_cast<uintptr_t>(args.rows) % 16 == 0;
  int64_t shared = 0;
  args.samples = kSamples;
  if (stage) {
    args.staged_offset = low;
    args.staged_words = static_cast<int32_t>((high - low) / 16);
    for (int i = 0; i < args.num_fields; ++i) args.fields[i].offset -= low;
    while (args.samples * (high - low + kPad) > kShared) args.samples /= 2;
    shared = args.samples * (high - low + kPad);
  } else {
    args.samples = std::min(kSamples, 128);
  }
  const Launch context(rows);
  // For images: several blocks per group of samples.
  int64_t widest = 1;
  for (int i = 0; i < args.num_fields; ++i) widest = std::max<int64_t>(widest, args.fields[i].width);
  const int64_t share = stage ? 1 : std::clamp<int64_t>(args.samples * widest / (16 * kUnroll * kThreads), 1, 64);
  const dim3 blocks(static_cast<unsigned>((args.count + args.samples - 1) / args.samples), static_cast<unsigned>(share));
  auto* kernel = stage ? gather_rows<true> : gather_rows<false>;
  kernel<<<blocks, kThreads, shared, context.stream>>>(args);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace
}  // namespace pydrone

STABLE_TORCH_LIBRARY_IMPL(pydrone, CUDA, m) { m.impl("gather", TORCH_BOX(&pydrone::gather)); }
