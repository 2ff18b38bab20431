// Helpers of the linears: a cast between fp32, bf16 and fp16 (adapters' fp32 masters become operands of tensor cores),
// dst += src in fp32 (gradients of adapters), and the padding of an adapter's rank. Eight values a thread; any length.
#include "../common/vector.cuh"

extern "C" __global__ void cast(wan::In x, wan::Out y, long n) {
  const long at = (static_cast<long>(blockIdx.x) * blockDim.x + threadIdx.x) * 8;
  if (at >= n) return;
  float v[8];
  wan::load8(x, at, n, v);
  wan::store8(y, at, n, v);
}

// y = x * factor
extern "C" __global__ void scale(wan::In x, wan::Out y, float factor, long n) {
  const long at = (static_cast<long>(blockIdx.x) * blockDim.x + threadIdx.x) * 8;
  if (at >= n) return;
  float v[8];
  wan::load8(x, at, n, v);
#pragma unroll
  for (int i = 0; i < 8; ++i) v[i] *= factor;
  wan::store8(y, at, n, v);
}

// A flat buffer's parts begin anywhere: one value a thread. Rows of src are `stride` apart, those of dst `columns`.
extern "C" __global__ void add_assign(float *dst, const float *src, int columns, int stride, long n) {
  const long at = static_cast<long>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (at >= n) return;
  const long row = at / columns;
  dst[at] += src[row * stride + (at - row * columns)];
}

// y [.., wide] = x [rows, columns] with zeros to the right and below; n values of y.
struct Pad {
  wan::In x;
  wan::Out y;
  int rows, columns, wide, n;
};

// Up to six of them at once: a LoRA's matrices are small next to a launch.
extern "C" __global__ void pad(Pad a, Pad b, Pad c, Pad d, Pad e, Pad f) {
  const int i = blockIdx.y;
  const Pad p = i == 0 ? a : i == 1 ? b : i == 2 ? c : i == 3 ? d : i == 4 ? e : f;
  const int at = blockIdx.x * blockDim.x + threadIdx.x;
  if (at >= p.n) return;
  const int row = at / p.wide, column = at - row * p.wide;
  const bool inside = row < p.rows && column < p.columns;
  wan::store1(p.y, at, inside ? wan::load1(p.x, row * p.columns + column) : 0.f);
}
