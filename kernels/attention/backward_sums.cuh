// What backward does before and behind its products: a pass over the queries, and the sums of dQ, dK and dV. See backward.cu.
#pragma once
#include "../common/mma.cuh"

namespace wan {

// dQ [ROWS,HEAD] of a tile is shared out to eight warps in tiles of 32 rows x kCols columns.
template <int HEAD, int ROWS> struct DqShare {
  static constexpr int kCols = HEAD * (ROWS / 32) / 8, kColTiles = kCols / 8;
  static __device__ __forceinline__ int row(int warp) { return (warp % (ROWS / 32)) * 32; }
  static __device__ __forceinline__ int col(int warp) { return (warp / (ROWS / 32)) * kCols; }
};

// rows [b,n,tiles][lse, delta][ROWS]: lse * log2(e) and rowsum(dout * o); one warp a (query, head). Queries past the
// end get lse = inf, hence p = 0: they contribute nothing anywhere. Also clears the turn counters.
template <typename T, int HEAD, int ROWS>
__device__ void attention_rows(const T *__restrict__ o, const T *__restrict__ dout, const float *__restrict__ lse,
                               float *__restrict__ rows, int *__restrict__ turns, int n_turns, int l, int heads,
                               int batches) {
  const int tiles = (l + ROWS - 1) / ROWS;
  const long thread = static_cast<long>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (thread < n_turns) turns[thread] = 0;
  const long row = thread >> 5; // over [b, tiles * ROWS, n]
  const int lane = threadIdx.x & 31;
  const int head = row % heads, query = row / heads % (tiles * ROWS);
  const long batch = row / heads / (tiles * ROWS);
  if (batch >= batches) return;
  float delta = 0.f;
  if (query < l) {
#pragma unroll
    for (int i = 0; i < HEAD / 64; ++i) {
      const long at = ((batch * l + query) * heads + head) * HEAD + i * 64 + lane * 2;
      const float2 a = Half16<T>::unpack(*reinterpret_cast<const uint32_t *>(o + at));
      const float2 b = Half16<T>::unpack(*reinterpret_cast<const uint32_t *>(dout + at));
      delta += a.x * b.x + a.y * b.y;
    }
  }
#pragma unroll
  for (int offset = 16; offset > 0; offset >>= 1) delta += __shfl_xor_sync(~0u, delta, offset);
  if (lane == 0) {
    const long pair = batch * heads + head;
    float *at = rows + (pair * tiles + query / ROWS) * (2 * ROWS) + query % ROWS;
    at[0] = query < l ? lse[pair * l + query] * 1.44269504088896340736f : INFINITY;
    at[ROWS] = delta;
  }
}

// dq [b,l,n,h] = scale * sum, in 16 bits. One block per (query tile, head, batch), threads as in `AttentionBackward::run`.
template <typename T, int HEAD, int ROWS>
__device__ void attention_dq(const float *__restrict__ dq_sum, T *__restrict__ dq, int l, int heads, float scale) {
  using Share = DqShare<HEAD, ROWS>;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int tile = blockIdx.x, head = blockIdx.y, batch = blockIdx.z;
  const int tiles = (l + ROWS - 1) / ROWS;
  const long pair = static_cast<long>(batch) * heads + head;
  const float4 *sum = reinterpret_cast<const float4 *>(dq_sum + (pair * tiles + tile) * (ROWS * HEAD)) +
                      warp * (2 * Share::kColTiles) * 32 + lane;
  const int dq_row = Share::row(warp), dq_col = Share::col(warp);
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int j = 0; j < Share::kColTiles; ++j) {
      const float4 part = sum[(i * Share::kColTiles + j) * 32];
      const int row = tile * ROWS + dq_row + i * 16 + (lane >> 2);
      T *at = dq + ((static_cast<long>(batch) * l + row) * heads + head) * HEAD + dq_col + j * 8 + (lane & 3) * 2;
      if (row < l) *reinterpret_cast<uint32_t *>(at) = Half16<T>::pack(part.x * scale, part.y * scale);
      if (row + 8 < l)
        *reinterpret_cast<uint32_t *>(at + static_cast<long>(8) * heads * HEAD) =
            Half16<T>::pack(part.z * scale, part.w * scale);
    }
}

// dk, dv = the sums of parts [dk, dv][splits][n], four values a thread. Also for the parts of backward_sm90a.cu.
template <typename T>
__device__ void attention_keys(const float *__restrict__ parts, T *__restrict__ dk, T *__restrict__ dv, long n,
                               int splits) {
  const long at = (static_cast<long>(blockIdx.x) * blockDim.x + threadIdx.x) * 4;
  if (at >= n) return;
#pragma unroll
  for (int which = 0; which < 2; ++which) {
    const float *part = parts + which * splits * n + at;
    float4 sum = *reinterpret_cast<const float4 *>(part);
    for (int split = 1; split < splits; ++split) {
      const float4 more = *reinterpret_cast<const float4 *>(part + split * n);
      sum.x += more.x, sum.y += more.y, sum.z += more.z, sum.w += more.w;
    }
    const uint2 packed = {Half16<T>::pack(sum.x, sum.y), Half16<T>::pack(sum.z, sum.w)};
    *reinterpret_cast<uint2 *>((which ? dv : dk) + at) = packed;
  }
}

} // namespace wan
