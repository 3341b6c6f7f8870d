// K5 for rows in fp8: the weighted sum of each token's k rows, e4m3 numbers with their scales, in bf16.
//
//   y [N, D] e4m3, row-major; scales [N, B] f32: number = e4m3 * scale, a scale for each D / B columns of a row, which
//   are all of them or a multiple of eight; rows [tokens, k] INDEX, negative for a choice that was dropped;
//   weights [tokens, k] f32; out [tokens, D] bf16.
//
// A block per token; each thread adds its chunks of eight columns, in the order of the choices, in f32.
// Deterministic, independent of BLOCK; no atomics. Offsets have 64 bits. `aligned`: rows of y start at multiples of 8
// bytes, those of out at multiples of 16.
//
// Configuration: INDEX int or long long; BLOCK threads, a multiple of 32. Grid: tokens.
#include "vector.cuh"

// The exponent moves 120 places up; 2^120 brings back what that took, denormal numbers included.
static __device__ __forceinline__ float of_e4m3(unsigned bits) {
  const unsigned magnitude = bits & 0x7f;
  const float number = __uint_as_float(magnitude << 20) * 1.329227995784916e36f;
  return magnitude == 0x7f ? __int_as_float(0x7fffffff) : bits & 0x80 ? -number : number;
}

static __device__ __forceinline__ void load_e4m3(float (&x)[CHUNK], const unsigned char* row, long long c, long long D,
                                                 bool aligned) {
  if (aligned) {
    const uint2 packed = reinterpret_cast<const uint2*>(row)[c];
#pragma unroll
    for (int i = 0; i < CHUNK; ++i) x[i] = of_e4m3((i < 4 ? packed.x : packed.y) >> 8 * (i % 4) & 0xff);
  } else {
#pragma unroll
    for (int i = 0; i < CHUNK; ++i) x[i] = c * CHUNK + i < D ? of_e4m3(row[c * CHUNK + i]) : 0.0f;
  }
}

extern "C" __global__ void __launch_bounds__(BLOCK)
    unpermute_fp8_rows(const unsigned char* __restrict__ y, const float* __restrict__ scales,
                       const INDEX* __restrict__ rows, const float* __restrict__ weights, bf16* __restrict__ out,
                       long long k, long long N, long long D, long long B, long long aligned) {
  const long long token = blockIdx.x, chunks = (D + CHUNK - 1) / CHUNK;
  const int width = (int)(D / B);
  for (long long c = threadIdx.x; c < chunks; c += BLOCK) {
    float sum[CHUNK] = {};
    const int part = (int)c * CHUNK / width;
    for (long long i = 0; i < k; ++i) {
      const long long row = rows[token * k + i];
      if (row < 0 || row >= N) continue;
      const float weight = weights[token * k + i], scale = scales[row * B + part];
      float piece[CHUNK];
      load_e4m3(piece, y + row * D, c, D, aligned);
#pragma unroll
      for (int j = 0; j < CHUNK; ++j) sum[j] = fmaf(weight, piece[j] * scale, sum[j]);
    }
    store_chunk(out + token * D, sum, c, D, aligned);
  }
}
