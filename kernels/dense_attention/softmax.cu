// Softmax over rows of scores, as it stands between two matrix products: fp32 scores [head, row, pitch] to 16-bit
// probabilities of the same layout. A score is scale * s + bias[head][key - query + centre] where there is a bias.
// Rows are read twice, the second time mostly from L2; bound by memory.
#include "../common/vector.cuh"

namespace wan {

struct Merge { // of two parts of a row: largest score, sum of exponentials relative to it
  float max, sum;
  __device__ __forceinline__ void add(float m, float s) {
    const float top = fmaxf(max, m);
    // Where nothing has come yet, both are -inf: their difference would be no number.
    sum = (sum == 0.f ? 0.f : sum * __expf(max - top)) + (s == 0.f ? 0.f : s * __expf(m - top));
    max = top;
  }
};

// THREADS threads a row, 256 a block.
template <int THREADS>
__device__ __forceinline__ void softmax(const float *scores, Out p, const float *bias, int bias_row, int centre, int rows,
                                        int first, int m, int pitch, float scale) {
  constexpr int kRows = 256 / THREADS;
  const int lane = threadIdx.x % THREADS, row = blockIdx.x * kRows + threadIdx.x / THREADS, head = blockIdx.y;
  __shared__ Merge parts[8];
  const bool live = row < rows; // all threads meet at the barriers
  const long at = (static_cast<long>(head) * rows + row) * pitch;
  const float *table = bias ? bias + static_cast<long>(head) * bias_row + centre - (first + row) : nullptr;
  Merge all{-INFINITY, 0.f};
  const auto score = [&](int j, float s) { return table ? fmaf(s, scale, table[j]) : s * scale; };
  if (live)
    for (int j = lane * 4; j < m; j += THREADS * 4) {
      const float4 s = *reinterpret_cast<const float4 *>(scores + at + j);
      float v[4] = {s.x, s.y, s.z, s.w}, top = -INFINITY, sum = 0.f;
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        v[k] = j + k < m ? score(j + k, v[k]) : -INFINITY;
        top = fmaxf(top, v[k]);
      }
#pragma unroll
      for (int k = 0; k < 4; ++k) sum += j + k < m ? __expf(v[k] - top) : 0.f;
      all.add(top, sum);
    }
#pragma unroll
  for (int offset = 16; offset > 0; offset >>= 1) {
    const float max = __shfl_xor_sync(~0u, all.max, offset), sum = __shfl_xor_sync(~0u, all.sum, offset);
    all.add(max, sum);
  }
  if (THREADS > 32) {
    if ((threadIdx.x & 31) == 0) parts[threadIdx.x / 32] = all;
    __syncthreads();
    all = parts[0];
#pragma unroll
    for (int w = 1; w < THREADS / 32; ++w) all.add(parts[w].max, parts[w].sum);
  }
  if (!live) return;
  const float inverse = 1.f / all.sum;
  for (int j = lane * 4; j < pitch; j += THREADS * 4) {
    const float4 s = *reinterpret_cast<const float4 *>(scores + at + j);
    const float v[4] = {s.x, s.y, s.z, s.w};
    uint16_t packed[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const float x = j + k < m ? __expf(score(j + k, v[k]) - all.max) * inverse : 0.f;
      packed[k] = p.dtype == kBF16 ? __bfloat16_as_ushort(__float2bfloat16_rn(x)) : __half_as_ushort(__float2half_rn(x));
    }
    *reinterpret_cast<uint2 *>(static_cast<uint16_t *>(p.data) + at + j) =
        make_uint2(packed[0] | packed[1] << 16, packed[2] | packed[3] << 16);
  }
}

} // namespace wan

extern "C" __global__ void softmax_warp(const float *scores, wan::Out p, const float *bias, int bias_row, int centre,
                                        int rows, int first, int m, int pitch, float scale) {
  wan::softmax<32>(scores, p, bias, bias_row, centre, rows, first, m, pitch, scale);
}
extern "C" __global__ void softmax_block(const float *scores, wan::Out p, const float *bias, int bias_row, int centre,
                                         int rows, int first, int m, int pitch, float scale) {
  wan::softmax<256>(scores, p, bias, bias_row, centre, rows, first, m, pitch, scale);
}
