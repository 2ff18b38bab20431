// Fast attention, forward, for Hopper: scores by int8 products, values by e4m3 ones (wgmma), softmax and sums in fp32.
//
//   o = softmax(scale * q k^T) v      lse = log(sum(exp(scale * q k^T)))      o [b,l,n,128]  lse [b,n,l]
//
// Roles as in ../attention/forward_sm90a.cu; tiles of codes as codes.cuh describes. The tensor cores keep 13 bits of a sum of
// e4m3 products, too few for the thousands of keys of a row: two tiles' part of O has registers of its own and is added to O in
// fp32, with the two tiles' scale. (One tile's instead: 12 % slower.)
#include "../common/hopper.cuh"
#include "codes.cuh"

namespace wan {

#define WAN_IO4R(d, i) "+r"(d[i]), "+r"(d[i + 1]), "+r"(d[i + 2]), "+r"(d[i + 3])
#define WAN_IO16R(d, i) WAN_IO4R(d, i), WAN_IO4R(d, i + 4), WAN_IO4R(d, i + 8), WAN_IO4R(d, i + 12)

// D[64,128] = A[64,32] B[32,128] (+ D where `add`), operands along rows of 128 bytes.
__device__ __forceinline__ void product_int8(uint32_t (&d)[64], uint64_t a, uint64_t b, int add) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
               "wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8 {" WAN_D64 "}, %64, %65, p;\n}\n"
               : WAN_IO16R(d, 0), WAN_IO16R(d, 16), WAN_IO16R(d, 32), WAN_IO16R(d, 48)
               : "l"(a), "l"(b), "r"(add));
}
__device__ __forceinline__ void product_e4m3(float (&d)[64], const uint32_t *a, uint64_t b, int add) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\n"
               "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 {" WAN_D64 "}, {%64, %65, %66, %67}, %68, p, 1, 1;\n}\n"
               : WAN_IO64(d)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
}

template <typename T> struct FastAttentionHopper {
  static constexpr int kStages = 4, kThreads = 384;
  static constexpr int kOutPanel = 64 * 128;                // 64 rows x 64 channels of O
  static constexpr int kQBytes = kCodeRows * kCodeHead * 2; // codes of Q; O leaves through the same place
  static constexpr int kScales = kQBytes + 2 * kStages * kCodeBytes;
  static constexpr int kBarriers = kScales + 16 * kStages;
  static constexpr int kSharedBytes = kBarriers + 256 + 1024;

  static __device__ void run(const uint8_t *__restrict__ q, const uint8_t *__restrict__ k,
                             const uint8_t *__restrict__ v, const float *__restrict__ q_scales,
                             const float *__restrict__ kv_scales, const float *__restrict__ shift,
                             const TensorMap *o_map, float *__restrict__ lse, int l, int m, int heads, float scale) {
    extern __shared__ unsigned char shared[];
    const uint32_t q_s = (smem_address(shared) + 1023) & ~1023u;
    const uint32_t k_s = q_s + kQBytes, v_s = k_s + kStages * kCodeBytes, scale_s = q_s + kScales;
    const uint32_t q_full = q_s + kBarriers;
    const uint32_t k_full = q_full + 8, k_empty = k_full + 8 * kStages;
    const uint32_t v_full = k_empty + 8 * kStages, v_empty = v_full + 8 * kStages;
    const int group = __shfl_sync(~0u, threadIdx.x / 128, 0);
    const int row0 = blockIdx.x * kCodeRows, head = blockIdx.y, batch = blockIdx.z;
    const int tiles = (m + kCodeRows - 1) / kCodeRows;
    const long pair = static_cast<long>(batch) * heads + head;
    const long q_tile = pair * gridDim.x + blockIdx.x;

    if (threadIdx.x == 0) {
      barrier_init(q_full, 1);
      for (int s = 0; s < kStages; ++s) {
        barrier_init(k_full + 8 * s, 1);
        barrier_init(v_full + 8 * s, 1);
        barrier_init(k_empty + 8 * s, 8); // one arrival a warp
        barrier_init(v_empty + 8 * s, 8);
      }
      barrier_init_fence();
    }
    __syncthreads();

    if (group == 2) {
      give_registers<24>();
      if (threadIdx.x != 256) return;
      barrier_expect(q_full, kCodeBytes);
      bulk_load(q_s, q + q_tile * kCodeBytes, kCodeBytes, q_full);
      for (int at = 0; at < tiles; ++at) {
        const int stage = at % kStages, parity = (at / kStages) & 1;
        const long tile = pair * tiles + tiles - 1 - at;
        barrier_wait(k_empty + 8 * stage, parity ^ 1);
        barrier_expect(k_full + 8 * stage, kCodeBytes);
        bulk_load(k_s + stage * kCodeBytes, k + tile * kCodeBytes, kCodeBytes, k_full + 8 * stage);
        barrier_wait(v_empty + 8 * stage, parity ^ 1);
        barrier_expect(v_full + 8 * stage, kCodeBytes + 16);
        bulk_load(v_s + stage * kCodeBytes, v + tile * kCodeBytes, kCodeBytes, v_full + 8 * stage);
        bulk_load(scale_s + stage * 16, kv_scales + tile * 4, 16, v_full + 8 * stage);
      }
      return;
    }

    take_registers<240>();
    const int lane = threadIdx.x & 31, warp = (threadIdx.x >> 5) & 3;
    uint32_t s[64], p[16]; // scores: sums of codes, then the bits of exponentials
    float o[64], part[64], row_max[2], row_sum[2] = {0.f, 0.f};
#pragma unroll
    for (int i = 0; i < 64; ++i) o[i] = part[i] = 0.f;
    // From a sum of products of codes to the exponent of 2, but for the scale of the keys' tile. The rotation of both rows has
    // made it 128 times as large.
    const float q_log2 = q_scales[q_tile] * scale * (1.44269504088896340736f / kCodeHead);

    const uint64_t q_op = operand(q_s + group * 64 * 128, 0);
    const uint64_t k_op = operand(k_s, 0), v_op = operand(v_s, 0);
    auto scores = [&](int stage) {
#pragma unroll
      for (int step = 0; step < kCodeHead / 32; ++step)
        product_int8(s, q_op + step * 2, k_op + ((stage * kCodeBytes) >> 4) + step * 2, step > 0);
      wgmma_commit();
    };
    auto values = [&](int stage, bool second) {
#pragma unroll
      for (int step = 0; step < kCodeRows / 32; ++step)
        product_e4m3(part, p + 4 * step, v_op + ((stage * kCodeBytes) >> 4) + step * 2, step > 0 || second);
      wgmma_commit();
    };
    auto add_part = [&](float v_scale) {
#pragma unroll
      for (int i = 0; i < 64; ++i) o[i] = fmaf(part[i], v_scale, o[i]);
    };
    auto top_of_rows = [&](float (&top)[2]) {
      int most[2] = {INT32_MIN, INT32_MIN};
#pragma unroll
      for (int j = 0; j < 16; ++j)
#pragma unroll
        for (int r = 0; r < 2; ++r)
          most[r] = max(most[r], max(static_cast<int>(s[4 * j + 2 * r]), static_cast<int>(s[4 * j + 2 * r + 1])));
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        most[r] = max(most[r], __shfl_xor_sync(~0u, most[r], 1));
        most[r] = max(most[r], __shfl_xor_sync(~0u, most[r], 2));
        top[r] = static_cast<float>(most[r]);
      }
    };
    auto exponentials = [&](float log2, int keys) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float base = kCodeLift - row_max[r];
#pragma unroll
        for (int j = 0; j < 16; ++j)
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            uint32_t &at = s[4 * j + 2 * r + c];
            float x = exp2_fast(fmaf(static_cast<float>(static_cast<int>(at)), log2, base));
            if (keys < kCodeRows && j * 8 + (lane & 3) * 2 + c >= keys) x = 0.f;
            row_sum[r] += x;
            at = __float_as_uint(x);
          }
      }
    };
    auto round_p = [&]() {
      auto value = [&](int i) { return __uint_as_float(s[i]); };
#pragma unroll
      for (int j = 0; j < 8; ++j)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const int at = 8 * j + 2 * r;
          p[2 * j + r] = pack_e4m3(value(at), value(at + 1), value(at + 4), value(at + 5));
        }
    };
    auto release = [&](uint32_t barrier) {
      if (lane == 0) barrier_arrive(barrier);
    };

    barrier_wait(q_full, 0);
    barrier_wait(k_full, 0);
    pin(s);
    wgmma_fence();
    scores(0);
    barrier_wait(v_full, 0);
    float2 kv = load_shared2(scale_s);
    wgmma_wait<0>();
    pin(s);
    release(k_empty);
    const int keys = m - (tiles - 1) * kCodeRows; // of the last tile
#pragma unroll
    for (int i = 0; i < 64; ++i)
      if ((i >> 2) * 8 + (lane & 3) * 2 + (i & 1) >= keys) s[i] = static_cast<uint32_t>(INT32_MIN);
    top_of_rows(row_max);
    row_max[0] *= q_log2 * kv.x, row_max[1] *= q_log2 * kv.x;
    exponentials(q_log2 * kv.x, keys);
    round_p();

    // Tiles are walked from the last to the first; of two that share a scale the odd one comes first.
    for (int at = 1; at < tiles; ++at) {
      const int stage = at % kStages, parity = (at / kStages) & 1, old_stage = (at - 1) % kStages;
      const int old_tile = tiles - at;
      const bool even = (old_tile & 1) == 0;
      barrier_wait(k_full + 8 * stage, parity);
      pin(s);
      pin(p);
      pin(part);
      wgmma_fence();
      scores(stage);
      values(old_stage, even && at > 1);
      barrier_wait(v_full + 8 * stage, parity);
      const float v_scale = kv.y;
      kv = load_shared2(scale_s + stage * 16);
      wgmma_wait<1>();
      pin(s);
      release(k_empty + 8 * stage);

      const float log2 = q_log2 * kv.x;
      float top[2], shrink[2];
      top_of_rows(top);
      // The running maximum rarely grows after the first tiles: sums are rescaled only when it did for any row of the warp.
      bool grew = false;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        top[r] = fmaxf(top[r] * log2, row_max[r]);
        grew |= top[r] > row_max[r];
        shrink[r] = exp2_fast(row_max[r] - top[r]);
        row_max[r] = top[r];
        row_sum[r] *= shrink[r];
      }
      exponentials(log2, kCodeRows);
      wgmma_wait<0>();
      pin(part);
      pin(p);
      release(v_empty + 8 * old_stage);
      if (even) add_part(v_scale);
      if (__any_sync(~0u, grew)) {
#pragma unroll
        for (int i = 0; i < 64; ++i) o[i] *= shrink[(i >> 1) & 1], part[i] *= shrink[(i >> 1) & 1];
      }
      round_p();
    }
    pin(p);
    pin(part);
    wgmma_fence();
    values((tiles - 1) % kStages, tiles > 1); // tile 0
    wgmma_wait<0>();
    pin(part);
    add_part(kv.y);

    // The sums of a row's four lanes; then O leaves through this warpgroup's half of the place of Q, which both have read.
    float inverse[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float sum = row_sum[r];
      sum += __shfl_xor_sync(~0u, sum, 1);
      sum += __shfl_xor_sync(~0u, sum, 2);
      inverse[r] = 1.f / sum;
      const int row = row0 + group * 64 + warp * 16 + r * 8 + (lane >> 2);
      if ((lane & 3) == 0 && row < l)
        lse[pair * l + row] =
            (row_max[r] - kCodeLift) * 0.69314718055994530942f + logf(sum) + shift[pair * l + row] * scale;
    }
    named_sync<256>(2);
    store_rows<T>(o, inverse, q_s + group * 2 * kOutPanel, o_map, head, row0 + group * 64, batch, group);
  }
};

} // namespace wan

#define FAST_ATTENTION_HOPPER(NAME, T)                                                                                 \
  extern "C" __global__ void __launch_bounds__(384, 1)                                                                \
      NAME(const uint8_t *q, const uint8_t *k, const uint8_t *v, const float *q_scales, const float *kv_scales,       \
           const float *shift, const __grid_constant__ wan::TensorMap o, float *lse, int l, int m, int heads,         \
           float scale) {                                                                                             \
    wan::FastAttentionHopper<T>::run(q, k, v, q_scales, kv_scales, shift, &o, lse, l, m, heads, scale);               \
  }

FAST_ATTENTION_HOPPER(fast_attention_hopper_bf16, __nv_bfloat16)
FAST_ATTENTION_HOPPER(fast_attention_hopper_f16, __half)
