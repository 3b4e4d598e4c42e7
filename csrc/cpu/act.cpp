// Acts for one step on the CPU, a tile of environments at a time: both networks, sampled actions and their
// log-probabilities (ppo_act). ppo_step does so between the end of the previous step and the beginning of the next.
#include "append.h"
#include "networks.h"

#include <cmath>

namespace pydrone {
namespace {

void check_output(const char* name, const Tensor& x, const Tensor& like) {
  check_dtype(name, x, ScalarType::Float);
  check_device(name, x, like);
  check_own(name, x);
}

// An output's memory, read once: each question to a tensor is a call into torch.
struct Output {
  float* data;
  int64_t row, column;

  explicit Output(const Tensor& x)
      : data(static_cast<float*>(x.data_ptr())), row(x.stride(0)), column(x.dim() > 1 ? x.stride(1) : 0) {}
  float& at(int64_t i, int64_t j = 0) const { return data[i * row + j * column]; }
};

// The choice whose exponential clock, `times` over its probability, rings first, as torch.multinomial draws it; and its
// log-probability, NaN where a logit is.
std::pair<int64_t, double> draw_choice(const float* logits, const float* times, int64_t choices) {
  const float most = *std::max_element(logits, logits + choices);
  double sum = 0;
  int64_t best = 0;
  float highest = -INFINITY;
  for (int64_t j = 0; j < choices; ++j) {
    const float p = std::exp(logits[j] - most);
    sum += p;
    if (p / times[j] > highest) highest = p / times[j], best = j;
  }
  return {best, logits[best] - most - std::log(sum)};
}

}  // namespace

void ppo_act(const std::vector<Tensor>& obs, const std::vector<Tensor>& critic_obs, const Tensor& noise,
             const std::vector<Tensor>& actor, const std::vector<Tensor>& critic, const Optional& std, int64_t activation,
             int64_t matmul, const Optional& obs_shift, const Optional& obs_std, const Optional& critic_shift,
             const Optional& critic_std, double obs_clip, const Optional& value_shift, const Optional& value_std,
             const Optional& packed, const Tensor& actions, const Tensor& log_probs, const Tensor& values,
             const Tensor& mean, const std::vector<int64_t>& categories) {
  check_shape("noise", noise, {-1, -1});
  const int64_t num_envs = noise.size(0), width = noise.size(1);
  check_categories(std, categories, width);
  const int64_t num_actions = std ? width : static_cast<int64_t>(categories.size());
  const Column drawn = column("noise", noise, num_envs, width, noise);
  Networks networks(obs, critic_obs, actor, critic, std, activation, matmul, num_envs, width, obs_shift, obs_std,
                    critic_shift, critic_std, obs_clip, value_shift, value_std, noise);
  check_shape("actions", actions, {num_envs, num_actions});
  check_shape("mean", mean, {num_envs, width});
  for (const auto& [name, out] : {std::pair{"actions", &actions}, {"mean", &mean}}) check_output(name, *out, noise);
  for (const auto& [name, out] : {std::pair{"log_probs", &log_probs}, {"values", &values}}) {
    check_shape(name, *out, {num_envs});
    check_output(name, *out, noise);
  }
  const int64_t kept = networks.actor.kept_size() + networks.critic.kept_size();
  if (packed) {
    check_shape("packed", *packed, {-1});
    check_output("packed", *packed, noise);
    check_contiguous("packed", *packed);
    STD_TORCH_CHECK(packed->numel() >= kept + 16, "packed: expected at least ", kept + 16,
                    " elements for these networks, got ", packed->numel());
  }
  const int64_t tiles = (num_envs + kTile - 1) / kTile;
  const int64_t threads = std::min<int64_t>(tiles, std::max<int64_t>(1, torch::stable::get_num_threads()));
  const int64_t work = std::max(networks.actor.work_size(), networks.critic.work_size());
  const int64_t inputs = kTile * (networks.actor_input.ld + networks.critic_input.ld);
  Arena arena((packed ? 0 : networks.packed_size()) + threads * (work + inputs + kTile * width + 256));
  if (packed) {
    Arena there(static_cast<float*>(packed->data_ptr()), kept);
    networks.actor.repack(there);
    networks.critic.repack(there);
  } else {
    networks.pack(arena, false);
  }
  std::vector<float*> memory;
  for (int64_t t = 0; t < threads; ++t) memory.push_back(arena.take(work + inputs + kTile * width + 64));
  const auto* deviation = std ? static_cast<const float*>(std->data_ptr()) : nullptr;
  double lacking = 0;
  for (int64_t j = 0; std && j < num_actions; ++j) lacking += std::log(static_cast<double>(deviation[j])) + kHalfLog2Pi;

  const Output action(actions), log_prob(log_probs), value(values), center(mean);

  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      float* const actor_obs = memory[t];
      float* const critic_obs_tile = actor_obs + kTile * networks.actor_input.ld;
      float* const z = critic_obs_tile + kTile * networks.critic_input.ld;
      float* const outputs = z + round_up(kTile * width, 16);
      const MlpNet pi = networks.actor.view(), v = networks.critic.view();
      for (int64_t tile = tiles * t / threads; tile < tiles * (t + 1) / threads; ++tile) {
        const int64_t first = tile * kTile, count = std::min(kTile, num_envs - first);
        networks.actor_input.fill(first, count, actor_obs, networks.obs_normalizer);
        copy_tile(drawn, first, count, kTile, z, width, 1);
        const float* y = networks.version.forward(pi, actor_obs, networks.actor_input.ld, count, outputs);
        int64_t ld = networks.actor.layers.back().ld;
        for (int64_t i = 0; !std && i < count; ++i) {
          const float *logits = y + i * ld, *times = z + i * width;
          double sum = 0;
          for (int64_t h = 0, j = 0; h < num_actions; j += categories[h++]) {
            const auto [choice, by] = draw_choice(logits + j, times + j, categories[h]);
            action.at(first + i, h) = static_cast<float>(choice);
            sum += by;
          }
          log_prob.at(first + i) = static_cast<float>(sum);
          for (int64_t j = 0; j < width; ++j) center.at(first + i, j) = logits[j];
        }
        for (int64_t i = 0; std && i < count; ++i) {
          float squares = 0;
          for (int64_t j = 0; j < num_actions; ++j) {
            const float m = y[i * ld + j], e = z[i * width + j];
            squares += e * e;
            center.at(first + i, j) = m;
            action.at(first + i, j) = m + e * deviation[j];
          }
          log_prob.at(first + i) = static_cast<float>(-0.5 * squares - lacking);
        }
        const float* x = actor_obs;
        if (!networks.one_input) {
          networks.critic_input.fill(first, count, critic_obs_tile, networks.critic_normalizer);
          x = critic_obs_tile;
        }
        y = networks.version.forward(v, x, networks.critic_input.ld, count, outputs);
        ld = networks.critic.layers.back().ld;
        for (int64_t i = 0; i < count; ++i)
          value.at(first + i) = networks.value_normalizer.undo(y[i * ld]);
      }
    }
  });
}

void ppo_step(const std::vector<Tensor>& end_memory, const std::vector<Tensor>& end_sources, const Optional& end_layout,
              const Optional& dones, const Optional& truncated, const Optional& valid, int64_t end_slot,
              int64_t end_pool_slot, const std::vector<Tensor>& obs, const std::vector<Tensor>& critic_obs,
              const Tensor& noise, const std::vector<Tensor>& actor, const std::vector<Tensor>& critic,
              const Tensor& std, int64_t activation, int64_t matmul, const Optional& obs_shift,
              const Optional& obs_std, const Optional& critic_shift, const Optional& critic_std, double obs_clip,
              const Optional& value_shift, const Optional& value_std, const Optional& packed, const Tensor& actions,
              const Tensor& log_probs, const Tensor& values, const Tensor& mean, const Tensor& sigma,
              const std::vector<Tensor>& memory, const std::vector<Tensor>& stored_obs, const Tensor& layout,
              int64_t slot, int64_t pool_slot, const Optional& cursor) {
  std::vector<Tensor> sources(stored_obs);
  sources.insert(sources.end(), {actions, log_probs, values, mean, sigma, values});  // the last one for a plane
  const Optional none;
  std::function<void()> end;
  if (end_layout)
    end = checked_append(end_memory, end_sources, *end_layout, dones, truncated, valid, end_slot, end_pool_slot,
                         cursor, true);
  const auto checked_begin = [&] {
    return checked_append(memory, sources, layout, none, none, none, slot, pool_slot, cursor, false);
  };
  auto begin = checked_begin();
  ppo_act(obs, critic_obs, noise, actor, critic, std, activation, matmul, obs_shift, obs_std, critic_shift, critic_std,
          obs_clip, value_shift, value_std, packed, actions, log_probs, values, mean, {});
  if (end) end();
  if (cursor) begin = checked_begin();  // which the end has moved
  begin();
}

}  // namespace pydrone
