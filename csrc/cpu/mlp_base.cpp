// The networks for every processor (baseline); see mlp_tile.h.
#define PYDRONE_MLP mlp_base
#define PYDRONE_VECTOR 4
#if defined(__aarch64__)
#define PYDRONE_ROWS 8  // of 32 registers
#else
#define PYDRONE_ROWS 4
#endif
#include "mlp_tile.h"

namespace pydrone {
const MlpVersion kMlpBase{"baseline", mlp_base::V, mlp_base::work_size, mlp_base::pack, mlp_base::step, mlp_base::forward};
}
