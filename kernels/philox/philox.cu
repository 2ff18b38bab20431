// Standard normals by Philox4x32-10 and Box-Muller, four a thread: to the bit what the host makes. That is why every
// double operation is a rounded one of its own (`__d*_rn`): nothing may be fused.
#include "../common/vector.cuh"

namespace wan {

__device__ __forceinline__ uint4 philox(uint4 counter, uint2 key) {
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint32_t hi0 = __umulhi(0xD2511F53u, counter.x), lo0 = 0xD2511F53u * counter.x;
    const uint32_t hi1 = __umulhi(0xCD9E8D57u, counter.z), lo1 = 0xCD9E8D57u * counter.z;
    counter = make_uint4(hi1 ^ counter.y ^ key.x, lo1, hi0 ^ counter.w ^ key.y, lo0);
    key.x += 0x9E3779B9u;
    key.y += 0xBB67AE85u;
  }
  return counter;
}

// ln((word + 1) * 2^-32): ln m = 2 artanh((m - 1) / (m + 1)), m in [sqrt(1/2), sqrt(2)], eleven terms.
__device__ __forceinline__ double ln_unit(uint32_t word) {
  const uint64_t n = static_cast<uint64_t>(word) + 1;
  int exponent = 63 - __clzll(n);
  double m = __ddiv_rn(static_cast<double>(n), static_cast<double>(1ull << exponent));
  if (m > 1.41421356237309504880) {
    m = __dmul_rn(m, 0.5);
    ++exponent;
  }
  const double s = __ddiv_rn(__dadd_rn(m, -1.0), __dadd_rn(m, 1.0)), s2 = __dmul_rn(s, s);
  double sum = 0.0;
#pragma unroll 1
  for (int k = 10; k >= 0; --k) sum = __dadd_rn(__dmul_rn(sum, s2), __ddiv_rn(1.0, static_cast<double>(2 * k + 1)));
  const double whole = __dmul_rn(static_cast<double>(exponent - 32), 0.693147180559945309417);
  return __dadd_rn(whole, __dmul_rn(__dmul_rn(2.0, s), sum));
}

// cos and sin of 2 pi word 2^-32 from the nearest quarter turn; eight terms.
__device__ __forceinline__ double2 turn(uint32_t word) {
  const uint32_t quarter = (word + (1u << 29)) >> 30;
  const int rest = static_cast<int>(word - (quarter << 30));
  const double x = __dmul_rn(static_cast<double>(rest), 6.28318530717958647693 / 4294967296.0);
  const double x2 = __dmul_rn(x, x);
  double cos = 1.0, sin = 1.0;
#pragma unroll 1
  for (int i = 8; i >= 1; --i) {
    const double k = 2.0 * i;
    cos = __dsub_rn(1.0, __dmul_rn(__ddiv_rn(x2, __dmul_rn(k - 1.0, k)), cos));
    sin = __dsub_rn(1.0, __dmul_rn(__ddiv_rn(x2, __dmul_rn(k, k + 1.0)), sin));
  }
  sin = __dmul_rn(sin, x);
  switch (quarter) {
  case 0: return make_double2(cos, sin);
  case 1: return make_double2(-sin, cos);
  case 2: return make_double2(-cos, -sin);
  default: return make_double2(sin, -cos);
  }
}

__device__ __forceinline__ float2 normal_pair(uint32_t a, uint32_t b) {
  const double r = __dsqrt_rn(__dmul_rn(-2.0, ln_unit(a)));
  const double2 t = turn(b);
  return make_float2(__double2float_rn(__dmul_rn(r, t.x)), __double2float_rn(__dmul_rn(r, t.y)));
}

} // namespace wan

// out[0, n); words of counter (block, stream, item, step).
extern "C" __global__ void philox_normal(uint32_t key0, uint32_t key1, uint32_t stream, uint32_t item, uint32_t step,
                                         float *out, long n) {
  const long block = static_cast<long>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (block * 4 >= n) return;
  const uint4 words = wan::philox(make_uint4(static_cast<uint32_t>(block), stream, item, step), make_uint2(key0, key1));
  const float2 first = wan::normal_pair(words.x, words.y), second = wan::normal_pair(words.z, words.w);
  const float values[4] = {first.x, first.y, second.x, second.y};
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (block * 4 + i < n) out[block * 4 + i] = values[i];
}
