// Fast attention, forward, for every card from sm_80 on (mma.sync + cp.async): scores by int8 products, values by 16-bit ones,
// softmax and sums in fp32.
//
//   o = softmax(scale * q k^T) v      lse = log(sum(exp(scale * q k^T)))      v,o [b,l,n,128]  lse [b,n,l]
//
// As ../attention/forward.cu, with queries and keys as tiles of codes (codes.cuh): half the bytes, so that 64 keys a step fit
// 48 KB, and two blocks share a processor of any card.
#include "../attention/rows.cuh"
#include "codes.cuh"

namespace wan {

// D[16,8] += A[16,32] B[32,8] of int8.
__device__ __forceinline__ void mma_int8(int (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
               : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <typename T> struct FastAttention {
  static constexpr int kKeys = 64, kWarps = 4, kThreads = kWarps * 32, kRowTiles = kCodeRows / (kWarps * 16);
  static constexpr int kKeyTiles = kKeys / 8;
  static constexpr int kKeyBytes = kKeys * 128; // codes
  static constexpr int kValueBytes = kKeys * kCodeHead * 2;
  // Codes of Q, one step of K and of V; O leaves through the place of all three.
  static constexpr int kSharedBytes = kCodeBytes + kKeyBytes + kValueBytes;
  static_assert(kSharedBytes >= kCodeRows * kCodeHead * 2, "O fits");

  // Codes lie in memory as they shall here.
  template <int BYTES> static __device__ __forceinline__ void load_codes(uint32_t dst, const uint8_t *src) {
#pragma unroll
    for (int i = 0; i < BYTES / (16 * kThreads); ++i) {
      const int at = (i * kThreads + threadIdx.x) * 16;
      cp_async16(dst + at, src + at, true);
    }
  }

  static __device__ void run(const uint8_t *__restrict__ q, const uint8_t *__restrict__ k, const T *__restrict__ v,
                             const float *__restrict__ q_scales, const float *__restrict__ kv_scales,
                             const float *__restrict__ shift, T *__restrict__ o, float *__restrict__ lse, int l, int m,
                             int heads, float scale) {
    using HeadTile = Tile<kCodeHead>;
    extern __shared__ __align__(256) unsigned char shared[];
    const uint32_t q_s = smem_address(shared), k_s = q_s + kCodeBytes, v_s = k_s + kKeyBytes;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int row0 = blockIdx.x * kCodeRows, head = blockIdx.y, batch = blockIdx.z;
    const int stride = heads * kCodeHead, code_tiles = (m + kCodeRows - 1) / kCodeRows;
    const long pair = static_cast<long>(batch) * heads + head, q_tile = pair * gridDim.x + blockIdx.x;
    o += (static_cast<long>(batch) * l + row0) * stride + head * kCodeHead;
    v += static_cast<long>(batch) * m * stride + head * kCodeHead;
    k += pair * code_tiles * kCodeBytes;
    kv_scales += pair * code_tiles * 4;

    load_codes<kCodeBytes>(q_s, q + q_tile * kCodeBytes);
    load_codes<kKeyBytes>(k_s, k);
    cp_async_commit();

    using Rows = ForwardRows<T, kCodeHead, kRowTiles, kKeyTiles>;
    Rows rows;
    // From a sum of products of codes to the exponent of 2, but for the scale of the keys' tile. The rotation of both rows has
    // made it 128 times as large.
    const float q_log2 = q_scales[q_tile] * scale * (1.44269504088896340736f / kCodeHead);

    // ldmatrix lane addresses, as in ../attention/forward.cu; a row of codes is 128 bytes.
    const int warp_row = warp * kRowTiles * 16;
    auto code_at = [](int row, int chunk) { return static_cast<uint32_t>(row * 128 + ((chunk ^ (row & 7)) << 4)); };
    const uint32_t warp_q = q_s + warp_row * 128 + code_at(lane & 15, lane >> 4);
    const uint32_t lane_k = k_s + code_at((lane & 7) + ((lane >> 4) << 3), (lane >> 3) & 1);
    const uint32_t lane_v = v_s + HeadTile::offset(lane & 15, lane >> 4);

    const int tiles = (m + kKeys - 1) / kKeys;
    for (int tile = 0; tile < tiles; ++tile) {
      cp_async_wait<0>();
      __syncthreads(); // K of this step is here; nobody reads the old V any more
      HeadTile::template load<kKeys, kThreads>(v_s, v + static_cast<long>(tile) * kKeys * stride, stride, m - tile * kKeys);
      cp_async_commit();
      const float log2 = q_log2 * kv_scales[tile / 2 * 4];

      int sums[kRowTiles][kKeyTiles][4] = {};
#pragma unroll
      for (int step = 0; step < kCodeHead / 32; ++step) {
        uint32_t a[kRowTiles][4];
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) ldmatrix4(a[i], (warp_q ^ (step << 5)) + i * 16 * 128);
#pragma unroll
        for (int j = 0; j < kKeys / 16; ++j) {
          uint32_t b[4];
          ldmatrix4(b, (lane_k ^ (step << 5)) + j * 16 * 128);
#pragma unroll
          for (int i = 0; i < kRowTiles; ++i) {
            mma_int8(sums[i][2 * j], a[i], b[0], b[1]);
            mma_int8(sums[i][2 * j + 1], a[i], b[2], b[3]);
          }
        }
      }
      cp_async_wait<0>();
      __syncthreads(); // V is here; nobody reads this K any more
      if (tile + 1 < tiles) {
        load_codes<kKeyBytes>(k_s, k + static_cast<long>(tile + 1) * kKeyBytes);
        cp_async_commit();
      }

      typename Rows::Scores s;
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
        for (int j = 0; j < kKeyTiles; ++j)
#pragma unroll
          for (int c = 0; c < 4; ++c) s[i][j][c] = static_cast<float>(sums[i][j][c]);
      if (tile + 1 == tiles) { // it may be ragged
#pragma unroll
        for (int j = 0; j < kKeyTiles; ++j)
#pragma unroll
          for (int c = 0; c < 4; ++c)
            if (tile * kKeys + j * 8 + (lane & 3) * 2 + (c & 1) >= m)
#pragma unroll
              for (int i = 0; i < kRowTiles; ++i) s[i][j][c] = -INFINITY;
      }

      // The running maximum rarely grows after the first tiles: O is rescaled only when it did for any row of the warp.
      float top[kRowTiles][2];
      bool grew = false;
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          top[i][r] = fmaxf(Rows::top(s, i, r, s[i][0][2 * r]) * log2, rows.max[i][r]);
          grew |= top[i][r] > rows.max[i][r];
        }
      if (__any_sync(~0u, grew)) rows.rescale(top, 1.f);
      rows.exponentials(s, log2, 1.f);
      rows.add_values(s, lane_v);
    }

    __syncthreads(); // O leaves through the place of all three
    rows.write(o, warp_row, row0, l, stride, [&](int i, int r, int row, float sum) {
      const long at = pair * l + row0 + row;
      lse[at] = rows.max[i][r] * 0.69314718055994530942f + logf(sum) + shift[at] * scale;
    });
  }
};

} // namespace wan

#define FAST_ATTENTION(NAME, T)                                                                                        \
  extern "C" __global__ void __launch_bounds__(128)                                                                   \
      NAME(const uint8_t *q, const uint8_t *k, const T *v, const float *q_scales, const float *kv_scales,             \
           const float *shift, T *o, float *lse, int l, int m, int heads, float scale) {                              \
    wan::FastAttention<T>::run(q, k, v, q_scales, kv_scales, shift, o, lse, l, m, heads, scale);                      \
  }

FAST_ATTENTION(fast_attention_bf16, __nv_bfloat16)
FAST_ATTENTION(fast_attention_f16, __half)
