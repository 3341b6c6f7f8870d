// Philox4x32-10: four random words from a counter of four words and a key of two (Salmon, Moraes, Dror, Shaw:
// "Parallel random numbers: as easy as 1, 2, 3", SC 2011, section 3.3). There is no state: the same counter gives the
// same words.
#pragma once

static __device__ __forceinline__ uint4 philox4x32(uint4 counter, uint2 key) {
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const unsigned long long even = 0xD2511F53ull * counter.x, odd = 0xCD9E8D57ull * counter.z;
    counter = make_uint4((unsigned)(odd >> 32) ^ counter.y ^ key.x, (unsigned)odd,
                         (unsigned)(even >> 32) ^ counter.w ^ key.y, (unsigned)even);
    key.x += 0x9E3779B9u;
    key.y += 0xBB67AE85u;
  }
  return counter;
}
