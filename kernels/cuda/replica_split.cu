// K7: how many pairs of each expert go to each of its replicas, so that no rank has more to do than it must.
//
//   counts_LE  int64 [L, E]     pairs of each expert in this batch, >= 0
//   slots_LER  int64 [L, E, R]  slots of its replicas, -1 after the last one; slot s is on rank s / slots_per_rank
//   quota_LER  int64 [L, E, R]  out: pairs of each replica; a row sums to its count
//
// One block per layer. It splits evenly; then its first warp sweeps over the replicated experts, and pours the pairs of
// each onto the ranks that have least (kernels/leveling.py is the definition), a lane per replica: R <= 32. Sweeps end
// early when one changes nothing. E <= E_MAX, ranks <= G_MAX.
//
// Deterministic: all numbers are integers, and the only atomics add integers whose order can't be seen.
// One block on a multiprocessor is enough: told so, the compiler spills no registers.
#include "common.cuh"

#ifndef BLOCK
#define BLOCK 128
#endif
#ifndef E_MAX
#define E_MAX 4096
#endif
#ifndef G_MAX
#define G_MAX 1024
#endif

// Pairs for one expert of n replicas, split evenly; of replicas on one rank, the first takes the share of all.
static __device__ void split_evenly(long long count, const long long* slots, long long* quota, int R,
                                    long long slots_per_rank, unsigned long long* load) {
  int n = 0;
  while (n < R && slots[n] >= 0) ++n;
  for (int r = 0; r < R; ++r) {
    long long mine = 0;
    if (r < n) {
      const long long rank = slots[r] / slots_per_rank;
      bool first = true;
      for (int i = 0; i < r; ++i) first = first && slots[i] / slots_per_rank != rank;
      for (int i = r; first && i < n; ++i)
        if (slots[i] / slots_per_rank == rank) mine += count / n + (i < count % n);
      if (mine) atomicAdd(&load[rank], (unsigned long long)mine);
    }
    quota[r] = mine;
  }
}

// Pours `amount` onto the ranks of one expert; true in lanes whose share changed. `load` and `quota` are kept up.
static __device__ bool pour(long long amount, const long long* slots, long long* quota, int R,
                            long long slots_per_rank, unsigned long long* load) {
  const int lane = threadIdx.x;
  const long long slot = lane < R ? slots[lane] : -1;
  const long long rank = slot >= 0 ? slot / slots_per_rank : -1;
  const unsigned same = __match_any_sync(FULL_MASK, rank);
  const bool first = slot >= 0 && (same & ((1u << lane) - 1)) == 0;
  const long long old = first ? quota[lane] : 0;
  const long long base = first ? (long long)load[rank] - old : 0;
  // Ranks in the order of their load: this one's place, from 1, and the load of those up to it.
  long long below = 0;
  int place = 0;
  for (int i = 0; i < R; ++i) {
    const long long other = __shfl_sync(FULL_MASK, base, i);
    const bool counts = __shfl_sync(FULL_MASK, int(first), i) && (other < base || (other == base && i <= lane));
    place += counts;
    below += counts ? other : 0;
  }
  const bool wet = first && amount + below >= base * place;
  const int num_wet = __popc(__ballot_sync(FULL_MASK, wet));
  const int last = __ffs(__ballot_sync(FULL_MASK, first && place == num_wet)) - 1;
  const long long filled = amount + __shfl_sync(FULL_MASK, below, last);
  const long long level = filled / num_wet;
  const long long share = wet ? level - base + (place <= filled - level * num_wet) : 0;
  if (first) {
    quota[lane] = share;
    load[rank] = (unsigned long long)(base + share);
  }
  __syncwarp();
  return share != old;
}

extern "C" __global__ void __launch_bounds__(BLOCK, 1)
replica_split(const long long* counts_LE, const long long* slots_LER, long long* quota_LER, long long E, long long R,
              long long G, long long slots_per_rank, long long sweeps) {
  __shared__ unsigned long long load[G_MAX];
  __shared__ int replicated[E_MAX];
  const long long* counts = counts_LE + blockIdx.x * E;
  const long long* slots = slots_LER + blockIdx.x * E * R;
  long long* quota = quota_LER + blockIdx.x * E * R;

  for (int g = threadIdx.x; g < G; g += BLOCK) load[g] = 0;
  __syncthreads();
  for (int e = threadIdx.x; e < E; e += BLOCK)
    split_evenly(counts[e], slots + e * R, quota + e * R, int(R), slots_per_rank, load);
  __syncthreads();
  if (threadIdx.x >= WARP || R < 2) return;

  int num_replicated = 0;
  for (int e = 0; e < E; e += WARP) {
    const int mine = e + threadIdx.x;
    const bool many = mine < E && slots[mine * R + 1] >= 0;
    const unsigned found = __ballot_sync(FULL_MASK, many);
    if (many) replicated[num_replicated + __popc(found & ((1u << threadIdx.x) - 1))] = mine;
    num_replicated += __popc(found);
  }
  __syncwarp();
  for (int sweep = 0; sweep < sweeps; ++sweep) {
    bool changed = false;
    for (int i = 0; i < num_replicated; ++i) {
      const long long e = replicated[i];
      changed |= pour(counts[e], slots + e * R, quota + e * R, int(R), slots_per_rank, load);
    }
    if (!__any_sync(FULL_MASK, changed)) break;
  }
}
