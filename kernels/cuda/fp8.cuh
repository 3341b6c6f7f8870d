// e4m3 numbers: 1 sign, 4 exponent, 3 mantissa bits; normal from 2^-6 to 448, no infinity, NaN is 0x7f.
//
// Arithmetic that is the same everywhere; the conversion instruction of sm_89 and later gives the same bits. Products
// and sums that must not be fused are written __fmul_rn and __fadd_rn.
#pragma once

#include "common.cuh"

constexpr float E4M3_MAX = 448.0f;
constexpr float MIN_AMAX = 7.888609052210118e-31f;  // 2^-100

static __device__ __forceinline__ bool is_finite(float x) { return (__float_as_uint(x) & 0x7f800000u) != 0x7f800000u; }

static __device__ __forceinline__ float finite_or_zero(float x) { return is_finite(x) ? x : 0.0f; }

static __device__ __forceinline__ float clamp_e4m3(float x) { return fminf(fmaxf(x, -E4M3_MAX), E4M3_MAX); }

// The e4m3 number nearest to x, |x| <= 448, ties to even: adding 1.5 * 2^(e + 20), with 2^e the exponent of x or 2^-6,
// leaves three bits of mantissa.
static __device__ __forceinline__ float round_e4m3(float x) {
  const unsigned least = 121u << 23, exponent = __float_as_uint(x) & 0x7f800000u;
  const float big = __uint_as_float(((exponent > least ? exponent : least) + (20u << 23)) | 0x400000u);
  return __fadd_rn(__fadd_rn(x, big), -big);
}

// 1 / x and x / 448, rounded as IEEE has it, for x from 2^-110 to 2^120. The operator / would bring a subroutine for
// other numbers, and with it spills. The steps after rcp.approx are those of the compiler's own fast path.
static __device__ __forceinline__ float reciprocal(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return fmaf(y, fmaf(-x, y, 1.0f), y);
#else
  return 1.0f / x;
#endif
}

static __device__ __forceinline__ float over_448(float x) {
  constexpr float INVERSE = 1.0f / E4M3_MAX;
  const float y = __fmul_rn(x, INVERSE);
  return fmaf(fmaf(-E4M3_MAX, y, x), INVERSE, y);
}

// The scale by which amax becomes at most 448: amax / 448, or the power of two at or above it.
static __device__ __forceinline__ float scale_of(float amax, bool pow2) {
  amax = fmaxf(amax, MIN_AMAX);
  if (!pow2) return over_448(amax);
  const unsigned bits = __float_as_uint(amax);  // 448 = 1.75 * 2^8
  return __uint_as_float((bits & 0x7f800000u) - (8u << 23) + ((bits & 0x7fffffu) > 0x600000u ? 1u << 23 : 0u));
}

// Codes of two numbers, the first in the low byte.
static __device__ __forceinline__ unsigned encode2(float low, float high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  unsigned short codes;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(codes) : "f"(high), "f"(low));
  return codes;
#else
  const float both[2] = {low, high};
  unsigned codes = 0;
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const float rounded = round_e4m3(clamp_e4m3(both[i])) * 7.52316384526264e-37f;  // 2^-120: the exponents' offset
    const unsigned sign = __float_as_uint(both[i]) >> 24 & 0x80u, size = (__float_as_uint(rounded) & 0x7fffffffu) >> 20;
    codes |= (both[i] != both[i] ? 0x7fu : sign | size) << (8 * i);
  }
  return codes;
#endif
}

// Codes of four numbers times `inverse`, the first in the lowest byte.
static __device__ __forceinline__ unsigned encode4(const float* x, float inverse) {
  return encode2(__fmul_rn(x[0], inverse), __fmul_rn(x[1], inverse)) |
         encode2(__fmul_rn(x[2], inverse), __fmul_rn(x[3], inverse)) << 16;
}

static __device__ __forceinline__ float decode(unsigned char code) {
  const unsigned size = code & 0x7fu;
  const float number = __uint_as_float(size << 20) * 1.329227995784916e36f;  // 2^120
  const float signless = size == 0x7fu ? __uint_as_float(0x7fffffffu) : number;
  return __uint_as_float(__float_as_uint(signless) | (code & 0x80u) << 24);
}

// Elements column .. column + 3 of a row as float; 0 past its end. `vector`: every row begins at a multiple of four
// elements' size, and has a multiple of four columns.
static __device__ __forceinline__ void load4(const float* row, long long column, long long columns, bool vector,
                                             float* out) {
  if (vector && column < columns) {
    const float4 four = *reinterpret_cast<const float4*>(row + column);
    out[0] = four.x, out[1] = four.y, out[2] = four.z, out[3] = four.w;
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; i++) out[i] = column + i < columns ? row[column + i] : 0.0f;
}

static __device__ __forceinline__ void load4(const bf16* row, long long column, long long columns, bool vector,
                                             float* out) {
  if (vector && column < columns) {
    const uint2 four = *reinterpret_cast<const uint2*>(row + column);
    out[0] = __uint_as_float(four.x << 16), out[1] = __uint_as_float(four.x & 0xffff0000u);
    out[2] = __uint_as_float(four.y << 16), out[3] = __uint_as_float(four.y & 0xffff0000u);
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; i++) out[i] = column + i < columns ? to_f32(row[column + i]) : 0.0f;
}

// Stores four codes as load4 loads; nothing past the end.
static __device__ __forceinline__ void store4(unsigned char* row, long long column, long long columns, bool vector,
                                              unsigned codes) {
  if (vector && column < columns) {
    *reinterpret_cast<unsigned*>(row + column) = codes;
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; i++)
    if (column + i < columns) row[column + i] = (unsigned char)(codes >> (8 * i));
}

// The largest absolute value of four, those that are not finite left out.
static __device__ __forceinline__ float amax4(const float* x) {
  float amax = 0.0f;
#pragma unroll
  for (int i = 0; i < 4; i++) amax = fmaxf(amax, fabsf(finite_or_zero(x[i])));
  return amax;
}
