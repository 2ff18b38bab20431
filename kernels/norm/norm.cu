// LayerNorm and RMSNorm over the model width with what follows them, forward and backward. fp32 inside, one rounding.
//
//   LayerNorm   y = (x - mean) * rstd * (one + a) + b        modulation: one = 1, a = scale, b = shift
//                                                            affine:     one = 0, a = weight, b = bias
//   RMSNorm     y = x * rstd * a, with ROPE then turned by the token's angle in pairs (2k, 2k+1) of each head
//   backward    g = (turned back) dy * (one + a)
//               dx = rstd * (g - [mean(g)] - xhat * mean(g * xhat)) + dres
//
// One block a row [d]; a thread holds CHUNKS chunks of 8 values in registers, so x is read once and the variance is taken
// around the mean. Forward 128 threads with as many chunks as it takes; backward, which holds twice as much, two chunks
// and as many threads: with five chunks its 128 registers leave too few blocks a processor (5120 wide: 2.0 against 2.7
// TB/s). `a` and `b` have one row for every `span` rows of x (span = l: per sample, 1: per token, 0: one row for all).
// Limits: d a multiple of 8, at most THREADS * 8 * CHUNKS; head width a multiple of 8; rows below 2^31.
// Bound by memory: each tensor is touched once.
#include "../common/vector.cuh"

namespace wan {

struct Rotary {
  const float *cos, *sin; // [l, half]
  int l, half;
};

// The cosines and sines of the four pairs of a chunk.
struct Angle {
  float4 cos, sin;
};

__device__ __forceinline__ Angle angle(const Rotary &r, long row, int column) {
  // 32 bits: a division of 64 costs a third of the kernel.
  const int token = static_cast<unsigned>(row) % static_cast<unsigned>(r.l);
  const long at = static_cast<long>(token) * r.half + (column % (2 * r.half)) / 2;
  return {*reinterpret_cast<const float4 *>(r.cos + at), *reinterpret_cast<const float4 *>(r.sin + at)};
}

// Turns the four pairs of a chunk; `sign` -1 turns back.
__device__ __forceinline__ void turn(const Angle &a, float sign, float (&v)[8]) {
  const float cos[4] = {a.cos.x, a.cos.y, a.cos.z, a.cos.w}, sin[4] = {a.sin.x, a.sin.y, a.sin.z, a.sin.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float re = v[2 * i], im = v[2 * i + 1], t = sign * sin[i];
    v[2 * i] = re * cos[i] - im * t;
    v[2 * i + 1] = re * t + im * cos[i];
  }
}

// Reads a row and brings it to xhat; returns rstd.
template <bool LAYER, int THREADS, int CHUNKS>
__device__ __forceinline__ float normalise(In x, long row, int d, float eps, float (&v)[CHUNKS][8], float *shared) {
  float sum[1] = {0.f};
#pragma unroll
  for (int c = 0; c < CHUNKS; ++c) {
    const int column = (c * THREADS + threadIdx.x) * 8;
    if (column < d) load8(x, row * d + column, v[c]);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (column >= d) v[c][i] = 0.f;
      sum[0] += v[c][i];
    }
  }
  float mean = 0.f;
  if (LAYER) {
    block_sum<1, THREADS>(sum, shared);
    mean = sum[0] / d;
  }
  float square[1] = {0.f};
#pragma unroll
  for (int c = 0; c < CHUNKS; ++c) {
    const int column = (c * THREADS + threadIdx.x) * 8;
    if (column < d)
#pragma unroll
      for (int i = 0; i < 8; ++i) v[c][i] -= mean, square[0] += v[c][i] * v[c][i];
  }
  block_sum<1, THREADS>(square, shared);
  const float rstd = 1.f / sqrtf(square[0] / d + eps);
#pragma unroll
  for (int c = 0; c < CHUNKS; ++c)
#pragma unroll
    for (int i = 0; i < 8; ++i) v[c][i] *= rstd;
  return rstd;
}

template <bool LAYER, bool ROPE, int THREADS, int CHUNKS>
__device__ void norm_forward(In x, In a, In b, int span, float one, Rotary rotary, Out y, int d, float eps) {
  __shared__ float shared[THREADS / 32];
  const long row = blockIdx.x;
  const long vector = span == 0 ? 0 : row / span;
  float v[CHUNKS][8];
  // Every head turns alike: where heads fill a chunk of the row evenly, a thread's pairs have one angle in all of them.
  const bool even = ROPE && THREADS * 8 % (2 * rotary.half) == 0;
  Angle turned;
  if (even) turned = angle(rotary, row, threadIdx.x * 8);
  normalise<LAYER, THREADS, CHUNKS>(x, row, d, eps, v, shared);
#pragma unroll
  for (int c = 0; c < CHUNKS; ++c) {
    const int column = (c * THREADS + threadIdx.x) * 8;
    if (column >= d) continue;
    float f[8], g[8] = {};
    load8(a, vector * d + column, f);
    if (LAYER) load8(b, vector * d + column, g);
#pragma unroll
    for (int i = 0; i < 8; ++i) v[c][i] = fmaf(v[c][i], one + f[i], g[i]);
    if (ROPE) turn(even ? turned : angle(rotary, row, column), 1.f, v[c]);
    store8(y, row * d + column, v[c]);
  }
}

template <bool LAYER, bool ROPE, int THREADS, int CHUNKS>
__device__ void norm_backward(In x, In a, int span, float one, Rotary rotary, In dy, In dres, Out dx, int d, float eps) {
  __shared__ float shared[2 * THREADS / 32];
  const long row = blockIdx.x;
  const long vector = span == 0 ? 0 : row / span;
  float v[CHUNKS][8], g[CHUNKS][8];
  const bool even = ROPE && THREADS * 8 % (2 * rotary.half) == 0;
  Angle turned;
  if (even) turned = angle(rotary, row, threadIdx.x * 8);
  // On its way while the row is normalised.
#pragma unroll
  for (int c = 0; c < CHUNKS; ++c) {
    const int column = (c * THREADS + threadIdx.x) * 8;
    if (column < d) load8(dy, row * d + column, g[c]);
  }
  const float rstd = normalise<LAYER, THREADS, CHUNKS>(x, row, d, eps, v, shared);
  float sums[2] = {0.f, 0.f};
#pragma unroll
  for (int c = 0; c < CHUNKS; ++c) {
    const int column = (c * THREADS + threadIdx.x) * 8;
    if (column >= d) continue;
    float f[8];
    load8(a, vector * d + column, f);
    if (ROPE) turn(even ? turned : angle(rotary, row, column), -1.f, g[c]);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      g[c][i] *= one + f[i];
      if (LAYER) sums[0] += g[c][i];
      sums[1] += g[c][i] * v[c][i];
    }
  }
  block_sum<2, THREADS>(sums, shared);
  const float mean = LAYER ? sums[0] / d : 0.f, along = sums[1] / d;
#pragma unroll
  for (int c = 0; c < CHUNKS; ++c) {
    const int column = (c * THREADS + threadIdx.x) * 8;
    if (column >= d) continue;
    float r[8] = {};
    if (dres.data) load8(dres, row * d + column, r);
#pragma unroll
    for (int i = 0; i < 8; ++i) r[i] += rstd * (g[c][i] - mean - v[c][i] * along);
    store8(dx, row * d + column, r);
  }
}

} // namespace wan

#define FORWARD(NAME, LAYER, ROPE, CHUNKS)                                                                             \
  extern "C" __global__ void __launch_bounds__(128) NAME##_fwd_##CHUNKS(wan::In x, wan::In a, wan::In b, int span,     \
      float one, wan::Rotary rotary, wan::Out y, int d, float eps) {                                                   \
    wan::norm_forward<LAYER, ROPE, 128, CHUNKS>(x, a, b, span, one, rotary, y, d, eps);                                \
  }
#define BACKWARD(NAME, LAYER, ROPE, THREADS)                                                                           \
  extern "C" __global__ void __launch_bounds__(THREADS) NAME##_bwd_##THREADS(wan::In x, wan::In a, int span,           \
      float one, wan::Rotary rotary, wan::In dy, wan::In dres, wan::Out dx, int d, float eps) {                        \
    wan::norm_backward<LAYER, ROPE, THREADS, 2>(x, a, span, one, rotary, dy, dres, dx, d, eps);                        \
  }
#define NORM(CHUNKS, THREADS)                                                                                          \
  FORWARD(layer, true, false, CHUNKS) FORWARD(rms, false, false, CHUNKS) FORWARD(rms_rope, false, true, CHUNKS)        \
  BACKWARD(layer, true, false, THREADS) BACKWARD(rms, false, false, THREADS) BACKWARD(rms_rope, false, true, THREADS)
// Widths up to 1024 (tests), 2048 (1.3B), 3072 (5B), 5120 (14B), 8192.
NORM(1, 64)
NORM(2, 128)
NORM(3, 192)
NORM(5, 320)
NORM(8, 512)
