// The CPU library's table of contents. Schemas: pydrone/ops/schema.py. CUDA kernels are registered in csrc/cuda.
#include "checks.h"

#include <torch/csrc/stable/library.h>

#include <vector>

namespace pydrone {

void gae(const Tensor& rewards, const Tensor& values, const Tensor& dones, const Optional& truncated,
         const Optional& valid, const Tensor& last_values, const Optional& final_values, const Optional& final_rows,
         double gamma, double lam, int64_t start, bool coded, int64_t bootstrap, const Optional& cursor,
         const Tensor& advantages, const Optional& returns, const Optional& stats, const Optional& workspace);

void off_policy(const Tensor& rewards, const Tensor& values, const Tensor& dones, const Optional& truncated,
                const Optional& valid, const Tensor& last_values, const Optional& final_values,
                const Optional& final_rows, const Tensor& log_rhos, const Optional& q_values, double gamma, double lam,
                double rho_clip, double c_clip, int64_t start, bool coded, int64_t bootstrap, const Optional& cursor,
                const Optional& advantages, const Tensor& targets, const Optional& stats, const Optional& workspace);

void append(const std::vector<Tensor>& memory, const std::vector<Tensor>& sources, const Tensor& layout,
            const Optional& dones, const Optional& truncated, const Optional& valid, int64_t slot, int64_t pool_slot,
            const Optional& cursor, bool commit);

Tensor append_plan(const std::vector<Tensor>& memory, const std::vector<Tensor>& sources, const Tensor& layout,
                   const Optional& dones, const Optional& truncated, const Optional& valid,
                   const std::vector<int64_t>& places);

void gather(const Tensor& rows, const std::vector<int64_t>& offsets, const std::vector<int64_t>& dtypes,
            const std::vector<Tensor>& outputs, int64_t value_offset, const Optional& advantages,
            const Optional& returns, const Optional& stats, const Optional& subset, int64_t num_steps, int64_t start,
            int64_t num_samples, int64_t key, int64_t rollout, int64_t epoch, bool shuffle, int64_t first,
            const Optional& cursor, const Optional& advantages_out, const Optional& returns_out,
            const Optional& indices_out);

void ppo_act(const std::vector<Tensor>& obs, const std::vector<Tensor>& critic_obs, const Tensor& noise,
             const std::vector<Tensor>& actor, const std::vector<Tensor>& critic, const Optional& std,
             int64_t activation, int64_t matmul, const Optional& obs_shift, const Optional& obs_std, const Optional& critic_shift,
             const Optional& critic_std, double obs_clip, const Optional& value_shift, const Optional& value_std,
             const Optional& packed, const Tensor& actions, const Tensor& log_probs, const Tensor& values,
             const Tensor& mean, const std::vector<int64_t>& categories);

void ppo_step(const std::vector<Tensor>& end_memory, const std::vector<Tensor>& end_sources, const Optional& end_layout,
              const Optional& dones, const Optional& truncated, const Optional& valid, int64_t end_slot,
              int64_t end_pool_slot, const std::vector<Tensor>& obs, const std::vector<Tensor>& critic_obs,
              const Tensor& noise, const std::vector<Tensor>& actor, const std::vector<Tensor>& critic,
              const Tensor& std, int64_t activation, int64_t matmul, const Optional& obs_shift,
              const Optional& obs_std, const Optional& critic_shift, const Optional& critic_std, double obs_clip,
              const Optional& value_shift, const Optional& value_std, const Optional& packed, const Tensor& actions,
              const Tensor& log_probs, const Tensor& values, const Tensor& mean, const Tensor& sigma,
              const std::vector<Tensor>& memory, const std::vector<Tensor>& stored_obs, const Tensor& layout,
              int64_t slot, int64_t pool_slot, const Optional& cursor);

void ppo_gradients(const std::vector<Tensor>& obs, const std::vector<Tensor>& critic_obs, const Tensor& actions,
                   const Tensor& log_probs, const Tensor& advantages, const Optional& returns, const Tensor& values,
                   const Optional& mu, const Optional& sigma, const std::vector<Tensor>& actor,
                   const std::vector<Tensor>& critic, const Optional& std, int64_t activation, int64_t matmul,
                   double clip, double value_clip, double value_loss_coef, double entropy_coef,
                   const Optional& obs_shift, const Optional& obs_std, const Optional& critic_shift,
                   const Optional& critic_std, double obs_clip, const Optional& value_shift, const Optional& value_std,
                   const std::vector<Tensor>& grads, const Tensor& metrics, const std::vector<int64_t>& drawn,
                   const Optional& stats, const Optional& subset, const Optional& cursor,
                   const std::vector<int64_t>& categories, bool value_max);

void clipped_adam(const std::vector<Tensor>& parameters, const std::vector<Tensor>& grads,
                  const std::vector<Tensor>& exp_avgs, const std::vector<Tensor>& exp_avg_sqs,
                  const std::vector<Tensor>& steps, const std::vector<int64_t>& groups, double max_norm,
                  const Tensor& learning_rate, double beta1, double beta2, double epsilon, const Tensor& norms,
                  const Optional& kl, const std::vector<double>& schedule);

void task_step(const Tensor& pos, const Tensor& quat, const Tensor& vel, const Tensor& ang_vel, const Tensor& actions,
               const Tensor& target, const Tensor& last_pos, const Tensor& last_actions, const Tensor& age,
               const Optional& held, const Optional& leg, const Optional& waypoints, const Tensor& sums,
               const Tensor& initial, const Optional& drawn, const Optional& wind, const Optional& history,
               const Optional& rpm, const Tensor& uniform, const Optional& normal, const Tensor& obs,
               const Tensor& final_obs, const Tensor& rewards, const Tensor& dones, const Tensor& truncated,
               const Tensor& log, const Tensor& numbers, int64_t max_age, int64_t hold_steps, int64_t substeps,
               bool resample, bool near, bool tilt);

bool has_bf16();

}  // namespace pydrone

STABLE_TORCH_LIBRARY_IMPL(pydrone, CPU, m) {
  m.impl("gae", TORCH_BOX(&pydrone::gae));
  m.impl("off_policy", TORCH_BOX(&pydrone::off_policy));
  m.impl("append", TORCH_BOX(&pydrone::append));
  m.impl("append_plan", TORCH_BOX(&pydrone::append_plan));
  m.impl("gather", TORCH_BOX(&pydrone::gather));
  m.impl("ppo_act", TORCH_BOX(&pydrone::ppo_act));
  m.impl("ppo_step", TORCH_BOX(&pydrone::ppo_step));
  m.impl("ppo_gradients", TORCH_BOX(&pydrone::ppo_gradients));
  m.impl("clipped_adam", TORCH_BOX(&pydrone::clipped_adam));
  m.impl("task_step", TORCH_BOX(&pydrone::task_step));
}

STABLE_TORCH_LIBRARY_IMPL(pydrone, CompositeExplicitAutograd, m) { m.impl("has_bf16", TORCH_BOX(&pydrone::has_bf16)); }
