// Every load and store of a kernel, seen: built with -fsanitize=thread, whose calls end here instead of in its library.
//
// Two threads use a byte, one of them writes, not both by atomics, and nothing orders them: that is a race, whatever the
// schedule did. Inside a block a barrier orders all threads, a warp operation those of its mask; nothing orders blocks.
// Shared memory that no thread of the block has written may not be read. An argument may not be left by a single byte.
// For each byte the last write and two reads are kept: of three unordered reads before a write one may go unseen.
#pragma once
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <dlfcn.h>
#include <vector>

#include "fibers.h"

namespace shim {

struct Access {
  uint32_t interval = 0;  // 0: there was none
  uint32_t clock = 0;     // of the thread in its warp, when it did it
  uint16_t thread = 0;
  bool atomic = false;
};

struct Cell {
  Access write, reads[2];
};

struct Watched {
  const char *begin, *end;    // what may be used
  const char *first, *last;   // the pages around it
  int argument;               // -1: shared memory
  std::vector<Cell> cells;    // one for each byte
};

class Races {
 public:
  void start(bool on) {
    on_ = on;
    watched_.clear();
    interval_ = 0;
  }

  void watch(const char* begin, const char* end, const char* first, const char* last, int argument) {
    if (on_ && first < last) watched_.push_back({begin, end, first, last, argument, std::vector<Cell>(end - begin)});
  }

  // Shared memory is new; the accesses of other blocks remain.
  void begin_block() {
    if (!on_) return;
    block_ = ++interval_;
    for (auto& row : clocks_) memset(row, 0, sizeof row);
    for (int t = 0; t < 1024; ++t) clocks_[t][t % 32] = 1;
    for (Watched& w : watched_)
      if (w.argument < 0) w.cells.assign(w.cells.size(), Cell());
  }

  void barrier() { ++interval_; }

  // All lanes of `mask` have met: each knows what the others did before.
  void meet(int first, unsigned mask) {
    if (!on_) return;
    uint32_t joined[32] = {};
    for (int l = 0; l < 32; ++l)
      for (int k = 0; (mask >> l & 1) && k < 32; ++k)
        if (clocks_[first + l][k] > joined[k]) joined[k] = clocks_[first + l][k];
    for (int l = 0; l < 32; ++l) {
      if (!(mask >> l & 1)) continue;
      memcpy(clocks_[first + l], joined, sizeof joined);
      ++clocks_[first + l][l];
    }
  }

  // `code` is where the kernel did it, for the line.
  void access(const void* address, size_t bytes, bool write, bool atomic, int thread, void* code) {
    code_ = code;
    const char* at = static_cast<const char*>(address);
    if (!on_) return;
    for (Watched& w : watched_) {
      if (at + bytes <= w.first || at >= w.last) continue;
      if (at < w.begin || at + bytes > w.end) outside(w, at, bytes);
      for (size_t i = 0; i < bytes; ++i) check(w, w.cells[at - w.begin + i], at - w.begin + i, write, atomic, thread);
      return;
    }
  }

 private:
  void check(const Watched& w, Cell& cell, long offset, bool write, bool atomic, int thread) {
    if (!write && w.argument < 0 && !cell.write.interval) report(w, offset, "reads what nobody has written", nullptr);
    if (!ordered(cell.write, thread, atomic)) report(w, offset, write ? "writes" : "reads", &cell.write, "written");
    if (write)
      for (const Access& read : cell.reads)
        if (!ordered(read, thread, atomic)) report(w, offset, "writes", &read, "read");
    const Access now{interval_, clocks_[thread][thread % 32], uint16_t(thread), atomic};
    if (write) {
      cell.write = now;
      cell.reads[0] = cell.reads[1] = Access();
    } else if (!cell.reads[0].interval || cell.reads[0].thread == thread) {
      cell.reads[0] = now;
    } else {
      cell.reads[1] = now;
    }
  }

  bool ordered(const Access& before, int thread, bool atomic) const {
    if (!before.interval || (before.atomic && atomic)) return true;
    if (before.interval < block_) return false;
    if (before.interval < interval_ || before.thread == thread) return true;
    return before.thread / 32 == thread / 32 && clocks_[thread][before.thread % 32] >= before.clock;
  }

  static const char* name(const Watched& w, char* text, size_t size) {
    if (w.argument < 0) return "shared memory";
    snprintf(text, size, "argument %d", w.argument);
    return text;
  }

  [[noreturn]] void outside(const Watched& w, const char* at, size_t bytes) const {
    char own[32], place[32];
    fail({}, "uses %zu bytes at offset %ld of %s, which has %ld%s", bytes, long(at - w.begin), name(w, own, sizeof own),
         long(w.end - w.begin), code(place, sizeof place));
  }

  [[noreturn]] void report(const Watched& w, long offset, const char* what, const Access* other, const char* done = "") const {
    char own[32], place[32], who[96] = "";
    if (other)
      snprintf(who, sizeof who, ", %s by %s %d with nothing in between", done,
               other->interval < block_ ? "another block's thread" : "thread", int(other->thread));
    fail({}, "race: %s byte %ld of %s%s%s", what, offset, name(w, own, sizeof own), who, code(place, sizeof place));
  }

  // "[code +0x12]": the place in the library, which the harness turns into a line.
  const char* code(char* text, size_t size) const {
    Dl_info info;
    const bool known = dladdr(code_, &info);
    snprintf(text, size, " [code +0x%lx]", known ? long(static_cast<char*>(code_) - static_cast<char*>(info.dli_fbase)) : 0);
    return text;
  }

  bool on_ = false;
  void* code_ = nullptr;
  std::vector<Watched> watched_;
  uint32_t interval_ = 0, block_ = 0;
  uint32_t clocks_[1024][32];
};

}  // namespace shim
