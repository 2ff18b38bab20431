// Flash attention, forward, for every card from sm_80 on (mma.sync + cp.async).
//
//   o = softmax(scale * q k^T) v      lse = log(sum(exp(scale * q k^T)))      q,o [b,l,n,h]  k,v [b,m,n,h]  lse [b,n,l]
//
// One block owns ROWS query rows of one head and walks over the keys in tiles of KEYS; scores live in registers only.
// K and V have one buffer each: V of a tile arrives while S is computed, K of the next tile while O is updated.
// Softmax in fp32 and base 2, scale folded into the exponent's multiply-add. The last key may stand for several equal ones:
// `lift` is what its score gains by that, ln(count) / scale.
#include "rows.cuh"

namespace wan {

template <typename T, int HEAD, int ROWS, int KEYS, int WARPS> struct AttentionForward {
  static constexpr int kThreads = WARPS * 32;
  static constexpr int kRowTiles = ROWS / (WARPS * 16); // 16-row tiles of one warp
  static constexpr int kKeyTiles = KEYS / 8;
  static constexpr int kSharedBytes = (ROWS + 2 * KEYS) * HEAD * 2;
  static_assert(ROWS % (WARPS * 16) == 0 && KEYS % 16 == 0 && HEAD % 64 == 0, "tile shape");

  static __device__ void run(const T *__restrict__ q, const T *__restrict__ k, const T *__restrict__ v,
                             T *__restrict__ o, float *__restrict__ lse, int l, int m, int heads, float scale,
                             float lift) {
    using H = Half16<T>;
    using HeadTile = Tile<HEAD>;
    extern __shared__ __align__(256) unsigned char shared[];
    const uint32_t q_s = smem_address(shared);
    const uint32_t k_s = q_s + ROWS * HEAD * 2;
    const uint32_t v_s = k_s + KEYS * HEAD * 2;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int row0 = blockIdx.x * ROWS, head = blockIdx.y, batch = blockIdx.z;
    const int stride = heads * HEAD;
    q += (static_cast<long>(batch) * l + row0) * stride + head * HEAD;
    o += (static_cast<long>(batch) * l + row0) * stride + head * HEAD;
    k += static_cast<long>(batch) * m * stride + head * HEAD;
    v += static_cast<long>(batch) * m * stride + head * HEAD;

    HeadTile::template load<ROWS, kThreads>(q_s, q, stride, l - row0);
    HeadTile::template load<KEYS, kThreads>(k_s, k, stride, m);
    cp_async_commit();

    using Rows = ForwardRows<T, HEAD, kRowTiles, kKeyTiles>;
    Rows rows;
    const float scale_log2 = scale * 1.44269504088896340736f;

    // ldmatrix lane addresses; a step along a row is an exclusive or, like the tiles' swizzle (+ 2 % over adding up offsets).
    // Q (A operand): rows lane%16, chunk lane/16. K (B, stored key-major): keys lane%8 + 8*(lane/16), chunk (lane/8)%2. V (B,
    // transposed on load): as Q.
    const int warp_row = warp * kRowTiles * 16;
    const uint32_t a_at = HeadTile::offset(lane & 15, lane >> 4);
    const uint32_t warp_q = q_s + warp_row * HeadTile::kRowBytes + a_at, lane_v = v_s + a_at;
    const uint32_t lane_k = k_s + HeadTile::offset((lane & 7) + ((lane >> 4) << 3), (lane >> 3) & 1);

    const int tiles = (m + KEYS - 1) / KEYS;
    for (int tile = 0; tile < tiles; ++tile) {
      cp_async_wait<0>();
      __syncthreads(); // K of this tile is here; nobody reads the old V any more
      HeadTile::template load<KEYS, kThreads>(v_s, v + static_cast<long>(tile) * KEYS * stride, stride,
                                              m - tile * KEYS);
      cp_async_commit();

      typename Rows::Scores s = {};
#pragma unroll
      for (int step = 0; step < HEAD / 16; ++step) {
        uint32_t a[kRowTiles][4];
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i)
          ldmatrix4(a[i], (warp_q ^ (step << 5)) + i * 16 * HeadTile::kRowBytes);
#pragma unroll
        for (int j = 0; j < KEYS / 16; ++j) {
          uint32_t b[4];
          ldmatrix4(b, (lane_k ^ (step << 5)) + j * 16 * HeadTile::kRowBytes);
#pragma unroll
          for (int i = 0; i < kRowTiles; ++i) {
            H::mma(s[i][2 * j], a[i], b[0], b[1]);
            H::mma(s[i][2 * j + 1], a[i], b[2], b[3]);
          }
        }
      }
      cp_async_wait<0>();
      __syncthreads(); // V is here; nobody reads this K any more
      if (tile + 1 < tiles) {
        HeadTile::template load<KEYS, kThreads>(k_s, k + static_cast<long>(tile + 1) * KEYS * stride, stride,
                                                m - (tile + 1) * KEYS);
        cp_async_commit();
      }

      if (tile + 1 == tiles) { // it may be ragged
#pragma unroll
        for (int j = 0; j < kKeyTiles; ++j)
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            const int key = tile * KEYS + j * 8 + (lane & 3) * 2 + (c & 1);
#pragma unroll
            for (int i = 0; i < kRowTiles; ++i)
              if (key + 1 >= m) s[i][j][c] = key >= m ? -INFINITY : s[i][j][c] + lift;
          }
      }

      // The running maximum rarely grows after the first tiles: O is rescaled only when it did for any row of the warp.
      float top[kRowTiles][2];
      bool grew = false;
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          top[i][r] = Rows::top(s, i, r, rows.max[i][r]);
          grew |= top[i][r] > rows.max[i][r];
        }
      if (__any_sync(~0u, grew)) rows.rescale(top, scale_log2);
      rows.exponentials(s, scale_log2, scale_log2);
      rows.add_values(s, lane_v);
    }

    // O leaves through this warp's own rows of the Q tile.
    rows.write(o, warp_row, row0, l, stride, [&](int i, int r, int row, float sum) {
      lse[(static_cast<long>(batch) * heads + head) * l + row0 + row] = rows.max[i][r] * scale + logf(sum);
    });
  }
};

} // namespace wan

// One exported name per (type, head width, tile); tile.rs chooses among them and knows their shared bytes.
#define ATTENTION_FORWARD(NAME, T, HEAD, ROWS, KEYS, WARPS)                                                            \
  extern "C" __global__ void __launch_bounds__(WARPS * 32) NAME(const T *q, const T *k, const T *v, T *o, float *lse, \
                                                                int l, int m, int heads, float scale, float lift) {   \
    wan::AttentionForward<T, HEAD, ROWS, KEYS, WARPS>::run(q, k, v, o, lse, l, m, heads, scale, lift);                \
  }

ATTENTION_FORWARD(attention_fwd_bf16_128_128x64, __nv_bfloat16, 128, 128, 64, 4)
ATTENTION_FORWARD(attention_fwd_f16_128_128x64, __half, 128, 128, 64, 4)
ATTENTION_FORWARD(attention_fwd_bf16_128_128x32, __nv_bfloat16, 128, 128, 32, 4)
ATTENTION_FORWARD(attention_fwd_f16_128_128x32, __half, 128, 128, 32, 4)
ATTENTION_FORWARD(attention_fwd_bf16_64_128x64, __nv_bfloat16, 64, 128, 64, 4)
ATTENTION_FORWARD(attention_fwd_f16_64_128x64, __half, 64, 128, 64, 4)
