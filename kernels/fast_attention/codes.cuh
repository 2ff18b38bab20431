// What the kernels of fast attention share: tiles of 8-bit codes as they lie in memory.
//
// Queries and keys, int8: [b, n, tile][128 rows][128 channels]. Values, e4m3: [b, n, tile][128 channels][128 keys], so that the
// inner index of every product runs along a row. A row is 128 bytes, its 16-byte chunks permuted by chunk ^ (row & 7): a tile
// lies in memory as it will in shared memory, 16 KB that one copy brings. Rows past the end are zeros.
//
// A lane that holds the scores of keys 2t, 2t+1, 8+2t, 8+2t+1 of sixteen needs, as rows of P for the next product, places
// 4t to 4t+3: keys lie in that order in a tile of values.
#pragma once
#include <stdint.h>

namespace wan {

constexpr int kCodeRows = 128; // rows of a tile of queries, keys of one of keys or values
constexpr int kCodeHead = 128; // channels
constexpr int kCodeBytes = kCodeRows * kCodeHead;
// Probabilities are at most 1; times 2^8 they use e4m3's range up to 256.
constexpr float kCodeLift = 8.f;

// Four values as e4m3 codes, `a` in the lowest byte; beyond +-448 the largest code. Cards before sm_89 never ask for it.
__device__ __forceinline__ uint32_t pack_e4m3(float a, float b, float c, float d) {
  uint32_t codes = 0;
#if __CUDA_ARCH__ >= 890
  asm("{\n.reg .b16 lo, hi;\n"
      "cvt.rn.satfinite.e4m3x2.f32 lo, %2, %1;\n"
      "cvt.rn.satfinite.e4m3x2.f32 hi, %4, %3;\n"
      "mov.b32 %0, {lo, hi};\n}\n"
      : "=r"(codes)
      : "f"(a), "f"(b), "f"(c), "f"(d));
#endif
  return codes;
}

} // namespace wan
