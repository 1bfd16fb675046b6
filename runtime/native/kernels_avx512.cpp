#include "conv.h"
#include "normalize.h"

namespace latentforge {

extern const Kernels kAvx512;
const Kernels kAvx512 = {"avx512", convolve, group_scale, group_norm};

}  // namespace latentforge
