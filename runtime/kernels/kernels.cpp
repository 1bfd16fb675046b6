#include "kernels.h"

#include <cstdlib>
#include <cstring>

namespace latentforge {
namespace {

const Kernels& choose() {
  const char* asked = std::getenv("LATENTFORGE_KERNELS");
  const auto wanted = [asked](const Kernels& found) {
    return asked == nullptr || std::strcmp(asked, found.name) == 0;
  };
#ifndef LATENTFORGE_PORTABLE
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  if (avx512 && wanted(kAvx512)) return kAvx512;
  if (avx2 && wanted(kAvx2)) return kAvx2;
#endif
  return kPortable;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace latentforge
