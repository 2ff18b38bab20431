// delta [o, i] = up [o, r] . down [r, i] in fp32, ranks added from the first to the last, products and sums rounded one by
// one: what the CPU computes, to the bit. A block of 256 threads has a tile of 64 x 64, a thread 4 x 4 of it.
//
// Bound by arithmetic: at rank 64 a matrix of 5120 x 5120 is 1.7e9 products and as many sums, and 0.1 GB to write.

namespace {
constexpr int kTile = 64, kRanks = 16, kEach = 4;
}

extern "C" __global__ void __launch_bounds__(256) lora_delta(const float *up, const float *down, float *delta, int o,
                                                             int r, int i) {
  __shared__ float up_s[kRanks][kTile + 1], down_s[kRanks][kTile];
  const int row0 = blockIdx.y * kTile, column0 = blockIdx.x * kTile;
  const int ty = threadIdx.x / 16, tx = threadIdx.x % 16;
  float sum[kEach][kEach] = {};
  for (int rank0 = 0; rank0 < r; rank0 += kRanks) {
    const int ranks = min(kRanks, r - rank0);
    for (int at = threadIdx.x; at < kRanks * kTile; at += 256) {
      const int row = at / kRanks, rank = at % kRanks;
      const bool there = row0 + row < o && rank < ranks;
      up_s[rank][row] = there ? up[static_cast<long>(row0 + row) * r + rank0 + rank] : 0.f;
    }
    for (int at = threadIdx.x; at < kRanks * kTile; at += 256) {
      const int rank = at / kTile, column = at % kTile;
      const bool there = column0 + column < i && rank < ranks;
      down_s[rank][column] = there ? down[static_cast<long>(rank0 + rank) * i + column0 + column] : 0.f;
    }
    __syncthreads();
    // Not beyond the last rank: a sum of -0 and the product 0 would be 0, and infinities times 0 are not numbers.
    for (int rank = 0; rank < ranks; ++rank) {
      float u[kEach], d[kEach];
#pragma unroll
      for (int k = 0; k < kEach; ++k) u[k] = up_s[rank][ty + 16 * k], d[k] = down_s[rank][tx + 16 * k];
#pragma unroll
      for (int y = 0; y < kEach; ++y)
#pragma unroll
        for (int x = 0; x < kEach; ++x) sum[y][x] = __fadd_rn(sum[y][x], __fmul_rn(u[y], d[x]));
    }
    __syncthreads();
  }
#pragma unroll
  for (int y = 0; y < kEach; ++y)
#pragma unroll
    for (int x = 0; x < kEach; ++x) {
      const int row = row0 + ty + 16 * y, column = column0 + tx + 16 * x;
      if (row < o && column < i) delta[static_cast<long>(row) * i + column] = sum[y][x];
    }
}
