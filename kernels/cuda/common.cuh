// What every kernel here uses: warp arithmetic in a fixed order, number formats, dynamic shared memory.
//
// The same source is compiled by NVRTC and, in tests, by a plain C++ compiler (tests/shim). Sizes and offsets are
// long long. Functions are static: the shim keeps __shared__ variables of a function in one section.
#pragma once

constexpr int WARP = 32;
constexpr unsigned FULL_MASK = 0xffffffffu;

// DYN_SMEM(int, counts): `counts` points to the launch's dynamic shared memory, 16-byte aligned.
#ifdef HEADRACE_SHIM
#define DYN_SMEM(type, name) type* name = static_cast<type*>(shim::dynamic_shared())
#else
#define DYN_SMEM(type, name)                                  \
  extern __shared__ __align__(16) unsigned char dyn_smem_[]; \
  type* name = reinterpret_cast<type*>(dyn_smem_)
#endif

static __device__ __forceinline__ float infinity() { return __int_as_float(0x7f800000); }

static __device__ __forceinline__ long long ceil_div(long long a, long long b) { return (a + b - 1) / b; }

// bfloat16 as its bits: no header, the same rounding everywhere.
struct bf16 {
  unsigned short bits;
};

static __device__ __forceinline__ float to_f32(float x) { return x; }

static __device__ __forceinline__ float to_f32(bf16 x) { return __uint_as_float(unsigned(x.bits) << 16); }

// To nearest, ties to even; any NaN becomes the NaN 0x7fff.
static __device__ __forceinline__ bf16 to_bf16(float x) {
  unsigned bits = __float_as_uint(x);
  bf16 out;
  out.bits = (bits & 0x7fffffffu) > 0x7f800000u ? 0x7fff : (unsigned short)((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
  return out;
}

static __device__ __forceinline__ void store(float* p, float x) { *p = x; }

static __device__ __forceinline__ void store(bf16* p, float x) { *p = to_bf16(x); }

// Every lane gets the sum (maximum) over the warp, added up as a butterfly: the same bits on each run.
static __device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int by = WARP / 2; by > 0; by /= 2) x += __shfl_xor_sync(FULL_MASK, x, by);
  return x;
}

static __device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int by = WARP / 2; by > 0; by /= 2) x = fmaxf(x, __shfl_xor_sync(FULL_MASK, x, by));
  return x;
}

// Sum over this lane and those before it.
static __device__ __forceinline__ int warp_scan(int x) {
  const int lane = threadIdx.x % WARP;
#pragma unroll
  for (int by = 1; by < WARP; by *= 2) {
    const int other = __shfl_up_sync(FULL_MASK, x, by);
    if (lane >= by) x += other;
  }
  return x;
}

// Sum over this thread and those before it. `partial` is shared, WARP ints; all threads of the block call this, and
// may call it again at once. `*total` gets the block's sum.
static __device__ __forceinline__ int block_scan(int x, int* partial, int* total) {
  const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, warps = blockDim.x / WARP;
  const int in_warp = warp_scan(x);
  if (lane == WARP - 1) partial[warp] = in_warp;
  __syncthreads();
  if (warp == 0) {
    const int sum = warp_scan(lane < warps ? partial[lane] : 0);
    if (lane < warps) partial[lane] = sum;
  }
  __syncthreads();
  const int before = warp ? partial[warp - 1] : 0;
  *total = partial[warps - 1];
  __syncthreads();
  return before + in_warp;
}

// Every thread gets the sum (maximum) over the block, in a fixed order. `partial` is shared, WARP floats.
static __device__ __forceinline__ float block_sum(float x, float* partial) {
  const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, warps = blockDim.x / WARP;
  x = warp_sum(x);
  if (lane == 0) partial[warp] = x;
  __syncthreads();
  x = warp_sum(lane < warps ? partial[lane] : 0.0f);
  __syncthreads();
  return x;
}

static __device__ __forceinline__ float block_max(float x, float* partial) {
  const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, warps = blockDim.x / WARP;
  x = warp_max(x);
  if (lane == 0) partial[warp] = x;
  __syncthreads();
  x = warp_max(lane < warps ? partial[lane] : -infinity());
  __syncthreads();
  return x;
}
