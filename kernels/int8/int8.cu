// int8 codes of rotated weights and of rotated rows of activations; what they mean is in mod.rs, the product in
// product.cu. All sums are additions in a fixed order: the host computes the same codes.
#include "rotate.cuh"

namespace wan {

// One row: times `outer`, rotated in blocks of 64, times `inner` (both may be null), rounded with one scale. Eight
// values a thread and trip, kept between the pass for the maximum and the one that rounds: a row is read once.
template <int TRIPS>
__device__ __forceinline__ void int8_row(In x, const float *outer, const float *inner, uint8_t *codes, float *scale,
                                         int width) {
  __shared__ uint32_t shared[32];
  const long first = static_cast<long>(blockIdx.x) * width;
  float v[TRIPS][8];
  load_row(x, first, width, v);
  if (outer) times_row(outer, width, v);
#pragma unroll
  for (int trip = 0; trip < TRIPS; ++trip) {
    rotate_8x8(v[trip]);
#pragma unroll
    for (int i = 0; i < 8; ++i) v[trip][i] *= kRotated;
  }
  if (inner) times_row(inner, width, v);
  const float s = int8_scale(row_top(v, shared));
  const float inverse = __frcp_rn(s);
  if (threadIdx.x == 0) scale[blockIdx.x] = s;
#pragma unroll
  for (int trip = 0; trip < TRIPS; ++trip) {
    const int at = (trip * blockDim.x + threadIdx.x) * 8;
    if (at >= width) continue;
    *reinterpret_cast<uint2 *>(codes + first + at) =
        make_uint2(int8_codes(v[trip], inverse), int8_codes(v[trip] + 4, inverse));
  }
}

// A tile of 64 x 64 weights, each row divided by its size, rotated along both axes: thread (r, part) of 64 x 4 is left
// with the sixteen values of row r from column 16 * part on.
__device__ __forceinline__ void rotated_tile(In w, const float *outer, int width, float (&tile)[64][65],
                                             float (&v)[16]) {
  const int r = threadIdx.x / 4, part = threadIdx.x % 4;
  const long row = static_cast<long>(blockIdx.y) * 64 + r;
  const long at = row * width + static_cast<long>(blockIdx.x) * 64 + part * 16;
  const float inverse = __frcp_rn(outer[row]);
  float half[8];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    load8(w, at + h * 8, half);
#pragma unroll
    for (int i = 0; i < 8; ++i) v[h * 8 + i] = __fmul_rn(half[i], inverse);
  }
  rotate_4x16(v);
#pragma unroll
  for (int i = 0; i < 16; ++i) tile[r][part * 16 + i] = v[i] * kRotated;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 16; ++i) v[i] = tile[part * 16 + i][r];
  rotate_4x16(v);
#pragma unroll
  for (int i = 0; i < 16; ++i) tile[part * 16 + i][r] = v[i] * kRotated; // the thread's own places
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 16; ++i) v[i] = tile[r][part * 16 + i];
}

} // namespace wan

// One block a row of `width` values (a multiple of 64), of as many threads as its trips ask for.
#define INT8_ROWS(TRIPS)                                                                                               \
  extern "C" __global__ void __launch_bounds__(320) int8_rows_##TRIPS(                                                 \
      wan::In x, const float *outer, const float *inner, uint8_t *codes, float *scale, int width) {                    \
    wan::int8_row<TRIPS>(x, outer, inner, codes, scale, width);                                                        \
  }
INT8_ROWS(5)
INT8_ROWS(6)

// The size of each weight row, its root mean square: a warp a row, each lane every 32nd value, then lanes in pairs.
extern "C" __global__ void __launch_bounds__(256) int8_weight_sizes(wan::In w, float *outer, int height, int width) {
  const int row = blockIdx.x * 8 + threadIdx.x / 32, lane = threadIdx.x & 31;
  if (row >= height) return;
  float sum = 0.f;
  for (int i = lane; i < width; i += 32) {
    const float v = wan::load1(w, static_cast<long>(row) * width + i);
    sum = __fadd_rn(sum, __fmul_rn(v, v));
  }
#pragma unroll
  for (int mask = 1; mask < 32; mask <<= 1) sum = __fadd_rn(sum, __shfl_xor_sync(~0u, sum, mask));
  if (lane == 0) outer[row] = fmaxf(__fsqrt_rn(__fdiv_rn(sum, static_cast<float>(width))), 1e-30f);
}

// The largest magnitude of each rotated row; `tops` begins as zeros. A block of 256 threads a tile of 64 x 64.
extern "C" __global__ void __launch_bounds__(256)
    int8_weight_tops(wan::In w, const float *outer, uint32_t *tops, int width) {
  __shared__ float tile[64][65];
  float v[16];
  wan::rotated_tile(w, outer, width, tile, v);
  float top = 0.f;
#pragma unroll
  for (int i = 0; i < 16; ++i) top = wan::larger(top, v[i]);
  top = wan::larger(top, __shfl_xor_sync(~0u, top, 1));
  top = wan::larger(top, __shfl_xor_sync(~0u, top, 2));
  if (threadIdx.x % 4 == 0) atomicMax(tops + blockIdx.y * 64 + threadIdx.x / 4, __float_as_uint(top));
}

// Codes of the same tiles, and the rows' scales.
extern "C" __global__ void __launch_bounds__(256)
    int8_weight_codes(wan::In w, const float *outer, const float *tops, uint8_t *codes, float *inner, int width) {
  __shared__ float tile[64][65];
  float v[16];
  wan::rotated_tile(w, outer, width, tile, v);
  const int part = threadIdx.x % 4;
  const long row = static_cast<long>(blockIdx.y) * 64 + threadIdx.x / 4;
  const float s = wan::int8_scale(tops[row]), inverse = __frcp_rn(s);
  if (blockIdx.x == 0 && part == 0) inner[row] = s;
  uint32_t packed[4];
#pragma unroll
  for (int word = 0; word < 4; ++word) packed[word] = wan::int8_codes(v + word * 4, inverse);
  *reinterpret_cast<uint4 *>(codes + row * width + static_cast<long>(blockIdx.x) * 64 + part * 16) =
      make_uint4(packed[0], packed[1], packed[2], packed[3]);
}

// Codes [o, i] as [i, o]: tiles of 64 x 64, 256 threads, each with sixteen bytes. Both axes are multiples of 64.
extern "C" __global__ void __launch_bounds__(256)
    int8_transpose(const uint8_t *codes, uint8_t *out, int height, int width) {
  __shared__ uint32_t tile[64][17];
  const int o0 = blockIdx.y * 64, i0 = blockIdx.x * 64, r = threadIdx.x / 4, part = threadIdx.x % 4;
  const uint4 raw = *reinterpret_cast<const uint4 *>(codes + static_cast<long>(o0 + r) * width + i0 + part * 16);
  tile[r][part * 4] = raw.x, tile[r][part * 4 + 1] = raw.y, tile[r][part * 4 + 2] = raw.z, tile[r][part * 4 + 3] = raw.w;
  __syncthreads();
  // A square of four rows and four columns a thread: words of its rows become words of its columns.
  const int rows = threadIdx.x / 16 * 4, word = threadIdx.x % 16;
  uint32_t a[4];
#pragma unroll
  for (int k = 0; k < 4; ++k) a[k] = tile[rows + k][word];
  const uint32_t low01 = __byte_perm(a[0], a[1], 0x5140), low23 = __byte_perm(a[2], a[3], 0x5140);
  const uint32_t high01 = __byte_perm(a[0], a[1], 0x7362), high23 = __byte_perm(a[2], a[3], 0x7362);
  __syncthreads();
  const int column = rows / 4;
  tile[word * 4][column] = __byte_perm(low01, low23, 0x5410);
  tile[word * 4 + 1][column] = __byte_perm(low01, low23, 0x7632);
  tile[word * 4 + 2][column] = __byte_perm(high01, high23, 0x5410);
  tile[word * 4 + 3][column] = __byte_perm(high01, high23, 0x7632);
  __syncthreads();
  *reinterpret_cast<uint4 *>(out + static_cast<long>(i0 + r) * height + o0 + part * 16) =
      make_uint4(tile[r][part * 4], tile[r][part * 4 + 1], tile[r][part * 4 + 2], tile[r][part * 4 + 3]);
}
