// V-trace and Retrace(lambda) in one launch, on GAE's scan with a weight and a link for each step.
#include "scan_launch.cuh"

namespace pydrone {
namespace {

void off_policy(const Tensor& rewards, const Tensor& values, const Tensor& dones, const Optional& truncated,
                const Optional& valid, const Tensor& last_values, const Optional& final_values,
                const Optional& final_rows, const Tensor& log_rhos, const Optional& q_values, double gamma, double lam,
                double rho_clip, double c_clip, int64_t start, bool coded, int64_t bootstrap, const Optional& cursor,
                const Optional& advantages, const Tensor& targets, const Optional& stats, const Optional& workspace) {
  const Scan scan{rewards, values, dones, truncated, valid, last_values, final_values, final_rows,
                  start, coded, bootstrap, cursor, advantages, targets, stats, workspace};
  check_off_policy(scan, log_rhos, q_values, rho_clip, c_clip);
  q_values ? run<kRetrace>(scan, log_rhos, q_values, gamma, lam, rho_clip, c_clip)
           : run<kVtrace>(scan, log_rhos, q_values, gamma, lam, rho_clip, c_clip);
}

}  // namespace
}  // namespace pydrone

STABLE_TORCH_LIBRARY_IMPL(pydrone, CUDA, m) { m.impl("off_policy", TORCH_BOX(&pydrone::off_policy)); }
