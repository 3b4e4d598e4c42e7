// The networks in bfloat16, for x86-64-v4 with AVX512_BF16; see mlp_tile.h. The pragma comes before any include: it
// must apply to the whole file.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("arch=x86-64-v4,avx512bf16")
#define PYDRONE_MLP mlp_bf16
#define PYDRONE_VECTOR 16
#define PYDRONE_ROWS 8
#define PYDRONE_BF16
#include "mlp_tile.h"

namespace pydrone {
const MlpVersion kMlpBf16{"x86-64-v4", mlp_bf16::V, mlp_bf16::work_size, mlp_bf16::pack, mlp_bf16::step,
                          mlp_bf16::forward};
}
#endif
