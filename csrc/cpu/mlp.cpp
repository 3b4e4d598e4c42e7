// Chooses which version of mlp_tile.h runs.
#include "mlp.h"

#include "common.h"

#include <cstdlib>
#include <string>

namespace pydrone {

const MlpVersion& version() {
  static const MlpVersion* const picked = [] {
    const MlpVersion* best = &kMlpBase;
    const char* wanted = std::getenv("PYDRONE_ISA");
#if defined(PYDRONE_MLP_VERSIONS)
    __builtin_cpu_init();
    for (const MlpVersion* x : {&kMlpV3, &kMlpV4}) {
      if (wanted && best->name == std::string(wanted)) break;
      if (x == &kMlpV3 ? __builtin_cpu_supports("x86-64-v3") : __builtin_cpu_supports("x86-64-v4")) best = x;
    }
#endif
    STD_TORCH_CHECK(!wanted || !*wanted || best->name == std::string(wanted),
                    "PYDRONE_ISA: expected baseline, x86-64-v3 or x86-64-v4, as far as this processor has them, got ",
                    wanted);
    return best;
  }();
  return *picked;
}

const MlpVersion* bf16_version() {
#if defined(PYDRONE_MLP_VERSIONS)
  if (&version() == &kMlpV4 && __builtin_cpu_supports("avx512bf16")) return &kMlpBf16;
#endif
  return nullptr;
}

bool has_bf16() { return bf16_version() != nullptr; }

}  // namespace pydrone
