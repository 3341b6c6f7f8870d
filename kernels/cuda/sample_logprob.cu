// K13, the next token: a draw from each row of logits at its own temperature, with the log-probability and the entropy
// of the distribution that it was drawn from.
//
//   logits [N, V] LOGIT, row-major; temperatures [N] f32, 0 for the likeliest token; ordinals, steps [N] i64: which
//   response, and which of its tokens; out: tokens [N] i64, logprobs, entropies [N] f32 (at temperature 1 where it is 0).
//
// Two draws by Gumbel's maximum: first one of 512 lanes, by the log of its mass, then a token of that lane, by its logit
// (a lane owns every 512th chunk of eight tokens, online_softmax.cuh). P(lane) * P(token | lane) is softmax, exactly,
// and only one lane is read twice. Of equals the lower wins.
// Random numbers are Philox words: key = seed; counter = (block, step, ordinal low, ordinal high); lane L takes word
// L % 4 of block L / 4, token v word v % 4 of block 128 + v / 4. A word w makes u = (w + 1/2) / 2^32 and an exponential
// variate -log(1 - u). So the token depends on the row, seed, ordinal and step, and on nothing else of the batch.
// A row with NaN or +inf, or a temperature that is negative or NaN, gives NaN; the token beside it is within [0, V)
// and means nothing. Deterministic, independent of BLOCK; no atomics. Offsets have 64 bits.
//
// Configuration: LOGIT float or bf16; BLOCK 128, 256 or 512 threads. Grid: N. V < 2^34.
#include "online_softmax.cuh"
#include "philox.cuh"

// Minus the log of an exponential variate, which is a Gumbel variate; at most 22.9.
static __device__ __forceinline__ float gumbel(unsigned word) {
  const float u = fminf(fmaf((float)word, 2.3283064e-10f, 1.1641532e-10f), 0.99999994f);
  return -logf(-log1pf(-u));
}

static __device__ __forceinline__ unsigned word_of(uint4 words, int i) {
  return i == 0 ? words.x : i == 1 ? words.y : i == 2 ? words.z : words.w;
}

// A score and who has it.
struct Best {
  float score;
  long long of;
};

static __device__ __forceinline__ void consider(Best& best, float score, long long of) {
  if (score > best.score || (score == best.score && of < best.of)) best = Best{score, of};
}

static __device__ __forceinline__ void best_of_warp(Best& best) {
#pragma unroll
  for (int o = 1; o < 32; o *= 2) {
    const float score = __shfl_xor_sync(FULL_MASK, best.score, o);
    const long long of = __shfl_xor_sync(FULL_MASK, best.of, o);
    consider(best, score, of);
  }
}

struct Counter {
  uint2 seed;
  unsigned step;
  unsigned long long ordinal;

  __device__ uint4 words(unsigned block) const {
    return philox4x32(make_uint4(block, step, (unsigned)ordinal, (unsigned)(ordinal >> 32)), seed);
  }
};

// The lane that is drawn, for thread 0. All threads of the block take part.
static __device__ __forceinline__ long long draw_lane(const Softmax (&mine)[MINE], const Counter& counter, Best* shared) {
  Best best{-infinity(), LANES_OF_ROW};
#pragma unroll
  for (int m = 0; m < MINE; ++m) {
    const int lane = m * BLOCK + threadIdx.x;
    if (mine[m].mass > 0.0f)
      consider(best, mine[m].top + logf(mine[m].mass) + gumbel(word_of(counter.words(lane / 4), lane % 4)), lane);
  }
  best_of_warp(best);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = best;
  __syncthreads();
  best = Best{-infinity(), LANES_OF_ROW};
  if (threadIdx.x < 32) {
    if (threadIdx.x < BLOCK / 32) best = shared[threadIdx.x];
    best_of_warp(best);
  }
  return best.of;
}

// A token of the lane, for the threads of warp 0, which all take part.
static __device__ __forceinline__ long long draw_token(long long lane, const LOGIT* row, long long V, bool aligned,
                                                float inverse_temperature, const Counter& counter) {
  const long long chunks = (V + CHUNK - 1) / CHUNK;
  Best best{-infinity(), V};
  for (long long c = lane + (long long)threadIdx.x * LANES_OF_ROW; c < chunks; c += 32 * LANES_OF_ROW) {
    float x[CHUNK];
    load_scaled(x, row, c, V, aligned, inverse_temperature);
#pragma unroll
    for (int half = 0; half < CHUNK / 4; ++half) {
      const uint4 words = counter.words(128 + (unsigned)(c * CHUNK / 4) + half);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float logit = x[half * 4 + i];
        if (logit > -infinity()) consider(best, logit + gumbel(word_of(words, i)), c * CHUNK + half * 4 + i);
      }
    }
  }
  best_of_warp(best);
  return best.of;
}

extern "C" __global__ void __launch_bounds__(BLOCK, 512 / BLOCK)
    sample_logprob(const LOGIT* __restrict__ logits, const float* __restrict__ temperatures,
                   const long long* __restrict__ ordinals, const long long* __restrict__ steps, long long* tokens,
                   float* logprobs, float* entropies, long long V, long long seed, long long aligned) {
  __shared__ Softmax shared[LANES_OF_ROW / 32];
  __shared__ Best shared_best[BLOCK / 32];
  const long long n = blockIdx.x;
  const LOGIT* row = logits + n * V;
  const float temperature = temperatures[n];
  const bool greedy = temperature == 0.0f;
  const float inverse_temperature = greedy ? 1.0f : temperature > 0.0f ? 1.0f / temperature : NO_NUMBER;
  const Counter counter{make_uint2((unsigned)seed, (unsigned)(seed >> 32)), (unsigned)steps[n],
                        (unsigned long long)ordinals[n]};

  Softmax mine[MINE];
  read_row(mine, row, V, aligned, inverse_temperature);
  long long lane = greedy ? LANES_OF_ROW : draw_lane(mine, counter, shared_best);
  const Softmax whole = merge_lanes(mine, shared);
  if (threadIdx.x >= 32) return;

  lane = __shfl_sync(FULL_MASK, lane, 0);
  long long token = V;
  if (lane < LANES_OF_ROW) token = draw_token(lane, row, V, aligned, inverse_temperature, counter);
  if (threadIdx.x) return;
  if (token >= V) token = first_top(whole, row, V, inverse_temperature);
  const float log_mass = logf(whole.mass);
  tokens[n] = token;
  logprobs[n] = (to_f32(row[token]) * inverse_temperature - whole.top) - log_mass;
  entropies[n] = log_mass - whole.slope / whole.mass;
}
