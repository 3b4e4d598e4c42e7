// PPO's gradients of a minibatch on the CPU: both networks forward, the loss with its KL divergence, both backward, a
// tile of samples at a time, so that activations never leave the second-level cache. mlp_tile.h has the arithmetic.
#include "common.h"
#include "mlp.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <string>
#include <vector>

namespace pydrone {
namespace {

// The best that the processor has, or a lesser one by PYDRONE_ISA, for tests and comparisons.
const MlpVersion& version() {
  static const MlpVersion* const picked = [] {
    const MlpVersion* best = &kMlpBase;
#if defined(PYDRONE_MLP_VERSIONS)
    __builtin_cpu_init();
    const char* wanted = std::getenv("PYDRONE_ISA");
    for (const MlpVersion* x : {&kMlpV3, &kMlpV4}) {
      if (wanted && best->name == std::string(wanted)) break;
      if (x == &kMlpV3 ? __builtin_cpu_supports("x86-64-v3") : __builtin_cpu_supports("x86-64-v4")) best = x;
    }
    STD_TORCH_CHECK(!wanted || !*wanted || best->name == std::string(wanted),
                    "PYDRONE_ISA: expected baseline, x86-64-v3 or x86-64-v4, as far as this processor has them, got ",
                    wanted);
#endif
    return best;
  }();
  return *picked;
}

constexpr double kHalfLog2Pi = 0.91893853320467274178;

int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// Memory that begins at a cache line; kept by the thread that calls, as much as the largest call has needed.
class Arena {
 public:
  explicit Arena(int64_t floats) {
    static thread_local std::vector<float> kept;
    if (static_cast<int64_t>(kept.size()) < floats + 16) kept.resize(floats + 16);
    const auto address = reinterpret_cast<uintptr_t>(kept.data());
    next_ = kept.data() + (round_up(address, 64) - address) / 4;
    end_ = next_ + floats;
  }
  float* take(int64_t floats) {
    float* const taken = next_;
    next_ += round_up(floats, 16);
    STD_TORCH_CHECK(next_ <= end_, "scratch memory of ", floats, " floats does not fit: a mistake in pydrone");
    return taken;
  }

 private:
  float *next_, *end_;
};

// A network's layers, their weights packed; `grads` counts the floats of a thread's sums.
struct Net {
  std::vector<MlpLayer> layers;
  int64_t activation;

  Net(const char* name, const std::vector<Tensor>& parameters, int64_t inputs, int64_t outputs, int64_t activation,
      const Tensor& like)
      : activation(activation) {
    STD_TORCH_CHECK(!parameters.empty() && parameters.size() % 2 == 0 && parameters.size() <= 128, name,
                    ": expected a weight and a bias for each of 1 to 64 layers, got ", parameters.size(), " tensors");
    const int64_t vector = version().vector;
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

  // From one sample to the next: off the powers of two, whose lines would share few sets of a cache.
  static int64_t leading(int64_t width) { return round_up(width, 16) + 16; }

  int64_t packed_size() const {
    int64_t size = 0;
    for (const MlpLayer& x : layers) size += round_up((x.in + 1) * x.out_padded, 16) + round_up(x.out * x.in_padded, 16);
    return size;
  }
  int64_t work_size() const {
    int64_t size = 0;
    for (const MlpLayer& x : layers) size += kTile * x.ld * (activation == kSilu ? 2 : 1);
    return size;
  }
  // Lays out the gradients from `at` on; returns where they end.
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
      version().pack(x, backward && i);
    }
  }
  MlpNet view() { return {layers.data(), static_cast<int64_t>(layers.size()), activation}; }

  static constexpr int64_t kMaxWidth = 1 << 14;
};

// A field of the minibatch, [B, ...] of any strides.
struct Column {
  const char* data;
  int64_t width, sample, element;  // elements a sample; strides in elements
  ScalarType type;
};

Column column(const char* name, const Tensor& x, int64_t samples, int64_t width, const Tensor& like) {
  if (width >= 0) check_shape(name, x, {samples, width});
  else check_shape(name, x, {samples});
  check_real(name, x);
  check_device(name, x, like);
  return {static_cast<const char*>(x.data_ptr()), std::max<int64_t>(width, 1), x.stride(0), width < 0 ? 0 : x.stride(1),
          x.scalar_type()};
}

// to[i * sample + k * element], zero from `count` on to `rows`.
void copy_tile(const Column& from, int64_t first, int64_t count, int64_t rows, float* to, int64_t sample,
               int64_t element) {
  for_real("batch", from.type, [&](auto kind) {
    using From = decltype(kind);
    const auto* source = reinterpret_cast<const From*>(from.data) + first * from.sample;
    for (int64_t i = 0; i < count; ++i)
      for (int64_t k = 0; k < from.width; ++k)
        to[i * sample + k * element] = convert<float>(source[i * from.sample + k * from.element]);
  });
  for (int64_t i = count; i < rows; ++i)
    for (int64_t k = 0; k < from.width; ++k) to[i * sample + k * element] = 0.0f;
}

// (x - shift) / std, clipped: pydrone/ppo/normalization.py.
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

// What a network sees: groups side by side.
struct Input {
  std::vector<Column> groups;
  int64_t width = 0, ld = 0;

  Input(const char* name, const std::vector<Tensor>& tensors, int64_t samples, const Tensor& like) {
    STD_TORCH_CHECK(!tensors.empty(), name, ": expected at least one group of observations, got none");
    for (const Tensor& x : tensors) {
      STD_TORCH_CHECK(x.dim() == 2, name, ": expected shape [", samples, ", width], got ", shape_of(x));
      groups.push_back(column(name, x, samples, x.size(1), like));
      width += x.size(1);
    }
    ld = Net::leading(width);
  }
  void fill(int64_t first, int64_t count, float* to, const Normalizer& normalizer) const {
    int64_t at = 0;
    for (const Column& x : groups) {
      copy_tile(x, first, count, kTile, to + at, ld, 1);
      at += x.width;
    }
    normalizer.apply(to, count, width, ld);
  }
};

void check_grads(const char* name, const std::vector<Tensor>& parameters, const Tensor* grads, const Tensor& like) {
  for (size_t i = 0; i < parameters.size(); ++i) {
    check_device(name, grads[i], like);
    check_dtype(name, grads[i], ScalarType::Float);
    check_contiguous(name, grads[i]);
    if (parameters[i].dim() == 2) check_shape(name, grads[i], {parameters[i].size(0), parameters[i].size(1)});
    else check_shape(name, grads[i], {parameters[i].size(0)});
  }
}

// The threads' sums, in their order, as torch has the parameters.
void write_grads(const Net& net, const Tensor* grads, const std::vector<const float*>& sums) {
  for (size_t l = 0; l < net.layers.size(); ++l) {
    const MlpLayer& x = net.layers[l];
    auto* weight = static_cast<float*>(grads[2 * l].data_ptr());
    auto* bias = static_cast<float*>(grads[2 * l + 1].data_ptr());
    for (int64_t j = 0; j < x.out; ++j)
      for (int64_t k = 0; k < x.in; ++k) {
        float sum = 0;
        for (const float* thread : sums) sum += thread[x.weight_grad + k * x.out_padded + j];
        weight[j * x.in + k] = sum;
      }
    for (int64_t j = 0; j < x.out; ++j) {
      float sum = 0;
      for (const float* thread : sums) sum += thread[x.bias_grad + j];
      bias[j] = sum;
    }
  }
}

// What both operations are given: the networks, what they see, and what it is normalised by.
struct Networks {
  bool shared;
  Input actor_input, critic_input;
  Net actor, critic;
  Normalizer obs_normalizer, critic_normalizer, value_normalizer;
  bool one_input;  // the critic's input is the actor's

  Networks(const std::vector<Tensor>& obs, const std::vector<Tensor>& critic_obs, const std::vector<Tensor>& actor_parameters,
           const std::vector<Tensor>& critic_parameters, const Tensor& std, int64_t activation, int64_t samples,
           int64_t num_actions, const Optional& obs_shift, const Optional& obs_std, const Optional& critic_shift,
           const Optional& critic_std, double obs_clip, const Optional& value_shift, const Optional& value_std,
           const Tensor& like)
      : shared(critic_obs.empty()),
        actor_input("obs", obs, samples, like),
        critic_input("critic_obs", shared ? obs : critic_obs, samples, like),
        actor("actor", actor_parameters, actor_input.width, num_actions, checked(activation), like),
        critic("critic", critic_parameters, critic_input.width, 1, activation, like),
        obs_normalizer("obs_shift", obs_shift, obs_std, actor_input.width, obs_clip, like),
        critic_normalizer("critic_shift", critic_shift, critic_std, critic_input.width, obs_clip, like),
        value_normalizer("value_shift", value_shift, value_std, -1, 0, like),
        one_input(shared && critic_normalizer.shift == obs_normalizer.shift &&
                  critic_normalizer.std == obs_normalizer.std) {
    check_shape("std", std, {num_actions});
    check_dtype("std", std, ScalarType::Float);
    check_contiguous("std", std);
    check_device("std", std, like);
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

void check_output(const char* name, const Tensor& x, const Tensor& like) {
  check_dtype(name, x, ScalarType::Float);
  check_device(name, x, like);
  check_own(name, x);
}

float& element(const Tensor& x, int64_t i, int64_t j = 0) {
  return static_cast<float*>(x.data_ptr())[i * x.stride(0) + (x.dim() > 1 ? j * x.stride(1) : 0)];
}

}  // namespace

void ppo_gradients(const std::vector<Tensor>& obs, const std::vector<Tensor>& critic_obs, const Tensor& actions,
                   const Tensor& log_probs, const Tensor& advantages, const Tensor& returns, const Tensor& values,
                   const Optional& mu, const Optional& sigma, const std::vector<Tensor>& actor,
                   const std::vector<Tensor>& critic, const Tensor& std, int64_t activation, double clip,
                   double value_clip, double value_loss_coef, const Optional& obs_shift, const Optional& obs_std,
                   const Optional& critic_shift, const Optional& critic_std, double obs_clip,
                   const Optional& value_shift, const Optional& value_std, const std::vector<Tensor>& grads,
                   const Tensor& metrics) {
  check_shape("actions", actions, {-1, -1});
  const int64_t samples = actions.size(0), num_actions = actions.size(1);
  const Column action = column("actions", actions, samples, num_actions, actions);
  const Column log_prob = column("log_probs", log_probs, samples, -1, actions);
  const Column advantage = column("advantages", advantages, samples, -1, actions);
  const Column target = column("returns", returns, samples, -1, actions);
  const Column value = column("values", values, samples, -1, actions);
  STD_TORCH_CHECK(mu.has_value() == sigma.has_value(), "sigma: expected both mu and sigma, or none");
  Column old_mean{}, old_std{};
  if (mu) {
    old_mean = column("mu", *mu, samples, num_actions, actions);
    old_std = column("sigma", *sigma, samples, num_actions, actions);
  }
  Networks networks(obs, critic_obs, actor, critic, std, activation, samples, num_actions, obs_shift, obs_std,
                    critic_shift, critic_std, obs_clip, value_shift, value_std, actions);
  Net &pi = networks.actor, &v = networks.critic;
  const Input &actor_input = networks.actor_input, &critic_input = networks.critic_input;
  STD_TORCH_CHECK(clip >= 0 && std::isfinite(clip), "clip: expected a number of at least 0, got ", clip);
  STD_TORCH_CHECK(grads.size() == actor.size() + critic.size() + 1, "grads: expected one for each parameter and std, ",
                  actor.size() + critic.size() + 1, ", got ", grads.size());
  check_grads("grads", actor, grads.data(), actions);
  check_grads("grads", critic, grads.data() + actor.size(), actions);
  check_grads("grads", {std}, &grads.back(), actions);
  check_shape("metrics", metrics, {3});
  check_dtype("metrics", metrics, ScalarType::Double);
  check_contiguous("metrics", metrics);
  check_device("metrics", metrics, actions);
  STD_TORCH_CHECK(samples > 0, "actions: expected at least one sample, got shape ", shape_of(actions));

  const int64_t tiles = (samples + kTile - 1) / kTile;
  const int64_t threads = std::min<int64_t>(tiles, std::max<int64_t>(1, torch::stable::get_num_threads()));
  const int64_t sums_size = v.place_grads(pi.place_grads(0)) + num_actions;
  const int64_t work = std::max(pi.work_size(), v.work_size());
  const int64_t per_thread = round_up(sums_size, 16) + work + 16 +
                             kTile * (actor_input.ld + (networks.one_input ? 0 : critic_input.ld) + 3 * num_actions + 4);
  Arena arena(networks.packed_size() + threads * (per_thread + 256));
  networks.pack(arena, true);
  std::vector<const float*> sums;
  std::vector<PpoTile> state(threads);
  std::vector<double> figures(threads * 8);  // a cache line each
  for (int64_t t = 0; t < threads; ++t) {
    PpoTile& x = state[t];
    x.grads = arena.take(sums_size);
    std::fill_n(x.grads, sums_size, 0.0f);
    x.std_grad = x.grads + sums_size - num_actions;
    sums.push_back(x.grads);
    x.work = arena.take(work);
    x.actor_ld = actor_input.ld;
    x.critic_ld = critic_input.ld;
    x.actor_obs = arena.take(kTile * x.actor_ld);
    x.critic_obs = networks.one_input ? x.actor_obs : arena.take(kTile * x.critic_ld);
    x.actions = arena.take(kTile * num_actions);
    x.mu = arena.take(kTile * num_actions);
    x.sigma = arena.take(kTile * num_actions);
    for (float** column : {&x.log_probs, &x.advantages, &x.returns, &x.values}) *column = arena.take(kTile);
    x.sums = figures.data() + 8 * t;
  }
  PpoLoss loss{};
  loss.std = static_cast<const float*>(std.data_ptr());
  loss.num_actions = num_actions;
  loss.clip = static_cast<float>(clip);
  loss.value_clip = static_cast<float>(value_clip);
  loss.value_coef = static_cast<float>(value_loss_coef);
  loss.share = 1.0f / static_cast<float>(samples);
  loss.kl = mu.has_value();
  const MlpNet actor_net = pi.view(), critic_net = v.view();

  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      PpoTile& x = state[t];
      for (int64_t tile = tiles * t / threads; tile < tiles * (t + 1) / threads; ++tile) {
        const int64_t first = tile * kTile;
        x.count = std::min(kTile, samples - first);
        actor_input.fill(first, x.count, x.actor_obs, networks.obs_normalizer);
        if (!networks.one_input) critic_input.fill(first, x.count, x.critic_obs, networks.critic_normalizer);
        copy_tile(action, first, x.count, kTile, x.actions, 1, kTile);
        if (loss.kl) {
          copy_tile(old_mean, first, x.count, kTile, x.mu, 1, kTile);
          copy_tile(old_std, first, x.count, kTile, x.sigma, 1, kTile);
        }
        copy_tile(log_prob, first, x.count, kTile, x.log_probs, 1, 0);
        copy_tile(advantage, first, x.count, kTile, x.advantages, 1, 0);
        copy_tile(target, first, x.count, kTile, x.returns, 1, 0);
        copy_tile(value, first, x.count, kTile, x.values, 1, 0);
        networks.value_normalizer.apply_scalar(x.returns, x.count);
        networks.value_normalizer.apply_scalar(x.values, x.count);
        version().step(actor_net, critic_net, loss, x);
      }
    }
  });

  write_grads(pi, grads.data(), sums);
  write_grads(v, grads.data() + actor.size(), sums);
  auto* std_grad = static_cast<float*>(grads.back().data_ptr());
  auto* results = static_cast<double*>(metrics.data_ptr());
  for (int64_t j = 0; j < num_actions; ++j) {
    std_grad[j] = 0;
    for (const PpoTile& x : state) std_grad[j] += x.std_grad[j];
  }
  for (int64_t i = 0; i < 3; ++i) {
    results[i] = 0;
    for (const PpoTile& x : state) results[i] += x.sums[i];
    results[i] /= static_cast<double>(samples);
  }
  if (!mu) results[2] = std::nan("");
}

void ppo_act(const std::vector<Tensor>& obs, const std::vector<Tensor>& critic_obs, const Tensor& noise,
             const std::vector<Tensor>& actor, const std::vector<Tensor>& critic, const Tensor& std, int64_t activation,
             const Optional& obs_shift, const Optional& obs_std, const Optional& critic_shift,
             const Optional& critic_std, double obs_clip, const Optional& value_shift, const Optional& value_std,
             const Tensor& actions, const Tensor& log_probs, const Tensor& values, const Tensor& mean) {
  check_shape("noise", noise, {-1, -1});
  const int64_t num_envs = noise.size(0), num_actions = noise.size(1);
  const Column drawn = column("noise", noise, num_envs, num_actions, noise);
  Networks networks(obs, critic_obs, actor, critic, std, activation, num_envs, num_actions, obs_shift, obs_std,
                    critic_shift, critic_std, obs_clip, value_shift, value_std, noise);
  for (const auto& [name, out] : {std::pair{"actions", &actions}, {"mean", &mean}}) {
    check_shape(name, *out, {num_envs, num_actions});
    check_output(name, *out, noise);
  }
  for (const auto& [name, out] : {std::pair{"log_probs", &log_probs}, {"values", &values}}) {
    check_shape(name, *out, {num_envs});
    check_output(name, *out, noise);
  }
  const int64_t tiles = (num_envs + kTile - 1) / kTile;
  const int64_t threads = std::min<int64_t>(tiles, std::max<int64_t>(1, torch::stable::get_num_threads()));
  const int64_t work = std::max(networks.actor.work_size(), networks.critic.work_size());
  const int64_t inputs = kTile * (networks.actor_input.ld + networks.critic_input.ld);
  Arena arena(networks.packed_size() + threads * (work + inputs + kTile * num_actions + 256));
  networks.pack(arena, false);
  std::vector<float*> memory;
  for (int64_t t = 0; t < threads; ++t) memory.push_back(arena.take(work + inputs + kTile * num_actions + 64));
  const auto* deviation = static_cast<const float*>(std.data_ptr());
  double lacking = 0;
  for (int64_t j = 0; j < num_actions; ++j) lacking += std::log(static_cast<double>(deviation[j])) + kHalfLog2Pi;

  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      float* const actor_obs = memory[t];
      float* const critic_obs_tile = actor_obs + kTile * networks.actor_input.ld;
      float* const z = critic_obs_tile + kTile * networks.critic_input.ld;
      float* const outputs = z + round_up(kTile * num_actions, 16);
      const MlpNet pi = networks.actor.view(), v = networks.critic.view();
      for (int64_t tile = tiles * t / threads; tile < tiles * (t + 1) / threads; ++tile) {
        const int64_t first = tile * kTile, count = std::min(kTile, num_envs - first);
        networks.actor_input.fill(first, count, actor_obs, networks.obs_normalizer);
        copy_tile(drawn, first, count, kTile, z, num_actions, 1);
        const float* y = version().forward(pi, actor_obs, networks.actor_input.ld, count, outputs);
        int64_t ld = networks.actor.layers.back().ld;
        for (int64_t i = 0; i < count; ++i) {
          float squares = 0;
          for (int64_t j = 0; j < num_actions; ++j) {
            const float m = y[i * ld + j], e = z[i * num_actions + j];
            squares += e * e;
            element(mean, first + i, j) = m;
            element(actions, first + i, j) = m + e * deviation[j];
          }
          element(log_probs, first + i) = static_cast<float>(-0.5 * squares - lacking);
        }
        const float* x = actor_obs;
        if (!networks.one_input) {
          networks.critic_input.fill(first, count, critic_obs_tile, networks.critic_normalizer);
          x = critic_obs_tile;
        }
        y = version().forward(v, x, networks.critic_input.ld, count, outputs);
        ld = networks.critic.layers.back().ld;
        for (int64_t i = 0; i < count; ++i)
          element(values, first + i) = networks.value_normalizer.undo(y[i * ld]);
      }
    }
  });
}

}  // namespace pydrone
