// K1, the gate of a mixture of experts: the best k of E experts for each token, and their weights; with the gradient.
//
//   logits [T, E] LOGIT, row-major; bias [E] f32 or null; ids [T, k] i64; weights [T, k] f32;
//   scores [T, E] f32 or null; norms [T, 2] f32: the largest logit of a row, and one over the sum of
//   exp(logit - largest).
//
// Softmax: score = exp(logit) / sum, the choice is by logit. Sigmoid: score = 1 / (1 + exp(-logit)), the choice is by
// score + bias; the bias moves the choice only. With several groups of E / groups neighbouring experts, only the best
// `top_groups` groups take part, by their best expert (softmax) or the sum of their best two (sigmoid). Of equals the
// lower id wins; NaN counts as the largest number. weight = scale * score, divided by the sum of the k chosen scores if
// `renormalize`. With `replay`, ids are input, and an id outside [0, E) gets the weight NaN.
//
// Algorithm: LANES neighbouring threads hold a row in registers, expert (j * LANES + lane) * 4 + v in slot 4j + v, and
// find the best k times. A choice compares integers that order like the floats, so it is exact. Sums over a row form
// one binary tree over the bits of the expert's id, lowest first: their bits do not depend on LANES, E_MAX or BLOCK.
// Deterministic; no atomics.
//
// Configuration: LOGIT float or bf16; E_MAX >= E, a power of two; SLOTS 8 or 16, the experts of a thread, if a warp is
// enough for E_MAX then; BLOCK threads. Grid: ceil(T / (BLOCK / LANES)). 1 <= k <= 32, at most 32 groups.
#include "vector.cuh"

#if E_MAX > 32 * SLOTS
#undef SLOTS
#define SLOTS (E_MAX / 32)
#endif
#define LANES (E_MAX / SLOTS)
#define ROWS (BLOCK / LANES)
#define K_MAX 32
#define TAKEN 0u

// A larger number has a larger key; all NaN share the largest, both zeros one. No number has the key TAKEN.
static __device__ __forceinline__ unsigned key_of(float x) {
  if (x != x) return 0xffffffffu;
  const unsigned bits = __float_as_uint(x + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

static __device__ __forceinline__ float number_of(unsigned key) {
  return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

static __device__ __forceinline__ float sigmoid(float x) { return __fdividef(1.0f, 1.0f + expf(-x)); }

// Of the softmax of a row: score = exp(logit - top) * share.
struct Norm {
  float top, share;
};

struct Row {
  long long token;
  int lane;       // within the row
  int in_block;   // which row of the block
  unsigned mask;  // the threads of the row, within their warp

  __device__ Row() {
    in_block = threadIdx.x / LANES;
    token = (long long)blockIdx.x * ROWS + in_block;
    lane = threadIdx.x % LANES;
    mask = FULL_MASK >> (32 - LANES) << (threadIdx.x % 32 / LANES * LANES);
  }
  __device__ int expert(int slot) const { return (slot / 4 * LANES + lane) * 4 + slot % 4; }
};

// Four experts at once where `aligned`: E is a multiple of four and the logits start at a multiple of 16 bytes.
static __device__ __forceinline__ void load_row(float (&x)[SLOTS], const Row& row, const LOGIT* logits, long long E,
                                                bool aligned) {
  struct __align__(4 * sizeof(LOGIT)) Four {
    LOGIT of[4];
  };
  const LOGIT* start = logits + row.token * E;
#pragma unroll
  for (int s = 0; s < SLOTS; s += 4) {
    const int e = row.expert(s);
    if (aligned && e < E) {
      const Four four = *reinterpret_cast<const Four*>(start + e);
#pragma unroll
      for (int v = 0; v < 4; ++v) x[s + v] = to_f32(four.of[v]);
    } else {
#pragma unroll
      for (int v = 0; v < 4; ++v) x[s + v] = e + v < E ? to_f32(start[e + v]) : -infinity();
    }
  }
}

static __device__ __forceinline__ float tree_sum(float (&x)[SLOTS], const Row& row) {
  float sums[SLOTS / 4];
#pragma unroll
  for (int j = 0; j < SLOTS / 4; ++j) {
    float sum = (x[4 * j] + x[4 * j + 1]) + (x[4 * j + 2] + x[4 * j + 3]);
#pragma unroll
    for (int o = 1; o < LANES; o *= 2) sum += __shfl_xor_sync(row.mask, sum, o);
    sums[j] = sum;
  }
#pragma unroll
  for (int width = 1; width < SLOTS / 4; width *= 2)
#pragma unroll
    for (int j = 0; j + width < SLOTS / 4; j += 2 * width) sums[j] += sums[j + width];
  return sums[0];
}

static __device__ __forceinline__ float largest(const float (&x)[SLOTS], const Row& row) {
  float top = LOWEST;
#pragma unroll
  for (int s = 0; s < SLOTS; ++s) top = fmaxf(top, x[s]);
#pragma unroll
  for (int o = 1; o < LANES; o *= 2) top = fmaxf(top, __shfl_xor_sync(row.mask, top, o));
  return top;
}

// Takes the experts of all but the best groups out of the choice.
static __device__ void keep_top_groups(unsigned (&key)[SLOTS], unsigned* group_keys, const Row& row, long long E,
                                       int groups, int top_groups, bool by_two) {
  const int size = (int)E / groups;
  for (int g = 0; g < groups; ++g) {
    unsigned first = TAKEN, second = TAKEN;
#pragma unroll
    for (int s = 0; s < SLOTS; ++s)
      if ((unsigned)(row.expert(s) - g * size) < (unsigned)size) {
        second = max(second, min(first, key[s]));
        first = max(first, key[s]);
      }
#pragma unroll
    for (int o = 1; o < LANES; o *= 2) {
      const unsigned their_first = __shfl_xor_sync(row.mask, first, o);
      const unsigned their_second = __shfl_xor_sync(row.mask, second, o);
      second = max(min(first, their_first), max(second, their_second));
      first = max(first, their_first);
    }
    if (row.lane == 0)
      group_keys[g] = by_two && size > 1 ? key_of(number_of(first) + number_of(second)) : first;
  }
  __syncwarp(row.mask);
  unsigned kept = 0;
  for (int g = row.lane; g < groups; g += LANES) {
    int better = 0;
    for (int h = 0; h < groups; ++h)
      better += group_keys[h] > group_keys[g] || (group_keys[h] == group_keys[g] && h < g);
    kept |= (better < top_groups ? 1u : 0u) << g;
  }
#pragma unroll
  for (int o = 1; o < LANES; o *= 2) kept |= __shfl_xor_sync(row.mask, kept, o);
  for (int g = 0; g < groups; ++g)
    if (!(kept >> g & 1u)) {
#pragma unroll
      for (int s = 0; s < SLOTS; ++s)
        if ((unsigned)(row.expert(s) - g * size) < (unsigned)size) key[s] = TAKEN;
    }
}

// The id of the best expert left, which is then taken; the same for all threads of the row.
static __device__ __forceinline__ int take_best(unsigned (&key)[SLOTS], const Row& row) {
  unsigned best = TAKEN;
  int id = E_MAX;
#pragma unroll
  for (int s = 0; s < SLOTS; ++s)
    if (key[s] > best) {
      best = key[s];
      id = row.expert(s);
    }
#pragma unroll
  for (int o = 1; o < LANES; o *= 2) {
    const unsigned theirs = __shfl_xor_sync(row.mask, best, o);
    const int their_id = __shfl_xor_sync(row.mask, id, o);
    if (theirs > best || (theirs == best && their_id < id)) {
      best = theirs;
      id = their_id;
    }
  }
#pragma unroll
  for (int s = 0; s < SLOTS; ++s)
    if (row.expert(s) == id) key[s] = TAKEN;
  return id;
}

static __device__ __forceinline__ int within(long long id, long long E) { return id >= 0 && id < E ? (int)id : -1; }

static __device__ __forceinline__ float score_of(int id, const LOGIT* logits, bool sigmoidal, Norm norm) {
  if (id < 0) return __int_as_float(0x7fffffff);
  return sigmoidal ? sigmoid(to_f32(logits[id])) : expf(to_f32(logits[id]) - norm.top) * norm.share;
}

static __device__ __forceinline__ float floored(float sum) { return sum < 1e-20f ? 1e-20f : sum; }

extern "C" __global__ void __launch_bounds__(BLOCK, 512 / BLOCK)
    topk_gate(const LOGIT* logits, const float* bias, long long* ids, float* weights, float* scores, float* norms,
              long long T, long long E, long long k, long long sigmoidal, long long renormalize, float scale,
              long long groups, long long top_groups, long long replay, long long aligned) {
  __shared__ unsigned group_keys[ROWS][32];
  __shared__ int chosen[ROWS][K_MAX];
  __shared__ float chosen_score[ROWS][K_MAX];
  const Row row;
  if (row.token >= T) return;

  float x[SLOTS];
  unsigned key[SLOTS];
  load_row(x, row, logits, E, aligned);
#pragma unroll
  for (int s = 0; s < SLOTS; ++s) key[s] = row.expert(s) < E ? key_of(x[s]) : TAKEN;
  Norm norm{0.0f, 0.0f};
  if (!sigmoidal) {
    norm.top = largest(x, row);
#pragma unroll
    for (int s = 0; s < SLOTS; ++s) x[s] = expf(x[s] - norm.top);
    norm.share = 1.0f / tree_sum(x, row);
  }
#pragma unroll
  for (int s = 0; s < SLOTS; ++s) {
    const int e = row.expert(s);
    x[s] = sigmoidal ? sigmoid(x[s]) : x[s] * norm.share;
    if (sigmoidal && e < E) key[s] = key_of(x[s] + (bias ? bias[e] : 0.0f));
    if (scores && e < E) scores[row.token * E + e] = x[s];
  }
  if (row.lane == 0) {
    norms[row.token * 2] = norm.top;
    norms[row.token * 2 + 1] = norm.share;
  }

  if (replay) {
    for (long long i = row.lane; i < k; i += LANES) chosen[row.in_block][i] = within(ids[row.token * k + i], E);
  } else {
    if (groups > 1) keep_top_groups(key, group_keys[row.in_block], row, E, (int)groups, (int)top_groups, sigmoidal);
    for (long long i = 0; i < k; ++i) {
      const int id = take_best(key, row);
      if (row.lane == i % LANES) chosen[row.in_block][i] = id;
    }
  }
  __syncwarp(row.mask);

  for (long long i = row.lane; i < k; i += LANES)
    chosen_score[row.in_block][i] = score_of(chosen[row.in_block][i], logits + row.token * E, sigmoidal, norm);
  __syncwarp(row.mask);
  float total = 0.0f;
  for (long long i = 0; i < k; ++i) total += chosen_score[row.in_block][i];
  for (long long i = row.lane; i < k; i += LANES) {
    const float score = chosen_score[row.in_block][i];
    weights[row.token * k + i] = (renormalize ? score / floored(total) : score) * scale;
    if (!replay) ids[row.token * k + i] = chosen[row.in_block][i];
  }
}

// grad_weights [T, k] f32, grad_scores [T, E] f32 or null -> grad_logits [T, E] LOGIT. Nothing flows into the choice.
extern "C" __global__ void __launch_bounds__(BLOCK, 512 / BLOCK)
    topk_gate_backward(const LOGIT* logits, const long long* ids, const float* norms, const float* grad_weights,
                       const float* grad_scores, LOGIT* grad_logits, long long T, long long E, long long k,
                       long long sigmoidal, long long renormalize, float scale, long long aligned) {
  __shared__ int chosen[ROWS][K_MAX];
  __shared__ float chosen_score[ROWS][K_MAX];
  __shared__ float chosen_grad[ROWS][K_MAX];
  const Row row;
  if (row.token >= T) return;

  float x[SLOTS], grad[SLOTS], products[SLOTS];
  load_row(x, row, logits, E, aligned);
  const Norm norm{norms[row.token * 2], norms[row.token * 2 + 1]};
#pragma unroll
  for (int s = 0; s < SLOTS; ++s) {
    const int e = row.expert(s);
    grad[s] = grad_scores && e < E ? grad_scores[row.token * E + e] : 0.0f;
    x[s] = e >= E ? 0.0f : sigmoidal ? sigmoid(x[s]) : expf(x[s] - norm.top) * norm.share;
  }
  for (long long i = row.lane; i < k; i += LANES) {
    const int e = within(ids[row.token * k + i], E);
    chosen[row.in_block][i] = e;
    chosen_score[row.in_block][i] = score_of(e, logits + row.token * E, sigmoidal, norm);
    chosen_grad[row.in_block][i] = grad_weights[row.token * k + i] * scale;
  }
  __syncwarp(row.mask);

  float total = 0.0f, along = 0.0f;
  for (long long i = 0; i < k; ++i) {
    total += chosen_score[row.in_block][i];
    along += chosen_grad[row.in_block][i] * chosen_score[row.in_block][i];
  }
  const float share = total < 1e-20f ? 0.0f : along / (total * total);
  for (long long i = 0; i < k; ++i) {
    const float flow =
        renormalize ? chosen_grad[row.in_block][i] / floored(total) - share : chosen_grad[row.in_block][i];
#pragma unroll
    for (int s = 0; s < SLOTS; ++s)
      if (row.expert(s) == chosen[row.in_block][i]) grad[s] += flow;
  }
#pragma unroll
  for (int s = 0; s < SLOTS; ++s) products[s] = grad[s] * x[s];
  const float mean = sigmoidal ? 0.0f : tree_sum(products, row);
#pragma unroll
  for (int s = 0; s < SLOTS; ++s) {
    const int e = row.expert(s);
    const float result = sigmoidal ? grad[s] * x[s] * (1.0f - x[s]) : x[s] * (grad[s] - mean);
    if (e < E) store(grad_logits + row.token * E + e, result);
  }
}
