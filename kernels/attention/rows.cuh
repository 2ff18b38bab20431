// What a warp of the mma.sync forward kernels keeps for its rows of queries: O so far, the largest score and the sum of
// exponentials of every row. Used by forward.cu and by ../fast_attention/forward.cu, whose scores come from other products.
#pragma once
#include "../common/mma.cuh"

namespace wan {

template <typename T, int HEAD, int ROW_TILES, int KEY_TILES> struct ForwardRows {
  using H = Half16<T>;
  using HeadTile = Tile<HEAD>;
  using Scores = float[ROW_TILES][KEY_TILES][4];
  static constexpr int kHeadTiles = HEAD / 8;

  float o[ROW_TILES][kHeadTiles][4] = {};
  float max[ROW_TILES][2], sum[ROW_TILES][2];

  __device__ __forceinline__ ForwardRows() {
#pragma unroll
    for (int i = 0; i < ROW_TILES; ++i)
#pragma unroll
      for (int r = 0; r < 2; ++r) max[i][r] = -INFINITY, sum[i][r] = 0.f;
  }

  // The largest of `start` and a row's scores, which four lanes hold.
  static __device__ __forceinline__ float top(const Scores &s, int i, int r, float start) {
    float t = start;
#pragma unroll
    for (int j = 0; j < KEY_TILES; ++j) t = fmaxf(t, fmaxf(s[i][j][2 * r], s[i][j][2 * r + 1]));
    t = fmaxf(t, __shfl_xor_sync(~0u, t, 1));
    return fmaxf(t, __shfl_xor_sync(~0u, t, 2));
  }

  // The rows' maxima are `top` now: what was summed counts for less. `log2` takes differences of them to exponents of 2.
  __device__ __forceinline__ void rescale(const float (&top)[ROW_TILES][2], float log2) {
#pragma unroll
    for (int i = 0; i < ROW_TILES; ++i)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float shrink = exp2_fast((max[i][r] - top[i][r]) * log2);
        max[i][r] = top[i][r];
        sum[i][r] *= shrink;
#pragma unroll
        for (int j = 0; j < kHeadTiles; ++j) o[i][j][2 * r] *= shrink, o[i][j][2 * r + 1] *= shrink;
      }
  }

  // Scores become exponentials, and are added up. `log2` takes scores to exponents of 2, `max_log2` the rows' maxima.
  __device__ __forceinline__ void exponentials(Scores &s, float log2, float max_log2) {
#pragma unroll
    for (int i = 0; i < ROW_TILES; ++i)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float base = max[i][r] * max_log2;
#pragma unroll
        for (int j = 0; j < KEY_TILES; ++j)
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            const float p = exp2_fast(fmaf(s[i][j][2 * r + c], log2, -base));
            s[i][j][2 * r + c] = p;
            sum[i][r] += p;
          }
      }
  }

  // O += P V, with P [rows, keys] rounded to 16 bits, and V as `lane_v` finds its rows in shared memory.
  __device__ __forceinline__ void add_values(const Scores &p, uint32_t lane_v) {
#pragma unroll
    for (int step = 0; step < KEY_TILES / 2; ++step) {
      uint32_t a[ROW_TILES][4];
#pragma unroll
      for (int i = 0; i < ROW_TILES; ++i) {
        a[i][0] = H::pack(p[i][2 * step][0], p[i][2 * step][1]);
        a[i][1] = H::pack(p[i][2 * step][2], p[i][2 * step][3]);
        a[i][2] = H::pack(p[i][2 * step + 1][0], p[i][2 * step + 1][1]);
        a[i][3] = H::pack(p[i][2 * step + 1][2], p[i][2 * step + 1][3]);
      }
#pragma unroll
      for (int j = 0; j < HEAD / 16; ++j) {
        uint32_t b[4];
        ldmatrix4_trans(b, (lane_v ^ (j << 5)) + step * 16 * HeadTile::kRowBytes);
#pragma unroll
        for (int i = 0; i < ROW_TILES; ++i) {
          H::mma(o[i][2 * j], a[i], b[0], b[1]);
          H::mma(o[i][2 * j + 1], a[i], b[2], b[3]);
        }
      }
    }
  }

  // Divides O by the sums of the rows' four lanes and writes it, through the warp's own rows at the start of shared memory, 16
  // bytes a lane.
  // `warp_row` counts within the block, whose first row is row `row0` of `l`; `log_sum(i, r, row, sum)` takes a row's whole
  // sum.
  template <typename LogSum>
  __device__ __forceinline__ void write(T *out, int warp_row, int row0, int l, int stride, LogSum log_sum) {
    extern __shared__ __align__(256) unsigned char shared[];
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int i = 0; i < ROW_TILES; ++i)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float all = sum[i][r];
        all += __shfl_xor_sync(~0u, all, 1);
        all += __shfl_xor_sync(~0u, all, 2);
        const float inverse = 1.f / all;
        const int row = warp_row + i * 16 + r * 8 + (lane >> 2);
        if ((lane & 3) == 0 && row0 + row < l) log_sum(i, r, row, all);
#pragma unroll
        for (int j = 0; j < kHeadTiles; ++j)
          *reinterpret_cast<uint32_t *>(shared + HeadTile::offset(row, j) + (lane & 3) * 4) =
              H::pack(o[i][j][2 * r] * inverse, o[i][j][2 * r + 1] * inverse);
      }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < ROW_TILES * 16 * HeadTile::kChunks / 32; ++i) {
      const int at = i * 32 + lane;
      const int row = warp_row + at / HeadTile::kChunks, chunk = at % HeadTile::kChunks;
      if (row0 + row < l)
        *reinterpret_cast<uint4 *>(out + row * stride + chunk * 8) =
            *reinterpret_cast<const uint4 *>(shared + HeadTile::offset(row, chunk));
    }
  }
};

} // namespace wan
