// Flash attention, backward, deterministic, for Hopper: wgmma products, tiles by the copy engine, warps with roles.
//
//   p = exp(scale * q k^T - lse)      dp = do v^T            ds = p * (dp - delta),  delta = rowsum(do * o)
//   dv = p^T do                       dk = scale * ds^T q    dq = scale * ds k
//
// Three launches, four with few keys:
//   attention_rows    log-sum-exp (base 2) and delta of every query, tile by tile; clears the turn counters
//   attention_bwd     one block owns 128 keys of one head and walks over the queries in tiles of 64. Two warpgroups own
//                     64 keys each, with dK and dV in registers; they work on transposed scores (keys x queries), so that
//                     P^T and dS^T leave one product in the layout that the next one wants. dS goes through shared memory
//                     to a third warpgroup, which alone computes dQ, adds it to global fp32 sums, and brings Q and dO.
//   attention_dq      scales dQ and rounds it to 16 bits
//   attention_keys    where few keys leave processors without work, a key block's queries are shared out over `splits`
//                     blocks; this (of backward.cu) sums their parts of dK and dV, always in the same order
//
// Determinism: the blocks of one head add their part of a query tile strictly in the order of their key block, by a turn
// counter per (head, two query tiles). A block only ever waits for the block before it in launch order, which is resident
// already, so waiting cannot deadlock. It is the third warpgroup that waits: the other two run on, up to two tiles ahead.
//
// The last key may stand for `copies` equal ones: its p counts that often, and its dK and dV are the sums of theirs.
#include "../common/hopper.cuh"

namespace wan {

template <typename T> struct AttentionBackwardHopper {
  static constexpr int kHead = 128, kRows = 64, kKeys = 128, kStages = 3;
  static constexpr int kPasses = 2;                  // parts in which dQ is computed
  static constexpr int kTurn = 2;                    // query tiles of a turn, whose counter is that of the first
  static constexpr int kPanel = kRows * 128;         // 64 queries x 64 columns
  static constexpr int kKeyPanel = kKeys * 128;      // 128 keys x 64 columns
  static constexpr int kQBytes = 2 * kPanel, kKBytes = 2 * kKeyPanel;
  static constexpr int kDsBytes = kKeys * 128;       // 128 keys x 64 queries
  static constexpr int kStatBytes = 2 * kRows * 4;   // log-sum-exp and delta of a tile
  static constexpr int kTileBytes = 2 * kQBytes + kStatBytes;
  static constexpr int kQ = 2 * kKBytes, kDo = kQ + kStages * kQBytes, kDs = kDo + kStages * kQBytes;
  static constexpr int kStats = kDs + 2 * kDsBytes, kBarriers = kStats + kStages * kStatBytes;
  static constexpr int kSharedBytes = kBarriers + 128 + 1024; // the tiles start at the next multiple of 1024

  static __device__ void run(const TensorMap *q_map, const TensorMap *k_map, const TensorMap *v_map,
                             const TensorMap *do_map, const float *__restrict__ rows, float *__restrict__ dq_sum,
                             int *__restrict__ turns, T *__restrict__ dk, T *__restrict__ dv,
                             float *__restrict__ parts, int l, int m, int heads, float scale, int head_group,
                             float copies) {
    extern __shared__ unsigned char shared[];
    const uint32_t k_s = (smem_address(shared) + 1023) & ~1023u;
    const uint32_t v_s = k_s + kKBytes, q_s = k_s + kQ, do_s = k_s + kDo, ds_s = k_s + kDs, stats_s = k_s + kStats;
    const uint32_t key_full = k_s + kBarriers, full = key_full + 8;
    const uint32_t ds_full = full + 8 * kStages, ds_empty = ds_full + 16;
    const int group = __shfl_sync(~0u, threadIdx.x / 128, 0);
    const int lane = threadIdx.x & 31, warp = (threadIdx.x >> 5) & 3;

    // Blocks in launch order: head groups, then key blocks, then the heads of a group. The predecessor of a key block
    // is thus always launched before it, and a group's heads share the waiting of the first wave.
    const int key_blocks = (m + kKeys - 1) / kKeys;
    const int per_group = key_blocks * head_group;
    const int in_group = blockIdx.x % per_group;
    const int head = blockIdx.x / per_group * head_group + in_group % head_group, key_block = in_group / head_group;
    const int batch = blockIdx.y;
    if (head >= heads) return; // the last group may be ragged
    const int all_tiles = (l + kRows - 1) / kRows;
    const int splits = gridDim.z, share = (all_tiles + splits - 1) / splits;
    const int first = blockIdx.z * share, tiles = min(share, all_tiles - first); // this block's query tiles
    const long pair = static_cast<long>(batch) * heads + head;

    if (threadIdx.x == 0) {
      barrier_init(key_full, 1);
      for (int s = 0; s < kStages; ++s) barrier_init(full + 8 * s, 1);
      for (int s = 0; s < 2; ++s) {
        barrier_init(ds_full + 8 * s, 8); // one arrival a warp
        barrier_init(ds_empty + 8 * s, 4);
      }
      barrier_init_fence();
    }
    __syncthreads();

    using W = Wgmma<T>;
    if (group == 2) {
      give_registers<72>();
      const float *row_stats = rows + (pair * all_tiles + first) * (2 * kRows);
      // One thread brings a tile. From 256 on: the third warpgroup's threads.
      auto load = [&](int tile) {
        const int stage = tile % kStages;
        const uint32_t barrier = full + 8 * stage;
        barrier_expect(barrier, kTileBytes);
        for (int i = 0; i < 2; ++i)
          tensor_load(q_s + stage * kQBytes + i * kPanel, q_map, barrier, i * 64, head, (first + tile) * kRows, batch);
        for (int i = 0; i < 2; ++i)
          tensor_load(do_s + stage * kQBytes + i * kPanel, do_map, barrier, i * 64, head, (first + tile) * kRows, batch);
        bulk_load(stats_s + stage * kStatBytes, row_stats + static_cast<long>(tile) * (2 * kRows), kStatBytes, barrier);
      };
      if (threadIdx.x == 256) {
        barrier_expect(key_full, 2 * kKBytes);
        for (int i = 0; i < 2; ++i) {
          tensor_load(k_s + i * kKeyPanel, k_map, key_full, i * 64, head, key_block * kKeys, batch);
          tensor_load(v_s + i * kKeyPanel, v_map, key_full, i * 64, head, key_block * kKeys, batch);
        }
        for (int tile = 0; tile < kStages && tile < tiles; ++tile) load(tile);
      }

      int *turn = turns + pair * all_tiles + first;
      // A release by one thread behind a barrier covers the adds of all four warps. It takes the whole latency of global
      // memory, so it comes after the next product is issued, and once in kTurn tiles.
      auto pass_turn = [&](int tile) {
        asm volatile("st.release.gpu.global.s32 [%0], %1;\n" ::"l"(turn + tile), "r"(key_block + 1) : "memory");
      };
      // dQ lies in the order in which the threads hold it (attention_dq knows): 16 coalesced bytes a lane.
      const uint64_t sum = __cvta_generic_to_global(dq_sum + (pair * all_tiles + first) * (kRows * kHead) +
                                                      (warp * 16 * 32 + lane) * 4);
      const uint64_t ds_op = operand(ds_s, 0), k_op = operand(k_s, kKeyPanel);
      barrier_wait(key_full, 0);
      for (int tile = 0; tile < tiles; ++tile) {
        const int buffer = tile & 1;
        barrier_wait(ds_full + 8 * buffer, (tile >> 1) & 1);
        float dq[64 / kPasses];
        // A part of the columns at a time: a whole dQ tile would take registers that the other warpgroups need.
        const uint64_t ds_at = fresh(ds_op) + ((buffer * kDsBytes) >> 4), k_at = fresh(k_op);
        auto part = [&](int i) {
          const int column = i * (128 / kPasses); // within a panel, an offset of bytes in a row
          wgmma_fence();
#pragma unroll
          for (int step = 0; step < kKeys / 16; ++step)
            W::template ss<1, 1>(dq, ds_at + ((step * 2048) >> 4),
                                 k_at + (((column / 64) * kKeyPanel + (column % 64) * 2 + step * 2048) >> 4), step > 0);
          wgmma_commit();
        };
        auto add = [&](int i) {
          uint64_t at = sum + static_cast<uint64_t>(tile) * (kRows * kHead * 4) + i * (16 / kPasses * 512);
          if (key_block == 0) {
#pragma unroll
            for (int j = 0; j < 16 / kPasses; ++j)
              asm volatile("st.global.v4.f32 [%0], {%1,%2,%3,%4};\n" ::"l"(at + j * 512), "f"(dq[4 * j]),
                           "f"(dq[4 * j + 1]), "f"(dq[4 * j + 2]), "f"(dq[4 * j + 3])
                           : "memory");
          } else {
#pragma unroll
            for (int j = 0; j < 16 / kPasses; ++j)
              asm volatile("red.global.add.v4.f32 [%0], {%1,%2,%3,%4};\n" ::"l"(at + j * 512), "f"(dq[4 * j]),
                           "f"(dq[4 * j + 1]), "f"(dq[4 * j + 2]), "f"(dq[4 * j + 3])
                           : "memory");
          }
        };
        part(0);
        // dS of this tile is there: its writers are done with the tile before, whose stage is free.
        if (threadIdx.x == 256 && tile >= 1 && tile + 2 < tiles) load(tile + 2);
        if (tile % kTurn == 0) {
          if (threadIdx.x == 256 + 32 && tile > 0) pass_turn(tile - kTurn);
          if (threadIdx.x == 256 + 96) {
            int whose;
            do {
              asm volatile("ld.acquire.gpu.global.s32 %0, [%1];\n" : "=r"(whose) : "l"(turn + tile) : "memory");
            } while (whose != key_block);
          }
        }
        __syncwarp();
        wgmma_wait<0>();
        pin(dq);
        named_sync<128>(1); // the turn is ours
#pragma unroll
        for (int i = 1; i < kPasses; ++i) {
          add(i - 1);
          pin(dq);
          part(i);
          wgmma_wait<0>();
          pin(dq);
        }
        if (lane == 0) barrier_arrive(ds_empty + 8 * buffer);
        add(kPasses - 1);
        if (warp == 1) named_sync<128>(2);
        else named_arrive<128>(2);
      }
      if (threadIdx.x == 256 + 32) pass_turn((tiles - 1) / kTurn * kTurn);
      return;
    }

    take_registers<216>();
    using H = Half16<T>;
    const float scale_log2 = scale * 1.44269504088896340736f;
    float dk_acc[64], dv_acc[64], s[32];
    float (&dp)[32] = s; // scores have become P^T, rounded, before dP is computed
    uint32_t p16[16];
#pragma unroll
    for (int i = 0; i < 64; ++i) dk_acc[i] = dv_acc[i] = 0.f;
    // Keys past the end must not reach dQ: their K rows are zero but p of a zero score is not.
    const bool ragged = m - key_block * kKeys < kKeys || (copies != 1.f && key_block == key_blocks - 1);
    const int key_limit = m - key_block * kKeys - group * 64 - warp * 16 - (lane >> 2);

    const uint64_t k_op = operand(k_s + group * 64 * 128, 0), v_op = operand(v_s + group * 64 * 128, 0);
    const uint64_t q_op = operand(q_s, 0), do_op = operand(do_s, 0);
    const uint64_t q_mn = operand(q_s, kPanel), do_mn = operand(do_s, kPanel);
    const uint64_t ds_op = operand(ds_s + group * 64 * 128, 0);
    // [64 keys x 64 queries] = keys [64 x 128] . rows [64 x 128]^T
    auto product = [&](float (&d)[32], uint64_t keys, uint64_t queries) {
      keys = fresh(keys), queries = fresh(queries);
#pragma unroll
      for (int step = 0; step < kHead / 16; ++step)
        W::template ss<0, 0>(d, keys + (((step / 4) * kKeyPanel + (step % 4) * 32) >> 4),
                             queries + (((step / 4) * kPanel + (step % 4) * 32) >> 4), step > 0);
      wgmma_commit();
    };
    // dV [64 keys x 128] += P^T [64 keys x 64 queries] . dO [64 x 128]
    auto add_dv = [&](uint64_t queries) {
      queries = fresh(queries);
#pragma unroll
      for (int step = 0; step < kRows / 16; ++step)
        W::template rs<1>(dv_acc, p16[4 * step], p16[4 * step + 1], p16[4 * step + 2], p16[4 * step + 3],
                          queries + ((step * 2048) >> 4));
      wgmma_commit();
    };
    // dK [64 keys x 128] += dS^T . Q. dS^T comes from shared memory, where dQ needs it anyway: the registers of a second
    // operand would be those that the third warpgroup cannot spare.
    auto add_dk = [&](uint64_t ds, uint64_t queries) {
      ds = fresh(ds), queries = fresh(queries);
#pragma unroll
      for (int step = 0; step < kRows / 16; ++step)
        W::template ss<0, 1>(dk_acc, ds + ((step * 32) >> 4), queries + ((step * 2048) >> 4), 1);
      wgmma_commit();
    };
    // P^T of a tile from its scores, rounded to 16 bits: the A operand of dV as it stands.
    auto probabilities = [&](int stage) {
      const uint32_t stats = stats_s + stage * kStatBytes + (lane & 3) * 8;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float2 base = load_shared2(stats + j * 32);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          s[4 * j + 2 * r] = exp2_fast(fmaf(s[4 * j + 2 * r], scale_log2, -base.x));
          s[4 * j + 2 * r + 1] = exp2_fast(fmaf(s[4 * j + 2 * r + 1], scale_log2, -base.y));
        }
      }
      if (ragged) {
#pragma unroll
        for (int i = 0; i < 32; ++i) {
          const int next = ((i >> 1) & 1) * 8 + 1;
          s[i] = next > key_limit ? 0.f : next == key_limit ? s[i] * copies : s[i];
        }
      }
#pragma unroll
      for (int i = 0; i < 16; ++i) p16[i] = H::pack(s[2 * i], s[2 * i + 1]);
    };

    barrier_wait(key_full, 0);
    barrier_wait(full, 0);
    pin(dk_acc);
    pin(dv_acc);
    wgmma_fence();
    product(s, k_op, q_op);
    wgmma_wait<0>();
    pin(s);
    probabilities(0);

    // dV is computed while ds is, dK during the exponentials of the next tile. Nothing is in flight from one step to the
    // next: the compiler would otherwise wait after every product.
    int stage = 0, parity = 0;
    for (int tile = 0; tile < tiles; ++tile) {
      const uint32_t at = (stage * kQBytes) >> 4;
      const uint32_t stats = stats_s + stage * kStatBytes + (lane & 3) * 8 + kRows * 4;
      pin(dk_acc);
      pin(dv_acc);
      pin(p16);
      wgmma_fence();
      product(dp, v_op, do_op + at);
      add_dv(do_mn + at);
      wgmma_wait<1>();
      pin(dp);
      uint32_t ds16[16];
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float2 mean = load_shared2(stats + j * 32);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const int i = 4 * j + 2 * r;
          const float2 p = H::unpack(p16[i / 2]);
          ds16[i / 2] = H::pack(p.x * (dp[i] - mean.x), p.y * (dp[i + 1] - mean.y));
        }
      }
      barrier_wait(ds_empty + 8 * (tile & 1), ((tile >> 1) & 1) ^ 1);
      const int row = group * 64 + warp * 16 + (lane & 15);
#pragma unroll
      for (int i = 0; i < 4; ++i)
        stmatrix4(ds_s + (tile & 1) * kDsBytes + row * 128 + (((2 * i + (lane >> 4)) ^ (row & 7)) << 4), ds16[4 * i],
                  ds16[4 * i + 1], ds16[4 * i + 2], ds16[4 * i + 3]);
      async_fence();
      named_sync<128>(3 + group); // dS of this warpgroup is whole
      if (lane == 0) barrier_arrive(ds_full + 8 * (tile & 1));

      if (++stage == kStages) stage = 0, parity ^= 1;
      // Behind the last tile: the scores of whatever lies there. With a branch around a product the compiler would wait
      // after every one.
      if (tile + 1 < tiles) barrier_wait(full + 8 * stage, parity);
      wgmma_fence();
      product(s, k_op, q_op + ((stage * kQBytes) >> 4));
      add_dk(ds_op + (((tile & 1) * kDsBytes) >> 4), q_mn + at);
      wgmma_wait<1>(); // the next scores; dV is done, too
      pin(s);
      pin(p16);
      probabilities(stage);
      wgmma_wait<0>();
    }
    pin(dk_acc);
    pin(dv_acc);

    const long stride = static_cast<long>(heads) * kHead, size = gridDim.y * m * stride; // of dK, of dV
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (r * 8 >= key_limit) continue;
      const long key = static_cast<long>(batch) * m + key_block * kKeys + group * 64 + warp * 16 + r * 8 + (lane >> 2);
      const long at = key * stride + head * kHead + (lane & 3) * 2;
      float *dk_part = parts + blockIdx.z * size + at, *dv_part = dk_part + splits * size;
#pragma unroll
      for (int j = 0; j < 16; ++j) {
        const int i = 4 * j + 2 * r;
        if (splits > 1) {
          *reinterpret_cast<float2 *>(dk_part + j * 8) = make_float2(dk_acc[i] * scale, dk_acc[i + 1] * scale);
          *reinterpret_cast<float2 *>(dv_part + j * 8) = make_float2(dv_acc[i], dv_acc[i + 1]);
        } else {
          *reinterpret_cast<uint32_t *>(dk + at + j * 8) = H::pack(dk_acc[i] * scale, dk_acc[i + 1] * scale);
          *reinterpret_cast<uint32_t *>(dv + at + j * 8) = H::pack(dv_acc[i], dv_acc[i + 1]);
        }
      }
    }
  }

  // rows [b,n,tiles][lse, delta][64]: lse * log2(e) and rowsum(dout * o); one warp a (query, head). Queries past the end
  // get lse = inf, hence p = 0: they contribute nothing anywhere. Also clears the turn counters.
  static __device__ void prepare(const T *__restrict__ o, const T *__restrict__ dout, const float *__restrict__ lse,
                                 float *__restrict__ rows, int *__restrict__ turns, int l, int heads, int batches) {
    const int tiles = (l + kRows - 1) / kRows;
    const long thread = static_cast<long>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (thread < static_cast<long>(batches) * heads * tiles) turns[thread] = 0;
    const long row = thread >> 5; // over [b, tiles * 64, n]
    const int lane = threadIdx.x & 31;
    const int head = row % heads, query = row / heads % (tiles * kRows);
    const long batch = row / heads / (tiles * kRows);
    if (batch >= batches) return;
    float delta = 0.f;
    if (query < l) {
      const long at = ((batch * l + query) * heads + head) * kHead + lane * 4;
      const uint2 a = *reinterpret_cast<const uint2 *>(o + at), b = *reinterpret_cast<const uint2 *>(dout + at);
      const float2 a0 = Half16<T>::unpack(a.x), a1 = Half16<T>::unpack(a.y);
      const float2 b0 = Half16<T>::unpack(b.x), b1 = Half16<T>::unpack(b.y);
      delta = a0.x * b0.x + a0.y * b0.y + a1.x * b1.x + a1.y * b1.y;
    }
#pragma unroll
    for (int offset = 16; offset > 0; offset >>= 1) delta += __shfl_xor_sync(~0u, delta, offset);
    if (lane == 0) {
      const long pair = batch * heads + head;
      float *at = rows + (pair * tiles + query / kRows) * (2 * kRows) + query % kRows;
      at[0] = query < l ? lse[pair * l + query] * 1.44269504088896340736f : INFINITY;
      at[kRows] = delta;
    }
  }

  // dq [b,l,n,h] = scale * sum, in 16 bits. One block of 128 threads per (query tile, head, batch), threads as in `run`.
  static __device__ void finish_dq(const float *__restrict__ dq_sum, T *__restrict__ dq, int l, int heads, float scale) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int tile = blockIdx.x, head = blockIdx.y, batch = blockIdx.z;
    const int tiles = (l + kRows - 1) / kRows;
    const long pair = static_cast<long>(batch) * heads + head;
    const float4 *sum =
        reinterpret_cast<const float4 *>(dq_sum + (pair * tiles + tile) * (kRows * kHead)) + warp * 16 * 32 + lane;
    const int row = tile * kRows + warp * 16 + (lane >> 2);
    T *at = dq + ((static_cast<long>(batch) * l + row) * heads + head) * kHead + (lane & 3) * 2;
#pragma unroll
    for (int j = 0; j < 16; ++j) {
      const float4 part = sum[j * 32];
      if (row < l) *reinterpret_cast<uint32_t *>(at + j * 8) = Half16<T>::pack(part.x * scale, part.y * scale);
      if (row + 8 < l)
        *reinterpret_cast<uint32_t *>(at + j * 8 + static_cast<long>(8) * heads * kHead) =
            Half16<T>::pack(part.z * scale, part.w * scale);
    }
  }
};

} // namespace wan

#define ATTENTION_BACKWARD_HOPPER(SUFFIX, T)                                                                  \
  extern "C" __global__ void __launch_bounds__(384, 1) attention_bwd_hopper_##SUFFIX(                                  \
      const __grid_constant__ wan::TensorMap q, const __grid_constant__ wan::TensorMap k,                             \
      const __grid_constant__ wan::TensorMap v, const __grid_constant__ wan::TensorMap dout, const float *rows,       \
      float *dq_sum, int *turns, T *dk, T *dv, float *parts, int l, int m, int heads, float scale, int head_group,    \
      float copies) {                                                                                                 \
    wan::AttentionBackwardHopper<T>::run(&q, &k, &v, &dout, rows, dq_sum, turns, dk, dv, parts, l, m, heads, scale,   \
                                         head_group, copies);                                                         \
  }                                                                                                                   \
  extern "C" __global__ void __launch_bounds__(256) attention_rows_hopper_##SUFFIX(                                    \
      const T *o, const T *dout, const float *lse, float *rows, int *turns, int l, int heads, int batches) {          \
    wan::AttentionBackwardHopper<T>::prepare(o, dout, lse, rows, turns, l, heads, batches);                  \
  }                                                                                                                   \
  extern "C" __global__ void __launch_bounds__(128) attention_dq_hopper_##SUFFIX(const float *dq_sum, T *dq, int l,    \
                                                                                 int heads, float scale) {            \
    wan::AttentionBackwardHopper<T>::finish_dq(dq_sum, dq, l, heads, scale);                                 \
  }

ATTENTION_BACKWARD_HOPPER(bf16, __nv_bfloat16)
ATTENTION_BACKWARD_HOPPER(f16, __half)
