// Choice of the instruction set, once per process.
#include "kernels.h"

#include <cstdlib>
#include <cstring>

namespace latentforge {
namespace {

const Kernels& select_kernels() {
  const char* name = std::getenv("LATENTFORGE_KERNELS");
  const auto allowed = [name](const Kernels& candidate) {
    return name == nullptr || std::strcmp(name, candidate.name) == 0;
  };
#ifndef LATENTFORGE_PORTABLE
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  if (avx512 && allowed(kAvx512)) return kAvx512;
  if (avx2 && allowed(kAvx2)) return kAvx2;
#endif
  return kPortable;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& selected = select_kernels();
  return selected;
}

}  // namespace latentforge
