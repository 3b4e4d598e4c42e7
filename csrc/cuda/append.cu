// Stores one step of all environments in the ring, in one launch.
//
// The grid has two dimensions: x over environments, y over jobs: one job per field, one per plane, and one for the end
// flags with the pool. The loads of all jobs are then in flight together; in sequence, each would wait for memory.
#include "common.cuh"

#include "../recurrence.h"
#include "../step.h"

#include <algorithm>

namespace pydrone {
namespace {

// Limited by the 4 KiB of kernel arguments.
constexpr int kMaxFields = 28, kMaxFinals = 12, kMaxPlanes = 8, kDims = 3;
constexpr int kThreads = 256, kUnroll = 4;

// A source and its place in a row. If the dtypes are equal, `word` bytes are copied at a time; otherwise word is 0 and
// floating-point numbers are converted.
struct Field {
  const char* data;
  int64_t env, strides[kDims];  // in words or elements
  int32_t sizes[kDims];         // of the inner dimensions, the last one first
  int32_t offset, width;        // byte offset in the row; words or elements
  int8_t from, to, word, dims;  // dims 0: dense
};

struct PlaneJob {
  float* to;
  int64_t env;
  Plane source;
};

struct Args {
  char* rows;
  int64_t row_bytes, num_envs, capacity, slot;
  int64_t* cursor;
  uint8_t* codes;
  int64_t codes_env, codes_step;
  Plane dones, truncated, valid;
  char* pool;
  int32_t *pool_count, *final_rows;
  int64_t pool_rows, pool_row_bytes, num_pools, pool_slot, final_rows_env, final_rows_step;
  int64_t plane_step[kMaxPlanes];
  int32_t* not_finite;  // one number per rollout
  int32_t num_fields, num_planes, num_finals, looked_at;
  bool commit;
  PlaneJob planes[kMaxPlanes];
  Field fields[kMaxFields], finals[kMaxFinals];
};
static_assert(sizeof(Args) <= 4096, "kernel arguments are limited to 4 KiB");

__device__ int64_t inner(const Field& field, uint32_t i) {
  if (field.dims == 0) return i;
  int64_t at = 0;
#pragma unroll 1
  for (int d = 0; d < field.dims; ++d) {
    const uint32_t size = field.sizes[d];
    at += i % size * field.strides[d];
    i /= size;
  }
  return at;
}

__device__ bool is_bad(uint8_t, Exponent, Exponent) { return false; }
__device__ bool is_bad(uint16_t x, Exponent low, Exponent) { return not_finite(x, low); }
__device__ bool is_bad(uint32_t x, Exponent low, Exponent) { return not_finite(x, low); }
__device__ bool is_bad(uint2 x, Exponent low, Exponent high) { return not_finite(x.x, low) || not_finite(x.y, high); }
__device__ bool is_bad(uint4 x, Exponent low, Exponent high) {
  return is_bad(uint2{x.x, x.y}, low, high) || is_bad(uint2{x.z, x.w}, low, high);
}

// Returns whether a value that this thread copied is not finite, if the field is `looked_at` (checked).
template <typename Word>
__device__ bool copy_words(const Field& field, char* rows, int64_t row_bytes, int64_t total, int64_t first,
                           int64_t step, bool looked_at) {
  const uint32_t width = field.width;
  const Exponent none{0, 0}, low = looked_at ? exponent_of(field.to, false) : none,
                 high = looked_at ? exponent_of(field.to, true) : none;
  bool bad = false;
  for (int64_t i0 = first; i0 < total; i0 += kUnroll * step) {
    Word words[kUnroll];
    Word* to[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const auto i = static_cast<uint32_t>(i0 + u * step < total ? i0 + u * step : first);
      const int64_t n = i / width;
      const uint32_t k = i % width;
      words[u] = reinterpret_cast<const Word*>(field.data)[n * field.env + inner(field, k)];
      to[u] = reinterpret_cast<Word*>(rows + n * row_bytes + field.offset) + k;
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (i0 + u * step < total) *to[u] = words[u];
      bad = is_bad(words[u], low, high) || bad;  // beyond the end this repeats the first word
    }
  }
  return bad;
}

__device__ void convert_one(const Field& field, char* row, int64_t n, uint32_t k) {
  write_real(row + field.offset, field.to, k,
             read_real<double>(field.data, field.from, n * field.env + inner(field, k)));
}

__device__ bool copy_field(const Field& field, char* rows, int64_t row_bytes, int64_t num_envs, bool looked_at) {
  const int64_t total = num_envs * field.width;  // below 2^32, as the host has checked
  const int64_t first = blockIdx.x * kThreads + threadIdx.x, step = static_cast<int64_t>(gridDim.x) * kThreads;
  switch (field.word) {
    case 1: return copy_words<uint8_t>(field, rows, row_bytes, total, first, step, looked_at);
    case 2: return copy_words<uint16_t>(field, rows, row_bytes, total, first, step, looked_at);
    case 4: return copy_words<uint32_t>(field, rows, row_bytes, total, first, step, looked_at);
    case 8: return copy_words<uint2>(field, rows, row_bytes, total, first, step, looked_at);
    case 16: return copy_words<uint4>(field, rows, row_bytes, total, first, step, looked_at);
  }
  const uint32_t width = field.width;
  const Exponent low = exponent_of(field.to, false), high = exponent_of(field.to, true);
  bool bad = false;
  for (int64_t i = first; i < total; i += step) {
    const int64_t n = static_cast<uint32_t>(i) / width;
    const uint32_t k = static_cast<uint32_t>(i) % width;
    char* const row = rows + n * row_bytes;
    convert_one(field, row, n, k);
    if (!looked_at) continue;
    // Checks the stored value, in the thread that stored it: a large number may overflow in a narrower type.
    const char* const stored = row + field.offset;
    if (low.mask == 0)
      bad = not_finite(reinterpret_cast<const uint2*>(stored)[k].y, high) || bad;
    else if (low.mask == 0x7F800000)
      bad = not_finite(reinterpret_cast<const uint32_t*>(stored)[k], low) || bad;
    else
      bad = not_finite(reinterpret_cast<const uint16_t*>(stored)[k], low) || bad;
  }
  return bad;
}

template <typename Word>
__device__ void copy_final_words(const Field& field, char* row, int64_t n) {
#pragma unroll 1
  for (uint32_t k = threadIdx.x % 32; k < static_cast<uint32_t>(field.width); k += 32)
    reinterpret_cast<Word*>(row + field.offset)[k] =
        reinterpret_cast<const Word*>(field.data)[n * field.env + inner(field, k)];
}

// Copies one environment's final observation with a whole warp.
__device__ void copy_final(const Field& field, char* row, int64_t n) {
  switch (field.word) {
    case 1: return copy_final_words<uint8_t>(field, row, n);
    case 2: return copy_final_words<uint16_t>(field, row, n);
    case 4: return copy_final_words<uint32_t>(field, row, n);
    case 8: return copy_final_words<uint2>(field, row, n);
    case 16: return copy_final_words<uint4>(field, row, n);
  }
#pragma unroll 1
  for (uint32_t k = threadIdx.x % 32; k < static_cast<uint32_t>(field.width); k += 32) convert_one(field, row, n, k);
}

// Stores the end codes, and assigns places in the pool to final observations and copies them.
__device__ void store_ends(const Args& args, int64_t slot, int64_t pool_slot) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x / 32 * 32;
  for (int64_t n0 = first; n0 < args.num_envs; n0 += step) {
    const int64_t n = n0 + threadIdx.x % 32;
    const int64_t source = n < args.num_envs ? n : n0;
    auto flag = [&](const Plane& plane) { return read_flag(plane, source * plane.env); };
    int32_t code = encode(flag(args.dones), args.truncated.data && flag(args.truncated),
                          !args.valid.data || flag(args.valid));
    code = n < args.num_envs ? code : kRunning;
    if (n < args.num_envs) args.codes[n * args.codes_env + slot * args.codes_step] = static_cast<uint8_t>(code);
    const unsigned wanted = __ballot_sync(0xFFFFFFFFu, code == kTruncated);
    if (!args.pool_count || !wanted) continue;
    const unsigned lane = threadIdx.x % 32;
    auto* const count = reinterpret_cast<uint32_t*>(args.pool_count + 2 * pool_slot);
    uint32_t place = 0;
    if (lane == 0) place = atomicAdd(count + (args.num_finals ? 0 : 1), static_cast<uint32_t>(__popc(wanted)));
    place = __shfl_sync(0xFFFFFFFFu, place, 0) + __popc(wanted & ((1u << lane) - 1));
    // Unsigned: a count that is negative or has overflowed 31 bits is beyond all rows.
    const bool fits = args.num_finals && place < args.pool_rows;
    if (code == kTruncated)
      args.final_rows[n * args.final_rows_env + slot * args.final_rows_step] = fits ? static_cast<int32_t>(place) : -1;
    for (unsigned left = __ballot_sync(0xFFFFFFFFu, fits && code == kTruncated); left; left &= left - 1) {
      const int source = __ffs(left) - 1;
      const int64_t row = pool_slot * args.pool_rows + __shfl_sync(0xFFFFFFFFu, place, source);
      for (int i = 0; i < args.num_finals; ++i)
        copy_final(args.finals[i], args.pool + row * args.pool_row_bytes, n0 + source);
    }
  }
}

__global__ void __launch_bounds__(kThreads) append_step(const __grid_constant__ Args args) {
  int64_t slot = args.slot, pool_slot = args.pool_slot;
  if (args.cursor) {
    const int64_t appended = args.cursor[kAppended];
    if (appended - args.cursor[kDiscarded] >= args.capacity) {
      if (threadIdx.x == 0 && blockIdx.x == 0 && blockIdx.y == 0) args.cursor[kFlag] = 1;
      return;
    }
    slot = ring_slot(appended, args.capacity);
    if (args.pool_count || args.not_finite) {
      const int64_t num_steps = args.cursor[kNumSteps] > 0 ? args.cursor[kNumSteps] : 1;
      pool_slot = ring_slot(static_cast<int64_t>(static_cast<uint64_t>(appended) / num_steps), args.num_pools);
    }
  }
  int job = blockIdx.y;
  if (job < args.num_fields) {
    const bool looked_at = job < args.looked_at;
    if (copy_field(args.fields[job], args.rows + slot * args.num_envs * args.row_bytes, args.row_bytes, args.num_envs,
                   looked_at) && looked_at)
      args.not_finite[pool_slot] = 1;
  } else if ((job -= args.num_fields) < args.num_planes) {
    const PlaneJob& plane = args.planes[job];
    for (int64_t n = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; n < args.num_envs;
         n += static_cast<int64_t>(gridDim.x) * kThreads)
      plane.to[n * plane.env + slot * args.plane_step[job]] =
          read_real<float>(plane.source.data, plane.source.type, n * plane.source.env);
  } else if (args.codes) {
    store_ends(args, slot, pool_slot);
  }
  if (!args.cursor || !args.commit) return;
  // The last block moves the head; all others have read it by then.
  auto* ticket = reinterpret_cast<uint64_t*>(args.cursor + kTicket);
  if (last_block(ticket, static_cast<uint64_t>(gridDim.x) * gridDim.y) && threadIdx.x == 0) {
    ++args.cursor[kAppended];
    *ticket = 0;
  }
}

// `words`: raised to the most words of a field, which sizes the grid. `looked_at`: receives how many fields come from
// the first `look` sources, since a source without elements yields no field.
int32_t describe(Field* fields, int most, const Step::Sources& sources, const Tensor& rows, int64_t num_envs,
                 int64_t& words, int64_t look = 0, int32_t* looked_at = nullptr) {
  const char* name = sources.name;
  STD_TORCH_CHECK(sources.count <= most, name, ": expected at most ", most, " tensors, got ", sources.count);
  const int64_t row_bytes = rows.size(2);
  int32_t count = 0;
  for (int64_t i = 0; i < sources.count; ++i) {
    const Tensor& source = sources[i];
    const int64_t offset = sources.fields[i].offset, dtype = sources.fields[i].dtype;
    const auto from = source.scalar_type();
    check_device(name, source, rows);
    check_source(name, source, sources.fields[i], num_envs);
    const int64_t size = item_size(name, dtype);
    check_element(name, source);
    Field field{};
    field.data = static_cast<const char*>(source.data_ptr());
    field.env = source.stride(0);
    field.from = static_cast<int8_t>(from);
    field.to = static_cast<int8_t>(dtype);
    int64_t width = 1;
    int dims = 0;
    for (int64_t d = source.dim() - 1; d >= 1; --d) {
      const int64_t n = source.size(d), stride = source.stride(d);
      width *= n;
      STD_TORCH_CHECK(n < (int64_t{1} << 30) && width < (int64_t{1} << 30) && width * num_envs < (int64_t{1} << 32),
                      name, ": expected fewer than 2^32 elements a step, got shape ", shape_of(source));
      if (n == 1) continue;
      if (dims && stride == field.strides[dims - 1] * field.sizes[dims - 1]) {
        field.sizes[dims - 1] *= static_cast<int32_t>(n);
        continue;
      }
      STD_TORCH_CHECK(dims < kDims, name, ": expected at most ", kDims,
                      " inner dimensions of unrelated strides, got more; pass .contiguous()");
      field.sizes[dims] = static_cast<int32_t>(n);
      field.strides[dims++] = stride;
    }
    STD_TORCH_CHECK(offset >= 0 && offset % size == 0 && offset <= row_bytes - width * size &&
                        row_bytes % size == 0, name, ": byte offset ", offset, " and ", width * size,
                    " bytes do not lie aligned in a row of ", row_bytes);
    if (width == 0) continue;
    const bool dense = dims == 0 || (dims == 1 && field.strides[0] == 1);
    field.dims = static_cast<int8_t>(dense ? 0 : dims);
    field.offset = static_cast<int32_t>(offset);
    field.width = static_cast<int32_t>(width);
    if (static_cast<int64_t>(from) == dtype) {
      field.word = static_cast<int8_t>(size);
      // Dense sources are copied in the longest words that sizes and alignments allow.
      for (int64_t word = 16; dense && word > size; word /= 2) {
        const int64_t per_word = word / size;
        if (width % per_word || field.env % per_word || field.offset % word || row_bytes % word ||
            reinterpret_cast<uintptr_t>(field.data) % word || reinterpret_cast<uintptr_t>(rows.data_ptr()) % word)
          continue;
        field.word = static_cast<int8_t>(word);
        field.width = static_cast<int32_t>(width / per_word);
        field.env /= per_word;
        break;
      }
    } else {
      STD_TORCH_CHECK(is_real(from) && is_real(static_cast<ScalarType>(dtype)), name, ": expected dtype number ",
                      dtype, " or floating dtypes, got ", torch::headeronly::toString(from));
    }
    words = std::max<int64_t>(words, field.width);
    fields[count++] = field;
    if (looked_at && i < look) *looked_at = count;
  }
  return count;
}

void append(const std::vector<Tensor>& memory, const std::vector<Tensor>& sources, const Tensor& layout,
            const Optional& dones, const Optional& truncated, const Optional& valid, int64_t slot, int64_t pool_slot,
            const Optional& cursor, bool commit) {
  const Step step(memory, sources, layout);
  const Tensor& rows = step.rows;
  Args args{};
  args.rows = static_cast<char*>(rows.data_ptr());
  args.capacity = rows.size(0);
  args.num_envs = rows.size(1);
  args.row_bytes = rows.size(2);
  const int64_t capacity = args.capacity, num_envs = args.num_envs;
  int64_t words = 1, final_words = 1;
  args.num_fields = describe(args.fields, kMaxFields, step.row, rows, num_envs, words, step.looked_at, &args.looked_at);
  STD_TORCH_CHECK(step.plane.count <= kMaxPlanes, "memory: expected at most ", kMaxPlanes, " planes, got ",
                  step.plane.count);
  args.num_planes = static_cast<int32_t>(step.plane.count);
  for (int64_t i = 0; i < step.plane.count; ++i) {
    const Tensor& plane = step.planes[i];
    args.planes[i] = {static_cast<float*>(plane.data_ptr()), plane.stride(0), Plane(step.plane[i])};
    args.plane_step[i] = plane.stride(1);
  }
  const bool pooled = step.check_ends(dones, truncated, valid);
  if (dones) {
    args.dones = Plane(*dones);
    args.codes = static_cast<uint8_t*>(step.codes->data_ptr());
    args.codes_env = step.codes->stride(0);
    args.codes_step = step.codes->stride(1);
  }
  if (truncated) args.truncated = Plane(*truncated);
  if (valid) args.valid = Plane(*valid);
  if (pooled) {
    const Tensor &final_obs = step.pool[0], &final_rows = step.pool[2];
    args.num_finals = describe(args.finals, kMaxFinals, step.final, final_obs, num_envs, final_words);
    args.pool = static_cast<char*>(final_obs.data_ptr());
    args.num_pools = final_obs.size(0);
    args.pool_rows = final_obs.size(1);
    args.pool_row_bytes = final_obs.size(2);
    args.pool_count = static_cast<int32_t*>(step.pool[1].data_ptr());
    args.final_rows = static_cast<int32_t*>(final_rows.data_ptr());
    args.final_rows_env = final_rows.stride(0);
    args.final_rows_step = final_rows.stride(1);
    if (!cursor) check_range("pool_slot", pool_slot, 0, args.num_pools);
  }
  if (step.not_finite) {
    args.not_finite = static_cast<int32_t*>(step.not_finite->data_ptr());
    const int64_t rollouts = step.not_finite->size(0);
    STD_TORCH_CHECK(!pooled || rollouts == args.num_pools, "not_finite: expected ", args.num_pools,
                    " rollouts as final_obs has, got ", rollouts);
    args.num_pools = rollouts;
    if (!cursor) check_range("pool_slot", pool_slot, 0, rollouts);
  }
  check_cursor(cursor, rows);
  if (cursor) {
    STD_TORCH_CHECK(capacity > 0, "rows: expected a capacity of at least 1, got 0");
    args.cursor = static_cast<int64_t*>(cursor->data_ptr());
  } else {
    check_range("slot", slot, 0, capacity);
    step.check_apart(slot);
  }
  args.slot = slot;
  args.pool_slot = pool_slot;
  args.commit = commit;

  const int jobs = args.num_fields + args.num_planes + (args.codes ? 1 : 0);
  if (num_envs == 0 || (jobs == 0 && !(cursor && commit))) return;
  const int64_t per_block = kThreads * kUnroll;
  const int64_t wanted = std::max((num_envs * words + per_block - 1) / per_block, (num_envs + kThreads - 1) / kThreads);
  const dim3 grid(static_cast<unsigned>(std::clamp<int64_t>(wanted, 1, 4096)), std::max(jobs, 1));
  const Launch context(rows);
  append_step<<<grid, kThreads, 0, context.stream>>>(args);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace
}  // namespace pydrone

STABLE_TORCH_LIBRARY_IMPL(pydrone, CUDA, m) { m.impl("append", TORCH_BOX(&pydrone::append)); }
