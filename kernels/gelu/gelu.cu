// Activations over any shape, fp32 inside: tanh GELU (and its backward), exact GELU, SiLU. Eight values a thread; any
// length. Bound by memory.
#include "../common/vector.cuh"

namespace wan {

constexpr float kSqrt2OverPi = 0.7978845608028654f, kCube = 0.044715f;

// sigmoid(2u) of u = sqrt(2/pi) * (x + 0.044715 x^3): the tanh GELU is x * sigmoid(2u).
__device__ __forceinline__ float sigmoid_2u(float x) {
  const float minus_2u = -2.f * kSqrt2OverPi * x * fmaf(kCube * x, x, 1.f);
  return 1.f / (1.f + __expf(minus_2u));
}

struct GeluTanh {
  static __device__ __forceinline__ float at(float x) { return x * sigmoid_2u(x); }
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

// dx = dy * (s + x s (1 - s) (2u)'), s = sigmoid(2u), (2u)' = 2 sqrt(2/pi) (1 + 3 * 0.044715 x^2)
extern "C" __global__ void gelu_tanh_bwd(wan::In x, wan::In dy, wan::Out dx, long n) {
  const long at = (static_cast<long>(blockIdx.x) * blockDim.x + threadIdx.x) * 8;
  if (at >= n) return;
  float v[8], g[8];
  wan::load8(x, at, n, v);
  wan::load8(dy, at, n, g);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float s = wan::sigmoid_2u(v[i]);
    const float slope = v[i] * fmaf(6.f * wan::kSqrt2OverPi * wan::kCube * v[i], v[i], 2.f * wan::kSqrt2OverPi);
    g[i] *= s * fmaf(slope, 1.f - s, 1.f);
  }
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
