// What lies between the convolutions: the channel norm, and the ways into and out of the layout they work in,
// [b, frames, rows, columns, channels] with channels filled up with zeros to `pitch`, a multiple of 32. Bound by memory.
#include "../common/mma.cuh"
#include "../common/vector.cuh"

namespace wan {

// y = x / max(|x|, 1e-12) * root * gamma over the channels of a position, then y * sigmoid(y) where asked. LANES threads
// share a position, each with every LANES-th group of 8 channels; at most 4 groups a thread, kept in registers. Zeros
// behind channel `c` stay zeros.
template <int LANES>
__device__ __forceinline__ void channel_norm(In x, In gamma, Out y, long rows, int c, int pitch, float root, int silu) {
  const int lane = threadIdx.x % LANES;
  const long row = static_cast<long>(blockIdx.x) * (blockDim.x / LANES) + threadIdx.x / LANES;
  if (row >= rows) return; // a group leaves as a whole, and only groups exchange values
  const unsigned group = LANES == 32 ? ~0u : ((1u << LANES) - 1) << ((threadIdx.x & 31) / LANES * LANES);
  float v[4][8], sum = 0.f;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int at = (lane + i * LANES) * 8;
    if (at >= pitch) break;
    load8(x, row * pitch + at, v[i]);
#pragma unroll
    for (int k = 0; k < 8; ++k) sum = fmaf(v[i][k], v[i][k], sum);
  }
#pragma unroll
  for (int offset = LANES / 2; offset > 0; offset >>= 1) sum += __shfl_xor_sync(group, sum, offset);
  const float scale = root / fmaxf(sqrtf(sum), 1e-12f);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int at = (lane + i * LANES) * 8;
    if (at >= pitch) break;
    float g[8];
    load8(gamma, at, c, g);
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      const float u = v[i][k] * scale * g[k];
      v[i][k] = silu ? u / (1.f + __expf(-u)) : u;
    }
    store8(y, row * pitch + at, v[i]);
  }
}

} // namespace wan

#define WAN_CHANNEL_NORM(LANES)                                                                                        \
  extern "C" __global__ void channel_norm_##LANES(wan::In x, wan::In gamma, wan::Out y, long rows, int c, int pitch,   \
                                                  float root, int silu) {                                              \
    wan::channel_norm<LANES>(x, gamma, y, rows, c, pitch, root, silu);                                                 \
  }
WAN_CHANNEL_NORM(4)
WAN_CHANNEL_NORM(8)
WAN_CHANNEL_NORM(16)
WAN_CHANNEL_NORM(32)

// [b, c, positions] to [b, positions, pitch]. A thread moves 8 channels of a position; neighbours in a warp are
// neighbours in space.
extern "C" __global__ void into_last(wan::In x, wan::Out y, int c, int pitch, long positions, long n) {
  const long id = static_cast<long>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (id >= n) return;
  const long at = id % positions, rest = id / positions;
  const int first = static_cast<int>(rest % (pitch / 8)) * 8;
  const long b = rest / (pitch / 8);
  float v[8];
#pragma unroll
  for (int k = 0; k < 8; ++k) v[k] = first + k < c ? wan::load1(x, (b * c + first + k) * positions + at) : 0.f;
  wan::store8(y, (b * positions + at) * pitch + first, v);
}

// The reverse; samples of x lie `batch` elements apart.
extern "C" __global__ void from_last(wan::In x, wan::Out y, int c, int pitch, long positions, long batch, long n) {
  const long id = static_cast<long>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (id >= n) return;
  const int groups = (c + 7) / 8;
  const long at = id % positions, rest = id / positions;
  const int first = static_cast<int>(rest % groups) * 8;
  const long b = rest / groups;
  float v[8];
  wan::load8(x, b * batch + at * pitch + first, v);
#pragma unroll
  for (int k = 0; k < 8; ++k)
    if (first + k < c) wan::store1(y, (b * c + first + k) * positions + at, v[k]);
}

// Pixels [b, c, f, y, x] to windows [b, f, y, x, 32]: all taps (row, column, channel) of a 2-D kernel that fit into 32
// values, so that a first layer of 3 channels does not pay for 32.
extern "C" __global__ void windows(wan::In x, wan::Out y, int c, int frames, int rows, int columns, int ky, int kx,
                                   int pad_y, int pad_x, long n) {
  const long id = static_cast<long>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (id >= n) return;
  const int col = static_cast<int>(id % columns);
  const long line = id / columns;
  const int row = static_cast<int>(line % rows);
  const long bf = line / rows;
  const long b = bf / frames, f = bf % frames;
  const long plane = static_cast<long>(rows) * columns;
  int i = 0, j = 0, ch = 0; // of the next tap
#pragma unroll
  for (int g = 0; g < 4; ++g) {
    float v[8];
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      const int yy = row + i - pad_y, xx = col + j - pad_x;
      const bool inside = i < ky && yy >= 0 && yy < rows && xx >= 0 && xx < columns;
      v[k] = inside ? wan::load1(x, ((b * c + ch) * frames + f) * plane + static_cast<long>(yy) * columns + xx) : 0.f;
      if (++ch == c) {
        ch = 0;
        if (++j == kx) j = 0, ++i;
      }
    }
    wan::store8(y, id * 32 + g * 8, v);
  }
}

// [b·f, positions, 2·pitch] to [b·f, 2, positions, pitch]: the halves of the channels become neighbouring frames.
// 16-bit values, 8 a thread.
extern "C" __global__ void halves(const uint4 *x, uint4 *y, int chunks, long positions, long n) {
  const long id = static_cast<long>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (id >= n) return;
  const int chunk = static_cast<int>(id % chunks);
  const long rest = id / chunks, at = rest % positions, frame = rest / positions;
  y[id] = x[((frame / 2 * positions + at) * 2 + frame % 2) * chunks + chunk];
}

// Some frames of each sample, 16 bytes a thread: `each` pieces a sample, samples of x `batch` pieces apart.
extern "C" __global__ void copy_frames(const uint4 *x, uint4 *y, long each, long batch, long n) {
  const long id = static_cast<long>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (id < n) y[id] = x[id / each * batch + id % each];
}
