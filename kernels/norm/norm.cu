// LayerNorm and RMSNorm over the model width with what follows them, forward and backward. fp32 inside, one rounding.
//
//   LayerNorm   y = (x - mean) * rstd * (one + a) + b        modulation: one = 1, a = scale, b = shift
//                                                            affine:     one = 0, a = weight, b = bias
//   RMSNorm     y = x * rstd * a, with ROPE then turned by the token's angle in pairs (2k, 2k+1) of each head
//   backward    g = (turned back) dy * (one + a)
//               dx = rstd * (g - [mean(g)] - xhat * mean(g * xhat)) + dres
//
// One block of 128 threads a row [d]; a thread holds CHUNKS chunks of 8 values in registers, so x is read once and the
// variance is taken around the mean. `a` and `b` have one row for every `span` rows of x (span = l: per sample, 1: per
// token, 0: one row for all). Limits: d a multiple of 8, at most 128 * 8 * CHUNKS; head width a multiple of 8.
// Bound by memory: each tensor is touched once.
#include "../common/vector.cuh"

namespace wan {

constexpr int kNormThreads = 128;

struct Rotary {
  const float *cos, *sin; // [l, half]
  int l, half;
};

// Turns the four pairs of a chunk; `sign` -1 turns back.
__device__ __forceinline__ void turn(const Rotary &r, long row, int column, float sign, float (&v)[8]) {
  const long at = (row % r.l) * r.half + (column % (2 * r.half)) / 2;
  const float4 c = *reinterpret_cast<const float4 *>(r.cos + at), s = *reinterpret_cast<const float4 *>(r.sin + at);
  const float cos[4] = {c.x, c.y, c.z, c.w}, sin[4] = {s.x, s.y, s.z, s.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float re = v[2 * i], im = v[2 * i + 1], t = sign * sin[i];
    v[2 * i] = re * cos[i] - im * t;
    v[2 * i + 1] = re * t + im * cos[i];
  }
}

// Reads a row and brings it to xhat; returns rstd.
template <bool LAYER, int CHUNKS>
__device__ __forceinline__ float normalise(In x, long row, int d, float eps, float (&v)[CHUNKS][8], float *shared) {
  float sum[1] = {0.f};
#pragma unroll
  for (int c = 0; c < CHUNKS; ++c) {
    const int column = (c * kNormThreads + threadIdx.x) * 8;
    if (column < d) load8(x, row * d + column, v[c]);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (column >= d) v[c][i] = 0.f;
      sum[0] += v[c][i];
    }
  }
  float mean = 0.f;
  if (LAYER) {
    block_sum<1, kNormThreads>(sum, shared);
    mean = sum[0] / d;
  }
  float square[1] = {0.f};
#pragma unroll
  for (int c = 0; c < CHUNKS; ++c) {
    const int column = (c * kNormThreads + threadIdx.x) * 8;
    if (column < d)
#pragma unroll
      for (int i = 0; i < 8; ++i) v[c][i] -= mean, square[0] += v[c][i] * v[c][i];
  }
  block_sum<1, kNormThreads>(square, shared);
  const float rstd = 1.f / sqrtf(square[0] / d + eps);
#pragma unroll
  for (int c = 0; c < CHUNKS; ++c)
#pragma unroll
    for (int i = 0; i < 8; ++i) v[c][i] *= rstd;
  return rstd;
}

template <bool LAYER, bool ROPE, int CHUNKS>
__device__ void norm_forward(In x, In a, In b, int span, float one, Rotary rotary, Out y, int d, float eps) {
  __shared__ float shared[kNormThreads / 32];
  const long row = blockIdx.x;
  const long vector = span == 0 ? 0 : row / span;
  float v[CHUNKS][8];
  normalise<LAYER, CHUNKS>(x, row, d, eps, v, shared);
#pragma unroll
  for (int c = 0; c < CHUNKS; ++c) {
    const int column = (c * kNormThreads + threadIdx.x) * 8;
    if (column >= d) continue;
    float f[8], g[8] = {};
    load8(a, vector * d + column, f);
    if (LAYER) load8(b, vector * d + column, g);
#pragma unroll
    for (int i = 0; i < 8; ++i) v[c][i] = fmaf(v[c][i], one + f[i], g[i]);
    if (ROPE) turn(rotary, row, column, 1.f, v[c]);
    store8(y, row * d + column, v[c]);
  }
}

template <bool LAYER, bool ROPE, int CHUNKS>
__device__ void norm_backward(In x, In a, int span, float one, Rotary rotary, In dy, In dres, Out dx, int d, float eps) {
  __shared__ float shared[2 * kNormThreads / 32];
  const long row = blockIdx.x;
  const long vector = span == 0 ? 0 : row / span;
  float v[CHUNKS][8], g[CHUNKS][8];
  const float rstd = normalise<LAYER, CHUNKS>(x, row, d, eps, v, shared);
  float sums[2] = {0.f, 0.f};
#pragma unroll
  for (int c = 0; c < CHUNKS; ++c) {
    const int column = (c * kNormThreads + threadIdx.x) * 8;
    if (column >= d) continue;
    float f[8];
    load8(dy, row * d + column, g[c]);
    load8(a, vector * d + column, f);
    if (ROPE) turn(rotary, row, column, -1.f, g[c]);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      g[c][i] *= one + f[i];
      if (LAYER) sums[0] += g[c][i];
      sums[1] += g[c][i] * v[c][i];
    }
  }
  block_sum<2, kNormThreads>(sums, shared);
  const float mean = LAYER ? sums[0] / d : 0.f, along = sums[1] / d;
#pragma unroll
  for (int c = 0; c < CHUNKS; ++c) {
    const int column = (c * kNormThreads + threadIdx.x) * 8;
    if (column >= d) continue;
    float r[8] = {};
    if (dres.data) load8(dres, row * d + column, r);
#pragma unroll
    for (int i = 0; i < 8; ++i) r[i] += rstd * (g[c][i] - mean - v[c][i] * along);
    store8(dx, row * d + column, r);
  }
}

} // namespace wan

#define NORM(NAME, LAYER, ROPE, CHUNKS)                                                                                \
  extern "C" __global__ void __launch_bounds__(wan::kNormThreads) NAME##_fwd_##CHUNKS(                                 \
      wan::In x, wan::In a, wan::In b, int span, float one, wan::Rotary rotary, wan::Out y, int d, float eps) {        \
    wan::norm_forward<LAYER, ROPE, CHUNKS>(x, a, b, span, one, rotary, y, d, eps);                                     \
  }                                                                                                                    \
  extern "C" __global__ void __launch_bounds__(wan::kNormThreads)                                                      \
      NAME##_bwd_##CHUNKS(wan::In x, wan::In a, int span, float one, wan::Rotary rotary, wan::In dy, wan::In dres,     \
                          wan::Out dx, int d, float eps) {                                                             \
    wan::norm_backward<LAYER, ROPE, CHUNKS>(x, a, span, one, rotary, dy, dres, dx, d, eps);                            \
  }
#define NORMS(CHUNKS)                                                                                                  \
  NORM(layer, true, false, CHUNKS) NORM(rms, false, false, CHUNKS) NORM(rms_rope, false, true, CHUNKS)
// Widths up to 1024 (tests), 2048 (1.3B), 3072 (5B), 5120 (14B), 8192.
NORMS(1)
NORMS(2)
NORMS(3)
NORMS(5)
NORMS(8)
