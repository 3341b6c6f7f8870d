// K11: the FP8 scale of each row of a weight matrix that makes the smallest error on the layer's output.
//
//   w [rows, columns] IN, moments [columns] f32 or null --> codes [rows, columns] e4m3 bytes,
//   scales, encodes [rows] f32, choices [rows] i32
//
// Candidate c of 33 is (amax / 448) * (1 - c / 64); its error is the sum of moment * (w - code * scale)^2. The first of
// the smallest wins. `encodes` is that scale, `scales` the one that fits its codes best: sum(m w q) / sum(m q q).
// Weights and moments that are not finite, and moments below 0, count as 0. A warp per row; a lane adds four terms in
// float32 and those sums in float64, so that the choice does not depend on how many lanes there are. The row is read
// from the cache once for every PASS candidates: the kernel is bound by arithmetic, not by memory.
//
// IN: float, bf16. BLOCK: threads. PASS: candidates at a time, a divisor of 33. vector: see fp8.cuh.
#include "fp8.cuh"

constexpr int CANDIDATES = 33;
static_assert(CANDIDATES % PASS == 0, "PASS must divide the number of candidates");

static __device__ __forceinline__ double sum_of_warp(double x) {
#pragma unroll
  for (int by = WARP / 2; by > 0; by /= 2) x += __shfl_xor_sync(FULL_MASK, x, by);
  return x;
}

static __device__ __forceinline__ float scale_at(float widest, int candidate) {
  return __fmul_rn(widest, 1.0f - candidate / (2.0f * (CANDIDATES - 1)));
}

struct Four {
  float weight[4], moment[4];
};

// Four weights and their moments, with 0 for what takes no part.
static __device__ __forceinline__ Four load(const IN* row, const float* moments, long long column, long long columns,
                                            bool vector) {
  Four four;
  load4(row, column, columns, vector, four.weight);
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const float moment = column + i >= columns ? 0.0f : moments ? moments[column + i] : 1.0f;
    four.moment[i] = is_finite(four.weight[i]) && is_finite(moment) && moment > 0.0f ? moment : 0.0f;
    four.weight[i] = finite_or_zero(four.weight[i]);
  }
  return four;
}

static __device__ __forceinline__ float rounded(float weight, float inverse) {
  return round_e4m3(clamp_e4m3(__fmul_rn(weight, inverse)));
}

// grid: ceil(rows / (BLOCK / 32))
extern "C" __global__ void __launch_bounds__(BLOCK)
    range_search(const IN* w, const float* moments, unsigned char* codes, float* scales, float* encodes, int* choices,
                 long long rows, long long columns, long long vector) {
  const long long row = (long long)blockIdx.x * (BLOCK / WARP) + threadIdx.x / WARP;
  if (row >= rows) return;  // the same for the whole warp
  const IN* from = w + row * columns;
  const long long first = 4 * (threadIdx.x % WARP), step = 4 * WARP;
  float amax = 0.0f;
  for (long long column = first; column < columns; column += step) {
    float four[4];
    load4(from, column, columns, vector, four);
    amax = fmaxf(amax, amax4(four));
  }
  const float widest = scale_of(warp_max(amax), false);

  double best = infinity();
  int choice = 0;
  for (int begin = 0; begin < CANDIDATES; begin += PASS) {
    float scale[PASS], inverse[PASS];
    double error[PASS];
#pragma unroll
    for (int i = 0; i < PASS; i++) {
      scale[i] = scale_at(widest, begin + i);
      inverse[i] = reciprocal(scale[i]);
      error[i] = 0.0;
    }
    for (long long column = first; column < columns; column += step) {
      const Four four = load(from, moments, column, columns, vector);
#pragma unroll
      for (int i = 0; i < PASS; i++) {
        float sum = 0.0f;
#pragma unroll
        for (int j = 0; j < 4; j++) {
          const float back = __fmul_rn(rounded(four.weight[j], inverse[i]), scale[i]);
          const float miss = __fadd_rn(four.weight[j], -back);
          sum = __fadd_rn(sum, __fmul_rn(four.moment[j], __fmul_rn(miss, miss)));
        }
        error[i] += sum;
      }
    }
#pragma unroll
    for (int i = 0; i < PASS; i++) {
      const double total = sum_of_warp(error[i]);
      if (total < best) best = total, choice = begin + i;
    }
  }

  const float scale = scale_at(widest, choice), inverse = reciprocal(scale);
  double along = 0.0, norm = 0.0;
  for (long long column = first; column < columns; column += step) {
    const Four four = load(from, moments, column, columns, vector);
    float sum_along = 0.0f, sum_norm = 0.0f, raw[4];
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const float q = rounded(four.weight[j], inverse);
      sum_along = __fadd_rn(sum_along, __fmul_rn(__fmul_rn(four.moment[j], four.weight[j]), q));
      sum_norm = __fadd_rn(sum_norm, __fmul_rn(__fmul_rn(four.moment[j], q), q));
    }
    along += sum_along, norm += sum_norm;
    load4(from, column, columns, vector, raw);
    store4(codes + row * columns, column, columns, vector, encode4(raw, inverse));
  }
  along = sum_of_warp(along), norm = sum_of_warp(norm);
  if (threadIdx.x % WARP) return;
  const double fitted = along / norm;
  scales[row] = norm > 0.0 && fitted > 0.0 && fitted < infinity() ? (float)fitted : scale;
  encodes[row] = scale;
  choices[row] = choice;
}
