#include "conv.h"
#include "normalize.h"

namespace latentforge {

extern const Kernels kPortable;
const Kernels kPortable = {"portable", convolve, group_scale, group_norm};

}  // namespace latentforge
