#include "attention.h"
#include "conv.h"
#include "measure.h"
#include "normalize.h"

namespace latentforge {

extern const Kernels kAvx2;
const Kernels kAvx2 = {"avx2", least_work, convolve, attend, group_scale, group_norm, peak, product};

}  // namespace latentforge
