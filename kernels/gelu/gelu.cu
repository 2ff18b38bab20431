// Activations over any shape, fp32 inside: tanh GELU (and its backward), exact GELU, SiLU. Eight values a thread; any
// length. Bound by memory.
#include "../common/vector.cuh"
#include "gelu.cuh"

namespace wan {

struct GeluTanh {
  static __device__ __forceinline__ float at(float x) { return gelu_tanh(x); }
};
struct GeluErf {
  static __device__ __forceinline__ float at(float x) { return 0.5f * x * (1.f + erff(x * 0.70710678118654752f)); }
};
struct Silu {
  static __device__ __forceinline__ float at(float x) { return x / (1.f + expf(-x)); }
};

template <typename F> __device__ __forceinline__ void activation(In x, Out y, long n) {
  const long at = (static_cast<long>(blockIdx.x) * blockDim.x + threadIdx.x) * 8;
  if (at >= n) return;
  float v[8];
  load8(x, at, n, v);
#pragma unroll
  for (int i = 0; i < 8; ++i) v[i] = F::at(v[i]);
  store8(y, at, n, v);
}

} // namespace wan

extern "C" __global__ void gelu_tanh_fwd(wan::In x, wan::Out y, long n) { wan::activation<wan::GeluTanh>(x, y, n); }
extern "C" __global__ void gelu_erf_fwd(wan::In x, wan::Out y, long n) { wan::activation<wan::GeluErf>(x, y, n); }
extern "C" __global__ void silu_fwd(wan::In x, wan::Out y, long n) { wan::activation<wan::Silu>(x, y, n); }

// dx = dy * slope
extern "C" __global__ void gelu_tanh_bwd(wan::In x, wan::In dy, wan::Out dx, long n) {
  const long at = (static_cast<long>(blockIdx.x) * blockDim.x + threadIdx.x) * 8;
  if (at >= n) return;
  float v[8], g[8];
  wan::load8(x, at, n, v);
  wan::load8(dy, at, n, g);
#pragma unroll
  for (int i = 0; i < 8; ++i) g[i] *= wan::gelu_tanh_slope(v[i]);
  wan::store8(dx, at, n, g);
}

// y = gelu_tanh(gate) * x
extern "C" __global__ void gelu_tanh_gate(wan::In gate, wan::In x, wan::Out y, long n) {
  const long at = (static_cast<long>(blockIdx.x) * blockDim.x + threadIdx.x) * 8;
  if (at >= n) return;
  float g[8], v[8];
  wan::load8(gate, at, n, g);
  wan::load8(x, at, n, v);
#pragma unroll
  for (int i = 0; i < 8; ++i) v[i] *= wan::GeluTanh::at(g[i]);
  wan::store8(y, at, n, v);
}
