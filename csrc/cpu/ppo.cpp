// PPO's gradients of a minibatch on the CPU: both networks forward, the loss with its KL divergence, both backward, a
// tile of samples at a time, so that activations never leave the second-level cache. mlp_tile.h has the arithmetic.
#include "networks.h"

#include <cmath>

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

}  // namespace

void ppo_gradients(const std::vector<Tensor>& obs, const std::vector<Tensor>& critic_obs, const Tensor& actions,
                   const Tensor& log_probs, const Tensor& advantages, const Tensor& returns, const Tensor& values,
                   const Optional& mu, const Optional& sigma, const std::vector<Tensor>& actor,
                   const std::vector<Tensor>& critic, const Tensor& std, int64_t activation, bool bf16,
                   double clip, double value_clip, double value_loss_coef, const Optional& obs_shift,
                   const Optional& obs_std, const Optional& critic_shift, const Optional& critic_std, double obs_clip,
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
  Networks networks(obs, critic_obs, actor, critic, std, activation, bf16, samples, num_actions, obs_shift, obs_std,
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
        networks.version.step(actor_net, critic_net, loss, x);
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

}  // namespace pydrone
