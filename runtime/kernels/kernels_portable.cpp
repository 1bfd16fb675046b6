#include "attention.h"
#include "conv.h"
#include "measure.h"
#include "normalize.h"

namespace latentforge {

extern const Kernels kPortable;
const Kernels kPortable = {"portable", least_work, convolve, attend, group_scale, group_norm, peak, product};

}  // namespace latentforge
