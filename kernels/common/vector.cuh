// Eight values at a time: 128-bit loads and stores of fp32, bf16 or fp16, and sums over a block.
//
// The dtype of each tensor is an argument of the kernel, not of a template: the branch is the same for all threads and
// costs nothing next to the memory it waits for, and every combination of dtypes comes from one kernel.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

namespace wan {

enum DType : int { kF32 = 0, kBF16 = 1, kF16 = 2 };

// A tensor of any of the three dtypes.
struct In {
  const void *data;
  int dtype;
};
struct Out {
  void *data;
  int dtype;
};

__device__ __forceinline__ float load1(In t, long at) {
  if (t.dtype == kF32) return static_cast<const float *>(t.data)[at];
  if (t.dtype == kBF16) return __bfloat162float(static_cast<const __nv_bfloat16 *>(t.data)[at]);
  return __half2float(static_cast<const __half *>(t.data)[at]);
}

__device__ __forceinline__ void store1(Out t, long at, float v) {
  if (t.dtype == kF32) static_cast<float *>(t.data)[at] = v;
  else if (t.dtype == kBF16) static_cast<__nv_bfloat16 *>(t.data)[at] = __float2bfloat16_rn(v);
  else static_cast<__half *>(t.data)[at] = __float2half_rn(v);
}

// Eight 16-bit values as they lie in memory.
__device__ __forceinline__ void unpack8(const uint4 &raw, int dtype, float (&v)[8]) {
  const uint32_t w[4] = {raw.x, raw.y, raw.z, raw.w};
  if (dtype == kBF16) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      v[2 * i] = __uint_as_float(w[i] << 16);
      v[2 * i + 1] = __uint_as_float(w[i] & 0xffff0000u);
    }
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 f = __half22float2(*reinterpret_cast<const __half2 *>(&w[i]));
      v[2 * i] = f.x, v[2 * i + 1] = f.y;
    }
  }
}

__device__ __forceinline__ void load8(const float *p, float (&v)[8]) {
  const float4 a = reinterpret_cast<const float4 *>(p)[0], b = reinterpret_cast<const float4 *>(p)[1];
  v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w, v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
}

// The value that a tensor of this dtype holds.
__device__ __forceinline__ float held_as(int dtype, float v) {
  if (dtype == kF32) return v;
  return dtype == kBF16 ? __bfloat162float(__float2bfloat16_rn(v)) : __half2float(__float2half_rn(v));
}

// `at` is a multiple of 8, the tensor aligned to 16 bytes.
__device__ __forceinline__ void load8(In t, long at, float (&v)[8]) {
  if (t.dtype == kF32) return load8(static_cast<const float *>(t.data) + at, v);
  unpack8(*reinterpret_cast<const uint4 *>(static_cast<const uint16_t *>(t.data) + at), t.dtype, v);
}

// Eight values in 16 bits.
__device__ __forceinline__ uint4 pack8(int dtype, const float (&v)[8]) {
  uint32_t w[4];
  if (dtype == kBF16) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const __nv_bfloat162 p = __floats2bfloat162_rn(v[2 * i], v[2 * i + 1]);
      w[i] = *reinterpret_cast<const uint32_t *>(&p);
    }
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const __half2 p = __floats2half2_rn(v[2 * i], v[2 * i + 1]);
      w[i] = *reinterpret_cast<const uint32_t *>(&p);
    }
  }
  return make_uint4(w[0], w[1], w[2], w[3]);
}

__device__ __forceinline__ void store8(Out t, long at, const float (&v)[8]) {
  if (t.dtype == kF32) {
    float4 *p = reinterpret_cast<float4 *>(static_cast<float *>(t.data) + at);
    p[0] = make_float4(v[0], v[1], v[2], v[3]);
    p[1] = make_float4(v[4], v[5], v[6], v[7]);
    return;
  }
  *reinterpret_cast<uint4 *>(static_cast<uint16_t *>(t.data) + at) = pack8(t.dtype, v);
}

// The same where the tensor may end within the eight: values past `n` are 0 and are not stored.
__device__ __forceinline__ void load8(In t, long at, long n, float (&v)[8]) {
  if (at + 8 <= n) return load8(t, at, v);
#pragma unroll
  for (int i = 0; i < 8; ++i) v[i] = at + i < n ? load1(t, at + i) : 0.f;
}
__device__ __forceinline__ void store8(Out t, long at, long n, const float (&v)[8]) {
  if (at + 8 <= n) return store8(t, at, v);
#pragma unroll
  for (int i = 0; i < 8; ++i)
    if (at + i < n) store1(t, at + i, v[i]);
}

// Sums of N values over a block of THREADS, given to every thread; always in the same order. `shared` holds
// N * THREADS / 32 values and may be used again after the next barrier.
template <int N, int THREADS, typename F> __device__ __forceinline__ void block_sum(F (&v)[N], F *shared) {
  constexpr int kWarps = THREADS / 32;
#pragma unroll
  for (int i = 0; i < N; ++i)
#pragma unroll
    for (int offset = 16; offset > 0; offset >>= 1) v[i] += __shfl_xor_sync(~0u, v[i], offset);
  __syncthreads();
  if ((threadIdx.x & 31) == 0)
#pragma unroll
    for (int i = 0; i < N; ++i) shared[i * kWarps + threadIdx.x / 32] = v[i];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < N; ++i) {
    v[i] = shared[i * kWarps];
#pragma unroll
    for (int w = 1; w < kWarps; ++w) v[i] += shared[i * kWarps + w];
  }
}

// A row of 16-bit values as they lie, eight side by side a thread and trip; what lies behind the end is the row's first.
template <int TRIPS> __device__ __forceinline__ void load_raw(In x, long first, int width, uint4 (&raw)[TRIPS]) {
#pragma unroll
  for (int trip = 0; trip < TRIPS; ++trip) {
    const int at = (trip * blockDim.x + threadIdx.x) * 8;
    raw[trip] = *reinterpret_cast<const uint4 *>(static_cast<const uint16_t *>(x.data) + first + (at < width ? at : 0));
  }
}

// A row of `width` values (a multiple of 8) for a block: eight side by side a thread and trip, zeros behind the end. All
// loads are issued before any value is used.
template <int TRIPS>
__device__ __forceinline__ void load_row(In x, long first, int width, float (&v)[TRIPS][8]) {
  if (x.dtype == kF32) {
#pragma unroll
    for (int trip = 0; trip < TRIPS; ++trip) {
      const int at = (trip * blockDim.x + threadIdx.x) * 8;
      load8(static_cast<const float *>(x.data) + first + (at < width ? at : 0), v[trip]);
    }
  } else {
    uint4 raw[TRIPS];
    load_raw(x, first, width, raw);
#pragma unroll
    for (int trip = 0; trip < TRIPS; ++trip) unpack8(raw[trip], x.dtype, v[trip]);
  }
#pragma unroll
  for (int trip = 0; trip < TRIPS; ++trip)
    if ((trip * blockDim.x + threadIdx.x) * 8 >= width)
#pragma unroll
      for (int i = 0; i < 8; ++i) v[trip][i] = 0.f;
}

// Those values times a vector of the row's width.
template <int TRIPS> __device__ __forceinline__ void times_row(const float *factors, int width, float (&v)[TRIPS][8]) {
#pragma unroll
  for (int trip = 0; trip < TRIPS; ++trip) {
    const int at = (trip * blockDim.x + threadIdx.x) * 8;
    float f[8];
    load8(factors + (at < width ? at : 0), f);
#pragma unroll
    for (int i = 0; i < 8; ++i) v[trip][i] = __fmul_rn(v[trip][i], f[i]);
  }
}

// The larger magnitude; NaN of either wins.
__device__ __forceinline__ float larger(float top, float v) {
  asm("max.NaN.f32 %0, %0, %1;" : "+f"(top) : "f"(fabsf(v)));
  return top;
}

// The largest magnitude over a block of whole warps, given to every thread. `shared` holds 32 values. Magnitudes are
// ordered like their bits, NaN above all.
__device__ __forceinline__ float block_top(float top, uint32_t *shared) {
  uint32_t bits = __reduce_max_sync(~0u, __float_as_uint(top));
  const int warps = blockDim.x / 32, lane = threadIdx.x & 31;
  if (lane == 0) shared[threadIdx.x / 32] = bits;
  __syncthreads();
  return __uint_as_float(__reduce_max_sync(~0u, lane < warps ? shared[lane] : 0u));
}
template <int TRIPS> __device__ __forceinline__ float row_top(const float (&v)[TRIPS][8], uint32_t *shared) {
  float top = 0.f;
#pragma unroll
  for (int trip = 0; trip < TRIPS; ++trip)
#pragma unroll
    for (int i = 0; i < 8; ++i) top = larger(top, v[trip][i]);
  return block_top(top, shared);
}

} // namespace wan
