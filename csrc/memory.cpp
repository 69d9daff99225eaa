#include "memory.h"

#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <new>
#include <vector>

#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace tiger_fast {
namespace memory {
namespace {

constexpr size_t kHugePage = size_t(2) << 20;

struct Block {
  void* data;
  size_t size;
};

// The machine's memory, or what the control group (a container) may use of it.
size_t available() {
  size_t bytes = size_t(sysconf(_SC_PHYS_PAGES)) * size_t(sysconf(_SC_PAGESIZE));
  for (const char* path : {"/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"})
    if (FILE* file = std::fopen(path, "r")) {
      unsigned long long most = 0;
      if (std::fscanf(file, "%llu", &most) == 1) bytes = std::min(bytes, size_t(most));
      std::fclose(file);
    }
  return bytes;
}

struct Cache {
  std::mutex mutex;
  std::vector<Block> blocks;  // oldest first
  size_t bytes = 0;
  size_t limit = 0;

  Cache() {
    const char* mebibytes = std::getenv("TIGER_FAST_CACHE_MIB");
    if (mebibytes && *mebibytes) {
      char* end = nullptr;
      unsigned long long asked = std::strtoull(mebibytes, &end, 10);
      STD_TORCH_CHECK(*mebibytes >= '0' && *mebibytes <= '9' && !*end && asked <= (size_t(-1) >> 20),
                      "TIGER_FAST_CACHE_MIB must be a number of mebibytes, got ", mebibytes);
      limit = size_t(asked) << 20;
    } else {
      limit = std::min(size_t(1) << 30, available() / 8);
    }
  }
};

// Never destroyed: tensors may outlive every static object.
Cache& cache() {
  static Cache* instance = [] {
    auto* made = new Cache;
    // A process that forks while another thread holds the lock must not inherit it held.
    pthread_atfork([] { cache().mutex.lock(); }, [] { cache().mutex.unlock(); }, [] { cache().mutex.unlock(); });
    return made;
  }();
  return *instance;
}

// AddressSanitizer is told what of a block nobody may touch: what lies behind the tensor, and a block that is kept.
#if defined(__SANITIZE_ADDRESS__)
void forbid(void* data, size_t size) { __asan_poison_memory_region(data, size); }
void permit(void* data, size_t size) { __asan_unpoison_memory_region(data, size); }
#else
void forbid(void*, size_t) {}
void permit(void*, size_t) {}
#endif

void unmap(const Block& block) {
  permit(block.data, block.size);  // the addresses may be another's next
  munmap(block.data, block.size);
}

// Null where the system has none.
void* map(size_t size) {
  size_t padded = size + kHugePage;
  void* start = mmap(nullptr, padded, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (start == MAP_FAILED) return nullptr;
  auto address = reinterpret_cast<uintptr_t>(start);
  uintptr_t aligned = (address + kHugePage - 1) / kHugePage * kHugePage;
  if (aligned > address) munmap(start, aligned - address);
  size_t behind = address + padded - (aligned + size);
  if (behind) munmap(reinterpret_cast<void*>(aligned + size), behind);
  auto* data = reinterpret_cast<void*>(aligned);
#if defined(MADV_HUGEPAGE)
  madvise(data, size, MADV_HUGEPAGE);
#endif
  return data;
}

}  // namespace

void* acquire(size_t bytes, size_t* size) {
  size_t wanted = (bytes + kHugePage - 1) / kHugePage * kHugePage;
  Cache& c = cache();
  {
    std::lock_guard<std::mutex> lock(c.mutex);
    // The smallest kept block that is large enough and wastes at most a quarter or a huge page; the newest of those,
    // whose lines may still be in a cache.
    auto best = c.blocks.end();
    for (auto it = c.blocks.begin(); it != c.blocks.end(); ++it)
      if (it->size >= wanted && it->size <= wanted + std::max(wanted / 4, kHugePage) &&
          (best == c.blocks.end() || it->size <= best->size))
        best = it;
    if (best != c.blocks.end()) {
      Block found = *best;
      c.blocks.erase(best);
      c.bytes -= found.size;
      *size = found.size;
      permit(found.data, bytes);
      return found.data;
    }
  }
  *size = wanted;
  void* made = map(wanted);
  if (!made) {  // what is kept for later may be what is missing now
    empty_cache();
    made = map(wanted);
  }
  if (!made) throw std::bad_alloc();
  forbid(static_cast<char*>(made) + bytes, wanted - bytes);
  return made;
}

void release(void* block, size_t size) {
  Cache& c = cache();
  if (size > c.limit) {  // would push out everything else and not stay either
    unmap({block, size});
    return;
  }
  forbid(block, size);
  std::vector<Block> dropped;
  {
    std::lock_guard<std::mutex> lock(c.mutex);
    c.blocks.push_back({block, size});
    c.bytes += size;
    size_t oldest = 0;
    while (c.bytes > c.limit) {
      dropped.push_back(c.blocks[oldest]);
      c.bytes -= c.blocks[oldest++].size;
    }
    c.blocks.erase(c.blocks.begin(), c.blocks.begin() + std::ptrdiff_t(oldest));
  }
  for (const Block& b : dropped) unmap(b);
}

void empty_cache() {
  Cache& c = cache();
  std::vector<Block> dropped;
  {
    std::lock_guard<std::mutex> lock(c.mutex);
    dropped.swap(c.blocks);
    c.bytes = 0;
  }
  for (const Block& b : dropped) unmap(b);
}

int64_t cached_bytes() {
  Cache& c = cache();
  std::lock_guard<std::mutex> lock(c.mutex);
  return int64_t(c.bytes);
}

int64_t limit_bytes() { return int64_t(cache().limit); }

}  // namespace memory
}  // namespace tiger_fast
