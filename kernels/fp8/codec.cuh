// e4m3fn codes and fp32 by integer and fp32 arithmetic: the same bits on every card and on the host (codec.rs).
#pragma once
#include "../common/vector.cuh"

namespace wan {

__device__ __forceinline__ float decode(uint32_t code) {
  // Exponent and mantissa moved to their places in fp32; the product with 2^120 mends the bias, subnormals included.
  const uint32_t magnitude = (code & 0x7fu) << 20;
  float v = __uint_as_float(magnitude) * 1.329227995784916e36f;
  if ((code & 0x7fu) == 0x7fu) v = __uint_as_float(0x7fc00000u);
  return (code & 0x80u) ? -v : v;
}

__device__ __forceinline__ uint32_t encode(float x) {
  const uint32_t bits = __float_as_uint(x), sign = bits >> 24 & 0x80u, magnitude = bits & 0x7fffffffu;
  uint32_t code;
  if (magnitude >= 0x43f00000u) code = 0x7fu; // 480: no code is left
  else if (magnitude < (121u << 23)) code = (__float_as_uint(__uint_as_float(magnitude) + 16384.f) - 0x46800000u) & 0xffu;
  else code = (magnitude - (120u << 23) + 0x7ffffu + (magnitude >> 20 & 1u)) >> 20;
  return sign | code;
}

__device__ __forceinline__ float round_to(float v, int dtype) {
  if (dtype == kBF16) return __bfloat162float(__float2bfloat16_rn(v));
  if (dtype == kF16) return __half2float(__float2half_rn(v));
  return v;
}

} // namespace wan
