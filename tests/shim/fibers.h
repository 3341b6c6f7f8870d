// What a kernel and the scheduler of its threads say to each other. See fibers.cpp.
#pragma once
#include <cstddef>
#include <cstdint>

#include <vector_types.h>

extern uint3 threadIdx, blockIdx;  // of the running thread
extern dim3 blockDim, gridDim;

namespace shim {

struct Site {
  const char* file;
  int line;
};

enum class Op { none, syncwarp, shuffle, ballot, vote, match, reduce };

// Waits until every thread of the block has come to this barrier; returns in how many `predicate` is not zero.
int barrier(int predicate, Site site);

// Leaves 8 bytes for the lanes of `mask`, waits until each of them has done so, and returns what the 32 lanes left.
const uint64_t* exchange(Op op, unsigned mask, uint64_t value, Site site);

// Ends the launch with this message and the place.
[[noreturn]] void fail(Site site, const char* format, ...) __attribute__((format(printf, 2, 3)));

// A point where the scheduler may let another thread go first.
void may_yield();

// Says that the running thread uses `p` by an atomic operation.
void atomic(const void* p, size_t bytes);

int lane();
void* dynamic_shared();

}  // namespace shim
