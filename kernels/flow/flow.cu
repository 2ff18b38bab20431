// Flow matching: the noised sample, the loss and its gradient, all fp32. Sums over a sample run in a fixed order: one
// block a sample, fp64 within a thread. A few megabytes once a step.
#include "../common/vector.cuh"

// out = (1 - sigma) * latents + sigma * noise; sigma [b], `each` values a sample.
extern "C" __global__ void flow_mix(wan::In latents, wan::In noise, const float *sigma, float *out, long each, long n) {
  const long at = static_cast<long>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (at >= n) return;
  const float s = sigma[at / each];
  out[at] = (1.f - s) * wan::load1(latents, at) + s * wan::load1(noise, at);
}

// loss[sample] = weight * mean((pred - (noise - latents))^2); weight may be null.
extern "C" __global__ void __launch_bounds__(1024)
    flow_loss(wan::In pred, wan::In latents, wan::In noise, const float *weight, float *loss, long each) {
  __shared__ double shared[32];
  const long first = static_cast<long>(blockIdx.x) * each;
  double sum[1] = {0.0};
  for (long i = threadIdx.x; i < each; i += 1024) {
    const float velocity = wan::load1(noise, first + i) - wan::load1(latents, first + i);
    const float error = wan::load1(pred, first + i) - velocity;
    sum[0] += static_cast<double>(error) * error;
  }
  wan::block_sum<1, 1024>(sum, shared);
  if (threadIdx.x == 0)
    loss[blockIdx.x] = static_cast<float>(sum[0] / each) * (weight ? weight[blockIdx.x] : 1.f);
}

// dpred = slope * weight * (pred - (noise - latents))
extern "C" __global__ void flow_loss_bwd(wan::In pred, wan::In latents, wan::In noise, const float *weight, float slope,
                                         float *dpred, long each, long n) {
  const long at = static_cast<long>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (at >= n) return;
  const float velocity = wan::load1(noise, at) - wan::load1(latents, at);
  const float w = weight ? weight[at / each] * slope : slope;
  dpred[at] = (wan::load1(pred, at) - velocity) * w;
}
