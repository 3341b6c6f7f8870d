// The part of NCCL that cupy links to, between the threads of one process and in host memory: cupy's own binding is
// tested above it, without a GPU. A group ends when its sends are taken over and its receives have come, or is aborted.
// misbehave(step, rank) has one call of that step at that rank never return (by itself), or report an error.
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <map>
#include <mutex>
#include <string>
#include <tuple>
#include <vector>

struct Comm {
  std::string id;
  int size, rank;
  bool aborted = false;
};
struct Id {
  char bytes[128];
};
struct Part {
  Comm* comm;
  bool send;
  void* data;
  size_t count;
  int peer;
};

static std::mutex lock;
static std::condition_variable changed;
static std::map<std::string, int> joined;
static std::map<std::tuple<std::string, int, int>, std::deque<std::string>> mail;
static std::string bad_step;
static int bad_rank = -1, ids = 0;
static thread_local std::vector<Part> group;
enum { SUCCESS = 0, INVALID_ARGUMENT = 4, REMOTE_ERROR = 6 };

static bool struck(const char* step, int rank) {
  bool hit = bad_step == step && bad_rank == rank;
  if (hit) bad_rank = -1;
  return hit;
}

extern "C" {
void misbehave(const char* step, int rank) {
  std::lock_guard<std::mutex> guard(lock);
  bad_step = step, bad_rank = rank;
}
const char* ncclGetErrorString(int status) { return status == REMOTE_ERROR ? "a peer has gone" : "it is wrong"; }
int ncclGetVersion(int* version) { return *version = 22907, SUCCESS; }
int ncclGetUniqueId(Id* id) {
  std::memset(id, 0, sizeof *id);
  std::snprintf(id->bytes, sizeof id->bytes, "unique id %d", ++ids);
  return SUCCESS;
}
int ncclCommInitRankConfig(Comm** comm, int size, Id id, int rank, void*) {
  std::unique_lock<std::mutex> guard(lock);
  if (struck("init error", rank)) return REMOTE_ERROR;
  if (struck("init hang", rank)) changed.wait(guard, [] { return false; });
  std::string name(id.bytes);
  joined[name]++;
  changed.notify_all();
  changed.wait(guard, [&] { return joined[name] == size; });
  *comm = new Comm{name, size, rank};
  return SUCCESS;
}
int ncclGroupStart() { return group.clear(), SUCCESS; }
int ncclSend(void* data, size_t count, int type, int peer, Comm* comm, void*) {
  if (!comm || type != 1 || peer >= comm->size) return INVALID_ARGUMENT;
  return group.push_back({comm, true, data, count, peer}), SUCCESS;
}
int ncclRecv(void* data, size_t count, int type, int peer, Comm* comm, void*) {
  if (!comm || type != 1 || peer >= comm->size) return INVALID_ARGUMENT;
  return group.push_back({comm, false, data, count, peer}), SUCCESS;
}
int ncclGroupEnd() {
  std::unique_lock<std::mutex> guard(lock);
  for (Part& part : group) {
    Comm* comm = part.comm;
    if (struck("group error", comm->rank)) return REMOTE_ERROR;
    if (struck("group hang", comm->rank)) changed.wait(guard, [&] { return comm->aborted; });
    if (struck("group stuck", comm->rank)) changed.wait(guard, [] { return false; });
    if (part.send) {
      mail[{comm->id, comm->rank, part.peer}].emplace_back((char*)part.data, part.count);
      changed.notify_all();
      continue;
    }
    auto& box = mail[{comm->id, part.peer, comm->rank}];
    changed.wait(guard, [&] { return comm->aborted || !box.empty(); });
    if (comm->aborted) return REMOTE_ERROR;
    std::memcpy(part.data, box.front().data(), part.count);
    box.pop_front();
  }
  return SUCCESS;
}
int ncclCommGetAsyncError(Comm* comm, int* error) {
  if (!comm) return INVALID_ARGUMENT;
  std::lock_guard<std::mutex> guard(lock);
  *error = struck("async error", comm->rank) ? REMOTE_ERROR : SUCCESS;
  return SUCCESS;
}
void ncclCommAbort(Comm* comm) {  // The memory is kept: who was woken by this still looks at it.
  std::unique_lock<std::mutex> guard(lock);
  if (struck("abort hang", comm->rank)) changed.wait(guard, [] { return false; });
  comm->aborted = true;
  changed.notify_all();
}
void ncclCommDestroy(Comm* comm) { ncclCommAbort(comm); }
#define UNUSED(name) \
  int name() { return INVALID_ARGUMENT; }
UNUSED(ncclAllGather)
UNUSED(ncclAllReduce)
UNUSED(ncclBcast)
UNUSED(ncclBroadcast)
UNUSED(ncclReduce)
UNUSED(ncclReduceScatter)
UNUSED(ncclCommCount)
UNUSED(ncclCommCuDevice)
UNUSED(ncclCommUserRank)
UNUSED(ncclCommInitAll)
UNUSED(ncclCommSplit)
}
