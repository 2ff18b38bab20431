// y[l, n] = sum over k of a[l, k] * b[n, k] for int8 codes, then on the sums while they are in registers:
//
//   v = sum * row_scale[l] * inner[n]         scales of both operands' rows
//   v = v rotated over blocks of 64 columns    undoes the rotation of the weight's other axis
//   y = v * outer[n] + bias[n] + base[m, n]
//
// mma.sync m16n8k32 runs on every card from sm_80 on. A block of 8 warps makes 128 x 256 of y, a warp 64 x 64: that is
// as much as registers hold, and keeps shared memory well below what tensor cores ask for. Four stages of 64 bytes of k,
// 96 KB: what sm_86 and sm_89 have. Sums never leave the card's registers as int32, which through cublasLt would be
// written and read again, eight bytes a value.
#include "../common/mma.cuh"
#include "rotate.cuh"

namespace wan {

constexpr int kRowsOf = 128, kColumns = 256, kDepth = 64, kStages = 4;
constexpr int kStageBytes = (kRowsOf + kColumns) * kDepth;

// Byte of a 16-byte chunk in a tile of 64-byte rows. ldmatrix reads eight rows at once: eight neighbours of a, and of b
// four pairs eight rows apart. Both fall into different banks.
__device__ __forceinline__ uint32_t place(int row, int chunk) {
  return static_cast<uint32_t>(row * kDepth + ((chunk ^ ((row >> 1 ^ row >> 3) & 3)) << 4));
}

__device__ __forceinline__ void mma_int8(int (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
               "{%0,%1,%2,%3};\n"
               : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

struct Codes {
  const uint8_t *a, *b;
};
struct Scales {
  const float *rows, *inner, *outer;
};

} // namespace wan

// `m` rows of any number; `n` and `k` multiples of 64. `inner` and `outer` may be null. One axis of blocks: bands of 8
// tiles of rows, so that blocks that run together share what they read in L2.
extern "C" __global__ void __launch_bounds__(256, 1)
    int8_product(wan::Codes codes, wan::Scales scales, wan::In bias, wan::In base, wan::Out y, int m, int n, int k) {
  using namespace wan;
  extern __shared__ __align__(128) uint8_t memory[];
  const uint32_t shared_at = smem_address(memory);
  const int lane = threadIdx.x & 31, warp = threadIdx.x / 32, warp_m = warp / 4 * 64, warp_n = warp % 4 * 64;

  constexpr int kBand = 8;
  const int tiles_m = (m + kRowsOf - 1) / kRowsOf, tiles_n = (n + kColumns - 1) / kColumns;
  const int band = blockIdx.x / (kBand * tiles_n), high = min(kBand, tiles_m - band * kBand);
  const int within = blockIdx.x - band * kBand * tiles_n;
  const int m0 = (band * kBand + within % high) * kRowsOf, n0 = within / high * kColumns;

  // Copies: a thread's rows lie 64 apart, its chunk stays.
  const int copy_row = threadIdx.x / 4, copy_chunk = threadIdx.x % 4;
  const uint8_t *a = codes.a + static_cast<long>(m0 + copy_row) * k + copy_chunk * 16;
  const uint8_t *b = codes.b + static_cast<long>(n0 + copy_row) * k + copy_chunk * 16;
  const uint32_t copy_to = shared_at + place(copy_row, copy_chunk); // rows 64 apart have the same swizzle
  auto load = [&](int step) {
    const uint32_t to = copy_to + step % kStages * kStageBytes;
    const long at = static_cast<long>(step) * kDepth;
#pragma unroll
    for (int i = 0; i < kRowsOf / 64; ++i) {
      const bool valid = m0 + copy_row + i * 64 < m;
      cp_async16(to + i * 64 * kDepth, valid ? a + at + static_cast<long>(i) * 64 * k : codes.a, valid);
    }
#pragma unroll
    for (int i = 0; i < kColumns / 64; ++i) {
      const bool valid = n0 + copy_row + i * 64 < n;
      cp_async16(to + (kRowsOf + i * 64) * kDepth, valid ? b + at + static_cast<long>(i) * 64 * k : codes.b, valid);
    }
  };

  // Lane's row in ldmatrix and its chunk, as the swizzle places it: 16 rows of a or 4 of b further on, and 32 bytes of k
  // further on, it is the other one of the pair. Column r of the mma's tile j is column
  // j / 4 * 32 + r / 2 * 8 + j % 4 * 2 + r % 2 of the 64: a thread then holds eight neighbours.
  const int a_row = warp_m + (lane & 15), a_chunk = lane >> 4;
  const int b_row = warp_n + (lane & 7) / 2 * 8 + (lane & 1) + (lane >> 4) * 2, b_chunk = lane >> 3 & 1;
  const uint32_t a_at[2] = {shared_at + place(a_row, a_chunk), shared_at + place(a_row, a_chunk ^ 2)};
  const uint32_t b_first = shared_at + kRowsOf * kDepth;
  const uint32_t b_at[2] = {b_first + place(b_row, b_chunk), b_first + place(b_row, b_chunk ^ 2)};
  int sum[4][8][4] = {};
  uint32_t left[2][4][4], right[2][4][4];
  auto fetch = [&](int step, int part) {
    const uint32_t stage = step % kStages * kStageBytes;
#pragma unroll
    for (int i = 0; i < 4; ++i) ldmatrix4(left[part][i], a_at[part ^ (i & 1)] + stage + i * 16 * kDepth);
#pragma unroll
    for (int j = 0; j < 4; ++j)
      ldmatrix4(right[part][j], b_at[part ^ (j & 1)] + stage + (j / 2 * 32 + j % 2 * 4) * kDepth);
  };
  auto multiply = [&](int part) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < 8; ++j)
        mma_int8(sum[i][j], left[part][i], right[part][j / 2][j % 2 * 2], right[part][j / 2][j % 2 * 2 + 1]);
  };

  const int steps = k / kDepth;
#pragma unroll
  for (int stage = 0; stage < kStages - 1; ++stage) {
    if (stage < steps) load(stage);
    cp_async_commit();
  }
  cp_async_wait<kStages - 2>();
  __syncthreads();
  fetch(0, 0);
  for (int step = 0; step < steps; ++step) {
    // The stage of the step before: its last fetch lies behind the barrier below.
    if (step + kStages - 1 < steps) load(step + kStages - 1);
    cp_async_commit();
    fetch(step, 1);
    multiply(0);
    cp_async_wait<kStages - 2>();
    __syncthreads();
    if (step + 1 < steps) fetch(step + 1, 0);
    multiply(1);
  }

  // A thread's sixteen columns of a row: eight from `column` on, eight more 32 further. Vectors are read once for all of
  // a thread's rows.
  if (n0 + warp_n >= n) return;
  const int column = n0 + warp_n + (lane & 3) * 8, row0 = m0 + warp_m + lane / 4;
  float v[8][2][8], factor[8]; // row0 + 8 * r
#pragma unroll
  for (int r = 0; r < 8; ++r) {
    const float scale = row0 + r * 8 < m ? scales.rows[row0 + r * 8] : 0.f;
#pragma unroll
    for (int c = 0; c < 16; ++c)
      v[r][c / 8][c % 8] = __fmul_rn(__int2float_rn(sum[r / 2][c / 2][r % 2 * 2 + c % 2]), scale);
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    if (!scales.inner) break;
    load8(scales.inner + column + h * 32, factor);
#pragma unroll
    for (int r = 0; r < 8; ++r)
#pragma unroll
      for (int c = 0; c < 8; ++c) v[r][h][c] = __fmul_rn(v[r][h][c], factor[c]);
  }
#pragma unroll
  for (int r = 0; r < 8; ++r) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      butterfly<1>(v[r][h]), butterfly<2>(v[r][h]), butterfly<4>(v[r][h]);
      butterfly_lanes<1>(v[r][h]), butterfly_lanes<2>(v[r][h]);
    }
#pragma unroll
    for (int c = 0; c < 8; ++c) {
      const float low = v[r][0][c], far = v[r][1][c];
      v[r][0][c] = __fmul_rn(__fadd_rn(low, far), kRotated);
      v[r][1][c] = __fmul_rn(__fsub_rn(low, far), kRotated);
    }
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    if (scales.outer) {
      load8(scales.outer + column + h * 32, factor);
#pragma unroll
      for (int r = 0; r < 8; ++r)
#pragma unroll
        for (int c = 0; c < 8; ++c) v[r][h][c] = __fmul_rn(v[r][h][c], factor[c]);
    }
    if (bias.data) {
      load8(bias, column + h * 32, factor);
#pragma unroll
      for (int r = 0; r < 8; ++r)
#pragma unroll
        for (int c = 0; c < 8; ++c) v[r][h][c] = __fadd_rn(v[r][h][c], factor[c]);
    }
#pragma unroll
    for (int r = 0; r < 8; ++r) {
      if (row0 + r * 8 >= m) continue;
      const long at = static_cast<long>(row0 + r * 8) * n + column + h * 32;
      if (base.data) {
        load8(base, at, factor);
#pragma unroll
        for (int c = 0; c < 8; ++c) v[r][h][c] = __fadd_rn(v[r][h][c], factor[c]);
      }
      store8(y, at, v[r][h]);
    }
  }
}

// The same from sums in memory, `m` rows of `n`: for cards whose library multiplies int8 faster than mma.sync does. Eight
// values a thread.
extern "C" __global__ void __launch_bounds__(256)
    int8_finish(const int *sums, wan::Scales scales, wan::In bias, wan::In base, wan::Out y, int n, long count) {
  using namespace wan;
  const long at = (static_cast<long>(blockIdx.x) * 256 + threadIdx.x) * 8;
  const bool inside = at < count; // all of 64 columns or none
  const long row = inside ? at / n : 0;
  const int column = inside ? static_cast<int>(at - row * n) : 0;
  float v[8], factor[8];
  int raw[8] = {};
  if (inside) {
    const int4 a = reinterpret_cast<const int4 *>(sums + at)[0], b = reinterpret_cast<const int4 *>(sums + at)[1];
    raw[0] = a.x, raw[1] = a.y, raw[2] = a.z, raw[3] = a.w, raw[4] = b.x, raw[5] = b.y, raw[6] = b.z, raw[7] = b.w;
  }
  const float scale = scales.rows[row];
#pragma unroll
  for (int c = 0; c < 8; ++c) v[c] = __fmul_rn(__int2float_rn(raw[c]), scale);
  if (scales.inner) {
    load8(scales.inner + column, factor);
#pragma unroll
    for (int c = 0; c < 8; ++c) v[c] = __fmul_rn(v[c], factor[c]);
  }
  rotate_8x8(v);
#pragma unroll
  for (int c = 0; c < 8; ++c) v[c] *= kRotated;
  if (scales.outer) {
    load8(scales.outer + column, factor);
#pragma unroll
    for (int c = 0; c < 8; ++c) v[c] = __fmul_rn(v[c], factor[c]);
  }
  if (bias.data) {
    load8(bias, column, factor);
#pragma unroll
    for (int c = 0; c < 8; ++c) v[c] = __fadd_rn(v[c], factor[c]);
  }
  if (!inside) return;
  if (base.data) {
    load8(base, at, factor);
#pragma unroll
    for (int c = 0; c < 8; ++c) v[c] = __fadd_rn(v[c], factor[c]);
  }
  store8(y, at, v);
}
