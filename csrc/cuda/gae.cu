// GAE in one launch, for any layout, with the statistics of the advantages.
#include "scan_launch.cuh"

namespace pydrone {
namespace {

void gae(const Tensor& rewards, const Tensor& values, const Tensor& dones, const Optional& truncated,
         const Optional& valid, const Tensor& last_values, const Optional& final_values, const Optional& final_rows,
         double gamma, double lam, int64_t start, bool coded, int64_t bootstrap, const Optional& cursor,
         const Tensor& advantages, const Optional& returns, const Optional& stats, const Optional& workspace) {
  const Scan scan{rewards, values, dones, truncated, valid, last_values, final_values, final_rows,
                  start, coded, bootstrap, cursor, advantages, returns, stats, workspace};
  check_gae(scan);
  run<kGae>(scan, {}, {}, gamma, lam, 0, 0);
}

}  // namespace
}  // namespace pydrone

STABLE_TORCH_LIBRARY_IMPL(pydrone, CUDA, m) { m.impl("gae", TORCH_BOX(&pydrone::gae)); }
