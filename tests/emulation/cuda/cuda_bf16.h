// Replaces CUDA's header of this name.
#pragma once

#include <torch/headeronly/util/BFloat16.h>

#include <cstdint>

inline uint16_t __bfloat16_as_ushort(c10::BFloat16 x) { return x.x; }
inline c10::BFloat16 __float2bfloat16(float x) { return x; }
