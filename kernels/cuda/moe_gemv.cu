// K14: the experts' matrices times a few tokens each, as in decoding: every active weight is read once from memory.
//
//   x [rows, columns] IN, sorted by expert; ends [experts] i32: one past each expert's last row
//   w [experts, features, columns] WEIGHT, scales [experts, features] f32 or null --> y [rows, features] IN
//
// y[n, f] = scale[e, f] * sum over d of x[n, d] w[e, f, d], in float32. A warp takes FEATURES rows of w and up to ROWS
// tokens; lane l adds columns l * CHUNK .. + CHUNK of each 32 * CHUNK, in order, then the lanes are added as a
// butterfly. That order depends on WEIGHT alone: a token's result has the same bits whatever else is in the batch, and
// under every configuration. Experts without rows cost nothing; one with more than ROWS reads its weights again, from
// the cache. Rows past the last expert's become 0.
//
// IN: float, bf16. WEIGHT: float, bf16, e4m3 (bytes). BLOCK: threads. FEATURES: rows of w per warp.
// vector: rows of x and w begin at multiples of 16 bytes and have a multiple of CHUNK columns.
#include "fp8.cuh"

struct e4m3 {
  unsigned char bits;
};

static __device__ __forceinline__ float to_f32(e4m3 x) { return decode(x.bits); }

constexpr int ROWS = 8;
constexpr int CHUNK = 16 / sizeof(WEIGHT);

static __device__ __forceinline__ void unpack(const uint4& raw, const float*, float* out) {
  out[0] = __uint_as_float(raw.x), out[1] = __uint_as_float(raw.y);
  out[2] = __uint_as_float(raw.z), out[3] = __uint_as_float(raw.w);
}

static __device__ __forceinline__ void unpack(const uint4& raw, const bf16*, float* out) {
  const unsigned words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    out[2 * i] = __uint_as_float(words[i] << 16);
    out[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
  }
}

static __device__ __forceinline__ void unpack(const uint4& raw, const e4m3*, float* out) {
  const unsigned words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < 16; i++) out[i] = decode((unsigned char)(words[i / 4] >> (8 * (i % 4))));
}

// CHUNK elements from `column` on; 0 past the end of the row.
template <class T>
static __device__ __forceinline__ void load_chunk(const T* row, long long column, long long columns, bool vector,
                                                  float* out) {
  constexpr int WIDE = 16 / sizeof(T) < CHUNK ? 16 / sizeof(T) : CHUNK;  // elements of a 16-byte load
  if (vector && column < columns && WIDE * sizeof(T) == 16) {
#pragma unroll
    for (int i = 0; i < CHUNK; i += WIDE) {
      unpack(*reinterpret_cast<const uint4*>(row + column + i), row, out + i);
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < CHUNK; i++) out[i] = column + i < columns ? to_f32(row[column + i]) : 0.0f;
}

// `num` <= MOST tokens from x on, against FEATURES rows of w from `first` on.
template <int MOST>
static __device__ __forceinline__ void multiply(const IN* x, const WEIGHT* w, const float* scales, IN* y, int num,
                                                long long first, long long features, long long columns, bool vector) {
  const int lane = threadIdx.x % WARP;
  float sum[MOST][FEATURES];
#pragma unroll
  for (int m = 0; m < MOST; m++)
#pragma unroll
    for (int f = 0; f < FEATURES; f++) sum[m][f] = 0.0f;
  for (long long column = (long long)lane * CHUNK; column < columns; column += WARP * CHUNK) {
    float weight[FEATURES][CHUNK];
#pragma unroll
    for (int f = 0; f < FEATURES; f++)
      load_chunk(w + (first + f) * columns, column, first + f < features ? columns : 0, vector, weight[f]);
#pragma unroll
    for (int m = 0; m < MOST; m++) {
      if (m >= num) break;
      float in[CHUNK];
      load_chunk(x + m * columns, column, columns, vector, in);
#pragma unroll
      for (int f = 0; f < FEATURES; f++)
#pragma unroll
        for (int i = 0; i < CHUNK; i++) sum[m][f] = fmaf(in[i], weight[f][i], sum[m][f]);
    }
  }
#pragma unroll
  for (int m = 0; m < MOST; m++) {
    if (m >= num) break;
#pragma unroll
    for (int f = 0; f < FEATURES; f++) {
      const float total = warp_sum(sum[m][f]);
      if (lane == 0 && first + f < features)
        store(y + m * features + first + f, scales ? total * scales[first + f] : total);
    }
  }
}

// grid: (ceil(features / (FEATURES * BLOCK / 32)), experts + 1); the last row of blocks clears what no expert has.
extern "C" __global__ void __launch_bounds__(BLOCK, 1)
    moe_gemv(const IN* x, const int* ends, const WEIGHT* w, const float* scales, IN* y, long long rows,
             long long experts, long long features, long long columns, long long vector) {
  const long long expert = blockIdx.y;
  const long long first = ((long long)blockIdx.x * (BLOCK / WARP) + threadIdx.x / WARP) * FEATURES;
  if (first >= features) return;  // the same for the whole warp
  long long row = expert ? ends[expert - 1] : 0, end = expert < experts ? ends[expert] : rows;
  row = row < 0 ? 0 : row;
  end = end < rows ? end : rows;
  if (expert == experts) {
    for (; row < end; row++)
      for (int f = threadIdx.x % WARP; f < FEATURES && first + f < features; f += WARP)
        store(y + row * features + first + f, 0.0f);
    return;
  }
  w += expert * features * columns;
  if (scales) scales += expert * features;
  for (; row < end; row += ROWS) {
    const int num = end - row < ROWS ? int(end - row) : ROWS;
    const IN* from = x + row * columns;
    IN* to = y + row * features;
    if (num == 1) {
      multiply<1>(from, w, scales, to, num, first, features, columns, vector);
    } else if (num == 2) {
      multiply<2>(from, w, scales, to, num, first, features, columns, vector);
    } else if (num <= 4) {
      multiply<4>(from, w, scales, to, num, first, features, columns, vector);
    } else {
      multiply<ROWS>(from, w, scales, to, num, first, features, columns, vector);
    }
  }
}
