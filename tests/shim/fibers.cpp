// The threads of a block as fibers on one OS thread, blocks one after another, scheduled by an adversary.
//
//   shim_launch --> for each block: poison shared memory, then until all threads are done:
//                     take a ready thread, run it up to its next barrier, warp operation, yield or end
//
// Seed 0 runs blocks and threads in order. Any other seed shuffles both and, at the beginning and at every barrier, makes
// half of the warps lag: they run only when no other warp can. A barrier that not all threads reach, masks that disagree,
// a deadlock, an address beside an argument, an index beside an array, an int that overflows and a thread that never ends
// all stop the launch, with the thread and the line; so do races (races.h), if asked for. Knows nothing of Python or of any kernel.
#include "fibers.h"

#include "races.h"

#include <algorithm>
#include <csetjmp>
#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <pthread.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <ucontext.h>
#include <unistd.h>
#include <utility>
#include <vector>

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace shim {
namespace {

constexpr int kMaxThreads = 1024, kWarp = 32;
constexpr size_t kStack = 64 << 10, kSharedMax = 256 << 10;
constexpr unsigned char kPoison = 0xCB;
constexpr const char* kOps[] = {"?", "__syncwarp", "__shfl_sync", "__ballot_sync", "a vote", "__match_sync", "__reduce_sync"};

enum class State { ready, barrier, warp, done };

struct Fiber {
  jmp_buf at;
  ucontext_t start;
  bool started = false;
  State state = State::done;
  Site site{};
  Op op = Op::none;
  unsigned mask = 0;
  uint64_t value = 0;
  uint64_t lanes[kWarp];
};

struct Region {
  char *base, *begin, *end;
  size_t mapped;
  int argument;
};

Fiber fibers[kMaxThreads];
char* stacks = nullptr;
char* dynamic_base = nullptr;
unsigned dynamic_bytes = 0;
size_t page = 4096;

jmp_buf scheduler;
sigjmp_buf failed;
std::string message;
std::vector<Region> regions;
std::vector<int> ready, lagging;
bool lags[kMaxThreads / kWarp];
int current = 0, count = 0, done = 0, at_barrier = 0, predicates = 0;
bool running = false;
Races races;
uint64_t seed = 0, random_state = 0;
void (*entry)(void**) = nullptr;
void** arguments = nullptr;
pthread_t launcher;

uint64_t draw() {  // splitmix64
  uint64_t z = random_state += 0x9E3779B97F4A7C15ull;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return z ^ (z >> 31);
}

template <class T>
void shuffle(std::vector<T>& items) {
  for (size_t i = items.size(); i > 1; --i) std::swap(items[i - 1], items[draw() % i]);
}

uint3 index_of(int thread) {
  unsigned x = thread % blockDim.x, rest = thread / blockDim.x;
  return {x, rest % blockDim.y, rest / blockDim.y};
}

void make_ready(int thread) {
  fibers[thread].state = State::ready;
  (seed && lags[thread / kWarp] ? lagging : ready).push_back(thread);
}

void choose_laggards() {
  for (bool& lag : lags) lag = seed && (draw() & 1);
}

int take() {
  std::vector<int>& from = ready.empty() ? lagging : ready;
  if (from.empty()) return -1;
  size_t at = seed ? draw() % from.size() : 0;
  int thread = from[at];
  if (seed) {
    from[at] = from.back();
    from.pop_back();
  } else {
    from.erase(from.begin());
  }
  return thread;
}

void switch_to_scheduler() {
  if (!_setjmp(fibers[current].at)) _longjmp(scheduler, 1);
}

std::string place(Site site) {
  if (!site.file) return "";
  const char* slash = strrchr(site.file, '/');
  return std::string(slash ? slash + 1 : site.file) + ":" + std::to_string(site.line);
}

std::string where() {
  char text[160];
  snprintf(text, sizeof text, "thread (%u,%u,%u) of block (%u,%u,%u)", threadIdx.x, threadIdx.y, threadIdx.z, blockIdx.x,
           blockIdx.y, blockIdx.z);
  return text;
}

[[noreturn]] void stop(std::string text) {
  message = std::move(text);
  siglongjmp(failed, 1);
}

// "threads 0-31, 40 wait at __syncthreads (a.cu:12)", a line for each place where threads wait.
std::string waits() {
  std::string text;
  std::vector<char> told(count, 0);
  for (int first = 0; first < count; ++first) {
    const Fiber& f = fibers[first];
    if (told[first] || f.state == State::ready) continue;
    std::string who;
    for (int t = first; t < count; ++t) {
      const Fiber& g = fibers[t];
      bool same = g.state == f.state && (f.state == State::done || (g.site.line == f.site.line && g.op == f.op &&
                                                                   g.mask == f.mask && t / kWarp == first / kWarp) ||
                                         (f.state == State::barrier && g.site.line == f.site.line));
      if (!same || told[t]) continue;
      int last = t;
      told[t] = 1;
      while (last + 1 < count && fibers[last + 1].state == f.state &&
             (f.state != State::warp || (fibers[last + 1].mask == f.mask && fibers[last + 1].op == f.op &&
                                         fibers[last + 1].site.line == f.site.line && (last + 1) / kWarp == first / kWarp)) &&
             (f.state != State::barrier || fibers[last + 1].site.line == f.site.line))
        told[++last] = 1;
      who += (who.empty() ? "" : ", ") + std::to_string(t) + (last > t ? "-" + std::to_string(last) : "");
      t = last;
    }
    char mask[24] = "";
    if (f.state == State::warp) snprintf(mask, sizeof mask, " of mask 0x%08x", f.mask);
    text += "\n  threads " + who;
    if (f.state == State::done) text += " have left the kernel";
    if (f.state == State::barrier) text += " wait at __syncthreads (" + place(f.site) + ")";
    if (f.state == State::warp) text += std::string(" wait in ") + kOps[int(f.op)] + mask + " (" + place(f.site) + ")";
  }
  return text;
}

void fiber_main() {
  for (;;) {
    entry(arguments);
    Fiber& self = fibers[current];
    self.state = State::done;
    ++done;
    if (at_barrier) fail({}, "left the kernel while others wait at a barrier:%s", waits().c_str());
    for (int t = current / kWarp * kWarp; t < count && t < (current / kWarp + 1) * kWarp; ++t)
      if (fibers[t].state == State::warp && fibers[t].mask >> (current % kWarp) & 1)
        fail(fibers[t].site, "left the kernel although the mask 0x%08x of thread %d names it", fibers[t].mask, t);
    switch_to_scheduler();
  }
}

void run(int thread) {
  Fiber& f = fibers[thread];
  current = thread;
  threadIdx = index_of(thread);
  if (_setjmp(scheduler)) return;
  if (f.started) _longjmp(f.at, 1);
  f.started = true;
  setcontext(&f.start);
}

void prepare() {
  if (!stacks) {
    page = size_t(sysconf(_SC_PAGESIZE));
    stacks = static_cast<char*>(
        mmap(nullptr, kStack * kMaxThreads, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    for (int t = 0; t < kMaxThreads; ++t) mprotect(stacks + t * kStack, page, PROT_NONE);
    dynamic_base = static_cast<char*>(
        mmap(nullptr, kSharedMax + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    mprotect(dynamic_base + kSharedMax, page, PROT_NONE);
  }
  for (int t = 0; t < count; ++t) {
    Fiber& f = fibers[t];
    if (f.started) continue;
    getcontext(&f.start);
    f.start.uc_stack.ss_sp = stacks + t * kStack;
    f.start.uc_stack.ss_size = kStack;
    f.start.uc_link = nullptr;
    makecontext(&f.start, fiber_main, 0);
  }
}

void run_block(char* shared_begin, char* shared_end) {
  if (shared_begin) memset(shared_begin, kPoison, shared_end - shared_begin);
  memset(dynamic_shared(), kPoison, dynamic_bytes);
  races.begin_block();
  done = at_barrier = predicates = 0;
  ready.clear();
  lagging.clear();
  choose_laggards();
  for (int t = 0; t < count; ++t) make_ready(t);
  while (done < count) {
    int next = take();
    if (next < 0) stop("deadlock in block (" + std::to_string(blockIdx.x) + "," + std::to_string(blockIdx.y) + "," +
                       std::to_string(blockIdx.z) + "):" + waits());
    run(next);
  }
}

void on_fault(int signal, siginfo_t* info, void*) {
  if (!running) abort();
  char* address = static_cast<char*>(info->si_addr);
  char text[256];
  snprintf(text, sizeof text, "%s used the address %p (signal %d)", where().c_str(), static_cast<void*>(address), signal);
  const long near = 1 << 24;
  long best = near;
  for (const Region& r : regions) {
    long beyond = address >= r.end ? address - r.end : r.begin > address ? r.begin - address : 0;
    if (beyond >= best) continue;
    best = beyond;
    snprintf(text, sizeof text, "%s used an address %ld bytes %s argument %d, which has %ld bytes", where().c_str(), beyond,
             address >= r.end ? "past the end of" : "before", r.argument, long(r.end - r.begin));
  }
  long past = address - (dynamic_base + kSharedMax);
  if (past >= 0 && past < long(page))
    snprintf(text, sizeof text, "%s used an address %ld bytes past its %u bytes of dynamic shared memory", where().c_str(),
             past, dynamic_bytes);
  long slot = (address - stacks) / long(kStack);
  if (address >= stacks && slot < kMaxThreads && (address - stacks) % kStack < page)
    snprintf(text, sizeof text, "%s needs more than %zu bytes of stack", where().c_str(), kStack);
  stop(text);
}

void on_timer(int, siginfo_t*, void*) {
  if (!pthread_equal(pthread_self(), launcher)) {
    pthread_kill(launcher, SIGVTALRM);
    return;
  }
  if (running) stop(where() + " did not end in time: it loops, or waits for another block, and blocks run one after another");
}

struct Handlers {  // of the signals, for the time of a launch
  struct sigaction fault {}, bus {}, timer {};
  explicit Handlers(double limit_s) {
    struct sigaction action {};
    action.sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK;
    action.sa_sigaction = on_fault;
    sigaction(SIGSEGV, &action, &fault);
    sigaction(SIGBUS, &action, &bus);
    action.sa_sigaction = on_timer;
    sigaction(SIGVTALRM, &action, &timer);
    arm(limit_s);
  }
  ~Handlers() {
    arm(0);
    sigaction(SIGSEGV, &fault, nullptr);
    sigaction(SIGBUS, &bus, nullptr);
    sigaction(SIGVTALRM, &timer, nullptr);
  }
  static void arm(double seconds) {
    itimerval value{};
    value.it_value.tv_sec = long(seconds);
    value.it_value.tv_usec = long((seconds - long(seconds)) * 1e6);
    setitimer(ITIMER_VIRTUAL, &value, nullptr);
  }
};

}  // namespace

int lane() { return current % kWarp; }

void* dynamic_shared() { return dynamic_base + kSharedMax - (dynamic_bytes + 15) / 16 * 16; }

void fail(Site site, const char* format, ...) {
  char text[4096];
  va_list values;
  va_start(values, format);
  vsnprintf(text, sizeof text, format, values);
  va_end(values);
  stop(where() + (site.file ? " at " + place(site) : "") + ": " + text);
}

void may_yield() {
  if (!seed || draw() & 3) return;
  make_ready(current);
  switch_to_scheduler();
}

void atomic(const void* p, size_t bytes) {
  may_yield();
  races.access(p, bytes, true, true, current, __builtin_return_address(0));
}

int barrier(int predicate, Site site) {
  Fiber& self = fibers[current];
  if (done) fail(site, "%d threads of the block have left the kernel and never reach this barrier:%s", done, waits().c_str());
  for (int t = 0; at_barrier && t < count; ++t)
    if (fibers[t].state == State::barrier && (fibers[t].site.line != site.line || strcmp(fibers[t].site.file, site.file)))
      fail(site, "thread %d waits at another barrier, %s", t, place(fibers[t].site).c_str());
  self.state = State::barrier;
  self.site = site;
  self.value = uint64_t(predicates += predicate != 0);
  if (++at_barrier == count) {
    races.barrier();
    choose_laggards();
    for (int t = 0; t < count; ++t) {
      fibers[t].value = uint64_t(predicates);
      make_ready(t);
    }
    at_barrier = predicates = 0;
  }
  switch_to_scheduler();
  return int(self.value);
}

const uint64_t* exchange(Op op, unsigned mask, uint64_t value, Site site) {
  Fiber& self = fibers[current];
  Fiber* warp = fibers + current / kWarp * kWarp;
  const int size = std::min(kWarp, count - current / kWarp * kWarp);
  if (!(mask >> lane() & 1)) fail(site, "%s with the mask 0x%08x, which leaves out the caller", kOps[int(op)], mask);
  self.op = op;
  self.mask = mask;
  self.value = value;
  self.site = site;
  self.state = State::warp;
  bool complete = true;
  for (int l = 0; l < kWarp; ++l) {
    if (!(mask >> l & 1)) continue;
    if (l >= size) fail(site, "%s with the mask 0x%08x names lane %d, and the warp has %d", kOps[int(op)], mask, l, size);
    Fiber& other = warp[l];
    if (other.state == State::done) fail(site, "%s with the mask 0x%08x names lane %d, which has left", kOps[int(op)], mask, l);
    if (other.state == State::warp && (other.mask != mask || other.op != op))
      fail(site, "%s with the mask 0x%08x, but lane %d waits in %s with the mask 0x%08x (%s)", kOps[int(op)], mask, l,
           kOps[int(other.op)], other.mask, place(other.site).c_str());
    complete &= other.state == State::warp;
  }
  if (complete) {
    const int first = current / kWarp * kWarp;
    races.meet(first, mask);
    for (int l = 0; l < size; ++l) {
      if (!(mask >> l & 1)) continue;
      for (int from = 0; from < size; ++from) warp[l].lanes[from] = warp[from].value;
      make_ready(first + l);
    }
  }
  switch_to_scheduler();
  return self.lanes;
}

}  // namespace shim

// GCC's bounds and overflow checks call these, with the place first in what `data` points to.
struct Checked {
  const char* file;
  unsigned line, column;
};
extern "C" void __ubsan_handle_out_of_bounds(Checked* at, uintptr_t index) {
  shim::fail({at->file, int(at->line)}, "index %ld is outside its array", long(index));
}
#define OVERFLOWS(name)                                                                  \
  extern "C" void __ubsan_handle_##name##_overflow(Checked* at, uintptr_t, uintptr_t) { \
    shim::fail({at->file, int(at->line)}, "a signed integer overflows (" #name "); count in long long"); \
  }
OVERFLOWS(add)
OVERFLOWS(sub)
OVERFLOWS(mul)
OVERFLOWS(negate)
OVERFLOWS(divrem)

// With -fsanitize=thread GCC calls these at every load and store that another thread might see.
#define ACCESS(name, bytes, write)                                                          \
  extern "C" void __tsan_##name##bytes(void* p) {                                           \
    shim::races.access(p, bytes, write, false, shim::current, __builtin_return_address(0)); \
  }
#define ACCESSES(bytes)                                                    \
  ACCESS(read, bytes, false) ACCESS(write, bytes, true)                    \
  ACCESS(unaligned_read, bytes, false) ACCESS(unaligned_write, bytes, true) \
  ACCESS(volatile_read, bytes, false) ACCESS(volatile_write, bytes, true)
ACCESSES(1)
ACCESSES(2)
ACCESSES(4)
ACCESSES(8)
ACCESSES(16)
extern "C" void __tsan_read_range(void* p, size_t bytes) {
  shim::races.access(p, bytes, false, false, shim::current, __builtin_return_address(0));
}
extern "C" void __tsan_write_range(void* p, size_t bytes) {
  shim::races.access(p, bytes, true, false, shim::current, __builtin_return_address(0));
}
extern "C" void __tsan_init() {}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}

// Memory for an argument of `bytes`: its end (or its beginning) lies against a page that nobody may touch.
extern "C" char* shim_map(size_t bytes, int at_end, int argument) {
  using namespace shim;
  page = size_t(sysconf(_SC_PAGESIZE));
  const size_t inner = std::max<size_t>((bytes + page - 1) / page, 1) * page;
  char* base = static_cast<char*>(
      mmap(nullptr, inner + 2 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  if (base == MAP_FAILED) return nullptr;
  mprotect(base, page, PROT_NONE);
  mprotect(base + page + inner, page, PROT_NONE);
  memset(base + page, kPoison, inner);
  char* begin = at_end ? base + page + inner - (bytes + 15) / 16 * 16 : base + page;
  regions.push_back({base, begin, begin + bytes, inner + 2 * page, argument});
  return begin;
}

// Frees what shim_map gave. Returns the argument beside which somebody wrote, or -1.
extern "C" int shim_unmap() {
  using namespace shim;
  int written = -1;
  for (const Region& r : regions) {
    for (char* p = r.base + page; p < r.base + r.mapped - page; ++p) {
      if (p == r.begin) p = r.end;
      if (p < r.base + r.mapped - page && static_cast<unsigned char>(*p) != kPoison) written = r.argument;
    }
    munmap(r.base, r.mapped);
  }
  regions.clear();
  return written;
}

// Runs `call(args)` in every thread of the grid, or of its first `blocks` blocks given by `chosen`. 0 when all is well;
// else 1, with what was wrong in `text`.
extern "C" int shim_launch(void (*call)(void**), void** args, const unsigned* grid, const unsigned* block, unsigned shared_bytes,
                           char* shared_begin, char* shared_end, uint64_t seed_, double limit_s, const long long* chosen,
                           long long blocks, int watch, char* text, size_t text_bytes) {
  using namespace shim;
  gridDim = dim3(grid[0], grid[1], grid[2]);
  blockDim = dim3(block[0], block[1], block[2]);
  count = int(block[0] * block[1] * block[2]);
  entry = call;
  arguments = args;
  random_state = seed = seed_;
  dynamic_bytes = shared_bytes;
  launcher = pthread_self();
  prepare();
  races.start(watch != 0);
  for (const Region& r : regions) races.watch(r.begin, r.end, r.base, r.base + r.mapped, r.argument);
  races.watch(shared_begin, shared_end, shared_begin, shared_end, -1);
  const char* dynamic = static_cast<const char*>(dynamic_shared());
  races.watch(dynamic, dynamic + shared_bytes, dynamic_base, dynamic_base + kSharedMax, -1);
  // A stack of its own for the signal handlers: the fault may be that a fiber's stack is full.
  static char handler_stack[64 << 10];
  stack_t own{}, before{};
  own.ss_sp = handler_stack;
  own.ss_size = sizeof handler_stack;
  sigaltstack(&own, &before);
  std::vector<long long> order(chosen, chosen + blocks);
  if (seed) shuffle(order);
  int code = 0;
  {
    Handlers handlers(limit_s);
    if (!sigsetjmp(failed, 1)) {
      running = true;
      for (long long b : order) {
        blockIdx = {unsigned(b % grid[0]), unsigned(b / grid[0] % grid[1]), unsigned(b / grid[0] / grid[1])};
        run_block(shared_begin, shared_end);
      }
    } else {
      code = 1;
      for (Fiber& f : fibers) f = Fiber();  // whatever they were doing, they begin anew
      snprintf(text, text_bytes, "%s", message.c_str());
    }
    running = false;
  }
  before.ss_flags &= SS_DISABLE;
  sigaltstack(&before, nullptr);
  return code;
}
