// Hopper's own instructions (sm_90a): asynchronous matrix products of a warpgroup (wgmma), the bulk tensor copy engine
// (TMA) completing on mbarriers, and moving registers between warpgroups. Included by `*_sm90a.cu` files only.
//
// Shared-memory tiles are [rows][64] of 16-bit values: rows of 128 bytes, 16-byte chunks permuted by chunk ^ (row & 7)
// (the copy engine's and wgmma's 128-byte swizzle), each tile on a 1024-byte boundary. A row of HEAD values is HEAD/64
// such tiles ("panels") behind each other.
#pragma once
#include "mma.cuh"

namespace wan {

// ---- mbarriers: a phase ends when its arrivals and its promised bytes are in; waiting names the phase by its parity.

__device__ __forceinline__ void barrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(barrier), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory");
}
__device__ __forceinline__ void barrier_expect(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void barrier_wait(uint32_t barrier, int parity) {
  asm volatile("{\n"
               ".reg .pred done;\n"
               "again:\n"
               "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
               "@done bra ready;\n"
               "bra again;\n"
               "ready:\n"
               "}\n" ::"r"(barrier),
               "r"(parity)
               : "memory");
}

// ---- named barriers among a part of the block (0 is __syncthreads).

template <int THREADS> __device__ __forceinline__ void named_sync(int id) {
  asm volatile("bar.sync %0, %1;\n" ::"r"(id), "n"(THREADS) : "memory");
}
template <int THREADS> __device__ __forceinline__ void named_arrive(int id) {
  asm volatile("bar.arrive %0, %1;\n" ::"r"(id), "n"(THREADS) : "memory");
}

// ---- the copy engine. A map is a CUtensorMap of [b, l, n, h] with boxes of [1, ROWS, 1, 64]; what lies outside the
// tensor is read as zeros and not written.

struct alignas(64) TensorMap {
  unsigned char opaque[128];
};

__device__ __forceinline__ void tensor_prefetch(const TensorMap *map) {
  asm volatile("prefetch.tensormap [%0];\n" ::"l"(map) : "memory");
}
__device__ __forceinline__ void tensor_load(uint32_t dst, const TensorMap *map, uint32_t barrier, int h, int n, int l,
                                            int b) {
  asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], "
               "[%1, {%3, %4, %5, %6}], [%2];\n" ::"r"(dst),
               "l"(map), "r"(barrier), "r"(h), "r"(n), "r"(l), "r"(b)
               : "memory");
}
__device__ __forceinline__ void tensor_store(uint32_t src, const TensorMap *map, int h, int n, int l, int b) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%1, {%2, %3, %4, %5}], [%0];\n" ::"r"(src),
               "l"(map), "r"(h), "r"(n), "r"(l), "r"(b)
               : "memory");
}
// `bytes` (a multiple of 16) from 16-byte aligned global memory.
__device__ __forceinline__ void bulk_load(uint32_t dst, const void *src, int bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];\n" ::"r"(dst),
               "l"(src), "r"(bytes), "r"(barrier)
               : "memory");
}
// Until this thread's stores have read their shared memory.
__device__ __forceinline__ void bulk_store_wait() {
  asm volatile("cp.async.bulk.commit_group;\ncp.async.bulk.wait_group.read 0;\n" ::: "memory");
}
// Ordinary writes to shared memory before this are seen by the copy engine and by wgmma after it (and a barrier).
__device__ __forceinline__ void async_fence() { asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory"); }

__device__ __forceinline__ void stmatrix4(uint32_t address, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};\n" ::"r"(address), "r"(r0), "r"(r1),
               "r"(r2), "r"(r3)
               : "memory");
}

__device__ __forceinline__ float2 load_shared2(uint32_t address) {
  float2 v;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];\n" : "=f"(v.x), "=f"(v.y) : "r"(address));
  return v;
}

// ---- registers: a warpgroup takes what others have given back.

template <int N> __device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(N));
}
template <int N> __device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(N));
}

// ---- wgmma.

// Descriptor of an operand of panels. K-major (the product's inner index runs along a row): `panel` is ignored, one
// step of 16 is 32 bytes. MN-major (it runs over rows): `panel` is the distance between panels, a step is 2048 bytes.
__device__ __forceinline__ uint64_t operand(uint32_t address, uint32_t panel) {
  return static_cast<uint64_t>((address & 0x3ffff) >> 4) | static_cast<uint64_t>(panel >> 4) << 16 |
         static_cast<uint64_t>(1024 >> 4) << 32 | static_cast<uint64_t>(1) << 62;
}

// The same descriptor, but not known to the compiler: it would keep that of every step in registers across the loop.
__device__ __forceinline__ uint64_t fresh(uint64_t operand) {
  uint32_t low = static_cast<uint32_t>(operand);
  asm volatile("" : "+r"(low));
  return (operand & 0xffffffff00000000ull) | low;
}

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory"); }
// Until all but the latest N groups are done.
template <int N> __device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(N) : "memory");
}
// The compiler must not move uses of these registers across this point: products write them behind its back.
template <int N> __device__ __forceinline__ void pin(float (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i])::"memory");
}
template <int N> __device__ __forceinline__ void pin(uint32_t (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+r"(d[i])::"memory");
}

#define WAN_IO4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define WAN_IO8(d, i) WAN_IO4(d, i), WAN_IO4(d, i + 4)
#define WAN_IO32(d, i) WAN_IO8(d, i), WAN_IO8(d, i + 8), WAN_IO8(d, i + 16), WAN_IO8(d, i + 24)
#define WAN_IO64(d) WAN_IO32(d, 0), WAN_IO32(d, 32)
#define WAN_D32 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15" \
  ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define WAN_D64 \
  WAN_D32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

// D[64,N] = A[64,16] B[16,N] (+ D where `add`), fp32 sums. `ss`: both operands in shared memory; `rs`: A in registers,
// laid out as for mma.sync m16n8k16, a warp's 16 rows each. TA, TB: whether an operand is MN-major.
template <typename T> struct Wgmma;

#define WAN_WGMMA_SS(N, D, IO, COUNT, A, B, P, TA_AT, TB_AT, TYPE)                                                     \
  template <int TA, int TB>                                                                                            \
  static __device__ __forceinline__ void ss(float (&d)[COUNT], uint64_t a, uint64_t b, int add) {                      \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" P ", 0;\n"                                                      \
                 "wgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPE "." TYPE " {" D "}, %" A ", %" B                \
                 ", p, 1, 1, %" TA_AT ", %" TB_AT ";\n}\n"                                                             \
                 : IO                                                                                                  \
                 : "l"(a), "l"(b), "r"(add), "n"(TA), "n"(TB));                                                        \
  }
#define WAN_WGMMA(T, TYPE)                                                                                             \
  template <> struct Wgmma<T> {                                                                                        \
    WAN_WGMMA_SS("64", WAN_D32, WAN_IO32(d, 0), 32, "32", "33", "34", "35", "36", TYPE)                                \
    WAN_WGMMA_SS("128", WAN_D64, WAN_IO64(d), 64, "64", "65", "66", "67", "68", TYPE)                                  \
    template <int TB>                                                                                                  \
    static __device__ __forceinline__ void rs(float (&d)[64], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,      \
                                              uint64_t b) {                                                            \
      asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE " {" WAN_D64                           \
                   "}, {%64, %65, %66, %67}, %68, 1, 1, 1, %69;\n"                                                     \
                   : WAN_IO64(d)                                                                                       \
                   : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b), "n"(TB));                                             \
    }                                                                                                                  \
  };
WAN_WGMMA(__nv_bfloat16, "bf16")
WAN_WGMMA(__half, "f16")

// A warpgroup's [64,128] fp32 sums, every row times its factor (of a thread's two rows), leave in 16 bits through two panels of
// 64 x 64 in shared memory, for the rows of `map` from `row` on.
template <typename T>
__device__ __forceinline__ void store_rows(const float (&o)[64], const float (&factor)[2], uint32_t panels,
                                           const TensorMap *map, int head, int row, int batch, int group) {
  using H = Half16<T>;
  constexpr int kPanel = 64 * 128;
  const int lane = threadIdx.x & 31, warp = (threadIdx.x >> 5) & 3, own = warp * 16 + (lane & 15);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int chunk = 2 * (i & 3) + (lane >> 4);
    stmatrix4(panels + (i >> 2) * kPanel + own * 128 + ((chunk ^ (own & 7)) << 4),
              H::pack(o[8 * i] * factor[0], o[8 * i + 1] * factor[0]),
              H::pack(o[8 * i + 2] * factor[1], o[8 * i + 3] * factor[1]),
              H::pack(o[8 * i + 4] * factor[0], o[8 * i + 5] * factor[0]),
              H::pack(o[8 * i + 6] * factor[1], o[8 * i + 7] * factor[1]));
  }
  async_fence();
  named_sync<128>(3 + group);
  if ((threadIdx.x & 127) == 0) {
    for (int i = 0; i < 2; ++i) tensor_store(panels + i * kPanel, map, i * 64, head, row, batch);
    bulk_store_wait();
  }
}

} // namespace wan
