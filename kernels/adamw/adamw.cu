// AdamW over flat fp32 buffers, and the squared norm of all gradients. Element by element in the order of operations of
// the CPU's version; 28 bytes a parameter, bound by memory.
#include "../common/vector.cuh"

namespace wan {

struct AdamWStep {
  float grad_scale, one_minus_beta1, beta2, one_minus_beta2, decay, step_size, correction2, eps;
};

} // namespace wan

extern "C" __global__ void adamw_step(float *p, const float *g, float *m, float *v, wan::AdamWStep c, long n) {
  const long at = static_cast<long>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (at >= n) return;
  const float grad = g[at] * c.grad_scale;
  const float m1 = m[at] + c.one_minus_beta1 * (grad - m[at]);
  const float v1 = v[at] * c.beta2 + c.one_minus_beta2 * grad * grad;
  m[at] = m1, v[at] = v1;
  p[at] = p[at] * c.decay - __fdiv_rn(c.step_size * m1, __fsqrt_rn(v1) / c.correction2 + c.eps);
}

// One partial sum of squares a block, in fp64 and in a fixed order; the host adds them up. A value that is not finite
// makes its sum so: one number tells norm and health.
extern "C" __global__ void __launch_bounds__(256) squared_norm(const float *g, double *partial, long n) {
  __shared__ double shared[8];
  double sum[1] = {0.0};
  for (long i = static_cast<long>(blockIdx.x) * 256 + threadIdx.x; i < n; i += static_cast<long>(gridDim.x) * 256)
    sum[0] += static_cast<double>(g[i]) * g[i];
  wan::block_sum<1, 256>(sum, shared);
  if (threadIdx.x == 0) partial[blockIdx.x] = sum[0];
}
