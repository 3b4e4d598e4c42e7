// Replaces CUDA's header of this name.
#pragma once

#include <torch/headeronly/util/Half.h>

#include <cstdint>

using __half = c10::Half;

inline __half __ushort_as_half(uint16_t bits) { return {bits, c10::Half::from_bits()}; }
inline uint16_t __half_as_ushort(__half x) { return x.x; }
inline float __half2float(__half x) { return x; }
inline __half __float2half(float x) { return x; }
