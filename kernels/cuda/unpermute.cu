// K5, the rows of the experts back to tokens: the weighted sum of each token's k rows; with the gradient. Without
// weights also the gradient of K4.
//
//   y [N, D] REAL; rows [tokens, k] INDEX, negative for a choice that was dropped; pairs [N] INDEX, outside
//   [0, tokens * k) where a row holds no pair; weights [tokens, k] f32 or null (all one); out [tokens, D] REAL.
//
// Forward: a block per token; each thread adds its chunks of eight columns, in the order of the choices, in f32.
// Backward: a warp per pair writes its row's gradient and sums dot(grad, y) over the columns, each lane its chunks in
// order, then a butterfly over the lanes; then a warp per 32 rows zeroes the gradient of those without a pair.
// Deterministic: every order is fixed, none depends on BLOCK; no atomics. Offsets have 64 bits.
//
// Configuration: REAL float or bf16; INDEX int or long long; BLOCK threads, a multiple of 32.
// Grid: forward tokens; backward ceil(tokens * k / (BLOCK / 32)) + ceil(N / BLOCK).
#include "vector.cuh"

extern "C" __global__ void __launch_bounds__(BLOCK)
    unpermute_rows(const REAL* __restrict__ y, const INDEX* __restrict__ rows, const float* __restrict__ weights,
                   REAL* __restrict__ out, long long k, long long N, long long D, long long aligned) {
  const long long token = blockIdx.x, chunks = (D + CHUNK - 1) / CHUNK;
  for (long long c = threadIdx.x; c < chunks; c += BLOCK) {
    float sum[CHUNK] = {};
    for (long long i = 0; i < k; ++i) {
      const long long row = rows[token * k + i];
      if (row < 0 || row >= N) continue;
      const float weight = weights ? weights[token * k + i] : 1.0f;
      float piece[CHUNK];
      load_chunk(piece, y + row * D, c, D, aligned, 0.0f);
#pragma unroll
      for (int j = 0; j < CHUNK; ++j) sum[j] = fmaf(weight, piece[j], sum[j]);
    }
    store_chunk(out + token * D, sum, c, D, aligned);
  }
}

// grad [tokens, D] REAL -> grad_y [N, D] REAL, grad_weights [tokens, k] f32.
extern "C" __global__ void __launch_bounds__(BLOCK)
    unpermute_rows_backward(const REAL* __restrict__ grad, const REAL* __restrict__ y, const INDEX* __restrict__ rows,
                            const INDEX* __restrict__ pairs, const float* __restrict__ weights,
                            REAL* __restrict__ grad_y, float* __restrict__ grad_weights, long long tokens, long long k,
                            long long N, long long D, long long aligned) {
  const int lane = threadIdx.x % 32;
  const long long warp = ((long long)blockIdx.x * BLOCK + threadIdx.x) / 32;
  const long long pair_warps = (tokens * k + BLOCK / 32 - 1) / (BLOCK / 32) * (BLOCK / 32);
  const long long chunks = (D + CHUNK - 1) / CHUNK;

  if (warp < pair_warps) {
    if (warp >= tokens * k) return;
    const long long row = rows[warp];
    const bool kept = row >= 0 && row < N;
    float dot = 0.0f;
    if (kept) {
      const float weight = weights[warp];
      for (long long c = lane; c < chunks; c += 32) {
        float flow[CHUNK], value[CHUNK];
        load_chunk(flow, grad + warp / k * D, c, D, aligned, 0.0f);
        load_chunk(value, y + row * D, c, D, aligned, 0.0f);
#pragma unroll
        for (int j = 0; j < CHUNK; ++j) {
          dot = fmaf(flow[j], value[j], dot);
          flow[j] *= weight;
        }
        store_chunk(grad_y + row * D, flow, c, D, aligned);
      }
    }
#pragma unroll
    for (int o = 1; o < 32; o *= 2) dot += __shfl_xor_sync(FULL_MASK, dot, o);
    if (lane == 0) grad_weights[warp] = dot;
    return;
  }
  const long long first = (warp - pair_warps) * 32;
  const long long mine = first + lane;
  const bool empty = mine < N && !(pairs[mine] >= 0 && pairs[mine] < tokens * k);
  const float zeros[CHUNK] = {};
  for (unsigned left = __ballot_sync(FULL_MASK, empty); left; left &= left - 1) {
    const long long row = first + __ffs(left) - 1;
    for (long long c = lane; c < chunks; c += 32) store_chunk(grad_y + row * D, zeros, c, D, aligned);
  }
}
