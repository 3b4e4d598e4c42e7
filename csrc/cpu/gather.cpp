// Gathers a minibatch on the CPU: permutes a batch of positions at a time, prefetches its rows, assembles each field in
// L1 and writes it out with streaming stores. No index tensor and no second pass.
#include "samples.h"

#include <vector>

namespace pydrone {
namespace {

constexpr int64_t kGroup = 64;      // samples of a field assembled at a time: a multiple of 64 bytes at any width
constexpr int64_t kStage = 16384;   // bytes of a field assembled at a time; larger groups are copied directly
constexpr int64_t kSlack = 16;

struct Output {
  char* data;
  int64_t offset, width, bytes;  // byte offset in the row; elements and bytes per sample
  ScalarType from, to;
};

struct Job {
  const char* rows;
  int64_t row_bytes;
  bool streaming;
  Samples samples;
  std::vector<Output> outputs;
  const float *advantages, *returns;
  int64_t value_offset;
  float mean, scale;
  float *advantages_out, *returns_out;
  int64_t* indices_out;
};

template <int Pieces>
void pick_pieces(const char* rows, const int64_t* row, int64_t bytes, int64_t n, char* to) {
#pragma GCC unroll 8
  for (int64_t i = 0; i < n; ++i, to += bytes) std::memcpy(to, rows + row[i], Pieces * 16);
}

// Copies 16-byte pieces. The next sample overwrites what a piece writes past its own; kSlack has room for the last one.
// Reads stay within the row if offset + 16 * pieces <= row_bytes.
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

// Converts half-precision storage to float32.
void pick_converted(const Job& job, const Output& output, const Batch& batch, int64_t i0, int64_t n, float* to) {
  for_real("dtypes", output.from, [&](auto kind) {
    using From = decltype(kind);
    for (int64_t i = 0; i < n; ++i) {
      const auto* from = reinterpret_cast<const From*>(job.rows + batch.row[i0 + i] + output.offset);
      for (int64_t k = 0; k < output.width; ++k) to[i * output.width + k] = convert<float>(from[k]);
    }
  });
}

// Writes samples [i0, i0 + n) of the batch to the output from `position` on; n is at most kGroup.
void write_field(const Job& job, const Output& output, const Batch& batch, int64_t i0, int64_t n, int64_t position) {
  const bool same = output.from == output.to;
  const int64_t bytes = same ? output.bytes : output.width * 4;
  char* to = output.data + position * bytes;
  if (n * bytes > kStage) {  // an image
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
  const auto *bytes = reinterpret_cast<const char*>(job.advantages),
             *returns = reinterpret_cast<const char*>(job.returns);
  for (int64_t i = 0; i < n; ++i) std::memcpy(&advantage[i], bytes + batch.advantage[i0 + i], 4);
  if (job.returns_out && returns) {
    for (int64_t i = 0; i < n; ++i) std::memcpy(&result[i], returns + batch.advantage[i0 + i], 4);
    put(job.returns_out + position, result, n * 4, job.streaming);
  } else if (job.returns_out) {
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

void fetch_group(const Job& job, const Batch& batch, int64_t i0, int64_t n) {
  if (!job.outputs.empty())
    for (int64_t i = 0; i < n; ++i) fetch(job.rows + batch.row[i0 + i], job.row_bytes);
  for (const float* plane : {job.advantages, job.returns})
    if (plane)
      for (int64_t i = 0; i < n; ++i) fetch(reinterpret_cast<const char*>(plane) + batch.advantage[i0 + i], 1);
}

// Batches [begin, end). While a group of one batch is written out, the same group of the next batch is prefetched. A
// core can have few misses in flight, so the prefetches are spread out between the fields.
void run_batches(const Job& job, int64_t begin, int64_t end) {
  Batch batches[2];
  auto size = [&](int64_t i) { return std::clamp<int64_t>(job.samples.count - i * kBatch, 0, kBatch); };
  locate_batch(job.samples, begin * kBatch, size(begin), batches[begin % 2]);
  fetch_group(job, batches[begin % 2], 0, size(begin));
  for (int64_t i = begin; i < end; ++i) {
    const Batch& batch = batches[i % 2];
    Batch& next = batches[(i + 1) % 2];
    const int64_t n = size(i), following = i + 1 < end ? size(i + 1) : 0;
    if (following) locate_batch(job.samples, (i + 1) * kBatch, following, next);
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
            const Optional& returns, const Optional& stats, const Optional& subset, int64_t num_steps, int64_t start,
            int64_t num_samples, int64_t key, int64_t rollout, int64_t epoch, bool shuffle, int64_t first,
            const Optional& cursor, const Optional& advantages_out, const Optional& returns_out,
            const Optional& indices_out) {
  check_shape("rows", rows, {-1, -1, -1});
  check_dtype("rows", rows, ScalarType::Byte);
  check_contiguous("rows", rows);
  Job job{};
  job.rows = static_cast<const char*>(rows.data_ptr());
  job.row_bytes = rows.size(2);
  Samples& samples = job.samples;
  samples.capacity = rows.size(0);
  samples.num_envs = rows.size(1);
  samples.num_steps = num_steps;
  samples.row_env = job.row_bytes;
  samples.row_step = job.row_bytes * samples.num_envs;
  check_range("num_steps", num_steps, 0, samples.capacity + 1);
  STD_TORCH_CHECK(offsets.size() == outputs.size() && dtypes.size() == outputs.size(),
                  "outputs: expected as many tensors as offsets and dtypes");
  samples.count = -1;
  auto check_count = [&](const char* name, const Tensor& x) {
    STD_TORCH_CHECK(x.dim() >= 1 && (samples.count < 0 || x.size(0) == samples.count), name,
                    ": expected a first dimension of ", samples.count, ", got shape ", shape_of(x));
    check_contiguous(name, x);
    check_device(name, x, rows);
    check_apart(name, x, rows);
    samples.count = x.size(0);
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
  if (advantages) job.advantages = take_advantages(samples, *advantages, rows);
  if (returns) {
    STD_TORCH_CHECK(advantages.has_value(), "advantages: expected a tensor with returns, got None");
    check_like("returns", *returns, *advantages);
    job.returns = static_cast<const float*>(returns->data_ptr());
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
  const Moments moments(stats, rows);
  job.mean = moments.mean;
  job.scale = moments.scale;
  if (!draw(samples, subset, start, num_samples, key, rollout, epoch, shuffle, first, cursor, rows)) return;
  job.streaming = samples.count * job.row_bytes >= kStreamBytes;

  const int64_t batches = (samples.count + kBatch - 1) / kBatch;
  torch::stable::parallel_for(0, batches, 16, [&](int64_t begin, int64_t end) {
    run_batches(job, begin, end);
    if (job.streaming) stream_fence();
  });
}

}  // namespace pydrone
