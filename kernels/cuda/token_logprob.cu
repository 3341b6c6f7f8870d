// K12, what a model thinks of the tokens that follow: log-probability and entropy of each row of logits, and the
// gradient of both, which may overwrite the logits.
//
//   logits [N, V] LOGIT, row-major; tokens [N] i64; logprobs, entropies [N] f32; norms [N, 2] f32: the largest scaled
//   logit and the log of the mass above it (their sum is log-sum-exp); best [N] i64 or null: the likeliest token.
//
// p = softmax(logits * inverse_temperature); logprob = log p[token], never above 0; entropy = -sum p log p.
// A token outside [0, V), or a row with NaN or +inf, gives NaN. A logit of -inf has probability 0.
// Algorithm: a block per row, one online pass (online_softmax.cuh). The gradient is a second pass over the row:
//   inverse_temperature * (grad_logprob * (one_hot - p) - grad_entropy * p * (log p + entropy)).
// Deterministic, independent of BLOCK and of other rows; no atomics. Offsets have 64 bits.
//
// Configuration: LOGIT float or bf16; BLOCK 128, 256 or 512 threads. Grid: N. V < 2^34.
#include "online_softmax.cuh"

extern "C" __global__ void __launch_bounds__(BLOCK)
    token_logprob(const LOGIT* __restrict__ logits, const long long* __restrict__ tokens, float* logprobs,
                  float* entropies, float* norms, long long* best, long long V, float inverse_temperature,
                  long long aligned) {
  __shared__ Softmax shared[LANES_OF_ROW / 32];
  const long long n = blockIdx.x;
  const LOGIT* row = logits + n * V;
  Softmax mine[MINE];
  read_row(mine, row, V, aligned, inverse_temperature);
  const Softmax whole = merge_lanes(mine, shared);
  if (threadIdx.x) return;

  const long long token = tokens[n];
  const float log_mass = logf(whole.mass);
  logprobs[n] = token >= 0 && token < V ? (to_f32(row[token]) * inverse_temperature - whole.top) - log_mass : NO_NUMBER;
  entropies[n] = log_mass - whole.slope / whole.mass;
  norms[2 * n] = whole.top;
  norms[2 * n + 1] = log_mass;
  if (best) best[n] = first_top(whole, row, V, inverse_temperature);
}

// `grads` may be `logits`: each thread reads a chunk before it writes it. A token outside [0, V) takes no part.
extern "C" __global__ void __launch_bounds__(BLOCK)
    token_logprob_backward(const LOGIT* logits, const long long* tokens, const float* entropies, const float* norms,
                           const float* grad_logprobs, const float* grad_entropies, LOGIT* grads, long long V,
                           float inverse_temperature, long long aligned) {
  const long long n = blockIdx.x, chunks = (V + CHUNK - 1) / CHUNK, token = tokens[n];
  const LOGIT* row = logits + n * V;
  const float top = norms[2 * n], log_mass = norms[2 * n + 1], entropy = entropies[n];
  const float by_entropy = grad_entropies[n] * inverse_temperature;
  const float by_logprob = token >= 0 && token < V ? grad_logprobs[n] * inverse_temperature : 0.0f;
  for (long long c = threadIdx.x; c < chunks; c += BLOCK) {
    float x[CHUNK];
    load_scaled(x, row, c, V, aligned, inverse_temperature);
#pragma unroll
    for (int i = 0; i < CHUNK; ++i) {
      const float logprob = (x[i] - top) - log_mass, p = exp_below(logprob);
      const float hit = c * CHUNK + i == token ? by_logprob : 0.0f;
      x[i] = hit - p * fmaf(by_entropy, finite(logprob) + entropy, by_logprob);
    }
    store_chunk(grads + n * V, x, c, V, aligned);
  }
}
