// Memory to work in. It is kept for the next operator, so that pages are touched once.
#pragma once

#include <cstddef>

namespace latentforge {

enum ScratchUse { kInputs, kStrip, kWeights, kProducts, kRowsOfHead, kScratchUses };

// At least so many floats of this thread's own, aligned to 64 bytes; what is in them is lost with
// the next request for the same use. Throws std::bad_alloc.
float* scratch(ScratchUse use, size_t floats);

// The same for one operator's threads together, until it goes out of scope.
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
