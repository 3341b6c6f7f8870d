// Sorts (token, choice) pairs by expert, stably: rows of one expert stay in token order (K3), and counts them (K2).
//
//   ids [P] --align_count--> counts [E, C] --align_scan--> load [E], counts = pairs of earlier chunks
//           load --align_offsets--> starts [E+1], ends [E], padding of pairs [N], tile_experts [N/tile]
//           ids, counts, starts --align_scatter--> pairs [N]: row -> pair, rows [P]: pair -> row
//   or all of it at once, for few pairs: align_small, one block
//
// P pairs, E experts, N rows. A chunk is CHUNK consecutive pairs and belongs to one warp, which takes 32 pairs at a time:
// lanes with equal experts find each other by __match_any_sync, so that their rank is a population count. No atomics,
// no waiting between blocks; the result is one and the same for every configuration and schedule. An id outside
// 0..E-1 gets no row: its pair's row is -1. Rows that pad an expert to a multiple of `tile` rows, and those after the
// last expert, hold the pair -1. P and N are below 2^31. Ids, load, pairs and rows are INDEX (int or long long), the
// rest int. Traffic: ids twice, pairs and rows once.
#include "common.cuh"

#ifndef INDEX
#define INDEX int
#endif
#ifndef BLOCK
#define BLOCK 256  // threads
#endif
#ifndef ITEMS
#define ITEMS 16  // pairs per thread
#endif

using Index = INDEX;
constexpr int WARPS = BLOCK / WARP;
constexpr int CHUNK = WARP * ITEMS;

// The experts of N * 32 pairs from `begin`, -1 for none; all loads are under way at once.
template <int N>
static __device__ __forceinline__ void load_experts(const Index* ids, long long begin, long long end, int experts,
                                                    int (&expert)[N]) {
  const int lane = threadIdx.x % WARP;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const long long pair = begin + i * WARP + lane;
    const Index id = pair < end ? ids[pair] : Index(-1);
    expert[i] = id >= 0 && id < experts ? int(id) : -1;
  }
}

// Adds the pairs begin..end to the warp's counts, in shared memory.
template <int N>
static __device__ __forceinline__ void count_pairs(const Index* ids, long long begin, long long end, int experts,
                                                   int* counts) {
  const int lane = threadIdx.x % WARP;
  int expert[N];
  load_experts<N>(ids, begin, end, experts, expert);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const unsigned same = __match_any_sync(FULL_MASK, expert[i]);
    if (expert[i] >= 0 && lane == __ffs(same) - 1) counts[expert[i]] += __popc(same);
    __syncwarp();
  }
}

// Gives the pairs begin..end their rows; next[e], in shared memory, is the next row of expert e in this warp.
template <int N>
static __device__ __forceinline__ void place_pairs(const Index* ids, long long begin, long long end, int experts, int* next,
                                                   Index* pairs, Index* rows) {
  const int lane = threadIdx.x % WARP;
  int expert[N];
  load_experts<N>(ids, begin, end, experts, expert);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const long long pair = begin + i * WARP + lane;
    const unsigned same = __match_any_sync(FULL_MASK, expert[i]);
    const unsigned before = same & ((1u << lane) - 1);
    const int first = expert[i] >= 0 ? next[expert[i]] : 0;
    __syncwarp();
    if (expert[i] >= 0 && before == 0) next[expert[i]] = first + __popc(same);
    __syncwarp();
    const int row = expert[i] >= 0 ? first + __popc(before) : -1;
    if (pair < end) rows[pair] = row;
    if (row >= 0) pairs[row] = Index(pair);
  }
}

// Pairs of each expert in each chunk: counts [E, C]. Dynamic shared memory: WARPS * E ints.
extern "C" __global__ void __launch_bounds__(BLOCK)
    align_count(const Index* __restrict__ ids, int* __restrict__ counts, long long num_pairs, long long experts_) {
  DYN_SMEM(int, shared);
  const int experts = int(experts_), warp = threadIdx.x / WARP;
  const long long chunks = ceil_div(num_pairs, CHUNK), first = (long long)blockIdx.x * WARPS;
  for (int i = threadIdx.x; i < WARPS * experts; i += BLOCK) shared[i] = 0;
  __syncthreads();
  const long long begin = (first + warp) * CHUNK;
  count_pairs<ITEMS>(ids, begin, num_pairs, experts, shared + warp * experts);
  __syncthreads();
  for (int i = threadIdx.x; i < WARPS * experts; i += BLOCK) {  // neighbours write neighbouring chunks
    const int expert = i / WARPS, chunk = i % WARPS;
    if (first + chunk < chunks) counts[expert * chunks + first + chunk] = shared[chunk * experts + expert];
  }
}

// One block for each expert: its counts become the sums of those before; load gets their total.
extern "C" __global__ void __launch_bounds__(BLOCK)
    align_scan(int* __restrict__ counts, Index* __restrict__ load, long long chunks) {
  __shared__ int partial[WARP];
  int* mine = counts + blockIdx.x * chunks;
  int carry = 0;
  for (long long begin = 0; begin < chunks; begin += BLOCK) {
    const long long at = begin + threadIdx.x;
    const int count = at < chunks ? mine[at] : 0;
    int total;
    const int up_to = block_scan(count, partial, &total);
    if (at < chunks) mine[at] = carry + up_to - count;
    carry += total;
  }
  if (threadIdx.x == 0) load[blockIdx.x] = carry;
}

// By one block: where each expert's rows start and end, which expert a tile belongs to, and -1 in all rows without a
// pair. `tile_experts` may be null. `load` may be in shared memory, `partial` is.
template <class Load>
static __device__ __forceinline__ void lay_out(const Load* load, int experts, int tile, long long num_rows, int* partial,
                                               int* starts, int* ends, Index* pairs, int* tile_experts) {
  const int step = blockDim.x;
  int carry = 0;
  for (int begin = 0; begin < experts; begin += step) {
    const int expert = begin + threadIdx.x;
    const int padded = expert < experts ? int(ceil_div(load[expert], tile)) * tile : 0;
    int total;
    const int up_to = block_scan(padded, partial, &total);
    if (expert < experts) {
      starts[expert] = carry + up_to - padded;
      ends[expert] = carry + up_to;
    }
    carry += total;
  }
  __syncthreads();
  for (int expert = threadIdx.x / WARP; expert < experts; expert += step / WARP) {
    const int lane = threadIdx.x % WARP, start = starts[expert], end = ends[expert];
    for (int row = start + int(load[expert]) + lane; row < end; row += WARP) pairs[row] = -1;
    if (tile_experts)
      for (int t = start / tile + lane; t < end / tile; t += WARP) tile_experts[t] = expert;
  }
  for (long long row = carry + threadIdx.x; row < num_rows; row += step) pairs[row] = -1;
  if (tile_experts)
    for (long long t = carry / tile + threadIdx.x; t < num_rows / tile; t += step) tile_experts[t] = -1;
}

extern "C" __global__ void __launch_bounds__(BLOCK)
    align_offsets(const Index* __restrict__ load, int* __restrict__ starts, int* __restrict__ ends, Index* __restrict__ pairs,
                  int* __restrict__ tile_experts, long long experts, long long tile, long long num_rows) {
  __shared__ int partial[WARP];
  lay_out(load, int(experts), int(tile), num_rows, partial, starts, ends, pairs, tile_experts);
}

// Dynamic shared memory: WARPS * E ints.
extern "C" __global__ void __launch_bounds__(BLOCK)
    align_scatter(const Index* __restrict__ ids, const int* __restrict__ counts, const int* __restrict__ starts,
                  Index* __restrict__ pairs, Index* __restrict__ rows, long long num_pairs, long long experts_) {
  DYN_SMEM(int, next);
  const int experts = int(experts_), warp = threadIdx.x / WARP;
  const long long chunks = ceil_div(num_pairs, CHUNK), first = (long long)blockIdx.x * WARPS;
  for (int i = threadIdx.x; i < WARPS * experts; i += BLOCK) {
    const int expert = i / WARPS, chunk = i % WARPS;
    if (first + chunk < chunks) next[chunk * experts + expert] = starts[expert] + counts[expert * chunks + first + chunk];
  }
  __syncthreads();
  place_pairs<ITEMS>(ids, (first + warp) * CHUNK, num_pairs, experts, next + warp * experts, pairs, rows);
}

// One block does it all: each warp takes an equal run of pairs. Dynamic shared memory: (WARPS + 3) * E ints.
extern "C" __global__ void __launch_bounds__(BLOCK)
    align_small(const Index* __restrict__ ids, Index* __restrict__ load, int* __restrict__ ends, Index* __restrict__ pairs,
                Index* __restrict__ rows, int* __restrict__ tile_experts, long long num_pairs, long long experts_,
                long long tile, long long num_rows) {
  DYN_SMEM(int, shared);
  __shared__ int partial[WARP];
  const int experts = int(experts_), warp = threadIdx.x / WARP;
  int* const mine = shared + warp * experts;
  int *const total = shared + WARPS * experts, *const starts = total + experts, *const stops = starts + experts;
  const long long run = ceil_div(num_pairs, WARPS * WARP) * WARP, begin = warp * run;
  const long long end = begin + run < num_pairs ? begin + run : num_pairs;
  for (int i = threadIdx.x; i < WARPS * experts; i += BLOCK) shared[i] = 0;
  __syncthreads();
  for (long long at = begin; at < end; at += WARP) count_pairs<1>(ids, at, end, experts, mine);
  __syncthreads();
  for (int expert = threadIdx.x; expert < experts; expert += BLOCK) {
    int sum = 0;
    for (int w = 0; w < WARPS; ++w) {
      const int count = shared[w * experts + expert];
      shared[w * experts + expert] = sum;
      sum += count;
    }
    total[expert] = sum;
    load[expert] = sum;
  }
  __syncthreads();
  lay_out(total, experts, int(tile), num_rows, partial, starts, stops, pairs, tile_experts);
  for (int i = threadIdx.x; i < WARPS * experts; i += BLOCK) shared[i] += starts[i % experts];
  for (int expert = threadIdx.x; expert < experts; expert += BLOCK) ends[expert] = stops[expert];
  __syncthreads();
  for (long long at = begin; at < end; at += WARP) place_pairs<1>(ids, at, end, experts, mine, pairs, rows);
}
