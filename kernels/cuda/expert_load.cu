// What a router did over time: column sums of its probabilities, and the moving average of the experts' load (K2).
// The counts themselves come from align.cu, which has to read the ids anyway.
//
//   probs [T, E] --prob_partial--> partial [C, E] --prob_total--> sums [E]
//   ema [L, E], counts [L, E] --load_ema--> ema
//
// A chunk is ROWS consecutive tokens; a thread adds up one expert's column of a chunk, then of all chunks, in order:
// the same bits on each run, whatever the block. Sums are f32. Reads probs once.
#include "common.cuh"

#ifndef INDEX
#define INDEX int
#endif
#ifndef SCALAR
#define SCALAR float  // of probs: float or bf16
#endif
#ifndef BLOCK
#define BLOCK 128
#endif

constexpr int ROWS = 64;  // decides the order of the sum, hence is no configuration

extern "C" __global__ void __launch_bounds__(BLOCK)
    prob_partial(const SCALAR* __restrict__ probs, float* __restrict__ partial, long long tokens, long long experts) {
  const long long expert = (long long)blockIdx.y * BLOCK + threadIdx.x, begin = (long long)blockIdx.x * ROWS;
  if (expert >= experts) return;
  const long long end = begin + ROWS < tokens ? begin + ROWS : tokens;
  float sum = 0;
#pragma unroll 8
  for (long long token = begin; token < end; ++token) sum += to_f32(probs[token * experts + expert]);
  partial[blockIdx.x * experts + expert] = sum;
}

extern "C" __global__ void __launch_bounds__(BLOCK)
    prob_total(const float* __restrict__ partial, float* __restrict__ sums, long long chunks, long long experts) {
  const long long expert = (long long)blockIdx.x * BLOCK + threadIdx.x;
  if (expert >= experts) return;
  float sum = 0;
#pragma unroll 8
  for (long long chunk = 0; chunk < chunks; ++chunk) sum += partial[chunk * experts + expert];
  sums[expert] = sum;
}

// ema += (1 - decay) * (count - ema)
extern "C" __global__ void __launch_bounds__(BLOCK)
    load_ema(float* __restrict__ ema, const INDEX* __restrict__ counts, long long size, float gain) {
  const long long i = (long long)blockIdx.x * BLOCK + threadIdx.x;
  if (i < size) ema[i] = ema[i] + gain * (float(counts[i]) - ema[i]);
}
