// K15: many tensors into one flat bucket, cast on the way, with a checksum; and back.
//
//   table [entries, 7] i64: address of the tensor, first unit in the bucket, elements, columns, 1 / columns as double,
//                           address of its scales, kind
//   bucket [16 * units] bytes: a tensor begins at a multiple of 16 bytes; what lies between is zero
//
// kind: 0 bytes as they are, `elements` of them; 1 f32 in the tensor, bf16 in the bucket; 2 f32, e4m3; 3 bf16, e4m3.
// e4m3 by the scale of the element's row of `columns`. A thread takes a unit of 16 bytes of the bucket at a time, and finds its entry in the
// table: by halving once, then by going on. checksum = sum over the bucket's 32-bit words of word * mix(index) +
// mix(-1 - bytes), modulo 2^64; mix is odd, so any change of one word shows. The sum has no order.
//
// BLOCK: threads. UNITS: that a thread takes.
#include "fp8.cuh"

typedef unsigned long long u64;

struct Entry {
  long long tensor, unit, elements, columns;
  double inverse;
  long long scales, kind;
};

constexpr int UNIT = 16;

static __device__ __forceinline__ u64 mix(u64 index) {
  u64 z = (index + 1) * 0x9e3779b97f4a7c15ull;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return (z ^ (z >> 31)) | 1;
}

static __device__ __forceinline__ u64 checked(const unsigned* words, u64 unit) {
  u64 sum = 0;
#pragma unroll
  for (int i = 0; i < 4; i++) sum += words[i] * mix(4 * unit + i);
  return sum;
}

// partial[block] = the sum over the block.
static __device__ __forceinline__ void leave_sum(u64 mine, u64* partial) {
  __shared__ u64 sums[BLOCK];
  sums[threadIdx.x] = mine;
  for (int half = BLOCK / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
  }
  if (threadIdx.x == 0) partial[blockIdx.x] = sums[0];
}

// The last entry that begins at `unit` or before.
static __device__ __forceinline__ long long find(const Entry* table, long long entries, long long unit) {
  long long low = 0, high = entries;
  while (high - low > 1) {
    const long long middle = (low + high) / 2;
    if (table[middle].unit <= unit) low = middle;
    else high = middle;
  }
  return low;
}

// Elements first .. first + PER of the tensor; 0 past its end.
template <class T, int PER>
static __device__ __forceinline__ void gather(const Entry& entry, long long first, float* out) {
  const bool vector = entry.tensor % UNIT == 0 && first + PER <= entry.elements;
#pragma unroll
  for (int i = 0; i < PER; i += 4)
    load4(reinterpret_cast<const T*>(entry.tensor), first + i, entry.elements, vector, out + i);
}

static __device__ __forceinline__ void put4(float* to, const float* x) {
  *reinterpret_cast<float4*>(to) = make_float4(x[0], x[1], x[2], x[3]);
}

static __device__ __forceinline__ void put4(bf16* to, const float* x) {
  *reinterpret_cast<uint2*>(to) = make_uint2(to_bf16(x[0]).bits | unsigned(to_bf16(x[1]).bits) << 16,
                                             to_bf16(x[2]).bits | unsigned(to_bf16(x[3]).bits) << 16);
}

// The way back.
template <class T, int PER>
static __device__ __forceinline__ void scatter(const Entry& entry, long long first, const float* x) {
  T* to = reinterpret_cast<T*>(entry.tensor) + first;
  if (entry.tensor % UNIT == 0 && first + PER <= entry.elements) {
#pragma unroll
    for (int i = 0; i < PER; i += 4) put4(to + i, x + i);
    return;
  }
#pragma unroll
  for (int i = 0; i < PER; i++)
    if (first + i < entry.elements) store(to + i, x[i]);
}

// Multiplies UNIT elements by the scales of their rows, or by the reciprocals.
static __device__ __forceinline__ void rescale(const Entry& entry, long long first, bool inverse, float* x) {
  const float* scales = reinterpret_cast<const float*>(entry.scales);
  long long row = (long long)((double)first * entry.inverse), column = first - row * entry.columns;
  if (column < 0) row--, column += entry.columns;  // the product may be off by one
  if (column >= entry.columns) row++, column -= entry.columns;
  float factor = inverse ? reciprocal(scales[row]) : scales[row];
#pragma unroll
  for (int i = 0; i < UNIT; i++) {
    if (first + i >= entry.elements) return;
    if (column == entry.columns) {
      column = 0, row++;
      factor = inverse ? reciprocal(scales[row]) : scales[row];
    }
    x[i] = __fmul_rn(x[i], factor);
    column++;
  }
}

template <class T>
static __device__ __forceinline__ void quantize(const Entry& entry, long long first, unsigned* words) {
  float x[UNIT];
  gather<T, UNIT>(entry, first, x);
  rescale(entry, first, true, x);
#pragma unroll
  for (int i = 0; i < 4; i++) words[i] = encode4(x + 4 * i, 1.0f);
}

template <class T>
static __device__ __forceinline__ void restore(const Entry& entry, long long first, const unsigned* words) {
  float x[UNIT];
#pragma unroll
  for (int i = 0; i < UNIT; i++) x[i] = decode((unsigned char)(words[i / 4] >> (8 * (i % 4))));
  rescale(entry, first, false, x);
  scatter<T, UNIT>(entry, first, x);
}

// Bytes as they are: a whole aligned unit at once, else one by one.
static __device__ __forceinline__ void copy_in(const Entry& entry, long long first, unsigned* words) {
  const unsigned char* from = reinterpret_cast<const unsigned char*>(entry.tensor) + first;
  if (entry.tensor % UNIT == 0 && first + UNIT <= entry.elements) {
    const uint4 unit = *reinterpret_cast<const uint4*>(from);
    words[0] = unit.x, words[1] = unit.y, words[2] = unit.z, words[3] = unit.w;
    return;
  }
#pragma unroll
  for (int i = 0; i < UNIT; i++)
    if (first + i < entry.elements) words[i / 4] |= unsigned(from[i]) << (8 * (i % 4));
}

static __device__ __forceinline__ void copy_out(const Entry& entry, long long first, const unsigned* words) {
  unsigned char* to = reinterpret_cast<unsigned char*>(entry.tensor) + first;
  if (entry.tensor % UNIT == 0 && first + UNIT <= entry.elements) {
    *reinterpret_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
    return;
  }
#pragma unroll
  for (int i = 0; i < UNIT; i++)
    if (first + i < entry.elements) to[i] = (unsigned char)(words[i / 4] >> (8 * (i % 4)));
}

// grid: ceil(units / (BLOCK * UNITS)); partial: one u64 per block
extern "C" __global__ void __launch_bounds__(BLOCK)
    pack(const Entry* table, uint4* bucket, u64* partial, long long entries, long long units) {
  long long unit = (long long)blockIdx.x * BLOCK * UNITS + threadIdx.x, at = find(table, entries, unit);
  u64 sum = 0;
  for (int i = 0; i < UNITS && unit < units; i++, unit += BLOCK) {
    while (at + 1 < entries && table[at + 1].unit <= unit) at++;
    const Entry entry = table[at];
    const long long local = unit - entry.unit;
    unsigned words[4] = {0, 0, 0, 0};
    if (entry.kind == 0) {
      copy_in(entry, local * UNIT, words);
    } else if (entry.kind == 1) {
      float x[8];
      gather<float, 8>(entry, local * 8, x);
#pragma unroll
      for (int j = 0; j < 4; j++) words[j] = to_bf16(x[2 * j]).bits | unsigned(to_bf16(x[2 * j + 1]).bits) << 16;
    } else if (entry.kind == 2) {
      quantize<float>(entry, local * UNIT, words);
    } else {
      quantize<bf16>(entry, local * UNIT, words);
    }
    bucket[unit] = make_uint4(words[0], words[1], words[2], words[3]);
    sum += checked(words, unit);
  }
  leave_sum(sum, partial);
}

// The way back, with the checksum of what was read. grid as in pack
extern "C" __global__ void __launch_bounds__(BLOCK)
    unpack(const Entry* table, const uint4* bucket, u64* partial, long long entries, long long units) {
  long long unit = (long long)blockIdx.x * BLOCK * UNITS + threadIdx.x, at = find(table, entries, unit);
  u64 sum = 0;
  for (int i = 0; i < UNITS && unit < units; i++, unit += BLOCK) {
    while (at + 1 < entries && table[at + 1].unit <= unit) at++;
    const Entry entry = table[at];
    const long long local = unit - entry.unit;
    const uint4 read = bucket[unit];
    const unsigned words[4] = {read.x, read.y, read.z, read.w};
    if (entry.kind == 0) {
      copy_out(entry, local * UNIT, words);
    } else if (entry.kind == 1) {
      float x[8];
#pragma unroll
      for (int j = 0; j < 8; j++) x[j] = __uint_as_float(j % 2 ? words[j / 2] & 0xffff0000u : words[j / 2] << 16);
      scatter<float, 8>(entry, local * 8, x);
    } else if (entry.kind == 2) {
      restore<float>(entry, local * UNIT, words);
    } else {
      restore<bf16>(entry, local * UNIT, words);
    }
    sum += checked(words, unit);
  }
  leave_sum(sum, partial);
}

// checksum[0] = all partial sums + the bucket's length. grid: 1
extern "C" __global__ void __launch_bounds__(BLOCK)
    pack_total(const u64* partial, u64* checksum, long long blocks, long long units) {
  u64 sum = threadIdx.x ? 0 : mix(~(u64)(units * UNIT));
  for (long long i = threadIdx.x; i < blocks; i += BLOCK) sum += partial[i];
  leave_sum(sum, checksum);
}
