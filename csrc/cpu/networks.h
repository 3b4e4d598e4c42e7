// Inputs shared by the fused learner's operations: both networks, their observations, normalisers and scratch memory.
#pragma once

#include "common.h"
#include "mlp.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

namespace pydrone {
namespace {

constexpr double kHalfLog2Pi = 0.91893853320467274178;

int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// Scratch memory, aligned to a cache line. Each calling thread keeps one buffer, as large as its largest call needed.
class Arena {
 public:
  explicit Arena(int64_t floats) {
    static thread_local std::vector<float> kept;
    if (static_cast<int64_t>(kept.size()) < floats + 16) kept.resize(floats + 16);
    *this = Arena(kept.data(), floats);
  }
  // `memory` must have room for 16 more floats, for alignment.
  Arena(float* memory, int64_t floats) {
    const auto address = reinterpret_cast<uintptr_t>(memory);
    next_ = memory + (round_up(address, 64) - address) / 4;
    end_ = next_ + floats;
  }
  float* take(int64_t floats) {
    float* const taken = next_;
    next_ += round_up(floats, 16);
    STD_TORCH_CHECK(next_ <= end_, "scratch memory of ", floats, " floats does not fit: a bug in pydrone");
    return taken;
  }

 private:
  float *next_, *end_;
};

// A network's layers, with packed weights.
struct Net {
  const MlpVersion& version;
  std::vector<MlpLayer> layers;
  int64_t activation, inputs;

  Net(const char* name, const MlpVersion& version, const std::vector<Tensor>& parameters, int64_t inputs,
      int64_t outputs, int64_t activation, const Tensor& like)
      : version(version), activation(activation), inputs(inputs) {
    STD_TORCH_CHECK(!parameters.empty() && parameters.size() % 2 == 0 && parameters.size() <= 128, name,
                    ": expected a weight and a bias for each of 1 to 64 layers, got ", parameters.size(), " tensors");
    const int64_t vector = version.vector;
    int64_t width = inputs;
    for (size_t i = 0; i < parameters.size(); i += 2) {
      const Tensor &weight = parameters[i], &bias = parameters[i + 1];
      const bool last = i + 2 == parameters.size();
      check_shape(name, weight, {last ? outputs : -1, width});
      check_shape(name, bias, {weight.size(0)});
      for (const Tensor& x : {weight, bias}) {
        check_dtype(name, x, ScalarType::Float);
        check_contiguous(name, x);
        check_device(name, x, like);
      }
      STD_TORCH_CHECK(weight.size(0) > 0 && weight.size(0) <= kMaxWidth && width > 0 && width <= kMaxWidth, name,
                      ": expected 1 to ", kMaxWidth, " units in a layer, got shape ", shape_of(weight));
      MlpLayer layer{};
      layer.weight = static_cast<const float*>(weight.data_ptr());
      layer.bias = static_cast<const float*>(bias.data_ptr());
      layer.in = width;
      layer.out = weight.size(0);
      layer.in_padded = round_up(layer.in, vector);
      layer.out_padded = round_up(layer.out, vector);
      layer.ld = leading(layer.out);
      layers.push_back(layer);
      width = layer.out;
    }
  }

  // Floats between samples. Never a large power of two, whose lines would all fall into a few cache sets.
  static int64_t leading(int64_t width) { return round_up(width, 16) + 16; }

  int64_t packed_size() const {
    int64_t size = 0;
    for (const MlpLayer& x : layers) size += round_up((x.in + 1) * x.out_padded, 16) + round_up(x.out * x.in_padded, 16);
    return size;
  }
  // Floats that repack() takes.
  int64_t kept_size() const {
    int64_t size = 0;
    for (const MlpLayer& x : layers) size += round_up((x.in + 1) * x.out_padded, 16) + round_up((x.in + 1) * x.out, 16);
    return size;
  }
  int64_t work_size() { return version.work_size(view(), leading(inputs)); }
  // Lays out the gradients from offset `at` on; returns the end.
  int64_t place_grads(int64_t at) {
    for (MlpLayer& x : layers) {
      x.weight_grad = at;
      x.bias_grad = at + x.in * x.out_padded;
      at = round_up(x.bias_grad + x.out_padded, 16);
    }
    return at;
  }
  void pack(Arena& arena, bool backward) {
    for (size_t i = 0; i < layers.size(); ++i) {
      MlpLayer& x = layers[i];
      x.forward = arena.take((x.in + 1) * x.out_padded);
      if (backward && i) x.backward = arena.take(x.out * x.in_padded);
      version.pack(x, backward && i);
    }
  }
  // Packs the forward weights that changed since the last call, into memory that was zeroed once and that nothing else
  // writes. Compares the parameters' bits, cheap beside a tile; version counters miss much, e.g. fused optimisers.
  void repack(Arena& arena) {
    for (MlpLayer& x : layers) {
      x.forward = arena.take((x.in + 1) * x.out_padded);
      float* const weight = arena.take((x.in + 1) * x.out);
      float* const bias = weight + x.in * x.out;
      const size_t weights = x.in * x.out * sizeof(float), biases = x.out * sizeof(float);
      if (!std::memcmp(weight, x.weight, weights) && !std::memcmp(bias, x.bias, biases)) continue;
      std::memcpy(weight, x.weight, weights);
      std::memcpy(bias, x.bias, biases);
      version.pack(x, false);
    }
  }
  MlpNet view() { return {layers.data(), static_cast<int64_t>(layers.size()), activation}; }

  static constexpr int64_t kMaxWidth = 1 << 14;
};

// A ring whose fields lie in rows, each [C, N, ...]: sizes, and strides in bytes.
struct Ring {
  int64_t slots, envs, slot, env;
};

// A field of the minibatch: [B, ...] of any strides, or a field of a ring, indexed by byte offsets of rows.
struct Column {
  const char* data;
  int64_t width, sample, element;  // elements per sample; strides in elements
  ScalarType type;
};

Column column(const char* name, const Tensor& x, int64_t samples, int64_t width, const Tensor& like,
              const Ring* ring = nullptr) {
  if (ring) {
    if (width >= 0) check_shape(name, x, {ring->slots, ring->envs, width});
    else check_shape(name, x, {ring->slots, ring->envs});
    check_real(name, x);
    check_device(name, x, like);
    const int64_t size = static_cast<int64_t>(x.element_size());
    STD_TORCH_CHECK((ring->slots <= 1 || x.stride(0) * size == ring->slot) &&  // any stride at size 1
                        (ring->envs <= 1 || x.stride(1) * size == ring->env),
                    name, ": expected a field of the same rows as the others");
    return {static_cast<const char*>(x.data_ptr()), width < 0 ? 1 : width, 0, width < 0 ? 0 : x.stride(2),
            x.scalar_type()};
  }
  if (width >= 0) check_shape(name, x, {samples, width});
  else check_shape(name, x, {samples});
  check_real(name, x);
  check_device(name, x, like);
  return {static_cast<const char*>(x.data_ptr()), width < 0 ? 1 : width, x.stride(0), width < 0 ? 0 : x.stride(1),
          x.scalar_type()};
}

// `row(i)`: pointer to sample i.
template <class From, class Row>
void copy_samples(const Column& from, const Row& row, int64_t count, float* to, int64_t sample, int64_t element) {
  const int64_t width = from.width, stride = from.element;
  if (width == 1) {
    for (int64_t i = 0; i < count; ++i) to[i * sample] = convert<float>(*row(i));
  } else if (std::is_same_v<From, float> && width >= 4 && stride == 1 && element == 1) {
    for (int64_t i = 0; i < count; ++i) {
      const From* const source = row(i);
      float* const target = to + i * sample;
      for (int64_t k = 0; k < width - 4; k += 4) std::memcpy(target + k, source + k, 16);
      std::memcpy(target + width - 4, source + width - 4, 16);
    }
  } else {
    for (int64_t i = 0; i < count; ++i) {
      const From* const source = row(i);
      for (int64_t k = 0; k < width; ++k) to[i * sample + k * element] = convert<float>(source[k * stride]);
    }
  }
}

// Writes to[i * sample + k * element], with zeros for samples `count` to `rows`. `at`: byte offsets of rows in a ring.
void copy_tile(const Column& from, int64_t first, int64_t count, int64_t rows, float* to, int64_t sample,
               int64_t element, const int64_t* at = nullptr) {
  for_real("batch", from.type, [&](auto kind) {
    using From = decltype(kind);
    if (at) {
      auto row = [&](int64_t i) { return reinterpret_cast<const From*>(from.data + at[i]); };
      copy_samples<From>(from, row, count, to, sample, element);
    } else {
      const auto* source = reinterpret_cast<const From*>(from.data) + first * from.sample;
      auto row = [source, step = from.sample](int64_t i) { return source + i * step; };
      copy_samples<From>(from, row, count, to, sample, element);
    }
  });
  for (int64_t i = count; i < rows; ++i)
    for (int64_t k = 0; k < from.width; ++k) to[i * sample + k * element] = 0.0f;
}

// (x - shift) / std, clipped: pydrone/ppo/policy/normalization.py.
struct Normalizer {
  const float *shift = nullptr, *std = nullptr;
  float clip = 0;

  Normalizer(const char* name, const Optional& shift_tensor, const Optional& std_tensor, int64_t width, double clip,
             const Tensor& like)
      : clip(static_cast<float>(clip)) {
    STD_TORCH_CHECK(shift_tensor.has_value() == std_tensor.has_value(), name, ": expected both shift and std, or none");
    if (!shift_tensor) return;
    for (const Tensor& x : {*shift_tensor, *std_tensor}) {
      if (width < 0) check_shape(name, x, {});
      else check_shape(name, x, {width});
      check_dtype(name, x, ScalarType::Float);
      check_contiguous(name, x);
      check_device(name, x, like);
    }
    shift = static_cast<const float*>(shift_tensor->data_ptr());
    std = static_cast<const float*>(std_tensor->data_ptr());
  }
  void apply(float* x, int64_t count, int64_t width, int64_t ld) const {
    if (!shift) return;
    for (int64_t i = 0; i < count; ++i)
      for (int64_t k = 0; k < width; ++k) {
        const float y = (x[i * ld + k] - shift[k]) / std[k];
        x[i * ld + k] = y < -clip ? -clip : y > clip ? clip : y;
      }
  }
  float undo(float x) const { return shift ? x * *std + *shift : x; }
  void apply_scalar(float* x, int64_t count) const {
    if (!shift) return;
    for (int64_t i = 0; i < count; ++i) x[i] = (x[i] - *shift) / *std;
  }
};

// A network's input: groups of observations, concatenated.
struct Input {
  std::vector<Column> groups;
  int64_t width = 0, ld = 0;

  Input(const char* name, const std::vector<Tensor>& tensors, int64_t samples, const Tensor& like,
        const Ring* ring = nullptr) {
    STD_TORCH_CHECK(!tensors.empty(), name, ": expected at least one group of observations, got none");
    for (const Tensor& x : tensors) {
      if (ring) check_shape(name, x, {ring->slots, ring->envs, -1});
      STD_TORCH_CHECK(ring || x.dim() == 2, name, ": expected shape [", samples, ", width], got ", shape_of(x));
      groups.push_back(column(name, x, samples, x.size(ring ? 2 : 1), like, ring));
      width += x.size(ring ? 2 : 1);
    }
    ld = Net::leading(width);
  }
  void fill(int64_t first, int64_t count, float* to, const Normalizer& normalizer, int64_t rows = kTile,
            const int64_t* at = nullptr) const {
    int64_t begin = 0;
    for (const Column& x : groups) {
      copy_tile(x, first, count, rows, to + begin, ld, 1, at);
      begin += x.width;
    }
    normalizer.apply(to, count, width, ld);
  }
};

// A Gaussian has std, discrete actions have `categories`, the choices of each, whose logits are the actor's outputs.
void check_categories(const Optional& std, const std::vector<int64_t>& categories, int64_t outputs) {
  STD_TORCH_CHECK(std.has_value() == categories.empty(), "categories: expected ", std ? "none beside std, got " :
                  "the choices of each action where std is None, got ", categories.size(), " numbers");
  int64_t sum = 0;
  for (const int64_t choices : categories) check_range("categories", choices, 1, Net::kMaxWidth + 1), sum += choices;
  STD_TORCH_CHECK(std || sum == outputs, "categories: expected ", outputs, " choices in all, got ", sum);
}

// Inputs of ppo_act and ppo_gradients: the networks, their observations and normalisers.
struct Networks {
  const MlpVersion& version;
  bool shared;
  Input actor_input, critic_input;
  Net actor, critic;
  Normalizer obs_normalizer, critic_normalizer, value_normalizer;
  bool one_input;  // the critic's input is the actor's

  Networks(const std::vector<Tensor>& obs, const std::vector<Tensor>& critic_obs,
           const std::vector<Tensor>& actor_parameters, const std::vector<Tensor>& critic_parameters,
           const Optional& std, int64_t activation, int64_t matmul, int64_t samples, int64_t outputs,
           const Optional& obs_shift, const Optional& obs_std, const Optional& critic_shift,
           const Optional& critic_std, double obs_clip, const Optional& value_shift, const Optional& value_std,
           const Tensor& like, const Ring* ring = nullptr)
      : version(picked(matmul)),
        shared(critic_obs.empty()),
        actor_input("obs", obs, samples, like, ring),
        critic_input("critic_obs", shared ? obs : critic_obs, samples, like, ring),
        actor("actor", version, actor_parameters, actor_input.width, outputs, checked(activation), like),
        critic("critic", version, critic_parameters, critic_input.width, 1, activation, like),
        obs_normalizer("obs_shift", obs_shift, obs_std, actor_input.width, obs_clip, like),
        critic_normalizer("critic_shift", critic_shift, critic_std, critic_input.width, obs_clip, like),
        value_normalizer("value_shift", value_shift, value_std, -1, 0, like),
        one_input(shared && critic_normalizer.shift == obs_normalizer.shift &&
                  critic_normalizer.std == obs_normalizer.std) {
    if (!std) return;
    check_shape("std", *std, {outputs});
    check_dtype("std", *std, ScalarType::Float);
    check_contiguous("std", *std);
    check_device("std", *std, like);
  }
  // matmul: an index into MATMUL of schema.py. TF32 is computed in float32, which is more exact.
  static const MlpVersion& picked(int64_t matmul) {
    check_range("matmul", matmul, 0, 3);
    STD_TORCH_CHECK(matmul != 2 || bf16_version(),
                    "matmul: expected 0 or 1, this processor has no AVX512_BF16, or PYDRONE_ISA names less, got 2");
    return matmul == 2 ? *bf16_version() : pydrone::version();
  }
  static int64_t checked(int64_t activation) {
    check_range("activation", activation, 0, kNumActivations);
    return activation;
  }
  int64_t packed_size() const { return actor.packed_size() + critic.packed_size(); }
  void pack(Arena& arena, bool backward) {
    actor.pack(arena, backward);
    critic.pack(arena, backward);
  }
};

}  // namespace
}  // namespace pydrone
