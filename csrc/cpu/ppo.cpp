// PPO's gradients of a minibatch on the CPU, a tile of samples at a time: both networks forward, the loss with its KL
// divergence, both networks backward. Activations never leave L2. The arithmetic is in mlp_tile.h.
#include "networks.h"
#include "samples.h"

#include <cmath>
#include <numeric>

namespace pydrone {
namespace {

void check_grads(const char* name, const std::vector<Tensor>& parameters, const Tensor* grads, const Tensor& like) {
  for (size_t i = 0; i < parameters.size(); ++i) {
    check_device(name, grads[i], like);
    check_dtype(name, grads[i], ScalarType::Float);
    check_contiguous(name, grads[i]);
    if (parameters[i].dim() == 2) check_shape(name, grads[i], {parameters[i].size(0), parameters[i].size(1)});
    else check_shape(name, grads[i], {parameters[i].size(0)});
  }
}

// Adds up the threads' sums in a fixed order and writes them in the layout of torch's parameters.
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

// A minibatch drawn from a ring, tile by tile: rows are prefetched a few samples before they are read. (Prefetching a
// whole tile before the previous tile's arithmetic is slower: the rows would have to come back from L2.)
class Drawn {
 public:
  static constexpr int64_t kPortion = 16;  // samples read at a time
  static constexpr int64_t kAhead = 32;
  static_assert(kBatch == kTile && kAhead % kPortion == 0);

  Samples samples{};
  Ring ring{};

  Drawn(const std::vector<int64_t>& drawn, const Tensor& actions) {
    if (drawn.empty()) return;
    STD_TORCH_CHECK(drawn.size() == 9, "drawn: expected nine numbers or none, got ", drawn.size());
    check_shape("actions", actions, {-1, -1, -1});
    const int64_t size = static_cast<int64_t>(actions.element_size());
    ring = {actions.size(0), actions.size(1), actions.stride(0) * size, actions.stride(1) * size};
    samples.capacity = ring.slots;
    samples.num_envs = ring.envs;
    samples.row_step = ring.slot;
    samples.row_env = ring.env;
    samples.num_steps = drawn[0];
    samples.count = drawn[8];
    check_range("num_steps", samples.num_steps, 0, samples.capacity + 1);
  }
  void place(const std::vector<int64_t>& drawn, const Tensor& advantages, const Optional& stats,
             const Optional& subset, const Optional& cursor, const Tensor& like) {
    advantages_ = reinterpret_cast<const char*>(take_advantages(samples, advantages, like));
    const Moments moments(stats, like);
    mean_ = moments.mean;
    scale_ = moments.scale;
    draw(samples, subset, drawn[1], drawn[2], drawn[3], drawn[4], drawn[5], drawn[6] != 0, drawn[7], cursor, like);
  }
  // Registers a field to prefetch; fields less than a cache line apart are merged.
  void read(const Column& x) {
    if (x.width == 0) return;
    const char* end = x.data + (x.element * (x.width - 1) + 1) * item_size("batch", static_cast<int64_t>(x.type));
    for (auto& [from, to] : stretches_)
      if (x.data < to + kLine && from < end + kLine) {
        from = std::min(from, x.data), to = std::max(to, end);
        return;
      }
    stretches_.emplace_back(x.data, end);
  }
  void fetch_rows(const Batch& batch, int64_t i0, int64_t n) const {
    for (int64_t i = i0; i < i0 + n; ++i) {
      for (const auto& [from, to] : stretches_) {
        const char* line = from + batch.row[i];
        line -= reinterpret_cast<uintptr_t>(line) % kLine;
        fetch_near(line, to + batch.row[i] - line);
      }
      fetch_near(advantages_ + batch.advantage[i], 1);
    }
  }
  // Advantages and returns of samples [i, end) of the tile, whose values have been read.
  void fill_advantages(const Batch& batch, int64_t i, int64_t end, const PpoTile& x) const {
    for (; i < end; ++i) {
      float advantage;
      std::memcpy(&advantage, advantages_ + batch.advantage[i], 4);
      x.returns[i] = advantage + x.values[i];
      x.advantages[i] = (advantage - mean_) * scale_;
    }
  }

 private:
  static constexpr int64_t kLine = 64;
  const char* advantages_ = nullptr;
  float mean_ = 0, scale_ = 1;
  std::vector<std::pair<const char*, const char*>> stretches_;  // to prefetch; addresses in the ring's first row
};

}  // namespace

void ppo_gradients(const std::vector<Tensor>& obs, const std::vector<Tensor>& critic_obs, const Tensor& actions,
                   const Tensor& log_probs, const Tensor& advantages, const Optional& returns, const Tensor& values,
                   const Optional& mu, const Optional& sigma, const std::vector<Tensor>& actor,
                   const std::vector<Tensor>& critic, const Optional& std, int64_t activation, int64_t matmul,
                   double clip, double value_clip, double value_loss_coef, double entropy_coef,
                   const Optional& obs_shift, const Optional& obs_std, const Optional& critic_shift,
                   const Optional& critic_std, double obs_clip, const Optional& value_shift, const Optional& value_std,
                   const std::vector<Tensor>& grads, const Tensor& metrics, const std::vector<int64_t>& drawn,
                   const Optional& stats, const Optional& subset, const Optional& cursor,
                   const std::vector<int64_t>& categories, bool value_max) {
  const bool drawing = !drawn.empty();
  Drawn source(drawn, actions);
  if (!drawing) check_shape("actions", actions, {-1, -1});
  const Ring* const ring = drawing ? &source.ring : nullptr;
  const int64_t samples = drawing ? source.samples.count : actions.size(0), num_actions = actions.size(drawing ? 2 : 1);
  const Column action = column("actions", actions, samples, num_actions, actions, ring);
  const Column log_prob = column("log_probs", log_probs, samples, -1, actions, ring);
  const Column value = column("values", values, samples, -1, actions, ring);
  STD_TORCH_CHECK(returns.has_value() != drawing, "returns: expected ",
                  drawing ? "None where a minibatch is drawn from a ring" : "a tensor, got None");
  Column advantage{}, target{};
  if (drawing) {
    check_dtype("values", values, ScalarType::Float);
    source.place(drawn, advantages, stats, subset, cursor, actions);
  } else {
    advantage = column("advantages", advantages, samples, -1, actions);
    target = column("returns", *returns, samples, -1, actions);
  }
  STD_TORCH_CHECK(mu.has_value() == sigma.has_value(), "sigma: expected both mu and sigma, or none");
  STD_TORCH_CHECK(std || !mu, "mu: expected None, actions are discrete");
  STD_TORCH_CHECK(std || static_cast<int64_t>(categories.size()) == num_actions, "categories: expected ", num_actions,
                  " numbers, one for each action, got ", categories.size());
  const int64_t outputs = std ? num_actions : std::accumulate(categories.begin(), categories.end(), int64_t{0});
  check_categories(std, categories, outputs);
  Column old_mean{}, old_std{};
  if (mu) {
    old_mean = column("mu", *mu, samples, num_actions, actions, ring);
    old_std = column("sigma", *sigma, samples, num_actions, actions, ring);
  }
  Networks networks(obs, critic_obs, actor, critic, std, activation, matmul, samples, outputs, obs_shift, obs_std,
                    critic_shift, critic_std, obs_clip, value_shift, value_std, actions, ring);
  Net &pi = networks.actor, &v = networks.critic;
  const Input &actor_input = networks.actor_input, &critic_input = networks.critic_input;
  STD_TORCH_CHECK(clip >= 0 && std::isfinite(clip), "clip: expected a number of at least 0, got ", clip);
  const size_t expected = actor.size() + critic.size() + std.has_value();
  STD_TORCH_CHECK(grads.size() == expected, "grads: expected one for each parameter", std ? " and std, " : ", ", expected,
                  ", got ", grads.size());
  check_grads("grads", actor, grads.data(), actions);
  check_grads("grads", critic, grads.data() + actor.size(), actions);
  if (std) check_grads("grads", {*std}, &grads.back(), actions);
  check_shape("metrics", metrics, {metrics.dim() == 1 && metrics.size(0) == kApproxKl ? kApproxKl : kNumMetrics});
  check_dtype("metrics", metrics, ScalarType::Float);
  check_contiguous("metrics", metrics);
  check_device("metrics", metrics, actions);
  for (int64_t j = 0; std && j < num_actions; ++j) {
    const float x = static_cast<const float*>(std->data_ptr())[j];
    STD_TORCH_CHECK(!(x <= 0), "std: expected numbers above 0, got ", x);
  }
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
  std::vector<double> figures(threads * 8);  // one cache line per thread
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
  loss.std = std ? static_cast<const float*>(std->data_ptr()) : nullptr;
  loss.num_actions = num_actions;
  loss.categories = categories.data();
  loss.clip = static_cast<float>(clip);
  loss.value_clip = static_cast<float>(value_clip);
  loss.value_max = value_max;
  loss.value_coef = static_cast<float>(value_loss_coef);
  loss.entropy_coef = static_cast<float>(entropy_coef);
  loss.share = 1.0f / static_cast<float>(samples);
  loss.kl = mu.has_value();
  const MlpNet actor_net = pi.view(), critic_net = v.view();

  if (drawing) {
    for (const Column* x : {&action, &log_prob, &value}) source.read(*x);
    if (loss.kl) source.read(old_mean), source.read(old_std);
    for (const Input* input : {&actor_input, &critic_input})
      for (const Column& x : input->groups) source.read(x);
  }
  auto size = [&](int64_t tile) { return std::clamp<int64_t>(samples - tile * kTile, 0, kTile); };
  // Reads samples [i, end) of the tile, then fills up to `rows` with zeros.
  auto fill = [&](const PpoTile& x, int64_t tile, int64_t i, int64_t end, int64_t rows, const Batch* batch) {
    const int64_t first = tile * kTile + i, n = end - i;
    const int64_t* const at = batch ? batch->row + i : nullptr;
    rows -= i;
    actor_input.fill(first, n, x.actor_obs + i * x.actor_ld, networks.obs_normalizer, rows, at);
    if (!networks.one_input)
      critic_input.fill(first, n, x.critic_obs + i * x.critic_ld, networks.critic_normalizer, rows, at);
    copy_tile(action, first, n, rows, x.actions + i, 1, kTile, at);
    if (loss.kl) {
      copy_tile(old_mean, first, n, rows, x.mu + i, 1, kTile, at);
      copy_tile(old_std, first, n, rows, x.sigma + i, 1, kTile, at);
    }
    copy_tile(log_prob, first, n, rows, x.log_probs + i, 1, 0, at);
    copy_tile(value, first, n, rows, x.values + i, 1, 0, at);
    if (batch) {
      source.fill_advantages(*batch, i, end, x);
      std::fill(x.advantages + end, x.advantages + i + rows, 0.0f);
      std::fill(x.returns + end, x.returns + i + rows, 0.0f);
    } else {
      copy_tile(advantage, first, n, rows, x.advantages + i, 1, 0);
      copy_tile(target, first, n, rows, x.returns + i, 1, 0);
    }
  };

  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      PpoTile& x = state[t];
      Batch batches[2];
      const int64_t from = tiles * t / threads, to = tiles * (t + 1) / threads;
      if (drawing) {
        locate_batch(source.samples, from * kTile, size(from), batches[from % 2]);
        source.fetch_rows(batches[from % 2], 0, std::min(size(from), Drawn::kAhead));
      }
      for (int64_t tile = from; tile < to; ++tile) {
        x.count = size(tile);
        if (drawing) {
          const Batch& batch = batches[tile % 2];
          Batch& next = batches[(tile + 1) % 2];
          const int64_t following = tile + 1 < to ? size(tile + 1) : 0;
          if (following) locate_batch(source.samples, (tile + 1) * kTile, following, next);
          for (int64_t i = 0; i < x.count; i += Drawn::kPortion) {
            const int64_t until = std::min(x.count, i + Drawn::kPortion), ahead = i + Drawn::kAhead;
            if (ahead < x.count)
              source.fetch_rows(batch, ahead, std::min(x.count - ahead, Drawn::kPortion));
            else if (ahead >= kTile)
              source.fetch_rows(next, ahead - kTile,
                                std::clamp<int64_t>(following - ahead + kTile, 0, Drawn::kPortion));
            fill(x, tile, i, until, until == x.count ? kTile : until, &batch);
          }
        } else {
          fill(x, tile, 0, x.count, kTile, nullptr);
        }
        networks.value_normalizer.apply_scalar(x.returns, x.count);
        networks.value_normalizer.apply_scalar(x.values, x.count);
        networks.version.step(actor_net, critic_net, loss, x);
      }
    }
  });

  write_grads(pi, grads.data(), sums);
  write_grads(v, grads.data() + actor.size(), sums);
  double results[kNumMetrics] = {};
  for (int64_t i = 0; i < kNumMetrics; ++i) {
    for (const PpoTile& x : state) results[i] += x.sums[i];
    results[i] /= static_cast<double>(samples);
  }
  if (!mu) results[kKl] = std::nan("");
  if (std) {
    auto* std_grad = static_cast<float*>(grads.back().data_ptr());
    for (int64_t j = 0; j < num_actions; ++j) {
      std_grad[j] = 0;
      for (const PpoTile& x : state) std_grad[j] += x.std_grad[j];
      std_grad[j] -= loss.entropy_coef / loss.std[j];
      results[kEntropy] += std::log(static_cast<double>(loss.std[j])) + kHalfLog2Pi + 0.5;
    }
  }
  for (int64_t i = 0; i < metrics.size(0); ++i) static_cast<float*>(metrics.data_ptr())[i] = static_cast<float>(results[i]);
}

}  // namespace pydrone
