// Flash attention, backward, for every card from sm_80 on (mma.sync + cp.async), deterministic.
//
//   p = exp(scale * q k^T - lse)      dp = do v^T            ds = p * (dp - delta),  delta = rowsum(do * o)
//   dv = p^T do                       dk = scale * ds^T q    dq = scale * ds k
//
// Three launches, four with few keys:
//   attention_rows    log-sum-exp (base 2) and delta of every query, tile by tile; clears the turn counters
//   attention_bwd     one block owns 128 keys of one head, keeps dK and dV in registers and walks over the queries in
//                     tiles of ROWS. dQ is summed over key blocks in global fp32.
//   attention_dq      scales dQ and rounds it to 16 bits
//   attention_keys    where few keys leave processors without work, a key block's queries are shared out over `splits`
//                     blocks; this sums their parts of dK and dV, always in the same order
//
// The eight warps are four duos, each with 32 keys. For scores (transposed: keys x queries) a warp of a duo takes half the
// tile's queries, for dK and dV half the columns. So P^T and dS^T leave one product in the very layout that the next one
// wants for its own half, and the other half comes from the partner through shared memory. Against warps of 16 keys and all
// queries and columns, where nothing is exchanged, a fifth less is read from shared memory, which is what these products
// wait for (H200, T = 21600: the products alone 342 TFLOP/s instead of 324).
//
// Determinism: the blocks of one head add their part of a query tile strictly in the order of their key block. Each block
// publishes how many tiles it has added, and its successor waits for that. A block only ever waits for the block before it
// in launch order, which is resident already, so waiting cannot deadlock.
//
// Two forms of it:
//   with two buffers of dS (161 KB of shared memory) dQ of a tile is computed one tile late, which leaves a single barrier
//   per tile, and by the two warps of each scheduler at different times: products of one overlap exponentials and sums of
//   the other.
//   with V_HELD (97 KB) V is read once and stays in registers, where its 64 registers a thread leave no room for all of dP:
//   it is computed in two parts. One buffer of dS and of dO, hence two barriers per tile.
// And each with REPEATED, where the last key stands for `copies` equal ones: its p counts that often, and its dK and dV are the
// sums of theirs. Kernels of their own, so that self-attention does not pay for it.
#include "../common/mma.cuh"
#include "backward_sums.cuh"

namespace wan {

template <typename T, int HEAD, int ROWS, int Q_STAGES, int DO_STAGES, int DS_STAGES, bool V_HELD, bool REPEATED>
struct AttentionBackward {
  static constexpr int kWarps = 8, kThreads = kWarps * 32;
  static constexpr int kKeys = 128;
  static constexpr int kQueryTiles = ROWS / 16; // of 8 queries, in half a tile
  static constexpr int kSteps = ROWS / 32;      // of 16 queries, in half a tile
  static constexpr int kColTiles = HEAD / 16;   // of 8 columns, in half a head
  static constexpr int kColSteps = HEAD / 16;   // of 16 columns, in a head
  using Share = DqShare<HEAD, ROWS>;
  static constexpr int kDqCols = Share::kCols, kDqColTiles = Share::kColTiles;
  static constexpr int kQBytes = ROWS * HEAD * 2;
  static constexpr int kKBytes = kKeys * HEAD * 2;
  static constexpr int kDsBytes = kKeys * ROWS * 2;
  static constexpr int kStatBytes = 2 * ROWS * 4; // lse and delta of a tile
  static constexpr bool kLate = DS_STAGES == 2;
  static_assert(ROWS % 64 == 0 && HEAD % 64 == 0 && kDqCols >= 16, "tile shape");
  static_assert(!V_HELD || Q_STAGES * kQBytes + DO_STAGES * kQBytes >= kKBytes, "V passes through the stages");
  static_assert(!kLate || (Q_STAGES == 2 && DO_STAGES == 2), "a late dQ needs the next tile's Q and dO apart");

  using H = Half16<T>;
  using HeadTile = Tile<HEAD>;
  using Scores = float[2][kQueryTiles][4];     // [32 keys x half the queries] of a warp
  using Rounded = uint32_t[2][kQueryTiles][2]; // the same in 16 bits
  using Sums = float[2][kColTiles][4];         // [32 keys x half the columns]
  using Operand = uint32_t[kSteps][2][4];      // [32 keys x half the queries] as first operand

  using QueryTile = Tile<ROWS>; // of dS^T and P^T: keys in rows of ROWS queries

  // Where a lane reads or writes in a tile. The tiles' swizzle is an exclusive or, and so is every step along a row: an
  // address costs one register and a step one instruction. (Tiles lie at multiples of 256 bytes.)
  template <typename Rows> static __device__ __forceinline__ uint32_t at_plain(int chunk) { // 16 rows, 16 columns
    const int lane = threadIdx.x & 31;
    return Rows::offset(lane & 15, chunk + (lane >> 4));
  }
  template <typename Rows> static __device__ __forceinline__ uint32_t at_swapped(int chunk) { // the middle 8x8s exchanged
    const int lane = threadIdx.x & 31;
    return Rows::offset((lane & 7) + ((lane >> 4) << 3), chunk + ((lane >> 3) & 1));
  }
  static __device__ __forceinline__ uint32_t at_value(int chunk) { // a thread's pairs of dS^T and P^T
    const int lane = threadIdx.x & 31;
    return QueryTile::offset(lane >> 2, chunk) + (lane & 3) * 4;
  }

  // 32 rows of keys, 16 columns.
  static __device__ __forceinline__ void load_keys(uint32_t (&a)[2][4], uint32_t keys, int step) {
#pragma unroll
    for (int i = 0; i < 2; ++i) ldmatrix4(a[i], (keys ^ (step << 5)) + i * 16 * HeadTile::kRowBytes);
  }
  // Half the queries, 16 columns.
  static __device__ __forceinline__ void load_queries(uint32_t (&b)[kSteps][4], uint32_t queries, int step) {
#pragma unroll
    for (int j = 0; j < kSteps; ++j) ldmatrix4(b[j], (queries ^ (step << 5)) + j * 16 * HeadTile::kRowBytes);
  }
  // Scores of 16 of the queries; of all.
  static __device__ __forceinline__ void product(Scores &s, int part, const uint32_t (&a)[2][4], const uint32_t (&b)[4]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      H::mma(s[i][2 * part], a[i], b[0], b[1]);
      H::mma(s[i][2 * part + 1], a[i], b[2], b[3]);
    }
  }
  static __device__ __forceinline__ void product(Scores &s, const uint32_t (&a)[2][4], const uint32_t (&b)[kSteps][4]) {
#pragma unroll
    for (int j = 0; j < kSteps; ++j) product(s, j, a, b[j]);
  }
  // sums += x^T [32 keys x half the queries] . (these queries) [x half the columns]
  static __device__ __forceinline__ void add(Sums &sums, const Operand &x, uint32_t queries) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step)
#pragma unroll
      for (int j = 0; j < kColTiles / 2; ++j) {
        uint32_t b[4];
        ldmatrix4_trans(b, (queries ^ (j << 5)) + step * 16 * HeadTile::kRowBytes);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          H::mma(sums[i][2 * j], x[step][i], b[0], b[1]);
          H::mma(sums[i][2 * j + 1], x[step][i], b[2], b[3]);
        }
      }
  }
  // What a warp computed itself is an operand as it stands.
  static __device__ __forceinline__ void own_operand(Operand &a, const Rounded &x) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step)
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int r = 0; r < 4; ++r) a[step][i][r] = x[i][2 * step + r / 2][r % 2];
  }
  // A warp's half of the queries of its 32 keys to a tile of dS's form; and what its partner wrote.
  static __device__ __forceinline__ void write_half(uint32_t tile, const Rounded &x) {
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int j = 0; j < kQueryTiles; ++j)
#pragma unroll
        for (int r = 0; r < 2; ++r)
          store_shared((tile ^ (j << 4)) + (i * 16 + r * 8) * QueryTile::kRowBytes, x[i][j][r]);
  }
  static __device__ __forceinline__ void read_half(Operand &a, uint32_t tile) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step)
#pragma unroll
      for (int i = 0; i < 2; ++i) ldmatrix4(a[step][i], (tile ^ (step << 5)) + i * 16 * QueryTile::kRowBytes);
  }

  static __device__ void run(const T *__restrict__ q, const T *__restrict__ k, const T *__restrict__ v,
                             const T *__restrict__ dout, const float *__restrict__ rows, float *__restrict__ dq_sum,
                             int *__restrict__ turns, T *__restrict__ dk, T *__restrict__ dv,
                             float *__restrict__ parts, int l, int m, int heads, float scale, int head_group,
                             float copies) {
    extern __shared__ __align__(256) unsigned char shared[];
    const uint32_t k_s = smem_address(shared);
    const uint32_t v_s = k_s + kKBytes;
    const uint32_t q_s = V_HELD ? v_s : v_s + kKBytes;
    const uint32_t do_s = q_s + Q_STAGES * kQBytes;
    const uint32_t ds_s = do_s + DO_STAGES * kQBytes;
    const uint32_t stats_s = ds_s + DS_STAGES * kDsBytes; // [stage][lse, delta][ROWS]

    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    // Blocks in launch order: head groups, then key blocks, then the heads of a group. The predecessor of a key block
    // is thus always launched before it, and a group's heads share the waiting of the first wave.
    const int key_blocks = (m + kKeys - 1) / kKeys;
    const int per_group = key_blocks * head_group;
    const int group = blockIdx.x / per_group, in_group = blockIdx.x % per_group;
    const int head = group * head_group + in_group % head_group, key_block = in_group / head_group;
    const int batch = blockIdx.y;
    if (head >= heads) return; // the last group may be ragged
    const int all_tiles = (l + ROWS - 1) / ROWS;
    const int splits = gridDim.z, share = (all_tiles + splits - 1) / splits;
    const int first = blockIdx.z * share, tiles = min(share, all_tiles - first); // this block's query tiles
    const int left = l - first * ROWS;
    const int stride = heads * HEAD;
    const long pair = static_cast<long>(batch) * heads + head;
    const long q_at = (static_cast<long>(batch) * l + first * ROWS) * stride + head * HEAD;
    const long k_at = (static_cast<long>(batch) * m + static_cast<long>(key_block) * kKeys) * stride + head * HEAD;
    q += q_at;
    dout += q_at;
    rows += (pair * all_tiles + first) * (2 * ROWS);
    dq_sum += (pair * all_tiles + first) * (ROWS * HEAD);
    turns += (pair * splits + blockIdx.z) * key_blocks + key_block;

    auto load_q = [&](int tile) {
      HeadTile::template load<ROWS, kThreads>(q_s + (tile % Q_STAGES) * kQBytes,
                                              q + static_cast<long>(tile) * ROWS * stride, stride, left - tile * ROWS);
    };
    auto load_do = [&](int tile) {
      HeadTile::template load<ROWS, kThreads>(do_s + (tile % DO_STAGES) * kQBytes,
                                              dout + static_cast<long>(tile) * ROWS * stride, stride,
                                              left - tile * ROWS);
    };
    auto load_stats = [&](int tile) {
      if (threadIdx.x < kStatBytes / 16)
        cp_async16(stats_s + (tile & 1) * kStatBytes + threadIdx.x * 16,
                   rows + static_cast<long>(tile) * (2 * ROWS) + threadIdx.x * 4, true);
    };

    HeadTile::template load<kKeys, kThreads>(k_s, k + k_at, stride, m - key_block * kKeys);
    HeadTile::template load<kKeys, kThreads>(v_s, v + k_at, stride, m - key_block * kKeys);
    uint32_t v_held[V_HELD ? kColSteps : 1][2][4]; // [32 keys x 16 columns] as first operand
    if constexpr (V_HELD) {
      cp_async_commit();
      cp_async_wait<0>();
      __syncthreads();
#pragma unroll
      for (int step = 0; step < kColSteps; ++step)
        load_keys(v_held[step], v_s + HeadTile::kRowBytes * (warp >> 1) * 32 + at_plain<HeadTile>(0), step);
      __syncthreads(); // the stages are free
    }
    load_q(0);
    load_do(0);
    load_stats(0);
    cp_async_commit();

    Sums dk_acc = {}, dv_acc = {};
    const float scale_log2 = scale * 1.44269504088896340736f;
    const int duo = warp >> 1, half = warp & 1;
    const int warp_key = duo * 32;
    const int own_query = half * (ROWS / 2), other_query = ROWS / 2 - own_query, own_chunk = half * (HEAD / 16);
    const int dq_row = Share::row(warp), dq_col = Share::col(warp);
    const uint32_t warp_k = k_s + HeadTile::kRowBytes * warp_key + at_plain<HeadTile>(0);
    // Keys past the end must not reach dQ: their K rows are zero but p of a zero score is not, and may be infinite.
    const bool ragged = m - key_block * kKeys < kKeys;
    const int key_limit = m - key_block * kKeys - warp_key - (lane >> 2);
    auto duo_sync = [&] { asm volatile("bar.sync %0, 64;\n" ::"r"(1 + duo) : "memory"); };

    // Adds this key block's part of dQ of a tile. The caller has the tile's turn.
    auto add_dq = [&](int tile) {
      const uint32_t ds_t = ds_s + (tile % DS_STAGES) * kDsBytes + at_swapped<QueryTile>(dq_row / 8);
      const uint32_t k_t = k_s + at_plain<HeadTile>(dq_col / 8);
      float dq[2][kDqColTiles][4] = {};
#pragma unroll
      for (int step = 0; step < kKeys / 16; ++step) {
        uint32_t a[2][4];
#pragma unroll
        for (int i = 0; i < 2; ++i) // stored keys x queries, wanted queries x keys: transposed on load
          ldmatrix4_trans(a[i], (ds_t ^ (i << 5)) + step * 16 * QueryTile::kRowBytes);
#pragma unroll
        for (int j = 0; j < kDqCols / 16; ++j) {
          uint32_t b[4];
          ldmatrix4_trans(b, (k_t ^ (j << 5)) + step * 16 * HeadTile::kRowBytes);
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            H::mma(dq[i][2 * j], a[i], b[0], b[1]);
            H::mma(dq[i][2 * j + 1], a[i], b[2], b[3]);
          }
        }
      }
      // dQ lies in the order in which the threads hold it (attention_dq knows): 16 coalesced bytes a lane.
      float4 *sum = reinterpret_cast<float4 *>(dq_sum + static_cast<long>(tile) * (ROWS * HEAD)) +
                    warp * (2 * kDqColTiles) * 32 + lane;
#if __CUDA_ARCH__ < 900
      // Nobody else may touch this tile now: plain reads through L2, all before the first write.
      if (key_block != 0) {
        float4 old[2][kDqColTiles];
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
          for (int j = 0; j < kDqColTiles; ++j) old[i][j] = __ldcg(sum + (i * kDqColTiles + j) * 32);
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
          for (int j = 0; j < kDqColTiles; ++j) {
            dq[i][j][0] += old[i][j].x, dq[i][j][1] += old[i][j].y;
            dq[i][j][2] += old[i][j].z, dq[i][j][3] += old[i][j].w;
          }
      }
#endif
#if __CUDA_ARCH__ >= 900
      if (key_block != 0) {
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
          for (int j = 0; j < kDqColTiles; ++j)
            asm volatile("red.global.add.v4.f32 [%0], {%1,%2,%3,%4};\n" ::"l"(sum + (i * kDqColTiles + j) * 32),
                         "f"(dq[i][j][0]), "f"(dq[i][j][1]), "f"(dq[i][j][2]), "f"(dq[i][j][3])
                         : "memory");
        return;
      }
#endif
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int j = 0; j < kDqColTiles; ++j)
          __stcg(sum + (i * kDqColTiles + j) * 32, float4{dq[i][j][0], dq[i][j][1], dq[i][j][2], dq[i][j][3]});
    };
    // How many tiles the block before has added, as far as thread 0 knows; reading it anew takes the latency of L2.
    int added = key_block == 0 ? 0x7fffffff : 0;
    auto await_turn = [&](int tile) {
      while (added <= tile)
        asm volatile("ld.acquire.gpu.global.s32 %0, [%1];\n" : "=r"(added) : "l"(turns - 1) : "memory");
    };
    // The same without waiting: what it reads is there by the time of `await_turn`, where the latency would stand between
    // two tiles (323 -> 354 TFLOP/s). No acquire, which waits; none is needed, for the sums are touched only by what acts
    // in L2 (red, ld.cg, st.cg) and is issued behind the barrier that follows.
    auto peek_turn = [&](int tile) {
      if (added <= tile) asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];\n" : "=r"(added) : "l"(turns - 1));
    };
    // A release by one thread after a barrier covers what all threads of the block did before it: one fence a tile, not
    // one a thread.
    auto pass_turn = [&](int tile) {
      asm volatile("st.release.gpu.global.s32 [%0], %1;\n" ::"l"(turns), "r"(tile + 1) : "memory");
    };

    for (int tile = 0; tile < tiles; ++tile) {
      const uint32_t q_t = q_s + (tile % Q_STAGES) * kQBytes, do_t = do_s + (tile % DO_STAGES) * kQBytes;
      cp_async_wait<0>();
      if (kLate && tile > 0 && threadIdx.x == 0) await_turn(tile - 1);
      __syncthreads(); // Q, dO and their statistics are here; the older stages are free; late: dS of tile - 1 is whole
      if (kLate && tile > 1 && threadIdx.x == 0) pass_turn(tile - 2);
      if (tile + 1 < tiles) {
        if (Q_STAGES == 2) load_q(tile + 1);
        if (DO_STAGES == 2) load_do(tile + 1);
        load_stats(tile + 1);
        cp_async_commit();
      }
      // Warps w and w + 4 share a scheduler: one computes dQ here, the other at the end (4 %).
      if (kLate && tile > 0 && warp < 4) add_dq(tile - 1);

      Scores s = {}, dp = {};
      Rounded p16, ds16;
      const float *lse_s = reinterpret_cast<const float *>(shared + (stats_s - k_s) + (tile & 1) * kStatBytes) +
                           own_query + (lane & 3) * 2;
      // P and dS of 16 of the queries.
      auto finish = [&](int part) {
#pragma unroll
        for (int j = 2 * part; j < 2 * part + 2; ++j) {
          const float2 base = *reinterpret_cast<const float2 *>(lse_s + j * 8);
          const float2 mean = *reinterpret_cast<const float2 *>(lse_s + ROWS + j * 8);
#pragma unroll
          for (int i = 0; i < 2; ++i)
#pragma unroll
            for (int r = 0; r < 2; ++r) {
              float p0 = exp2_fast(fmaf(s[i][j][2 * r], scale_log2, -base.x));
              float p1 = exp2_fast(fmaf(s[i][j][2 * r + 1], scale_log2, -base.y));
              const bool past = i * 16 + r * 8 >= key_limit;
              if constexpr (V_HELD) { // as a branch: selections would let more scores live at a time than registers can hold
                if (ragged && past) p0 = p1 = 0.f;
              } else { // 4 % faster than the branch
                p0 = past ? 0.f : p0;
                p1 = past ? 0.f : p1;
              }
              if constexpr (REPEATED)
                if (i * 16 + r * 8 + 1 == key_limit) p0 *= copies, p1 *= copies;
              p16[i][j][r] = H::pack(p0, p1);
              ds16[i][j][r] = H::pack(p0 * (dp[i][j][2 * r] - mean.x), p1 * (dp[i][j][2 * r + 1] - mean.y));
            }
        }
      };
      const uint32_t own_q = q_t + own_query * HeadTile::kRowBytes + at_swapped<HeadTile>(0);
      const uint32_t own_do = own_q + (do_t - q_t);
      if constexpr (V_HELD) {
#pragma unroll
        for (int step = 0; step < kColSteps; ++step) {
          uint32_t a[2][4], b[kSteps][4], d[4];
          load_keys(a, warp_k, step);
          load_queries(b, own_q, step);
          ldmatrix4(d, own_do ^ (step << 5));
          product(s, a, b);
          product(dp, 0, v_held[step], d);
        }
        if (threadIdx.x == 0) peek_turn(tile);
        finish(0);
#pragma unroll
        for (int part = 1; part < kSteps; ++part) {
          const uint32_t part_do = own_do + part * 16 * HeadTile::kRowBytes;
          uint32_t d[2][4];
          ldmatrix4(d[0], part_do);
#pragma unroll
          for (int step = 0; step < kColSteps; ++step) {
            if (step + 1 < kColSteps) ldmatrix4(d[(step + 1) & 1], part_do ^ ((step + 1) << 5));
            product(dp, part, v_held[step], d[step & 1]);
          }
          finish(part);
        }
      } else {
        // One product's operands are loaded while the other is computed.
        uint32_t a[2][4], b[kSteps][4], c[2][4], d[kSteps][4];
        load_keys(a, warp_k, 0);
        load_queries(b, own_q, 0);
#pragma unroll
        for (int step = 0; step < kColSteps; ++step) {
          load_keys(c, warp_k + kKBytes, step);
          load_queries(d, own_do, step);
          product(s, a, b);
          if (step + 1 < kColSteps) {
            load_keys(a, warp_k, step + 1);
            load_queries(b, own_q, step + 1);
          }
          product(dp, c, d);
        }
        if (threadIdx.x == 0) peek_turn(tile);
#pragma unroll
        for (int part = 0; part < kSteps; ++part) finish(part);
      }

      // The halves of P change hands in the place that dS will have, each where its reader writes dS afterwards: so nobody
      // overwrites what another has still to read, and one synchronisation does (3 % at 97 KB).
      const uint32_t ds_t = ds_s + (tile % DS_STAGES) * kDsBytes + QueryTile::kRowBytes * warp_key;
      const uint32_t columns = at_plain<HeadTile>(own_chunk);
      const uint32_t own = own_query * HeadTile::kRowBytes + columns, other = other_query * HeadTile::kRowBytes + columns;
      Operand mine, theirs;
      write_half(ds_t + at_value(other_query / 8), p16);
      own_operand(mine, p16);
      add(dv_acc, mine, do_t + own);
      duo_sync(); // P is whole
      read_half(theirs, ds_t + at_plain<QueryTile>(own_query / 8));
      __syncwarp(); // all lanes have read
      write_half(ds_t + at_value(own_query / 8), ds16);
      add(dv_acc, theirs, do_t + other);

      if (!kLate) {
        if (threadIdx.x == 0) await_turn(tile);
        __syncthreads(); // dS is whole; it is our turn on this tile; all threads are done with the previous one and dO
        if (threadIdx.x == 0 && tile > 0) pass_turn(tile - 1);
      }
      if (DO_STAGES == 1 && tile + 1 < tiles) {
        load_do(tile + 1);
        cp_async_commit();
      }
      own_operand(mine, ds16);
      add(dk_acc, mine, q_t + own);
      if (kLate) duo_sync(); // the duo's part of dS is whole
      read_half(theirs, ds_t + at_plain<QueryTile>(other_query / 8));
      add(dk_acc, theirs, q_t + other);

      if (!kLate) add_dq(tile);
      if (kLate && tile > 0 && warp >= 4) add_dq(tile - 1);
    }
    if (kLate) {
      if (threadIdx.x == 0) await_turn(tiles - 1);
      __syncthreads();
      add_dq(tiles - 1);
    }
    __syncthreads();
    if (threadIdx.x == 0) pass_turn(tiles - 1);

    const long size = static_cast<long>(gridDim.y) * m * stride; // of dK, of dV
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        if (i * 16 + r * 8 >= key_limit) continue;
        const long at = k_at + static_cast<long>(warp_key + i * 16 + r * 8 + (lane >> 2)) * stride + own_chunk * 8 +
                        (lane & 3) * 2;
        float *dk_part = parts + blockIdx.z * size + at, *dv_part = dk_part + splits * size;
#pragma unroll
        for (int j = 0; j < kColTiles; ++j) {
          const float2 dk2 = {dk_acc[i][j][2 * r] * scale, dk_acc[i][j][2 * r + 1] * scale};
          const float2 dv2 = {dv_acc[i][j][2 * r], dv_acc[i][j][2 * r + 1]};
          if (splits > 1) {
            *reinterpret_cast<float2 *>(dk_part + j * 8) = dk2;
            *reinterpret_cast<float2 *>(dv_part + j * 8) = dv2;
          } else {
            *reinterpret_cast<uint32_t *>(dk + at + j * 8) = H::pack(dk2.x, dk2.y);
            *reinterpret_cast<uint32_t *>(dv + at + j * 8) = H::pack(dv2.x, dv2.y);
          }
        }
      }
  }
};

} // namespace wan

#define ATTENTION_BACKWARD_RUN(SUFFIX, REPEATED, T, ...)                                                               \
  extern "C" __global__ void __launch_bounds__(256, 1) attention_bwd_##SUFFIX(                                         \
      const T *q, const T *k, const T *v, const T *dout, const float *rows, float *dq_sum, int *turns, T *dk, T *dv,   \
      float *parts, int l, int m, int heads, float scale, int head_group, float copies) {                              \
    wan::AttentionBackward<T, __VA_ARGS__, REPEATED>::run(q, k, v, dout, rows, dq_sum, turns, dk, dv, parts, l, m,     \
                                                          heads, scale, head_group, copies);                           \
  }
#define ATTENTION_BACKWARD(SUFFIX, T, HEAD, ROWS, ...)                                                                 \
  ATTENTION_BACKWARD_RUN(SUFFIX, false, T, HEAD, ROWS, __VA_ARGS__)                                                    \
  ATTENTION_BACKWARD_RUN(SUFFIX##r, true, T, HEAD, ROWS, __VA_ARGS__)                                                  \
  extern "C" __global__ void __launch_bounds__(256) attention_rows_##SUFFIX(                                           \
      const T *o, const T *dout, const float *lse, float *rows, int *turns, int n_turns, int l, int heads,             \
      int batches) {                                                                                                   \
    wan::attention_rows<T, HEAD, ROWS>(o, dout, lse, rows, turns, n_turns, l, heads, batches);                         \
  }                                                                                                                    \
  extern "C" __global__ void __launch_bounds__(256)                                                                    \
      attention_dq_##SUFFIX(const float *dq_sum, T *dq, int l, int heads, float scale) {                               \
    wan::attention_dq<T, HEAD, ROWS>(dq_sum, dq, l, heads, scale);                                                     \
  }
#define ATTENTION_KEYS(SUFFIX, T)                                                                                      \
  extern "C" __global__ void __launch_bounds__(256)                                                                    \
      attention_keys_##SUFFIX(const float *parts, T *dk, T *dv, long n, int splits) {                                  \
    wan::attention_keys(parts, dk, dv, n, splits);                                                                     \
  }

ATTENTION_KEYS(bf16, __nv_bfloat16)
ATTENTION_KEYS(f16, __half)
// 161 KB of shared memory: sm_80 and sm_90.
ATTENTION_BACKWARD(bf16_128_64x128, __nv_bfloat16, 128, 64, 2, 2, 2, false)
ATTENTION_BACKWARD(f16_128_64x128, __half, 128, 64, 2, 2, 2, false)
// 97 KB: also sm_86 and sm_89, which have 99.
ATTENTION_BACKWARD(bf16_128_64x128v, __nv_bfloat16, 128, 64, 2, 1, 1, true)
ATTENTION_BACKWARD(f16_128_64x128v, __half, 128, 64, 2, 1, 1, true)
// Head width 64: 97 KB, every card.
ATTENTION_BACKWARD(bf16_64_64x128, __nv_bfloat16, 64, 64, 2, 2, 2, false)
ATTENTION_BACKWARD(f16_64_64x128, __half, 64, 64, 2, 2, 2, false)
