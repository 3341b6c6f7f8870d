// K4, tokens to the rows of their experts: a copy of each token at each of its k rows, zeros in the rows between.
//
//   x [T, units] UNIT -> out [N, units] UNIT, both row-major; rows [T, k] INDEX: where the copies go, negative for a
//   choice that was dropped; pairs [N] INDEX: which of the T * k pairs a row holds, anything outside [0, T * k) for
//   none: such a row is zeroed, for it is input of a grouped matmul.
//
// The kernel moves bytes: UNIT is uint4 where rows start at multiples of 16 bytes, else the largest unit that fits, so
// bf16, f32 and fp8 (and its scales, in a call of their own) are all the same to it.
// Algorithm: a warp per token reads it once and writes it k times; then a warp per 32 rows zeroes those without a pair.
// Deterministic: each byte is written by one thread; no atomics. Offsets have 64 bits.
//
// Configuration: UNIT uint4, unsigned int, unsigned short or unsigned char; INDEX int or long long; BLOCK threads,
// a multiple of 32. Grid: ceil(T / (BLOCK / 32)) + ceil(N / BLOCK).
#include "vector.cuh"

extern "C" __global__ void __launch_bounds__(BLOCK)
    permute_rows(const UNIT* __restrict__ x, const INDEX* __restrict__ rows, const INDEX* __restrict__ pairs,
                 UNIT* __restrict__ out, long long T, long long k, long long N, long long units) {
  const int lane = threadIdx.x % 32;
  const long long warp = ((long long)blockIdx.x * BLOCK + threadIdx.x) / 32;
  const long long token_warps = (T + BLOCK / 32 - 1) / (BLOCK / 32) * (BLOCK / 32);

  if (warp < token_warps) {
    if (warp >= T) return;
    for (long long u = lane; u < units; u += 32) {
      const UNIT piece = x[warp * units + u];
      for (long long i = 0; i < k; ++i) {
        const long long row = rows[warp * k + i];
        if (row >= 0 && row < N) out[row * units + u] = piece;
      }
    }
    return;
  }
  const long long first = (warp - token_warps) * 32;
  const long long mine = first + lane;
  const UNIT zero = {};
  const bool empty = mine < N && !(pairs[mine] >= 0 && pairs[mine] < T * k);
  for (unsigned left = __ballot_sync(FULL_MASK, empty); left; left &= left - 1) {
    const long long row = first + __ffs(left) - 1;
    for (long long u = lane; u < units; u += 32) out[row * units + u] = zero;
  }
}
