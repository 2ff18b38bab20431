// Latent video [b, c, f, y, x] and tokens [b, l, patch]: data is moved as 2- or 4-byte words. One value a thread,
// threads along the tokens' fastest axis. A few megabytes once a step: not worth more.
#include <stdint.h>

namespace wan {

struct Grid {
  int b, c, f, y, x;    // of the latent
  int pf, py, px;       // patch
  int channel_first;    // 1: (c, pf, py, px) within a token, 0: (pf, py, px, c)
};

// Position in the latent of position `at` of the tokens.
__device__ __forceinline__ long latent_at(const Grid &g, long at) {
  const int volume = g.pf * g.py * g.px, width = volume * g.c;
  const int gf = g.f / g.pf, gy = g.y / g.py, gx = g.x / g.px;
  long token = at / width;
  int within = static_cast<int>(at - token * width), c, cell;
  if (g.channel_first) c = within / volume, cell = within % volume;
  else c = within % g.c, cell = within / g.c;
  const int dx = cell % g.px, dy = cell / g.px % g.py, df = cell / (g.px * g.py);
  const int x = static_cast<int>(token % gx) * g.px + dx;
  token /= gx;
  const int y = static_cast<int>(token % gy) * g.py + dy;
  token /= gy;
  const int f = static_cast<int>(token % gf) * g.pf + df;
  const long b = token / gf;
  return (((b * g.c + c) * g.f + f) * g.y + y) * g.x + x;
}

template <typename T> __device__ __forceinline__ void move(const T *from, T *to, const Grid &g, int to_tokens, long n) {
  const long at = static_cast<long>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (at >= n) return;
  const long latent = latent_at(g, at);
  if (to_tokens) to[at] = from[latent];
  else to[latent] = from[at];
}

} // namespace wan

extern "C" __global__ void patch_16(const uint16_t *from, uint16_t *to, wan::Grid g, int to_tokens, long n) {
  wan::move(from, to, g, to_tokens, n);
}
extern "C" __global__ void patch_32(const uint32_t *from, uint32_t *to, wan::Grid g, int to_tokens, long n) {
  wan::move(from, to, g, to_tokens, n);
}
