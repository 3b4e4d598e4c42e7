// Chooses the instruction set that the operations use, and with it the version of mlp_tile.h.
#include "mlp.h"

#include "common.h"

#include <cstdlib>
#include <string>

namespace pydrone {

Isa isa() {
  static const Isa picked = [] {
    const std::string names[] = {"baseline", "x86-64-v3", "x86-64-v4"};
    int best = 0;
    const char* const wanted = std::getenv("PYDRONE_ISA");
    const bool any = !wanted || !*wanted;
#if defined(PYDRONE_VERSIONS)
    __builtin_cpu_init();
    if ((any || wanted != names[best]) && __builtin_cpu_supports("x86-64-v3")) best = 1;
    if (best == 1 && (any || wanted != names[best]) && __builtin_cpu_supports("x86-64-v4")) best = 2;
#endif
    STD_TORCH_CHECK(any || wanted == names[best],
                    "PYDRONE_ISA: expected baseline, x86-64-v3 or x86-64-v4, as far as this processor has them, got ",
                    wanted);
    return static_cast<Isa>(best);
  }();
  return picked;
}

const MlpVersion& version() {
#if defined(PYDRONE_VERSIONS)
  if (isa() == Isa::kV4) return kMlpV4;
  if (isa() == Isa::kV3) return kMlpV3;
#endif
  isa();  // may raise
  return kMlpBase;
}

const MlpVersion* bf16_version() {
#if defined(PYDRONE_VERSIONS)
  if (isa() == Isa::kV4 && __builtin_cpu_supports("avx512bf16")) return &kMlpBf16;
#endif
  return nullptr;
}

bool has_bf16() { return bf16_version() != nullptr; }

}  // namespace pydrone
