// Rounding to 8 bits for fast attention, tile by tile (codes.cuh), each tile with one scale.
//
//   mean [b,n,128]   of up to 256 keys. Keys less any one vector have the same softmax, and what all of them share
//                    would be most of what a scale has to span.
//   queries          int8(H q / scale)            shift [b,n,l] = q . mean, which the scores lack
//   keys             int8(H (k - mean) / scale)   H: signs, then a Hadamard matrix: products of rows stay the same but for
//   values           e4m3(v / scale)              its length, and what few large channels hold is spread over all of them
//
// Inputs [b,l,n,128] in 16 bits; a scale is max|x| / 127, or / 448 for values, of which two tiles share one.
#include "../common/vector.cuh"
#include "codes.cuh"

namespace wan {

__device__ constexpr uint32_t kSigns[4] = {0x8f1bbcdcu, 0x5a827999u, 0xca62c1d6u, 0x6ed9eba1u}; // any fixed bits do

// The bits of a magnitude, ordered like it; NaN is above all of them.
__device__ __forceinline__ uint32_t size_of(float v) { return __float_as_uint(v) & 0x7fffffffu; }

template <int THREADS> __device__ __forceinline__ float block_top(uint32_t top) {
  __shared__ uint32_t tops[THREADS / 32];
  top = __reduce_max_sync(~0u, top);
  if ((threadIdx.x & 31) == 0) tops[threadIdx.x / 32] = top;
  __syncthreads();
  top = tops[0];
#pragma unroll
  for (int i = 1; i < THREADS / 32; ++i) top = max(top, tops[i]);
  return __uint_as_float(top);
}

// A tile of zeros keeps a scale that can be divided by; NaN anywhere makes it NaN, and with it all that the tile enters.
__device__ __forceinline__ float scale_of(float top, float most) {
  const float scale = __fdiv_rn(top, most);
  return scale < 1e-30f ? 1e-30f : scale;
}

__device__ __forceinline__ long first_of(int batch, int rows, int row, int heads, int head) {
  return ((static_cast<long>(batch) * rows + row) * heads + head) * kCodeHead;
}

// Adding 1.5 * 2^23 leaves the rounded integer in the low bits: conversions run at a quarter of an addition's rate.
__device__ __forceinline__ uint32_t pack_int8(const float *v, float s) {
  uint32_t bits[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) bits[i] = __float_as_uint(__fadd_rn(__fmul_rn(v[i], s), 12582912.f));
  return __byte_perm(__byte_perm(bits[0], bits[1], 0x0040), __byte_perm(bits[2], bits[3], 0x0040), 0x5410);
}

} // namespace wan

// One block of 1024 threads a head: eight rows at a time, a fixed selection of them, always added in the same order.
extern "C" __global__ void __launch_bounds__(1024) fast_attention_mean(wan::In k, float *mean, int m, int heads) {
  __shared__ float sums[8][wan::kCodeHead];
  const int head = blockIdx.x, batch = blockIdx.y, channel = threadIdx.x % 128, group = threadIdx.x / 128;
  const int step = (m + 255) / 256, count = (m + step - 1) / step;
  float sum = 0.f;
#pragma unroll 8
  for (int i = group; i < count; i += 8) sum += wan::load1(k, wan::first_of(batch, m, i * step, heads, head) + channel);
  sums[group][channel] = sum;
  __syncthreads();
  if (group != 0) return;
#pragma unroll
  for (int i = 1; i < 8; ++i) sum += sums[i][channel];
  mean[(batch * heads + head) * wan::kCodeHead + channel] = sum / count;
}

// One block of 512 threads a tile of 128 rows: four lanes a row, 32 channels each, those of eight-channel chunks
// 4i + lane % 4. With `shift` the rows are queries, without it keys, which lose the mean.
extern "C" __global__ void __launch_bounds__(512)
    fast_attention_rows(wan::In x, const float *mean, uint8_t *codes, float *scales, int scale_stride, float *shift, int l,
                        int heads) {
  using namespace wan;
  const int row = threadIdx.x >> 2, part = threadIdx.x & 3;
  const int tile = blockIdx.x, head = blockIdx.y, batch = blockIdx.z, at = tile * kCodeRows + row;
  const long pair = static_cast<long>(batch) * heads + head;
  float v[32], dot = 0.f;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float eight[8] = {}, mean8[8];
    if (at < l) {
      const long first = first_of(batch, l, at, heads, head);
      unpack8(reinterpret_cast<const uint4 *>(static_cast<const uint16_t *>(x.data) + first)[i * 4 + part], x.dtype, eight);
      load8(mean + pair * kCodeHead + (i * 4 + part) * 8, mean8);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        dot = fmaf(eight[j], mean8[j], dot);
        if (!shift) eight[j] -= mean8[j];
      }
    }
    const uint32_t signs = kSigns[i] >> (part * 8);
#pragma unroll
    for (int j = 0; j < 8; ++j)
      v[i * 8 + j] = __uint_as_float(__float_as_uint(eight[j]) ^ (signs << (31 - j) & 0x80000000u));
  }
  if (shift) {
    dot += __shfl_xor_sync(~0u, dot, 1);
    dot += __shfl_xor_sync(~0u, dot, 2);
    if (part == 0 && at < l) shift[pair * l + at] = dot;
  }
#pragma unroll
  for (int step = 1; step < 32; step *= 2)
#pragma unroll
    for (int i = 0; i < 32; ++i)
      if ((i & step) == 0) {
        const float a = v[i], b = v[i + step];
        v[i] = a + b, v[i + step] = a - b;
      }
#pragma unroll
  for (int step = 1; step < 4; step *= 2)
#pragma unroll
    for (int i = 0; i < 32; ++i) {
      const float other = __shfl_xor_sync(~0u, v[i], step);
      v[i] = (part & step) ? other - v[i] : v[i] + other;
    }
  uint32_t top = 0;
#pragma unroll
  for (int i = 0; i < 32; ++i) top = max(top, size_of(v[i]));
  const float scale = scale_of(block_top<512>(top), 127.f), inverse = __frcp_rn(scale);
  const long image = pair * gridDim.x + tile;
  if (threadIdx.x == 0) scales[image * scale_stride] = scale;
  uint8_t *out = codes + image * kCodeBytes + row * 128;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int chunk = (2 * i + (part >> 1)) ^ (row & 7);
    *reinterpret_cast<uint2 *>(out + chunk * 16 + (part & 1) * 8) = {pack_int8(v + i * 8, inverse),
                                                                     pack_int8(v + i * 8 + 4, inverse)};
  }
}

// One block of 1024 threads two tiles. A thread holds eight channels of four keys that lie side by side in the result.
extern "C" __global__ void __launch_bounds__(1024)
    fast_attention_values(wan::In v, uint8_t *codes, float *scales, int scale_stride, int m, int heads) {
  using namespace wan;
  __shared__ __align__(16) uint8_t image_s[2 * kCodeBytes];
  const int which = threadIdx.x >> 9, warp = (threadIdx.x >> 5) & 15, lane = threadIdx.x & 31;
  const int four = warp / 4 * 8 + lane % 8, chunk = warp % 4 * 4 + lane / 8;
  const int head = blockIdx.y, batch = blockIdx.z, tiles = (m + kCodeRows - 1) / kCodeRows;
  const int tile0 = 2 * blockIdx.x, here = min(2, tiles - tile0);
  float x[4][8];
  uint32_t top = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int key = (tile0 + which) * kCodeRows + four / 4 * 16 + four % 4 * 2 + (i & 1) + (i >> 1) * 8;
    uint4 raw = {0, 0, 0, 0};
    if (key < m)
      raw = reinterpret_cast<const uint4 *>(static_cast<const uint16_t *>(v.data) +
                                            first_of(batch, m, key, heads, head))[chunk];
    unpack8(raw, v.dtype, x[i]);
#pragma unroll
    for (int j = 0; j < 8; ++j) top = max(top, size_of(x[i][j]));
  }
  const float scale = scale_of(block_top<1024>(top), 448.f), s = __frcp_rn(scale);
  const long image = (static_cast<long>(batch) * heads + head) * tiles + tile0;
  if (threadIdx.x < here) scales[(image + threadIdx.x) * scale_stride] = scale;
#pragma unroll
  for (int e = 0; e < 8; ++e)
    *reinterpret_cast<uint32_t *>(image_s + which * kCodeBytes + (chunk * 8 + e) * 128 + ((four / 4 ^ e) << 4) + four % 4 * 4) =
        pack_e4m3(x[0][e] * s, x[1][e] * s, x[2][e] * s, x[3][e] * s);
  __syncthreads();
  uint4 *out = reinterpret_cast<uint4 *>(codes + image * kCodeBytes);
  for (int i = threadIdx.x; i < here * (kCodeBytes / 16); i += 1024) out[i] = reinterpret_cast<const uint4 *>(image_s)[i];
}
