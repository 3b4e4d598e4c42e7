// A minibatch on the CPU: a batch of positions through the permutation at a time, its rows fetched ahead, each field
// put together in L1 and written out in streaming stores. No index tensor and no second pass.
#include "../permutation.h"
#include "common.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace pydrone {
namespace {

constexpr int64_t kBatch = 128;     // positions turned into samples at a time
constexpr int64_t kGroup = 64;      // samples of a field put together at a time: 64 x width x size is a multiple of 64
constexpr int64_t kStage = 16384;   // bytes of a field put together at a time; wider ones are copied straight
constexpr int64_t kSlack = 16;

struct Output {
  char* data;
  int64_t offset, width, bytes;  // byte offset in the row, elements and bytes a sample
  ScalarType from, to;
};

struct Job {
  const char* rows;
  int64_t row_bytes, num_envs, num_steps, capacity, start, count, first;
  const int64_t* subset;
  bool shuffle, streaming;
  Permutation permutation;
  std::vector<Output> outputs;
  const float* advantages;
  int64_t advantage_env, advantage_step, value_offset;
  float mean, scale;
  float *advantages_out, *returns_out;
  int64_t* indices_out;
};

struct Batch {
  int32_t left[kBatch], right[kBatch], sample[kBatch], env[kBatch], step[kBatch];
  int64_t row[kBatch], advantage[kBatch];  // bytes from the first one
};

// Positions in a row split into the two sides without a division each.
void split(const Permutation& p, uint32_t first, int64_t n, Batch& batch) {
  uint32_t left = first / p.b, right = first % p.b;
  for (int64_t i = 0; i < n;) {
    const int64_t end = std::min<int64_t>(n, i + p.b - right);
    for (; i < end; ++i) {
      batch.left[i] = static_cast<int32_t>(left);
      batch.right[i] = static_cast<int32_t>(right++);
    }
    if (right == p.b) right = 0, ++left;
  }
}

// The greatest sample: one beyond the last means that some are to be walked back in.
PYDRONE_CLONES int32_t permute(const Permutation& p, int64_t n, Batch& batch) {
  int32_t greatest = 0;
  for (int64_t i = 0; i < n; ++i) {
    batch.sample[i] = static_cast<int32_t>(p.apply(batch.left[i], batch.right[i]));
    greatest = std::max(greatest, batch.sample[i]);
  }
  return greatest;
}

// sample / num_steps by a double's reciprocal: exact after one correction, and there is no vector division.
PYDRONE_CLONES void locate(const Job& job, int64_t n, Batch& batch) {
  const int32_t num_steps = static_cast<int32_t>(job.num_steps);
  const double inverse = 1.0 / num_steps;
  for (int64_t i = 0; i < n; ++i) {
    const int32_t sample = batch.sample[i];
    int32_t env = static_cast<int32_t>(sample * inverse);
    int32_t step = sample - env * num_steps;
    env += step < 0 ? -1 : (step >= num_steps ? 1 : 0);
    step += step < 0 ? num_steps : (step >= num_steps ? -num_steps : 0);
    batch.env[i] = env;
    batch.step[i] = step;
  }
  const int64_t start = job.start, capacity = job.capacity, row_env = job.row_bytes,
                row_step = job.row_bytes * job.num_envs, advantage_env = 4 * job.advantage_env,
                advantage_step = 4 * job.advantage_step;
  for (int64_t i = 0; i < n; ++i) {
    int64_t slot = start + batch.step[i];
    slot -= slot >= capacity ? capacity : 0;
    batch.row[i] = slot * row_step + batch.env[i] * row_env;
    batch.advantage[i] = batch.env[i] * advantage_env + batch.step[i] * advantage_step;
  }
}

template <int Pieces>
void pick_pieces(const char* rows, const int64_t* row, int64_t bytes, int64_t n, char* to) {
#pragma GCC unroll 8
  for (int64_t i = 0; i < n; ++i, to += bytes) std::memcpy(to, rows + row[i], Pieces * 16);
}

// What a piece writes beyond its sample the next sample writes over; the buffer has room for the last one's. Reading
// stays in the row where offset + 16 * pieces <= row_bytes.
void pick(const Job& job, const Output& output, const Batch& batch, int64_t i0, int64_t n, char* to) {
  const char* rows = job.rows + output.offset;
  const int64_t* row = batch.row + i0;
  const int64_t bytes = output.bytes, pieces = (bytes + 15) / 16;
  if (bytes == 4) {
#pragma GCC unroll 8
    for (int64_t i = 0; i < n; ++i) std::memcpy(to + 4 * i, rows + row[i], 4);
    return;
  }
  if (output.offset + pieces * 16 <= job.row_bytes) {
    switch (pieces) {
      case 1: return pick_pieces<1>(rows, row, bytes, n, to);
      case 2: return pick_pieces<2>(rows, row, bytes, n, to);
      case 3: return pick_pieces<3>(rows, row, bytes, n, to);
      case 4: return pick_pieces<4>(rows, row, bytes, n, to);
      case 5: return pick_pieces<5>(rows, row, bytes, n, to);
      case 6: return pick_pieces<6>(rows, row, bytes, n, to);
      default: break;
    }
  }
  for (int64_t i = 0; i < n; ++i) std::memcpy(to + i * bytes, rows + row[i], bytes);
}

// Half-precision storage comes out as float32.
void pick_converted(const Job& job, const Output& output, const Batch& batch, int64_t i0, int64_t n, float* to) {
  for_real("dtypes", output.from, [&](auto kind) {
    using From = decltype(kind);
    for (int64_t i = 0; i < n; ++i) {
      const auto* from = reinterpret_cast<const From*>(job.rows + batch.row[i0 + i] + output.offset);
      for (int64_t k = 0; k < output.width; ++k) to[i * output.width + k] = convert<float>(from[k]);
    }
  });
}

// Samples [i0, i0 + n) of the batch to their places from `position` on; n is at most kGroup.
void write_field(const Job& job, const Output& output, const Batch& batch, int64_t i0, int64_t n, int64_t position) {
  const bool same = output.from == output.to;
  const int64_t bytes = same ? output.bytes : output.width * 4;
  char* to = output.data + position * bytes;
  if (n * bytes > kStage) {  // a picture
    if (same)
      for (int64_t i = 0; i < n; ++i) std::memcpy(to + i * bytes, job.rows + batch.row[i0 + i] + output.offset, bytes);
    else
      pick_converted(job, output, batch, i0, n, reinterpret_cast<float*>(to));
    return;
  }
  alignas(64) char staged[kStage + kSlack];
  if (same)
    pick(job, output, batch, i0, n, staged);
  else
    pick_converted(job, output, batch, i0, n, reinterpret_cast<float*>(staged));
  put(to, staged, n * bytes, job.streaming);
}

void write_advantages(const Job& job, const Batch& batch, int64_t i0, int64_t n, int64_t position) {
  alignas(64) float advantage[kGroup], result[kGroup];
  const auto* bytes = reinterpret_cast<const char*>(job.advantages);
  for (int64_t i = 0; i < n; ++i) std::memcpy(&advantage[i], bytes + batch.advantage[i0 + i], 4);
  if (job.returns_out) {
    for (int64_t i = 0; i < n; ++i) {
      float value;
      std::memcpy(&value, job.rows + batch.row[i0 + i] + job.value_offset, 4);
      result[i] = advantage[i] + value;
    }
    put(job.returns_out + position, result, n * 4, job.streaming);
  }
  if (job.advantages_out) {
    for (int64_t i = 0; i < n; ++i) result[i] = (advantage[i] - job.mean) * job.scale;
    put(job.advantages_out + position, result, n * 4, job.streaming);
  }
}

// Which samples the `n` outputs from `position` on are, and where they lie.
void locate_batch(const Job& job, int64_t position, int64_t n, Batch& batch) {
  const int64_t first = job.first + position;
  if (job.shuffle) {
    split(job.permutation, static_cast<uint32_t>(first), n, batch);
    if (static_cast<uint32_t>(permute(job.permutation, n, batch)) >= job.permutation.size)
      for (int64_t i = 0; i < n; ++i)
        while (static_cast<uint32_t>(batch.sample[i]) >= job.permutation.size)
          batch.sample[i] = static_cast<int32_t>(job.permutation(static_cast<uint32_t>(batch.sample[i])));
  } else {
    for (int64_t i = 0; i < n; ++i) batch.sample[i] = static_cast<int32_t>(first + i);
  }
  if (job.subset)
    for (int64_t i = 0; i < n; ++i) {
      const int64_t sample = job.subset[batch.sample[i]];
      // A number of the caller's: clamped here, so that it can be wrong but never lead out of the rollout.
      batch.sample[i] = static_cast<int32_t>(std::clamp<int64_t>(sample, 0, job.num_envs * job.num_steps - 1));
    }
  locate(job, n, batch);
}

void fetch_group(const Job& job, const Batch& batch, int64_t i0, int64_t n) {
  if (!job.outputs.empty())
    for (int64_t i = 0; i < n; ++i) fetch(job.rows + batch.row[i0 + i], job.row_bytes);
  if (job.advantages)
    for (int64_t i = 0; i < n; ++i) fetch(reinterpret_cast<const char*>(job.advantages) + batch.advantage[i0 + i], 1);
}

// Batches [begin, end): while a group of one is written out, the same group of the next is on its way to the cache. A
// core has few misses in flight, so the rows are asked for in portions, between the fields.
void run_batches(const Job& job, int64_t begin, int64_t end) {
  Batch batches[2];
  auto size = [&](int64_t i) { return std::clamp<int64_t>(job.count - i * kBatch, 0, kBatch); };
  locate_batch(job, begin * kBatch, size(begin), batches[begin % 2]);
  fetch_group(job, batches[begin % 2], 0, size(begin));
  for (int64_t i = begin; i < end; ++i) {
    const Batch& batch = batches[i % 2];
    Batch& next = batches[(i + 1) % 2];
    const int64_t n = size(i), following = i + 1 < end ? size(i + 1) : 0;
    if (following) locate_batch(job, (i + 1) * kBatch, following, next);
    for (int64_t g = 0; g < n; g += kGroup) {
      const int64_t position = i * kBatch + g, members = std::min(kGroup, n - g);
      const int64_t ahead = std::clamp<int64_t>(following - g, 0, kGroup);
      int64_t fetched = 0, field = 0;
      for (const Output& output : job.outputs) {
        const int64_t until = ahead * ++field / static_cast<int64_t>(job.outputs.size());
        fetch_group(job, next, g + fetched, until - fetched);
        fetched = until;
        write_field(job, output, batch, g, members, position);
      }
      if (job.advantages) write_advantages(job, batch, g, members, position);
      if (job.indices_out)
        for (int64_t k = 0; k < members; ++k) job.indices_out[position + k] = batch.sample[g + k];
    }
  }
}

}  // namespace

void gather(const Tensor& rows, const std::vector<int64_t>& offsets, const std::vector<int64_t>& dtypes,
            const std::vector<Tensor>& outputs, int64_t value_offset, const Optional& advantages,
            const Optional& stats, const Optional& subset, int64_t num_steps, int64_t start, int64_t num_samples,
            int64_t key, int64_t rollout, int64_t epoch, bool shuffle, int64_t first, const Optional& cursor,
            const Optional& advantages_out, const Optional& returns_out, const Optional& indices_out) {
  check_shape("rows", rows, {-1, -1, -1});
  check_dtype("rows", rows, ScalarType::Byte);
  check_contiguous("rows", rows);
  Job job{};
  job.rows = static_cast<const char*>(rows.data_ptr());
  job.capacity = rows.size(0);
  job.num_envs = rows.size(1);
  job.row_bytes = rows.size(2);
  job.num_steps = num_steps;
  check_range("num_steps", num_steps, 0, job.capacity + 1);
  STD_TORCH_CHECK(offsets.size() == outputs.size() && dtypes.size() == outputs.size(),
                  "outputs: expected as many tensors as offsets and dtypes");
  job.count = -1;
  auto check_count = [&](const char* name, const Tensor& x) {
    STD_TORCH_CHECK(x.dim() >= 1 && (job.count < 0 || x.size(0) == job.count), name, ": expected a first dimension of ",
                    job.count, ", got shape ", shape_of(x));
    check_contiguous(name, x);
    check_device(name, x, rows);
    check_apart(name, x, rows);
    job.count = x.size(0);
  };
  for (size_t i = 0; i < outputs.size(); ++i) {
    check_count("outputs", outputs[i]);
    Output output{};
    output.data = static_cast<char*>(outputs[i].data_ptr());
    output.offset = offsets[i];
    output.width = 1;
    for (int64_t d = 1; d < outputs[i].dim(); ++d) output.width *= outputs[i].size(d);
    output.from = static_cast<ScalarType>(dtypes[i]);
    output.to = outputs[i].scalar_type();
    output.bytes = output.width * item_size("dtypes", dtypes[i]);
    STD_TORCH_CHECK(output.from == output.to || (output.to == ScalarType::Float && is_real(output.from)),
                    "outputs: expected dtype ", torch::headeronly::toString(output.from), " or Float, got ",
                    torch::headeronly::toString(output.to));
    check_offset("offsets", output.offset, output.bytes, job.row_bytes);
    if (output.width) job.outputs.push_back(output);
  }
  if (indices_out) {
    check_count("indices_out", *indices_out);
    check_dtype("indices_out", *indices_out, ScalarType::Long);
    job.indices_out = static_cast<int64_t*>(indices_out->data_ptr());
  }
  if (advantages) {
    check_shape("advantages", *advantages, {job.num_envs, num_steps});
    check_dtype("advantages", *advantages, ScalarType::Float);
    check_device("advantages", *advantages, rows);
    job.advantages = static_cast<const float*>(advantages->data_ptr());
    job.advantage_env = advantages->stride(0);
    job.advantage_step = advantages->stride(1);
  }
  for (const auto& [name, out] : {std::pair{"advantages_out", &advantages_out}, {"returns_out", &returns_out}}) {
    if (!out->has_value()) continue;
    STD_TORCH_CHECK(advantages.has_value(), "advantages: expected a tensor with ", name, ", got None");
    check_count(name, **out);
    check_dtype(name, **out, ScalarType::Float);
    STD_TORCH_CHECK((*out)->dim() == 1, name, ": expected one dimension, got shape ", shape_of(**out));
  }
  if (advantages_out) job.advantages_out = static_cast<float*>(advantages_out->data_ptr());
  if (returns_out) {
    job.returns_out = static_cast<float*>(returns_out->data_ptr());
    job.value_offset = value_offset;
    check_range("value_offset", value_offset, 0, job.row_bytes - 3);
  }
  job.mean = 0.0f;
  job.scale = 1.0f;
  if (stats) {
    check_shape("stats", *stats, {3});
    check_dtype("stats", *stats, ScalarType::Double);
    check_contiguous("stats", *stats);
    check_device("stats", *stats, rows);
    const auto* moments = static_cast<const double*>(stats->data_ptr());
    const double std = moments[0] > 1 ? std::sqrt(moments[2] / (moments[0] - 1)) : 0.0;
    job.mean = static_cast<float>(moments[1]);
    job.scale = static_cast<float>(1.0 / (std + kStdEpsilon));
  }
  const int64_t total = job.num_envs * num_steps;
  STD_TORCH_CHECK(total < (int64_t{1} << 31), "rows: expected fewer than 2^31 samples, got ", total);
  if (subset) {
    check_shape("subset", *subset, {num_samples});
    check_dtype("subset", *subset, ScalarType::Long);
    check_contiguous("subset", *subset);
    check_device("subset", *subset, rows);
    job.subset = static_cast<const int64_t*>(subset->data_ptr());
  } else {
    STD_TORCH_CHECK(num_samples == total, "num_samples: expected ", total, ", got ", num_samples);
  }
  if (job.count <= 0) return;
  STD_TORCH_CHECK(total > 0, "rows: expected at least one sample, got shape ", shape_of(rows), " and ", num_steps,
                  " steps");
  STD_TORCH_CHECK(first >= 0 && job.count <= num_samples && first <= num_samples - job.count, "first: expected first + ",
                  job.count, " <= ", num_samples, ", got ", first);
  if (cursor) {
    check_cursor(cursor, rows);
    const int64_t discarded = static_cast<const int64_t*>(cursor->data_ptr())[1];
    start = discarded % job.capacity;
    rollout = discarded / num_steps;
  }
  check_range("start", start, 0, job.capacity);
  job.start = start;
  job.first = first;
  job.shuffle = shuffle;
  if (shuffle)
    job.permutation = make_permutation(num_samples, static_cast<uint64_t>(key), static_cast<uint64_t>(rollout),
                                       static_cast<uint64_t>(epoch));
  job.streaming = job.count * job.row_bytes >= kStreamBytes;

  const int64_t batches = (job.count + kBatch - 1) / kBatch;
  torch::stable::parallel_for(0, batches, 16, [&](int64_t begin, int64_t end) {
    run_batches(job, begin, end);
    if (job.streaming) stream_fence();
  });
}

}  // namespace pydrone
