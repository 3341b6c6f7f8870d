// One pass over a row of V logits: their maximum, the mass and the slope of their softmax, and where the maximum is.
//
// Lane L of 512 adds the chunks L, L + 512, ... of eight logits in order; the lanes are then merged in one binary tree
// over the bits of L, lowest first. A thread plays 512 / BLOCK lanes, so the bits of the result do not depend on BLOCK,
// nor on the other rows of a batch. What lies past V is -inf and adds exactly nothing: no token is made of padding.
#pragma once
#include "vector.cuh"

#define LANES_OF_ROW 512
#define MINE (LANES_OF_ROW / BLOCK)
#define NO_NUMBER (__int_as_float(0x7fffffff))

struct Softmax {
  float top;   // the largest logit; never below LOWEST, so that top - top is 0
  float mass;  // sum of exp(logit - top); NaN if a logit is NaN or +inf
  float slope; // sum of exp(logit - top) * (logit - top)
  int chunk;   // the first chunk that holds the top
};

static __device__ __forceinline__ Softmax no_logits() { return Softmax{LOWEST, 0.0f, 0.0f, 0x7fffffff}; }

// The slope at a distance: -inf would make 0 * inf of a forbidden token.
static __device__ __forceinline__ float finite(float distance) { return fmaxf(distance, -1e4f); }

static __device__ __forceinline__ void lower_to(Softmax& s, float top) {
  const float distance = s.top - top, factor = exp_below(distance);
  s.slope = fmaf(s.mass, finite(distance), s.slope) * factor;
  s.mass *= factor;
  s.top = top;
}

static __device__ __forceinline__ void add_chunk(Softmax& s, const float (&x)[CHUNK], int c) {
  float top = x[0];
#pragma unroll
  for (int i = 1; i < CHUNK; ++i) top = fmaxf(top, x[i]);
  if (top > s.top) {
    lower_to(s, top);
    s.chunk = c;
  }
#pragma unroll
  for (int i = 0; i < CHUNK; ++i) {
    const float distance = x[i] - s.top, weight = exp_below(distance);
    s.mass += weight;
    s.slope = fmaf(weight, finite(distance), s.slope);
  }
}

static __device__ __forceinline__ Softmax merged(Softmax a, Softmax b) {
  const float top = fmaxf(a.top, b.top);
  const int chunk = a.top > b.top ? a.chunk : b.top > a.top ? b.chunk : min(a.chunk, b.chunk);
  lower_to(a, top);
  lower_to(b, top);
  return Softmax{top, a.mass + b.mass, a.slope + b.slope, chunk};
}

static __device__ __forceinline__ Softmax from_lane(const Softmax& s, int offset) {
  return Softmax{__shfl_xor_sync(FULL_MASK, s.top, offset), __shfl_xor_sync(FULL_MASK, s.mass, offset),
                 __shfl_xor_sync(FULL_MASK, s.slope, offset), __shfl_xor_sync(FULL_MASK, s.chunk, offset)};
}

static __device__ __forceinline__ void load_scaled(float (&x)[CHUNK], const LOGIT* row, long long c, long long V,
                                                   bool aligned, float inverse_temperature) {
  load_chunk(x, row, c, V, aligned, -infinity());
#pragma unroll
  for (int i = 0; i < CHUNK; ++i)
    if (aligned || c * CHUNK + i < V) x[i] *= inverse_temperature;
}

// Each thread's lanes, not yet merged.
static __device__ __forceinline__ void read_row(Softmax (&mine)[MINE], const LOGIT* row, long long V, bool aligned,
                                                float inverse_temperature) {
  const long long chunks = (V + CHUNK - 1) / CHUNK;
#pragma unroll
  for (int m = 0; m < MINE; ++m) mine[m] = no_logits();
  for (long long first = threadIdx.x; first < chunks; first += LANES_OF_ROW) {
    float x[MINE][CHUNK];
#pragma unroll
    for (int m = 0; m < MINE; ++m)
      if (first + m * BLOCK < chunks) load_scaled(x[m], row, first + m * BLOCK, V, aligned, inverse_temperature);
#pragma unroll
    for (int m = 0; m < MINE; ++m)
      if (first + m * BLOCK < chunks) add_chunk(mine[m], x[m], (int)(first + m * BLOCK));
  }
}

// The whole row, for thread 0. `shared` holds one entry per 32 lanes. All threads of the block take part.
static __device__ __forceinline__ Softmax merge_lanes(Softmax (&mine)[MINE], Softmax* shared) {
#pragma unroll
  for (int m = 0; m < MINE; ++m) {
#pragma unroll
    for (int o = 1; o < 32; o *= 2) mine[m] = merged(mine[m], from_lane(mine[m], o));
    if (threadIdx.x % 32 == 0) shared[(m * BLOCK + threadIdx.x) / 32] = mine[m];
  }
  __syncthreads();
  Softmax whole = no_logits();
  if (threadIdx.x < 32) {
    if (threadIdx.x < LANES_OF_ROW / 32) whole = shared[threadIdx.x];
#pragma unroll
    for (int o = 1; o < LANES_OF_ROW / 32; o *= 2) whole = merged(whole, from_lane(whole, o));
  }
  return whole;
}

// The lowest token of the chunk whose logit is the row's largest; 0 if no logit is a number above -inf.
static __device__ __forceinline__ long long first_top(const Softmax& whole, const LOGIT* row, long long V,
                                                      float inverse_temperature) {
  if (whole.chunk == 0x7fffffff) return 0;
  const long long first = (long long)whole.chunk * CHUNK;
  for (long long v = first; v < first + CHUNK && v < V; ++v)
    if (to_f32(row[v]) * inverse_temperature == whole.top) return v;
  return first;
}
