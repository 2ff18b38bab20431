// LayerNorm and RMSNorm over the model width with what follows them, forward and backward. fp32 inside, one rounding.
//
//   LayerNorm   y = (x - mean) * rstd * (one + a) + b        modulation: one = 1, a = scale, b = shift
//                                                            affine:     one = 0, a = weight, b = bias
//   RMSNorm     y = x * rstd * a, with ROPE then turned by the token's angle in pairs (2k, 2k+1) of each head
//   backward    g = (turned back) dy * (one + a)
//               dx = rstd * (g - [mean(g)] - xhat * mean(g * xhat)) + dres
//   RESIDUAL    LayerNorm of sum = x + gate * branch, which is written, too; backward also writes dbranch = gate * dx
//
// A block takes one row [d] after the other, gridDim.x apart, and a thread the same CHUNKS chunks of 8 values of each:
// `a` and `b` stay in registers, and the next rows are on their way to shared memory while this one is summed. The
// variance is taken around the mean. `a` and `b` have one row for every `span` rows of x (span = l: per sample, 1: per
// token, 0: one row for all).
// Limits: d a multiple of 8, at most THREADS * 8 * CHUNKS; head width a multiple of 8; rows below 2^31; stages 1 or 2.
// Bound by memory: each tensor is touched once.
#include "../common/vector.cuh"

namespace wan {

constexpr int CHUNKS = 2;

struct Rotary {
  const float *cos, *sin; // [l, half]
  int l, half;
};

// The cosines and sines of the four pairs of a chunk.
struct Angle {
  float4 cos, sin;
};

// A block's way through the tokens. Every head turns alike: where heads fill a chunk of the row evenly (`even`), a
// thread's pairs have one angle in all of them, fetched a row ahead.
template <bool ROPE, int THREADS> struct Turn {
  const Rotary r;
  const bool even;
  int token, step;
  Angle next;

  __device__ __forceinline__ Turn(const Rotary &rotary)
      : r(rotary), even(ROPE && THREADS * 8 % (2 * rotary.half) == 0), token(0), step(0) {
    if (!ROPE) return;
    token = blockIdx.x % r.l, step = gridDim.x % r.l;
    if (even) next = at(threadIdx.x * 8);
  }

  __device__ __forceinline__ Angle at(int column) const {
    const long first = static_cast<long>(token) * r.half + (column % (2 * r.half)) / 2;
    return {*reinterpret_cast<const float4 *>(r.cos + first), *reinterpret_cast<const float4 *>(r.sin + first)};
  }

  // Turns the row's chunks; `sign` -1 turns back. Then on to the next row.
  __device__ __forceinline__ void row(float sign, int d, float (&v)[CHUNKS][8]) {
    if (!ROPE) return;
    Angle a = next;
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) {
      const int column = (c * THREADS + threadIdx.x) * 8;
      if (column >= d) continue;
      if (!even) a = at(column);
      const float cos[4] = {a.cos.x, a.cos.y, a.cos.z, a.cos.w}, sin[4] = {a.sin.x, a.sin.y, a.sin.z, a.sin.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float re = v[c][2 * i], im = v[c][2 * i + 1], t = sign * sin[i];
        v[c][2 * i] = re * cos[i] - im * t;
        v[c][2 * i + 1] = re * t + im * cos[i];
      }
    }
    token += step;
    if (token >= r.l) token -= r.l;
    if (even) next = at(threadIdx.x * 8);
  }
};

// Rows of a tensor on their way to shared memory, where they lie as in global memory. A warp copies what it will read
// itself, so no barrier of the block is needed.
template <int THREADS> struct Staged {
  // Bytes of a row's place.
  static __device__ __forceinline__ int size(In t) {
    return t.data ? CHUNKS * THREADS * (t.dtype == kF32 ? 32 : 16) : 0;
  }

  static __device__ __forceinline__ void fetch(In t, long row, int d, const char *place) {
    const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(place));
    if (t.dtype == kF32) {
      // A warp's 256 values in two runs of 128, four a thread.
      const int first = threadIdx.x * 8 - (threadIdx.x & 31) * 4;
      const float *const from = static_cast<const float *>(t.data) + row * d;
#pragma unroll
      for (int run = 0; run < 2 * CHUNKS; ++run) {
        const int column = run / 2 * THREADS * 8 + run % 2 * 128 + first;
        if (column < d) copy(to + column * 4, from + column);
      }
    } else {
      const uint16_t *const from = static_cast<const uint16_t *>(t.data) + row * d;
#pragma unroll
      for (int c = 0; c < CHUNKS; ++c) {
        const int column = (c * THREADS + threadIdx.x) * 8;
        if (column < d) copy(to + column * 2, from + column);
      }
    }
  }

  // Zeros past the end.
  static __device__ __forceinline__ void read(In t, int d, const char *place, float (&v)[CHUNKS][8]) {
    if (t.dtype == kF32) {
      // Eight threads at a time read 16 bytes each; every second four begin with their later half, so that no two meet
      // in one bank.
      const int late = threadIdx.x >> 2 & 1;
#pragma unroll
      for (int c = 0; c < CHUNKS; ++c) {
        const int column = (c * THREADS + threadIdx.x) * 8;
        const float4 *const at = reinterpret_cast<const float4 *>(place) + column / 4;
        const float4 p = at[late], q = at[late ^ 1];
        const float4 a = late ? q : p, b = late ? p : q;
        v[c][0] = a.x, v[c][1] = a.y, v[c][2] = a.z, v[c][3] = a.w;
        v[c][4] = b.x, v[c][5] = b.y, v[c][6] = b.z, v[c][7] = b.w;
      }
    } else {
#pragma unroll
      for (int c = 0; c < CHUNKS; ++c) load8(In{place, t.dtype}, (c * THREADS + threadIdx.x) * 8, v[c]);
    }
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c)
      if ((c * THREADS + threadIdx.x) * 8 >= d)
#pragma unroll
        for (int i = 0; i < 8; ++i) v[c][i] = 0.f;
  }

  static __device__ __forceinline__ void copy(uint32_t to, const void *from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;\n" ::"r"(to), "l"(from) : "memory");
  }
};
__device__ __forceinline__ void sent() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }
// The oldest of so many rows is there, for the whole warp.
__device__ __forceinline__ void arrived(int stages) {
  if (stages == 1) asm volatile("cp.async.wait_group 0;\n" ::: "memory");
  else asm volatile("cp.async.wait_group 1;\n" ::: "memory");
  __syncwarp();
}

// Sums of N values over the block, given to every thread, always in the same order. Of two `shared` in turn, of
// kSums<N, THREADS> values, the other one is free again behind the barrier: one a sum is enough.
template <int N, int THREADS> constexpr int kSums = N * ((THREADS / 32 + 3) / 4 * 4);
template <int N, int THREADS> __device__ __forceinline__ void sum_row(float (&v)[N], float *shared) {
  constexpr int kWarps = THREADS / 32, kPad = kSums<1, THREADS>;
#pragma unroll
  for (int i = 0; i < N; ++i)
#pragma unroll
    for (int offset = 16; offset > 0; offset >>= 1) v[i] += __shfl_xor_sync(~0u, v[i], offset);
  if ((threadIdx.x & 31) == 0)
#pragma unroll
    for (int i = 0; i < N; ++i) shared[i * kPad + threadIdx.x / 32] = v[i];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < N; ++i) {
    float part[kPad];
#pragma unroll
    for (int w = 0; w < kPad; w += 4) {
      const float4 four = *reinterpret_cast<const float4 *>(shared + i * kPad + w);
      part[w] = four.x, part[w + 1] = four.y, part[w + 2] = four.z, part[w + 3] = four.w;
    }
    v[i] = part[0];
#pragma unroll
    for (int w = 1; w < kWarps; ++w) v[i] += part[w];
  }
}

// Takes the mean off a row; what lies past its end stays 0.
template <int THREADS>
__device__ __forceinline__ void centre(float unit, int d, float (&v)[CHUNKS][8], float *shared) {
  float sum[1] = {0.f};
#pragma unroll
  for (int c = 0; c < CHUNKS; ++c)
#pragma unroll
    for (int i = 0; i < 8; ++i) sum[0] += v[c][i];
  sum_row<1, THREADS>(sum, shared);
  const float mean = sum[0] * unit;
#pragma unroll
  for (int c = 0; c < CHUNKS; ++c) {
    const float off = (c * THREADS + threadIdx.x) * 8 < d ? mean : 0.f;
#pragma unroll
    for (int i = 0; i < 8; ++i) v[c][i] -= off;
  }
}

// A thread's part of a vector, plus a number.
template <int THREADS>
__device__ __forceinline__ void load_vector(In t, long vector, int d, float plus, float (&v)[CHUNKS][8]) {
#pragma unroll
  for (int c = 0; c < CHUNKS; ++c) {
    const int column = (c * THREADS + threadIdx.x) * 8;
#pragma unroll
    for (int i = 0; i < 8; ++i) v[c][i] = 0.f;
    if (column < d) load8(t, vector * d + column, v[c]);
#pragma unroll
    for (int i = 0; i < 8; ++i) v[c][i] += plus;
  }
}

template <int THREADS>
__device__ __forceinline__ void store_row(Out t, int row, int d, const float (&v)[CHUNKS][8]) {
#pragma unroll
  for (int c = 0; c < CHUNKS; ++c) {
    const int column = (c * THREADS + threadIdx.x) * 8;
    if (column < d) store8(t, static_cast<long>(row) * d + column, v[c]);
  }
}

// Where a branch joins the stream. `gate` has one row for every `span` rows, or is null: 1.
struct Branch {
  In gate;
  In in;   // forward: the branch
  Out out; // forward: the sum; backward: the branch's gradient
  int span;
};

// The gate of a row, read anew for each: it stays in the first cache, and registers are short.
template <int THREADS>
__device__ __forceinline__ void load_gate(const Branch &branch, int row, int d, float (&v)[CHUNKS][8]) {
  load_vector<THREADS>(branch.gate, row / branch.span, d, 0.f, v);
}

extern __shared__ __align__(16) char staged[];

template <bool LAYER, bool ROPE, bool RESIDUAL, int THREADS>
__device__ __forceinline__ void norm_forward(In x, In a, In b, int span, float one, Rotary rotary, Branch branch, Out y,
                                             int rows, int d, float eps, int stages) {
  using Rows = Staged<THREADS>;
  __shared__ __align__(16) float sums[2][kSums<1, THREADS>];
  const int of_branch = Rows::size(x), size = of_branch + (RESIDUAL ? Rows::size(branch.in) : 0), step = gridDim.x;
  const float unit = 1.f / d;
  const auto fetch = [&](int row, int stage) {
    if (row < rows) {
      Rows::fetch(x, row, d, staged + stage * size);
      if (RESIDUAL) Rows::fetch(branch.in, row, d, staged + stage * size + of_branch);
    }
    sent();
  };
  Turn<ROPE, THREADS> turn(rotary);
  int row = blockIdx.x, stage = 0, place = 0;
  for (int s = 0; s < stages; ++s) fetch(row + s * step, s);
  int held = -1;
  float f[CHUNKS][8], g[LAYER ? CHUNKS : 1][8], v[CHUNKS][8];
  for (; row < rows; row += step) {
    arrived(stages);
    Rows::read(x, d, staged + stage * size, v);
    if (RESIDUAL) {
      float more[CHUNKS][8], gate[CHUNKS][8];
      Rows::read(branch.in, d, staged + stage * size + of_branch, more);
      if (branch.gate.data) load_gate<THREADS>(branch, row, d, gate);
#pragma unroll
      for (int c = 0; c < CHUNKS; ++c)
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const float sum = branch.gate.data ? fmaf(more[c][i], gate[c][i], v[c][i]) : v[c][i] + more[c][i];
          v[c][i] = held_as(branch.out.dtype, sum);
        }
      store_row<THREADS>(branch.out, row, d, v);
    }
    const int vector = span == 0 ? 0 : row / span;
    if (vector != held) {
      held = vector;
      load_vector<THREADS>(a, vector, d, one, f);
      if constexpr (LAYER) load_vector<THREADS>(b, vector, d, 0.f, g);
    }
    if (LAYER) centre<THREADS>(unit, d, v, sums[0]), place = 1;
    float square[1] = {0.f};
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c)
#pragma unroll
      for (int i = 0; i < 8; ++i) square[0] += v[c][i] * v[c][i];
    sum_row<1, THREADS>(square, sums[place]);
    place ^= 1;
    // What the stage held has been used: another row may come.
    fetch(row + stages * step, stage);
    stage = stages - 1 - stage;
    const float rstd = rsqrtf(fmaf(square[0], unit, eps));
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c)
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float xhat = v[c][i] * rstd;
        v[c][i] = LAYER ? fmaf(xhat, f[c][i], g[LAYER ? c : 0][i]) : xhat * f[c][i];
      }
    turn.row(1.f, d, v);
    store_row<THREADS>(y, row, d, v);
  }
}

template <bool LAYER, bool ROPE, bool RESIDUAL, int THREADS>
__device__ __forceinline__ void norm_backward(In x, In a, int span, float one, Rotary rotary, In dy, In dres,
                                              Branch branch, Out dx, int rows, int d, float eps, int stages) {
  using Rows = Staged<THREADS>;
  constexpr int N = LAYER ? 3 : 2;
  __shared__ __align__(16) float sums[2][kSums<N, THREADS>];
  const int of_dy = Rows::size(x), of_dres = of_dy + Rows::size(dy), size = of_dres + Rows::size(dres);
  const int step = gridDim.x;
  const float unit = 1.f / d;
  const auto fetch = [&](int row, int stage) {
    if (row < rows) {
      const char *const to = staged + stage * size;
      Rows::fetch(x, row, d, to);
      Rows::fetch(dy, row, d, to + of_dy);
      if (dres.data) Rows::fetch(dres, row, d, to + of_dres);
    }
    sent();
  };
  Turn<ROPE, THREADS> turn(rotary);
  int row = blockIdx.x, stage = 0, place = 0;
  for (int s = 0; s < stages; ++s) fetch(row + s * step, s);
  int held = -1;
  float f[CHUNKS][8], v[CHUNKS][8], g[CHUNKS][8];
  for (; row < rows; row += step) {
    arrived(stages);
    const char *const places = staged + stage * size;
    Rows::read(x, d, places, v);
    Rows::read(dy, d, places + of_dy, g);
    const int vector = span == 0 ? 0 : row / span;
    if (vector != held) {
      held = vector;
      load_vector<THREADS>(a, vector, d, one, f);
    }
    turn.row(-1.f, d, g);
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c)
#pragma unroll
      for (int i = 0; i < 8; ++i) g[c][i] *= f[c][i];
    if (LAYER) centre<THREADS>(unit, d, v, sums[0]), place = 1;
    float sum[N] = {};
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c)
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        sum[0] += v[c][i] * v[c][i];
        sum[1] += g[c][i] * v[c][i];
        if (LAYER) sum[N - 1] += g[c][i];
      }
    sum_row<N, THREADS>(sum, sums[place]);
    place ^= 1;
    const float rstd = rsqrtf(fmaf(sum[0], unit, eps));
    // dx = rstd * g - along * (x - mean) - off
    const float off = LAYER ? rstd * sum[N - 1] * unit : 0.f, along = sum[1] * unit * rstd * rstd * rstd;
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c)
#pragma unroll
      for (int i = 0; i < 8; ++i) g[c][i] = fmaf(rstd, g[c][i], fmaf(-along, v[c][i], -off));
    if (dres.data) {
      Rows::read(dres, d, places + of_dres, v);
#pragma unroll
      for (int c = 0; c < CHUNKS; ++c)
#pragma unroll
        for (int i = 0; i < 8; ++i) g[c][i] += v[c][i];
    }
    // What the stage held has been used by the whole warp: another row may come.
    __syncwarp();
    fetch(row + stages * step, stage);
    stage = stages - 1 - stage;
    store_row<THREADS>(dx, row, d, g);
    if (RESIDUAL) {
      if (branch.gate.data) load_gate<THREADS>(branch, row, d, v);
#pragma unroll
      for (int c = 0; c < CHUNKS; ++c)
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const float held = held_as(dx.dtype, g[c][i]);
          g[c][i] = branch.gate.data ? held * v[c][i] : held;
        }
      store_row<THREADS>(branch.out, row, d, g);
    }
  }
}

} // namespace wan

// Registers for as many blocks as have 640 threads together, or one.
#define FORWARD(NAME, LAYER, ROPE, RESIDUAL, THREADS)                                                                  \
  extern "C" __global__ void __launch_bounds__(THREADS, THREADS > 640 / 2 ? 1 : 640 / THREADS)                         \
      NAME##_fwd_##THREADS(wan::In x, wan::In a, wan::In b, int span, float one, wan::Rotary rotary,                   \
                           wan::Branch branch, wan::Out y, int rows, int d, float eps, int stages) {                   \
    wan::norm_forward<LAYER, ROPE, RESIDUAL, THREADS>(x, a, b, span, one, rotary, branch, y, rows, d, eps, stages);    \
  }
#define BACKWARD(NAME, LAYER, ROPE, RESIDUAL, THREADS)                                                                 \
  extern "C" __global__ void __launch_bounds__(THREADS, THREADS > 640 / 2 ? 1 : 640 / THREADS)                         \
      NAME##_bwd_##THREADS(wan::In x, wan::In a, int span, float one, wan::Rotary rotary, wan::In dy, wan::In dres,    \
                           wan::Branch branch, wan::Out dx, int rows, int d, float eps, int stages) {                  \
    wan::norm_backward<LAYER, ROPE, RESIDUAL, THREADS>(x, a, span, one, rotary, dy, dres, branch, dx, rows, d, eps,    \
                                                       stages);                                                        \
  }
#define BOTH(NAME, LAYER, ROPE, RESIDUAL, THREADS)                                                                     \
  FORWARD(NAME, LAYER, ROPE, RESIDUAL, THREADS) BACKWARD(NAME, LAYER, ROPE, RESIDUAL, THREADS)
#define NORM(THREADS)                                                                                                  \
  BOTH(layer, true, false, false, THREADS) BOTH(residual, true, false, true, THREADS)                                  \
  BOTH(rms, false, false, false, THREADS) BOTH(rms_rope, false, true, false, THREADS)
// Widths up to 1024 (tests), 2048 (1.3B), 3072 (5B), 5120 (14B), 8192.
NORM(64)
NORM(128)
NORM(192)
NORM(320)
NORM(512)
