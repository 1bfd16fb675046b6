#include "attention.h"
#include "conv.h"
#include "measure.h"
#include "normalize.h"

namespace latentforge {

extern const Kernels kAvx512;
const Kernels kAvx512 = {"avx512", least_work, convolve, attend, group_scale, group_norm, peak, product};

}  // namespace latentforge
