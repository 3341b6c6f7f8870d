// K6: pairs beyond an expert's capacity go to the token's next-best expert that has room, in rounds.
//
//   scores_TE    float32 [T, E]  the router's scores; NaN counts as -inf
//   wanted_TK    INDEX [T, K]    the router's choice; -1: no choice
//   capacity_E   int64 [E]       pairs that each expert takes
//   load_E       int64 [E]       pairs that it has
//   ids_TK       INDEX [T, K]    expert of each pair by now; -1: none
//   proposal_TK  INDEX [T, K]    expert that a pair without one asks; -1: it asks none
//
// A round is `capacity_propose`, the stable sort of the proposals (K3), `capacity_accept`. The first
// round proposes what was wanted. What is accepted stays. kernels/reference/capacity.py is the definition.
//
// propose: a warp per token, K <= 32; its pairs ask in turn, and no two of them the same expert.
// accept: a block per expert; of its rows it takes the best scores, of equal ones the lower pairs: the score at the
// limit is found by its bits, eight at a time, from counts. The only atomics count: their order can't be seen.
// The 1 in the launch bounds keeps the compiler from spilling registers.
#include "common.cuh"

#ifndef BLOCK
#define BLOCK 256
#endif
#ifndef INDEX
#define INDEX long long
#endif

// An unsigned number in the order of the scores; never 0.
static __device__ __forceinline__ unsigned order_of(float score) {
  const unsigned bits = __float_as_uint(score != score ? -infinity() : score + 0.0f);  // + 0: -0 equals 0
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

extern "C" __global__ void __launch_bounds__(BLOCK, 1)
capacity_propose(const float* scores_TE, const INDEX* wanted_TK, const long long* capacity_E, const long long* load_E,
                 const INDEX* ids_TK, INDEX* proposal_TK, long long T, long long E, long long K) {
  const int lane = threadIdx.x % WARP;
  const long long token = (long long)blockIdx.x * (BLOCK / WARP) + threadIdx.x / WARP;
  if (token >= T) return;
  const long long pair = token * K + lane;
  long long mine = lane < K ? (long long)ids_TK[pair] : -1, proposal = -1;
  unsigned waiting = __ballot_sync(FULL_MASK, lane < K && mine < 0 && wanted_TK[pair] >= 0);
  while (waiting) {
    const int choice = __ffs(waiting) - 1;
    waiting &= waiting - 1;
    unsigned long long best = 0;
    for (long long first = 0; first < E; first += WARP) {
      const long long expert = first + lane;
      bool open = expert < E && load_E[expert] < capacity_E[expert];
      for (int k = 0; k < K; ++k) open = __shfl_sync(FULL_MASK, mine, k) != expert && open;
      if (open) {
        // The higher score wins, then the lower expert.
        const unsigned long long rating =
            (unsigned long long)order_of(scores_TE[token * E + expert]) << 32 | (0xffffffffu - unsigned(expert));
        best = max(best, rating);
      }
    }
    for (int by = WARP / 2; by > 0; by /= 2) best = max(best, __shfl_xor_sync(FULL_MASK, best, by));
    if (best && lane == choice) mine = proposal = 0xffffffffu - (unsigned)best;
  }
  if (lane < K) proposal_TK[pair] = static_cast<INDEX>(proposal);
}

extern "C" __global__ void __launch_bounds__(BLOCK, 1)
capacity_accept(const float* scores_TE, const INDEX* pairs_P, const int* ends_E, const long long* capacity_E,
                long long* load_E, INDEX* ids_TK, long long E, long long K) {
  __shared__ int count[256];
  __shared__ int partial[WARP];
  __shared__ unsigned chosen;
  __shared__ long long above;
  const long long expert = blockIdx.x;
  const long long begin = expert ? ends_E[expert - 1] : 0, num_rows = ends_E[expert] - begin;
  const long long room = capacity_E[expert] - load_E[expert];
  if (num_rows == 0 || room <= 0) return;
  const INDEX* pairs = pairs_P + begin;
  const float* scores = scores_TE + expert;

  // All rows with a number above `limit` are taken, and the first `left` of those that equal it.
  unsigned limit = 0;
  long long left = room;
  if (num_rows > room) {
    for (int shift = 24; shift >= 0; shift -= 8) {
      for (int i = threadIdx.x; i < 256; i += BLOCK) count[i] = 0;
      __syncthreads();
      for (long long row = threadIdx.x; row < num_rows; row += BLOCK) {
        const unsigned number = order_of(scores[pairs[row] / K * E]);
        if (shift == 24 || number >> (shift + 8) == limit >> (shift + 8)) atomicAdd(&count[number >> shift & 255], 1);
      }
      __syncthreads();
      if (threadIdx.x == 0) {
        int digit = 255;
        long long passed = 0;
        while (passed + count[digit] < left) passed += count[digit--];
        chosen = unsigned(digit);
        above = passed;
      }
      __syncthreads();
      limit |= chosen << shift;
      left -= above;
    }
  }
  long long seen = 0;
  for (long long first = 0; first < num_rows; first += BLOCK) {
    const long long row = first + threadIdx.x;
    const long long pair = row < num_rows ? (long long)pairs[row] : 0;
    const unsigned number = row < num_rows ? order_of(scores[pair / K * E]) : 0;
    const int equal = row < num_rows && number == limit;
    int total;
    const int place = block_scan(equal, partial, &total);
    if (row < num_rows && (number > limit || (equal && seen + place <= left))) ids_TK[pair] = static_cast<INDEX>(expert);
    seen += total;
  }
  if (threadIdx.x == 0) load_E[expert] += min(num_rows, room);
}
