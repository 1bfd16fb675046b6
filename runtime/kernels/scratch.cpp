#include "scratch.h"

#include <sys/mman.h>

#include <cstdlib>
#include <mutex>
#include <new>
#include <vector>

namespace latentforge {
namespace {

constexpr size_t kHuge = size_t(2) << 20;  // a huge page needs fewer TLB entries

struct Buffer {
  float* data = nullptr;
  size_t floats = 0;
};

#ifdef LATENTFORGE_EXACT

// For sanitizers: the buffer ends with its last float, and none is used twice.
constexpr bool kReused = false;

Buffer allocate(size_t floats) {
  void* memory = nullptr;
  if (posix_memalign(&memory, 64, floats * sizeof(float)) != 0) throw std::bad_alloc();
  return {static_cast<float*>(memory), floats};
}

#else

constexpr bool kReused = true;

Buffer allocate(size_t floats) {
  const size_t unit = floats * sizeof(float) >= kHuge ? kHuge : 64;
  const size_t bytes = (floats * sizeof(float) + unit - 1) / unit * unit;
  void* memory = std::aligned_alloc(unit, bytes);
  if (memory == nullptr) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
  if (unit == kHuge) madvise(memory, bytes, MADV_HUGEPAGE);
#endif
  return {static_cast<float*>(memory), bytes / sizeof(float)};
}

#endif

struct ThreadBuffers {
  Buffer buffers[kScratchUses];
  ~ThreadBuffers() {
    for (Buffer& buffer : buffers) std::free(buffer.data);
  }
};

std::mutex mutex;
std::vector<Buffer>* idle = new std::vector<Buffer>;  // never freed: it outlives all threads that use it

constexpr size_t kKept = kReused ? 2 : 0;

}  // namespace

float* scratch(ScratchUse use, size_t floats) {
  thread_local ThreadBuffers own;
  Buffer& buffer = own.buffers[use];
  if (buffer.floats < floats || !kReused) {
    std::free(buffer.data);
    buffer = {};
    buffer = allocate(floats);
  }
  return buffer.data;
}

Shared::Shared(size_t floats) : floats_(floats), data_(nullptr) {
  {
    std::lock_guard<std::mutex> lock(mutex);
    for (size_t i = 0; i < idle->size(); ++i) {
      if ((*idle)[i].floats >= floats) {
        floats_ = (*idle)[i].floats;
        data_ = (*idle)[i].data;
        idle->erase(idle->begin() + long(i));
        return;
      }
    }
  }
  const Buffer buffer = allocate(floats);
  floats_ = buffer.floats;
  data_ = buffer.data;
}

Shared::~Shared() {
  Buffer smallest{data_, floats_};
  std::lock_guard<std::mutex> lock(mutex);
  if (idle->size() < kKept) {
    idle->push_back(smallest);
    return;
  }
  for (Buffer& buffer : *idle) {
    if (buffer.floats < smallest.floats) std::swap(buffer, smallest);
  }
  std::free(smallest.data);
}

}  // namespace latentforge
