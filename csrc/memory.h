// Memory of large outputs and temporaries: huge pages, kept for reuse within a bound.
//
// A fresh large block costs a page fault every 4 KiB, which takes longer than the arithmetic that fills it. Blocks from
// kSmallest bytes on are mapped in huge pages (madvise), and a block that its last tensor gave back is kept for the next
// output of about its size. What is kept stays within a limit: TIGER_FAST_CACHE_MIB, else 1 GiB or an eighth of the
// machine's or the container's memory if that is less; beyond it the oldest blocks return to the system. Smaller blocks
// are torch's.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tiger_fast {
namespace memory {

constexpr size_t kSmallest = size_t(1) << 20;

// A block of at least `bytes` bytes, aligned to 64. `size` is what release() asks for.
void* acquire(size_t bytes, size_t* size);
void release(void* block, size_t size);

// Returns every kept block to the system.
void empty_cache();
int64_t cached_bytes();
int64_t limit_bytes();

}  // namespace memory
}  // namespace tiger_fast
