// Where branches join the residual stream. fp32 sums, one rounding; eight values a thread; any length. Bound by memory.
#include "../common/vector.cuh"

// out = x + y
extern "C" __global__ void residual_fwd(wan::In x, wan::In y, wan::Out out, long n) {
  const long at = (static_cast<long>(blockIdx.x) * blockDim.x + threadIdx.x) * 8;
  if (at >= n) return;
  float a[8], b[8];
  wan::load8(x, at, n, a);
  wan::load8(y, at, n, b);
#pragma unroll
  for (int i = 0; i < 8; ++i) a[i] += b[i];
  wan::store8(out, at, n, a);
}

// out = x + gate * y, or gate * y where x is null. gate has one row [d] for every `span` rows; d a multiple of 8.
extern "C" __global__ void gate_fwd(wan::In x, wan::In y, wan::In gate, int span, wan::Out out, int d, long n) {
  const long at = (static_cast<long>(blockIdx.x) * blockDim.x + threadIdx.x) * 8;
  if (at >= n) return;
  const long row = at / d;
  float a[8] = {}, b[8], g[8];
  if (x.data) wan::load8(x, at, a);
  wan::load8(y, at, b);
  wan::load8(gate, row / span * d + (at - row * d), g);
#pragma unroll
  for (int i = 0; i < 8; ++i) a[i] = fmaf(b[i], g[i], a[i]);
  wan::store8(out, at, a);
}
