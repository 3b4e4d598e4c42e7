// GAE in one launch, for any layout, with the statistics of the advantages.
#include "scan_launch.cuh"

namespace pydrone {
namespace {

void gae(const Tensor& rewards, const Tensor& values, const Tensor& dones, const Optional& truncated,
         const Optional& valid, const Tensor& last_values, const Optional& final_values, const Optional& final_rows,
         double gamma, double lam, int64_t start, bool coded, int64_t bootstrap, const Optional& cursor,
         const Tensor& advantages, const Optional& returns, const Optional& stats, const Optional& workspace) {
  check_gae(rewards, values, dones, truncated, valid, last_values, final_values, final_rows, coded, bootstrap, cursor,
            advantages, returns, stats, workspace);
  const int64_t num_envs = rewards.size(0), capacity = rewards.size(1), num_steps = advantages.size(1);
  if (num_envs == 0 || num_steps == 0) return clear_stats(rewards, stats);
  if (!cursor) check_range("start", start, 0, capacity);
  auto* typed = advantages.scalar_type() == ScalarType::Float ? run<float, kGae> : run<double, kGae>;
  typed(rewards, values, dones, truncated, valid, last_values, final_values, final_rows, nullptr, {}, gamma, lam, 0, 0,
        start, coded, bootstrap, cursor, advantages, returns, stats, workspace);
}

void off_policy(const Tensor&, const Tensor&, const Tensor&, const Optional&,
                const Optional&, const Tensor&, const Optional&, const Optional&, const Tensor&, const Optional&,
                double, double, double, double, int64_t, bool, int64_t, const Optional&, const Optional&,
                const Tensor&, const Optional&, const Optional&) {
  STD_TORCH_CHECK(false, "off_policy: not implemented in the CUDA library yet");
}

}  // namespace
}  // namespace pydrone

STABLE_TORCH_LIBRARY_IMPL(pydrone, CUDA, m) {
  m.impl("gae", TORCH_BOX(&pydrone::gae));
  m.impl("off_policy", TORCH_BOX(&pydrone::off_policy));
}
