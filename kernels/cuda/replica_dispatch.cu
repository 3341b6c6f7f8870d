// K8: the slot of each (token, choice) pair: the pairs of an expert, in token order, fill its replicas one by one.
//
//   ids_P      INDEX [P]        expert of each pair
//   pairs_P    INDEX [P]        the pairs sorted by expert, inside an expert in token order (K3, without padding); then -1
//   ends_E     int32 [E]        one past the last row of each expert
//   slots_ER   int64 [E, R]     slots of its replicas, -1 after the last one
//   quota_ER   int64 [E, R]     pairs of each replica (K7)
//   slot_P     INDEX [P]        out: slot of each pair that has a row; beyond the quota it is that of the last replica
//
// A thread per row: its rank inside its expert, looked up in the running sum of the quota. Each pair is written once,
// so that nothing depends on order. 64-bit offsets.
#include "common.cuh"

#ifndef BLOCK
#define BLOCK 256
#endif
#ifndef INDEX
#define INDEX long long
#endif

extern "C" __global__ void __launch_bounds__(BLOCK)
replica_dispatch(const INDEX* ids_P, const INDEX* pairs_P, const int* ends_E, const long long* slots_ER,
                 const long long* quota_ER, INDEX* slot_P, long long P, long long R) {
  const long long stride = (long long)gridDim.x * BLOCK;
  for (long long row = (long long)blockIdx.x * BLOCK + threadIdx.x; row < P; row += stride) {
    const long long pair = pairs_P[row];
    if (pair < 0) continue;
    const long long expert = ids_P[pair];
    const long long *slots = slots_ER + expert * R, *quota = quota_ER + expert * R;
    long long left = row - (expert ? ends_E[expert - 1] : 0);
    int r = 0;
    while (r + 1 < R && slots[r + 1] >= 0 && left >= quota[r]) left -= quota[r++];
    slot_P[pair] = static_cast<INDEX>(slots[r]);
  }
}
