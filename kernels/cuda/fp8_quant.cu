// K10: a matrix in FP8, with one scale per row, per 1x128 group or per 128x128 tile.
//
//   x [rows, columns] IN, row-major --> codes [rows, columns] e4m3 bytes, scales and amax f32, one per block
//
// scale = amax / 448, or with pow2 the power of two at or above it; code = e4m3(clamp(x * (1 / scale))). amax is over
// finite values; an infinity becomes +-448, NaN 0x7f. With `given` scales nothing else changes and `scales` is not
// written. One pass over x: a thread keeps what it has loaded in registers until the block's amax is known; only rows
// longer than 4 * KEEP * BLOCK are read again. A maximum has no order: the result has the same bits always.
//
// IN: float, bf16. BLOCK: threads. vector: rows are aligned for loads of four elements, see fp8.cuh.
#include "fp8.cuh"

constexpr int KEEP = 4;    // groups of four elements that a thread of fp8_row keeps
constexpr int SIDE = 128;  // of a tile, length of a group
constexpr int WARPS = BLOCK / WARP;

// grid: rows
extern "C" __global__ void __launch_bounds__(BLOCK, 1)
    fp8_row(const IN* x, const float* given, unsigned char* codes, float* scales, float* amaxes, long long columns,
            long long pow2, long long vector) {
  __shared__ float partial[WARP];
  const long long row = blockIdx.x, step = 4LL * BLOCK, first = 4LL * threadIdx.x;
  const IN* from = x + row * columns;
  unsigned char* to = codes + row * columns;
  float kept[KEEP][4], amax = 0.0f;
#pragma unroll
  for (int i = 0; i < KEEP; i++) load4(from, first + i * step, columns, vector, kept[i]);
#pragma unroll
  for (int i = 0; i < KEEP; i++) amax = fmaxf(amax, amax4(kept[i]));
  for (long long column = first + KEEP * step; column < columns; column += step) {
    float four[4];
    load4(from, column, columns, vector, four);
    amax = fmaxf(amax, amax4(four));
  }
  amax = block_max(amax, partial);
  const float scale = given ? given[row] : scale_of(amax, pow2);
  const float inverse = reciprocal(scale);
#pragma unroll
  for (int i = 0; i < KEEP; i++) store4(to, first + i * step, columns, vector, encode4(kept[i], inverse));
  for (long long column = first + KEEP * step; column < columns; column += step) {
    float four[4];
    load4(from, column, columns, vector, four);
    store4(to, column, columns, vector, encode4(four, inverse));
  }
  if (threadIdx.x == 0) {
    amaxes[row] = amax;
    if (!given) scales[row] = scale;
  }
}

// grid: (rows, ceil(groups / (WARPS * KEEP))). A warp takes KEEP groups at once, a lane four elements of each.
extern "C" __global__ void __launch_bounds__(BLOCK, 1)
    fp8_group(const IN* x, const float* given, unsigned char* codes, float* scales, float* amaxes, long long columns,
              long long pow2, long long vector) {
  const long long row = blockIdx.x, groups = ceil_div(columns, SIDE);
  const long long first = ((long long)blockIdx.y * WARPS + threadIdx.x / WARP) * KEEP;
  const int lane = threadIdx.x % WARP;
  const IN* from = x + row * columns;
  float kept[KEEP][4];
#pragma unroll
  for (int i = 0; i < KEEP; i++) load4(from, (first + i) * SIDE + 4 * lane, columns, vector, kept[i]);
#pragma unroll
  for (int i = 0; i < KEEP; i++) {
    const long long group = first + i, at = row * groups + group;
    if (group >= groups) return;  // the same for the whole warp
    const float amax = warp_max(amax4(kept[i]));
    const float scale = given ? given[at] : scale_of(amax, pow2);
    store4(codes + row * columns, group * SIDE + 4 * lane, columns, vector, encode4(kept[i], reciprocal(scale)));
    if (lane == 0) {
      amaxes[at] = amax;
      if (!given) scales[at] = scale;
    }
  }
}

// grid: (ceil(rows / 128), ceil(columns / 128)). A warp takes every WARPS-th row of the tile.
extern "C" __global__ void __launch_bounds__(BLOCK, 1)
    fp8_tile(const IN* x, const float* given, unsigned char* codes, float* scales, float* amaxes, long long rows,
             long long columns, long long pow2, long long vector) {
  __shared__ float partial[WARP];
  constexpr int MINE = SIDE / WARPS;
  const long long first = (long long)blockIdx.x * SIDE + threadIdx.x / WARP;
  const long long column = (long long)blockIdx.y * SIDE + 4 * (threadIdx.x % WARP);
  float kept[MINE][4], amax = 0.0f;
#pragma unroll
  for (int i = 0; i < MINE; i++) {
    const long long row = first + i * WARPS;
    load4(x + row * columns, column, row < rows ? columns : 0, vector, kept[i]);
  }
#pragma unroll
  for (int i = 0; i < MINE; i++) amax = fmaxf(amax, amax4(kept[i]));
  amax = block_max(amax, partial);
  const long long at = (long long)blockIdx.x * ceil_div(columns, SIDE) + blockIdx.y;
  const float scale = given ? given[at] : scale_of(amax, pow2);
  const float inverse = reciprocal(scale);
#pragma unroll
  for (int i = 0; i < MINE; i++) {
    const long long row = first + i * WARPS;
    store4(codes + row * columns, column, row < rows ? columns : 0, vector, encode4(kept[i], inverse));
  }
  if (threadIdx.x == 0) {
    amaxes[at] = amax;
    if (!given) scales[at] = scale;
  }
}

// history [slots, num] f32: row `slot` becomes amax [num]; scales [num] fit the largest amax of each column.
// grid: ceil(num / BLOCK)
extern "C" __global__ void __launch_bounds__(BLOCK, 1)
    fp8_history(float* history, const float* amax, float* scales, long long slots, long long num, long long slot,
                long long pow2) {
  const long long at = (long long)blockIdx.x * BLOCK + threadIdx.x;
  if (at >= num) return;
  history[slot * num + at] = amax[at];
  float largest = 0.0f;
  for (long long i = 0; i < slots; i++) largest = fmaxf(largest, history[i * num + at]);
  scales[at] = scale_of(largest, pow2);
}
