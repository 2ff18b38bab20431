// AdamW with block-wise 8-bit moments, one block of 256 threads a block of 256 parameters (see mod.rs for the scheme).
// Small tensors keep fp32 moments, in the same launch. Bound by memory: 12 bytes a parameter and the codes.
#include "../common/vector.cuh"

namespace wan {

struct AdamW8Step {
  float grad_scale, beta1, one_minus_beta1, beta2, one_minus_beta2, eps;
  float step_size[2], decay[2]; // main group, LoRA+ group
};

// Where a block of parameters lies and how its moments are kept.
struct Piece {
  long first;     // in the flat buffers
  int length;     // at most 256
  int plus;       // belongs to the LoRA+ group
  long full;      // position in the fp32 moments; -1: coded
};

// The code nearest to x, the lower of two equally near.
__device__ __forceinline__ int nearest(const float *midpoints, float x) {
  int low = 0, high = 255;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (x > midpoints[middle]) low = middle + 1;
    else high = middle;
  }
  return low;
}

} // namespace wan

// maps: [signed values 256, signed midpoints 256, unsigned values 256, unsigned midpoints 256] (midpoints: 255 used);
// zeros: the codes of 0. m_max, v_max: one a piece.
extern "C" __global__ void __launch_bounds__(256)
    adamw8bit_step(float *p, const float *g, const wan::Piece *pieces, uint8_t *m, uint8_t *v, float *m_max,
                   float *v_max, float *m_full, float *v_full, const float *maps, int m_zero, int v_zero,
                   wan::AdamW8Step c) {
  __shared__ float map[1024];
  __shared__ float tops[16];
  const wan::Piece piece = pieces[blockIdx.x];
  const int i = threadIdx.x;
  const bool coded = piece.full < 0, alive = i < piece.length;
  const long at = piece.first + i;
  if (coded)
    for (int k = i; k < 1024; k += 256) map[k] = maps[k];
  __syncthreads();
  float m1 = 0.f, v1 = 0.f;
  if (alive) {
    m1 = coded ? map[m[at]] * m_max[blockIdx.x] : m_full[piece.full + i];
    v1 = coded ? map[512 + v[at]] * v_max[blockIdx.x] : v_full[piece.full + i];
    const float raw = g[at];
    if (isfinite(raw)) {
      const float grad = raw * c.grad_scale;
      m1 = c.beta1 * m1 + c.one_minus_beta1 * grad;
      v1 = c.beta2 * v1 + c.one_minus_beta2 * grad * grad;
      p[at] = (p[at] - __fdiv_rn(c.step_size[piece.plus] * m1, __fsqrt_rn(v1) + c.eps)) * c.decay[piece.plus];
    } else {
      m1 = v1 = 0.f; // the parameter stays, its moments are lost
    }
  }
  if (!coded) {
    if (alive) m_full[piece.full + i] = m1, v_full[piece.full + i] = v1;
    return;
  }
  float m_top = fabsf(m1), v_top = v1;
#pragma unroll
  for (int offset = 16; offset > 0; offset >>= 1) {
    m_top = fmaxf(m_top, __shfl_xor_sync(~0u, m_top, offset));
    v_top = fmaxf(v_top, __shfl_xor_sync(~0u, v_top, offset));
  }
  if ((i & 31) == 0) tops[i / 32] = m_top, tops[8 + i / 32] = v_top;
  __syncthreads(); // every thread has read the old scales
#pragma unroll
  for (int w = 0; w < 8; ++w) m_top = fmaxf(m_top, tops[w]), v_top = fmaxf(v_top, tops[8 + w]);
  if (i == 0) m_max[blockIdx.x] = m_top, v_max[blockIdx.x] = v_top;
  if (!alive) return;
  int code = m_top == 0.f ? m_zero : wan::nearest(map + 256, __fdiv_rn(m1, m_top));
  // A small moment must not lose its sign: 0 counts as positive.
  if (m1 < 0.f && !(map[code] < 0.f)) code -= 1;
  else if (m1 > 0.f && map[code] < 0.f) code += 1;
  m[at] = static_cast<uint8_t>(code);
  v[at] = static_cast<uint8_t>(v_top == 0.f ? v_zero : wan::nearest(map + 768, __fdiv_rn(v1, v_top)));
}
