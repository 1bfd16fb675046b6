// Scratch memory, kept from operator to operator so that its pages are mapped once.
#pragma once

#include <cstddef>

namespace latentforge {

enum ScratchUse { kInputs, kStrip, kWeights, kProducts, kRowsOfHead, kScratchUses };

// Returns a buffer of at least this many floats that belongs to the calling thread, aligned to 64
// bytes. The next call with the same use may free or overwrite it. Throws std::bad_alloc.
float* scratch(ScratchUse use, size_t floats);

// Buffer shared by all threads of one operator; returned to a pool at the end of its scope.
class Shared {
 public:
  explicit Shared(size_t floats);
  ~Shared();
  Shared(const Shared&) = delete;
  Shared& operator=(const Shared&) = delete;
  float* data() const { return data_; }

 private:
  size_t floats_;
  float* data_;
};

}  // namespace latentforge
