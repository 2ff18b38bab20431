// The tanh GELU and its slope, fp32.
#pragma once

namespace wan {

constexpr float kSqrt2OverPi = 0.7978845608028654f, kCube = 0.044715f;

// sigmoid(2u) of u = sqrt(2/pi) * (x + 0.044715 x^3): the tanh GELU is x * sigmoid(2u).
__device__ __forceinline__ float sigmoid_2u(float x) {
  const float minus_2u = -2.f * kSqrt2OverPi * x * fmaf(kCube * x, x, 1.f);
  // Two units in the last place; a correctly rounded division costs a tenth of the kernel.
  return __fdividef(1.f, 1.f + __expf(minus_2u));
}

__device__ __forceinline__ float gelu_tanh(float x) { return x * sigmoid_2u(x); }

// s + x s (1 - s) (2u)', s = sigmoid(2u), (2u)' = 2 sqrt(2/pi) (1 + 3 * 0.044715 x^2)
__device__ __forceinline__ float gelu_tanh_slope(float x) {
  const float s = sigmoid_2u(x);
  const float slope = x * fmaf(6.f * kSqrt2OverPi * kCube * x, x, 2.f * kSqrt2OverPi);
  return s * fmaf(slope, 1.f - s, 1.f);
}

} // namespace wan
