// The rotation of 64 values by the orthonormal Hadamard matrix: butterflies of additions alone, then a factor of 1/8,
// which is exact. Steps go from neighbours to distance 32 wherever it is computed: the same bits everywhere.
#pragma once
#include "../common/vector.cuh"

namespace wan {

// One step of distance STEP between the values of a thread.
template <int STEP, int N> __device__ __forceinline__ void butterfly(float (&v)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (i & STEP) continue;
    const float a = v[i], b = v[i + STEP];
    v[i] = __fadd_rn(a, b), v[i + STEP] = __fsub_rn(a, b);
  }
}

// One step between lanes that differ in the bit MASK: the other's value plus or minus the own one.
template <int MASK, int N> __device__ __forceinline__ void butterfly_lanes(float (&v)[N]) {
  const float sign = threadIdx.x & MASK ? -1.f : 1.f;
#pragma unroll
  for (int i = 0; i < N; ++i) v[i] = __fmaf_rn(sign, v[i], __shfl_xor_sync(~0u, v[i], MASK));
}

// 64 values: eight side by side in each of eight neighbouring lanes. Without the factor.
__device__ __forceinline__ void rotate_8x8(float (&v)[8]) {
  butterfly<1>(v), butterfly<2>(v), butterfly<4>(v);
  butterfly_lanes<1>(v), butterfly_lanes<2>(v), butterfly_lanes<4>(v);
}

// 64 values: sixteen side by side in each of four neighbouring lanes. Without the factor.
__device__ __forceinline__ void rotate_4x16(float (&v)[16]) {
  butterfly<1>(v), butterfly<2>(v), butterfly<4>(v), butterfly<8>(v);
  butterfly_lanes<1>(v), butterfly_lanes<2>(v);
}

constexpr float kRotated = 0.125f;

// The scale by which values up to `top` become codes of -127 to 127; zeros keep one that can be divided by, NaN stays.
__device__ __forceinline__ float int8_scale(float top) {
  const float s = __fdiv_rn(top, 127.f);
  return s < 1e-30f ? 1e-30f : s;
}

// Four values times `inverse`, rounded to even, as bytes: the sum with 1.5 * 2^23 has the integer in its lowest bits.
// With the scale of their row nothing is beyond 127.
__device__ __forceinline__ uint32_t int8_codes(const float *v, float inverse) {
  uint32_t bits[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) bits[i] = __float_as_uint(__fmaf_rn(v[i], inverse, 12582912.f));
  return __byte_perm(__byte_perm(bits[0], bits[1], 0x0040), __byte_perm(bits[2], bits[3], 0x0040), 0x5410);
}

} // namespace wan
