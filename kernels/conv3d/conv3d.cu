// Causal 3-D convolution as an implicit matrix product on tensor cores: rows are output positions, columns output
// channels, the inner axis is (frame tap, 32 channels, row tap, column tap).
//
// Activations lie channels-last, [b, frames, rows, columns, channels], channels filled up with zeros to a multiple of 32.
// A block computes TY x 16 positions of one output frame by BN channels. For each frame tap and each 32 channels it loads
// the patch of input that all row and column taps read, (TY + 2) x 18 positions, once: a tap is then nothing but another
// first row in shared memory. Loaded tap by tap, the same input would cross L2 nine times, which L2 cannot keep up with
// (36 bytes a clock and multiprocessor at full rate, where it gives about 24). Between two barriers a block computes TAPS
// taps: one, or a row of three. Their weights, BN x 32 each, stream through a ring of STAGES.
//
// With a stride the patch is one of stride^2 phases, positions of equal remainder, so that the rows a matrix load reads
// are neighbours again. `up` reads the input as if every position were repeated 2 x 2. Frames before the stream's
// beginning are zero: their taps are left out.
#include "../common/mma.cuh"
#include "../common/vector.cuh"

namespace wan {

struct ConvInput {
  const void *x;            // frames 0 .. of this call
  const void *past[3];      // frames before them, oldest first
  long batch;               // elements between two samples of x
};

struct ConvSizes {
  int f, y, x, c;           // input as stored; c filled up
  int f_out, y_out, x_out, o;
  int biases;               // channels that have a bias: those that are not filled up
};

struct ConvTaps {
  int kt, ky, kx;
  int step_f, step;         // step: in rows and columns
  int pad_front, pad_y, pad_x;
  int past;                 // how many frames of `past` there are
  int up;
};

struct ConvShape : ConvSizes, ConvTaps {
  __device__ ConvShape(const ConvSizes &sizes, const ConvTaps &taps) : ConvSizes(sizes), ConvTaps(taps) {}
};

constexpr int kBC = 32;     // channels a patch
constexpr int kTX = 16;     // columns of a tile: one ldmatrix row group is 16 neighbours in x
constexpr int kPX = kTX + 2;
constexpr int kRow = kBC * 2;
constexpr int kMaxTaps = 9, kMaxPhases = 4;

// 64-byte rows: two of them span the banks once, so the swizzle changes every second row.
__device__ __forceinline__ uint32_t row_chunk(int row, int chunk) {
  return static_cast<uint32_t>(row * kRow + ((chunk ^ ((row >> 1) & 3)) << 4));
}

template <typename T, int TY, int BN, int WARPS_M, int WARPS_N, int TAPS, int STAGES> struct Conv {
  static constexpr int kThreads = WARPS_M * WARPS_N * 32;
  static constexpr int kMT = TY / WARPS_M, kWN = BN / WARPS_N, kNT = kWN / 8;
  static constexpr int kPatchRows = (TY + 2) * kPX;
  static constexpr int kPatchBytes = kPatchRows * kRow, kTapBytes = BN * kRow, kWeightBytes = TAPS * kTapBytes;
  static constexpr int kPitch = kWN + 4; // floats of a staged row
  static constexpr int kStageBytes = WARPS_M * WARPS_N * 16 * kPitch * 4;
  static constexpr int kTableBytes = (kMaxPhases * kPatchRows + kMaxTaps) * 4;
  static constexpr int kLoopBytes = 2 * kPatchBytes + STAGES * kWeightBytes + kTableBytes;
  static constexpr int kSlices = (kPatchRows * 4 + kThreads - 1) / kThreads; // copies of a patch by one thread
  static constexpr int kSpread = 6 / TAPS; // steps that issue them
  static constexpr int kSlicesAStep = (kSlices + kSpread - 1) / kSpread;
  static constexpr int kShared = kLoopBytes > kStageBytes ? kLoopBytes : kStageBytes;
  static_assert(TY % WARPS_M == 0 && kWN % 16 == 0, "whole matrix tiles");
  static_assert(kMaxTaps / TAPS - kSpread >= STAGES - 2, "a patch whose copies are issued with six taps is there in time");

  const ConvInput &in;
  const ConvShape &s;
  const T *weight;
  char *memory;
  int f0, y0, x0, n0, b;

  // Where each row of a patch lies in a frame, for every phase (-1: outside, zero; -2: no tap reads it), and the taps in
  // the order in which they are computed: first row in the patch, place among the weight's taps, last of its patch.
  __device__ __forceinline__ void fill_tables(int *offsets, int *taps) const {
    const int phases_x = min(s.step, s.kx), phases = phases_x * min(s.step, s.ky);
    for (int k = threadIdx.x; k < phases * kPatchRows; k += kThreads) {
      const int phase = k / kPatchRows, row = k - phase * kPatchRows;
      const int py = phase / phases_x, px = phase - py * phases_x;
      const int ry = row / kPX, rx = row - ry * kPX;
      const bool read = ry < TY + (s.ky - py - 1) / s.step && rx < kTX + (s.kx - px - 1) / s.step;
      const int y = (y0 + ry) * s.step + py - s.pad_y, x = (x0 + rx) * s.step + px - s.pad_x;
      const bool inside = y >= 0 && y < s.y << s.up && x >= 0 && x < s.x << s.up;
      offsets[k] = !read ? -2 : inside ? ((y >> s.up) * s.x + (x >> s.up)) * s.c : -1;
    }
    if (threadIdx.x != 0) return;
    int n = 0;
    for (int py = 0; py < min(s.step, s.ky); ++py)
      for (int px = 0; px < phases_x; ++px) {
        for (int i = py; i < s.ky; i += s.step)
          for (int j = px; j < s.kx; j += s.step) taps[n++] = (i * s.kx + j) << 16 | (i / s.step * kPX + j / s.step);
        taps[n - 1] |= 1 << 15;
      }
  }

  // Frame `i` of those before and in this call.
  __device__ __forceinline__ const T *frame(int i) const {
    const long size = static_cast<long>(s.y) * s.x * s.c;
    return i < s.past ? static_cast<const T *>(in.past[i]) + b * size
                      : static_cast<const T *>(in.x) + b * in.batch + (i - s.past) * size;
  }

  __device__ __forceinline__ void load_slice(uint32_t patch, const T *src, const int *offsets, int k) const {
    if (k >= kPatchRows * 4) return;
    const int row = k >> 2, chunk = k & 3, offset = offsets[row];
    if (offset != -2) cp_async16(patch + row_chunk(row, chunk), src + max(offset, 0) + chunk * 8, offset >= 0);
  }

  __device__ __forceinline__ void load_weight(uint32_t dst, const T *src) const {
#pragma unroll
    for (int i = 0; i < (BN * 4 + kThreads - 1) / kThreads; ++i) {
      const int k = threadIdx.x + i * kThreads, row = k >> 2, chunk = k & 3;
      if (k >= BN * 4) break;
      const bool valid = n0 + row < s.o;
      cp_async16(dst + row_chunk(row, chunk), src + (valid ? row * s.c + chunk * 8 : 0), valid);
    }
  }

  __device__ __forceinline__ void products(uint32_t patch, uint32_t tile, int first_row, int warp_m, int warp_n,
                                           float (&acc)[kMT][kNT][4]) const {
    const int lane = threadIdx.x & 31;
    const int first = warp_m * kMT * kPX + first_row + (lane & 15);
    const int n = warp_n * kWN + (lane & 7) + ((lane >> 4) << 3);
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      uint32_t w[kNT / 2][4];
#pragma unroll
      for (int j = 0; j < kNT / 2; ++j) ldmatrix4(w[j], tile + row_chunk(n + j * 16, k * 2 + ((lane >> 3) & 1)));
#pragma unroll
      for (int i = 0; i < kMT; ++i) {
        uint32_t a[4];
        ldmatrix4(a, patch + row_chunk(first + i * kPX, k * 2 + (lane >> 4)));
#pragma unroll
        for (int j = 0; j < kNT; ++j) Half16<T>::mma(acc[i][j], a, w[j / 2][j % 2 * 2], w[j / 2][j % 2 * 2 + 1]);
      }
    }
  }

  // Sums + bias (+ add), rounded once. A warp's rows pass through shared memory, so that 16 bytes go out at a time.
  __device__ __forceinline__ void store(In bias, const T *add, T *out, int warp_m, int warp_n,
                                        const float (&acc)[kMT][kNT][4]) const {
    const int lane = threadIdx.x & 31;
    float *stage = reinterpret_cast<float *>(memory) + (threadIdx.x / 32) * 16 * kPitch;
#pragma unroll
    for (int i = 0; i < kMT; ++i) {
      __syncwarp();
#pragma unroll
      for (int j = 0; j < kNT; ++j) {
        float *at = stage + (lane >> 2) * kPitch + j * 8 + (lane & 3) * 2;
        *reinterpret_cast<float2 *>(at) = make_float2(acc[i][j][0], acc[i][j][1]);
        *reinterpret_cast<float2 *>(at + 8 * kPitch) = make_float2(acc[i][j][2], acc[i][j][3]);
      }
      __syncwarp();
      const int y = y0 + warp_m * kMT + i;
      if (y >= s.y_out) continue;
      const long line = ((static_cast<long>(b) * s.f_out + f0) * s.y_out + y) * s.x_out;
      for (int k = lane; k < 16 * kNT; k += 32) {
        const int row = k / kNT, j = k - row * kNT;
        const int n = n0 + warp_n * kWN + j * 8;
        if (x0 + row >= s.x_out || n >= s.o) continue;
        const long at = (line + x0 + row) * s.o + n;
        const float4 *from = reinterpret_cast<const float4 *>(stage + row * kPitch + j * 8);
        const float4 lo = from[0], hi = from[1];
        float v[8] = {lo.x, lo.y, lo.z, lo.w, hi.x, hi.y, hi.z, hi.w};
        float u[8];
        load8(bias, n, s.biases, u);
#pragma unroll
        for (int q = 0; q < 8; ++q) v[q] += u[q];
        if (add) {
          const uint4 raw = *reinterpret_cast<const uint4 *>(add + at);
          const uint32_t pairs[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
          for (int q = 0; q < 4; ++q) {
            const float2 w = Half16<T>::unpack(pairs[q]);
            v[2 * q] += w.x, v[2 * q + 1] += w.y;
          }
        }
        *reinterpret_cast<uint4 *>(out + at) =
            make_uint4(Half16<T>::pack(v[0], v[1]), Half16<T>::pack(v[2], v[3]), Half16<T>::pack(v[4], v[5]),
                       Half16<T>::pack(v[6], v[7]));
      }
    }
  }

  __device__ __forceinline__ void run(In bias, const T *add, T *out) const {
    const int warp = threadIdx.x / 32, warp_m = warp / WARPS_N, warp_n = warp % WARPS_N;
    float acc[kMT][kNT][4];
#pragma unroll
    for (int i = 0; i < kMT; ++i)
#pragma unroll
      for (int j = 0; j < kNT; ++j)
#pragma unroll
        for (int k = 0; k < 4; ++k) acc[i][j][k] = 0.f;

    const int zeros = s.pad_front - s.past, f = f0 * s.step_f - zeros;
    const int first_t = max(0, -f);
    if (first_t < s.kt) {
      int *offsets = reinterpret_cast<int *>(memory + 2 * kPatchBytes + STAGES * kWeightBytes);
      int *taps = offsets + kMaxPhases * kPatchRows;
      fill_tables(offsets, taps);
      __syncthreads();
      const int a_round = s.ky * s.kx, phases = min(s.step, s.ky) * min(s.step, s.kx);
      const int steps = (s.kt - first_t) * (s.c / kBC) * (a_round / TAPS);
      const uint32_t patches = smem_address(memory), weights = patches + 2 * kPatchBytes;
      const long tap_size = static_cast<long>(s.o) * s.c;

      // The patch to be loaded next: its frame tap, channels, phase.
      int patch_t = first_t, patch_c = 0, phase = 0;
      const T *patch_src = frame(f + first_t);
      const auto next_patch = [&]() {
        if (++phase < phases) return;
        phase = 0;
        if ((patch_c += kBC) < s.c) return;
        patch_c = 0;
        if (++patch_t < s.kt) patch_src = frame(f + patch_t);
      };
      // The weights to be loaded next: of the taps from `ahead` on, of a round over all taps of 32 channels.
      int ahead = 0, weight_c = 0;
      const T *weight_src = weight + first_t * a_round * tap_size + static_cast<long>(n0) * s.c;
      const auto next_weights = [&](uint32_t dst) {
#pragma unroll 1
        for (int i = 0; i < TAPS; ++i) // unrolled, it would take registers from the products
          load_weight(dst + i * kTapBytes, weight_src + (taps[ahead + i] >> 16) * tap_size);
        if ((ahead += TAPS) < a_round) return;
        ahead = 0;
        weight_c += kBC, weight_src += kBC;
        if (weight_c < s.c) return;
        weight_c = 0, weight_src += a_round * tap_size - s.c;
      };

      for (int k = threadIdx.x; k < kSlices * kThreads; k += kThreads) load_slice(patches, patch_src, offsets, k);
      next_patch();
#pragma unroll
      for (int i = 0; i < STAGES - 1; ++i) {
        if (i < steps) next_weights(weights + i * kWeightBytes);
        cp_async_commit();
      }
      // A patch is requested while the one before it is computed, a few copies with each step. Where a patch has few taps
      // all copies go out with the first, and everything is waited for.
      const bool shallow = a_round / phases < kMaxTaps;
      int slice = 0, patch = 0, slot = 0, free_slot = STAGES - 1, now = 0;
      for (int step = 0; step < steps; ++step) {
        const int tap = taps[now + TAPS - 1];
        if (shallow) cp_async_wait<0>();
        else cp_async_wait<STAGES - 2>();
        __syncthreads();
        if (slice < kSlices && patch_t < s.kt) {
          const uint32_t dst = patches + (patch ^ 1) * kPatchBytes;
          const int *rows = offsets + phase * kPatchRows, until = shallow ? kSlices : slice + kSlicesAStep;
          for (; slice < until; ++slice) load_slice(dst, patch_src + patch_c, rows, threadIdx.x + slice * kThreads);
        }
        if (step + STAGES - 1 < steps) next_weights(weights + free_slot * kWeightBytes);
        cp_async_commit();
#pragma unroll
        for (int i = 0; i < TAPS; ++i) {
          const int row = (i == TAPS - 1 ? tap : taps[now + i]) & 0x7fff;
          products(patches + patch * kPatchBytes, weights + slot * kWeightBytes + i * kTapBytes, row, warp_m, warp_n, acc);
        }
        if (tap & 0x8000) {
          patch ^= 1, slice = 0;
          next_patch();
        }
        now = now + TAPS == a_round ? 0 : now + TAPS;
        slot = slot + 1 == STAGES ? 0 : slot + 1;
        free_slot = free_slot + 1 == STAGES ? 0 : free_slot + 1;
      }
      cp_async_wait<0>();
      __syncthreads();
    }
    store(bias, add, out, warp_m, warp_n, acc);
  }
};

template <typename T, int TY, int BN, int WARPS_M, int WARPS_N, int TAPS, int STAGES>
__device__ __forceinline__ void conv(const ConvInput &in, const ConvSizes &sizes, const ConvTaps &taps,
                                     const void *weight, In bias, const void *add, void *out) {
  extern __shared__ __align__(128) char memory[];
  using Kernel = Conv<T, TY, BN, WARPS_M, WARPS_N, TAPS, STAGES>;
  const ConvShape s(sizes, taps);
  const int tiles_x = (s.x_out + kTX - 1) / kTX;
  const int tile_y = blockIdx.y / tiles_x;
  const Kernel kernel{in, s, static_cast<const T *>(weight), memory,
                      static_cast<int>(blockIdx.z) % s.f_out, tile_y * TY,
                      (static_cast<int>(blockIdx.y) - tile_y * tiles_x) * kTX, static_cast<int>(blockIdx.x) * BN,
                      static_cast<int>(blockIdx.z) / s.f_out};
  kernel.run(bias, static_cast<const T *>(add), static_cast<T *>(out));
}

} // namespace wan

#define WAN_CONV_OF(NAME, T, TY, BN, WM, WN, TAPS, STAGES)                                                             \
  extern "C" __global__ void __launch_bounds__(WM *WN * 32, 2)                                                         \
      NAME(const __grid_constant__ wan::ConvInput in, const __grid_constant__ wan::ConvSizes sizes,                    \
           const __grid_constant__ wan::ConvTaps taps, const void *weight, wan::In bias, const void *add,              \
           void *out) {                                                                                                \
    wan::conv<T, TY, BN, WM, WN, TAPS, STAGES>(in, sizes, taps, weight, bias, add, out);                               \
  }
#define WAN_CONV(NAME, TY, BN, WM, WN, TAPS, STAGES)                                                                   \
  WAN_CONV_OF(NAME##_bf16, __nv_bfloat16, TY, BN, WM, WN, TAPS, STAGES)                                                \
  WAN_CONV_OF(NAME##_f16, __half, TY, BN, WM, WN, TAPS, STAGES)

// As cuda.rs has them. Those of a row take kernels three columns wide without a stride.
WAN_CONV(conv_96, 16, 96, 4, 2, 1, 4)
WAN_CONV(conv_96_row, 16, 96, 4, 1, 3, 2)
WAN_CONV(conv_32, 16, 32, 8, 1, 1, 4)
WAN_CONV(conv_32_row, 16, 32, 8, 1, 3, 2)
