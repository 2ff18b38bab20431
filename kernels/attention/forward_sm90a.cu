// Flash attention, forward, for Hopper: wgmma products, tiles brought by the copy engine, warps with roles.
//
//   o = softmax(scale * q k^T) v      lse = log(sum(exp(scale * q k^T)))      q,o [b,l,n,h]  k,v [b,m,n,h]  lse [b,n,l]
//
// A block owns 128 query rows of one head: two warpgroups compute 64 rows each, a third one (one thread of it) keeps two
// stages of K and V coming. Within a warpgroup the next tile's scores and the present tile's part of O are in flight
// together; between warpgroups the products of one run during the softmax of the other. Keys are walked from the last tile
// to the first, so that only the first step has keys to mask, and the one that may stand for several equal ones: `lift` is
// what its score gains by that, ln(count) / scale.
#include "../common/hopper.cuh"

namespace wan {

template <typename T, int KEYS> struct AttentionForwardHopper {
  static constexpr int kHead = 128, kRows = 128, kStages = 2, kThreads = 384;
  static constexpr int kPanel = 64 * 128;            // 64 query rows x 64 columns
  static constexpr int kQBytes = 4 * kPanel;         // [warpgroup][panel]
  static constexpr int kKeyPanel = KEYS * 128;       // KEYS x 64 columns
  static constexpr int kKeyBytes = 2 * kKeyPanel;    // K or V, one stage
  static constexpr int kBarriers = kQBytes + 2 * kStages * kKeyBytes;
  static constexpr int kSharedBytes = kBarriers + 128 + 1024; // the tiles start at the next multiple of 1024
  static_assert(KEYS % 16 == 0 && KEYS <= 256, "tile shape");

  static __device__ void run(const TensorMap *q_map, const TensorMap *k_map, const TensorMap *v_map,
                             const TensorMap *o_map, float *__restrict__ lse, int l, int m, int heads, float scale,
                             float lift) {
    extern __shared__ unsigned char shared[];
    const uint32_t q_s = (smem_address(shared) + 1023) & ~1023u;
    const uint32_t k_s = q_s + kQBytes, v_s = k_s + kStages * kKeyBytes;
    const uint32_t q_full = q_s + kBarriers;
    const uint32_t k_full = q_full + 8, k_empty = k_full + 8 * kStages;
    const uint32_t v_full = k_empty + 8 * kStages, v_empty = v_full + 8 * kStages;
    const int group = __shfl_sync(~0u, threadIdx.x / 128, 0);
    const int row0 = blockIdx.x * kRows, head = blockIdx.y, batch = blockIdx.z;
    const int tiles = (m + KEYS - 1) / KEYS;

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
      tensor_prefetch(k_map);
      tensor_prefetch(v_map);
      barrier_expect(q_full, kQBytes);
      for (int i = 0; i < 4; ++i)
        tensor_load(q_s + i * kPanel, q_map, q_full, (i & 1) * 64, head, row0 + (i >> 1) * 64, batch);
      for (int at = 0; at < tiles; ++at) {
        const int stage = at % kStages, parity = (at / kStages) & 1, key = (tiles - 1 - at) * KEYS;
        barrier_wait(k_empty + 8 * stage, parity ^ 1);
        barrier_expect(k_full + 8 * stage, kKeyBytes);
        for (int i = 0; i < 2; ++i)
          tensor_load(k_s + stage * kKeyBytes + i * kKeyPanel, k_map, k_full + 8 * stage, i * 64, head, key, batch);
        barrier_wait(v_empty + 8 * stage, parity ^ 1);
        barrier_expect(v_full + 8 * stage, kKeyBytes);
        for (int i = 0; i < 2; ++i)
          tensor_load(v_s + stage * kKeyBytes + i * kKeyPanel, v_map, v_full + 8 * stage, i * 64, head, key, batch);
      }
      return;
    }

    take_registers<240>();
    using H = Half16<T>;
    using W = Wgmma<T>;
    const int lane = threadIdx.x & 31, warp = (threadIdx.x >> 5) & 3;
    const float scale_log2 = scale * 1.44269504088896340736f;
    float o[64], s[KEYS / 2], row_max[2], row_sum[2] = {0.f, 0.f};
    uint32_t p[KEYS / 4];
#pragma unroll
    for (int i = 0; i < 64; ++i) o[i] = 0.f;

    const uint64_t q_op = operand(q_s + group * 2 * kPanel, 0);
    const uint64_t k_op = operand(k_s, 0), v_op = operand(v_s, kKeyPanel);
    auto scores = [&](int stage) {
      const uint64_t k_at = k_op + ((stage * kKeyBytes) >> 4);
#pragma unroll
      for (int step = 0; step < kHead / 16; ++step)
        W::template ss<0, 0>(s, q_op + (((step / 4) * kPanel + (step % 4) * 32) >> 4),
                             k_at + (((step / 4) * kKeyPanel + (step % 4) * 32) >> 4), step > 0);
      wgmma_commit();
    };
    auto add_values = [&](int stage) {
      const uint64_t v_at = v_op + ((stage * kKeyBytes) >> 4);
#pragma unroll
      for (int step = 0; step < KEYS / 16; ++step)
        W::template rs<1>(o, p[4 * step], p[4 * step + 1], p[4 * step + 2], p[4 * step + 3],
                          v_at + ((step * 2048) >> 4));
      wgmma_commit();
    };
    auto top_of_rows = [&](float (&top)[2]) {
#pragma unroll
      for (int j = 0; j < KEYS / 8; ++j)
#pragma unroll
        for (int r = 0; r < 2; ++r) top[r] = fmaxf(top[r], fmaxf(s[4 * j + 2 * r], s[4 * j + 2 * r + 1]));
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        top[r] = fmaxf(top[r], __shfl_xor_sync(~0u, top[r], 1));
        top[r] = fmaxf(top[r], __shfl_xor_sync(~0u, top[r], 2));
      }
    };
    auto exponentials = [&]() {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float base = row_max[r] * scale_log2;
#pragma unroll
        for (int j = 0; j < KEYS / 8; ++j)
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            float &x = s[4 * j + 2 * r + c];
            x = exp2_fast(fmaf(x, scale_log2, -base));
            row_sum[r] += x;
          }
      }
    };
    auto round_p = [&]() {
#pragma unroll
      for (int j = 0; j < KEYS / 4; ++j) p[j] = H::pack(s[2 * j], s[2 * j + 1]);
    };
    auto release = [&](uint32_t barrier) {
      if (lane == 0) barrier_arrive(barrier);
    };

    barrier_wait(q_full, 0);
    barrier_wait(k_full, 0);
    wgmma_fence();
    scores(0);
    wgmma_wait<0>();
    pin(s);
    release(k_empty);
    if (const int last = m - 1 - (tiles - 1) * KEYS; last < KEYS - 1 || lift != 0.f) {
#pragma unroll
      for (int i = 0; i < KEYS / 2; ++i) {
        const int key = (i >> 2) * 8 + (lane & 3) * 2 + (i & 1);
        s[i] = key > last ? -INFINITY : key == last ? s[i] + lift : s[i];
      }
    }
    row_max[0] = row_max[1] = -INFINITY;
    top_of_rows(row_max);
    exponentials();
    round_p();

    for (int at = 1; at < tiles; ++at) {
      const int stage = at % kStages, parity = (at / kStages) & 1;
      const int old_stage = (at - 1) % kStages, old_parity = ((at - 1) / kStages) & 1;
      barrier_wait(k_full + 8 * stage, parity);
      pin(s);
      pin(o);
      pin(p);
      wgmma_fence();
      scores(stage);
      barrier_wait(v_full + 8 * old_stage, old_parity);
      wgmma_fence();
      add_values(old_stage);
      wgmma_wait<1>();
      pin(s);
      release(k_empty + 8 * stage);

      float top[2] = {row_max[0], row_max[1]};
      top_of_rows(top);
      // The running maximum rarely grows after the first tiles: O is rescaled only when it did for any row of the warp.
      const bool grew = __any_sync(~0u, top[0] > row_max[0] || top[1] > row_max[1]);
      float shrink[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        shrink[r] = exp2_fast((row_max[r] - top[r]) * scale_log2);
        row_max[r] = top[r];
        row_sum[r] *= shrink[r];
      }
      exponentials();
      wgmma_wait<0>();
      pin(o);
      pin(p);
      release(v_empty + 8 * old_stage);
      if (grew) {
#pragma unroll
        for (int i = 0; i < 64; ++i) o[i] *= shrink[(i >> 1) & 1];
      }
      round_p();
    }
    const int last = (tiles - 1) % kStages;
    barrier_wait(v_full + 8 * last, ((tiles - 1) / kStages) & 1);
    pin(o);
    pin(p);
    wgmma_fence();
    add_values(last);
    wgmma_wait<0>();
    pin(o);

    // The sums of a row's four lanes; then O leaves through this warpgroup's own part of the Q tile.
    float inverse[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float sum = row_sum[r];
      sum += __shfl_xor_sync(~0u, sum, 1);
      sum += __shfl_xor_sync(~0u, sum, 2);
      inverse[r] = 1.f / sum;
      const int row = row0 + group * 64 + warp * 16 + r * 8 + (lane >> 2);
      if ((lane & 3) == 0 && row < l)
        lse[(static_cast<long>(batch) * heads + head) * l + row] = row_max[r] * scale + logf(sum);
    }
    store_rows<T>(o, inverse, q_s + group * 2 * kPanel, o_map, head, row0 + group * 64, batch, group);
  }
};

} // namespace wan

// One exported name per (type, tile); tile.rs knows their shared bytes.
#define ATTENTION_FORWARD_HOPPER(NAME, T, KEYS)                                                             \
  extern "C" __global__ void __launch_bounds__(384, 1)                                                                \
      NAME(const __grid_constant__ wan::TensorMap q, const __grid_constant__ wan::TensorMap k,                        \
           const __grid_constant__ wan::TensorMap v, const __grid_constant__ wan::TensorMap o, float *lse, int l,     \
           int m, int heads, float scale, float lift) {                                                               \
    wan::AttentionForwardHopper<T, KEYS>::run(&q, &k, &v, &o, lse, l, m, heads, scale, lift);                         \
  }

ATTENTION_FORWARD_HOPPER(attention_fwd_hopper_bf16, __nv_bfloat16, 128)
ATTENTION_FORWARD_HOPPER(attention_fwd_hopper_f16, __half, 128)
