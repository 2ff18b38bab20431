// Product of matrices of e4m3 codes with a low-rank share, for Hopper: wgmma products, tiles brought by the copy engine,
// pairs of blocks that share the left operand, warps with roles.
//
//   forward    out[t,o] = left_scales[t] * right_scales[o] * sum_i left[t,i] * right[o,i]
//                         + sum_r low[t,r] * matrix[o,r] + bias[o] + add[t,o]
//   backward   out[t,o] = left_scales[t] * sum_i left[t,i] * right[o,i] + sum_r low[t,r] * matrix[r,o] + add[t,o]
//
// Codes have their inner index along rows; what is no code and no scale is in one 16-bit dtype. bias may be null; no `add`: adds
// 0. A tile of the result is 128 x 128. Adapters' shares cost no pass over the result this way: against a product that writes
// the share and cublasLt's, which adds to it, 0.890 ms instead of 0.929 (21600 x 5120 to 5120, rank 48), 2.37 instead of 2.50 (to
// 13824), 2.34 instead of 2.39 (from 13824). Without a share the library is 3 % faster.
//
// A block stays on its multiprocessor and walks over tiles, two warpgroups in turns: while one makes the sums of its
// tile, the other scales its own, adds the share and stores, so that the tensor cores do not wait for that. One thread of
// a third warpgroup keeps a ring of stages of codes coming, another brings what the end of a tile needs (the "tail":
// scales, bias and the share's operands). Sums of codes stay in the tensor cores' own accumulators, which keep 14 bits
// below the largest product; rounding to e4m3 costs a hundred times the error.
//
// The two blocks of a cluster have tiles side by side: each brings half of the rows of `left` to both.
#include <type_traits>

#include "../common/hopper.cuh"

namespace wan {

// D[64,128] = A[64,32] B[32,128] (+ D where `add`), codes along rows of 128 bytes.
__device__ __forceinline__ void e4m3_product(float (&d)[64], uint64_t a, uint64_t b, int add) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
               "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 {" WAN_D64 "}, %64, %65, p, 1, 1;\n}\n"
               : WAN_IO64(d)
               : "l"(a), "l"(b), "r"(add));
}

// ---- the copy engine on matrices: maps of [rows][columns], boxes of 128 bytes of some rows.

__device__ __forceinline__ void matrix_load(uint32_t dst, const TensorMap *map, uint32_t barrier, int column, int row) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], "
               "[%2];\n" ::"r"(dst),
               "l"(map), "r"(barrier), "r"(column), "r"(row)
               : "memory");
}
// To the same place in both blocks of the cluster, each one's barrier told of its own bytes.
__device__ __forceinline__ void matrix_load_both(uint32_t dst, const TensorMap *map, uint32_t barrier, int column,
                                                 int row) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
               "[%1, {%3, %4}], [%2], %5;\n" ::"r"(dst),
               "l"(map), "r"(barrier), "r"(column), "r"(row), "h"(static_cast<uint16_t>(3))
               : "memory");
}
__device__ __forceinline__ void matrix_store(uint32_t src, const TensorMap *map, int column, int row) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%1, {%2, %3}], [%0];\n" ::"r"(src), "l"(map),
               "r"(column), "r"(row)
               : "memory");
}

// ---- clusters.

__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;\n" ::: "memory");
}
// At the barrier in the same place of block `block` of the cluster.
__device__ __forceinline__ void barrier_arrive_at(uint32_t barrier, int block) {
  asm volatile("{\n.reg .b32 there;\n"
               "mapa.shared::cluster.u32 there, %0, %1;\n"
               "mbarrier.arrive.shared::cluster.b64 _, [there];\n}\n" ::"r"(barrier),
               "r"(block)
               : "memory");
}

__device__ __forceinline__ uint32_t load_shared(uint32_t address) {
  uint32_t v;
  asm volatile("ld.shared.b32 %0, [%1];\n" : "=r"(v) : "r"(address));
  return v;
}

template <typename T, bool BACKWARD> struct EightProduct {
  static constexpr int kTile = 128, kStages = 6, kThreads = 384;
  static constexpr int kOperand = kTile * 128;     // 128 rows x 128 codes (or 64 bf16) of either operand
  static constexpr int kStage = 2 * kOperand;      // left, then right
  static constexpr int kPanel = 16 * 128;          // 16 rows x 64 columns of the result
  static constexpr int kTail = kStages * kStage;   // operands of the share; then the result on its way out
  static constexpr int kSide = kTail + kStage;     // the tile's right scales, then its bias
  static constexpr int kBarriers = kSide + kTile * 6;
  static constexpr int kSharedBytes = kBarriers + 16 * kStages + 48;
  static_assert(kStage == 16 * kPanel, "a tile of the result leaves through the place of the share's operands");

  // Of named barriers (0 is the block's): a warpgroup's turn to make sums, its turn at the tail, its own threads'.
  enum { kSums = 1, kTurn = 3, kOwn = 5 };

  static __device__ void run(const TensorMap *left, const TensorMap *right, const TensorMap *low, const TensorMap *matrix,
                             const TensorMap *out, const TensorMap *add, const float *__restrict__ left_scales,
                             const float *__restrict__ right_scales, const T *__restrict__ bias, int rows, int columns,
                             int inner, int rank, int adds, int band) {
    extern __shared__ __align__(1024) unsigned char shared[];
    uint32_t base = smem_address(shared);
    asm volatile("" : "+r"(base)); // the compiler would work it out again in every step
    const uint32_t tail = base + kTail, side = base + kSide;
    const uint32_t full = base + kBarriers, empty = full + 8 * kStages;
    const uint32_t tail_full = empty + 8 * kStages, tail_empty = tail_full + 8, add_full = tail_empty + 8;
    const int group = __shfl_sync(~0u, threadIdx.x / 128, 0);
    const int lane = threadIdx.x & 31, me = blockIdx.x & 1;

    if (threadIdx.x == 0) {
      for (int s = 0; s < kStages; ++s) {
        barrier_init(full + 8 * s, 1);
        barrier_init(empty + 8 * s, 8); // one arrival a warp: of a warpgroup here and of one in the other block
      }
      barrier_init(tail_full, 1);
      barrier_init(tail_empty, 4);
      for (int w = 0; w < 4; ++w) barrier_init(add_full + 8 * w, 1);
      barrier_init_fence();
    }
    cluster_sync();

    // Pairs of tiles in bands of `band` pairs side by side, each band walked down its rows: a band's part of `right`
    // should fit the L2 cache, `left` then comes once for every band.
    const int steps = (inner + 127) / 128, chunks = (rank + 63) / 64;
    const int high = (rows + kTile - 1) / kTile, wide = (columns + 2 * kTile - 1) / (2 * kTile);
    const int pairs = high * wide, first = blockIdx.x / 2, stride = gridDim.x / 2;
    auto place = [&](int pair, int &row0, int &column0) {
      const int at = pair / (band * high), rest = pair - at * band * high, width = min(band, wide - at * band);
      row0 = rest / width * kTile;
      column0 = ((at * band + rest % width) * 2 + me) * kTile;
    };

    if (group == 2) {
      give_registers<40>();
      int row0, column0;
      if (threadIdx.x == 256) {
        int slot = 0, parity = 1;
        for (int pair = first; pair < pairs; pair += stride) {
          place(pair, row0, column0);
#pragma unroll 1
          for (int k = 0; k < steps; ++k) {
            const uint32_t here = base + slot * kStage, ready = full + 8 * slot;
            barrier_wait(empty + 8 * slot, parity);
            barrier_expect(ready, kStage);
            matrix_load_both(here + me * (kOperand / 2), left, ready, k * 128, row0 + me * (kTile / 2));
            matrix_load(here + kOperand, right, ready, k * 128, column0);
            if (++slot == kStages) slot = 0, parity ^= 1;
          }
        }
      } else if (threadIdx.x == 288) {
        int parity = 1;
        for (int pair = first; pair < pairs; pair += stride) {
          place(pair, row0, column0);
          const int count = max(0, min(kTile, columns - column0));
          barrier_wait(tail_empty, parity);
          barrier_expect(tail_full, count * ((BACKWARD ? 0 : 4) + (bias ? 2 : 0)) + kStage);
          if (count > 0) {
            if (!BACKWARD) bulk_load(side, right_scales + column0, count * 4, tail_full);
            if (bias) bulk_load(side + kTile * 4, bias + column0, count * 2, tail_full);
          }
          for (int c = 0; c < chunks; ++c) {
            if (c > 0) {
              barrier_wait(tail_empty, parity);
              barrier_expect(tail_full, kStage);
            }
            matrix_load(tail, low, tail_full, c * 64, row0);
            if (BACKWARD) { // 64 ranks x 128 columns, in two panels
              for (int panel = 0; panel < 2; ++panel)
                matrix_load(tail + kOperand + panel * (kOperand / 2), matrix, tail_full, column0 + panel * 64, c * 64);
            } else {
              matrix_load(tail + kOperand, matrix, tail_full, c * 64, column0);
            }
            parity ^= 1;
          }
        }
      }
    } else {
      take_registers<232>();
      using H = Half16<T>;
      const int warp = threadIdx.x / 32 & 3;
      const uint64_t left_op = operand(base, 0), right_op = operand(base + kOperand, 0);
      const uint64_t across_op = operand(tail + kOperand, kOperand / 2);
      const uint32_t panels = tail + warp * 4 * kPanel; // of this warp's rows: [half of the tile][64 columns]
      float d[2][64]; // rows 0 to 63 and 64 to 127 of the tile
      // Turns pass to and fro; the first ones are warpgroup 0's.
      if (group == 1) {
        named_arrive<256>(kSums);
        named_arrive<256>(kTurn);
      }
      int turn = group;
#pragma unroll 1
      for (int pair = first + group * stride; pair < pairs; pair += 2 * stride, turn += 2) {
        int row0, column0;
        place(pair, row0, column0);
        const int before = turn * steps; // stages of earlier tiles
        int slot = before % kStages, parity = before / kStages & 1, last = 0;
        float scale[2][2];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int row = row0 + (i >> 1) * 64 + warp * 16 + (i & 1) * 8 + (lane >> 2);
          scale[i >> 1][i & 1] = row < rows ? left_scales[row] : 0.f;
        }

        // A turn begins only when the other warpgroup has seen all of its own stages: a parity cannot tell this use of
        // a stage from the one before the last.
        named_sync<256>(kSums + group);
#pragma unroll 1
        for (int k = 0; k < steps; ++k) {
          barrier_wait(full + 8 * slot, parity);
          const uint64_t a = left_op + ((slot * kStage) >> 4), b = right_op + ((slot * kStage) >> 4);
          wgmma_fence();
#pragma unroll
          for (int s = 0; s < 4; ++s)
#pragma unroll
            for (int m = 0; m < 2; ++m) e4m3_product(d[m], a + ((m * kOperand / 2 + s * 32) >> 4), b + 2 * s, s ? 1 : k);
          wgmma_commit();
          wgmma_wait<1>();
          if (k > 0 && lane < 2) barrier_arrive_at(empty + 8 * last, lane);
          last = slot;
          if (++slot == kStages) slot = 0, parity ^= 1;
        }
        named_arrive<256>(kSums + 1 - group);
        wgmma_wait<0>();
        pin(d[0]);
        pin(d[1]);
        if (lane < 2) barrier_arrive_at(empty + 8 * last, lane);

        // The share is summed on top of the scaled codes' sums, in the same accumulators.
        named_sync<256>(kTurn + group);
        int phase = turn * chunks;
        barrier_wait(tail_full, phase & 1);
#pragma unroll
        for (int j = 0; j < 16; ++j) {
          const float2 w = BACKWARD ? float2{1.f, 1.f} : load_shared2(side + j * 32 + (lane & 3) * 8);
#pragma unroll
          for (int m = 0; m < 2; ++m)
#pragma unroll
            for (int r = 0; r < 2; ++r) {
              d[m][4 * j + 2 * r] *= scale[m][r] * w.x;
              d[m][4 * j + 2 * r + 1] *= scale[m][r] * w.y;
            }
        }
#pragma unroll 1
        for (int at = 0; at < rank; at += 16) {
          if (at > 0 && at % 64 == 0) {
            wgmma_wait<0>();
            if (lane == 0) barrier_arrive(tail_empty);
            barrier_wait(tail_full, ++phase & 1);
          }
          const uint64_t a = left_op + ((kTail + at % 64 * 2) >> 4);
          const uint64_t b = BACKWARD ? across_op + ((at % 64 * 128) >> 4) : right_op + ((kTail + at % 64 * 2) >> 4);
          pin(d[0]);
          pin(d[1]);
          wgmma_fence();
          Wgmma<T>::template ss<0, BACKWARD>(d[0], a, b, 1);
          Wgmma<T>::template ss<0, BACKWARD>(d[1], a + ((kOperand / 2) >> 4), b, 1);
          wgmma_commit();
        }
        named_arrive<256>(kTurn + 1 - group);
        wgmma_wait<0>();
        pin(d[0]);
        pin(d[1]);

        // The result takes the place of the share's operands, which all four warps have read.
        named_sync<128>(kOwn + group);
        auto row_of = [&](int m) { return row0 + m * 64 + warp * 16; };
        auto finish = [&](auto adds_too) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              const int j = half * 8 + i * 2;
              float2 b[2] = {};
              if (bias) {
                b[0] = H::unpack(load_shared(side + kTile * 4 + j * 16 + (lane & 3) * 4));
                b[1] = H::unpack(load_shared(side + kTile * 4 + j * 16 + 16 + (lane & 3) * 4));
              }
#pragma unroll
              for (int m = 0; m < 2; ++m) {
                const uint32_t at = panels + (m * 2 + half) * kPanel + (lane & 15) * 128 +
                                    (((2 * i + (lane >> 4)) ^ (lane & 7)) << 4);
                uint32_t r[4];
                if (adds_too) ldmatrix4(r, at);
#pragma unroll
                for (int h = 0; h < 4; ++h) {
                  float2 more = b[h >> 1];
                  if (adds_too) {
                    const float2 x = H::unpack(r[h]);
                    more.x += x.x, more.y += x.y;
                  }
                  const float *sum = d[m] + 4 * (j + (h >> 1)) + 2 * (h & 1);
                  r[h] = H::pack(sum[0] + more.x, sum[1] + more.y);
                }
                stmatrix4(at, r[0], r[1], r[2], r[3]);
              }
            }
            async_fence();
            __syncwarp();
            if (lane == 0)
              for (int m = 0; m < 2; ++m)
                matrix_store(panels + (m * 2 + half) * kPanel, out, column0 + half * 64, row_of(m));
          }
        };
        if (adds) {
          if (lane == 0) {
            barrier_expect(add_full + 8 * warp, 4 * kPanel);
            for (int q = 0; q < 4; ++q)
              matrix_load(panels + q * kPanel, add, add_full + 8 * warp, column0 + (q & 1) * 64, row_of(q >> 1));
          }
          barrier_wait(add_full + 8 * warp, turn & 1);
          finish(std::true_type());
        } else {
          finish(std::false_type());
        }
        if (lane == 0) {
          bulk_store_wait();
          barrier_arrive(tail_empty);
        }
      }
    }
    // A block's shared memory is written by the other's copies and told of its reads: neither leaves before both are done.
    __syncwarp();
    cluster_sync();
  }
};

} // namespace wan

// Clusters of two blocks, as many as there are pairs of multiprocessors (or fewer).
#define EIGHT_PRODUCT(NAME, T, BACKWARD)                                                                               \
  extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(384, 1)                                      \
      NAME(const __grid_constant__ wan::TensorMap left, const __grid_constant__ wan::TensorMap right,                 \
           const __grid_constant__ wan::TensorMap low, const __grid_constant__ wan::TensorMap matrix,                 \
           const __grid_constant__ wan::TensorMap out, const __grid_constant__ wan::TensorMap add,                    \
           const float *left_scales, const float *right_scales, const T *bias, int rows, int columns, int inner,      \
           int rank, int adds, int band) {                                                                            \
    wan::EightProduct<T, BACKWARD>::run(&left, &right, &low, &matrix, &out, &add, left_scales, right_scales, bias,    \
                                        rows, columns, inner, rank, adds, band);                                      \
  }

EIGHT_PRODUCT(eight_product_bf16, __nv_bfloat16, false)
EIGHT_PRODUCT(eight_product_f16, __half, false)
EIGHT_PRODUCT(eight_product_backward_bf16, __nv_bfloat16, true)
EIGHT_PRODUCT(eight_product_backward_f16, __half, true)
