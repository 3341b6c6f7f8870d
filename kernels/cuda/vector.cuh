// Rows of numbers in chunks of eight: loading, storing, exp and log, for float and bf16.
//
// A chunk is eight neighbouring elements of a row, whether it travels as 16-byte words (`aligned`: the row starts at a
// multiple of 16 bytes and its length is a multiple of eight) or element by element. Sums over a row are cut into
// chunks, so the order of addition, and with it every bit of a result, depends neither on the alignment nor on the
// number of threads.
#pragma once
#include "common.cuh"

#define CHUNK 8
#define LOWEST (-3.402823466e38f)

// Sixteen bytes as the elements that they are.
template <typename T>
union Packed {
  uint4 word;
  T element[16 / sizeof(T)];
};

// x[0..7] = row[8c..8c+7]; what lies past `length` becomes `beyond`.
template <typename T>
static __device__ __forceinline__ void load_chunk(float (&x)[CHUNK], const T* row, long long c, long long length,
                                                  bool aligned, float beyond) {
  const long long first = c * CHUNK;
  if (aligned) {
    constexpr int PER_WORD = 16 / sizeof(T);
#pragma unroll
    for (int w = 0; w < CHUNK / PER_WORD; ++w) {
      Packed<T> packed;
      packed.word = reinterpret_cast<const uint4*>(row + first)[w];
#pragma unroll
      for (int i = 0; i < PER_WORD; ++i) x[w * PER_WORD + i] = to_f32(packed.element[i]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < CHUNK; ++i) x[i] = first + i < length ? to_f32(row[first + i]) : beyond;
  }
}

template <typename T>
static __device__ __forceinline__ void store_chunk(T* row, const float (&x)[CHUNK], long long c, long long length,
                                                   bool aligned) {
  const long long first = c * CHUNK;
  if (aligned) {
    constexpr int PER_WORD = 16 / sizeof(T);
#pragma unroll
    for (int w = 0; w < CHUNK / PER_WORD; ++w) {
      Packed<T> packed;
#pragma unroll
      for (int i = 0; i < PER_WORD; ++i) store(&packed.element[i], x[w * PER_WORD + i]);
      reinterpret_cast<uint4*>(row + first)[w] = packed.word;
    }
  } else {
#pragma unroll
    for (int i = 0; i < CHUNK; ++i)
      if (first + i < length) store(row + first + i, x[i]);
  }
}

// e^x for x <= 0 by one ex2; its relative error of about |x| * 1e-7 is harmless in a sum of such terms.
static __device__ __forceinline__ float exp_below(float x) { return exp2f(x * 1.44269504f); }
