// CUDA C++ as our kernels use it, for a plain C++ compiler: qualifiers, warp operations, atomics, mathematics.
//
// A thread is a fiber (fibers.cpp). What is left out on purpose does not compile: __activemask and shuffles without a
// mask, grid synchronisation, asynchronous copies, tensor cores. __device__ functions that declare __shared__ variables
// must be static.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include <vector_functions.h>
#include <vector_types.h>

#include "fibers.h"

#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __constant__
#undef __forceinline__
#undef __noinline__
#undef __launch_bounds__
#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __shared__ static __attribute__((section("shim_shared")))

#define SHIM_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()
#define SHIM_HERE shim::Site{file, line}

using std::max;
using std::min;

constexpr int warpSize = 32;

// Bits of any value up to 8 bytes, and back.
template <class T>
inline uint64_t shim_bits(T value) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  return bits;
}
template <class T>
inline T shim_value(uint64_t bits) {
  T value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

inline void __syncthreads(SHIM_SITE) { shim::barrier(0, SHIM_HERE); }
inline int __syncthreads_count(int p, SHIM_SITE) { return shim::barrier(p != 0, SHIM_HERE); }
inline int __syncthreads_or(int p, SHIM_SITE) { return shim::barrier(p != 0, SHIM_HERE) != 0; }
inline int __syncthreads_and(int p, SHIM_SITE) { return shim::barrier(p == 0, SHIM_HERE) == 0; }
inline void __syncwarp(unsigned mask = 0xffffffffu, SHIM_SITE) { shim::exchange(shim::Op::syncwarp, mask, 0, SHIM_HERE); }
inline void __threadfence() { shim::may_yield(); }
inline void __threadfence_block() { shim::may_yield(); }

template <class T>
inline T shim_shuffle(unsigned mask, T value, int from, shim::Site site) {
  const uint64_t* lanes = shim::exchange(shim::Op::shuffle, mask, shim_bits(value), site);
  if (!(mask >> from & 1)) shim::fail(site, "reads lane %d, which the mask 0x%08x leaves out", from, mask);
  return shim_value<T>(lanes[from]);
}
template <class T>
inline T __shfl_sync(unsigned mask, T value, int from, int width = 32, SHIM_SITE) {
  return shim_shuffle(mask, value, (shim::lane() & ~(width - 1)) | (from & (width - 1)), SHIM_HERE);
}
template <class T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32, SHIM_SITE) {
  const int lane = shim::lane(), from = lane - int(by);
  return shim_shuffle(mask, value, from < (lane & ~(width - 1)) ? lane : from, SHIM_HERE);
}
template <class T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32, SHIM_SITE) {
  const int lane = shim::lane(), from = lane + int(by);
  return shim_shuffle(mask, value, from > (lane | (width - 1)) ? lane : from, SHIM_HERE);
}
template <class T>
inline T __shfl_xor_sync(unsigned mask, T value, int by, int width = 32, SHIM_SITE) {
  const int lane = shim::lane(), from = lane ^ by;
  return shim_shuffle(mask, value, from > (lane | (width - 1)) ? lane : from, SHIM_HERE);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, SHIM_SITE) {
  const uint64_t* lanes = shim::exchange(shim::Op::ballot, mask, predicate != 0, SHIM_HERE);
  unsigned votes = 0;
  for (int l = 0; l < 32; ++l)
    if (mask >> l & 1) votes |= unsigned(lanes[l]) << l;
  return votes;
}
inline int __any_sync(unsigned mask, int p, SHIM_SITE) { return __ballot_sync(mask, p, file, line) != 0; }
inline int __all_sync(unsigned mask, int p, SHIM_SITE) { return __ballot_sync(mask, p, file, line) == mask; }
template <class T>
inline unsigned __match_any_sync(unsigned mask, T value, SHIM_SITE) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  const uint64_t* lanes = shim::exchange(shim::Op::match, mask, shim_bits(value), SHIM_HERE);
  unsigned same = 0;
  for (int l = 0; l < 32; ++l)
    if ((mask >> l & 1) && lanes[l] == shim_bits(value)) same |= 1u << l;
  return same;
}
template <class T>
inline unsigned __match_all_sync(unsigned mask, T value, int* all, SHIM_SITE) {
  const unsigned same = __match_any_sync(mask, value, file, line);
  *all = same == mask;
  return *all ? mask : 0;
}
template <class T, class F>
inline T shim_reduce(unsigned mask, T value, F combine, shim::Site site) {
  const uint64_t* lanes = shim::exchange(shim::Op::reduce, mask, shim_bits(value), site);
  T total = value;
  for (int l = 0; l < 32; ++l)
    if ((mask >> l & 1) && l != shim::lane()) total = combine(total, shim_value<T>(lanes[l]));
  return total;
}
#define SHIM_REDUCE(name, type, expression)                            \
  inline type name(unsigned mask, type value, SHIM_SITE) {             \
    return shim_reduce(mask, value, [](type a, type b) -> type { return expression; }, SHIM_HERE); \
  }
SHIM_REDUCE(__reduce_add_sync, unsigned, a + b)
SHIM_REDUCE(__reduce_add_sync, int, int(unsigned(a) + unsigned(b)))
SHIM_REDUCE(__reduce_min_sync, unsigned, min(a, b))
SHIM_REDUCE(__reduce_min_sync, int, min(a, b))
SHIM_REDUCE(__reduce_max_sync, unsigned, max(a, b))
SHIM_REDUCE(__reduce_max_sync, int, max(a, b))
SHIM_REDUCE(__reduce_and_sync, unsigned, a & b)
SHIM_REDUCE(__reduce_or_sync, unsigned, a | b)
SHIM_REDUCE(__reduce_xor_sync, unsigned, a ^ b)

// Atomics are points where another thread may go first: code that relies on their order shows it.
#define SHIM_UNSEEN __attribute__((no_sanitize("thread"), noinline))
#define SHIM_ATOMIC(name, expression)   \
  template <class T>                    \
  SHIM_UNSEEN T name(T* p, T value) {   \
    shim::atomic(p, sizeof *p);         \
    const T old = *p;                   \
    *p = expression;                    \
    return old;                         \
  }
SHIM_ATOMIC(atomicAdd, T(old + value))
SHIM_ATOMIC(atomicSub, T(old - value))
SHIM_ATOMIC(atomicMin, min(old, value))
SHIM_ATOMIC(atomicMax, max(old, value))
SHIM_ATOMIC(atomicExch, value)
SHIM_ATOMIC(atomicAnd, T(old & value))
SHIM_ATOMIC(atomicOr, T(old | value))
SHIM_ATOMIC(atomicXor, T(old ^ value))
template <class T>
SHIM_UNSEEN T atomicCAS(T* p, T expected, T value) {
  shim::atomic(p, sizeof *p);
  const T old = *p;
  if (old == expected) *p = value;
  return old;
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll((unsigned long long)x) : 64; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned((uint64_t(a) * b) >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return (unsigned long long)(((unsigned __int128)a * b) >> 64);
}
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned s) {
  const uint64_t bytes = uint64_t(b) << 32 | a;
  unsigned out = 0;
  for (int i = 0; i < 4; ++i) out |= unsigned(bytes >> (8 * (s >> (4 * i) & 7)) & 255) << (8 * i);
  return out;
}

inline unsigned __float_as_uint(float x) { return shim_value<unsigned>(shim_bits(x)); }
inline int __float_as_int(float x) { return shim_value<int>(shim_bits(x)); }
inline float __uint_as_float(unsigned x) { return shim_value<float>(shim_bits(x)); }
inline float __int_as_float(int x) { return shim_value<float>(shim_bits(x)); }
inline long long __double_as_longlong(double x) { return shim_value<long long>(shim_bits(x)); }
inline double __longlong_as_double(long long x) { return shim_value<double>(shim_bits(x)); }

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fsqrt_rn(float a) { return sqrtf(a); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __log2f(float x) { return log2f(x); }
inline float __exp2f(float x) { return exp2f(x); }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline int __float2int_rn(float x) { return int(nearbyintf(x)); }
inline long long __float2ll_rn(float x) { return (long long)nearbyintf(x); }

// Loads and stores with a cache hint.
template <class T> inline T __ldg(const T* p) { return *p; }
template <class T> inline T __ldcg(const T* p) { return *p; }
template <class T> inline T __ldcs(const T* p) { return *p; }
template <class T> inline void __stcg(T* p, T value) { *p = value; }
template <class T> inline void __stcs(T* p, T value) { *p = value; }

// How the harness calls a kernel: arguments as the CUDA driver takes them, a pointer to each.
namespace shim {

template <class T>
inline const char* kind(T*) {
  if constexpr (std::is_same_v<std::remove_cv_t<T>, void> || std::is_class_v<T>)
    return "p* ";
  else
    return sizeof(T) == 1 ? "p1 " : sizeof(T) == 2 ? "p2 " : sizeof(T) == 4 ? "p4 " : "p8 ";
}
inline const char* kind(long long) { return "long long "; }
inline const char* kind(unsigned long long) { return "long long "; }
inline const char* kind(float) { return "float "; }
inline const char* kind(double) { return "double "; }

template <class... A, size_t... I>
inline void call(void (*kernel)(A...), void** args, std::index_sequence<I...>) {
  kernel(*static_cast<std::remove_cv_t<A>*>(args[I])...);
}
template <class... A>
inline void call(void (*kernel)(A...), void** args) {
  call(kernel, args, std::index_sequence_for<A...>());
}
template <class... A>
inline void signature(void (*)(A...), char* text) {
  *text = 0;
  (strcat(strcat(text, kind(A())), ","), ...);
}

}  // namespace shim

extern "C" char __start_shim_shared[] __attribute__((weak, visibility("hidden")));
extern "C" char __stop_shim_shared[] __attribute__((weak, visibility("hidden")));
#define SHIM_LIBRARY                                    \
  extern "C" char* shim_shared_begin() { return __start_shim_shared; } \
  extern "C" char* shim_shared_end() { return __stop_shim_shared; }
#define SHIM_KERNEL(name)                                                      \
  extern "C" void shim_call_##name(void** args) { shim::call(name, args); }    \
  extern "C" void shim_signature_##name(char* text) { shim::signature(name, text); }
