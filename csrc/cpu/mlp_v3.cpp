// The networks for x86-64-v3; see mlp_tile.h. The pragma comes before any include: it must apply to the whole file.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("arch=x86-64-v3")
#define PYDRONE_MLP mlp_v3
#define PYDRONE_VECTOR 8
#define PYDRONE_ROWS 6
#include "mlp_tile.h"

namespace pydrone {
const MlpVersion kMlpV3{"x86-64-v3", mlp_v3::V, mlp_v3::work_size, mlp_v3::pack, mlp_v3::step, mlp_v3::forward};
}
#endif
