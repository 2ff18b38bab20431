// fp8 (e4m3fn) weights with a scale for each group of consecutive values: codes to values and back. The codec is
// integer and fp32 arithmetic, so it runs on every card (sm_86 has no fp8 instructions) and gives the same bits.
//
//   dequantise   value = round_to_scale_dtype(decode(code) * scale), rounded once more to the output's dtype
//   quantise     scale = max|w| / 448 rounded to its dtype, code = encode(clamp(w / scale))
//
// Sixteen codes a thread: 16 bytes in, 32 out. Bound by memory.
#include "codec.cuh"

extern "C" __global__ void fp8_dequantize(const uint8_t *codes, wan::In scale, long group, wan::Out out, long n) {
  const long at = (static_cast<long>(blockIdx.x) * blockDim.x + threadIdx.x) * 16;
  if (at >= n) return;
  if (at + 16 > n || group % 16 != 0) { // a ragged end, or groups that end within the sixteen
    for (long i = at; i < min(at + 16, n); ++i)
      wan::store1(out, i, wan::round_to(wan::decode(codes[i]) * wan::load1(scale, i / group), scale.dtype));
    return;
  }
  const uint4 raw = *reinterpret_cast<const uint4 *>(codes + at);
  const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
  const float s = wan::load1(scale, at / group);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float v[8];
#pragma unroll
    for (int i = 0; i < 8; ++i)
      v[i] = wan::round_to(wan::decode(words[half * 2 + i / 4] >> (i % 4 * 8) & 0xffu) * s, scale.dtype);
    wan::store8(out, at + half * 8, v);
  }
}

// One block of 128 threads a group.
extern "C" __global__ void __launch_bounds__(128)
    fp8_quantize(wan::In w, uint8_t *codes, wan::Out scale, long group) {
  __shared__ float tops[4];
  const long first = static_cast<long>(blockIdx.x) * group;
  float top = 0.f;
  for (long i = threadIdx.x; i < group; i += 128) top = fmaxf(top, fabsf(wan::load1(w, first + i)));
#pragma unroll
  for (int offset = 16; offset > 0; offset >>= 1) top = fmaxf(top, __shfl_xor_sync(~0u, top, offset));
  if ((threadIdx.x & 31) == 0) tops[threadIdx.x / 32] = top;
  __syncthreads();
  top = fmaxf(fmaxf(tops[0], tops[1]), fmaxf(tops[2], tops[3]));
  const float s = fmaxf(wan::round_to(__fdiv_rn(top, 448.f), scale.dtype), wan::round_to(1e-8f, scale.dtype));
  if (threadIdx.x == 0) wan::store1(scale, blockIdx.x, s);
  for (long i = threadIdx.x; i < group; i += 128) {
    float v = __fdiv_rn(wan::load1(w, first + i), s);
    v = v != v ? 0.f : fminf(fmaxf(v, -448.f), 448.f); // 0/0 of a block of zeros whose scale underflowed
    codes[first + i] = static_cast<uint8_t>(wan::encode(v));
  }
}
