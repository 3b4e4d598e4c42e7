// The networks for x86-64-v4; see mlp_tile.h. The pragma comes before any include: it must apply to the whole file.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("arch=x86-64-v4")
#define PYDRONE_MLP mlp_v4
#define PYDRONE_VECTOR 16
#define PYDRONE_ROWS 8
#include "mlp_tile.h"

namespace pydrone {
const MlpVersion kMlpV4{"x86-64-v4", mlp_v4::V, mlp_v4::work_size, mlp_v4::pack, mlp_v4::step, mlp_v4::forward};
}
#endif
