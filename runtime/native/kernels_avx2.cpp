#include "conv.h"
#include "normalize.h"

namespace latentforge {

extern const Kernels kAvx2;
const Kernels kAvx2 = {"avx2", convolve, group_scale, group_norm};

}  // namespace latentforge
