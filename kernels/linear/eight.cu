// Products of 8-bit codes: activations and weights as e4m3 with a scale for each row, for tensor cores that have fp8.
//
//   x[l, :]   = code * scale_x[l]                 scale = max|x| / 448 of the row
//   W[o, i]   = code * scale_w[o]                 scale_w[o] = the largest block scale of the row; codes made anew
//   y[l, o]   = scale_x[l] * scale_w[o] * sum of codes
//   dx[l, i]  = scale_d[l] * sum over o of code(dy[l, o] * scale_w[o]) * code_w[o, i]
//
// Weights are held so from the start (eight_weight). Backward needs them transposed, since fp8 tensor cores read both
// operands along the summed axis: that copy is made in a scratch.
#include "../fp8/codec.cuh"
#include "../gelu/gelu.cuh"

namespace wan {

// Codes of two values, the first in the low byte; beyond 448 the largest code. Cards without fp8 never multiply with
// these, but the kernels are compiled for them too.
__device__ __forceinline__ uint32_t coded2(float a, float b) {
#if __CUDA_ARCH__ >= 890
  uint16_t codes;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(codes) : "f"(b), "f"(a));
  return codes;
#else
  return encode(fminf(fmaxf(a, -448.f), 448.f)) | encode(fminf(fmaxf(b, -448.f), 448.f)) << 8;
#endif
}

// A row of zeros keeps a scale that can be divided by; NaN stays NaN.
__device__ __forceinline__ float scale_of(float top) {
  const float s = __fdiv_rn(top, 448.f);
  return s < 1e-30f ? 1e-30f : s;
}

// Eight 16-bit values, times their columns' factors if there are any.
__device__ __forceinline__ void held8(const uint4 &raw, int dtype, const float *columns, int at, float (&v)[8]) {
  unpack8(raw, dtype, v);
  if (!columns) return;
  float f[8];
  load8(columns + at, f);
#pragma unroll
  for (int i = 0; i < 8; ++i) v[i] = __fmul_rn(v[i], f[i]);
}

// Codes of eight values, side by side.
__device__ __forceinline__ void code8(const float (&v)[8], float inverse, uint8_t *codes) {
  uint32_t packed[2] = {0, 0};
#pragma unroll
  for (int i = 0; i < 8; i += 2)
    packed[i / 4] |= coded2(__fmul_rn(v[i], inverse), __fmul_rn(v[i + 1], inverse)) << (i % 4 * 8);
  *reinterpret_cast<uint2 *>(codes) = make_uint2(packed[0], packed[1]);
}

// Eight values a thread and trip, side by side, kept between the pass for the maximum and the one that rounds: a row is
// read once. `columns` may be null. NaN anywhere makes the scale NaN, and with it the whole row of the product.
template <int TRIPS>
__device__ __forceinline__ void round_row(In x, const float *columns, uint8_t *codes, float *scale, int width) {
  __shared__ uint32_t shared[32];
  const long first = static_cast<long>(blockIdx.x) * width;
  float v[TRIPS][8];
  load_row(x, first, width, v);
  if (columns) times_row(columns, width, v);
  const float s = scale_of(row_top(v, shared));
  const float inverse = __frcp_rn(s);
  if (threadIdx.x == 0) scale[blockIdx.x] = s;
#pragma unroll
  for (int trip = 0; trip < TRIPS; ++trip) {
    const int at = (trip * blockDim.x + threadIdx.x) * 8;
    if (at < width) code8(v[trip], inverse, codes + first + at);
  }
}

// The same of a row's GELU, or with BACKWARD of dy times its slope; that is written to `made`, too. All in 16 bits, and so
// it is kept: in fp32 two rows would leave registers for one block a processor.
template <bool BACKWARD, int TRIPS>
__device__ __forceinline__ void round_gelu(In x, In dy, Out made, const float *columns, uint8_t *codes, float *scale,
                                           int width) {
  __shared__ uint32_t shared[32];
  const long first = static_cast<long>(blockIdx.x) * width;
  uint4 raw[TRIPS], other[BACKWARD ? TRIPS : 1];
  load_raw(x, first, width, raw);
  if constexpr (BACKWARD) load_raw(dy, first, width, other);
  float top = 0.f;
#pragma unroll
  for (int trip = 0; trip < TRIPS; ++trip) {
    const int at = (trip * blockDim.x + threadIdx.x) * 8;
    if (at >= width) continue;
    float v[8], g[8];
    unpack8(raw[trip], x.dtype, v);
    if constexpr (BACKWARD) unpack8(other[trip], dy.dtype, g);
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = BACKWARD ? g[i] * gelu_tanh_slope(v[i]) : gelu_tanh(v[i]);
    raw[trip] = pack8(made.dtype, v);
    *reinterpret_cast<uint4 *>(static_cast<uint16_t *>(made.data) + first + at) = raw[trip];
    held8(raw[trip], made.dtype, columns, at, v);
#pragma unroll
    for (int i = 0; i < 8; ++i) top = larger(top, v[i]);
  }
  const float s = scale_of(block_top(top, shared));
  const float inverse = __frcp_rn(s);
  if (threadIdx.x == 0) scale[blockIdx.x] = s;
#pragma unroll
  for (int trip = 0; trip < TRIPS; ++trip) {
    const int at = (trip * blockDim.x + threadIdx.x) * 8;
    if (at >= width) continue;
    float v[8];
    held8(raw[trip], made.dtype, columns, at, v);
    code8(v, inverse, codes + first + at);
  }
}

} // namespace wan

// One block a row of `width` values (a multiple of 16), of as many threads as its trips ask for.
#define EIGHT_ROWS(TRIPS)                                                                                              \
  extern "C" __global__ void __launch_bounds__(320)                                                                    \
      eight_rows_##TRIPS(wan::In x, const float *columns, uint8_t *codes, float *scale, int width) {                   \
    wan::round_row<TRIPS>(x, columns, codes, scale, width);                                                            \
  }                                                                                                                    \
  extern "C" __global__ void __launch_bounds__(320, 3) eight_gelu_##TRIPS(                                             \
      wan::In x, wan::In dy, wan::Out made, const float *columns, uint8_t *codes, float *scale, int width) {           \
    wan::round_gelu<false, TRIPS>(x, dy, made, columns, codes, scale, width);                                          \
  }                                                                                                                    \
  extern "C" __global__ void __launch_bounds__(320, 3) eight_gelu_backward_##TRIPS(                                    \
      wan::In x, wan::In dy, wan::Out made, const float *columns, uint8_t *codes, float *scale, int width) {           \
    wan::round_gelu<true, TRIPS>(x, dy, made, columns, codes, scale, width);                                           \
  }
EIGHT_ROWS(5)
EIGHT_ROWS(6)

// The scale of each weight row: one warp a row of `groups` block scales, rows `step` apart.
extern "C" __global__ void __launch_bounds__(256) eight_weight_scales(wan::In scale, float *rows, int count, int groups, int step) {
  const int row = blockIdx.x * 8 + threadIdx.x / 32, lane = threadIdx.x & 31;
  if (row >= count) return;
  float top = 0.f;
  for (int g = lane; g < groups; g += 32) top = fmaxf(top, wan::load1(scale, static_cast<long>(row) * step + g));
#pragma unroll
  for (int offset = 16; offset > 0; offset >>= 1) top = fmaxf(top, __shfl_xor_sync(~0u, top, offset));
  if (lane == 0) rows[row] = fmaxf(top, 1e-30f);
}

// Codes of W [o, i] for its rows' scales; 16 a thread, groups are multiples of 16.
extern "C" __global__ void __launch_bounds__(256)
    eight_weight(const uint8_t *codes, wan::In scale, const float *rows, uint8_t *out, int width, int group, long n) {
  const long at = (static_cast<long>(blockIdx.x) * 256 + threadIdx.x) * 16;
  if (at >= n) return;
  const uint4 raw = *reinterpret_cast<const uint4 *>(codes + at);
  const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
  const float factor = __fdiv_rn(wan::load1(scale, at / group), rows[at / width]);
  uint32_t packed[4] = {0, 0, 0, 0};
#pragma unroll
  for (int i = 0; i < 16; i += 2) {
    const uint32_t two = words[i / 4] >> (i % 4 * 8);
    const float a = __fmul_rn(wan::decode(two & 0xffu), factor), b = __fmul_rn(wan::decode(two >> 8 & 0xffu), factor);
    packed[i / 4] |= wan::coded2(a, b) << (i % 4 * 8);
  }
  *reinterpret_cast<uint4 *>(out + at) = make_uint4(packed[0], packed[1], packed[2], packed[3]);
}

// Codes [o, i] written as [i, o]: tiles of 64 x 64 through shared memory, 256 threads. Sizes are multiples of 16.
extern "C" __global__ void __launch_bounds__(256)
    eight_transposed(const uint8_t *codes, uint8_t *out, int height, int width) {
  // Rows of 68 bytes: columns are then read without meeting in one bank.
  __shared__ __align__(4) uint8_t tile[64][68];
  const int o0 = blockIdx.y * 64, i0 = blockIdx.x * 64, r = threadIdx.x / 4, c = threadIdx.x % 4 * 16;
  if (o0 + r < height && i0 + c < width) {
    const uint4 raw = *reinterpret_cast<const uint4 *>(codes + static_cast<long>(o0 + r) * width + i0 + c);
    const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int word = 0; word < 4; ++word) *reinterpret_cast<uint32_t *>(&tile[r][c + word * 4]) = words[word];
  }
  __syncthreads();
  // Thread: one input row of the result, 16 outputs of it.
  if (i0 + r < width && o0 + c < height) {
    uint32_t packed[4];
#pragma unroll
    for (int word = 0; word < 4; ++word) {
      packed[word] = 0;
#pragma unroll
      for (int i = 0; i < 4; ++i) packed[word] |= static_cast<uint32_t>(tile[c + word * 4 + i][r]) << (i * 8);
    }
    *reinterpret_cast<uint4 *>(out + static_cast<long>(i0 + r) * height + o0 + c) =
        make_uint4(packed[0], packed[1], packed[2], packed[3]);
  }
}

// y = raw * scale_rows[l] * scale_columns[o] * unit + bias[o] + base[l, o], where cublasLt cannot scale by vectors. Vectors
// of columns and base may be null; y may be either of the matrices read.
extern "C" __global__ void __launch_bounds__(256)
    eight_scale(wan::In raw, const float *rows, const float *columns, wan::In bias, wan::In base, float unit, wan::Out y,
                int width, long n) {
  const long at = (static_cast<long>(blockIdx.x) * 256 + threadIdx.x) * 8;
  if (at >= n) return;
  const int column = static_cast<int>(at % width);
  const float row = rows[at / width] * unit;
  float v[8];
  wan::load8(raw, at, v);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    v[i] *= columns ? row * columns[column + i] : row;
    if (bias.data) v[i] += wan::load1(bias, column + i);
  }
  if (base.data) {
    float more[8];
    wan::load8(base, at, more);
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] += more[i];
  }
  wan::store8(y, at, v);
}
