// Flash attention, backward, for every card from sm_80 on (mma.sync + cp.async), deterministic.
//
//   p = exp(scale * q k^T - lse)      dp = do v^T            ds = p * (dp - delta),  delta = rowsum(do * o)
//   dv = p^T do                       dk = scale * ds^T q    dq = scale * ds k
//
// Three launches:
//   attention_delta   delta [b,n,l] from o and do; clears the turn counters
//   attention_bwd     one block owns KEYS = 16 * WARPS key rows of one head, keeps dK and dV in registers and walks over
//                     the queries in tiles of ROWS. It works on transposed scores (keys x queries), so that P^T and dS^T
//                     leave one tensor-core product in the very layout that the next one wants; only dQ needs dS in
//                     shared memory. dQ is summed over key blocks in global fp32.
//   attention_dq      scales dQ and rounds it to 16 bits
//
// Determinism: the blocks of one head add their part of a query tile strictly in the order of their key block. A turn
// counter per (head, query tile) says whose turn it is. A block only ever waits for the block before it in launch
// order, which is resident already, so waiting cannot deadlock; and since every block starts a little after its
// predecessor, after the first wave nobody waits.
//
// With two dS buffers (cards with the shared memory for it) dQ of a tile is computed one tile late, which leaves a
// single barrier per tile and lets the warps drift apart: products of one overlap exponentials and sums of another.
#include "../common/mma.cuh"

namespace wan {

template <typename T, int HEAD, int ROWS, int WARPS, int Q_STAGES, int DO_STAGES, int DS_STAGES>
struct AttentionBackward {
  static constexpr int kThreads = WARPS * 32;
  static constexpr int KEYS = WARPS * 16;
  static constexpr int kQueryTiles = ROWS / 8;
  static constexpr int kHeadTiles = HEAD / 8;
  // dQ [ROWS,HEAD] is shared out in warp tiles of 32 rows x kDqCols columns.
  static constexpr int kDqCols = HEAD * (ROWS / 32) / WARPS;
  static constexpr int kDqColTiles = kDqCols / 8;
  static constexpr int kDqRegs = 2 * kDqColTiles * 4;
  static constexpr int kQBytes = ROWS * HEAD * 2;
  static constexpr int kKBytes = KEYS * HEAD * 2;
  static constexpr int kDsBytes = KEYS * ROWS * 2;
  static constexpr int kStatBytes = 2 * 2 * ROWS * 4; // lse and delta, two stages
  static constexpr int kSharedBytes = 2 * kKBytes + (Q_STAGES + DO_STAGES) * kQBytes + DS_STAGES * kDsBytes + kStatBytes;
  static_assert(ROWS % 32 == 0 && HEAD % 64 == 0 && kDqCols >= 16, "tile shape");
  static_assert(DS_STAGES == 1 || (Q_STAGES == 2 && DO_STAGES == 2), "a late dQ needs the next tile's Q and dO apart");

  // dS^T tile: KEYS rows of ROWS queries. Rows of 64 bytes (ROWS = 32) swizzle over four chunks and row pairs.
  static __device__ __forceinline__ uint32_t ds_offset(int key, int chunk) {
    if constexpr (ROWS >= 64) return Tile<ROWS>::offset(key, chunk);
    return static_cast<uint32_t>(key * 64 + ((chunk ^ ((key >> 1) & 3)) << 4));
  }

  static __device__ void run(const T *__restrict__ q, const T *__restrict__ k, const T *__restrict__ v,
                             const T *__restrict__ dout, const float *__restrict__ lse,
                             const float *__restrict__ delta, float *__restrict__ dq_sum, int *__restrict__ turns,
                             T *__restrict__ dk, T *__restrict__ dv, int l, int m, int heads, float scale,
                             int head_group) {
    using H = Half16<T>;
    using HeadTile = Tile<HEAD>;
    extern __shared__ __align__(128) unsigned char shared[];
    const uint32_t k_s = smem_address(shared);
    const uint32_t v_s = k_s + kKBytes;
    const uint32_t q_s = v_s + kKBytes;
    const uint32_t do_s = q_s + Q_STAGES * kQBytes;
    const uint32_t ds_s = do_s + DO_STAGES * kQBytes;
    unsigned char *ds_p = shared + (ds_s - k_s);
    float *stats = reinterpret_cast<float *>(ds_p + DS_STAGES * kDsBytes); // [stage][lse, delta][ROWS]

    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    // Blocks in launch order: head groups, then key blocks, then the heads of a group. The predecessor of a key block
    // is thus always launched before it, and a group's heads share the waiting of the first wave.
    const int key_blocks = (m + KEYS - 1) / KEYS;
    const int per_group = key_blocks * head_group;
    const int group = blockIdx.x / per_group, in_group = blockIdx.x % per_group;
    const int head = group * head_group + in_group % head_group, key_block = in_group / head_group;
    const int batch = blockIdx.y;
    if (head >= heads) return; // the last group may be ragged
    const long stride = static_cast<long>(heads) * HEAD;
    const long q_at = static_cast<long>(batch) * l * stride + head * HEAD;
    const long k_at = (static_cast<long>(batch) * m + static_cast<long>(key_block) * KEYS) * stride + head * HEAD;
    const int tiles = (l + ROWS - 1) / ROWS;
    const long pair = static_cast<long>(batch) * heads + head;
    const float *lse_row = lse + pair * l, *delta_row = delta + pair * l;
    int *turn = turns + pair * tiles;
    dq_sum += pair * tiles * (ROWS * HEAD);

    auto load_stats = [&](int tile, int stage) {
      for (int at = threadIdx.x; at < 2 * ROWS; at += kThreads) {
        const int row = at % ROWS, query = tile * ROWS + row;
        const bool is_delta = at >= ROWS;
        // A query past the end gets lse = inf, hence p = 0: it contributes nothing anywhere.
        stats[stage * 2 * ROWS + at] = query < l ? (is_delta ? delta_row[query] : lse_row[query] * 1.44269504088896f)
                                                 : (is_delta ? 0.f : INFINITY);
      }
    };
    auto load_q = [&](int tile) {
      HeadTile::template load<ROWS, kThreads>(q_s + (tile % Q_STAGES) * kQBytes,
                                              q + q_at + static_cast<long>(tile) * ROWS * stride, stride,
                                              l - tile * ROWS);
    };
    auto load_do = [&](int tile) {
      HeadTile::template load<ROWS, kThreads>(do_s + (tile % DO_STAGES) * kQBytes,
                                              dout + q_at + static_cast<long>(tile) * ROWS * stride, stride,
                                              l - tile * ROWS);
    };

    HeadTile::template load<KEYS, kThreads>(k_s, k + k_at, stride, m - key_block * KEYS);
    HeadTile::template load<KEYS, kThreads>(v_s, v + k_at, stride, m - key_block * KEYS);
    load_q(0);
    load_do(0);
    cp_async_commit();
    load_stats(0, 0);

    float dk_acc[kHeadTiles][4] = {}, dv_acc[kHeadTiles][4] = {};
    const float scale_log2 = scale * 1.44269504088896340736f;
    const int a_row = lane & 15, a_chunk = lane >> 4;
    const int b_row = (lane & 7) + ((lane >> 4) << 3), b_chunk = (lane >> 3) & 1;
    const int warp_key = warp * 16;
    const int dq_row = (warp % (ROWS / 32)) * 32, dq_col = (warp / (ROWS / 32)) * kDqCols;
    // Keys past the end must not reach dQ: their K rows are zero but p of a zero score is not.
    const bool ragged = m - key_block * KEYS < KEYS;
    const int key_limit = m - key_block * KEYS - warp_key - (lane >> 2);

    // Adds this key block's part of dQ of a tile. The caller has the tile's turn.
    auto add_dq = [&](int tile) {
      const uint32_t ds_t = ds_s + (tile % DS_STAGES) * kDsBytes;
      float dq[2][kDqColTiles][4] = {};
#pragma unroll
      for (int step = 0; step < KEYS / 16; ++step) {
        uint32_t a[2][4];
#pragma unroll
        for (int i = 0; i < 2; ++i) // stored keys x queries, wanted queries x keys: transposed on load
          ldmatrix4_trans(a[i], ds_t + ds_offset(step * 16 + b_row, (dq_row + i * 16) / 8 + b_chunk));
#pragma unroll
        for (int j = 0; j < kDqCols / 16; ++j) {
          uint32_t b[4];
          ldmatrix4_trans(b, k_s + HeadTile::offset(step * 16 + a_row, dq_col / 8 + j * 2 + a_chunk));
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            H::mma(dq[i][2 * j], a[i], b[0], b[1]);
            H::mma(dq[i][2 * j + 1], a[i], b[2], b[3]);
          }
        }
      }
      // dQ lies in the order in which the threads hold it (attention_dq knows): 16 coalesced bytes a lane.
      float4 *sum = reinterpret_cast<float4 *>(dq_sum + static_cast<long>(tile) * (ROWS * HEAD)) +
                    warp * (kDqRegs / 4) * 32 + lane;
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int j = 0; j < kDqColTiles; ++j) {
          float4 *at = sum + (i * kDqColTiles + j) * 32;
          const float4 part = {dq[i][j][0], dq[i][j][1], dq[i][j][2], dq[i][j][3]};
          if (key_block == 0) {
            *at = part;
          } else {
#if __CUDA_ARCH__ >= 900
            asm volatile("red.global.add.v4.f32 [%0], {%1,%2,%3,%4};\n" ::"l"(at), "f"(part.x), "f"(part.y),
                         "f"(part.z), "f"(part.w)
                         : "memory");
#else
            // Nobody else may touch this tile now: a plain read through L2, add and write.
            float4 old = __ldcg(at);
            old.x += part.x, old.y += part.y, old.z += part.z, old.w += part.w;
            __stcg(at, old);
#endif
          }
        }
    };
    auto read_turn = [&](int tile) {
      int whose;
      asm volatile("ld.acquire.gpu.global.s32 %0, [%1];\n" : "=r"(whose) : "l"(turn + tile) : "memory");
      return whose;
    };
    // A release by one thread after a barrier covers what all threads of the block did before it: one fence a tile, not
    // one a thread (those cost 4 % of the kernel).
    auto pass_turn = [&](int tile) {
      asm volatile("st.release.gpu.global.s32 [%0], %1;\n" ::"l"(turn + tile), "r"(key_block + 1) : "memory");
    };
    constexpr int kLate = DS_STAGES - 1; // tiles by which dQ lags behind

    for (int tile = 0; tile < tiles; ++tile) {
      const int stage = tile & 1;
      const uint32_t q_t = q_s + (tile % Q_STAGES) * kQBytes, do_t = do_s + (tile % DO_STAGES) * kQBytes;
      cp_async_wait<0>();
      if (kLate && tile > 0 && threadIdx.x == 0)
        while (read_turn(tile - 1) != key_block) {}
      __syncthreads(); // Q, dO and their statistics are here; the older stages are free; late: dS of tile - 1 is whole
      if (kLate && tile > 1 && threadIdx.x == 0) pass_turn(tile - 2);
      if (tile + 1 < tiles) {
        if (Q_STAGES == 2) load_q(tile + 1);
        if (DO_STAGES == 2) load_do(tile + 1);
        cp_async_commit();
        load_stats(tile + 1, stage ^ 1);
      }

      float s[kQueryTiles][4] = {}, dp[kQueryTiles][4] = {};
      // Both products in one loop: twice the independent work between two loads (290 -> 300 TFLOP/s on H200, T = 21600).
#pragma unroll
      for (int step = 0; step < HEAD / 16; ++step) {
        uint32_t a[4], c[4], b[ROWS / 16][4];
        ldmatrix4(a, k_s + HeadTile::offset(warp_key + a_row, step * 2 + a_chunk));
#pragma unroll
        for (int j = 0; j < ROWS / 16; ++j) ldmatrix4(b[j], q_t + HeadTile::offset(j * 16 + b_row, step * 2 + b_chunk));
        ldmatrix4(c, v_s + HeadTile::offset(warp_key + a_row, step * 2 + a_chunk));
#pragma unroll
        for (int j = 0; j < ROWS / 16; ++j) {
          H::mma(s[2 * j], a, b[j][0], b[j][1]);
          H::mma(s[2 * j + 1], a, b[j][2], b[j][3]);
          ldmatrix4(b[j], do_t + HeadTile::offset(j * 16 + b_row, step * 2 + b_chunk));
        }
#pragma unroll
        for (int j = 0; j < ROWS / 16; ++j) {
          H::mma(dp[2 * j], c, b[j][0], b[j][1]);
          H::mma(dp[2 * j + 1], c, b[j][2], b[j][3]);
        }
      }

      // P^T and dS^T, rounded to 16 bits: A operands of the next two products as they stand.
      uint32_t p16[kQueryTiles][2], ds16[kQueryTiles][2];
      const float *lse_s = stats + stage * 2 * ROWS, *delta_s = lse_s + ROWS;
#pragma unroll
      for (int j = 0; j < kQueryTiles; ++j) {
        const int column = j * 8 + (lane & 3) * 2;
        const float2 base = *reinterpret_cast<const float2 *>(lse_s + column);
        const float2 mean = *reinterpret_cast<const float2 *>(delta_s + column);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          float p0 = exp2_fast(fmaf(s[j][2 * r], scale_log2, -base.x));
          float p1 = exp2_fast(fmaf(s[j][2 * r + 1], scale_log2, -base.y));
          if (ragged && r * 8 >= key_limit) p0 = p1 = 0.f;
          p16[j][r] = H::pack(p0, p1);
          ds16[j][r] = H::pack(p0 * (dp[j][2 * r] - mean.x), p1 * (dp[j][2 * r + 1] - mean.y));
          *reinterpret_cast<uint32_t *>(ds_p + (tile % DS_STAGES) * kDsBytes +
                                        ds_offset(warp_key + r * 8 + (lane >> 2), j) + (lane & 3) * 4) = ds16[j][r];
        }
      }
#pragma unroll
      for (int step = 0; step < ROWS / 16; ++step) {
        const uint32_t a[4] = {p16[2 * step][0], p16[2 * step][1], p16[2 * step + 1][0], p16[2 * step + 1][1]};
#pragma unroll
        for (int j = 0; j < HEAD / 16; ++j) {
          uint32_t b[4];
          ldmatrix4_trans(b, do_t + HeadTile::offset(step * 16 + a_row, j * 2 + a_chunk));
          H::mma(dv_acc[2 * j], a, b[0], b[1]);
          H::mma(dv_acc[2 * j + 1], a, b[2], b[3]);
        }
      }

      if (!kLate) {
        if (threadIdx.x == 0)
          while (read_turn(tile) != key_block) {}
        __syncthreads(); // dS is whole; it is our turn on this tile; all threads are done with the previous one and dO
        if (threadIdx.x == 0 && tile > 0) pass_turn(tile - 1);
      }
      if (DO_STAGES == 1 && tile + 1 < tiles) {
        load_do(tile + 1);
        cp_async_commit();
      }

#pragma unroll
      for (int step = 0; step < ROWS / 16; ++step) {
        const uint32_t a[4] = {ds16[2 * step][0], ds16[2 * step][1], ds16[2 * step + 1][0], ds16[2 * step + 1][1]};
#pragma unroll
        for (int j = 0; j < HEAD / 16; ++j) {
          uint32_t b[4];
          ldmatrix4_trans(b, q_t + HeadTile::offset(step * 16 + a_row, j * 2 + a_chunk));
          H::mma(dk_acc[2 * j], a, b[0], b[1]);
          H::mma(dk_acc[2 * j + 1], a, b[2], b[3]);
        }
      }

      if (!kLate) add_dq(tile);
      if (kLate && tile > 0) add_dq(tile - 1);
    }
    if (kLate) {
      if (threadIdx.x == 0)
        while (read_turn(tiles - 1) != key_block) {}
      __syncthreads();
      if (threadIdx.x == 0 && tiles > 1) pass_turn(tiles - 2);
      add_dq(tiles - 1);
    }
    __syncthreads();
    if (threadIdx.x == 0) pass_turn(tiles - 1);

#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (r * 8 >= key_limit) continue;
      const long row = k_at + static_cast<long>(warp_key + r * 8 + (lane >> 2)) * stride + (lane & 3) * 2;
#pragma unroll
      for (int j = 0; j < kHeadTiles; ++j) {
        *reinterpret_cast<uint32_t *>(dk + row + j * 8) =
            H::pack(dk_acc[j][2 * r] * scale, dk_acc[j][2 * r + 1] * scale);
        *reinterpret_cast<uint32_t *>(dv + row + j * 8) = H::pack(dv_acc[j][2 * r], dv_acc[j][2 * r + 1]);
      }
    }
  }

  // dq [b,l,n,h] = scale * sum, in 16 bits. One block per (query tile, head, batch), threads as in `run`.
  static __device__ void finish_dq(const float *__restrict__ dq_sum, T *__restrict__ dq, int l, int heads,
                                   float scale) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int tile = blockIdx.x, head = blockIdx.y, batch = blockIdx.z;
    const int tiles = (l + ROWS - 1) / ROWS;
    const long pair = static_cast<long>(batch) * heads + head;
    const float4 *sum = reinterpret_cast<const float4 *>(dq_sum + (pair * tiles + tile) * (ROWS * HEAD)) +
                        warp * (kDqRegs / 4) * 32 + lane;
    const int dq_row = (warp % (ROWS / 32)) * 32, dq_col = (warp / (ROWS / 32)) * kDqCols;
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int j = 0; j < kDqColTiles; ++j) {
        const float4 part = sum[(i * kDqColTiles + j) * 32];
        const int row = tile * ROWS + dq_row + i * 16 + (lane >> 2);
        T *at = dq + ((static_cast<long>(batch) * l + row) * heads + head) * HEAD + dq_col + j * 8 + (lane & 3) * 2;
        if (row < l) *reinterpret_cast<uint32_t *>(at) = Half16<T>::pack(part.x * scale, part.y * scale);
        if (row + 8 < l)
          *reinterpret_cast<uint32_t *>(at + static_cast<long>(8) * heads * HEAD) =
              Half16<T>::pack(part.z * scale, part.w * scale);
      }
  }
};

// delta [b,n,l] = rowsum(dout * o); one warp a row of HEAD values; block (0,0) also clears the turn counters.
template <typename T, int HEAD>
__device__ void attention_delta(const T *__restrict__ o, const T *__restrict__ dout, float *__restrict__ delta,
                                int *__restrict__ turns, int n_turns, int l, int heads, long rows) {
  const long thread = static_cast<long>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (thread < n_turns) turns[thread] = 0;
  const long row = thread >> 5; // over [b, l, n]
  const int lane = threadIdx.x & 31;
  if (row >= rows) return;
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < HEAD / 64; ++i) {
    const long at = row * HEAD + i * 64 + lane * 2;
    const float2 a = Half16<T>::unpack(*reinterpret_cast<const uint32_t *>(o + at));
    const float2 b = Half16<T>::unpack(*reinterpret_cast<const uint32_t *>(dout + at));
    sum += a.x * b.x + a.y * b.y;
  }
#pragma unroll
  for (int offset = 16; offset > 0; offset >>= 1) sum += __shfl_xor_sync(~0u, sum, offset);
  const long head = row % heads, query = row / heads % l, batch = row / heads / l;
  if (lane == 0) delta[(batch * heads + head) * l + query] = sum;
}

} // namespace wan

#define ATTENTION_BACKWARD(SUFFIX, T, HEAD, ROWS, WARPS, Q_STAGES, DO_STAGES, DS_STAGES)                                          \
  extern "C" __global__ void __launch_bounds__(WARPS * 32, 1)                                                         \
      attention_bwd_##SUFFIX(const T *q, const T *k, const T *v, const T *dout, const float *lse, const float *delta, \
                             float *dq_sum, int *turns, T *dk, T *dv, int l, int m, int heads, float scale,           \
                             int head_group) {                                                                        \
    wan::AttentionBackward<T, HEAD, ROWS, WARPS, Q_STAGES, DO_STAGES, DS_STAGES>::run(q, k, v, dout, lse, delta, dq_sum, turns,  \
                                                                           dk, dv, l, m, heads, scale, head_group);   \
  }                                                                                                                   \
  extern "C" __global__ void __launch_bounds__(WARPS * 32)                                                            \
      attention_dq_##SUFFIX(const float *dq_sum, T *dq, int l, int heads, float scale) {                              \
    wan::AttentionBackward<T, HEAD, ROWS, WARPS, Q_STAGES, DO_STAGES, DS_STAGES>::finish_dq(dq_sum, dq, l, heads, scale);        \
  }
#define ATTENTION_DELTA(SUFFIX, T, HEAD)                                                                               \
  extern "C" __global__ void __launch_bounds__(256)                                                                   \
      attention_delta_##SUFFIX(const T *o, const T *dout, float *delta, int *turns, int n_turns, int l, int heads,    \
                               long rows) {                                                                           \
    wan::attention_delta<T, HEAD>(o, dout, delta, turns, n_turns, l, heads, rows);                                    \
  }

ATTENTION_DELTA(bf16_128, __nv_bfloat16, 128)
ATTENTION_DELTA(f16_128, __half, 128)
ATTENTION_DELTA(bf16_64, __nv_bfloat16, 64)
ATTENTION_DELTA(f16_64, __half, 64)
// 161 KB of shared memory: sm_80 and sm_90.
ATTENTION_BACKWARD(bf16_128_64x128, __nv_bfloat16, 128, 64, 8, 2, 2, 2)
ATTENTION_BACKWARD(f16_128_64x128, __half, 128, 64, 8, 2, 2, 2)
// 96.5 KB: also sm_86 and sm_89, which have 99.
ATTENTION_BACKWARD(bf16_128_32x128, __nv_bfloat16, 128, 32, 8, 2, 1, 1)
ATTENTION_BACKWARD(f16_128_32x128, __half, 128, 32, 8, 2, 1, 1)
// Head width 64: 97 KB, every card.
ATTENTION_BACKWARD(bf16_64_64x128, __nv_bfloat16, 64, 64, 8, 2, 2, 2)
ATTENTION_BACKWARD(f16_64_64x128, __half, 64, 64, 8, 2, 2, 2)
